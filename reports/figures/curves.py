"""Figure: accuracy against compute, and the same runs against iterations.

One line per method through its budgets; both panels share the y axis and the looks, so that a
change of rank between iterations and compute is visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from kdprof.budget import parse_budget
from kdprof.records import Run
from kdprof.stats.intervals import mean_interval

from ..axes import Axis, axis
from ..results import (
    Results,
    classes_notes,
    count,
    device_text,
    drifted,
    final_miou,
    flop_notes,
    shortened,
    study_text,
)
from ..text import UNRELIABLE, flagged
from ..verdict import Gain
from .gain_note import write_gains
from .looks import CONTROL_LOOKS, RULE, TEACHER, Look, styled
from .sheet import (
    LINE,
    MARGIN,
    PAGE,
    SAMPLE,
    SPACE,
    TWO_PANELS,
    Columns,
    Sheet,
    apart,
    distinct,
    label_x,
    notes_height,
    place,
    scale_x,
    text_width,
    width_of,
    within,
    wrapped,
)

# Layout, mm.
LEFT, RIGHT, TOP = 11.0, 3.0, 5.0
HEIGHT, STACKED_HEIGHT = 54.0, 40.0
X_AXIS, PANEL_GAP = 9.5, 3.0
LONGEST_NAME, LONGEST_BELOW = 34.0, 29.0
"""Of the key beside the panels and below them; two columns fit one column of a paper."""
STEP = 0.7
"""Sideways distance between the points of methods that would hide one another."""

MANY = 8
"""Above this number of methods, single runs are not drawn and markers are smaller."""
ANNOTATED = 4
"""Gains are written into the figure up to this number of methods."""
SMALLEST_SPAN = 4
"""The y axis spans at least these percentage points, so that noise does not fill it."""
TITLES = {
    "seconds": "accuracy by wall-clock",
    "gpu-hours": "accuracy by device time",
    "flop": "accuracy by FLOP",
    "joules": "accuracy by energy",
    "samples": "accuracy by images seen",
    "iterations": "accuracy by iterations",
}


@dataclass(frozen=True)
class Point:
    """The runs of one method and budget: means over seeds; mIoU in %."""

    budget: str
    x: float
    mean: float
    low: float
    high: float
    runs: list[tuple[float, float]]
    """(x, mIoU in %) of each seed."""
    drifted: bool


Lines = dict[str, list[Point]]


def draw(
    results: Results,
    looks: Mapping[str, Look],
    gains: Sequence[Gain] = (),
    *,
    x: str = "seconds",
    width_mm: float = PAGE,
) -> Figure:
    """Return the figure; it grows in height with the key and the notes.

    Args:
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.
        gains: those on the axis ``x`` over one control are written into the figure if there are few
            methods and a corner is free.
        x: the first panel's axis, of :data:`kdprof.reports.axes.AXES`; the second shows iterations.
        width_mm: narrow figures have one panel above the other and the key below.

    Raises:
        UserError: ``x`` is unknown, or no run has that quantity.
    """
    axes = x_axes(results, x)
    with styled():
        footer = wrapped(notes(results, axes[0]), width_mm)
        stacked = width_mm < TWO_PANELS
        sheet, panels = (_stacked if stacked else _beside)(results, len(axes), footer, width_mm)
        drawn = []
        for letter, panel, each in zip("ab", panels, axes, strict=False):
            drawn.append(_panel(panel, each, results, looks))
            same = "the same runs by iterations" if letter == "b" else TITLES[each.name]
            title = f"({letter}) {same}" if len(axes) > 1 else same
            panel.set_title(title, loc="left", pad=4, fontsize=7)
        _share_y(panels, results, series(results, axes[0]), stacked)
        key = _key_below if stacked else _key_beside
        key(sheet, panels, results, looks, drawn[0])
        if len(results.methods()) <= ANNOTATED:
            own = [gain for gain in gains if gain.axis == x]
            write_gains(panels[0], own, _taken(results, drawn[0]))
        sheet.notes(footer)
    return sheet.figure


def x_axes(results: Results, x: str) -> list[Axis]:
    """Return the x axes of the panels: the requested one and, if that is another one, iterations.

    Raises:
        UserError: ``x`` is unknown, or no finished run has that quantity.
    """
    first = axis(results, x)
    return [first] if x == "iterations" else [first, axis(results, "iterations")]


def series(results: Results, each: Axis) -> Lines:
    """Return each method's points in the order of x; runs that lack the quantity are left out."""
    found = {}
    for method in results.methods():
        groups = (results.group(method, budget) for budget in results.budgets())
        points = [point for group in groups if (point := _point(group, each))]
        found[method] = sorted(points, key=lambda point: point.x)
    return found


