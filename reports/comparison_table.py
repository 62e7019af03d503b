"""Table: how the cost of each method changed between two measurements."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from kdprof.stats.intervals import Numbers

from .comparison import Change, Comparison
from .text import MISSING, UNRELIABLE, Estimate, Grid, digits, flagged, print_notes

_TITLES = {
    "latency": "new / old",
    "relative": "ratio to the reference",
    "flop": "FLOP",
    "memory": "memory",
    "energy": "energy",
}
"""How notes name a field that is not available."""


def comparison_table(comparison: Comparison, console: Console) -> None:
    """Print the changes, one method per line, and the notes."""
    _grid(comparison).without_empty().print(console)
    print_notes(_notes(comparison), console)


def _grid(comparison: Comparison) -> Grid:
    unit, scale = _time_unit(comparison)
    references = sorted({row.reference for row in comparison.rows if row.reference})
    columns: dict[str, Callable[[Change], str]] = {
        "method": lambda row: flagged(row.method, not row.reliable),
        f"old ({unit})": lambda row: _seconds(row.old_s, scale),
        f"new ({unit})": lambda row: _seconds(row.new_s, scale),
        "new / old": lambda row: _estimate(row.latency),
        "verdict": lambda row: row.verdict or MISSING,
        "threshold": lambda row: f"{100 * row.threshold:.1f} %" if row.verdict else MISSING,
        f"change of / {' or '.join(references)}": lambda row: _estimate(row.relative),
        "FLOP": lambda row: _percent(row.flop),
        "memory": lambda row: _percent(row.memory),
        "energy": lambda row: _percent(row.energy),
    }
    rows = [[text(row) for text in columns.values()] for row in comparison.rows]
    return Grid("Cost of one step, new against old", list(columns), rows, ("verdict",))


def _time_unit(comparison: Comparison) -> tuple[str, float]:
    """Return the time unit of the whole table, and how many of them are a second."""
    longest = max((row.new_s or 0.0 for row in comparison.rows), default=0.0)
    return ("s", 1.0) if longest >= 1 else ("ms", 1e3)


def _seconds(value: float | None, scale: float) -> str:
    return MISSING if value is None else f"{value * scale:.{digits(value * scale, 0)}f}"


def _estimate(numbers: Numbers | None) -> str:
    if numbers is None:
        return MISSING
    # Three decimals: a change of half a percent must be visible.
    return Estimate(*numbers).brief(3)


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return MISSING
    return "=" if ratio == 1 else f"{100 * (ratio - 1):+.1f} %"


def _notes(comparison: Comparison) -> list[str]:
    columns = (
        "The change of the ratio to the reference cancels the machine's own speed. FLOP, peak "
        "memory, energy: relative change, '=' if nothing changed."
    )
    doubts = [f"{UNRELIABLE} {doubt}" for doubt in comparison.unreliable]
    return [comparison.notes[0], columns, *comparison.notes[1:], *doubts, *_missing(comparison)]


def _missing(comparison: Comparison) -> list[str]:
    """Return the reasons for dashes: one note per column and reason."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in comparison.rows:
        for name, reason in row.missing.items():
            where.setdefault((name, reason), []).append(row.method)
    return [
        f"No {_TITLES[name]} ({', '.join(methods)}): {reason}."
        for (name, reason), methods in where.items()
    ]
