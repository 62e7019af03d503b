"""Format numbers, and grids of cells as Markdown, as LaTeX or on a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdprof.visible import printable

MISSING = "-"
"""Stands for a value that is not available; a note under the table says why."""

UNRELIABLE = "\N{DAGGER}"
"""Ends the text of a cell that is based on an unreliable Cost."""
HIDDEN = "\N{DOUBLE DAGGER}"
"""Ends the hidden cost of a method that must not be matched by FLOP."""
AT_LEAST = "\N{GREATER-THAN OR EQUAL TO}"
"""Begins an amount of FLOP that misses operators."""
FLAGS = (UNRELIABLE, HIDDEN)
"""A note explains each mark; on a terminal, a cell that ends with one is coloured."""

SYMMETRIC = 1.1
"""An interval on a log scale is nearly symmetric up to this ratio of high end to value."""


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval, which are None if it has no interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, decimals: int) -> str:
        """Return ``71.3 [70.9-71.7]``, or the value alone if it has no interval."""
        value, low, high = (
            None if end is None else f"{end:.{decimals}f}"
            for end in (self.value, self.low, self.high)
        )
        return f"{value}" if low is None else f"{value} [{low}-{high}]"

    def brief(self, decimals: int) -> str:
        """Return ``71.3±0.4`` for an interval on a log scale, or its ends if it is too wide to be
        nearly symmetric."""
        wide = self.high is not None and self.high > SYMMETRIC * self.value
        return self.text(decimals) if wide else self.plus_minus(decimals)

    def plus_minus(self, decimals: int, *, signed: bool = False) -> str:
        """Return ``71.3±0.4`` for a symmetric interval, or the value alone without one."""
        value = f"{self.value:{'+' if signed else ''}.{decimals}f}"
        return value if self.high is None else f"{value}±{self.high - self.value:.{decimals}f}"


@dataclass(frozen=True)
class Grid:
    """A table of text; the first column is left-aligned, the others are right-aligned."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str] = ()
    """Names of further columns that are left-aligned."""

    def _is_left(self, column: int) -> bool:
        return column == 0 or self.header[column] in self.words

    def markdown(self) -> str:
        """Return the grid as a Markdown table, without its title."""
        rule = [":--" if self._is_left(column) else "--:" for column in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)

    def without_empty(self) -> Grid:
        """Return the grid without the columns in which every row has a dash."""
        kept = [
            number
            for number in range(len(self.header))
            if number == 0 or any(row[number] != MISSING for row in self.rows)
        ]
        rows = [[row[number] for number in kept] for row in self.rows]
        return replace(self, header=[self.header[number] for number in kept], rows=rows)

    def latex(self, label: str, notes: Sequence[str]) -> str:
        r"""Return a ``table`` environment for ``\usepackage{booktabs}``, any notes below it."""
        lines = [" & ".join(map(latex_text, row)) + r" \\" for row in (self.header, *self.rows)]
        below = [
            r"  \par\smallskip",
            r"  \begin{minipage}{\linewidth}",
            r"    \raggedright\scriptsize",
            *(rf"    {latex_text(note)}\par" for note in notes),
            r"  \end{minipage}",
        ]
        sides = "".join("l" if self._is_left(column) else "r" for column in range(len(self.header)))
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                rf"  \caption{{{latex_text(self.title)}}}",
                rf"  \label{{{label}}}",
                r"  \footnotesize",
                r"  \setlength{\tabcolsep}{3pt}",
                rf"  \begin{{tabular}}{{{sides}}}",
                r"    \toprule",
                f"    {lines[0]}",
                r"    \midrule",
                *(f"    {line}" for line in lines[1:]),
                r"    \bottomrule",
                r"  \end{tabular}",
                *(below if notes else ()),
                r"\end{table}",
            ]
        )

    def print(self, console: Console) -> None:
        """Print the grid, at its natural width if the output is not a terminal."""
        table = narrow_table()
        for number, name in enumerate(self.header):
            words = " ".join(row[number] for row in self.rows).split(" ")
            # On a narrow terminal, cells break between words, never inside a number.
            table.add_column(
                Text(name),
                justify="left" if self._is_left(number) else "right",
                min_width=max(map(len, words)),
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(cell, _style(cell)) for cell in row))
        limits = Measurement.get(console, console.options.update(max_width=1000), table)
        # In a pipe the width of a terminal does not apply, and folded numbers cannot be searched.
        room = console.width if console.is_terminal else limits.maximum
        table.width = min(max(room, limits.minimum), limits.maximum)
        # Not as the table's own title, which rich folds at the width of the table.
        console.print(Text(self.title, "bold"), soft_wrap=True)
        console.print(table, "", sep="\n", crop=False)


