"""The Cost of a study's method: its TrainStep, interleaved with the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from kdprof.data import PREFETCHED
from kdprof.measure.clock import clock_of
from kdprof.measure.cost import Identity, measured_cost
from kdprof.measure.latency import OnRound
from kdprof.measure.profiles import Files
from kdprof.measure.session import run_session
from kdprof.measure.subject import BadStep, EndToEnd
from kdprof.records import REFERENCE, Cost
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.cost_key import cost_key, cost_settings
from kdprof.step import PHASES, Mark
from kdprof.step_feed import StepFeed

PLACEHOLDERS = "placeholder images replaced the data set's files: loading is not in these times"


class StudySubject:
    """A TrainStep of a study, with its resident batch and the loader that it has in training."""

    phases = PHASES

    def __init__(self, feed: StepFeed):
        self._feed, self.traced, self.name = feed, feed.step, feed.step.method.name
        self._clock = clock_of(feed.step.device)
        self._iteration = 0

    def _next(self) -> int:
        self._iteration = (self._iteration + 1) % self._feed.step.iterations
        return self._iteration

    def run(self, mark: Mark) -> Mapping[str, Tensor]:
        """Queue one step on the resident batch."""
        return self._feed.repeat(self._next(), mark)

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

    def run_end_to_end(self, count: int, first: int) -> EndToEnd:
        """Run end-to-end iterations in steady state, as one block.

        Loader processes begin with a full queue, which is drained untimed. They deliver in bunches
        of one batch each, so the block is a whole number of bunches, and the stream continues past
        its end: otherwise processes would stop working inside the block. The block is timed in the
        device's time from step to step, without waiting in between: loading, copying, augmentation
        and computation overlap, as they do in training.
        """
        workers = self._feed.batches.workers
        queued = PREFETCHED * workers
        if workers:
            count = workers * math.ceil(max(count, 2 * workers) / workers)
        # One more, because on a GPU the feeder is one batch ahead.
        self._feed.begin(first, first + 1 + queued + count + queued + 1)
        try:
            self._advance(1 + queued)
            self._feed.forget_waits()
            began = self._clock.stamp()
            self._advance(count)
            ended = self._clock.stamp()
            self._clock.synchronize()
            waited_s = self._feed.waited_s
        finally:
            self._feed.close()
        return EndToEnd(self._clock.between(began, ended) / count, waited_s / count)

    def _advance(self, count: int) -> None:
        for _ in range(count):
            self._feed.advance(self._next())


def measure_here(study: ResolvedStudy, name: str, files: Files, on_round: OnRound) -> Cost:
    """Measure one method of a resolved study in this process."""
    factory = study.factory
    batches = factory.batches(seed=0)
    resident = batches.batch(0, study.device)
    # The reference reads no teacher. One is built only for a method that does: it takes memory.
    reads_teacher = study.methods[name].cls.needs_teacher()
    teacher = factory.frozen(factory.placed_teacher()) if reads_teacher else None
    step = factory.step(name, teacher)

    def build_reference() -> StudySubject:
        return StudySubject(StepFeed(factory.step(REFERENCE, None), batches, resident))

    readings = run_session(
        StudySubject(StepFeed(step, batches, resident)),
        None if name == REFERENCE else build_reference,
        device=study.device,
        hardware=study.hardware,
        settings=study.measure,
        precision=study.step.precision,
        files=files,
        on_round=on_round,
    )
    warnings = [*step.method.notes, *([PLACEHOLDERS] if study.data.uses_placeholders else [])]
    identity = identity_of(study, name)
    return measured_cost(identity, readings, REFERENCE, warnings)


def identity_of(study: ResolvedStudy, name: str) -> Identity:
    """Return what identifies the Cost of a study's method."""
    return Identity(
        method=name,
        gpus=study.step.gpus,
        key=cost_key(study, name),
        settings=cost_settings(study, name),
    )
