"""Sequential comparisons: what the seeds trained so far say about a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from kdprof.claims import Claim
from kdprof.errors import UserError
from kdprof.records import Decision, Look, Outcome
from kdprof.stats.gain import difference_weights
from kdprof.stats.seeds import Contrast
from kdprof.stats.sequential import confidence_sequence

from .axes import axis
from .judge import does_not_rise, evidence, slopes_of, why_doubtful
from .results import Results, count, final_miou
from .text import MISSING, duration


def looks(claim: Claim, results: Results, confidence: float, max_seeds: int) -> list[Look]:
    """Return what is known after 2, 3, ... seeds, up to the decision.

    Raises:
        UserError: a claimed gain lies outside what the budgets can show.
    """
    differences = within_seeds(claim, results)[:max_seeds]
    found = []
    for seeds in range(2, len(differences) + 1):
        low, high = confidence_sequence(differences[:seeds], confidence)
        mean = float(np.mean(differences[:seeds]))
        found.append(Look(seeds=seeds, value=mean, low=_finite(low), high=_finite(high)))
        if outcome(claim, found[-1]) != "undecided":
            break
    return found


def why_no_gain(claim: Claim, results: Results, confidence: float) -> tuple[str, bool]:
    """Return why a claimed gain cannot be decided by the seeds so far, or nothing, and whether
    further seeds cannot change that.

    Both curves must rise with compute (:func:`kdprof.stats.gain.compute_equivalent_gain`). A curve
    that seeds do not show to rise may need more of them; one that they show to fall does not.
    """
    if claim.budget is not None:
        return "", False
    found = evidence(results)
    chosen, names = axis(results, claim.axis), (claim.first, claim.second)
    slopes = slopes_of(found.model(*names), [found.curve(name, chosen) for name in names])
    if falling := [name for name, each in slopes.items() if _falls(each, confidence)]:
        return f"{does_not_rise(falling)}, so there is no gain; train larger budgets", True
    return why_doubtful(slopes, confidence), False


def _falls(slope: Contrast, confidence: float) -> bool:
    """Return whether a slope is shown not to be above 0."""
    if slope.error == 0:
        return slope.value <= 0
    return slope.freedom >= 1 and slope.probability() < 1 - confidence


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None


def outcome(claim: Claim, look: Look) -> Outcome:
    """Return what an anytime-valid interval says about a claim."""
    low = -math.inf if look.low is None else look.low
    high = math.inf if look.high is None else look.high
    if claim.relation == "~":
        margin = claim.threshold
        if -margin < low and high < margin:
            return "supported"
        return "contradicted" if low > margin or high < -margin else "undecided"
    if claim.relation == "<":
        low, high = -high, -low
    return "supported" if low > 0 else "contradicted" if high < 0 else "undecided"


def within_seeds(claim: Claim, results: Results) -> list[float]:
    """Return the difference of each seed from 0 on, up to the first that a method lacks: an order
    that does not depend on which run ended first.

    For a claim about a gain g it is the mean over the common range of the first method's curve
    minus the second's at g times the compute: above 0 exactly if the gain is larger.
    """
    if claim.budget is not None:
        groups = [results.group(name, claim.budget) for name in (claim.first, claim.second)]
        first, second = ({run.seed: 100 * final_miou(run) for run in group} for group in groups)
        return [first[seed] - second[seed] for seed in _first_seeds([set(first), set(second)])]
    return _along_curves(claim, results)


def _first_seeds(sets: Sequence[set[int]]) -> list[int]:
    common = set.intersection(*sets) if sets else set()
    return list(takewhile(lambda seed: seed in common, range(len(common))))


def _along_curves(claim: Claim, results: Results) -> list[float]:
    found = evidence(results)
    chosen = axis(results, claim.axis)
    curve, control = (found.curve(name, chosen) for name in (claim.first, claim.second))
    cells = [*curve.cells, *control.cells]
    shift = math.log(claim.threshold)
    if not control.logs[0] - curve.logs[-1] <= shift <= control.logs[-1] - curve.logs[0]:
        raise UserError(
            f"the budgets cannot show a gain of {claim.threshold:g}; train budgets that are "
            "further apart"
        )
    (weights,) = difference_weights(cells, curve, control, np.array([shift]))
    return [
        float(weights @ [found.scores[cell][seed] for cell in cells])
        for seed in _first_seeds([set(found.scores[cell]) for cell in cells])
    ]


def decision_line(decision: Decision) -> str:
    """Return a decision with its interval and what was saved against training every seed."""
    if not decision.looks:
        why = decision.reason or "too few finished seeds"
        return f"{decision.outcome}: {decision.statement} ({why})"
    last = decision.looks[-1]
    ends = [MISSING if end is None else f"{end:+.2f}" for end in (last.low, last.high)]
    saved = (
        f"saved {count(decision.saved_runs, 'run')} ({duration(decision.saved_s)}) of the "
        f"{decision.max_seeds} seeds planned"
        if decision.saved_runs
        else "the limit"
    )
    return (
        f"{decision.outcome}: {decision.statement} ({last.value:+.2f} points "
        f"[{ends[0]}, {ends[1]}] after {count(decision.seeds, 'seed')}; {saved})"
    )
