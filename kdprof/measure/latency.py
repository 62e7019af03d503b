"""Step and end-to-end latency of several methods, in interleaved rounds.

Drift of the machine (clocks, neighbours, temperature) hits every method of a round alike, so ratios
are formed round by round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdprof.data import PREFETCHED, Batches
from kdprof.device import synchronize
from kdprof.measure.clock import StepClock
from kdprof.progress import Advance
from kdprof.step import TrainStep
from kdprof.study import MeasureSettings

Batch = tuple[Tensor, Tensor]

WARMUP_WINDOW = 3
WARMUP_MOST_STEPS = 30
WARMUP_MOST_S = 60.0
SETTLED = 0.03
"""Warm-up ends when the median of a window of steps is within 3 % of the window's before."""


@dataclass
class Samples:
    """What was timed of one method: one list per round, seconds."""

    step_s: list[list[float]] = field(default_factory=list)
    end_to_end_s: list[list[float]] = field(default_factory=list)
    phases_s: list[dict[str, float]] = field(default_factory=list)
    warmup_steps: int = 0
    settled: bool = False

    def phases_of(self, latency_s: float) -> dict[str, float]:
        """Return the phases of a step of this latency: their mean shares of the timed steps."""
        shares = [
            {name: seconds / sum(phases.values()) for name, seconds in phases.items()}
            for phases in self.phases_s
        ]
        return {name: latency_s * statistics.fmean(s[name] for s in shares) for name in shares[0]}


class Timer:
    """Runs and times the steps of one method."""

    def __init__(self, step: TrainStep, resident: Batch, batches: Batches):
        self.step, self.resident, self.batches = step, resident, batches
        self.samples = Samples()
        self._iteration = 0

    def _run_step(self) -> StepClock:
        """Take one step without waiting for it; read its clock when the device is done."""
        clock = StepClock(self.step.device)
        clock.start()
        self.step(*self.resident, self._next(), clock.mark)
        return clock

    def _next(self) -> int:
        self._iteration = (self._iteration + 1) % self.step.iterations
        return self._iteration

    def warm_up(self) -> None:
        """Step until the latency has settled, or the limits say that it will not."""
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < WARMUP_MOST_STEPS and time.perf_counter() - began < WARMUP_MOST_S:
            times.append(self._run_step().seconds()[0])
            if len(times) >= 2 * WARMUP_WINDOW and _settled(times):
                self.samples.settled = True
                break
        self.samples.warmup_steps = len(times)

    def time_steps(self, count: int) -> None:
        """Time ``count`` steps with the batch already on the device, after one untimed step that
        brings caches back to this method.

        The steps are queued without waiting in between, as in training: on a GPU the host runs
        ahead and its launches are hidden.
        """
        self._run_step()
        clocks = [self._run_step() for _ in range(count)]
        timed = [clock.seconds() for clock in clocks]
        self.samples.step_s.append([seconds for seconds, _ in timed])
        self.samples.phases_s += [phases for _, phases in timed]

    def time_with_loader(self, count: int, first: int) -> None:
        """Time ``count`` iterations with the real loader in steady state, as one block.

        Loader processes have a full queue when the block begins; it is drained untimed. They
        deliver in bunches, so the block is whole bunches long, and the stream goes on past its end,
        or they would stop working inside it.
        """
        workers = self.batches.workers
        queued = PREFETCHED * workers
        if workers:
            count = workers * math.ceil(max(count, 2 * workers) / workers)
        batches = self.batches.iterate(first, first + 1 + queued + count + queued)
        self._iterate(batches, 1 + queued)
        began = time.perf_counter()
        self._iterate(batches, count)
        self.samples.end_to_end_s.append([(time.perf_counter() - began) / count])
        batches.close()

    def _iterate(self, batches: Iterator[Batch], count: int) -> None:
        for _ in range(count):
            self.step(*next(batches), self._next())
        synchronize(self.step.device)


def _settled(times: list[float]) -> bool:
    last = statistics.median(times[-WARMUP_WINDOW:])
    before = statistics.median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
    return abs(last / before - 1) <= SETTLED


def time_rounds(
    timers: Mapping[str, Timer], settings: MeasureSettings, advance: Advance
) -> tuple[int, str]:
    """Warm every method up, then time interleaved rounds in random order.

    Returns:
        The number of rounds made and why measuring stopped.
    """
    for timer in timers.values():
        timer.warm_up()
    shuffle = random.Random(0)
    order = list(timers)
    began = time.perf_counter()
    for done in range(settings.rounds):
        if done >= 3 and time.perf_counter() - began > settings.max_time_s:
            return done, f"max_time_s = {settings.max_time_s:g} s was up"
        shuffle.shuffle(order)
        for name in order:
            timers[name].time_steps(settings.steps)
            timers[name].time_with_loader(settings.steps, done * settings.steps)
        advance(1)
    return settings.rounds, "all rounds done"


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return a batch that lies on the device."""
    images, labels = batch
    return images.to(device), labels.to(device)
