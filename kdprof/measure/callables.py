"""Anybody's training step, measured like a method's: a callable that makes one whole step."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdprof.device import find_device, versions
from kdprof.errors import UserError, nearest
from kdprof.hardware import hardware_of
from kdprof.measure.isolation import Failure, Request, guarded, run_isolated
from kdprof.measure.latency import Report
from kdprof.measure.session import Files, Surroundings, run_session
from kdprof.measure.subject import CallableSubject
from kdprof.progress import Progress
from kdprof.records import Cost
from kdprof.study import MeasureSettings

Step = Callable[[], Any]


@dataclass(frozen=True)
class StepSource:
    """Where a step comes from: a function of a file that makes it."""

    path: str
    function: str

    @property
    def name(self) -> str:
        """The name its Cost goes by: ``mine.make_step``."""
        return f"{Path(self.path).stem}.{self.function}"

    @classmethod
    def parse(cls, spec: str) -> StepSource:
        """Read ``FILE.py:function``.

        Raises:
            UserError: another form, or no such file.
        """
        path, _, function = spec.rpartition(":")
        if not path.endswith(".py") or not function:
            raise UserError(f"--step {spec}: write FILE.py:FUNCTION, such as ./mine.py:make_step")
        if not Path(path).is_file():
            raise UserError(f"--step {spec}: there is no file {path}")
        return cls(str(Path(path).resolve()), function)

    def make(self) -> Step:
        """Load the file and call the function.

        Raises:
            UserError: the file has no such function, or what it returned cannot be called.
        """
        name = f"kdprof_step_{hashlib.sha256(self.path.encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, str(Path(self.path).parent))  # as when the file itself is run
        spec.loader.exec_module(module)
        function = getattr(module, self.function, None)
        if not callable(function):
            functions = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
            told = nearest(self.function, functions)
            raise UserError(f"{self.path} has no function '{self.function}'; {told}")
        step = function()
        if not callable(step):
            raise UserError(
                f"{self.name} returned {type(step).__name__}; it must return a callable of no "
                "arguments that makes one training step"
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
) -> dict[str, Cost]:
    """Measure callables, each of which makes one whole training step, in this process.

    The same statistics as for kdprof's own methods: interleaved rounds with the reference in
    random order, block-bootstrap intervals, operators, memory, energy, the state of the device.
    The switches of torch stay as they are found.

    Args:
        steps: by name. A step that returns its loss (a tensor or number) has it checked.
        reference: name that ratios are formed against; the first one if not given.
        device: auto, cpu, cuda or cuda:N; where the steps run.
        precision: fp32, bf16 or fp16: which of the device's published peaks MFU is a share of, and
            which ceilings the steps are compared with. None: no MFU, the ceilings of fp32.
        precision_target: stop when the ratio's 95 % interval is this narrow, relative to it.
        max_time_s: and no later than this, for each step.

    Returns:
        A Cost per step. All steps are resident at once, so the memory of each includes the others'.

    Raises:
        UserError: no steps, or no such reference or device.
        Failure: a step raised, or its loss is not finite; ``costs`` has those of the others.
    """
    if not steps:
        raise UserError("no steps given; measure_steps({'mine': step}) takes at least one")
    reference = reference if reference is not None else next(iter(steps))
    if reference not in steps:
        raise UserError(f"reference '{reference}' is no step; {nearest(reference, steps)}")
    settings = MeasureSettings(
        precision_target=precision_target, max_time_s=max_time_s, in_process=True
    )
    where = find_device(device)

    def measure_one(name: str) -> Cost:
        subject = CallableSubject(name, steps[name])
        beside = CallableSubject(reference, steps[reference])
        return _cost(
            subject,
            None if name == reference else lambda: beside,
            device=where,
            settings=settings,
            around=Surroundings(reference, precision),
            source={},
        )

    costs, failures = {}, {}
    for name in steps:
        try:
            costs[name] = guarded(lambda name=name: measure_one(name))
        except Failure as failure:
            failures[name] = str(failure)
    if len(steps) > 1:
        for cost in costs.values():
            cost.warnings.append("memory includes the other steps, which were resident, too")
    if failures:
        told = "\n".join(f"step '{name}': {why}" for name, why in failures.items())
        raise Failure(told, costs)
    return costs


def _silent(done: int, width: float | None) -> None:
    """Report nothing."""


def _cost(
    subject: CallableSubject,
    build_reference: Callable[[], CallableSubject] | None,
    *,
    device: torch.device,
    settings: MeasureSettings,
    around: Surroundings,
    source: Mapping[str, str],
    parent: int | None = None,
    files: Files | None = None,
    report: Report = _silent,
) -> Cost:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and the allocator's statistics are the current one's
    own_pids = frozenset({os.getpid()} | ({parent} if parent is not None else set()))
    fields = run_session(
        subject,
        build_reference,
        device=device,
        hardware=hardware_of(device, own_pids),
        settings=settings,
        around=around,
        files=files or Files(),
        report=report,
    )
    known = {"step": subject.name, "precision": around.precision, **source}
    key = hashlib.sha256(json.dumps([known, fields["device"], versions()]).encode()).hexdigest()
    return Cost(method=subject.name, key=key[:12], settings=known, versions=versions(), **fields)


def measure_files(
    sources: Sequence[StepSource],
    *,
    device: str,
    precision: str | None,
    settings: MeasureSettings,
    files: Files,
    progress: Progress,
) -> tuple[list[Cost], dict[str, str]]:
    """Measure the steps that files make, each in a process of its own in turn with the first.

    Returns:
        The Costs, and the steps that could not be measured with the reason.

    Raises:
        UserError: two steps have one name.
    """
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two steps are called {twice[0]}; rename a file or its function")
    costs, failures = [], {}
    for source in sources:
        progress.say(f"measuring {source.name}")
        arguments = {
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
                cost = guarded(lambda a=arguments: measure_file(**a, report=_silent))
            else:
                cost = run_isolated(Request("step", arguments), _silent)
        except Failure as failure:
            failures[source.name] = str(failure)
            continue
        costs.append(cost)
    return costs, failures


def measure_file(
    source: Mapping[str, str],
    reference: Mapping[str, str],
    device: str,
    precision: str | None,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    parent: int | None,
    report: Report,
) -> Cost:
    """Measure a step that a file makes, in this process. All but ``report`` are JSON-able."""
    own, beside, where = StepSource(**source), StepSource(**reference), find_device(device)

    def build_reference() -> CallableSubject:
        return CallableSubject(beside.name, beside.make())

    return _cost(
        CallableSubject(own.name, own.make()),
        None if own == beside else build_reference,
        device=where,
        settings=MeasureSettings.model_validate(settings),
        around=Surroundings(beside.name, precision),
        source={
            "file": own.path,
            "sha256": hashlib.sha256(Path(own.path).read_bytes()).hexdigest(),
        },
        parent=parent,
        files=Files.from_json(files),
        report=report,
    )
