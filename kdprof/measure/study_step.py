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
from kdprof.measure.counting.count import Count
from kdprof.measure.latency import OnRound
from kdprof.measure.memory import empty_allocators, held_bytes
from kdprof.measure.operator_times import StepOperators, compiled_notes
from kdprof.measure.profiles import Files, write_files
from kdprof.measure.session import Bench, Limit, Readings, compare, read_alone
from kdprof.measure.stages import Stages
from kdprof.measure.subject import BadStep
from kdprof.models import AnyNetwork
from kdprof.records import REFERENCE, Cost
from kdprof.resized.tiles import why_no_triton
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key, cost_settings
from kdprof.step import PHASES, Mark, TrainStep
from kdprof.step_feed import StepFeed

PLACEHOLDERS = "placeholder images replaced the data set's files: loading is not in these times"
KEPT_BYTES = {"cuda": 64 * 2**20, "cpu": 256 * 2**20}
"""What may stay allocated after methods, such as workspaces of libraries. If more stays, the memory
of the next method would not be its own. A resident set also has code and pieces of freed memory."""


NO_KERNELS = "kdprof's Triton kernels do not run here, so that plain operators take their place"


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

    The teacher, the resident batch and the device's ceilings are shared. The memory of each method
    is its own: its step runs before the reference's is built, both are freed afterwards, and no
    teacher exists before a method needs one.

    Args:
        counts: the work of each method's step, and of the reference's, where it could be counted
            without running it.
        files: the files to write for each method.
        started: when the measuring began (``time.monotonic``).
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
        stages.add("start-up", time.monotonic() - started)
        self._bench = Bench.of(
            study.device,
            study.hardware,
            study.measure,
            study.step.precision,
            stages,
            needs_energy=study.needs_energy,
        )
        with stages.timed("data"):
            self._batches = study.factory.batches(seed=0)
        with stages.timed("networks"):
            self._resident = self._batches.batch(0, study.device)
            self._student = self._kept_student()
        self._teacher: AnyNetwork | None = None
        self._visits: dict[str, Visit] = {}
        empty_allocators(study.device)
        self._least_bytes = held_bytes(study.device)
        self.spoiled: str | None = None
        """Why a further method should not be measured in this process; None if it can be."""

    def _kept_student(self) -> AnyNetwork | None:
        """Return a student to copy, which saves building it for every step; None if it would take
        memory on the device, or if students start as the teacher."""
        if self._study.device.type == "cpu" or self._study.starts_as_teacher:
            return None
        return self._study.factory.student(0)

    def visit(self, name: str, on_round: OnRound, limit: Limit) -> Cost:
        """Measure a method, or continue its measurement, and return its Cost so far.

        Args:
            limit: how long rounds may take.

        Raises:
            BadStep: a loss is not finite.
            UserError: a file that the loader needs cannot be used.
        """
        if self._study.methods[name].cls.needs_teacher() and self._teacher is None:
            self._build_teacher()
        cost = self._visit(name, on_round, limit)
        # Not after an error: this bench ends with it, and other ranks may wait within a step.
        self._free()
        self.spoiled = self._spoiled(name)
        return cost

    def _build_teacher(self) -> None:
        factory, device = self._study.factory, self._study.device
        before = held_bytes(device)
        with self._bench.stages.timed("networks"):
            self._teacher = factory.frozen(factory.placed_teacher())
        empty_allocators(device)
        self._least_bytes += held_bytes(device) - before

    def _spoiled(self, name: str) -> str | None:
        """Return what methods left behind, if the next one's memory would not be its own."""
        if self._visits[name].readings.alone.memory.leaked_bytes:
            return f"{name} leaks memory"
        device = self._study.device
        kept = held_bytes(device) - self._least_bytes
        if kept <= KEPT_BYTES[device.type]:
            return None
        return f"{kept / 2**20:.0f} MiB stayed allocated after {name}"

    def readings_of(self, name: str) -> Readings:
        """Return the readings so far of a method that was visited."""
        return self._visits[name].readings

    def reference_iteration_s(self) -> float | None:
        """Return about how long an iteration of the reference takes; None before a visit."""
        if not self._visits:
            return None
        samples = next(iter(self._visits.values())).readings.timed.reference
        found = samples.end_to_end_s or [s for own in samples.rounds for s in own]
        return statistics.median(found)

    def _visit(self, name: str, on_round: OnRound, limit: Limit) -> Cost:
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
            limit=limit,
            earlier=None if earlier is None else earlier.readings,
        )
        if earlier is None and name in self._files:
            write_files(subject, self._files[name])
        self._visits[name] = Visit(readings, list(step.method.notes))
        return self._cost(name)

    def _subject(self, name: str) -> StudySubject:
        """Return a new step of a method. Its student starts as that of every other step."""
        study = self._study
        kept = self._student
        student = None if kept is None else study.factory.placed(copy.deepcopy(kept))
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
        kernels = why_no_triton() if study.device.type == "cuda" else None
        slower = [f"{NO_KERNELS}: {kernels}"] if kernels else []
        return measured_cost(
            identity_of(study, name),
            visit.readings,
            REFERENCE,
            [*visit.notes, *placeholders, *slower],
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
