"""A user's training step, measured like a method's: a callable that runs one whole step."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdprof.errors import UserError, nearest
from kdprof.hardware import hardware_of
from kdprof.hardware.device import check_precision, find_device, versions
from kdprof.measure.cost import Identity, measured_cost
from kdprof.measure.isolation import Failure, MeasureRequest, guarded, run_isolated
from kdprof.measure.latency import OnRound, ignore_round
from kdprof.measure.profiles import Files, write_files
from kdprof.measure.session import Bench, compare, read_alone
from kdprof.measure.stages import Stages
from kdprof.measure.subject import BadStep
from kdprof.progress import Progress
from kdprof.records import Cost
from kdprof.step import Mark
from kdprof.store import absolute
from kdprof.study import MeasureSettings
from kdprof.user_files import following, import_file, import_function, named_in_file, sources_of

Step = Callable[[], Any]


class CallableSubject:
    """A user's step: a callable of no arguments that runs one whole training step."""

    phases = ()
    traced = None
    feed = None

    def __init__(self, name: str, step: Callable[[], Any]):
        self.name, self._step = name, step

    def run(self, mark: Mark) -> Any:
        """Run one step."""
        return self._step()

    def check(self, result: Any) -> None:
        """Refuse a returned loss (a tensor or number) that is not finite.

        Raises:
            BadStep: the loss is nan or infinite.
        """
        if isinstance(result, Tensor):
            finite = bool(torch.isfinite(result.detach()).all())
        else:
            finite = not isinstance(result, float) or math.isfinite(result)
        if not finite:
            raise BadStep("the step returned a loss that is not finite")


@dataclass(frozen=True)
class StepSource:
    """The source of a step: a function in a file that makes it."""

    path: str
    function: str

    @property
    def name(self) -> str:
        """The step's name in its Cost: ``mine.make_step``."""
        return f"{Path(self.path).stem}.{self.function}"

    @classmethod
    def parse(cls, spec: str) -> StepSource:
        """Read ``FILE.py:function``.

        Raises:
            UserError: ``spec`` has another form, or the file does not exist.
        """
        own = named_in_file(spec)
        if own is None or not own.name:
            raise UserError(f"--step {spec}: write FILE.py:FUNCTION, such as ./mine.py:make_step")
        own.check_exists("--step")
        return cls(str(absolute(str(own.path))), own.name)

    def make(self) -> Step:
        """Load the file and call the function.

        Raises:
            UserError: the file cannot be imported or has no such function, or what the function
                returned cannot be called.
        """
        make = import_function(Path(self.path), self.function)
        with following(Path(self.path)):
            step = make()
        if not callable(step):
            raise UserError(
                f"{self.name} returned {type(step).__name__}; it must return a callable of no "
                "arguments that runs one training step"
            )
        return step


def measure_steps(
    steps: Mapping[str, Step],
    *,
    reference: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    precision_target: float = 0.01,
    max_time_s: float = 60.0,
    detail: bool = False,
) -> dict[str, Cost]:
    """Measure callables, each of which runs one whole training step, in this process.

    The statistics are the same as for kdprof's own methods: interleaved rounds with the reference
    in random order, block-bootstrap intervals, operators, memory, energy, the state of the device.
    The switches of torch are not changed.

    Args:
        steps: by name. If a step returns its loss (a tensor or number), the loss is checked.
        reference: name of the step that ratios are to; the first one if not given.
        device: auto, cpu, cuda or cuda:N; where the steps run.
        precision: fp32, tf32, bf16 or fp16: selects the published peak that MFU is a share of, and
            the ceilings that the steps are compared with. None: no MFU, the ceilings of fp32.
        precision_target: stop when the ratio's 95 % interval is this narrow, relative to it.
        max_time_s: stop each step's measurement no later than this.
        detail: also time single operators, and measure energy in a window of its own.

    Returns:
        A Cost per step. All steps are resident at once, so the memory of each includes the others'.

    Raises:
        UserError: ``steps`` is empty, the reference or the device does not exist, or the device
            does not have the precision.
        Failure: a step raised an error, or its loss is not finite; ``costs`` has those of the
            others.
    """
    if not steps:
        raise UserError("no steps given; measure_steps({'mine': step}) takes at least one")
    reference = reference if reference is not None else next(iter(steps))
    if reference not in steps:
        raise UserError(f"reference '{reference}' is not a step; {nearest(reference, steps)}")
    settings = MeasureSettings(
        precision_target=precision_target,
        max_time_s=max_time_s,
        detail=detail,
        in_process=True,
    )
    conditions = _Conditions(find_device(device), precision, settings, reference)
    check_precision(conditions.device, precision or "fp32")

    def measure_one(name: str) -> Cost:
        compared = CallableSubject(reference, steps[reference])
        return _measure(
            CallableSubject(name, steps[name]),
            None if name == reference else lambda: compared,
            conditions,
        )

    costs, failures = {}, {}
    for name in steps:
        try:
            costs[name] = guarded(partial(measure_one, name))
        except Failure as failure:
            failures[name] = str(failure)
    if len(steps) > 1:
        for cost in costs.values():
            cost.warnings.append("memory includes the other steps, which were also resident")
    if failures:
        summary = "\n".join(f"step '{name}': {why}" for name, why in failures.items())
        raise Failure(summary, costs)
    return costs


