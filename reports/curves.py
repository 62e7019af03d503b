"""Figure: accuracy against compute, and the same runs against iterations.

Made from stored runs only. One line per method through its budgets; both panels share the y axis
and the styles, so that a change of rank between iterations and compute is visible.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from kdprof.budget import parse_budget
from kdprof.errors import UserError, unknown
from kdprof.records import CONTROL, REFERENCE, Run
from kdprof.stats.intervals import mean_interval
from kdprof.store import Store, write_atomic

from .results import (
    Results,
    classes_notes,
    collect,
    count,
    device_text,
    drift_text,
    drifted,
    final_miou,
    is_cpu,
    shortened,
    study_text,
)
from .text import UNRELIABLE, flagged

STYLE = {
    "font.size": 7,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.0,
    "lines.markersize": 3.8,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "svg.fonttype": "path",  # text keeps its width where the font is not installed
    "svg.hashsalt": "kdprof",  # otherwise element ids differ from file to file
    "path.simplify": False,
}
METADATA = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Omits the time of writing, so that equal records give equal bytes."""

# Layout in inches; the width is that of a paper's double column.
WIDTH = 7.0
LEFT, RIGHT, TOP = 0.46, 0.14, 0.22
PANEL_HEIGHT = 2.15
X_AXIS_HEIGHT = 0.40
PANEL_GAP = 0.12
KEY_SAMPLE, KEY_SPACE = 0.24, 0.07
LINE_HEIGHT = 0.118
"""Height of a line of 7 pt text, with ascenders and descenders."""
LONGEST_NAME = 20
"""Characters of a method's name in the key."""

# Okabe & Ito's colour-blind-safe set without its yellow (too pale for a line on white); black and
# grey are kept for the controls. 6 colours x 5 dashes x 8 markers repeat after 120 methods.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("^", "D", "v", "P", "X", "<", "*", ">")
DASHES = ("-", (0, (4, 1.2)), (0, (1.2, 1)), (0, (5, 1, 1.2, 1)), (0, (5, 1, 1.2, 1, 1.2, 1)))
CONTROL_LOOKS = {REFERENCE: ("black", "o", "-"), CONTROL: ("#808080", "s", "-")}
DODGE_POINTS = 9.0
"""Widest sideways shift between the methods of one budget, which would hide one another."""

TIME_UNITS = ((1, "s", "seconds"), (60, "min", "minutes"), (3600, "h", "hours"))
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1, ""))
SMALLEST_SPAN = 4
"""The y axis spans at least these percentage points, so that noise does not fill it."""
LOG_ABOVE = 5
"""Ratio of the largest to the smallest x from which the axis is logarithmic."""


@dataclass(frozen=True)
class XAxis:
    """A quantity of a run to plot against, and its readable unit."""

    label: str
    unit: float
    """The quantity is divided by it."""
    quantity: Callable[[Run], float | None]

    def of(self, run: Run) -> float | None:
        """Return the run's quantity in this unit, or None if the record lacks it."""
        value = self.quantity(run)
        return None if value is None else value / self.unit