def narrow_table() -> Table:
    """Return an empty table without outer edges: nine columns have to fit a terminal of 80."""
    return Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)


_STYLES = {MISSING: "dim", "slower": "red", "faster": "green"}


def _style(cell: str) -> str:
    return _STYLES.get(cell, "yellow" if cell.endswith(FLAGS) else "")


def markdown_text(text: str) -> str:
    """Return text for one line of Markdown in which names make no HTML, link or image."""
    plain = printable(" ".join(text.split()))
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", plain).replace("](", r"]\(")


def _escaped(cell: str) -> str:
    return markdown_text(cell).replace("|", "\\|")


def csv_cell(value: object) -> object:
    """Return a cell for a CSV file; spreadsheets run no text of it as a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    is_number = re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?", text) is not None
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not is_number else text


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    # LaTeX would read a bracket after \\ as its argument.
    "[": "{[}", "]": "{]}", "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$", UNRELIABLE: r"$^{\dagger}$", HIDDEN: r"$^{\ddagger}$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
_LATIN = 0x180
"""Below this code point LaTeX reads UTF-8 without further packages."""


def latex_text(text: str) -> str:
    """Return text escaped for LaTeX; characters that no standard font has become question marks."""
    if text == MISSING:
        return "--"
    escaped = "".join(
        _LATEX.get(c, c if ord(c) < _LATIN else "?") for c in printable(" ".join(text.split()))
    )
    # A dash between numbers is a range and one before a number is its sign; opening quotes differ.
    for pattern, sign in (
        (r"(?<=\d)-(?=\d)", "--"),
        (r"(?<!\S)-(?=\d)", "$-$"),
        (r"(?<=\{\[\})-(?=\d)", "$-$"),
        (r"(?<!\S)'", "`"),
    ):
        escaped = re.sub(pattern, sign, escaped)
    return escaped


def flagged(name: str, unreliable: bool) -> str:
    """Return a method's name, marked if its numbers are based on an unreliable Cost."""
    return name + UNRELIABLE * unreliable


def unreliable_note(methods: Iterable[str]) -> list[str]:
    """Return the note that explains the mark, or no note if there are no such methods."""
    named = ", ".join(sorted(set(methods)))
    fix = "measure again when the machine is quiet"
    return [f"{UNRELIABLE} Based on an UNRELIABLE Cost ({named}); {fix}."] if named else []


def unreliable_names_note(names: Iterable[str]) -> list[str]:
    """Return the note for a figure of runs that explains the marks of some names, or no note."""
    marked = any(name.endswith(UNRELIABLE) for name in names)
    return [f"{UNRELIABLE}\u00a0planned with an unreliable Cost: costs.md says why."] * marked


def print_notes(notes: Iterable[str], console: Console) -> None:
    """Print notes under a grid, one per line, without reading them as markup."""
    for note in notes:
        console.print(Text(" ".join(note.split())), soft_wrap=True)


def digits(value: float, half_width: float) -> int:
    """Return how many decimals to write: four figures, more if the interval would round to 0."""
    decimals = 1 if value >= 100 else 2 if value >= 1 else 3
    needed = math.ceil(-math.log10(half_width)) if half_width > 0 else 0
    return min(max(decimals, needed), decimals + 2)


def figures(value: float, number: int = 3) -> str:
    """Return a value with at least ``number`` figures, never with an exponent."""
    if value == 0:
        return "0"
    decimals = number - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def factor(value: float) -> str:
    """Return a factor as ``0.81``, ``12`` or ``0.0042``: one that is not 0 never reads as 0."""
    if value < 0.1:
        return figures(value, 2)
    return f"{value:.2f}" if value < 9.95 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return seconds in a readable unit: ``38.2 s``, ``12.4 min``, ``3.41 h``."""
    unit, name = next((u for u in ((3600, "h"), (60, "min")) if seconds >= 2 * u[0]), (1, "s"))
    value = seconds / unit
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f} {name}"


def size(count: float) -> str:
    """Return bytes in GiB, or in MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
