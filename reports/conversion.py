"""Table: how many iterations of each method a budget buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from .text import MISSING, Grid, duration, flagged, print_notes, unreliable_note

if TYPE_CHECKING:
    from kdprof.budget import Conversion


def conversion_table(budget_text: str, conversions: Sequence[Conversion], console: Console) -> None:
    """Print the iterations of each method that ``budget_text`` buys, the most first."""
    header = ("method", "iterations", "95 % interval", "wall-clock", "at equal FLOP")
    ordered = sorted(
        conversions, key=lambda conversion: (-conversion.iterations, conversion.method)
    )
    Grid(f"{budget_text} buys", header, [_cells(one) for one in ordered]).print(console)
    notes = ["Wall-clock is the forecast for these iterations, evaluation excluded."]
    if any(one.iterations_equal_flop is None for one in ordered):
        notes.append(f"'{MISSING}' at equal FLOP: the budget or the cost has no total of FLOP.")
    notes += unreliable_note(method for one in ordered for method in one.unreliable)
    print_notes(notes, console)


def _cells(conversion: Conversion) -> list[str]:
    flop = conversion.iterations_equal_flop
    return [
        flagged(conversion.method, bool(conversion.unreliable)),
        f"{conversion.iterations:,}",
        f"[{conversion.low:,}-{conversion.high:,}]",
        duration(conversion.seconds),
        MISSING if flop is None else f"{flop:,}",
    ]
