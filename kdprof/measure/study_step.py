"""The Costs of a study's methods: each method's TrainStep, interleaved with the reference's."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdprof.measure.cost import Identity, measured_cost
from kdprof.measure.count import Count
from kdprof.measure.latency import OnRound, widest_interval
from kdprof.measure.memory import empty_allocators
from kdprof.measure.operator_times import StepOperators, compiled_notes
from kdprof.measure.profiles import Files, write_files
from kdprof.measure.session import Bench, Readings, compare, read_alone
from kdprof.measure.stages import Stages
from kdprof.measure.subject import BadStep
from kdprof.models import AnyNetwork
from kdprof.records import REFERENCE, Cost
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.cost_key import cost_key, cost_settings
from kdprof.step import PHASES, Mark, TrainStep
from kdprof.step_feed import StepFeed

PLACEHOLDERS = "placeholder images replaced the data set's files: loading is not in these times"
KEPT_BYTES = 64 * 2**20
"""What may stay allocated after a method, such as workspaces of libraries. If more stays, the
memory of the next method would not be its own."""


class StudySubject:
    """A TrainStep of a study, with its resident batch and the loader that it has in training.

    Args:
        loads: False if nothing is loaded, so that end-to-end iterations say nothing new.
    """

    phases = PHASES

    def __init__(self, feed: StepFeed, *, loads: bool):
        self.feed = feed if loads else None
        self._repeat, self.traced, self.name = feed.repeat, feed.step, feed.step.method.name
        self._iteration = 0

    def run(self, mark: Mark) -> Mapping[str, Tensor]:
        """Queue one step on the resident batch."""
        self._iteration = (self._iteration + 1) % self.traced.iterations
        return self._repeat(self._iteration, mark)

    def check(self, result: Mapping[str, Tensor]) -> None:
        """Refuse losses that are not finite.

        Raises:
            BadStep: a term is not finite; the message names the terms.
        """
        values = {name: value.item() for name, value in result.items()}
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            terms = ", ".join(f"{name} = {value}" for name, value in wrong.items())
            raise BadStep(
                f"the loss is not finite after {self._iteration} steps ({terms}); lower "
                "step.learning_rate, or look for a division by zero in the method"
            )


@dataclass(frozen=True)
class Visit:
    """A method's readings so far, and the warnings of its step."""

    readings: Readings
    notes: list[str]


