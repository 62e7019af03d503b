"""Clocks: time stamps, taken while steps are queued and read later; none synchronises."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kdprof.pauses import running_s

Stamps = list[tuple[str, Any]]
"""Stamps, each with the name of what it ends; the first one ends nothing."""


class Clock(Protocol):
    """A timer of steps on one device."""

    name: str

    def stamp(self) -> Any:
        """Return a time stamp of the device."""

    def between(self, before: Any, after: Any) -> float:
        """Return the seconds between two stamps that the device has reached."""

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""

    def now(self) -> float:
        """Return the host's seconds, without those in which this process was stopped."""


class CpuClock:
    """The monotonic clock: on a CPU the host is the device."""

    name = "perf_counter"

    def stamp(self) -> float:
        """Return the monotonic clock's seconds."""
        return time.perf_counter()

    def between(self, before: float, after: float) -> float:
        """Return the seconds between two stamps."""
        return after - before

    def synchronize(self) -> None:
        """Return at once: nothing is queued on a CPU."""

    def now(self) -> float:
        """Return the host's seconds, without those in which this process was stopped."""
        return running_s()


class CudaClock:
    """CUDA events, recorded in the current stream."""

    name = "CUDA events"

    def __init__(self, device: torch.device):
        self.device = device

    def stamp(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        """Return the seconds between two events that the device has reached."""
        return before.elapsed_time(after) / 1e3

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def now(self) -> float:
        """Return the host's seconds, without those in which this process was stopped."""
        return running_s()


def clock_of(device: torch.device) -> Clock:
    """Return the clock that times work on a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def phase_seconds(clock: Clock, stamps: Stamps, phases: Sequence[str]) -> dict[str, float]:
    """Return the seconds of each of ``phases``; 0 for one that the step did not mark."""
    found = dict.fromkeys(phases, 0.0)
    for (_, before), (phase, after) in itertools.pairwise(stamps):
        found[phase] = found.get(phase, 0.0) + clock.between(before, after)
    return found
