"""Charts as SVG from numbers.

Places along x are percentages of the width and places along y are pixels, so that a chart fits
every width of the page while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..figures.curves import SMALLEST_SPAN
from ..figures.sheet import LOG_ABOVE
from ..text import flagged
from .looks import Look, sample
from .markup import Markup, exact, join, tag

HEIGHT = 380
"""Of the chart of curves, in pixels."""
DODGE = 10.0
"""Pixels between the first and the last method, which would hide one another at equal x."""
ROW = 22
"""Height of a row of bars, in pixels."""
LOG_DIGITS = (
    (1, 1.1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,),
)  # fmt: skip
"""Leading digits of a logarithmic axis' ticks, from dense to sparse."""
RANK = 24
"""Height of a rank in the slope chart, in pixels."""
NAME_END = 6
"""Characters of a long name that are always shown."""


@dataclass(frozen=True)
class Scale:
    """Where a value lies between the ends of an axis."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value: 0 = low end, 1 = high end; values beyond lie at the end."""
        low, high, value = (self._bent(one) for one in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def percent(self, value: float) -> str:
        """Return the place of a value along x."""
        return f"{100 * self.at(value):.2f}%"

    def _bent(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Return at most ``most`` round numbers within the ends."""
        return _log_ticks(self.low, self.high, most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(s for s in (1, 2, 5, 10) if s * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [float(f"{(first + i) * step:.10g}") for i in range(count)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return ticks as dense as fits, so that they do not touch."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in LOG_DIGITS:
        made = (float(f"{digit}e{decade}") for decade in decades for digit in digits)
        found = [tick for tick in made if low <= tick <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def compute_scale(values: Sequence[float]) -> Scale:
    """Return the x scale of amounts of compute, logarithmic over a wide range."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_ABOVE:
        pad = (high / low) ** 0.06
        return Scale(low / pad, high * pad, log=True)
    # One budget: equal amounts of compute that differ by rounding must not look different.
    pad = max(0.08 * (high - low), 0.1 * high) or 1
    return Scale(max(0.0, low - pad), high + pad)


def accuracy_scale(values: Sequence[float]) -> Scale:
    """Return the y scale of mIoU in percentage points."""
    span = max(values) - min(values)
    pad = max(0.04 * span, (SMALLEST_SPAN - span) / 2)
    return Scale(min(values) - pad, max(values) + pad)


def gain_scale(values: Sequence[float]) -> Scale:
    """Return the scale of gains: logarithmic, with 1 inside, and at most 32-fold to either side."""
    kept = [min(max(value, 1 / 32), 32) for value in values]
    low, high = min([*kept, 0.8]), max([*kept, 1.25])
    pad = (high / low) ** 0.05
    return Scale(low / pad, high * pad, log=True)


# Curves


@dataclass(frozen=True)
class Point:
    """The mean of the seeds of one method and budget."""

    x: float
    y: float
    """mIoU, percentage points."""
    low: float | None
    """End of the bar; None without a bar."""
    high: float | None
    runs: Sequence[tuple[float, float]]
    """x and y of each seed."""
    hollow: bool
    """True if it drifted."""
    text: str
    """What hovering shows; it contains the values above."""
    values: tuple[float | None, ...]
    """The numbers in ``text``."""


def curves(
    lines: dict[str, list[Point]],
    looks: dict[str, Look],
    teacher: float | None,
    label: str,
) -> Markup:
    """Return the chart of accuracy against one axis of compute.

    Args:
        label: of the x axis.
        teacher: its mIoU in percentage points.
    """
    points = [point for line in lines.values() for point in line]
    x = compute_scale([at for point in points for at, _ in point.runs])
    reached = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    reached += [miou for point in points for _, miou in point.runs]
    y = accuracy_scale([*reached, *([] if teacher is None else [teacher])])
    series = [
        _series(line, looks[method], x, y, _dodge(place, len(lines)))
        for place, (method, line) in enumerate(lines.items())
    ]
    drawn = join(_grid(x, y), *([] if teacher is None else [_teacher(teacher, y)]), *series)
    what = f"mIoU against {label}, one line per method; the table below has the numbers"
    chart = tag("svg", drawn, class_="plot", height=str(HEIGHT), role="group", aria_label=what)
    unit = tag("p", "mIoU of the last iterate (%)", class_="unit")
    return join(unit, chart, tag("p", label, class_="unit below"))


def _dodge(place: int, size: int) -> float:
    step = min(2.0, DODGE / max(1, size - 1))
    return (place - (size - 1) / 2) * step


def _pixels(scale: Scale, value: float) -> float:
    return HEIGHT * (1 - scale.at(value))


def _grid(x: Scale, y: Scale) -> Markup:
    rows = [(f"{_pixels(y, tick):.1f}", f"{tick:g}") for tick in y.ticks(8)]
    columns = [(x.percent(tick), f"{tick:.10g}") for tick in x.ticks()]
    bottom = str(HEIGHT)
    return join(
        *(tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid") for at, _ in rows),
        *(tag("text", t, x="-8", y=at, dy="4", text_anchor="end", class_="tick") for at, t in rows),
        tag("line", x1="0", x2="100%", y1=bottom, y2=bottom, class_="axis"),
        *(
            tag("line", x1=at, x2=at, y1=bottom, y2=str(HEIGHT + 4), class_="axis")
            for at, _ in columns
        ),
        *(
            tag("text", t, x=at, y=str(HEIGHT + 19), text_anchor="middle", class_="tick")
            for at, t in columns
        ),
    )


def _teacher(miou: float, y: Scale) -> Markup:
    at = _pixels(y, miou)
    line = tag("line", x1="0", x2="100%", y1=at, y2=at, class_="teacher")
    below = at < 20
    text = tag("text", f"teacher {miou:.2f}", x="100%", y=at + (14 if below else -5),
               text_anchor="end", class_="tick", data_value=exact(miou))  # fmt: skip
    return join(line, text)


def _series(line: list[Point], look: Look, x: Scale, y: Scale, dodge: float) -> Markup:
    places = [(x.percent(point.x), f"{_pixels(y, point.y):.1f}") for point in line]
    pieces = [
        tag("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], class_="curve", stroke_dasharray=look.dash)
        for a, b in pairwise(places)
    ]
    seeds = [
        tag("circle", cx=x.percent(at), cy=f"{_pixels(y, miou):.1f}", r="1.8", class_="seed")
        for point in line
        if len(point.runs) > 1
        for at, miou in point.runs
    ]
    marks = [_mark(point, look, place, y) for point, place in zip(line, places, strict=True)]
    moved = f"translate({dodge:.3g} 0)"
    return tag("g", *pieces, *seeds, *marks, class_=f"series {look.class_}", transform=moved)


def _mark(point: Point, look: Look, place: tuple[str, str], y: Scale) -> Markup:
    """Return bar and marker of a point; a wide circle around it catches fingers."""
    parts = [tag("circle", r="11", class_="target")]
    if point.low is not None and point.high is not None:
        middle = _pixels(y, point.y)
        ends = (f"{_pixels(y, end) - middle:.1f}" for end in (point.low, point.high))
        parts.append(tag("line", y1=next(ends), y2=next(ends), class_="bar"))
    parts.append(tag("path", d=look.shape, class_="marker hollow" if point.hollow else "marker"))
    inside = tag("svg", *parts, x=place[0], y=place[1], overflow="visible")
    return tag("g", tag("title", point.text), inside, class_="mark", role="img", tabindex="-1",
               data_also=exact(*point.values))  # fmt: skip


def key(lines: dict[str, str], looks: dict[str, Look]) -> Markup:
    """Return the key of the curves: a button per method, which lights its line up.

    Args:
        lines: the text of each method.
    """
    items = [
        tag(
            "li",
            tag(
                "button",
                sample(looks[method]),
                tag("span", text),
                type="button",
                aria_pressed="false",
                data_method=looks[method].class_,
            ),
        )
        for method, text in lines.items()
    ]
    return tag("ul", *items, class_="key")


# Rows of bars


@dataclass(frozen=True)
class Whisker:
    """A row of the forest plot: a gain with its interval."""

    name: str
    label: str
    """The name as it is shown, with the mark of an unreliable Cost."""
    value: float | None
    """None if it is not known."""
    low: float | None
    """None if that end is open."""
    high: float | None
    bounded: str
    """``<`` or ``>`` if the value is a bound."""
    interval: bool
    """True if there is an interval, which may be open."""
    text: str
    values: tuple[float | None, ...]
    """The numbers in ``text``."""
    reason: str = ""


def forest(rows: Sequence[Whisker], looks: dict[str, Look], scale: Scale) -> Markup:
    """Return a forest plot, with 1 marked; open ends of intervals are arrows."""
    ticks = scale.ticks(5)
    labels = [
        tag("text", f"{tick:g}", x=scale.percent(tick), y="13", text_anchor="middle", class_="tick")
        for tick in ticks
    ]
    axis = tag("li", tag("span"), tag("svg", *labels, class_="track", height="18"), tag("span"),
               class_="row ticks", aria_hidden="true")  # fmt: skip
    made = [_whisker(row, looks[row.name], scale, ticks) for row in rows]
    return tag("ul", *made, axis, class_="rows")


def _whisker(row: Whisker, look: Look, scale: Scale, ticks: Sequence[float]) -> Markup:
    middle = str(ROW // 2)
    parts = [
        tag("line", x1=scale.percent(t), x2=scale.percent(t), y1="0", y2="100%", class_="grid")
        for t in ticks
    ]
    one = scale.percent(1)
    parts.append(tag("line", x1=one, x2=one, y1="0", y2="100%", class_="one"))
    if row.value is not None:
        parts += _interval(row, scale, middle)
        marker = tag("path", d=look.shape, class_="marker hollow" if row.bounded else "marker")
        at = scale.percent(row.value)
        parts.append(tag("svg", marker, x=at, y=middle, overflow="visible"))
    track = tag("svg", *parts, class_="track", height=str(ROW), aria_hidden="true")
    text = tag("span", row.text, class_="value", data_also=exact(*row.values))
    return tag("li", tag("span", row.label, class_="name"), track, text,
               class_=f"row {look.class_}", title=row.reason or None)  # fmt: skip


def _interval(row: Whisker, scale: Scale, middle: str) -> list[Markup]:
    if not row.interval:
        return []
    ends = (scale.low if row.low is None else row.low, scale.high if row.high is None else row.high)
    found = [tag("line", x1=scale.percent(ends[0]), x2=scale.percent(ends[1]), y1=middle,
                 y2=middle, class_="whisker")]  # fmt: skip
    for known, at, shape in (
        (row.low, "0", "M0,0l7,-4v8z"),
        (row.high, "100%", "M0,0l-7,-4v8z"),
    ):
        if known is None or not scale.low < known < scale.high:
            arrow = tag("path", d=shape, class_="arrow")
            found.append(tag("svg", arrow, x=at, y=middle, overflow="visible"))
    return found


@dataclass(frozen=True)
class Stack:
    """A row of stacked bars: the phases of a step."""

    name: str
    parts: dict[str, float]
    """Seconds by phase."""
    unreliable: bool
    text: str
    values: tuple[float | None, ...]
    """The numbers in ``text``."""


def stacks(rows: Sequence[Stack], classes: dict[str, str], words: dict[str, str]) -> Markup:
    """Return stacked bars with a key; unreliable ones are hatched.

    Args:
        classes: of each phase, in the order of the bars.
        words: how a phase is called.
    """
    longest = max((sum(row.parts.values()) for row in rows), default=0.0) or 1.0
    made = [_stack(row, classes, words, longest) for row in rows]
    items = [
        tag("li", tag("span", class_=f"swatch {class_}"), words[phase])
        for phase, class_ in classes.items()
    ]
    return join(tag("ul", *items, class_="swatches"), tag("ul", *made, class_="rows"))


def _stack(row: Stack, classes: dict[str, str], words: dict[str, str], longest: float) -> Markup:
    total, start, parts = sum(row.parts.values()), 0.0, []
    for phase, seconds in row.parts.items():
        text = f"{row.name}\n{words[phase]}: {1e3 * seconds:.3g} ms, {100 * seconds / total:.0f} %"
        place = {"x": _share(start / longest), "width": _share(seconds / longest)}
        parts.append(
            tag(
                "rect",
                tag("title", text),
                y="2",
                height=str(ROW - 4),
                role="img",
                tabindex="-1",
                class_=f"mark {classes[phase]}",
                data_value=exact(seconds),
                **place,
            )
        )
        start += seconds
    if row.unreliable:
        hatch = {"y": "2", "height": str(ROW - 4), "width": _share(total / longest)}
        parts.append(tag("rect", x="0", fill="url(#hatch)", class_="hatch", **hatch))
    track = tag("svg", *parts, class_="track", height=str(ROW), role="group",
                aria_label=f"phases of {row.name}")  # fmt: skip
    text = tag("span", row.text, class_="value", data_also=exact(*row.values))
    name = tag("span", flagged(row.name, row.unreliable), class_="name")
    return tag("li", name, track, text, class_="row")


def _share(fraction: float) -> str:
    return f"{100 * fraction:.3f}%"


HATCH = tag(
    "svg",
    tag(
        "defs",
        tag(
            "pattern",
            tag("path", d="M-2,2l4,-4M0,8l8,-8M6,10l4,-4", class_="hatching"),
            id="hatch",
            width="8",
            height="8",
            patternUnits="userSpaceOnUse",
        ),
    ),
    width="0",
    height="0",
    class_="definitions",
    aria_hidden="true",
)
"""The pattern of unreliable bars, once per page."""


# Ranks


@dataclass(frozen=True)
class Slope:
    """A method's rank at equal amounts of two quantities, from 0."""

    name: str
    left: int
    right: int
    values: tuple[float, float]
    """mIoU on each side, percentage points."""
    flips: str
    """``sure``, ``maybe`` or empty: whether it changes places with another."""


def slopes(rows: Sequence[Slope], looks: dict[str, Look], titles: tuple[str, str]) -> Markup:
    """Return a slope chart of ranks: two methods changed places where their lines cross."""
    height = str(RANK * len(rows))
    lines = [_slope(row, looks[row.name]) for row in sorted(rows, key=lambda row: row.flips != "")]
    chart = tag("svg", *lines, class_="slopes", height=height, aria_hidden="true")
    left = _ranked([(row.left, row.name, row.values[0]) for row in rows])
    right = _ranked([(row.right, row.name, row.values[1]) for row in rows])
    heads = [tag("p", title, class_="unit") for title in titles]
    return tag("div", heads[0], tag("span"), heads[1], left, chart, right, class_="ranks")


def _slope(row: Slope, look: Look) -> Markup:
    ends = {"x1": "0", "x2": "100%", "y1": _middle(row.left), "y2": _middle(row.right)}
    return tag("line", class_=f"slope {row.flips} {look.class_}", **ends)


def _middle(rank: int) -> str:
    return str(RANK * rank + RANK // 2)


def _ranked(rows: list[tuple[int, str, float]]) -> Markup:
    items = [
        tag(
            "li",
            _short_name(name),
            tag("span", f"{miou:.2f}", class_="value", data_value=exact(miou)),
        )
        for _, name, miou in sorted(rows)
    ]
    return tag("ol", *items)


def _short_name(name: str) -> Markup:
    """Return a name that is cut before its end where there is no room: names differ at the end."""
    parts = tag("span", name[:-NAME_END], class_="start"), tag("span", name[-NAME_END:])
    return tag("span", *parts, class_="name", title=name)
