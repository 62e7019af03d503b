"""Step latency of several steps, in interleaved rounds of random order.

Drift of the machine (clocks, load, temperature) affects every step of a round alike, so ratios are
formed round by round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from kdprof.hardware import Hardware
from kdprof.hardware.base import EnergyMeter
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import Clock, Stamps, phase_seconds
from kdprof.measure.subject import Subject
from kdprof.pauses import unpaused
from kdprof.records import Outlier
from kdprof.stats.intervals import Rounds, median_interval, outliers, paired_ratio, relative_width
from kdprof.study import MeasureSettings

WARMUP_WINDOW = 3
WARMUP_MOST_STEPS = 60
WARMUP_MOST_S = 60.0
SETTLED = 0.03
"""Warm-up ends when the median of a window of steps is within 3 % of the window's before, or when
the two windows overlap: then they differ by no more than steps do on this machine."""
BLOCK_S = 0.3
"""A block has no more steps than this time needs. A step that takes longer is alone in its block,
and no untimed step comes before it: the caches that such a step finds cold do not matter."""
LEAST_ROUNDS_S = 2.0
"""``least_rounds`` are cut down to what fits into this time, because of slow steps."""
FEWEST_ROUNDS = 5
"""Rounds that even the slowest steps get: fewer do not show how much rounds vary."""
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
    energy: BlockEnergy | None = None
    """None without an energy counter."""


class BlockEnergy(NamedTuple):
    """What an energy counter showed around a block, its untimed step included."""

    joules: float
    seconds: float
    steps: int


@dataclass
class Samples:
    """Timings of one subject."""

    blocks: list[Block] = field(default_factory=list)
    """One per round."""
    end_to_end_s: list[float] = field(default_factory=list)
    """Seconds per end-to-end iteration, one entry per block of them; empty if nothing is loaded."""
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
    taken_s: float
    """How long warm-up and rounds took."""

    @property
    def own(self) -> Samples:
        """The samples of the measured subject."""
        return self.samples[0]

    @property
    def reference(self) -> Samples:
        """The samples of the reference, which may be the measured subject itself."""
        return self.samples[-1]


class Stopwatch:
    """Times one subject's steps in blocks.

    Args:
        meter: the device's energy counter, read around every block; None reads none.
        samples: earlier samples of the same step, which are continued.
        ran_s: seconds of steps that ran directly before; they count as warm-up.
    """

    def __init__(
        self,
        subject: Subject,
        clock: Clock,
        hardware: Hardware,
        *,
        meter: EnergyMeter | None = None,
        samples: Samples | None = None,
        ran_s: Sequence[float] = (),
    ):
        self.subject, self.clock, self.hardware = subject, clock, hardware
        self._meter = meter if meter is not None and meter.reason is None else None
        self.samples = samples or Samples()
        self._ran_s = list(ran_s)
        self._result: Any = None

    @property
    def step_s(self) -> float:
        """The latency at the end of the warm-up."""
        return statistics.median(self._ran_s[-WARMUP_WINDOW:])

    def _queue(self) -> Stamps:
        stamps: Stamps = [("", self.clock.stamp())]
        self._result = self.subject.run(lambda name: stamps.append((name, self.clock.stamp())))
        if not self.subject.phases:
            stamps.append(("step", self.clock.stamp()))
        return stamps

    def begin(self) -> float:
        """Take the first steps of a new subject, in which kernels are searched for and compiled.

        Returns:
            The seconds of the very first one. The next is part of the warm-up.
        """
        first_s, second_s = (unpaused(self._timed_step) for _ in range(2))
        self._ran_s.append(second_s)
        return first_s

    def warm_up(self, most_s: float = WARMUP_MOST_S) -> str | None:
        """Step until latency and allocator have settled or a limit is reached, then check the
        result.

        Args:
            most_s: after which no further step starts, if two windows of steps ran.

        Returns:
            What had not settled; None if everything had.
        """
        reserved = [_reserved_bytes()] * len(self._ran_s)
        began, late = self.clock.now(), False
        while len(self._ran_s) < 2 * WARMUP_WINDOW or not (
            late or _unsettled(self._ran_s, reserved) is None
        ):
            self._ran_s.append(unpaused(self._timed_step))
            reserved.append(_reserved_bytes())
            late = self.clock.now() - began > most_s or len(self._ran_s) >= WARMUP_MOST_STEPS
        self.samples.warmup_steps += len(self._ran_s)
        if self._result is not None:
            self.subject.check(self._result)
        return _unsettled(self._ran_s, reserved)

    def _timed_step(self) -> float:
        stamps = self._queue()
        self.clock.synchronize()
        return self.clock.between(stamps[0][1], stamps[-1][1])

    def steps_in_block(self, most: int) -> int:
        """Return how many steps of this latency a block has."""
        return max(1, min(most, math.ceil(BLOCK_S / self.step_s)))

    def block_s(self, most: int) -> float:
        """Return about how long a block takes."""
        return (self.steps_in_block(most) + self._untimed_steps()) * self.step_s

    def _untimed_steps(self) -> int:
        return 1 if self.step_s <= BLOCK_S else 0

    def time_block(self, most: int) -> None:
        """Time a block of at most ``most`` steps, after one untimed step that warms the caches for
        this subject.

        The steps are queued without waiting in between, as in training: on a GPU the host runs
        ahead, which hides its launches. A block during which the process was stopped is timed
        again.
        """
        self.samples.blocks.append(unpaused(lambda: self._block(most)))

    def _block(self, most: int) -> Block:
        count, began_j, began = self.steps_in_block(most), self._joules(), self.clock.now()
        for _ in range(self._untimed_steps()):
            self._queue()
        before = self.hardware.during()
        with collector_off() as runs:
            steps = [self._queue() for _ in range(count)]
            # Before the wait: a GPU must be read while it works, not when it is idle.
            after = self.hardware.during()
            self.clock.synchronize()
        ended_j, seconds = self._joules(), self.clock.now() - began
        self.subject.check(self._result)
        energy = None
        if began_j is not None and ended_j is not None:
            energy = BlockEnergy(ended_j - began_j, seconds, count + self._untimed_steps())
        return Block(
            [self.clock.between(stamps[0][1], stamps[-1][1]) for stamps in steps],
            [self._phases(stamps) for stamps in steps],
            before,
            after,
            len(runs),
            energy,
        )

    def _joules(self) -> float | None:
        return None if self._meter is None else self._meter.read_j()

    def _phases(self, stamps: Stamps) -> dict[str, float]:
        phases = self.subject.phases
        return phase_seconds(self.clock, stamps, phases) if phases else {}


def _reserved_bytes() -> int:
    """Return the bytes that the CUDA allocator holds; always 0 without CUDA."""
    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0


def _unsettled(times: Sequence[float], reserved: Sequence[int]) -> str | None:
    """Return what still changes from step to step; None if nothing does."""
    last, before = times[-WARMUP_WINDOW:], times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW]
    change = statistics.median(last) / statistics.median(before) - 1
    apart = max(last) < min(before) or max(before) < min(last)
    if apart and abs(change) > SETTLED:
        return f"the latency still changed by {change:+.0%} in {len(times)} steps"
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
    watches: Sequence[Stopwatch],
    settings: MeasureSettings,
    *,
    clock: Clock,
    canary: CanaryKernel,
    on_round: OnRound = ignore_round,
    most_s: float | None = None,
    earlier: Session | None = None,
) -> Session:
    """Warm every subject up, then time interleaved rounds in random order.

    The last subject is the reference. Rounds continue until each ratio's 95 % interval (of a single
    subject: its latency's) is narrower than ``settings.precision_target``, or the time is up.

    Args:
        most_s: when no further round starts, if that is before ``settings.max_time_s``.
        earlier: a session of the same steps whose samples the watches continue. If they did not
            settle this time, it is returned; if they had not settled then, its rounds are dropped.

    Raises:
        BadStep: a loss is not finite.
    """
    began, spent_s = clock.now(), earlier.taken_s if earlier else 0.0
    limit_s = max(0.0, settings.max_time_s - spent_s)
    limit_s = limit_s if most_s is None else min(most_s, limit_s)
    unsettled = [watch.warm_up(min(WARMUP_MOST_S, limit_s / 2)) for watch in watches]
    if earlier and any(unsettled):
        return replace(earlier, taken_s=spent_s + clock.now() - began)
    if earlier and any(watch.samples.unsettled for watch in watches):
        earlier = None
        for watch in watches:
            watch.samples.blocks.clear()
    for watch, reason in zip(watches, unsettled, strict=True):
        watch.samples.unsettled = reason
    canary_s = list(earlier.canary_s) if earlier else []
    done = earlier.rounds if earlier else 0
    least = done + 1 if earlier else _least_rounds(watches, settings)
    order, shuffle = list(watches), random.Random(done)
    look, narrow, stopped = least, 0, ""
    with canary.ready() as canary_seconds:
        while not stopped:
            canary_s.append(canary_seconds())
            shuffle.shuffle(order)
            _time_round(order, settings)
            done += 1
            found = [watch.samples.rounds for watch in watches]
            width = widest_interval(found) if done >= look else None
            if width is not None:
                look = max(done + 1, int(done * CHECK_GROWTH))
                narrow = narrow + 1 if width <= settings.precision_target else 0
            on_round(done, width)
            late = done >= least and clock.now() - began > limit_s
            stopped = _why_stop(width, narrow >= LOOKS_IN_A_ROW, late, spent_s + limit_s, settings)
    taken_s = spent_s + clock.now() - began
    return Session([watch.samples for watch in watches], canary_s, done, stopped, taken_s)


def _time_round(order: Sequence[Stopwatch], settings: MeasureSettings) -> None:
    for watch in order:
        watch.time_block(settings.steps)
    gc.collect(0)  # what the blocks left, not every object of torch


def _least_rounds(watches: Sequence[Stopwatch], settings: MeasureSettings) -> int:
    """Return how many rounds are run in any case: fewer of slow steps."""
    round_s = sum(watch.block_s(settings.steps) for watch in watches)
    fitting = math.ceil(LEAST_ROUNDS_S / round_s)
    return min(settings.least_rounds, max(FEWEST_ROUNDS, fitting))


def widest_interval(rounds: Sequence[Rounds]) -> float:
    """Return the relative width of the widest interval: of the ratios to the last one, or of a
    single one's latency."""
    *compared, reference = rounds
    if not compared:
        return relative_width(median_interval(reference))
    return max(relative_width(paired_ratio(own, reference)) for own in compared)


def _why_stop(
    width: float | None, narrow: bool, late: bool, limit_s: float, settings: MeasureSettings
) -> str:
    target = settings.precision_target
    if narrow:
        return f"the interval is {width:.2%} wide, target {target:.2%}"
    if late:
        return f"{limit_s:.3g} s were up before the target of {target:.2%}"
    return ""
