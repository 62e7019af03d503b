"""How figures look: the style of text and lines, and the colour and marker of each method.

This is the only place that chooses colours, so that a method looks the same in every figure.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from matplotlib import style

from kdprof.records import CONTROL, REFERENCE, Cost, Run

TEXT_POINTS, NOTE_POINTS = 7.0, 6.0
"""Sizes of labels and of notes at print size; journals want 6 points at least."""
INK, PALE, RULE = "#444444", "#b0b0b0", "#e6e6e6"
"""Axes and notes; what is not the point of a figure; grid lines."""

STYLE = {
    "font.size": TEXT_POINTS,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.labelsize": TEXT_POINTS,
    "axes.titlesize": TEXT_POINTS,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "xtick.labelsize": TEXT_POINTS,
    "ytick.labelsize": TEXT_POINTS,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.8,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "svg.fonttype": "path",  # text keeps its width where the font is not installed
    "svg.hashsalt": "kdprof",  # otherwise element ids differ from file to file
    "path.simplify": False,
}

# Okabe & Ito's colour-blind-safe set without its yellow (too pale for a line on white); black and
# grey are kept for the controls. 6 colours x 5 dashes x 8 markers repeat after 120 methods.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("^", "D", "v", "P", "X", "<", "*", ">")
Dash = str | tuple[float, tuple[float, ...]]
DASHES: tuple[Dash, ...] = (
    "-",
    (0, (4, 1.2)),
    (0, (1.2, 1)),
    (0, (5, 1, 1.2, 1)),
    (0, (5, 1, 1.2, 1, 1.2, 1)),
)
HATCH = "//////"
"""Of a bar whose Cost is unreliable."""

PHASE_COLOURS = {
    "data": "#d9d9d9",
    "student_forward": "#56B4E9",
    "student_backward": "#0072B2",
    "task_loss": "#009E73",
    "optimizer": "#4d4d4d",
    "teacher_forward": "#a6a6a6",
    "objective": "#E69F00",
    "objective_backward": "#D55E00",
    "auxiliary": "#CC79A7",
}
"""In the order of the bars: what training the student alone takes, then what a method adds. Related
phases have related hues."""
WHOLE_STEP = "#c8c8c8"
"""A step whose phases were not measured, or a phase of another name."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every figure."""

    colour: str
    marker: str
    dash: Dash


CONTROL_LOOKS = {REFERENCE: Look("black", "o", "-"), CONTROL: Look("#808080", "s", "-")}
TEACHER = Look(INK, "None", (0, (5, 3)))


def styled() -> AbstractContextManager[None]:
    """Return a context in which figures are drawn and saved, whatever the user's settings are."""
    return style.context(["default", STYLE])


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Return the look of each method; it depends on which methods there are, not on their order."""
    found = {}
    others = sorted(set(methods) - CONTROL_LOOKS.keys())
    for number, method in enumerate(others):
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        found[method] = Look(colour, MARKERS[number % len(MARKERS)], dash)
    return found | CONTROL_LOOKS


def folder_looks(runs: Iterable[Run], costs: Iterable[Cost]) -> dict[str, Look]:
    """Return the looks of all methods in a folder of results, measured or trained.

    Figures take this and not the looks of the methods that they show: so a method keeps its colour
    when others are left out.
    """
    return looks({run.method for run in runs} | {cost.method for cost in costs})
