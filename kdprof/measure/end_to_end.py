"""Seconds of end-to-end iterations: steps on the loader's batches, in long interleaved blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from kdprof.data import ENDLESS, PREFETCHED
from kdprof.measure.clock import Clock
from kdprof.measure.latency import BLOCK_S, Samples, widest_interval
from kdprof.step_feed import StepFeed

LEAST_BLOCKS = 4
"""Blocks of each step that are always run."""


class Iterations:
    """End-to-end iterations of one step.

    Args:
        step_s: about the latency of the step alone.
        samples: to which the blocks are added.
    """

    def __init__(self, feed: StepFeed, clock: Clock, step_s: float, samples: Samples):
        self.feed, self.samples, self._clock, self._step_s = feed, samples, clock, step_s
        self._iteration = 0

    def time_block(self) -> None:
        """Run iterations in steady state, and time them as one block.

        Loader processes may begin with a full queue, which is drained untimed. They deliver in
        bunches of one batch each, so the block is a whole number of bunches. The block is timed in
        the device's time from step to step, without waiting in between: loading, copying,
        augmentation and computation overlap, as they do in training.
        """
        workers = self.feed.batches.workers
        count = max(1, math.ceil(BLOCK_S / self._step_s))
        if workers:
            count = workers * math.ceil(max(count, 2 * workers) / workers)
        # One more, because on a GPU the feeder is one batch ahead.
        ahead = 1 if self.feed.step.device.type == "cuda" else 0
        self._advance(PREFETCHED * workers + ahead)
        self.feed.forget_waits()
        began = self._clock.stamp()
        self._advance(count)
        ended = self._clock.stamp()
        self._clock.synchronize()
        self.samples.end_to_end_s.append(self._clock.between(began, ended) / count)
        self.samples.waited_s.append(self.feed.waited_s / count)

    def _advance(self, count: int) -> None:
        for _ in range(count):
            self._iteration = (self._iteration + 1) % self.feed.step.iterations
            self.feed.advance(self._iteration)


def time_end_to_end(
    steps: Sequence[Iterations],
    *,
    clock: Clock,
    precision_target: float,
    most_s: float,
) -> None:
    """Time blocks of every step in turn, with one loader that is started once.

    Blocks continue until the interval of the ratio to the last step is narrower than
    ``precision_target``, or ``most_s`` have passed.

    Raises:
        UserError: a file cannot be used.
        KdprofError: a loader process died.
    """
    order, shuffle, began, done = list(steps), random.Random(0), clock.now(), 0
    current = order[0]
    current.feed.begin(0, ENDLESS)
    try:
        while done < LEAST_BLOCKS or not (
            clock.now() - began > most_s or _width(steps) <= precision_target
        ):
            shuffle.shuffle(order)
            for step in order:
                if step is not current:
                    step.feed.take_over(current.feed)
                    current = step
                step.time_block()
            done += 1
    finally:
        current.feed.close()


def _width(steps: Sequence[Iterations]) -> float:
    return widest_interval([[[s] for s in step.samples.end_to_end_s] for step in steps])
