"""Table: the forecast of a study's runs, before they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from .text import MISSING, Grid, duration, flagged, print_notes, unreliable_note

if TYPE_CHECKING:
    from kdprof.train.plan import Forecast

HEADER = ("method", "budget", "runs", "iterations each", "wall-clock", "95 % interval", "energy",
          "disk")  # fmt: skip


def plan_table(forecasts: Sequence[Forecast], console: Console) -> None:
    """Print the forecast of every method under every budget, and the total."""
    rows = [_cells(one) for one in forecasts]
    Grid("Forecast of the runs that are not finished", HEADER, rows).print(console)
    seconds = sum(one.seconds for one in forecasts)
    saved_s = sum(one.saved_s for one in forecasts)
    low, high = (sum(getattr(one, end) for one in forecasts) for end in _ENDS)
    disk = [one.disk_bytes for one in forecasts if one.disk_bytes is not None]
    on_disk = f", {_gigabytes(sum(disk))} on disk" if len(disk) == len(forecasts) else ""
    notes = [
        f"Total: {duration(seconds - saved_s)} of training [{duration(max(0.0, low - saved_s))} to "
        f"{duration(max(0.0, high - saved_s))}]{on_disk}. The teacher's own training and "
        "evaluation are not included: they are part of no budget."
    ]
    if saved_s:
        notes.append(
            f"Shared trunks (wsd) save {duration(saved_s)} of {duration(seconds)}; subtracted from "
            "the total, not from the rows."
        )
    if any(one.energy_j is None for one in forecasts):
        notes.append(f"'{MISSING}' in energy: the device has no energy counter.")
    if not on_disk:
        notes.append(f"'{MISSING}' in disk: the state of the study's own optimizer is not known.")
    notes += unreliable_note(one.method for one in forecasts if one.unreliable)
    print_notes(notes, console)


_ENDS = ("seconds_low", "seconds_high")


def _cells(one: Forecast) -> list[str]:
    runs = f"{one.runs}" if not one.finished else f"{one.runs - one.finished} of {one.runs}"
    interval = "" if one.low == one.high else f" [{one.low:,}-{one.high:,}]"
    return [
        flagged(one.method, one.unreliable),
        one.budget,
        runs,
        f"{one.iterations:,}{interval}",
        duration(one.seconds),
        f"{duration(one.seconds_low)} to {duration(one.seconds_high)}",
        MISSING if one.energy_j is None else f"{one.energy_j / 3.6e6:.3g} kWh",
        MISSING if one.disk_bytes is None else _gigabytes(one.disk_bytes),
    ]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
