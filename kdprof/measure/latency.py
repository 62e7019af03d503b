"""Step and end-to-end latency of several steps, in interleaved rounds of random order.

Drift of the machine (clocks, load, temperature) affects every step of a round alike, so ratios are
formed round by round.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kdprof.hardware import Hardware
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import Clock, Stamps, phase_seconds
from kdprof.measure.subject import Subject
from kdprof.records import Outlier
from kdprof.stats import median_interval, outliers, paired_ratio, relative_width
from kdprof.study import MeasureSettings

WARMUP_WINDOW = 3
WARMUP_MOST_STEPS = 60
WARMUP_MOST_S = 60.0
SETTLED = 0.03
"""Warm-up ends when the median of a window of steps is within 3 % of the window's before."""
CHECK_GROWTH = 1.2
"""The interval is checked again when the rounds have grown by this factor: a check after every
round would stop at the luckiest of them."""
LOOKS_IN_A_ROW = 2
"""The interval must be narrow enough in this many checks in a row: once may be luck."""
COLLECTED = "off inside blocks, run between rounds"
"""How Python's garbage collector is handled, as records state it."""

OnRound = Callable[[int, float | None], None]
"""Called after each round with the rounds done and the relative width of the widest interval, None
where it was not computed."""


def ignore_round(done: int, width: float | None) -> None:
    """Do nothing after a round."""


@dataclass
class Block:
    """Steps of one subject that were queued one after the other."""

    step_s: list[float]
    phases_s: list[dict[str, float]]
    before: dict[str, Any]
    after: dict[str, Any]
    """Readings of the device around the block."""
    collections: int
    """Runs of the garbage collector inside it."""


@dataclass
class Samples:
    """Timings of one subject, one entry per round."""

    blocks: list[Block] = field(default_factory=list)
    end_to_end_s: list[float] = field(default_factory=list)
    """Seconds per end-to-end iteration; empty if there is no loader."""
    waited_s: list[float] = field(default_factory=list)
    """The part of these spent waiting for batches."""
    warmup_steps: int = 0
    unsettled: str | None = None
    """Why the latency had not settled before it was timed; None if it had."""

    @property
    def rounds(self) -> list[list[float]]:
        """Step latencies, seconds, one list per round."""
        return [block.step_s for block in self.blocks]

    def phases_of(self, latency_s: float) -> dict[str, float]:
        """Return the phases of a step of this latency: their mean shares of the timed steps."""
        timed = [phases for block in self.blocks for phases in block.phases_s]
        shares = [
            {name: seconds / sum(phases.values()) for name, seconds in phases.items()}
            for phases in timed
        ]
        return {name: latency_s * statistics.fmean(s[name] for s in shares) for name in shares[0]}

    def outliers(self, hardware: Hardware) -> list[Outlier]:
        """Return the samples far above the others, each with its cause if one was seen."""
        found = [
            Outlier(
                of="step",
                round=number,
                step=step,
                seconds=self.blocks[number].step_s[step],
                times_median=times,
                cause=_cause(self.blocks[number], hardware),
            )
            for number, step, times in outliers(self.rounds)
        ]
        iterations = [[seconds] for seconds in self.end_to_end_s]
        return found + [
            Outlier(
                of="end_to_end",
                round=number,
                step=0,
                seconds=self.end_to_end_s[number],
                times_median=times,
                cause=self._cause_of_iteration(number),
            )
            for number, _, times in (outliers(iterations) if iterations else ())
        ]

    def _cause_of_iteration(self, number: int) -> str:
        """Return ``data stall`` if most of the iteration's excess time was spent waiting."""
        excess = self.end_to_end_s[number] - statistics.median(self.end_to_end_s)
        waited = self.waited_s[number] - statistics.median(self.waited_s)
        return "data stall" if waited > excess / 2 else "unknown"


def _cause(block: Block, hardware: Hardware) -> str:
    if block.collections:
        return "garbage collection"
    return hardware.cause(block.before, block.after) or "unknown"


@dataclass(frozen=True)
class Session:
    """Interleaved samples of the compared subjects."""

    samples: list[Samples]
    """In the order of the subjects."""
    canary_s: list[float]
    rounds: int
    stopped: str
    """Why measuring stopped."""

    @property
    def own(self) -> Samples:
        """The samples of the measured subject."""
        return self.samples[0]

    @property
    def reference(self) -> Samples:
        """The samples of the reference, which may be the measured subject itself."""
        return self.samples[-1]


