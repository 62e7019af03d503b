"""The sections that show the verdict: gain and rank flips."""

from __future__ import annotations

from collections.abc import Sequence

from ..axes import axis as axis_named
from ..results import Results, shortened
from ..verdict import Flip, Gain, Verdict
from ..verdict_text import SURE, gain_text, probability_text
from . import charts
from .content import Content, Section, amount, chance, folded, signed, switched
from .markup import Markup, exact, tag
from .tables import Cell, Line
from .tables import table as sortable


def gain_section(content: Content) -> Section | None:
    """Return the forest plots of the gain, or why it is not known."""
    verdict = content.verdict
    if verdict is None or not verdict.gains:
        return None
    panels = {}
    for axis in content.axes:
        own = [gain for gain in verdict.gains if gain.axis == axis.name]
        if any(gain.value is not None for gain in own):
            panels[axis.name] = (f"equal {axis.compute}", _forests(own, content))
    lead = tag(
        "p",
        "How many times the method's compute the control needs for the same mIoU: above 1 the "
        "method saves compute, below 1 it wastes. Bars are 95 % intervals; an arrow is an end "
        "beyond what the budgets can show, a hollow marker a bound.",
        class_="soft",
    )
    if panels:
        return Section("gain", "Gain", "Compute-equivalent gain", [lead, *switched("gain", panels)])
    reasons = dict.fromkeys(gain.reason for gain in verdict.gains if gain.reason)
    # One reason per pair of methods says the same as a few.
    unknown = tag("p", f"Not known: {shortened(list(reasons))}.")
    return Section("gain", "Gain", "Compute-equivalent gain", [lead, unknown])


def _forests(gains: Sequence[Gain], content: Content) -> Markup:
    shown = [
        end
        for gain in gains
        for end in (gain.value, gain.low, gain.high)
        if gain.value is not None and end is not None
    ]
    scale = charts.gain_scale(shown)
    assert content.results is not None, "gains are those of finished runs"
    names = content.results.flagged_names()
    parts: list[Markup] = []
    for control in dict.fromkeys(gain.versus for gain in gains):
        own = [gain for gain in gains if gain.versus == control]
        own.sort(key=lambda gain: (-(gain.value or 0), gain.method))
        rows = [_whisker(gain, names[gain.method]) for gain in own]
        chart = charts.forest(rows, content.looks, scale)
        parts.append(tag("figure", tag("figcaption", f"Gain over {names[control]}"), chart))
    return tag("div", *parts)


def _whisker(gain: Gain, label: str) -> charts.Whisker:
    interval = gain.has_interval
    chance = "" if gain.probability is None else f", P(> 1) {probability_text(gain.probability)}"
    known = (gain.value, *((gain.low, gain.high, gain.probability) if interval else ()))
    return charts.Whisker(
        gain.method,
        label,
        gain.value,
        gain.low if interval else None,
        gain.high if interval else None,
        gain.bound,
        interval,
        "not known" if gain.value is None else gain_text(gain) + chance,
        known,
        gain.reason,
    )


def flip_section(content: Content) -> Section | None:
    """Return the slope charts and the pairs that change places; None if there are no ranks."""
    verdict, results = content.verdict, content.results
    if verdict is None or results is None:
        return None
    standings = {standing.axis: standing for standing in verdict.standings}
    pairs = dict.fromkeys(flip.axes for flip in verdict.flips)
    if "iterations" in standings:
        names = [axis.name for axis in content.axes if axis.name in standings]
        others = [name for name in names if name not in ("iterations", "samples")]
        pairs = dict.fromkeys([*(("iterations", name) for name in others), *pairs])
    if not pairs or len(results.methods()) < 2:
        return None
    panels = {
        axes[1]: (
            f"equal {axis_named(results, axes[1]).compute}",
            _slopes(content, axes, results, verdict),
        )
        for axes in pairs
        if axes[0] in standings and axes[1] in standings
    }
    if not panels:
        return None
    lead = tag(
        "p",
        "Methods ranked at equal iterations (left), as papers compare them, and at equal compute "
        "(right), with the mIoU read off the curves at the largest amount that all curves "
        "reach. "
        f"Two methods changed places where lines cross: thick if that is at least {100 * SURE:g} % "
        "sure, dashed if it may be chance.",
        class_="soft",
    )
    parts = [lead, *switched("flips", panels), _flip_table(verdict.flips, results)]
    return Section("flips", "Rank flips", "Rank flips", parts)


def _slopes(content: Content, axes: tuple[str, str], results: Results, verdict: Verdict) -> Markup:
    standings = {standing.axis: standing for standing in verdict.standings}
    left, right = (standings[name] for name in axes)
    both = [method for method in left.miou_percent if method in right.miou_percent]
    places = {method: place for place, method in enumerate(right.miou_percent)}
    flips = [flip for flip in verdict.flips if flip.axes == axes]
    rows = [
        charts.Slope(
            method,
            place,
            places[method],
            (left.miou_percent[method], right.miou_percent[method]),
            _flips_of(method, flips),
        )
        for place, method in enumerate(both)
    ]
    named = [(axis_named(results, name), standings[name].at) for name in axes]
    titles = [f"equal {axis.compute}: {amount(axis, at)}" for axis, at in named]
    return tag("figure", charts.slopes(rows, content.looks, (titles[0], titles[1])),
               data_also=exact(left.at, right.at))  # fmt: skip


def _flips_of(method: str, flips: Sequence[Flip]) -> str:
    own = [flip for flip in flips if method in (flip.first, flip.second)]
    if any((flip.probability or 0) >= SURE for flip in own):
        return "sure"
    return "maybe" if own else ""


def _flip_table(flips: Sequence[Flip], results: Results) -> Markup:
    if not flips:
        return tag("p", "No two methods change places.")
    header = ("better at equal iterations", "better at equal compute", "compute",
              "points before", "points after", "P(flip)")  # fmt: skip
    lines = [
        Line(
            [
                Cell(flip.first),
                Cell(flip.second),
                Cell(axis_named(results, flip.axes[1]).compute),
                *(signed(difference) for difference in flip.differences),
                chance(flip.probability),
            ]
        )
        for flip in flips
    ]
    return folded(
        f"Pairs that change places: {len(flips)}", len(flips) <= 12,
        sortable("Pairs of methods that change places", header, lines, header[:3]),
    )  # fmt: skip
