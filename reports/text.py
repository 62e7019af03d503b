"""How reports write numbers, and grids of cells as Markdown or on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MISSING = "-"
"""Stands for what is not available; a note under the table says why."""

NARROW = {"show_edge": False, "padding": (0, 1, 0, 0), "pad_edge": False}
"""Nine columns have to fit a terminal of 80."""


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, decimals: int) -> str:
        """Return ``71.3 [70.9-71.7]``, or the value alone where there is no interval."""
        value, low, high = (
            None if end is None else f"{end:.{decimals}f}"
            for end in (self.value, self.low, self.high)
        )
        return f"{value}" if low is None else f"{value} [{low}-{high}]"

    def plus_minus(self, decimals: int, *, signed: bool = False) -> str:
        """Return ``71.3±0.4``, for an interval that is symmetric; the value alone without."""
        value = f"{self.value:{'+' if signed else ''}.{decimals}f}"
        return value if self.high is None else f"{value}±{self.high - self.value:.{decimals}f}"


@dataclass(frozen=True)
class Grid:
    """A table of text: the first column is read from the left, numbers from the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the grid as a Markdown table, without its title."""
        rule = [":--", *("--:" for _ in self.header[1:])]
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)

    def print(self, console: Console) -> None:
        """Print the grid; at its natural width where the output is no terminal."""
        table = Table(
            title=Text(self.title, "bold"), title_justify="left", box=SIMPLE_HEAD, **NARROW
        )
        for number, name in enumerate(self.header):
            words = " ".join(row[number] for row in self.rows).split(" ")
            # Where the terminal is narrow, cells break between words, never inside a number.
            table.add_column(
                Text(name),
                justify="right" if number else "left",
                min_width=max(map(len, words)),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        limits = Measurement.get(console, console.options.update(max_width=1000), table)
        # Piped: a terminal's width does not apply, and folded numbers cannot be searched for.
        room = console.width if console.is_terminal else limits.maximum
        table.width = min(max(room, limits.minimum), limits.maximum)
        console.print(table, "", sep="\n", crop=False)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print notes under a grid, one per line, without reading them as markup."""
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def duration(seconds: float) -> str:
    """Return seconds in a readable unit: ``38.2 s``, ``12.4 min``, ``3.41 h``."""
    unit, name = next((u for u in ((3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    value = seconds / unit
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f} {name}"


def size(count: float) -> str:
    """Return bytes in GiB, or in MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
