"""From a resolved study to Costs: what one step of each method costs on this device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdprof.device import versions
from kdprof.errors import UserError
from kdprof.measure.count import Count, count_step, fake_tensors
from kdprof.measure.isolation import Failure, Request, explain, guarded, run_isolated
from kdprof.measure.latency import Report
from kdprof.measure.memory import available_bytes
from kdprof.measure.methods import measure_here
from kdprof.measure.modules import modules_flop
from kdprof.measure.session import Files
from kdprof.progress import Progress
from kdprof.records import Cost, Memory
from kdprof.resolve import ResolvedStudy

COUNTED = "counted, not run (--count-only)"


@dataclass
class Measured:
    """What a call of :func:`measure` found."""

    costs: list[Cost] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Methods that could not be measured, with the reason."""

    def summary(self) -> str:
        """Return the failures, one line each."""
        return "\n".join(f"method '{name}': {why}" for name, why in self.failures.items())


def measure(
    study: ResolvedStudy,
    names: Sequence[str],
    progress: Progress,
    files: Files | None = None,
    keep: Callable[[Cost], object] | None = None,
) -> Measured:
    """Measure the step of each named method, each in a process of its own in turn with the
    reference's.

    A method whose step fails, or cannot fit into memory, is among the failures and does not keep
    the others from being measured.

    Args:
        keep: called with each Cost as soon as it is there.

    Raises:
        UserError: no step fits into the device's memory, or an image is damaged.
    """
    measured = Measured(failures=_what_cannot_fit(study, names, progress))
    if study.study.data_settings.cache == "disk":
        study.decoded("train")  # here, with a bar; the methods' processes find it made
    for name in (name for name in names if name not in measured.failures):
        own = files.of(name) if files and len(names) > 1 else files or Files()
        try:
            with _bar(study, name, progress) as report:
                cost = _measure_one(study, name, own, report)
        except Failure as failure:
            measured.failures[name] = str(failure)
            progress.say(f"{name}: failed: {failure}")
            continue
        measured.costs.append(cost)
        if keep is not None:
            keep(cost)
        progress.detail(f"{name}: {cost.timing['rounds']} rounds; {cost.timing['stopped']}")
    return measured


def _measure_one(study: ResolvedStudy, name: str, files: Files, report: Report) -> Cost:
    if study.study.measure.in_process:
        with redirect_stdout(sys.stderr):
            return guarded(lambda: measure_here(study, name, files, report))
    arguments = {
        "study": study.study.model_dump(mode="json"),
        "name": name,
        "files": files.to_json(),
        "parent": os.getpid(),
    }
    return run_isolated(Request("method", arguments, study.study.step.gpus), report)


@contextmanager
def _bar(study: ResolvedStudy, name: str, progress: Progress) -> Iterator[Report]:
    """Show the seconds that a method's rounds take, of those they may take."""
    limit = round(study.study.measure.max_time_s)
    with progress.task(f"{name} (seconds at most)", limit) as advance:
        began, shown = None, 0

        def report(done: int, width: float | None) -> None:
            nonlocal began, shown
            began = began or time.monotonic()
            passed = min(limit, round(time.monotonic() - began))
            advance(passed - shown)
            shown = passed

        yield report


def count_costs(
    study: ResolvedStudy, names: Sequence[str], progress: Progress, *, modules: bool = False
) -> Measured:
    """Count each named method's step without running it: no device is needed.

    The Costs have no latency and no memory, with the reason; they are no basis for a budget.

    Args:
        modules: count the networks' modules with fvcore, too; takes seconds.
    """
    measured = Measured()
    by_module = _modules_of(study) if modules else None
    for name, made in _counts(study, names, progress):
        if isinstance(made, Failure):
            measured.failures[name] = str(made)
        else:
            measured.costs.append(_counted(study, name, made, by_module))
    return measured


