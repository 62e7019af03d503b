"""Figure: the peak memory of one training step of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kdprof.records import REFERENCE, Cost

from ..cost_grids import phase_words
from ..results import device_text, shortened
from ..text import size
from .cost_bars import BAR, TOP, X_AXIS, unreliable_notes
from .looks import HATCH, INK, RULE, Look, styled
from .rows import Labels, row_height, rows_panel, write_ends
from .sheet import MARGIN, PAGE, TWO_PANELS, Sheet, label_x, notes_height, wrapped

GIB = 2**30


def draw(costs: Sequence[Cost], looks: Mapping[str, Look], *, width_mm: float = PAGE) -> Figure:
    """Return the figure: the smallest peak first. Peaks of phases are not shown, because they do
    not add up to the peak of the step.

    Args:
        costs: one Cost of each method, from one device; see :func:`drawable`.
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.
    """
    peaks = drawable(costs)
    ordered = sorted(
        (cost for cost in costs if cost.method in peaks),
        key=lambda cost: (peaks[cost.method], cost.method != REFERENCE, cost.method),
    )
    footer = wrapped(_notes(costs, ordered), width_mm)
    with styled():
        labels = Labels.of_costs(ordered, width_mm)
        tall = row_height(len(ordered)) * len(ordered)
        sheet = Sheet.of(width_mm, TOP + tall + X_AXIS + notes_height(footer))
        room = width_mm - labels.width - MARGIN
        panel = rows_panel(sheet, labels.width, TOP, room, len(ordered))
        labels.write(sheet, TOP, row_height(len(ordered)), looks)
        texts = [_text(cost, peaks, width_mm >= TWO_PANELS) for cost in ordered]
        write_ends(panel, [_held(cost, peaks) / GIB for cost in ordered], texts)
        for row, cost in enumerate(ordered):
            peak, look = peaks[cost.method] / GIB, looks[cost.method]
            if (held := _held(cost, peaks) / GIB) > peak:
                panel.barh(row, held - peak, BAR, peak, color=look.colour, alpha=0.25, linewidth=0)
            panel.barh(row, peak, BAR, color=look.colour, linewidth=0)
            if not cost.reliable:
                how: dict[str, Any] = {"edgecolor": "white", "hatch": HATCH, "linewidth": 0}
                panel.barh(row, peak, BAR, fill=False, **how)
        label_x(panel, f"{_kind(ordered)} (GiB)")
        panel.grid(axis="x", color=RULE, linewidth=0.5)
        panel.tick_params(axis="x", colors=INK)
        sheet.notes(footer)
    return sheet.figure


def drawable(costs: Sequence[Cost]) -> dict[str, int]:
    """Return the peak of each method in bytes: what the allocator handed out; of the whole process
    if no Cost has that. The two are never mixed."""
    allocated = {c.method: c.memory_bytes.peak_allocated for c in costs}
    process = {c.method: c.memory_bytes.process for c in costs}
    chosen = allocated if any(allocated.values()) else process
    return {method: peak for method, peak in chosen.items() if peak}


def _held(cost: Cost, peaks: Mapping[str, int]) -> int:
    """Return what the allocator reserved on the device, if it is known, else the peak."""
    own = cost.memory_bytes
    reserved = own.peak_reserved if own.peak_allocated else None
    return max(reserved or 0, peaks[cost.method])


def _kind(costs: Sequence[Cost]) -> str:
    if any(cost.memory_bytes.peak_allocated for cost in costs):
        return "peak memory of one step, allocated"
    return "peak memory of the process"


def _text(cost: Cost, peaks: Mapping[str, int], long: bool) -> str:
    peak, reference = peaks[cost.method], peaks.get(REFERENCE)
    text = size(peak)
    if reference:
        text += ", 1x" if cost.method == REFERENCE else f", {peak / reference:.2f}x"
    phase = _peak_phase(cost)
    return f"{text}, in {phase_words(phase)}" if long and phase else text


def _peak_phase(cost: Cost) -> str | None:
    """Return the phase with the largest peak, if one is larger than all others. A process never
    shrinks, so its phases say nothing."""
    phases = cost.memory_bytes.phases
    if not phases or cost.memory_bytes.peak_allocated is None:
        return None
    most = [name for name, peak in phases.items() if peak == max(phases.values())]
    return most[0] if len(most) == 1 else None


def _notes(costs: Sequence[Cost], shown: Sequence[Cost]) -> list[str]:
    found = [f"Measured on {device_text(sorted({cost.device for cost in shown}))}."]
    allocated = any(cost.memory_bytes.peak_allocated for cost in shown)
    if not allocated:
        found.append("Python and libraries are included.")
    elif any(cost.memory_bytes.peak_reserved for cost in shown):
        found.append("Pale: reserved by the allocator beyond that.")
    if any(cost.method == REFERENCE for cost in shown):
        found.append(f"At the end of a bar: the peak, and its ratio to {REFERENCE}.")
    named = {cost.method for cost in shown}
    if missing := [cost.method for cost in costs if cost.method not in named]:
        found.append(f"Not known: {shortened(missing)}.")
    return found + unreliable_notes(shown)
