"""Figure: the ranks of the methods at equal iterations and at equal compute, and which flip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..axes import Axis
from ..text import unreliable_names_note
from ..verdict import Flip, Standing, Verdict
from ..verdict_text import chance_text
from .looks import INK, NOTE_POINTS, PALE, Look, styled
from .sheet import (
    LINE,
    MARGIN,
    PAGE,
    SPACE,
    TWO_PANELS,
    Sheet,
    apart,
    distinct,
    notes_height,
    text_width,
    wrapped,
)

HEAD, BELOW = 8.0, 1.5
HEIGHT = 52.0
NARROWEST, WIDEST = 24.0, 90.0
"""Of the lines' panel, mm."""
LEADER = 4.0
LIKELY = 0.5
"""A flip with less probability is none: its methods stay grey."""
SURE = 0.95
"""A flip with less probability is dashed."""
NAMED, NAMED_NARROW = 4, 2
"""The notes name at most this many flips."""
SMALLEST_SPAN = 1.0
"""The axis spans at least this many percentage points, so that noise does not fill it."""


def draw(
    verdict: Verdict,
    ends: tuple[Axis, Axis],
    looks: Mapping[str, Look],
    flagged_names: Mapping[str, str],
    *,
    width_mm: float = PAGE,
) -> Figure:
    """Return the figure.

    Args:
        verdict: has a standing on both axes.
        ends: the axes of the left and of the right end, such as iterations and seconds.
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.
        flagged_names: of every method, marked if its Cost is unreliable, see
            :meth:`kdprof.reports.results.Results.flagged_names`.
    """
    found = {standing.axis: standing for standing in verdict.standings}
    left, right = (found[each.name] for each in ends)
    flips = [flip for flip in verdict.flips if flip.axes == (left.axis, right.axis)]
    drawn = [flip for flip in flips if flip.probability is None or flip.probability >= LIKELY]
    shown_names = {method: flagged_names[method] for method in left.miou_percent}
    notes = _notes(drawn, len(flips) - len(drawn), width_mm)
    footer = wrapped(notes + unreliable_names_note(shown_names.values()), width_mm)
    tall = max(HEIGHT, len(left.miou_percent) * LINE)
    with styled():
        sheet = Sheet.of(width_mm, HEAD + tall + BELOW + notes_height(footer))
        names, side, both = _names(shown_names, width_mm)
        wide = min(WIDEST, width_mm - 2 * MARGIN - side - (side if both else _value_room()))
        start = (width_mm - wide - side - (side if both else _value_room())) / 2
        start += side if both else _value_room()
        panel = sheet.panel(start, HEAD, wide, tall)
        _scale(panel, (left, right))
        _lines(panel, (left, right), drawn, looks)
        for standing, x, sign in ((left, start, -1), (right, start + wide, 1)):
            shown = names if both or sign > 0 else dict.fromkeys(names, "")
            _labels(sheet, panel, standing, x, sign, shown, tall)
        _heading(sheet, ends[0], left, start, -1)
        _heading(sheet, ends[1], right, start + wide, 1)
        sheet.notes(footer)
    return sheet.figure


def _value_room() -> float:
    return LEADER + text_width("88.88") + SPACE


def _names(full: Mapping[str, str], width: float) -> tuple[dict[str, str], float, bool]:
    """Return the names by method as they fit, the width of the labels of one side, mm, and whether
    both sides have names: a narrow figure has them at the right only."""
    room = width - 2 * MARGIN - NARROWEST
    widest = max(map(text_width, full.values()))
    both = 2 * (widest + _value_room()) <= room
    short = distinct(list(full.values()), 60.0 if both else room - 2 * _value_room())
    names = {method: short[name] for method, name in full.items()}
    return names, max(map(text_width, names.values())) + _value_room() + SPACE, both


def _scale(panel: Axes, standings: Sequence[Standing]) -> None:
    values = [value for standing in standings for value in standing.miou_percent.values()]
    span = max(values) - min(values)
    pad = max(0.04 * span, (SMALLEST_SPAN - span) / 2)
    panel.set_ylim(min(values) - pad, max(values) + pad)
    panel.set_xlim(0, 1)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines["bottom"].set_visible(False)
    panel.spines["right"].set_visible(True)


