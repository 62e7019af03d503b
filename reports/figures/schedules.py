"""Figure: published schedules as equal compute, by what each would take on the measured device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdprof.errors import UserError
from kdprof.records import Cost

from ..published import FORECAST, notes, schedule_text
from ..text import MISSING, duration, flagged
from .looks import NOTE_POINTS, RULE, Look, styled
from .rows import HEAD, Labels, row_height, rows_panel, write_columns
from .sheet import (
    LOG_ABOVE,
    MARGIN,
    PAGE,
    SPACE,
    TWO_PANELS,
    Sheet,
    label_x,
    notes_height,
    scale_x,
    text_width,
    wrapped,
)

if TYPE_CHECKING:
    from kdprof.published import ConvertedSchedule

GAP, X_AXIS = 2.5, 9.5
"""Above a data set, below it, and below the last one, mm."""
Sections = dict[str | None, list["ConvertedSchedule"]]


def draw(
    found: Sequence[ConvertedSchedule],
    costs: Sequence[Cost],
    looks: Mapping[str, Look],
    *,
    width_mm: float = PAGE,
) -> Figure:
    """Return the figure: a section for each data set, the longest schedule first. Schedules that
    could not be converted are left out.

    Args:
        costs: those that the schedules were converted with, for the notes.
        looks: of every method, see :func:`kdprof.reports.figures.looks.folder_looks`.

    Raises:
        UserError: no schedule could be converted.
    """
    converted = [one for one in found if one.seconds is not None]
    if not converted:
        raise UserError("no published schedule of a measured method could be converted to draw")
    ordered = sorted(converted, key=lambda one: (-(one.seconds or 0), one.method))
    sections: Sections = {one.dataset: [] for one in converted}
    for one in ordered:
        sections[one.dataset].append(one)
    footer = wrapped(_notes(converted, costs), width_mm)
    with styled():
        wide = width_mm >= TWO_PANELS
        labels = {name: _labels(rows, width_mm, wide) for name, rows in sections.items()}
        left = max(one.width for one in labels.values())
        columns = _columns(converted, wide)
        talls = {name: len(rows) * row_height(len(rows)) for name, rows in sections.items()}
        total = sum(talls.values()) + len(talls) * (HEAD + GAP) - GAP + X_AXIS
        sheet = Sheet.of(width_mm, total + notes_height(footer))
        room = width_mm - left - MARGIN - sum(columns.values())
        top = HEAD
        for number, (name, rows) in enumerate(sections.items()):
            panel = rows_panel(sheet, left, top, room, len(rows))
            own = {str(place): looks[one.method] for place, one in enumerate(rows)}
            labels[name].write(sheet, top, row_height(len(rows)), own)
            sheet.text(MARGIN, top - HEAD / 2, str(name))
            _draw_rows(panel, rows, [one.seconds or 0 for one in converted], looks)
            if number < len(sections) - 1:
                panel.tick_params(labelbottom=False)
            else:
                label_x(panel, "device time (h)")
            write_columns(sheet, columns, list(map(_cells, rows)), top, left + room)
            top += talls[name] + HEAD + GAP
        sheet.notes(footer)
    return sheet.figure


def _labels(rows: Sequence[ConvertedSchedule], width: float, wide: bool) -> Labels:
    """Return the names of the rows; without a column of schedules they say the iterations."""
    names = {}
    for number, one in enumerate(rows):
        length = "" if wide else f" {schedule_text(one).split(' ')[0]}"
        names[str(number)] = flagged(one.method, bool(one.unreliable)) + length
    return Labels.fit(names, width)


def _draw_rows(
    panel: Axes,
    rows: Sequence[ConvertedSchedule],
    seconds: Sequence[float],
    looks: Mapping[str, Look],
) -> None:
    hours = [value / 3600 for value in seconds]
    log = max(hours) > LOG_ABOVE * min(hours)
    scale_x(panel, hours if log else [0.0, *hours])
    panel.grid(axis="both", color=RULE, linewidth=0.5)
    for row, one in enumerate(rows):
        assert one.seconds is not None, "a schedule without seconds is not drawn"
        look = looks[one.method]
        ends = [(end or one.seconds) / 3600 for end in (one.seconds_low, one.seconds_high)]
        if not log:  # a log axis has no zero to start from
            panel.plot([0, one.seconds / 3600], [row, row], color=look.colour, lw=0.8, alpha=0.5)
        panel.plot(ends, [row, row], color=look.colour, linewidth=1.1)
        face = look.colour if one.scale == 1 else "white"
        at = one.seconds / 3600
        panel.plot(at, row, look.marker, color=look.colour, mfc=face, mew=0.8, zorder=4)


def _cells(one: ConvertedSchedule) -> dict[str, str]:
    assert one.seconds is not None, "a schedule without seconds is not drawn"
    forecast = "" if one.scale == 1 else FORECAST
    return {
        "iterations x batch x crop": schedule_text(one),
        "device time": forecast + duration(one.seconds),
        "= kd iterations": MISSING if one.kd_iterations is None else f"{one.kd_iterations:,}",
    }


def _columns(found: Sequence[ConvertedSchedule], wide: bool) -> dict[str, float]:
    """Return the columns at the right and their widths, mm."""
    cells = [_cells(one) for one in found]
    names = list(cells[0]) if wide else list(cells[0])[1:]
    widths = {name: max(text_width(cell[name]) for cell in cells) for name in names}
    return {
        name: max(width, text_width(name, NOTE_POINTS)) + 1.5 * SPACE
        for name, width in widths.items()
    }


def _notes(converted: Sequence[ConvertedSchedule], costs: Sequence[Cost]) -> list[str]:
    hollow = ["Hollow: a forecast."] if any(one.scale != 1 for one in converted) else []
    return hollow + notes(converted, costs)
