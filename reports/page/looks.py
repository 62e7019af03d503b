"""How methods and phases look on the page: colours, markers and dashes of the figures, as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdprof.records import Cost, Run

from ..figures.looks import PHASE_COLOURS, WHOLE_STEP, Dash, folder_looks
from .markup import Markup, tag

INK = "var(--ink)"
"""The colour of text: black on light paper, white on dark."""

_SHAPES = {
    "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "s": "M-3.6,-3.6h7.2v7.2h-7.2z",
    "^": "M0,-4.6L4.4,3.4H-4.4z",
    "v": "M0,4.6L4.4,-3.4H-4.4z",
    "<": "M-4.6,0L3.4,-4.4V4.4z",
    ">": "M4.6,0L-3.4,-4.4V4.4z",
    "D": "M0,-4.8L4.8,0L0,4.8L-4.8,0z",
    "P": "M-1.6,-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "X": "M-4.4,-2.4l2,-2l2.4,2.4l2.4,-2.4l2,2l-2.4,2.4l2.4,2.4"
    "l-2,2l-2.4,-2.4l-2.4,2.4l-2,-2l2.4,-2.4z",
    "*": "M0,-5.4L1.3,-1.8L5.1,-1.7L2.1,0.7L3.2,4.4L0,2.2L-3.2,4.4L-2.1,0.7L-5.1,-1.7L-1.3,-1.8z",
}
"""Path of each marker, by its name in matplotlib; about 9 pixels wide around the origin."""


@dataclass(frozen=True)
class Look:
    """How one method is drawn. Its colour is set by its class."""

    class_: str
    colour: str
    shape: str
    """The path of its marker."""
    dash: str | None
    """Lengths of dashes and gaps in pixels."""


def looks(runs: Iterable[Run], costs: Iterable[Cost]) -> dict[str, Look]:
    """Return the look of each method of a folder, the same as in the figures."""
    return {
        method: Look(
            f"m{place}",
            INK if look.colour == "black" else look.colour,
            _SHAPES[look.marker],
            _dash(look.dash),
        )
        for place, (method, look) in enumerate(folder_looks(runs, costs).items())
    }


def _dash(dash: Dash) -> str | None:
    # matplotlib's lengths are in widths of the line, which is 1.6 pixels wide here.
    return None if isinstance(dash, str) else " ".join(f"{1.6 * part:.3g}" for part in dash[1])


def phase_classes(phases: Sequence[str]) -> dict[str, str]:
    """Return the class of each phase, the phases in the order of the figures' bars."""
    order = [*PHASE_COLOURS, *phases]
    return {phase: f"p{order.index(phase)}" for phase in sorted(phases, key=order.index)}


def stylesheet(methods: dict[str, Look], phases: dict[str, str]) -> Markup:
    """Return the rules that give methods and phases their colours."""
    rules = [f".{look.class_}{{--method:{look.colour}}}" for look in methods.values()]
    rules += [
        f".{class_}{{--phase:{PHASE_COLOURS.get(phase, WHOLE_STEP)}}}"
        for phase, class_ in phases.items()
    ]
    return Markup("".join(rules))


def sample(look: Look) -> Markup:
    """Return a short line with the marker, for a key."""
    line = tag("line", x1="0", x2="26", y1="7", y2="7", class_="curve", stroke_dasharray=look.dash)
    marker = tag("path", d=look.shape, transform="translate(13 7)", class_="marker")
    drawn = {
        "class_": f"sample {look.class_}",
        "width": "26",
        "height": "14",
        "aria_hidden": "true",
    }
    return tag("svg", line, marker, **drawn)
