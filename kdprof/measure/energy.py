"""Energy of a step, by the device's own counter, over many periods of that counter: in a window of
its own, or around timed blocks where these are long enough."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from kdprof.hardware.base import EnergyMeter
from kdprof.measure.latency import Block
from kdprof.records import Energy

IDLE_SETTLE_S = 1.0
"""Since Ampere, NVML's power is the mean of the last second, in which no step may run."""
IDLE_S = 0.5
POLL_S = 0.001
LOADED_S = 1.0
"""How long steps run before the window: as long as NVML's mean of power reaches back."""
CHANGES = 5
"""Changes of the counter from which its period is estimated."""
CHANGES_MOST_S = 5.0
"""The longest wait for changes of the counter."""
WINDOW_PERIODS = 10
WINDOW_LEAST_S = 0.5
SAMPLE_S = 0.02
"""Time between two samples of power, unless one step takes longer."""

BLOCKS_ERROR = 0.02
"""The largest error of energy that is read around timed blocks, as a fraction."""
POWER_DIFFERENCE = 0.2
"""By how much the power before a block, that of another step, may differ from the block's own."""

Change = tuple[float, float]
"""When a change of the counter was seen, and the joules it then showed."""


class EnergyReading(NamedTuple):
    """Joules of one step and how they were measured, or None and the reason."""

    joules: float | None
    how: Energy | None
    reason: str | None


class _NoReadingError(Exception):
    """The counter can no longer be read, or its values cannot be right."""


class _Steps:
    """Runs steps and counts them."""

    def __init__(self, run_steps: Callable[[int], None], synchronize: Callable[[], None]):
        self._run_steps, self._synchronize = run_steps, synchronize
        self.done = 0

    def queue(self, count: int) -> None:
        self._run_steps(count)
        self.done += count

    def finish(self) -> None:
        self._synchronize()

    def one(self) -> None:
        self.queue(1)
        self.finish()


class _Counter:
    """An energy meter that is read together with a clock."""

    def __init__(self, meter: EnergyMeter, clock: Callable[[], float]):
        self.meter, self.clock = meter, clock

    def read_j(self) -> float:
        joules = self.meter.read_j()
        if joules is None:
            raise _NoReadingError(f"the energy counter stopped answering: {self.meter.reason}")
        return joules

    def changes(
        self, between: Callable[[], None], count: int, least_s: float = 0.0, most_s: float = 0.0
    ) -> list[Change]:
        """Call ``between`` repeatedly and return the counter's changes: for at least ``least_s``,
        then until there are ``count`` changes or ``most_s`` has passed."""
        began, last = self.clock(), self.read_j()
        found: list[Change] = []
        while (passed := self.clock() - began) < least_s or (
            len(found) < count and passed < most_s
        ):
            between()
            joules = self.read_j()
            if joules != last:
                found.append((self.clock(), joules))
                last = joules
        return found

    def next_change(self, between: Callable[[], None]) -> Change:
        found = self.changes(between, 1, most_s=CHANGES_MOST_S)
        if not found:
            raise _NoReadingError(
                f"the energy counter did not move in {CHANGES_MOST_S:g} s of steps"
            )
        return found[0]


def energy_of_blocks(meter: EnergyMeter, blocks: Sequence[Block]) -> EnergyReading:
    """Return the joules of one step from readings around timed blocks.

    A reading is up to a period of the counter late, at the start and at the end of each block. So
    blocks must be long: on average half a period of the block's own power is missing at its end, in
    place of which half a period of the power before is counted.
    """
    if meter.reason is not None:
        return EnergyReading(None, None, meter.reason)
    read = [block.energy for block in blocks if block.energy is not None]
    if len(read) < len(blocks):
        return EnergyReading(None, None, "the energy counter stopped answering")
    if any(one.joules < 0 for one in read):
        return EnergyReading(None, None, "the energy counter was reset while steps ran; --detail")
    seconds, steps = sum(one.seconds for one in read), sum(one.steps for one in read)
    # The lateness at both ends is uniform over a period and independent from block to block.
    spread = meter.period_s * math.sqrt(len(read) / 6) / seconds
    shift = POWER_DIFFERENCE * meter.period_s / 2 * len(read) / seconds
    error = spread + shift
    if error > BLOCKS_ERROR:
        return EnergyReading(
            None,
            None,
            f"{len(read)} timed blocks of {seconds / len(read):.2g} s are too short for a counter "
            f"that moves every {meter.period_s:g} s; --detail measures it",
        )
    how = Energy(
        source=meter.source,
        window_s=seconds,
        steps=steps,
        counter_period_s=meter.period_s,
        idle_w=None,
        power_integral_j=None,
        around_blocks=True,
    )
    return EnergyReading(sum(one.joules for one in read) / steps, how, None)