def _point(group: list[Run], each: Axis) -> Point | None:
    known = [(x, run) for run in group if (x := each.of(run)) is not None]
    if not known:
        return None
    runs = [(x, 100 * final_miou(run)) for x, run in known]
    middle = float(np.mean([x for x, _ in runs]))
    off_plan = any(drifted(run) for _, run in known)
    return Point(group[0].budget, middle, *spread([miou for _, miou in runs]), runs, off_plan)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and ends of the bar: 95 % t-interval, or minimum and maximum below 3 values.

    Half the t-interval of two values is over six times their distance, which shows nothing.
    """
    if len(values) < 3:
        return float(np.mean(values)), min(values), max(values)
    mean, low, high = mean_interval(values)
    assert low is not None, "two values or more have an interval"
    assert high is not None
    return mean, low, high


# Layout


def _beside(
    results: Results, panels: int, footer: list[str], width: float
) -> tuple[Sheet, list[Axes]]:
    """Return a sheet with its panels side by side; the key will be right of the first."""
    names = _key_names(results, LONGEST_NAME)
    key = SAMPLE + 2 * SPACE + max(map(text_width, names.values()))
    each = (width - LEFT - RIGHT - key - (panels - 1) * PANEL_GAP) / panels
    tall = max(HEIGHT, len(names) * LINE)
    sheet = Sheet.of(width, TOP + tall + X_AXIS + notes_height(footer))
    lefts = [LEFT, LEFT + each + key + PANEL_GAP][:panels]
    return sheet, [sheet.panel(left, TOP, each, tall) for left in lefts]


def _stacked(
    results: Results, panels: int, footer: list[str], width: float
) -> tuple[Sheet, list[Axes]]:
    """Return a sheet with one panel above the other; the key will be below them."""
    each = TOP + STACKED_HEIGHT + X_AXIS
    key = _columns(results, width).rows * LINE
    sheet = Sheet.of(width, panels * each + key + notes_height(footer))
    tops = [TOP + number * each for number in range(panels)]
    wide = width - LEFT - RIGHT
    return sheet, [sheet.panel(LEFT, top, wide, STACKED_HEIGHT) for top in tops]


def _columns(results: Results, width: float) -> Columns:
    return Columns.fit(list(_key_names(results, LONGEST_BELOW).values()), width - 2 * MARGIN)


# One panel


def _panel(panel: Axes, each: Axis, results: Results, looks: Mapping[str, Look]) -> Lines:
    """Draw every method's line, bars and single runs, and the x axis; return the points as they are
    drawn, shifted sideways."""
    found = series(results, each)
    scale_x(panel, [at for points in found.values() for p in points for at, _ in p.runs])
    label_x(panel, each.label)
    panel.grid(axis="y", color=RULE, linewidth=0.5)
    panel.set_axisbelow(True)
    shown = _shifted(panel, found)
    for method, points in shown.items():
        _line(panel, points, looks[method], method in CONTROL_LOOKS, len(shown) > MANY)
    if results.teacher and results.teacher.miou is not None:
        dash: Any = TEACHER.dash
        panel.axhline(
            100 * results.teacher.miou, color=TEACHER.colour, linewidth=0.8, linestyle=dash
        )
    return shown


def _line(panel: Axes, points: list[Point], look: Look, control: bool, many: bool) -> None:
    xs, means = [p.x for p in points], [p.mean for p in points]
    common: dict[str, Any] = {"color": look.colour}
    panel.plot(xs, means, linestyle=look.dash, zorder=3 if control else 4, **common)
    lows, highs = [p.low for p in points], [p.high for p in points]
    panel.vlines(xs, lows, highs, linewidth=0.8, alpha=0.45, zorder=2, **common)
    marks: dict[str, Any] = {"ms": 2.8 if many else 3.8, "mew": 0.7, "ls": "", "zorder": 5}
    for face, hollow in (("white", True), (look.colour, False)):
        if some := [p for p in points if p.drifted == hollow]:
            at = [p.x for p in some], [p.mean for p in some]
            panel.plot(*at, marker=look.marker, mfc=face, **marks, **common)
    for point in points:
        if len(point.runs) > 1 and not many:
            panel.plot(*zip(*point.runs, strict=True), "o", ms=1.7, alpha=0.7, mew=0, **common)


def _shifted(panel: Axes, found: Lines) -> Lines:
    """Return the points of each budget moved apart, as little as shows all of them."""
    width, to_data = width_of(panel), panel.transAxes + panel.transData.inverted()

    def moved(x: float, shift: float) -> float:
        return float(to_data.transform(((place(panel, x) + shift) / width, 0.5))[0])

    places = {(m, p.budget): place(panel, p.x) for m, points in found.items() for p in points}
    shifts = _shifts(places, width)
    return {
        method: [
            replace(
                point,
                x=moved(point.x, shifts[method, point.budget]),
                runs=[(moved(x, shifts[method, point.budget]), y) for x, y in point.runs],
            )
            for point in points
        ]
        for method, points in found.items()
    }


def _shifts(places: dict[tuple[str, str], float], width: float) -> dict[tuple[str, str], float]:
    """Return how far each (method, budget) moves to the right, mm, from its place on the axis."""
    budgets = {budget for _, budget in places}
    groups = {b: sorted((at, m) for (m, own), at in places.items() if own == b) for b in budgets}
    middles = sorted(float(np.mean([at for at, _ in group])) for group in groups.values())
    most = max(1, max(map(len, groups.values())) - 1)
    between = min(np.diff(middles), default=width)
    edge = min(min(places.values()), width - max(places.values()))
    step = min(STEP, 0.45 * float(between) / most, 1.7 * edge / most)
    shifts: dict[tuple[str, str], float] = {}
    for budget, group in groups.items():
        # Methods at almost the same place keep one order under all budgets.
        group.sort(key=lambda one: (round(one[0] / (2 * STEP)), one[1]))
        moved = apart([at for at, _ in group], step, -np.inf, np.inf)
        shifts |= {(m, budget): new - at for (at, m), new in zip(group, moved, strict=True)}
    return shifts


def _share_y(panels: list[Axes], results: Results, lines: Lines, stacked: bool) -> None:
    values = [100 * final_miou(run) for run in results.finished]
    values += [end for points in lines.values() for p in points for end in (p.low, p.high)]
    if results.teacher and results.teacher.miou is not None:
        values.append(100 * results.teacher.miou)
    span = max(values) - min(values)
    pad = max(0.04 * span, (SMALLEST_SPAN - span) / 2)
    low, high = min(values) - pad, max(values) + pad
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True).tick_values(low, high)
    for panel in panels:
        panel.set_ylim(low, high)
        panel.yaxis.set_major_locator(FixedLocator(within(ticks, low, high)))
    for panel in panels if stacked else panels[:1]:
        panel.set_ylabel("val mIoU of the last iterate (%)", labelpad=3)
    if not stacked:
        for panel in panels[1:]:
            panel.tick_params(labelleft=False)


# Key and gains


def _key_names(results: Results, room: float) -> dict[str, str]:
    """Return the key's text of each method, and that of the teacher under the empty name."""
    unreliable = {cost.method for cost in results.unreliable()}
    short = distinct(results.methods(), room)
    names = {method: flagged(name, method in unreliable) for method, name in short.items()}
    if results.teacher and results.teacher.miou is not None:
        names[""] = f"teacher {100 * results.teacher.miou:.1f}"
    return names


