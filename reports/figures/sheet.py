"""What all figures share: a sheet laid out in millimetres, keys, notes and files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from kdprof.errors import UserError, unknown
from kdprof.store import write_atomic

from .looks import INK, NOTE_POINTS, TEXT_POINTS, Look, styled

INCH = 25.4
"""Millimetres."""
POINT = INCH / 72
"""Millimetres."""
COLUMN, PAGE = 84.0, 174.0
"""Widths of one and of two columns of a paper, mm."""
NARROWEST, WIDEST = 70.0, 400.0
TWO_PANELS = 140.0
"""From this width on, mm, there is room for two panels side by side."""
LINE = 3.1
"""Height of a line of labels with ascenders and descenders, mm."""
NOTE_LINE = 2.6
MARGIN = 1.5
FOOT_GAP = 1.2
"""Between the lowest panel and the notes, mm."""
SAMPLE, SPACE = 6.0, 1.5
"""Width of the line of a key's entry, and the space beside it, mm."""
PATCH = 1.9
"""Height of the patch of a key's entry, mm."""
DPI = 300
LOG_ABOVE = 5
"""Ratio of the largest to the smallest x from which an axis is logarithmic."""

FORMATS = ("png", "svg", "pdf")
METADATA: dict[str, dict[str, None]] = {
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}
"""Omits the time of writing, so that equal records give equal bytes."""


def check(formats: Iterable[str], width_mm: float) -> None:
    """Refuse what no figure can be made with.

    Raises:
        UserError: a format is unknown, or the width is not that of a page.
    """
    for chosen in formats:
        if chosen not in FORMATS:
            raise UserError(unknown("figure format", chosen, FORMATS))
    if not NARROWEST <= width_mm <= WIDEST:
        raise UserError(
            f"a figure cannot be {width_mm:g} mm wide; use {NARROWEST:g} to {WIDEST:g} "
            f"({COLUMN:g} and {PAGE:g} are one and two columns of a paper)"
        )


def save(figure: Figure, stem: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``<stem>.<format>`` for each format; equal records give equal bytes."""
    paths = []
    for chosen in formats:
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=chosen, dpi=DPI, metadata=METADATA[chosen])
        paths.append(stem.with_name(f"{stem.name}.{chosen}"))
        write_atomic(paths[-1], buffer.getvalue())
    return paths


@dataclass(frozen=True)
class Sheet:
    """A figure of a fixed size, on which things are placed in millimetres from the top left."""

    figure: Figure
    width: float
    height: float

    @classmethod
    def of(cls, width: float, height: float) -> Sheet:
        """Return an empty sheet, to be used within :func:`kdprof.reports.figures.looks.styled`."""
        figure = Figure(figsize=(width / INCH, height / INCH), dpi=DPI)
        FigureCanvasAgg(figure)
        return cls(figure, width, height)

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return new axes."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        ha: str = "left",
        va: str = "center_baseline",
        colour: str = "black",
        points: float = TEXT_POINTS,
    ) -> None:
        """Write one line."""
        where = x / self.width, 1 - y / self.height
        self.figure.text(*where, text, ha=ha, va=va, color=colour, fontsize=points)

    def line(self, xs: Sequence[float], ys: Sequence[float], **how: Any) -> None:
        """Draw a line, with markers if ``how`` says so."""
        where = [x / self.width for x in xs], [1 - y / self.height for y in ys]
        self.figure.add_artist(Line2D(*where, transform=self.figure.transFigure, **how))

    def patch(self, x: float, y: float, colour: str, hatch: str = "") -> None:
        """Draw the patch of a key's entry; ``y`` is its middle."""
        corner, size = (x, y + PATCH / 2), (1.6 * PATCH / self.width, PATCH / self.height)
        at = corner[0] / self.width, 1 - corner[1] / self.height
        how: dict[str, Any] = {"transform": self.figure.transFigure, "linewidth": 0}
        self.figure.add_artist(Rectangle(at, *size, facecolor=colour, **how))
        if hatch:
            how = {**how, "linewidth": 0.4}
            self.figure.add_artist(Rectangle(at, *size, fill=False, hatch=hatch, **how))

    def marker(self, x: float, y: float, look: Look) -> None:
        """Draw the marker of a method."""
        self.line([x], [y], color=look.colour, marker=look.marker, linestyle="")

    def sample(self, x: float, y: float, look: Look) -> None:
        """Draw the line and the marker of a key's entry."""
        self.line([x, x + SAMPLE], [y, y], color=look.colour, linestyle=look.dash)
        self.marker(x + SAMPLE / 2, y, look)

    def notes(self, lines: Sequence[str]) -> None:
        """Write wrapped notes at the bottom."""
        for number, line in enumerate(lines):
            y = self.height - MARGIN / 2 - NOTE_LINE * (len(lines) - number - 0.5)
            self.text(MARGIN, y, line, colour=INK, points=NOTE_POINTS)


@cache
def _measuring() -> RendererAgg:
    return FigureCanvasAgg(Figure(figsize=(0.1, 0.1), dpi=DPI)).get_renderer()


@lru_cache(maxsize=10_000)
def text_width(text: str, points: float = TEXT_POINTS) -> float:
    """Return the width of a line of text, mm."""
    font = FontProperties(family="DejaVu Sans", size=points)
    width, _, _ = _measuring().get_text_width_height_descent(text, font, False)
    return float(width) * INCH / DPI


def wrapped(sentences: Iterable[str], width: float, points: float = NOTE_POINTS) -> list[str]:
    """Return the sentences as lines that fit a sheet of this width, mm. A word that is longer than
    a line is broken."""
    room = width - 2 * MARGIN
    lines = [""]
    for word in " ".join(sentences).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, points) <= room:
            lines[-1] = longer
            continue
        *full, last = _broken(word, room, points)
        lines += [*full, last]
    return [line for line in lines if line]


