"""Seconds of end-to-end iterations: steps on the loader's batches, in long interleaved blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from kdprof.data import ENDLESS, PREFETCHED
from kdprof.measure.clock import Clock
from kdprof.measure.latency import (
    BLOCK_S,
    CHECK_GROWTH,
    LOOKS_IN_A_ROW,
    Samples,
    widest_interval,
)
from kdprof.pauses import unpaused
from kdprof.step_feed import StepFeed

LEAST_BLOCKS = 6
"""Blocks of each step that are always run."""
KEEPS_UP = 0.01
"""A loader keeps up with steps that wait for it at most this share of their time."""


class Iterations:
    """End-to-end iterations of one step.

    Args:
        step_s: about the latency of the step alone.
        samples: to which the blocks are added.
        block_s: how long a block is, if the iteration takes less.
    """

    def __init__(
        self,
        feed: StepFeed,
        clock: Clock,
        step_s: float,
        samples: Samples,
        block_s: float = BLOCK_S,
    ):
        self.feed, self.samples, self.step_s = feed, samples, step_s
        self._clock, self._iteration = clock, 0
        # On a GPU the feeder is one batch ahead.
        self._ahead = 1 if feed.step.device.type == "cuda" else 0
        self._fitting = max(1, math.ceil(block_s / step_s))

    def loader_keeps_up(self) -> bool:
        """Run untimed iterations, and return whether the last of them hardly waited."""
        seconds, waited_s = self._drained()
        return waited_s <= KEEPS_UP * seconds

    def time_block(self, keeps_up: bool) -> None:
        """Run iterations in steady state, and time them as one block.

        The block is timed in the device's time from step to step, without waiting in between:
        loading, copying, augmentation and computation overlap, as they do in training.

        Args:
            keeps_up: True if batches are always ready, so that few iterations are steady.
        """
        seconds, waited_s = self._few() if keeps_up else self._drained()
        self.samples.end_to_end_s.append(seconds)
        self.samples.waited_s.append(waited_s)

    def _few(self) -> tuple[float, float]:
        self._advance(self._ahead + (1 if self.step_s <= BLOCK_S else 0))
        return self._timed(self._fitting)

    def _drained(self) -> tuple[float, float]:
        """Loader processes may begin with a full queue, which is drained untimed. They deliver in
        bunches of one batch each, so the block is a whole number of bunches."""
        workers, count = self.feed.batches.workers, self._fitting
        if workers:
            count = workers * math.ceil(max(count, 2 * workers) / workers)
        self._advance(PREFETCHED * workers + self._ahead)
        return self._timed(count)

    def _timed(self, count: int) -> tuple[float, float]:
        """Return the seconds of an iteration, and how many of them it waited for its batch."""
        return unpaused(lambda: self._timed_once(count))

    def _timed_once(self, count: int) -> tuple[float, float]:
        self.feed.forget_waits()
        began = self._clock.stamp()
        self._advance(count)
        ended = self._clock.stamp()
        self._clock.synchronize()
        return self._clock.between(began, ended) / count, self.feed.waited_s / count

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

    Blocks are added to those of earlier calls until the interval of the ratio to the last step is
    narrower than ``precision_target`` at two checks in a row, or ``most_s`` have passed.

    Raises:
        UserError: a file cannot be used.
        KdprofError: a loader process died.
    """
    earlier = len(steps[0].samples.end_to_end_s)
    done, least = earlier, max(earlier + 1, LEAST_BLOCKS)
    order, shuffle, began = list(steps), random.Random(earlier), clock.now()
    current = min(steps, key=lambda step: step.step_s)  # the one that a slow loader delays most
    current.feed.begin(0, ENDLESS)
    look, narrow, late = least, 0, False
    try:
        keeps_up = current.loader_keeps_up()
        while done < least or not (late or narrow >= LOOKS_IN_A_ROW):
            shuffle.shuffle(order)
            for step in order:
                if step is not current:
                    step.feed.take_over(current.feed)
                    current = step
                step.time_block(keeps_up)
            done += 1
            if done >= look:
                narrow = narrow + 1 if _width(steps) <= precision_target else 0
                look = max(done + 1, int(done * CHECK_GROWTH))
            late = clock.now() - began > most_s
    finally:
        current.feed.close()


def _width(steps: Sequence[Iterations]) -> float:
    return widest_interval([[[s] for s in step.samples.end_to_end_s] for step in steps])