@dataclass(frozen=True)
class _Conditions:
    """The conditions under which steps are measured.

    Attributes:
        reference: name of the step that ratios are to.
        parent: the process that started this one; it is not one of the device's other processes.
    """

    device: torch.device
    precision: str | None
    settings: MeasureSettings
    reference: str
    parent: int | None = None

    def own_pids(self) -> frozenset[int]:
        return frozenset({os.getpid()} | ({self.parent} if self.parent is not None else set()))


def _measure(
    subject: CallableSubject,
    build_reference: Callable[[], CallableSubject] | None,
    conditions: _Conditions,
    *,
    sources: Mapping[str, str] | None = None,
    files: Files | None = None,
    on_round: OnRound = ignore_round,
) -> Cost:
    """Measure one step in this process.

    Args:
        sources: hashes of the files that the step was made from; part of the Cost's settings.
    """
    device = conditions.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and allocator statistics are the current device's
    hardware = hardware_of(device, conditions.own_pids(), users=1)  # a parent leaves it alone
    bench = Bench.of(device, hardware, conditions.settings, conditions.precision, Stages())
    alone = read_alone(bench, subject, None)
    readings = compare(bench, alone, subject, build_reference, reference=None, on_round=on_round)
    write_files(subject, files or Files())
    settings = {"step": subject.name, "precision": conditions.precision, "sources": sources}
    key = hashlib.sha256(json.dumps([settings, hardware.name, versions()]).encode()).hexdigest()
    identity = Identity(method=subject.name, gpus=1, key=key[:12], settings=settings)
    return measured_cost(identity, readings, conditions.reference)


def measure_files(
    sources: Sequence[StepSource],
    *,
    device: str,
    precision: str | None,
    settings: MeasureSettings,
    files: Files,
    progress: Progress,
) -> tuple[list[Cost], dict[str, str]]:
    """Measure the steps that files make, each in a separate process, interleaved with the first.

    Returns:
        The Costs, and the steps that could not be measured with the reason.

    Raises:
        UserError: two steps have the same name, or the device does not have the precision.
    """
    check_precision(find_device(device), precision or "fp32")
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two steps are called {twice[0]}; rename a file or its function")
    costs, failures = [], {}
    for source in sources:
        progress.say(f"measuring {source.name}")
        arguments: dict[str, Any] = {
            "source": vars(source),
            "reference": vars(sources[0]),
            "device": device,
            "precision": precision,
            "settings": settings.model_dump(mode="json"),
            "files": (files.of(source.name) if len(sources) > 1 else files).to_json(),
            "parent": os.getpid(),
        }
        try:
            if settings.in_process:
                cost = guarded(partial(measure_file, **arguments, on_round=ignore_round))
            else:
                cost = _measured_apart(arguments)
        except Failure as failure:
            failures[source.name] = str(failure)
            continue
        costs.append(cost)
    return costs, failures


def _measured_apart(arguments: dict[str, Any]) -> Cost:
    """Measure a step in a separate process."""
    outcome = run_isolated(MeasureRequest("step", arguments), lambda kind, content: None)
    if outcome.failure is not None:
        raise Failure(outcome.failure)
    (cost,) = outcome.costs.values()
    return cost


def measure_file(
    source: Mapping[str, str],
    reference: Mapping[str, str],
    device: str,
    precision: str | None,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    parent: int | None,
    on_round: OnRound,
) -> Cost:
    """Measure a step that a file makes, in this process.

    All arguments but ``on_round`` are JSON-serialisable.
    """
    own, compared = StepSource(**source), StepSource(**reference)
    subject = CallableSubject(own.name, own.make())
    return _measure(
        subject,
        None if own == compared else lambda: CallableSubject(compared.name, compared.make()),
        _Conditions(
            find_device(device),
            precision,
            MeasureSettings.model_validate(settings),
            compared.name,
            parent,
        ),
        sources=sources_of(import_file(Path(own.path))),
        files=Files.from_json(files),
        on_round=on_round,
    )