@dataclass(frozen=True)
class Point:
    """The runs of one method and budget: means over seeds; mIoU in %."""

    x: float
    mean: float
    low: float
    high: float
    runs: list[tuple[float, float]]
    """(x, mIoU in %) of each seed."""
    drifted: bool


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every panel."""

    colour: str
    marker: str
    dash: str | tuple
    dodge: float
    """Points to the right."""


def render(
    store: Store, x: str = "seconds", formats: Sequence[str] = ("png", "svg", "pdf")
) -> list[Path]:
    """Write ``reports/curves.<format>`` and return the files.

    ``x`` is the quantity of the left panel: seconds, gpu-hours, flop or iterations. Equal records
    give equal bytes.

    Raises:
        UserError: the store has no finished run, or ``x`` or a format is unknown.
    """
    for chosen in formats:
        if chosen not in METADATA:
            raise UserError(unknown("figure format", chosen, METADATA))
    paths = []
    figure = draw(collect(store), x)
    for chosen in formats:
        buffer = io.BytesIO()
        with style.context(["default", STYLE]):
            figure.savefig(buffer, format=chosen, dpi=300, metadata=METADATA[chosen])
        paths.append(store.reports / f"curves.{chosen}")
        write_atomic(paths[-1], buffer.getvalue())
    return paths


def draw(results: Results, x: str = "seconds") -> Figure:
    """Return the figure, 7 inches wide; it grows in height with the key and the notes.

    Raises:
        UserError: ``x`` is unknown, or no run has that quantity.
    """
    with style.context(["default", STYLE]):
        figure = Figure(dpi=300)
        FigureCanvasAgg(figure)
        axes = x_axes(results, x)
        footer = _wrapped(figure, notes(results, axes[0]))
        key = _key_names(results)
        panels = _layout(figure, len(axes), key, len(footer))
        looks = _looks(results.methods())
        for letter, panel, axis in zip("ab", panels, axes, strict=False):
            _panel(panel, axis, results, looks)
            what = "the same runs by iterations" if letter == "b" else "accuracy by compute spent"
            panel.set_title(f"({letter}) {what}", loc="left", pad=4)
        _share_y(panels, results, series(results, axes[0]))
        _key(panels[0], series(results, axes[0]), results, looks, key)
        for number, line in enumerate(footer):
            height = figure.get_figheight()
            y = (LINE_HEIGHT * (len(footer) - number) - 0.02) / height
            figure.text(0.06 / WIDTH, y, line, va="top", color="#444444")
    return figure


def x_axes(results: Results, x: str) -> list[XAxis]:
    """Return the x axes of the panels: the requested one and, if that is another one, iterations.

    Raises:
        UserError: ``x`` is unknown, or no finished run has that quantity.
    """
    makers = {
        "seconds": _seconds_axis,
        "gpu-hours": _device_time_axis,
        "flop": _flop_axis,
        "iterations": _iterations_axis,
    }
    if x not in makers:
        raise UserError(unknown("x axis", x, makers))
    axis = makers[x](results.finished)
    return [axis] if x == "iterations" else [axis, _iterations_axis(results.finished)]


def _seconds_axis(runs: list[Run]) -> XAxis:
    unit, short, _ = _time_unit(max(run.train_s.actual for run in runs))
    where = " on a CPU" if all(is_cpu(run.device) for run in runs) else ""
    return XAxis(f"training wall-clock{where} ({short})", unit, lambda run: run.train_s.actual)


def _device_time_axis(runs: list[Run]) -> XAxis:
    def device_seconds(run: Run) -> float:
        return run.train_s.actual * run.gpus

    unit, _, long = _time_unit(max(map(device_seconds, runs)))
    kinds = {"CPU" if is_cpu(run.device) else "GPU" for run in runs}
    return XAxis(f"training compute ({'/'.join(sorted(kinds))}-{long})", unit, device_seconds)


def _flop_axis(runs: list[Run]) -> XAxis:
    known = [run.flop for run in runs if run.flop is not None]
    if not known:
        reason = runs[0].unavailable.get("flop", "not counted")
        raise UserError(f"no run has a FLOP count ({reason}); plot against seconds or iterations")
    unit, prefix = next((u, p) for u, p in PREFIXES if max(known) >= u or u == 1)
    return XAxis(
        f"training compute ({prefix}FLOP; 1 multiply-add = 2 FLOP)", unit, lambda run: run.flop
    )


def _iterations_axis(runs: list[Run]) -> XAxis:
    thousands = max(run.iterations_done for run in runs) >= 10_000
    unit, label = (1000, "iterations (thousand)") if thousands else (1, "iterations")
    return XAxis(label, unit, lambda run: run.iterations_done)


def _time_unit(seconds: float) -> tuple[float, str, str]:
    """Return the largest unit of which ``seconds`` contain at least two."""
    return next((u for u in reversed(TIME_UNITS) if seconds >= 2 * u[0]), TIME_UNITS[0])


def series(results: Results, axis: XAxis) -> dict[str, list[Point]]:
    """Return each method's points in the order of x; runs that lack the quantity are left out."""
    found = {}
    for method in results.methods():
        groups = (results.group(method, budget) for budget in results.budgets())
        points = [point for group in groups if (point := _point(group, axis))]
        found[method] = sorted(points, key=lambda point: point.x)
    return found


def _point(group: list[Run], axis: XAxis) -> Point | None:
    known = [(x, run) for run in group if (x := axis.of(run)) is not None]
    if not known:
        return None
    runs = [(x, 100 * final_miou(run)) for x, run in known]
    mean, low, high = spread([miou for _, miou in runs])
    middle = float(np.mean([x for x, _ in runs]))
    return Point(middle, mean, low, high, runs, any(drifted(run) for _, run in known))


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