class StudyBench:
    """Measures the methods of a study, one after the other, in this process.

    The teacher, a pristine student, the resident batch and the device's ceilings are shared. The
    memory of each method is its own: its step runs before the reference's is built, both are freed
    afterwards, and no teacher exists before a method needs one.

    Args:
        counts: the work of each method's step, and of the reference's, where it could be counted
            without running it.
        files: the files to write for each method.
        started: when the measuring began (``time.time``).
        restarted_after: why an earlier process of this measurement ended; None in the first one.
    """

    def __init__(
        self,
        study: ResolvedStudy,
        counts: Mapping[str, Count],
        files: Mapping[str, Files],
        *,
        started: float,
        restarted_after: str | None,
    ):
        self._study, self._counts, self._files = study, counts, files
        self._restarted_after = restarted_after
        stages = Stages()
        stages.add("start-up", time.time() - started)
        self._bench = Bench.of(
            study.device,
            study.hardware,
            study.measure,
            study.step.precision,
            stages,
            needs_energy=study.needs_energy,
        )
        self._batches = study.factory.batches(seed=0)
        with stages.timed("networks"):
            self._resident = self._batches.batch(0, study.device)
            self._student = study.factory.placed_student(0)
        self._teacher: AnyNetwork | None = None
        self._visits: dict[str, Visit] = {}
        self.spoiled: str | None = None
        """Why a further method should not be measured in this process; None if it can be."""

    def visit(self, name: str, on_round: OnRound, most_s: float | None = None) -> Cost:
        """Measure a method, or continue its measurement, and return its Cost so far.

        Args:
            most_s: when no further round starts, if that is before the settings' time.

        Raises:
            BadStep: a loss is not finite.
            UserError: a file that the loader needs cannot be used.
        """
        before = self._prepare(name)
        cost = self._visit(name, on_round, most_s)
        # Not after an error: this bench ends with it, and other ranks may wait within a step.
        self._free()
        self.spoiled = self._spoiled(name, before)
        return cost

    def _prepare(self, name: str) -> int | None:
        """Build the teacher if the method is the first that needs it, and return the bytes that
        are held before the method's step is built; None on a CPU."""
        device, factory = self._study.device, self._study.factory
        if self._study.methods[name].cls.needs_teacher() and self._teacher is None:
            with self._bench.stages.timed("networks"):
                self._teacher = factory.frozen(factory.placed_teacher())
        empty_allocators(device)
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else None

    def _spoiled(self, name: str, before: int | None) -> str | None:
        """Return what a measured method left behind."""
        if self._visits[name].readings.alone.memory.leaked_bytes:
            return f"{name} leaks memory"
        if before is None:
            return None
        kept = torch.cuda.memory_allocated(self._study.device) - before
        return f"{name} kept {kept / 2**20:.0f} MiB" if kept > KEPT_BYTES else None

    @property
    def visited(self) -> bool:
        """True once a method was measured."""
        return bool(self._visits)

    def wide(self, name: str) -> float:
        """Return the relative width of the interval of a method that was visited."""
        return widest_interval([one.rounds for one in self._visits[name].readings.timed.samples])

    def time_of(self, name: str) -> float:
        """Return the seconds of a method's warm-up and rounds so far."""
        return self._visits[name].readings.timed.taken_s

    def reference_iteration_s(self) -> float:
        """Return about how long an iteration of the reference takes, after the first visit."""
        samples = next(iter(self._visits.values())).readings.timed.reference
        found = samples.end_to_end_s or [s for own in samples.rounds for s in own]
        return statistics.median(found)

    def _visit(self, name: str, on_round: OnRound, most_s: float | None) -> Cost:
        bench, earlier = self._bench, self._visits.get(name)
        with bench.stages.timed("networks"):
            subject = self._subject(name)
        step = subject.traced
        reference = self._counts.get(REFERENCE)
        alone = (
            read_alone(bench, subject, self._counted(name, step))
            if earlier is None
            else earlier.readings.alone
        )
        readings = compare(
            bench,
            alone,
            subject,
            None if name == REFERENCE else lambda: self._subject(REFERENCE),
            reference=None if reference is None else reference.operations,
            on_round=on_round,
            most_s=most_s,
            earlier=None if earlier is None else earlier.readings,
        )
        if earlier is None and name in self._files:
            write_files(subject, self._files[name])
        self._visits[name] = Visit(readings, list(step.method.notes))
        return self._cost(name)

    def _subject(self, name: str) -> StudySubject:
        """Return a new step of a method. Its student starts as that of every other step."""
        study = self._study
        # One that starts as the teacher is built anew every time.
        student = None if study.starts_as_teacher else copy.deepcopy(self._student)
        step = study.factory.step(name, self._teacher, student=student)
        feed = StepFeed(step, self._batches, self._resident)
        return StudySubject(feed, loads=not self._study.data.uses_placeholders)

    def _counted(self, name: str, step: TrainStep) -> StepOperators | None:
        count = self._counts.get(name)
        if count is None or self._study.ranks:  # one process alone does not communicate
            return None
        return StepOperators(
            count.operations, count.terms, count.synchronisations, compiled_notes(step), timed=False
        )

    def _free(self) -> None:
        """Free the steps of a method, on every rank."""
        self._study.factory.forget_steps()
        if self._study.step.compile != "none":
            torch.compiler.reset()  # compiled code keeps the networks that it was made for
        empty_allocators(self._bench.device)

    def _cost(self, name: str) -> Cost:
        study, visit = self._study, self._visits[name]
        placeholders = [PLACEHOLDERS] if study.data.uses_placeholders else []
        return measured_cost(
            identity_of(study, name),
            visit.readings,
            REFERENCE,
            [*visit.notes, *placeholders],
            self._restarted_after,
        )


def identity_of(study: ResolvedStudy, name: str) -> Identity:
    """Return what identifies the Cost of a study's method."""
    return Identity(
        method=name,
        gpus=study.step.gpus,
        key=cost_key(study, name),
        settings=cost_settings(study, name),
    )
