"""Figure: the time of one training step of each method by phase, and its ratio to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdprof.records import Cost

from ..cost_grids import phase_words, reference_name, time_unit
from ..published import measured
from ..results import device_text, shortened
from ..text import Estimate, digits, flagged
from .looks import HATCH, PHASE_COLOURS, RULE, WHOLE_STEP, Look, styled
from .rows import Labels, row_height, rows_panel, write_ends
from .sheet import (
    LINE,
    MARGIN,
    PAGE,
    PATCH,
    SPACE,
    TWO_PANELS,
    Columns,
    Sheet,
    label_x,
    notes_height,
    wrapped,
)

TOP, X_AXIS = 1.5, 9.0
BAR = 0.72
"""Height of a bar, as a part of its row."""
WHOLE = "whole step"
"""The only part of a step whose phases were not measured."""


def draw(costs: Sequence[Cost], looks: Mapping[str, Look], *, width_mm: float = PAGE) -> Figure:
    """Return the figure: the smallest ratio first, those without a ratio last.

    Args:
        costs: one Cost of each method, from one device; at least one has a latency.
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.
    """
    ordered = sorted((cost for cost in costs if cost.latency_s), key=_ratio_order)
    unit, scale = time_unit(ordered)
    footer = wrapped(_notes(ordered), width_mm)
    parts = [_parts(cost) for cost in ordered]
    names = part_names(parts)
    key = {WHOLE if name == WHOLE else phase_words(name): name for name in names}
    unreliable = any(not cost.reliable for cost in ordered)
    entries = [*key, *(["unreliable"] if unreliable else [])]
    with styled():
        labels = Labels.of_costs(ordered, width_mm)
        columns = Columns.fit(entries, width_mm - 2 * MARGIN, 1.6 * PATCH)
        tall = row_height(len(ordered)) * len(ordered)
        below = TOP + tall + X_AXIS
        sheet = Sheet.of(width_mm, below + columns.rows * LINE + notes_height(footer))
        room = width_mm - labels.width - MARGIN
        panel = rows_panel(sheet, labels.width, TOP, room, len(ordered))
        labels.write(sheet, TOP, row_height(len(ordered)), looks)
        ends = [scale * sum(found.values()) for found in parts]
        write_ends(panel, ends, [_ratio_text(cost, width_mm >= TWO_PANELS) for cost in ordered])
        for row, (cost, found) in enumerate(zip(ordered, parts, strict=True)):
            _bar(panel, row, {name: scale * found.get(name, 0.0) for name in names}, cost.reliable)
        label_x(panel, f"one training step ({unit})")
        panel.grid(axis="x", color=RULE, linewidth=0.5)
        for (x, y), entry in zip(columns.places(MARGIN, below), entries, strict=True):
            hatch = HATCH if entry not in key else ""
            sheet.patch(x, y, colour(key[entry]) if entry in key else "white", hatch)
            sheet.text(x + 1.6 * PATCH + SPACE / 2, y, entry)
        sheet.notes(footer)
    return sheet.figure


def part_names(parts: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the parts that take time in any step, in the order of the bars."""
    there = {name: None for found in parts for name, seconds in found.items() if seconds > 0}
    return [name for name in PHASE_COLOURS if name in there] + [
        name for name in there if name not in PHASE_COLOURS
    ]


def colour(part: str) -> str:
    """Return the colour of a part of a step."""
    return PHASE_COLOURS.get(part, WHOLE_STEP)


def _parts(cost: Cost) -> dict[str, float]:
    """Return the seconds of each phase, or of the whole step if they were not measured."""
    assert cost.latency_s is not None, "a Cost without a latency is not drawn"
    return cost.phases_s or {WHOLE: cost.latency_s.median}


def _ratio_order(cost: Cost) -> tuple[float, str]:
    return (cost.ratio.median if cost.ratio else math.inf, cost.method)


def _bar(panel: Axes, row: int, parts: Mapping[str, float], reliable: bool) -> None:
    left = 0.0
    for name, length in parts.items():
        if length:
            how: dict[str, Any] = {"color": colour(name), "edgecolor": "white", "linewidth": 0.3}
            panel.barh(row, length, BAR, left, **how)
        left += length
    if not reliable:
        panel.barh(row, left, BAR, fill=False, edgecolor="black", linewidth=0, hatch=HATCH)


def _ratio_text(cost: Cost, intervals: bool) -> str:
    ratio = cost.ratio
    if ratio is None:
        return "no ratio"
    if ratio.to == cost.method:
        return "1x"
    if not intervals:
        return f"{ratio.median:.2f}x"
    decimals = digits(ratio.median, ratio.high - ratio.median)
    return Estimate(ratio.median, ratio.low, ratio.high).text(decimals).replace(" ", "x ", 1)


def _notes(costs: Sequence[Cost]) -> list[str]:
    here = measured(costs)
    found = [
        f"Median step on {device_text(sorted({cost.device for cost in costs}))}"
        + "".join(f", {here[name]}" for name in ("networks", "step") if here[name])
        + f". At the end of a bar: its ratio to {reference_name(costs)}, measured side by side."
    ]
    if whole := [cost.method for cost in costs if not cost.phases_s]:
        found.append(f"Phases not measured: {shortened(whole)}.")
    return found + unreliable_notes(costs)


def unreliable_notes(costs: Sequence[Cost]) -> list[str]:
    """Return what hatches mean, if there are any."""
    bad = [flagged(cost.method, True) for cost in costs if not cost.reliable]
    return [f"Hatched: UNRELIABLE ({shortened(bad)}); costs.md says why."] if bad else []
