"""Measuring: from a resolved study to Costs, which say what each method's step costs here.

Steps are timed, traced and counted here; nothing here trains, converts budgets or writes a results
folder.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

from kdprof.errors import refuse_uncounted
from kdprof.measure.cost import uncounted_work
from kdprof.measure.counting.count import Count
from kdprof.measure.counting.count_study import Measured, counts, too_large
from kdprof.measure.isolation import (
    Failure,
    MeasureRequest,
    Outcome,
    guarded,
    run_isolated,
)
from kdprof.measure.latency import OnRound
from kdprof.measure.profiles import Files
from kdprof.measure.study_step import StudyBench
from kdprof.measure.turns import TRAINING_SHARE, PlannedTraining, TrainingPlan, Turns
from kdprof.processes import Processes
from kdprof.progress import Advance, Progress
from kdprof.records import REFERENCE, Cost
from kdprof.resolve import ResolvedStudy

__all__ = ["TRAINING_SHARE", "Files", "Measured", "TrainingPlan", "measure"]


def measure(
    study: ResolvedStudy,
    names: Sequence[str],
    progress: Progress,
    files: Files | None = None,
    keep: Callable[[Cost], object] | None = None,
    plan: TrainingPlan | None = None,
    processes: Processes | None = None,
) -> Measured[Cost]:
    """Measure the step of each named method, interleaved with the reference, in one process.

    A method whose step fails or cannot fit into memory is listed among the failures. The process is
    then started again for the others; so it is after a method that leaves memory behind.

    Args:
        keep: called with each Cost as soon as it is measured, and again if it becomes more precise.
        plan: the training that follows; None if nothing is trained.
        processes: processes of ``kdprof.measure`` to measure in first; new ones if not given.

    Raises:
        UserError: no step fits into the device's memory, an image is damaged, or the study needs
            FLOP that cannot be counted.
    """
    began = time.monotonic()
    needed = dict.fromkeys([REFERENCE, *names])
    with ExitStack() as running:
        if processes is None and not study.measure.in_process:
            processes = running.enter_context(Processes("kdprof.measure", study.step.gpus))
        counted = dict(counts(study, list(needed), progress, study.device.type))
        measured = Measured[Cost](failures=too_large(study, names, counted))
        if study.data_settings.cache == "disk":
            study.data.decoded("train")  # here, with a progress bar; the child processes find it
        found = {name: made for name, made in counted.items() if isinstance(made, Count)}
        if study.needs_flop:
            missed = {name: uncounted_work(count.operations) for name, count in found.items()}
            refuse_uncounted(study.needs_flop, missed)
        names = [name for name in _in_order(study, names) if name not in measured.failures]
        planned = None if plan is None else _by_flop(plan, found)
        display = running.enter_context(_Display(study, progress))
        work = _Work(
            study, found, _files_of(names, files), planned, display, keep, began, processes
        )
        work.measure(names)
    measured.costs += [work.costs[name] for name in needed if name in work.costs]
    measured.failures |= work.failures
    return measured


def _by_flop(plan: TrainingPlan, counts: Mapping[str, Count]) -> PlannedTraining:
    """Return a training in iterations of the reference, by FLOP: nothing else is known yet."""
    flop = {name: count.flop for name, count in counts.items()}
    reference = flop[REFERENCE].total if REFERENCE in flop else None
    if not reference:
        return plan.in_reference_iterations({})
    # A teacher's training step is its forward, and twice that for its backward.
    teacher = 3 * max(one.teacher or 0.0 for one in flop.values())
    totals = {name: one.total for name, one in flop.items()}
    ratios = {name: total / reference for name, total in totals.items() if total is not None}
    return plan.in_reference_iterations(ratios, teacher / reference)


def _in_order(study: ResolvedStudy, names: Sequence[str]) -> list[str]:
    """Return the methods in the order of measuring: first those that are measured before a teacher
    exists."""
    return sorted(names, key=lambda name: study.methods[name].cls.needs_teacher())


def _files_of(names: Sequence[str], files: Files | None) -> dict[str, Files]:
    if files is None:
        return {}
    return {name: files.of(name) if len(names) > 1 else files for name in names}


@dataclass
class _Work:
    """The measuring of a study's methods, over all processes that it takes."""

    study: ResolvedStudy
    counts: Mapping[str, Count]
    files: Mapping[str, Files]
    planned: PlannedTraining | None
    display: _Display
    keep: Callable[[Cost], object] | None
    began: float
    waiting: Processes | None
    """Those that measure first."""
    costs: dict[str, Cost] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def measure(self, names: Sequence[str]) -> None:
        """Measure methods, in as many processes as that takes."""
        settings, left = self.study.measure, list(names)
        started, restarted_after = self.began, None
        while left:
            part = left[:1] if settings.isolated else left
            others = len(left) - len(part)
            if settings.in_process:
                outcome = self._here(part, started, others)
            else:
                why = None if settings.isolated else restarted_after
                outcome = self._in_a_process(part, started, others, why)
            left = [name for name in left if name not in outcome.costs]
            restarted_after = outcome.spoiled
            if outcome.failure is not None:
                name = left.pop(0) if left else part[-1]
                self._failed(name, outcome.failure)
                restarted_after = f"{name} failed"
            started = time.monotonic()

    def _failed(self, name: str, reason: str) -> None:
        """Report a failure; a method that has a Cost already keeps it."""
        if name not in self.costs:
            self.failures[name] = reason
        self.display.failed(name, reason)

    def _planned(self) -> PlannedTraining | None:
        """Return the planned training, in seconds once the reference's Cost is known."""
        reference = self.costs.get(REFERENCE)
        if self.planned is None or reference is None:
            return self.planned
        return PlannedTraining(self.planned.lasts_s(reference.seconds_per_iteration().median))

    def _here(self, names: Sequence[str], started: float, others: int) -> Outcome:
        """Measure in this process, which goes on after a failure."""
        costs: dict[str, Cost] = {}

        def ended(cost: Cost) -> None:
            costs[cost.method] = cost
            self._ended(cost)

        def take() -> None:
            bench = StudyBench(
                self.study, self.counts, self.files, started=started, restarted_after=None
            )
            Turns(
                bench,
                self.study.measure,
                self._planned(),
                self.display.on_round,
                ended,
                started - self.began,
                others,
            ).take(names)

        try:
            with redirect_stdout(sys.stderr):
                guarded(take)
        except Failure as failure:
            return Outcome(costs, failure=str(failure))
        return Outcome(costs)

    def _in_a_process(
        self, names: Sequence[str], started: float, others: int, restarted_after: str | None
    ) -> Outcome:
        arguments: dict[str, Any] = {
            "study": self.study.plain.model_dump(mode="json"),
            "names": list(names),
            "counts": {
                name: count.to_json()
                for name, count in self.counts.items()
                if name in {REFERENCE, *names}
            },
            "files": {name: self.files[name].to_json() for name in names if name in self.files},
            "planned": asdict(planned) if (planned := self._planned()) else None,
            "started": started,
            "spent_s": started - self.began,
            "others": others,
            "restarted_after": restarted_after,
            "parent": os.getpid(),
        }

        def on_message(kind: str, content: Any) -> None:
            if kind == "cost":
                self._ended(content)
            else:
                name, done, width = content
                self.display.on_round(name)(done, width)

        request = MeasureRequest("methods", arguments, self.study.step.gpus)
        processes, self.waiting = self.waiting, None
        return run_isolated(request, on_message, processes)

    def _ended(self, cost: Cost) -> None:
        self.costs[cost.method] = cost
        self.display.ended(cost)
        if self.keep is not None:
            self.keep(cost)