def _key_below(
    sheet: Sheet,
    panels: list[Axes],
    results: Results,
    looks: Mapping[str, Look],
    shown: Lines,
) -> None:
    """Write the names below the panels, the highest line first, column by column."""
    names, columns = _key_names(results, LONGEST_BELOW), _columns(results, sheet.width)
    ends = _ends(results, panels[0], shown)
    order = sorted(names, key=lambda name: -ends[name][1])
    top = len(panels) * (TOP + STACKED_HEIGHT + X_AXIS)
    for name, (x, y) in zip(order, columns.places(MARGIN, top), strict=True):
        sheet.sample(x, y, looks[name] if name else TEACHER)
        sheet.text(x + SAMPLE + SPACE, y, names[name])


def _key_beside(
    sheet: Sheet,
    panels: list[Axes],
    results: Results,
    looks: Mapping[str, Look],
    shown: Lines,
) -> None:
    """Write the names right of the panel, each at the height of its line's end if there is room."""
    names, ends = _key_names(results, LONGEST_NAME), _ends(results, panels[0], shown)
    tall = max(HEIGHT, len(names) * LINE)
    right = LEFT + width_of(panels[0])
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = apart([tall * ends[name][1] for name in order], LINE, LINE / 2, tall - LINE / 2)
    for name, height in zip(order, heights, strict=True):
        look, y = looks[name] if name else TEACHER, TOP + tall - height
        sheet.sample(right + SPACE, y, look)
        sheet.text(right + 1.5 * SPACE + SAMPLE, y, names[name])
        x, end = ends[name]
        if x > 0.8:  # a leader from further left would cross other lines
            xs = [LEFT + x * (right - LEFT), right + SPACE - 0.3]
            ys = [TOP + tall * (1 - end), y]
            sheet.line(xs, ys, color=look.colour, linewidth=0.4, alpha=0.6)