def _looks(methods: list[str]) -> dict[str, Look]:
    step = min(1.8, DODGE_POINTS / max(1, len(methods) - 1))
    found, others = {}, 0
    for place, method in enumerate(methods):
        dodge = (place - (len(methods) - 1) / 2) * step
        if method in CONTROL_LOOKS:
            found[method] = Look(*CONTROL_LOOKS[method], dodge)
            continue
        colour = COLOURS[others % len(COLOURS)]
        dash = DASHES[others // len(COLOURS) % len(DASHES)]
        found[method] = Look(colour, MARKERS[others % len(MARKERS)], dash, dodge)
        others += 1
    return found


def _layout(figure: Figure, panels: int, key: dict[str, str], footer_lines: int) -> list[Axes]:
    """Set the figure's size and return its panels; the key is right of the first."""
    key_width = KEY_SAMPLE + 2 * KEY_SPACE + max(_width(figure, name) for name in key.values())
    width = (WIDTH - LEFT - RIGHT - key_width - (panels - 1) * PANEL_GAP) / panels
    panel_height = max(PANEL_HEIGHT, len(key) * LINE_HEIGHT)
    bottom = X_AXIS_HEIGHT + footer_lines * LINE_HEIGHT
    height = TOP + panel_height + bottom
    figure.set_size_inches(WIDTH, height)
    lefts = [LEFT, LEFT + width + key_width + PANEL_GAP][:panels]
    size = (width / WIDTH, panel_height / height)
    return [figure.add_axes((left / WIDTH, bottom / height, *size)) for left in lefts]


def _panel(panel: Axes, axis: XAxis, results: Results, looks: dict[str, Look]) -> None:
    """Draw every method's line, bars and single runs, and the x axis."""
    lines = series(results, axis)
    _scale_x(panel, [at for points in lines.values() for p in points for at, _ in p.runs])
    panel.set_xlabel(axis.label, labelpad=2)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.5)
    panel.set_axisbelow(True)
    for method, points in lines.items():
        shift = ScaledTranslation(looks[method].dodge / 72, 0, panel.figure.dpi_scale_trans)
        _line(panel, points, looks[method], panel.transData + shift, method in CONTROL_LOOKS)
    if results.teacher and results.teacher.miou is not None:
        panel.axhline(100 * results.teacher.miou, color="#444444", linewidth=0.8, dashes=(5, 3))


def _line(panel: Axes, points: list[Point], look: Look, where: Transform, control: bool) -> None:
    xs, means = [p.x for p in points], [p.mean for p in points]
    common: dict[str, Any] = {"color": look.colour, "transform": where}
    panel.plot(xs, means, linestyle=look.dash, zorder=3 if control else 4, **common)
    lows, highs = [p.low for p in points], [p.high for p in points]
    panel.vlines(xs, lows, highs, linewidth=0.8, alpha=0.45, zorder=2, **common)
    for point in points:
        face = "white" if point.drifted else look.colour
        edge: dict[str, Any] = {"markerfacecolor": face, "markeredgewidth": 0.7}
        panel.plot(point.x, point.mean, look.marker, zorder=5, **edge, **common)
        if len(point.runs) > 1:
            panel.plot(*zip(*point.runs, strict=True), "o", ms=1.7, alpha=0.7, mew=0, **common)


def _scale_x(panel: Axes, values: list[float]) -> None:
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
    panel.xaxis.set_major_locator(FixedLocator(_within(ticks, low, high)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def _within(ticks: Iterable[float], low: float, high: float) -> list[float]:
    return [tick for tick in ticks if low <= tick <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1-2-5 ticks, or only powers of ten if those would be too dense."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    return [float(f"{digit}e{decade}") for decade in decades for digit in digits]


def _share_y(panels: list[Axes], results: Results, lines: dict[str, list[Point]]) -> None:
    values = [100 * run.miou for run in results.finished if run.miou is not None]
    values += [end for points in lines.values() for p in points for end in (p.low, p.high)]
    if results.teacher and results.teacher.miou is not None:
        values.append(100 * results.teacher.miou)
    span = max(values) - min(values)
    pad = max(0.04 * span, (SMALLEST_SPAN - span) / 2)
    low, high = min(values) - pad, max(values) + pad
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10], integer=True).tick_values(low, high)
    for panel in panels:
        panel.set_ylim(low, high)
        panel.yaxis.set_major_locator(FixedLocator(_within(ticks, low, high)))
    panels[0].set_ylabel("val mIoU of the last iterate (%)", labelpad=3)
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)


def _key_names(results: Results) -> dict[str, str]:
    """Return the key's text of each method, and that of the teacher under the empty name."""
    unreliable = {cost.method for cost in results.unreliable()}
    names = {}
    for method in results.methods():
        long = len(method) > LONGEST_NAME
        short = method[: LONGEST_NAME - 8] + "…" + method[-7:] if long else method
        names[method] = flagged(short, method in unreliable)
    if results.teacher and results.teacher.miou is not None:
        names[""] = f"teacher {100 * results.teacher.miou:.1f}"
    return names