class Stopwatch:
    """Times one subject's steps in blocks."""

    def __init__(self, subject: Subject, clock: Clock, hardware: Hardware):
        self.subject, self.clock, self.hardware = subject, clock, hardware
        self.samples = Samples()
        self._result: Any = None

    def _queue(self) -> Stamps:
        stamps: Stamps = [("", self.clock.stamp())]
        self._result = self.subject.run(lambda name: stamps.append((name, self.clock.stamp())))
        if not self.subject.phases:
            stamps.append(("step", self.clock.stamp()))
        return stamps

    def warm_up(self) -> None:
        """Step until latency and allocator have settled or a limit is reached, then check the
        result."""
        times: list[float] = []
        reserved: list[int] = []
        began = self.clock.now()
        while True:
            times.append(self._timed_step())
            reserved.append(_reserved_bytes())
            self.samples.unsettled = _unsettled(times, reserved)
            late = self.clock.now() - began > WARMUP_MOST_S or len(times) >= WARMUP_MOST_STEPS
            if self.samples.unsettled is None or (late and len(times) >= 2):
                break
        self.samples.warmup_steps = len(times)
        self.subject.check(self._result)

    def _timed_step(self) -> float:
        stamps = self._queue()
        self.clock.synchronize()
        return self.clock.between(stamps[0][1], stamps[-1][1])

    def time_block(self, count: int) -> None:
        """Time ``count`` steps after one untimed step that warms the caches for this subject.

        The steps are queued without waiting in between, as in training: on a GPU the host runs
        ahead, which hides its launches.
        """
        self._queue()
        before = self.hardware.during()
        with collector_off() as runs:
            steps = [self._queue() for _ in range(count)]
            # Before the wait: a GPU must be read while it works, not when it is idle.
            after = self.hardware.during()
            self.clock.synchronize()
        self.subject.check(self._result)
        self.samples.blocks.append(
            Block(
                [self.clock.between(stamps[0][1], stamps[-1][1]) for stamps in steps],
                [self._phases(stamps) for stamps in steps],
                before,
                after,
                len(runs),
            )
        )

    def _phases(self, stamps: Stamps) -> dict[str, float]:
        phases = self.subject.phases
        return phase_seconds(self.clock, stamps, phases) if phases else {}

    def time_end_to_end(self, count: int, first: int) -> None:
        """Time a block of end-to-end iterations, if the subject has a loader."""
        found = self.subject.run_end_to_end(count, first)
        if found is not None:
            self.samples.end_to_end_s.append(found.seconds)
            self.samples.waited_s.append(found.waited_s)


def _reserved_bytes() -> int:
    """Return the bytes that the CUDA allocator holds; always 0 without CUDA."""
    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0


def _unsettled(times: Sequence[float], reserved: Sequence[int]) -> str | None:
    """Return what still changes from step to step; None if nothing does."""
    if len(times) < 2 * WARMUP_WINDOW:
        return f"only {len(times)} warm-up steps fitted into {WARMUP_MOST_S:.0f} s"
    last = statistics.median(times[-WARMUP_WINDOW:])
    before = statistics.median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
    if abs(last / before - 1) > SETTLED:
        return f"the latency still changed by {last / before - 1:+.0%} in {len(times)} steps"
    if reserved[-1] > reserved[-WARMUP_WINDOW]:
        return f"the allocator still grew after {len(times)} steps"
    return None


@contextmanager
def collector_off() -> Iterator[list[int]]:
    """Switch Python's automatic garbage collection off; yield a list that collects the generation
    of every run that the step itself starts."""
    runs: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            runs.append(info["generation"])

    was_on = gc.isenabled()
    gc.disable()
    gc.callbacks.append(note)
    try:
        yield runs
    finally:
        gc.callbacks.remove(note)
        if was_on:
            gc.enable()


def time_interleaved(
    subjects: Sequence[Subject],
    settings: MeasureSettings,
    *,
    clock: Clock,
    canary: CanaryKernel,
    hardware: Hardware,
    on_round: OnRound = ignore_round,
) -> Session:
    """Warm every subject up, then time interleaved rounds in random order.

    The last subject is the reference. Rounds continue until each ratio's 95 % interval (of a single
    subject: its latency's) is narrower than ``settings.precision_target``, or
    ``settings.max_time_s`` has passed.

    Raises:
        BadStep: a loss is not finite.
    """
    watches = [Stopwatch(subject, clock, hardware) for subject in subjects]
    for watch in watches:
        watch.warm_up()
    canary.warm_up()
    canary_s: list[float] = []
    order, shuffle = list(watches), random.Random(0)
    began, done, look, narrow, stopped = clock.now(), 0, settings.least_rounds, 0, ""
    while not stopped:
        canary_s.append(canary.seconds())
        shuffle.shuffle(order)
        for watch in order:
            watch.time_block(settings.steps)
            watch.time_end_to_end(settings.steps, done * settings.steps)
        gc.collect(0)  # what the blocks left, not every object of torch
        done += 1
        width = _widest(watches) if done >= look else None
        if width is not None:
            look = max(done + 1, int(done * CHECK_GROWTH))
            narrow = narrow + 1 if width <= settings.precision_target else 0
        on_round(done, width)
        late = done >= settings.least_rounds and clock.now() - began > settings.max_time_s
        stopped = _why_stop(width, narrow >= LOOKS_IN_A_ROW, late, settings)
    return Session([watch.samples for watch in watches], canary_s, done, stopped)


def _widest(watches: Sequence[Stopwatch]) -> float:
    """Return the relative width of the widest interval that rounds are to narrow."""
    *compared, reference = [watch.samples.rounds for watch in watches]
    if not compared:
        return relative_width(median_interval(reference))
    return max(relative_width(paired_ratio(rounds, reference)) for rounds in compared)


def _why_stop(width: float | None, narrow: bool, late: bool, settings: MeasureSettings) -> str:
    target = settings.precision_target
    if narrow:
        return f"the interval is {width:.2%} wide, target {target:.2%}"
    if late:
        return f"max_time_s = {settings.max_time_s:g} was up before the target of {target:.2%}"
    return ""