def _ends(results: Results, panel: Axes, shown: Lines) -> dict[str, tuple[float, float]]:
    """Return where each line ends, and that of the teacher under the empty name, as fractions of
    the panel; (0, 0.5) for a line without points."""
    ends = {
        method: _to_axes(panel, points[-1].x, points[-1].mean) if points else (0.0, 0.5)
        for method, points in shown.items()
    }
    if results.teacher and results.teacher.miou is not None:
        ends[""] = (0.0, _to_axes(panel, panel.get_xlim()[0], 100 * results.teacher.miou)[1])
    return ends


def _taken(results: Results, shown: Lines) -> list[Sequence[tuple[float, float]]]:
    """Return the lines and bars that are drawn, as (x, mIoU in %)."""
    taken: list[Sequence[tuple[float, float]]] = []
    for points in shown.values():
        taken.append([(p.x, p.mean) for p in points])
        taken += [[(p.x, p.low), (p.x, p.high)] for p in points]
    if results.teacher and results.teacher.miou is not None:
        ends = [p.x for points in shown.values() for p in points]
        taken.append([(x, 100 * results.teacher.miou) for x in (min(ends), max(ends))])
    return taken


def _to_axes(panel: Axes, x: float, y: float) -> tuple[float, float]:
    at = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))
    return float(at[0]), float(at[1])


# Notes


def notes(results: Results, each: Axis) -> list[str]:
    """Return the footer: study and device, the meaning of the bars, and every caveat."""
    sizes = {
        len(group)
        for method in results.methods()
        for budget in results.budgets()
        if (group := results.group(method, budget))
    }
    many = len(results.methods()) > MANY
    found = [
        f"{study_text(results.study)}. {device_text(results.devices())}. {_seeds_text(sizes)}"
        + _bars_text(sizes, many)
    ]
    if len(results.devices()) > 1:
        found.append("Runs are from different devices: their wall-clock times cannot be compared.")
    found += classes_notes(results.finished)
    found += flop_notes(results.finished)
    if off := [run for run in results.finished if drifted(run)]:
        number = f"{len(off)} of {count(len(results.finished), 'run')}"
        found.append(f"Hollow: more than 2 % off the planned wall-clock ({number}; see table.csv).")
    if bad := results.unreliable():
        methods = shortened(sorted({cost.method for cost in bad}))
        found.append(
            f"{UNRELIABLE}\u00a0planned with an unreliable cost: {methods}; costs.md says why."
        )
    if plain := sorted(
        {run.budget for run in results.finished if not parse_budget(run.budget).is_compute}
    ):
        found.append(f"Budgets of equal work, compute not matched: {shortened(plain)}.")
    if without := [run for run in results.finished if each.of(run) is None]:
        labels = shortened([run.label() for run in without])
        found.append(f"Not in (a), quantity not recorded: {labels}.")
    if results.left_out:
        found.append(f"Left out, not finished: {count(len(results.left_out), 'run')}.")
    if results.teacher is None or results.teacher.miou is None:
        found.append("No teacher run in this folder, so no line for it.")
    return found


def _seeds_text(sizes: set[int]) -> str:
    if len(sizes) == 1:
        return f"{count(min(sizes), 'seed')} per point"
    return f"{min(sizes)} to {max(sizes)} seeds per point"


def _bars_text(sizes: set[int], many: bool) -> str:
    parts = []
    if max(sizes) >= 3:
        parts.append("95 % t-interval over seeds")
    if 2 in sizes:
        parts.append("min to max of two seeds")
    if not parts:
        return ", so no bars."
    dots = "" if many else "; dots: single runs"
    return (
        f"; bars: {', '.join(parts)}{dots}. Markers are shifted sideways so that all are visible."
    )