class _Display:
    """Shows how many of its allowed seconds the rounds of the current method have taken."""

    def __init__(self, study: ResolvedStudy, progress: Progress):
        self._limit, self._progress = round(study.measure.max_time_s), progress
        self._bar = ExitStack()
        self._name: str | None = None
        self._advance: Advance = lambda count: None
        self._began, self._shown = 0.0, 0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def on_round(self, name: str) -> OnRound:
        """Return what is called after each round of a method."""

        def advance(done: int, width: float | None) -> None:
            if name != self._name:
                self._begin(name)
            passed = min(self._limit, round(time.monotonic() - self._began))
            self._advance(passed - self._shown)
            self._shown = passed

        return advance

    def _begin(self, name: str) -> None:
        self._bar.close()
        task = self._progress.task(f"{name} (seconds at most)", self._limit)
        self._advance = self._bar.enter_context(task)
        self._name, self._began, self._shown = name, time.monotonic(), 0

    def ended(self, cost: Cost) -> None:
        """Say how a method's measurement ended, if the output is verbose."""
        self._close()
        stages = sorted(cost.timing["stages_s"].items(), key=lambda stage: -stage[1])
        spent = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in stages)
        self._progress.detail(
            f"{cost.method}: {cost.timing['rounds']} rounds; {cost.timing['stopped']}; "
            f"{sum(seconds for _, seconds in stages):.2g} s: {spent}"
        )

    def failed(self, name: str, reason: str) -> None:
        """Say that a method could not be measured, or not again."""
        self._close()
        self._progress.say(f"{name}: failed: {reason}")

    def _close(self) -> None:
        self._bar.close()
        self._name = None
