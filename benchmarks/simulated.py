"""A simulated machine with known noise: steps of known latency advance a simulated clock.

The measuring code runs on it unchanged; only the clock, the canary and the hardware are simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from kdprof.measure.latency import Session, Stopwatch, time_interleaved
from kdprof.study import MeasureSettings

Noise = Iterator[float]
"""Factors by which steps take longer than without noise, one per step, in order of time."""


class SimulatedClock:
    """A clock that only steps and the canary advance."""

    name = "simulated"

    def __init__(self) -> None:
        self.seconds = 0.0

    def stamp(self) -> float:
        return self.seconds

    def between(self, before: float, after: float) -> float:
        return after - before

    def synchronize(self) -> None:
        pass

    def now(self) -> float:
        return self.seconds


class SimulatedStep:
    """A step of ``latency_s`` on a noisy machine."""

    phases = ()
    traced = None
    feed = None

    def __init__(self, name: str, latency_s: float, clock: SimulatedClock, noise: Noise):
        self.name, self.latency_s, self.clock, self.noise = name, latency_s, clock, noise

    def run(self, mark: Callable[[str], None]) -> None:
        self.clock.seconds += self.latency_s * next(self.noise)

    def check(self, result: None) -> None:
        pass


class SimulatedCanary:
    """A fixed kernel on the same noisy machine."""

    def __init__(self, clock: SimulatedClock, noise: Noise):
        self.clock, self.noise = clock, noise

    @contextmanager
    def ready(self) -> Iterator[Callable[[], float]]:
        yield self._seconds

    def _seconds(self) -> float:
        taken = 1e-3 * next(self.noise)
        self.clock.seconds += taken
        return taken


class QuietHardware:
    """Hardware that never reports anything."""

    name = "simulated"

    def during(self) -> dict:
        return {}

    def cause(self, before: dict, after: dict) -> None:
        return None


def quiet() -> Noise:
    """Yield the factors of a machine without noise."""
    while True:
        yield 1.0


def independent(rng: np.random.Generator, spread: float = 0.02) -> Noise:
    """Yield normal noise that is independent for every step."""
    while True:
        yield float(np.exp(spread * rng.standard_normal()))


def drifting(rng: np.random.Generator, spread: float = 0.02) -> Noise:
    """Yield independent noise on a level that wanders and returns (clock, other processes)."""
    level = 0.0
    while True:
        level = 0.98 * level + 0.01 * rng.standard_normal()
        yield float(np.exp(level + spread * rng.standard_normal()))


def disturbed(rng: np.random.Generator, spread: float = 0.01) -> Noise:
    """Yield noise that delays one step in twelve, to at most twice its time."""
    while True:
        held_up = rng.random() if rng.random() < 1 / 12 else 0.0
        yield float(np.exp(spread * rng.standard_normal()) * (1 + held_up))


MACHINES = {"independent": independent, "drifting": drifting, "disturbed": disturbed}


def measure_simulated(
    latencies_s: dict[str, float], noise: Noise, **settings: float
) -> tuple[Session, SimulatedClock]:
    """Measure steps of known latency; the last one is the reference."""
    clock = SimulatedClock()
    steps = [SimulatedStep(name, s, clock, noise) for name, s in latencies_s.items()]
    session = time_interleaved(
        [Stopwatch(step, clock, QuietHardware()) for step in steps],
        MeasureSettings(**settings),
        clock=clock,
        canary=SimulatedCanary(clock, noise),
    )
    return session, clock
