"""The gains as a few lines of text in a free place beside the curves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..verdict import Gain
from ..verdict_text import need_text
from .looks import INK, NOTE_POINTS
from .sheet import NOTE_LINE, distinct, text_width, width_of

PADDING = 1.2
"""Around the text, mm."""

Path = Sequence[tuple[float, float]]


def write_gains(panel: Axes, gains: Sequence[Gain], taken: Sequence[Path]) -> None:
    """Write what methods need of a control's compute where no path is, if there is a place.

    In words, not as a bracket between two curves: the gain is the shift of the whole curve, and the
    distance at one level of mIoU is another number.

    Args:
        gains: on the panel's axis; those over the first one's control are written.
        taken: what is drawn, as polygons in the units of the axes.
    """
    known = [gain for gain in gains if gain.value is not None]
    known = [gain for gain in known if gain.versus == known[0].versus]
    if not known:
        return
    lines = _lines(sorted(known, key=lambda gain: -(gain.value or 0)), 0.4 * width_of(panel))
    points = panel.get_window_extent()
    height = width_of(panel) * points.height / points.width
    wide = (max(text_width(line, NOTE_POINTS) for line in lines) + 2 * PADDING) / width_of(panel)
    tall = (NOTE_LINE * len(lines) + 2 * PADDING) / height
    dots = _dots(panel, taken)
    places = [(1 - wide, float(low)) for low in np.linspace(0, 0.5 - tall, 10)]
    places += [(0.0, float(low)) for low in np.linspace(1 - tall, 0.5, 10)]
    for left, low in places:
        inside = (left <= dots[:, 0]) & (dots[:, 0] <= left + wide)
        if not (inside & (low <= dots[:, 1]) & (dots[:, 1] <= low + tall)).any():
            top = (low + tall) * height - PADDING
            for number, line in enumerate(lines):
                x = left + PADDING / width_of(panel)
                y = (top - NOTE_LINE * (number + 0.5)) / height
                where: dict[str, Any] = {"transform": panel.transAxes, "va": "center_baseline"}
                panel.text(x, y, line, fontsize=NOTE_POINTS, color=INK, **where)
            return


def _lines(gains: Sequence[Gain], room: float) -> list[str]:
    names = distinct([gain.method for gain in gains], room, NOTE_POINTS)
    found = [f"{names[gain.method]} {need_text(gain)}" for gain in gains]
    return [f"of {gains[0].versus}'s compute for the same mIoU:", *found]


def _dots(panel: Axes, taken: Sequence[Path]) -> np.ndarray:
    """Return places along the paths, as fractions of the panel."""
    to_axes = panel.transData + panel.transAxes.inverted()
    steps = np.linspace(0, 1, 50)[:, None]
    found = [np.empty((0, 2))]
    for path in taken:
        corners = to_axes.transform(np.array(path).reshape(-1, 2))
        found += [corners, *(a + steps * (b - a) for a, b in pairwise(corners))]
    return np.concatenate(found)