def _lines(
    panel: Axes,
    standings: tuple[Standing, Standing],
    flips: Sequence[Flip],
    looks: Mapping[str, Look],
) -> None:
    flipped = {name for flip in flips for name in (flip.first, flip.second)}
    sure = {
        name
        for flip in flips
        if (flip.probability or 0) >= SURE
        for name in (flip.first, flip.second)
    }
    for method in standings[0].miou_percent:
        ys = [standing.miou_percent[method] for standing in standings]
        colour = looks[method].colour if method in flipped else PALE
        panel.plot(
            [0, 1],
            ys,
            color=colour,
            linestyle="-" if method in sure or method not in flipped else (0, (4, 1.5)),
            linewidth=1.3 if method in flipped else 0.8,
            marker=looks[method].marker,
            clip_on=False,
            zorder=4 if method in flipped else 3,
        )


def _labels(
    sheet: Sheet,
    panel: Axes,
    standing: Standing,
    x: float,
    sign: int,
    names: Mapping[str, str],
    tall: float,
) -> None:
    """Write value and name beside each end of a line, as near as they stay apart."""
    low, high = panel.get_ylim()
    wanted = {m: (v - low) / (high - low) * tall for m, v in standing.miou_percent.items()}
    order = sorted(wanted, key=lambda method: (wanted[method], method))
    heights = apart([wanted[method] for method in order], LINE, LINE / 2, tall - LINE / 2)
    for method, height in zip(order, heights, strict=True):
        y, end = HEAD + tall - height, HEAD + tall - wanted[method]
        sheet.line([x + sign, x + sign * LEADER], [end, y], color=PALE, linewidth=0.4)
        value = f"{standing.miou_percent[method]:.2f}"
        text = f"{value}  {names[method]}" if sign > 0 else f"{names[method]}  {value}"
        ha = "left" if sign > 0 else "right"
        sheet.text(x + sign * (LEADER + 0.6), y, text.strip(), ha=ha)


def _heading(sheet: Sheet, each: Axis, standing: Standing, x: float, sign: int) -> None:
    """Write above an end of the lines what is equal there; from the edge of the sheet if there is
    no room on the outside of the end."""
    words, amount = f"equal {each.compute}", f"at {each.text(standing.at)}"
    wide = max(text_width(words), text_width(amount, NOTE_POINTS))
    outside = x if sign < 0 else sheet.width - x
    fits = wide + MARGIN <= outside
    ha = "right" if fits == (sign < 0) else "left"
    place = x if fits else MARGIN if sign < 0 else sheet.width - MARGIN
    sheet.text(place, HEAD / 2 - 1.6, words, ha=ha)
    sheet.text(place, HEAD / 2 + 1.2, amount, ha=ha, colour=INK, points=NOTE_POINTS)


def _notes(flips: Sequence[Flip], unlikely: int, width: float) -> list[str]:
    found = ["mIoU (%), read off the curves at the largest amount that all of them reach."]
    if not flips:
        likely = "is likely to change" if unlikely else "changes"
        found.append(f"No pair of methods {likely} its order.")
    else:
        named = NAMED if width >= TWO_PANELS else NAMED_NARROW
        listed = "; ".join(_flip_text(flip) for flip in flips[:named])
        more = f" and {len(flips) - named} more" if len(flips) > named else ""
        found.append(f"Coloured: methods of pairs that change their order: {listed}{more}.")
    if any(flip.probability is None for flip in flips):
        found.append("Dashed: from one seed, so it may be chance.")
    elif any((flip.probability or 0) < SURE for flip in flips):
        found.append(f"Dashed: with less than {SURE:g} probability.")
    if unlikely:
        grey = "1 pair is" if unlikely == 1 else f"{unlikely} pairs are"
        found.append(f"{grey} grey that would do so with less than {LIKELY:g} probability.")
    return found


def _flip_text(flip: Flip) -> str:
    chance = "" if flip.probability is None else f", P {chance_text(flip.probability)}"
    before, after = flip.differences
    return f"{flip.first} over {flip.second} ({before:+.2f} to {after:+.2f} points{chance})"