def _key(
    panel: Axes,
    lines: dict[str, list[Point]],
    results: Results,
    looks: dict[str, Look],
    names: dict[str, str],
) -> None:
    """Write the names right of the panel, each at the height of its line's end if there is room."""
    box = panel.get_window_extent()
    inches = box.width / panel.figure.dpi, box.height / panel.figure.dpi
    ends = {method: _end(panel, points, looks[method]) for method, points in lines.items()}
    if results.teacher and results.teacher.miou is not None:
        ends[""] = (0.0, _to_axes(panel, 1, 100 * results.teacher.miou)[1])
    order = sorted(ends, key=lambda name: ends[name][1])
    gap = LINE_HEIGHT / inches[1]
    heights = _apart([ends[name][1] for name in order], gap, gap / 2, 1 - gap / 2)
    start, stop = 1 + KEY_SPACE / inches[0], 1 + (KEY_SPACE + KEY_SAMPLE) / inches[0]
    for name, y in zip(order, heights, strict=True):
        look = looks.get(name, Look("#444444", "", (0, (5, 3)), 0))
        shared: dict[str, Any] = {
            "color": look.colour,
            "transform": panel.transAxes,
            "clip_on": False,
        }
        panel.plot([start, stop], [y, y], linestyle=look.dash, **shared)
        panel.plot((start + stop) / 2, y, look.marker or "None", **shared)
        if ends[name][0] > 0.8:  # a leader from further left would cross other lines
            reach = [ends[name][0], start - 0.01], [ends[name][1], y]
            panel.plot(*reach, linewidth=0.4, alpha=0.6, **shared)
        text_x = stop + KEY_SPACE / 2 / inches[0]
        panel.text(text_x, y, names[name], va="center_baseline", transform=panel.transAxes)


def _end(panel: Axes, points: list[Point], look: Look) -> tuple[float, float]:
    """Return where a line ends, in axes fractions; (0, 0.5) for a line without points."""
    if not points:
        return 0.0, 0.5
    x, y = _to_axes(panel, points[-1].x, points[-1].mean)
    return x + look.dodge / 72 * panel.figure.dpi / panel.get_window_extent().width, y


def _to_axes(panel: Axes, x: float, y: float) -> tuple[float, float]:
    at = panel.transAxes.inverted().transform(panel.transData.transform((x, y)))
    return float(at[0]), float(at[1])


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
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


def notes(results: Results, axis: XAxis) -> list[str]:
    """Return the footer: study and device, the meaning of the bars, and every caveat."""
    sizes = {
        len(group)
        for method in results.methods()
        for budget in results.budgets()
        if (group := results.group(method, budget))
    }
    found = [
        f"{study_text(results.study)}. {device_text(results.devices())}. {_seeds_text(sizes)}"
        + _bars_text(sizes)
    ]
    if len(results.devices()) > 1:
        found.append("Runs are from different devices: their wall-clock times cannot be compared.")
    found += classes_notes(results.finished)
    if off := [run for run in results.finished if drifted(run)]:
        drifts = shortened([f"{run.label()} {drift_text(run)}" for run in off])
        found.append(f"Hollow: wall-clock more than 2 % off plan ({drifts}).")
    if bad := results.unreliable():
        methods = shortened(sorted({cost.method for cost in bad}))
        found.append(
            f"{UNRELIABLE}\u00a0planned with an unreliable cost: {methods}; table.md says why."
        )
    if plain := sorted(
        {run.budget for run in results.finished if not parse_budget(run.budget).is_compute}
    ):
        found.append(f"Budgets of equal work, compute not matched: {shortened(plain)}.")
    if without := [run for run in results.finished if axis.of(run) is None]:
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


def _bars_text(sizes: set[int]) -> str:
    parts = []
    if max(sizes) >= 3:
        parts.append("95 % t-interval over seeds")
    if 2 in sizes:
        parts.append("min to max of two seeds")
    if not parts:
        return ", so no bars."
    bars = ", ".join(parts)
    return (
        f"; bars: {bars}; dots: single runs. Markers are shifted sideways so that all are visible."
    )


def _width(figure: Figure, text: str) -> float:
    """Return the width of a text at 7 pt, in inches."""
    artist = figure.text(0, 0, text)
    width = artist.get_window_extent().width / figure.dpi
    artist.remove()
    return width


def _wrapped(figure: Figure, sentences: list[str]) -> list[str]:
    """Return the sentences as lines that fit the width of the figure."""
    lines = [""]
    for word in " ".join(sentences).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(figure, longer) > WIDTH - 0.15:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
