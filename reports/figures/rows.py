"""Charts with one row per method: names at the left, a panel, texts at the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kdprof.records import Cost

from ..text import flagged
from .looks import INK, NOTE_POINTS, Look
from .sheet import (
    MARGIN,
    SPACE,
    Sheet,
    distinct,
    fixed_ticks,
    text_width,
    width_of,
    without_crowding,
)

HEAD = 4.5
"""Height of the names of the columns beside the rows, mm."""

TALL, ROW, FEW = 4.6, 3.5, 8
"""Height of a row, mm, up to a few rows and above."""
MARK = 3.4
"""Width of a method's marker in front of its name, mm."""
NAME_SHARE = 0.34
"""Names take at most this part of the sheet's width."""


def row_height(rows: int) -> float:
    """Return the height of a row, mm."""
    return TALL if rows <= FEW else ROW


@dataclass(frozen=True)
class Labels:
    """The names at the left of the rows, as they fit."""

    texts: dict[str, str]
    width: float
    """With the markers and both margins, mm."""

    @classmethod
    def fit(cls, names: Mapping[str, str], sheet_width: float) -> Labels:
        """Return the texts of the rows (``names``: text by method) for a sheet of this width."""
        short = distinct(list(names.values()), NAME_SHARE * sheet_width)
        texts = {method: short[name] for method, name in names.items()}
        widest = max(map(text_width, texts.values()), default=0.0)
        return cls(texts, MARGIN + MARK + widest + SPACE)

    @classmethod
    def of_costs(cls, costs: Sequence[Cost], sheet_width: float) -> Labels:
        """Return the names of methods, marked if their Cost is unreliable."""
        return cls.fit({c.method: flagged(c.method, not c.reliable) for c in costs}, sheet_width)

    def write(self, sheet: Sheet, top: float, height: float, looks: Mapping[str, Look]) -> None:
        """Write marker and name of each row, from ``top`` mm down."""
        for number, (method, text) in enumerate(self.texts.items()):
            y = top + (number + 0.5) * height
            sheet.marker(MARGIN + MARK / 2 - 0.4, y, looks[method])
            sheet.text(MARGIN + MARK, y, text)


def rows_panel(sheet: Sheet, left: float, top: float, width: float, rows: int) -> Axes:
    """Return axes with row 0 at the top; y is the row's number."""
    panel = sheet.panel(left, top, width, rows * row_height(rows))
    panel.set_ylim(rows - 0.5, -0.5)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.set_axisbelow(True)
    return panel


def write_columns(
    sheet: Sheet,
    widths: Mapping[str, float],
    rows: Sequence[Mapping[str, str]],
    top: float,
    left: float,
) -> None:
    """Write columns of text right of a panel, each under its name; a row has a text by name."""
    right = left
    for name, width in widths.items():
        right += width
        sheet.text(right, top - HEAD / 2, name, ha="right", colour=INK, points=NOTE_POINTS)
        for number, row in enumerate(rows):
            y = top + (number + 0.5) * row_height(len(rows))
            sheet.text(right, y, row[name], ha="right")


def write_ends(panel: Axes, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write a text at the end of each row's bar, and set the x axis from 0 so that all fit."""
    width = width_of(panel)
    room = [width - text_width(text) - SPACE for text in texts]
    limit = max(end * width / max(free, width / 4) for end, free in zip(ends, room, strict=True))
    panel.set_xlim(0, limit or 1)
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        x = end + 0.8 / width * (limit or 1)
        # The white ground hides the grid, which would cross the text.
        panel.text(
            x, row, text, va="center_baseline", bbox={"fc": "white", "ec": "none", "pad": 0.4}
        )
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, max(ends))
    inside = [float(tick) for tick in ticks if 0 <= tick <= max(ends)]
    fixed_ticks(panel, without_crowding(panel, inside))
