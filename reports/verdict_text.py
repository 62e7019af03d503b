"""The verdict in words: the sentences at the top, and ``verdict.md``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kdprof.budget import parse_budget
from kdprof.store import Store, write_together

from .axes import COMPUTE, ORDERED_BY, Axis, available, axis
from .results import Results, count, shortened
from .text import MISSING, Grid, markdown_text, print_notes
from .verdict import Flip, Gain, Pair, Standing, Verdict

NAMED_METHODS = 4
"""The sentences name at most this many methods."""
SURE = 0.95
"""A flip with at least this probability is called one."""


def sentences(
    results: Results,
    gains: Sequence[Gain],
    pairs: Sequence[Pair],
    best: dict[str, dict[str, float]],
    flips: Sequence[Flip],
    standings: Sequence[Standing],
    chosen: str,
    controls: Sequence[str],
) -> list[str]:
    """Return the verdict in at most three sentences: gain, the largest budget, flips.

    Args:
        chosen: the axis of the gain.
    """
    found = [_gain_sentence(results, gains, chosen, controls)]
    if len(results.methods()) > 1:
        found.append(_largest_budget(results, pairs, best))
    if len(results.budgets()) > 1 and len(results.methods()) > 1:
        found.append(_flip_sentence(flips, [standing.axis for standing in standings]))
    return [sentence for sentence in found if sentence]


def _gain_sentence(
    results: Results, gains: Sequence[Gain], chosen: str, controls: Sequence[str]
) -> str:
    name = "seconds" if chosen == "gpu-hours" else chosen
    own = [gain for gain in gains if gain.axis == name]
    for control in controls:
        known = [g for g in own if g.versus == control and g.value is not None]
        if known:
            known.sort(key=lambda g: 1 / (g.value or 1))
            first = f"{_need(known[0])} of {control}'s {COMPUTE[name]} for the same mIoU"
            rest = [f"{g.method} {need_text(g)}{_sure(g)}" for g in known[1:NAMED_METHODS]]
            more = len(known) - NAMED_METHODS
            rest += [f"{more} more methods in verdict.md"] if more > 0 else []
            return "; ".join([f"{first}{_sure(known[0], seeds=True)}", *rest]) + "."
    if not controls or len(results.methods()) < 2:
        return "No gain: train a control (kd or none) and another method at two budgets."
    if len(results.budgets()) == 1:
        half = parse_budget(results.budgets()[0]).half()
        return (
            "One budget, so no compute-equivalent gain: a curve needs two; run "
            f"'kdprof train --budget {half}' with the same --out."
        )
    return (
        f"No compute-equivalent gain in {COMPUTE[name]}: "
        + (own[0].reason if own else "the runs have no comparable amount of it")
        + "."
    )


def _need(gain: Gain) -> str:
    return f"{gain.method} needs {need_text(gain)}"


def _sure(gain: Gain, *, seeds: bool = False) -> str:
    """Return in brackets how sure it is that the method needs less compute than the control."""
    if gain.seeds < 2:
        return " (one seed: may be chance)"
    name = "P(saves compute)" if seeds else "P"
    found = [] if gain.probability is None else [f"{name} {chance_text(gain.probability)}"]
    found += [count(gain.seeds, "seed")] if seeds else []
    return f" ({', '.join(found)})" if found else ""


def need_text(gain: Gain) -> str:
    """Return how much of the control's compute the method needs, the inverse of the gain:
    ``0.81x [0.74-0.90]``."""
    assert gain.value is not None, "a gain that is not known has no text"
    sign = {">": "less than ", "<": "more than ", "": ""}[gain.bound]
    return f"{sign}{_times(1 / gain.value)}{_range(gain, inverse=True)}"


def gain_text(gain: Gain) -> str:
    """Return the gain with its interval: ``1.23x [1.11-1.35]``, ``> 3.1x``, or a dash."""
    if gain.value is None:
        return MISSING
    sign = f"{gain.bound} " if gain.bound else ""
    return f"{sign}{_times(gain.value)}{_range(gain, inverse=False)}"


def _range(gain: Gain, *, inverse: bool) -> str:
    """Return the interval in brackets; an open end is said in words."""
    if gain.seeds < 2:
        return ""
    low, high = gain.low, gain.high
    if inverse:
        low, high = (None if high is None else 1 / high), (None if low is None else 1 / low)
    if low is None and high is None:
        return " [anything]"
    if low is None:
        return f" [{high:.2f} or less]"
    if high is None:
        return f" [{low:.2f} or more]"
    return f" [{low:.2f}-{high:.2f}]"


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 9.95 else f"{value:.0f}x"


def probability_text(probability: float) -> str:
    """Return ``0.98``, ``> 0.99`` or ``< 0.01``: never certainty."""
    if probability > 0.99:
        return "> 0.99"
    return "< 0.01" if probability < 0.01 else f"{probability:.2f}"


def chance_text(probability: float) -> str:
    """Return ``= 0.98``, ``> 0.99`` or ``< 0.01``."""
    text = probability_text(probability)
    return text if text[0] in "<>" else f"= {text}"


def _largest_budget(
    results: Results, pairs: Sequence[Pair], best: dict[str, dict[str, float]]
) -> str:
    budget = results.budgets()[-1]
    own = [pair for pair in pairs if pair.budget == budget]
    if not own:
        return ""
    lead = own[0]
    gap = f"{lead.difference:+.2f} points over {lead.second}"
    if lead.probability is None:
        return f"At {budget}, {lead.first} is first ({gap}); one seed, so it may be chance."
    if budget not in best:
        return f"At {budget}, {lead.first} is first ({gap} {_ends(lead)}{_decided(lead)})."
    chance = chance_text(best[budget].get(lead.first, 0.0))
    return (
        f"At {budget}, {lead.first} has the best mean (P(best) {chance}), {gap} "
        f"{_ends(lead)}{_decided(lead)}."
    )


def _ends(pair: Pair) -> str:
    return MISSING if pair.low is None else f"[{pair.low:+.2f}, {pair.high:+.2f}]"


def _decided(pair: Pair) -> str:
    if pair.more_seeds == 0:
        return ""
    if pair.more_seeds is None:
        return ": undecided, over 1000 further seeds would be needed"
    return f": undecided, about {count(pair.more_seeds, 'further seed')} would decide it"


def _flip_sentence(flips: Sequence[Flip], axes: Sequence[str]) -> str:
    """Return the flips between equal iterations and equal wall-clock, or another axis without it.

    Args:
        axes: those on which all methods can be ranked.
    """
    others = [axis for axis in axes if axis not in (ORDERED_BY, "samples")]
    if ORDERED_BY not in axes or not others:
        return (
            "Ranks at equal iterations and at equal compute: no amounts that all methods reached."
        )
    other = "seconds" if "seconds" in others else others[0]
    between = f"between equal iterations and equal {COMPUTE[other]}"
    own = [flip for flip in flips if flip.axes[1] == other]
    if sure := [flip for flip in own if (flip.probability or 0) >= SURE]:
        return f"Rank flips {between}: {shortened([_flip_text(flip) for flip in sure])}."
    if not own:
        return f"No rank flips {between}."
    known = [flip for flip in own if flip.probability is not None]
    if not known:
        return f"{count(len(own), 'rank flip')} {between}, from one seed: may be chance."
    return f"No sure rank flip {between}; the likeliest: {_flip_text(known[0])}."


def _flip_text(flip: Flip) -> str:
    chance = "" if flip.probability is None else f" (P {chance_text(flip.probability)})"
    return f"{flip.first} > {flip.second} reverses{chance}"


def print_sentences(verdict: Verdict, console: Console) -> None:
    """Print the verdict, one sentence per line."""
    print_notes(["", *verdict.sentences, ""], console)


# verdict.md, verdict.json


def render(store: Store, results: Results, verdict: Verdict) -> list[Path]:
    """Write ``reports/verdict.md`` and ``reports/verdict.json`` and return the files."""
    paths = [store.reports / "verdict.md", store.reports / "verdict.json"]
    made = json.dumps(asdict(verdict), indent=2) + "\n"
    write_together({paths[0]: markdown(results, verdict), paths[1]: made})
    return paths


def markdown(results: Results, verdict: Verdict) -> str:
    """Return the whole verdict as Markdown."""
    parts = [
        "# Verdict",
        "\n".join(f"- {markdown_text(sentence)}" for sentence in verdict.sentences),
    ]
    for each in available(results):
        for grid in _gain_grids(verdict, each):
            parts += [f"## {markdown_text(grid.title)}", grid.markdown()]
    for grid in (_flip_grid(results, verdict), *_pair_grids(verdict)):
        if grid.rows:
            parts += [f"## {markdown_text(grid.title)}", grid.markdown()]
    notes = (*_READING, *verdict.notes)
    parts += ["## Notes", "\n".join(f"- {markdown_text(note)}" for note in notes)]
    return "\n\n".join(parts) + "\n"


_READING = (
    "Gain: the factor by which the control's compute exceeds the method's at equal mIoU; above 1 "
    "the method saves compute. 'needs' is its inverse. It is the shift of one accuracy curve onto "
    "the other over log compute; nothing is extrapolated beyond the budgets.",
    "Intervals are 95 %; P is by Student's t. 'all pairs' holds for all pairs of a budget together "
    "(Tukey-Kramer; Bonferroni where variances are not pooled). Further seeds: to show a "
    "difference of this size with 90 % power.",
    "With one batch size, gain and ranks at equal samples are those at equal iterations.",
    "Not counted: the teacher's training, tuning, evaluation, checkpoints.",
)


def _gain_grids(verdict: Verdict, each: Axis) -> list[Grid]:
    own = [gain for gain in verdict.gains if gain.axis == each.name and gain.axis != "samples"]
    if all(gain.value is None for gain in own):
        return []  # the sentence says what to run
    header = ("method", "gain", "needs", "P(gain > 1)", "seeds", "note")
    return [
        Grid(
            f"Compute-equivalent gain over {control}, {COMPUTE[each.name]}",
            header,
            [_gain_cells(gain) for gain in own if gain.versus == control],
            words=("note",),
        )
        for control in dict.fromkeys(gain.versus for gain in own)
    ]


def _gain_cells(gain: Gain) -> list[str]:
    needs = MISSING if gain.value is None else need_text(gain)
    chance = MISSING if gain.probability is None else probability_text(gain.probability)
    return [gain.method, gain_text(gain), needs, chance, str(gain.seeds), gain.reason]


def _flip_grid(results: Results, verdict: Verdict) -> Grid:
    header = ("better at equal iterations", "better at equal compute", "axis", "points before",
              "points after", "P(flip)")  # fmt: skip
    rows = [
        [
            flip.first,
            flip.second,
            COMPUTE[flip.axes[1]],
            f"{flip.differences[0]:+.2f}",
            f"{flip.differences[1]:+.2f}",
            MISSING if flip.probability is None else probability_text(flip.probability),
        ]
        for flip in verdict.flips
    ]
    at = {s.axis: axis(results, s.axis).text(s.at) for s in verdict.standings}
    where = ", ".join(f"{COMPUTE[name]} {text}" for name, text in at.items())
    return Grid(f"Rank flips, read off the curves at {where}", header, rows, words=header[1:3])


def _pair_grids(verdict: Verdict) -> list[Grid]:
    header = ("better", "worse", "points", "95 %", "all pairs", "P(better)", "seeds",
              "further seeds")  # fmt: skip
    return [
        Grid(
            f"{budget}: differences",
            header,
            [_pair_cells(pair) for pair in verdict.pairs if pair.budget == budget],
            words=("worse",),
        )
        for budget in dict.fromkeys(pair.budget for pair in verdict.pairs)
    ]


def _pair_cells(pair: Pair) -> list[str]:
    wide = pair.simultaneous_low is not None
    together = f"[{pair.simultaneous_low:+.2f}, {pair.simultaneous_high:+.2f}]" if wide else MISSING
    chance = MISSING if pair.probability is None else probability_text(pair.probability)
    more = MISSING if pair.probability is None else "> 1000"
    return [
        pair.first,
        pair.second,
        f"{pair.difference:+.2f}",
        _ends(pair),
        together,
        chance,
        str(pair.seeds),
        more if pair.more_seeds is None else str(pair.more_seeds),
    ]