def measure_energy(
    run_steps: Callable[[int], None],
    meter: EnergyMeter,
    synchronize: Callable[[], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyReading:
    """Return the joules of one step, including what the device draws when idle.

    The window begins and ends at a change of the counter, both seen in the same way after a
    finished step, so that the counter's delay cancels.

    Args:
        run_steps: queues the given number of steps.
        synchronize: waits until they are done.
        clock, sleep: return monotonic seconds, and pause for the given seconds.
    """
    if meter.reason is not None:
        return EnergyReading(None, None, meter.reason)
    steps, counter = _Steps(run_steps, synchronize), _Counter(meter, clock)
    try:
        joules, how = _measure(steps, counter, sleep)
    except _NoReadingError as error:
        return EnergyReading(None, None, str(error))
    return EnergyReading(joules, how, None)


def _measure(
    steps: _Steps, counter: _Counter, sleep: Callable[[float], None]
) -> tuple[float, Energy]:
    steps.finish()
    sleep(IDLE_SETTLE_S)
    idle = counter.changes(lambda: sleep(POLL_S), 0, least_s=IDLE_S)
    began = counter.clock()
    loaded = counter.changes(steps.one, CHANGES, least_s=LOADED_S, most_s=CHANGES_MOST_S)
    step_s = (counter.clock() - began) / steps.done
    # A step longer than the counter's period hides it; an idle counter may move less often.
    periods = [period for period in (_period_s(idle), _period_s(loaded)) if period is not None]
    if not periods:
        raise _NoReadingError("the energy counter moves too rarely to be measured with")
    period_s = min(periods)
    window_s = max(WINDOW_LEAST_S, WINDOW_PERIODS * period_s)
    first, last, count, samples = _window(steps, counter, window_s, step_s)
    if last[1] < first[1]:
        raise _NoReadingError("the energy counter was reset while steps ran")
    power_w = _sampled_w(samples)
    return (last[1] - first[1]) / count, Energy(
        source=counter.meter.source,
        window_s=last[0] - first[0],
        steps=count,
        counter_period_s=period_s,
        idle_w=_power_w(idle),
        power_integral_j=None if power_w is None else power_w * (last[0] - first[0]) / count,
    )


def _window(
    steps: _Steps, counter: _Counter, window_s: float, step_s: float
) -> tuple[Change, Change, int, list[tuple[float, float | None]]]:
    """Run steps from one change of the counter to the first one after ``window_s``.

    Returns:
        Both changes, the number of steps between them, and the samples of power in watts with
        their times, all taken while steps ran.
    """
    chunk = max(1, round(SAMPLE_S / step_s))
    first = counter.next_change(steps.one)
    began, before = first[0], steps.done
    samples: list[tuple[float, float | None]] = []
    while counter.clock() - began < window_s:
        # Read while the device still works: the host does not wait between chunks.
        steps.queue(chunk)
        samples.append((counter.clock(), counter.meter.power_w()))
    steps.finish()
    last = counter.next_change(steps.one)
    return first, last, steps.done - before, samples


def _period_s(changes: list[Change]) -> float | None:
    """Return the median time between changes; None if there are fewer than two."""
    gaps = [late - early for (early, _), (late, _) in pairwise(changes)]
    return statistics.median(gaps) if gaps else None


def _power_w(changes: list[Change]) -> float | None:
    """Return the mean power from the first change to the last."""
    if len(changes) < 2:
        return None
    (began, before), (ended, after) = changes[0], changes[-1]
    return (after - before) / (ended - began)


def _sampled_w(samples: list[tuple[float, float | None]]) -> float | None:
    """Return the mean power by the trapezoidal rule; None if a sample is missing."""
    read = [(moment, watts) for moment, watts in samples if watts is not None]
    if len(read) < len(samples):
        return None
    span_s = read[-1][0] - read[0][0]
    if not span_s:
        return read[0][1]
    areas = ((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(read))
    return sum(areas) / span_s