def _broken(word: str, room: float, points: float) -> list[str]:
    parts = [""]
    for letter in word:
        if parts[-1] and text_width(parts[-1] + letter, points) > room:
            parts.append("")
        parts[-1] += letter
    return parts


def notes_height(lines: Sequence[str]) -> float:
    """Return the height that notes take with their margins, mm."""
    return FOOT_GAP + NOTE_LINE * len(lines) + MARGIN / 2


def fitted(name: str, room: float, points: float = TEXT_POINTS) -> str:
    """Return a name that is at most ``room`` mm wide: the middle of a longer one is left out, since
    variants differ at the end."""
    if text_width(name, points) <= room:
        return name
    for kept in range(len(name) - 1, 1, -1):
        tail = min(8, kept // 2)
        short = f"{name[: kept - tail]}…{name[len(name) - tail :]}"
        if text_width(short, points) <= room:
            return short
    return "…"


def distinct(names: Sequence[str], room: float, points: float = TEXT_POINTS) -> dict[str, str]:
    """Return each name as it fits; numbers tell those apart that would look the same."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short, number = fitted(name, room, points), 1
        while short in found.values():
            number += 1
            short = fitted(name, room - text_width(f" ({number})", points), points)
            short = f"{short} ({number})"
        found[name] = short
    return found


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return ascending positions near the ascending ``wanted`` ones, at least ``gap`` apart.

    Pushing everything up and pushing everything down both keep the gap, and so does their mean.
    """
    size = len(wanted)
    up = [max(w, low + i * gap) for i, w in enumerate(wanted)]
    down = [min(w, high - (size - 1 - i) * gap) for i, w in enumerate(wanted)]
    for i, j in pairwise(range(size)):
        up[j] = max(up[j], up[i] + gap)
    up = [min(u, high - (size - 1 - i) * gap) for i, u in enumerate(up)]
    for j, i in pairwise(reversed(range(size))):
        down[i] = min(down[i], down[j] - gap)
    down = [max(d, low + i * gap) for i, d in enumerate(down)]
    return [(u + d) / 2 for u, d in zip(up, down, strict=True)]


def scale_x(panel: Axes, values: list[float]) -> None:
    """Set scale, limits and ticks: 1-2-5 on a log axis, which is used above a ratio of five."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_ABOVE:
        panel.set_xscale("log")
        pad = (high / low) ** 0.08
        low, high = low / pad, high * pad
        ticks: Iterable[float] = _log_ticks(low, high)
    else:
        pad = 0.1 * (high - low) or 0.2 * high or 1
        low, high = max(0.0, low - pad), high + pad
        ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    panel.set_xlim(low, high)
    fixed_ticks(panel, without_crowding(panel, within(ticks, low, high)))


def within(ticks: Iterable[float], low: float, high: float) -> list[float]:
    """Return the ticks between two limits."""
    return [float(tick) for tick in ticks if low <= tick <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1-2-5 ticks, or only powers of ten if those would be too dense."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    return [float(f"{digit}e{decade}") for decade in decades for digit in digits]


def fixed_ticks(panel: Axes, ticks: Iterable[float]) -> None:
    """Set the ticks of the x axis, without exponents and without minor ones."""
    panel.xaxis.set_major_locator(FixedLocator(list(ticks)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def without_crowding(panel: Axes, ticks: Sequence[float]) -> list[float]:
    """Return the ticks whose labels have room on the x axis: all, or every second, third, ..., by
    the scale and the limits that it has."""
    for step in range(1, len(ticks)):
        if have_room(panel, ticks[::step]):
            return list(ticks[::step])
    return list(ticks[:1])


def have_room(panel: Axes, ticks: Sequence[float]) -> bool:
    """Return whether the labels of these ticks of the x axis keep their distance."""
    places = [place(panel, tick) for tick in ticks]
    halves = [text_width(f"{tick:.10g}") / 2 for tick in ticks]
    spans = pairwise(zip(places, halves, strict=True))
    return all(b - a > half + other + SPACE for (a, half), (b, other) in spans)


def label_x(panel: Axes, text: str) -> None:
    """Write below the x axis what it shows: in its middle, or further left or right where the text
    would leave the sheet."""
    panel.set_xlabel(text, labelpad=2)
    figure, half = panel.get_figure(), text_width(text) / 2 + MARGIN / 2
    assert figure is not None
    whole, box = figure.bbox.width / figure.dpi * INCH, panel.get_position()
    middle = (box.x0 + box.x1) / 2 * whole
    inside = min(max(middle, half), whole - half)
    panel.xaxis.label.set_x((inside / whole - box.x0) / box.width)


def width_of(panel: Axes) -> float:
    """Return the width of a panel, mm."""
    figure = panel.get_figure()
    assert figure is not None
    return float(panel.get_window_extent().width / figure.dpi * INCH)


def place(panel: Axes, x: float) -> float:
    """Return how far an x is from the left end of its axis, mm."""
    at = (panel.transData + panel.transAxes.inverted()).transform((x, panel.get_ylim()[0]))
    return float(at[0]) * width_of(panel)


@dataclass(frozen=True)
class Columns:
    """The entries of a key in columns of equal width, for below a panel."""

    names: list[str]
    columns: int
    width: float

    @classmethod
    def fit(cls, names: Sequence[str], width: float, sample: float = SAMPLE) -> Columns:
        """Return as many columns as fit ``width`` mm."""
        widest = max((text_width(name) for name in names), default=0.0) + sample + 2.5 * SPACE
        columns = max(1, min(len(names), int(width / widest)))
        rows = -(-len(names) // columns)
        columns = -(-len(names) // rows) if rows else 1  # no column that is all but empty
        return cls(list(names), columns, width / columns)

    @property
    def rows(self) -> int:
        """Lines of the key."""
        return -(-len(self.names) // self.columns)

    def places(self, left: float, top: float) -> list[tuple[float, float]]:
        """Return the left end and the middle of each entry, mm, column by column."""
        return [
            (left + i // self.rows * self.width, top + (i % self.rows + 0.5) * LINE)
            for i in range(len(self.names))
        ]
