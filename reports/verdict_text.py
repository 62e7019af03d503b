"""The verdict in words: the sentences at the top, and ``verdict.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from kdprof.budget import parse_budget
from kdprof.store import Store, write_together

from .axes import COMPUTE, ORDERED_BY, Axis, available, axis
from .results import Results, count, shortened
from .text import MISSING, Grid, factor, markdown_text, print_notes
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
        found.append(_flip_sentence(results, flips, [standing.axis for standing in standings]))
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
            rest += _not_known([g for g in own if g.versus == control and g.value is None])
            return "; ".join([f"{first}{_sure(known[0], seeds=True)}", *rest]) + "."
    if not controls or len(results.methods()) < 2:
        return "No gain: train a control (kd or none) and another method at two budgets."
    if len(results.budgets()) == 1:
        half = parse_budget(results.budgets()[0]).half()
        return (
            "One budget, so no compute-equivalent gain: a curve needs two; run "
            f"'kdprof train --budget {half}' with the same --out."
        )
    why = "the runs have no comparable amount of it"
    if len(results.devices()) > 1 and name in ("seconds", "joules"):
        why = "runs are from different devices"
    return f"No compute-equivalent gain in {COMPUTE[name]}: {own[0].reason if own else why}."


def _not_known(gains: Sequence[Gain]) -> list[str]:
    """Return which methods have no gain, and why if one reason is to be told."""
    if not gains:
        return []
    reasons = {gain.reason for gain in gains}
    why = reasons.pop() if len(reasons) == 1 else "verdict.md says why"
    return [f"no gain of {shortened([gain.method for gain in gains])}: {why}"]


def _need(gain: Gain) -> str:
    return f"{gain.method} needs {need_text(gain)}"


def _sure(gain: Gain, *, seeds: bool = False) -> str:
    """Return in brackets how sure it is that the method needs less compute than the control."""
    if gain.seeds < 2:
        return " (one seed: may be chance)"
    if not gain.has_interval:
        return f" ({gain.reason})"
    name = "P(saves compute)" if seeds else "P"
    found = [] if gain.probability is None else [f"{name} {chance_text(gain.probability)}"]
    found += [count(gain.seeds, "seed")] if seeds else []
    return f" ({', '.join(found)})" if found else ""


def need_text(gain: Gain) -> str:
    """Return how much of the control's compute the method needs, the inverse of the gain:
    ``0.81x [0.74-0.90]``."""
    assert gain.value is not None, "a gain that is not known has no text"
    sign = {">": "less than ", "<": "more than ", "": ""}[gain.bound]
    return f"{sign}{factor(1 / gain.value)}x{_range(gain, inverse=True)}"


def gain_text(gain: Gain) -> str:
    """Return the gain with its interval: ``1.23x [1.11-1.35]``, ``> 3.1x``, or a dash."""
    if gain.value is None:
        return MISSING
    sign = f"{gain.bound} " if gain.bound else ""
    return f"{sign}{factor(gain.value)}x{_range(gain, inverse=False)}"


def _range(gain: Gain, *, inverse: bool) -> str:
    """Return the interval in brackets; an open end is said in words."""
    if not gain.has_interval:
        return ""
    low, high = gain.low, gain.high
    if inverse:
        low, high = (None if high is None else 1 / high), (None if low is None else 1 / low)
    if low is None:
        return " [anything]" if high is None else f" [{factor(high)} or less]"
    return f" [{factor(low)} or more]" if high is None else f" [{factor(low)}-{factor(high)}]"


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
    """Return who is best under the largest budget of compute; under one of equal work, such as
    equal iterations, only if there is no other, and then it says so."""
    compared = [b for b in results.budgets() if any(pair.budget == b for pair in pairs)]
    if not compared:
        return ""
    compute = [budget for budget in compared if parse_budget(budget).is_compute]
    budget = (compute or compared)[-1]
    at = f"At {budget}"
    if not compute:
        at = f"At equal {parse_budget(budget).matches} ({budget}), not equal compute"
    lead = next(pair for pair in pairs if pair.budget == budget)
    return f"{at}, {_lead_text(lead, best.get(budget))}."


def _lead_text(lead: Pair, best: dict[str, float] | None) -> str:
    chance = f"P(best) {chance_text(best.get(lead.first, 0.0))}" if best else ""
    if lead.difference == 0:
        same = f"{lead.first} and {lead.second} have the same mean"
        if lead.seeds < 2:
            return f"{same}; one seed, so it may be chance"
        return f"{same} ({chance})" if chance else same
    gap = f"{lead.difference:+.2f} points over {lead.second}"
    if lead.probability is None:
        why = "one seed, so it may be chance" if lead.seeds < 2 else lead.reason
        return f"{lead.first} is first ({gap}); {why}"
    ends = f"{_ends(lead)}{_decided(lead)}"
    if not chance:
        return f"{lead.first} is first ({gap} {ends})"
    return f"{lead.first} has the best mean ({chance}), {gap} {ends}"


def _ends(pair: Pair) -> str:
    return MISSING if pair.low is None else f"[{pair.low:+.2f}, {pair.high:+.2f}]"


def _decided(pair: Pair) -> str:
    if pair.more_seeds == 0:
        return ""
    if pair.more_seeds is None:
        return ": undecided, over 1000 further seeds would be needed"
    return f": undecided, about {count(pair.more_seeds, 'further seed')} would decide it"


def _flip_sentence(results: Results, flips: Sequence[Flip], axes: Sequence[str]) -> str:
    """Return the flips between equal iterations and equal wall-clock, or another axis without it.

    Args:
        axes: those on which all methods with a curve can be ranked.
    """
    others = [axis for axis in axes if axis not in (ORDERED_BY, "samples")]
    if ORDERED_BY not in axes or not others:
        why = "no amounts that the curves of all methods reach"
        if len(results.devices()) > 1:
            why = "the runs are from different devices"
        return f"No ranks at equal iterations and at equal compute: {why}."
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
        for grid in _gain_grids(results, verdict, each):
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


def _gain_grids(results: Results, verdict: Verdict, each: Axis) -> list[Grid]:
    own = [gain for gain in verdict.gains if gain.axis == each.name and gain.axis != "samples"]
    if all(gain.value is None for gain in own):
        return []  # the sentence says what to run
    header = ("method", "gain", "needs", "P(gain > 1)", "seeds", "note")
    names = results.flagged_names()
    return [
        Grid(
            f"Compute-equivalent gain over {names[control]}, {COMPUTE[each.name]}",
            header,
            [_gain_cells(gain, names) for gain in own if gain.versus == control],
            words=("note",),
        )
        for control in dict.fromkeys(gain.versus for gain in own)
    ]


def _gain_cells(gain: Gain, names: Mapping[str, str]) -> list[str]:
    needs = MISSING if gain.value is None else need_text(gain)
    chance = MISSING if gain.probability is None else probability_text(gain.probability)
    return [names[gain.method], gain_text(gain), needs, chance, str(gain.seeds), gain.reason]


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
            f"{budget}: differences at equal {parse_budget(budget).matches}",
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
    return [
        pair.first,
        pair.second,
        f"{pair.difference:+.2f}",
        _ends(pair),
        together,
        chance,
        str(pair.seeds),
        further_text(pair),
    ]


def further_text(pair: Pair) -> str:
    """Return how many further seeds would decide a pair: ``12``, ``> 1000``, or a dash if no number
    would."""
    if pair.more_seeds is not None:
        return str(pair.more_seeds)
    return MISSING if pair.probability is None or pair.difference == 0 else "> 1000"
