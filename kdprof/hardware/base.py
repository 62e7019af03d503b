"""The interface of devices and of their energy counters, the same for every kind.

A missing driver or counter is a null object: it returns None, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Reading = tuple[Any, str | None]
"""A value, or None and the reason."""
State = dict[str, Any]
"""Values by name, JSON-able. A value that could not be read is None; ``unavailable`` says why."""


class EnergyMeter(Protocol):
    """A counter of the energy that a device has consumed."""

    source: str
    """A description of the counter."""
    period_s: float
    """The longest time between two updates of such a counter while the device works."""

    @property
    def reason(self) -> str | None:
        """Why the last reading failed; None if it succeeded."""

    def read_j(self) -> float | None:
        """Return the joules consumed since some fixed moment, or None."""

    def power_w(self) -> float | None:
        """Return the current power, from a sensor other than the counter, or None."""


class Hardware(Protocol):
    """The interface of a device. Nothing here raises if the system does not report a value."""

    name: str

    def state(self) -> State:
        """Return the full state of the device now."""

    def during(self) -> State:
        """Return the part of :meth:`state` that is cheap enough to read between timed blocks."""

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Return why a measurement is unreliable.

        Args:
            before, after: results of :meth:`state`.
            during: results of :meth:`during`, in the order they were read.
        """

    def cause(self, before: State, after: State) -> str | None:
        """Return what slowed down the block between two readings; None if no cause is visible."""

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return this process's memory on the device, or None and the reason."""

    def energy_meter(self) -> EnergyMeter:
        """Return the device's energy counter."""


def state_of(readings: Mapping[str, Reading]) -> State:
    """Return the values of readings, and why some are missing."""
    state = {name: value for name, (value, _) in readings.items()}
    missing = {name: reason for name, (value, reason) in readings.items() if value is None}
    return {**state, "unavailable": missing} if missing else state
