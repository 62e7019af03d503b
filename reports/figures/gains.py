"""Figure: compute-equivalent gain of each method over the controls, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..axes import Axis
from ..results import shortened
from ..text import MISSING, unreliable_names_note
from ..verdict import Gain
from ..verdict_text import gain_text, probability_text
from .looks import INK, NOTE_POINTS, RULE, Look, styled
from .rows import HEAD, Labels, row_height, rows_panel, write_columns
from .sheet import (
    MARGIN,
    PAGE,
    SPACE,
    TWO_PANELS,
    Sheet,
    fixed_ticks,
    have_room,
    label_x,
    notes_height,
    text_width,
    wrapped,
)

X_AXIS = 9.5
"""Above and below the rows of one control, mm."""
ARROW = 2.0
"""Between the panel and the columns at its right, mm."""
SMALLEST_SPAN = 1.25
"""The axis reaches from 1 at least by this factor to each side."""
TICKS = (
    (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2),
    (0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3),
    (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4),
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
    (0.0625, 0.25, 1, 4, 16),
    (0.01, 0.1, 1, 10, 100),
    (0.0001, 0.01, 1, 100, 10_000),
)
"""The first of these that spans the axis and has room is used."""


def draw(
    gains: Sequence[Gain],
    each: Axis,
    looks: Mapping[str, Look],
    names: Mapping[str, str],
    *,
    width_mm: float = PAGE,
) -> Figure:
    """Return the figure: a section for each control, the largest gain first.

    Args:
        gains: at least one is known; those on other axes than ``each`` are left out.
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.
        names: of every method, marked if its Cost is unreliable, see
            :meth:`kdprof.reports.results.Results.flagged_names`.
    """
    own = [gain for gain in gains if gain.axis == each.name]
    sections = {
        control: sorted((g for g in own if g.versus == control), key=_order)
        for control in dict.fromkeys(gain.versus for gain in own)
    }
    footer = wrapped(_notes(own, each) + unreliable_names_note(names.values()), width_mm)
    with styled():
        labels = [
            Labels.fit({gain.method: names[gain.method] for gain in rows}, width_mm)
            for rows in sections.values()
        ]
        left = max(one.width for one in labels)
        columns = _columns(own, width_mm >= TWO_PANELS)
        talls = [len(rows) * row_height(len(rows)) for rows in sections.values()]
        total = sum(talls) + len(talls) * (HEAD + X_AXIS)
        sheet = Sheet.of(width_mm, total + notes_height(footer))
        wide = width_mm - left - MARGIN - sum(columns.values()) - ARROW
        limits, top = _limits(own), HEAD
        for (control, rows), shown, tall in zip(sections.items(), labels, talls, strict=True):
            panel = rows_panel(sheet, left, top, wide, len(rows))
            Labels(shown.texts, left).write(sheet, top, row_height(len(rows)), looks)
            _axis(panel, limits, f"gain over {names[control]}, {each.compute}")
            for row, gain in enumerate(rows):
                _row(panel, row, gain, looks[gain.method], limits)
            write_columns(sheet, columns, list(map(_cells, rows)), top, left + wide + ARROW)
            top += tall + X_AXIS + HEAD
        sheet.notes(footer)
    return sheet.figure


def _order(gain: Gain) -> tuple[float, str]:
    return (math.inf if gain.value is None else -gain.value, gain.method)


def _columns(gains: Iterable[Gain], long: bool) -> dict[str, float]:
    """Return the columns at the right and their widths, mm."""
    longest = max((gain_text(gain) for gain in gains), key=text_width)
    texts = {"gain": longest, "P(gain > 1)": "> 0.99", "seeds": "99"} if long else {}
    texts = texts or {"P": "> 0.99", "seeds": "99"}
    return {
        name: max(text_width(name, NOTE_POINTS), text_width(text)) + 1.5 * SPACE
        for name, text in texts.items()
    }


def _cells(gain: Gain) -> dict[str, str]:
    chance = _probability(gain)
    return {"gain": gain_text(gain), "P": chance, "P(gain > 1)": chance, "seeds": str(gain.seeds)}


def _probability(gain: Gain) -> str:
    return MISSING if gain.probability is None else probability_text(gain.probability)


def _limits(gains: Iterable[Gain]) -> tuple[float, float]:
    """Return the ends of the log axis: all values and all finite ends of intervals are inside."""
    ends = [v for gain in gains for v in (gain.value, gain.low, gain.high) if v]
    low = min([*ends, 1 / SMALLEST_SPAN])
    high = max([*ends, SMALLEST_SPAN])
    pad = (high / low) ** 0.06
    return low / pad, high * pad


def _axis(panel: Axes, limits: tuple[float, float], label: str) -> None:
    panel.set_xscale("log")
    panel.set_xlim(*limits)
    inside = [[tick for tick in ticks if limits[0] <= tick <= limits[1]] for ticks in TICKS]
    spans = [
        ticks
        for ticks, every in zip(inside, TICKS, strict=True)
        if have_room(panel, ticks) and every[0] <= 1.3 * limits[0] and limits[1] <= 1.3 * every[-1]
    ]
    fixed_ticks(panel, next((ticks for ticks in spans if len(ticks) > 1), [1]))
    label_x(panel, label)
    panel.grid(axis="x", color=RULE, linewidth=0.5)
    panel.axvline(1, color=INK, linewidth=0.8)


def _row(panel: Axes, row: int, gain: Gain, look: Look, limits: tuple[float, float]) -> None:
    """Draw one gain. An end that is open, or the side on which a bound leaves the gain, has an
    arrow at the edge of the panel."""
    if gain.value is None:
        return
    if gain.has_interval:
        ends = (gain.low, gain.high)
    else:
        ends = (gain.value, gain.value)
        if gain.bound:
            ends = (gain.value, None) if gain.bound == ">" else (None, gain.value)
    drawn = [edge if end is None else end for end, edge in zip(ends, limits, strict=True)]
    panel.plot(drawn, [row, row], color=look.colour, linewidth=1.1, solid_capstyle="butt")
    for end, edge, arrow in zip(ends, limits, "<>", strict=True):
        if end is None:
            panel.plot(edge, row, arrow, color=look.colour, ms=3.2, mew=0, clip_on=False)
    face = "white" if gain.bound else look.colour
    panel.plot(gain.value, row, look.marker, color=look.colour, mfc=face, mew=0.8, zorder=4)


def _notes(gains: Sequence[Gain], each: Axis) -> list[str]:
    found = [
        f"Gain: how many times the method's {each.compute} the control needs for the same mIoU; "
        "right of 1 the method saves."
    ]
    if any(gain.has_interval for gain in gains):
        found.append("Lines: 95 % intervals over seeds. P: probability of a gain above 1.")
    known = [gain for gain in gains if gain.value is not None]
    if blind := [gain.method for gain in known if not gain.has_interval and gain.seeds > 1]:
        found.append(f"No interval of {shortened(_distinct(blind))}: verdict.md says why.")
    if any(gain.seeds < 2 for gain in known):
        found.append("Without a line: one seed, so no interval.")
    if any(gain.bound for gain in gains):
        found.append("Hollow: a bound, since the gain lies beyond the trained budgets.")
    if any(_is_open(gain) for gain in gains):
        found.append("Arrow: the budgets show no end on this side.")
    reasons = dict.fromkeys(gain.reason for gain in gains if gain.value is None)
    for why in reasons:
        unknown = [gain.method for gain in gains if gain.value is None and gain.reason == why]
        found.append(f"Not known: {shortened(_distinct(unknown))} ({why}).")
    return found


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _is_open(gain: Gain) -> bool:
    if gain.value is None:
        return False
    return bool(gain.bound) or (gain.has_interval and None in (gain.low, gain.high))