def _modules_of(study: ResolvedStudy) -> dict[str, dict[str, float]]:
    step = study.study.step
    taps = ("logits", "aux") if step.aux_weight else ("logits",)
    return {
        "student": modules_flop(study.student(0), step.share, step.crop, taps=taps),
        "teacher": modules_flop(study.teacher(), step.share, step.crop),
    }


def _counted(
    study: ResolvedStudy, name: str, made: Count, modules: dict[str, dict[str, float]] | None
) -> Cost:
    run_only = (
        "latency_s", "ratio", "end_to_end_s", "end_to_end_ratio", "canary", "phases_s",
        "hidden_cost", "ceilings", "bounds", "mfu", "energy_j", "energy",
    )  # fmt: skip
    unavailable = dict.fromkeys((*run_only, "memory_bytes"), COUNTED)
    if modules is None:
        unavailable["modules_flop"] = "not asked for (--modules)"
    return Cost(
        method=name,
        gpus=study.study.step.gpus,
        device="none: counted, not run",
        key=study.cost_key(name),
        session="",
        **dict.fromkeys(run_only),
        samples_s=[],
        reference_samples_s=[],
        end_to_end_samples_s=[],
        reference_end_to_end_samples_s=[],
        outliers=[],
        terms=made.terms,
        flop=made.flop,
        modules_flop=modules,
        operations=made.operations,
        bytes_moved=sum(o.bytes_read + o.bytes_written for o in made.operations),
        memory_bytes=Memory(**dict.fromkeys(Memory.model_fields)),
        reliable=True,
        warnings=[],
        unavailable=unavailable,
        timing={},
        hardware={},
        settings=study.cost_settings(name),
        versions=versions(),
    )


def _counts(
    study: ResolvedStudy, names: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Count | Failure]]:
    study = study.alone()
    # One of each network for all methods: counting changes neither, and making them takes seconds.
    mode, teacher, student = fake_tensors(), study.frozen(study.teacher()), None
    with progress.task("counting FLOP", len(names)) as advance:
        for name in names:
            step = study.step(name, teacher, device=torch.device("cpu"), student=student)
            student = step.student
            try:
                # What a user's method prints belongs beside the records, not among them.
                with redirect_stdout(sys.stderr):
                    made: Count | Failure = count_step(step, mode)
            except (Exception, SystemExit) as error:
                made = Failure(explain(error))
            yield name, made
            advance(1)


def _what_cannot_fit(
    study: ResolvedStudy, names: Sequence[str], progress: Progress
) -> dict[str, str]:
    """Return the methods whose steps cannot fit into memory, found before any of them runs.

    A step that cannot be counted on fake tensors is let through: it will be seen when it runs.

    Raises:
        UserError: none fits, so that the study's sizes are to blame.
    """
    step, free = study.study.step, available_bytes(study.device)
    if free is None:
        return {}
    found = {
        name: f"a step with batch {step.share} and crop {step.crop[0]}x{step.crop[1]} needs at "
        f"least {made.least_memory_bytes / 2**30:.1f} GiB, {study.device} has "
        f"{free / 2**30:.1f} GiB free; lower --crop or --batch"
        for name, made in _counts(study, names, progress)
        if isinstance(made, Count) and made.least_memory_bytes > free
    }
    if found and len(found) == len(names):
        raise UserError(*Measured(failures=found).summary().splitlines())
    return found


def check_files(files: Files, device: torch.device) -> None:
    """Refuse files that cannot be made on this device.

    Raises:
        UserError: a CUDA allocator's history on a CPU, or a folder that does not exist.
    """
    problems = [
        f"no folder {path.parent} for {path.name}; make it first"
        for path in vars(files).values()
        if isinstance(path, Path) and not path.parent.is_dir()
    ]
    if files.memory_timeline is not None and device.type != "cuda":
        problems.append(
            "--memory-timeline is the CUDA allocator's history; a CPU has none, leave it out"
        )
    if problems:
        raise UserError(*problems)
