"""What can be asked of a device and of its energy counter, whatever kind it is.

A driver or counter that is absent is a null object: it answers None, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Reading = tuple[Any, str | None]
"""A value, or None and the reason."""
State = dict[str, Any]
"""Values by name, JSON-able. What could not be read is None; ``unavailable`` says why, by name."""


class EnergyMeter(Protocol):
    """A counter of the energy that a device has drawn."""

    source: str
    """The counter, in words."""

    @property
    def reason(self) -> str | None:
        """Why there is no reading, or no more since the last call; None while there is."""

    def read_j(self) -> float | None:
        """Return the joules drawn since some fixed moment, or None."""

    def power_w(self) -> float | None:
        """Return the power now by a sensor other than the counter, or None."""


class Hardware(Protocol):
    """What can be asked of a device. Nothing here raises for what the system does not tell."""

    name: str

    def state(self) -> State:
        """Return all that the device says of itself now."""

    def during(self) -> State:
        """Return the part of :meth:`state` that is cheap enough to read between timed blocks."""

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Return why a measurement is not to be trusted.

        Args:
            before, after: of :meth:`state`.
            during: of :meth:`during`, in the order they were read.
        """

    def cause(self, before: State, after: State) -> str | None:
        """Return what slowed down the block between two readings; None if nothing was seen."""

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return this process's memory on the device, or None and the reason."""

    def energy_meter(self) -> EnergyMeter:
        """Return the device's energy counter."""


def state_of(readings: Mapping[str, Reading]) -> State:
    """Return the values of readings, and why some are missing."""
    state = {name: value for name, (value, _) in readings.items()}
    missing = {name: reason for name, (value, reason) in readings.items() if value is None}
    return {**state, "unavailable": missing} if missing else state
