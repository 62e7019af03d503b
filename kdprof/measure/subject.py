"""What is timed: a step that can be repeated, with or without a loader behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdprof.data import PREFETCHED, Batches, Feeder
from kdprof.errors import KdprofError
from kdprof.measure.clock import Clock
from kdprof.step import PHASES, Mark, TrainStep

Batch = tuple[Tensor, Tensor]


def ignore_phase(phase: str) -> None:
    """Mark nothing."""


class BadStep(KdprofError):
    """A step that runs but cannot be trained with: its loss is not finite."""


@dataclass(frozen=True)
class Fed:
    """Iterations with the real loader."""

    seconds: float
    """Per iteration."""
    waited_s: float
    """Part of it spent waiting for batches."""


class Subject(Protocol):
    """A step that can be repeated."""

    name: str
    phases: tuple[str, ...]
    """What it marks while it runs; empty where it marks nothing."""

    def run(self, mark: Mark) -> Any:
        """Queue one step; ``mark`` is called at the end of each phase."""

    def check(self, result: Any) -> None:
        """Refuse what :meth:`run` returned where it is no result; waits for the device."""

    def run_fed(self, count: int, first: int) -> Fed | None:
        """Run about ``count`` iterations with the loader; None where there is none."""


class StudySubject:
    """A TrainStep of a study, its batch already on the device.

    Args:
        batches: the loader that feeds it in training.
        clock: of the step's device.
    """

    phases = PHASES

    def __init__(self, step: TrainStep, resident: Batch, batches: Batches, clock: Clock):
        self.name = step.method.name
        self.step, self.resident, self.batches, self.clock = step, resident, batches, clock
        self._iteration = 0

    def _next(self) -> int:
        self._iteration = (self._iteration + 1) % self.step.iterations
        return self._iteration

    def run(self, mark: Mark) -> Mapping[str, Tensor]:
        """Queue one step on the resident batch."""
        iteration = self._next()
        self.step.lead.step(iteration, iteration, fed=False)
        return self.step(*self.resident, iteration, mark)

    def check(self, result: Mapping[str, Tensor]) -> None:
        """Refuse losses that are not finite.

        Raises:
            BadStep: names the terms.
        """
        values = {name: value.item() for name, value in result.items()}
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            told = ", ".join(f"{name} = {value}" for name, value in wrong.items())
            raise BadStep(
                f"the loss is not finite after {self._iteration} steps ({told}); lower "
                "step.learning_rate, or look for a division by zero in the method"
            )

    def run_fed(self, count: int, first: int) -> Fed:
        """Run iterations with the real loader in steady state, as one block.

        Loader processes have a full queue when the block begins; it is drained untimed. They
        deliver in bunches, so the block is whole bunches long, and the stream goes on past its
        end, or they would stop working inside it. The block is timed in the device's time from
        step to step, without waiting in between: loading, copying, augmentation and computing
        overlap, as in training, whose feeder this is.
        """
        workers = self.batches.workers
        queued = PREFETCHED * workers
        if workers:
            count = workers * math.ceil(max(count, 2 * workers) / workers)
        # One more, because on a GPU the feeder is one batch ahead.
        stop = first + 1 + queued + count + queued + 1
        self.step.lead.feed(first, stop)
        feeder = Feeder(self.batches, self.step.device, first, stop)
        try:
            self._iterate(feeder, 1 + queued)
            feeder.forget_waits()
            began = self.clock.stamp()
            self._iterate(feeder, count)
            ended = self.clock.stamp()
            self.clock.synchronize()
            waited_s = feeder.waited_s
        finally:
            feeder.close()
        return Fed(self.clock.between(began, ended) / count, waited_s / count)

    def _iterate(self, feeder: Feeder, count: int) -> None:
        for _ in range(count):
            iteration = self._next()
            self.step.lead.step(iteration, iteration, fed=True)
            self.step(*next(feeder), iteration)


class CallableSubject:
    """Anybody's step: a callable of no arguments that makes one whole training step."""

    phases = ()

    def __init__(self, name: str, step: Callable[[], Any]):
        self.name, self._step = name, step

    def run(self, mark: Mark) -> Any:
        """Make one step."""
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

    def run_fed(self, count: int, first: int) -> None:
        """Return None: whatever loads data is inside the step."""
