"""From the finished runs of a folder to a verdict: who is better, by how much, how surely.

Everything is computed from stored records. ``docs/verdicts.md`` has the formulas and how often the
intervals cover the truth in simulated studies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from kdprof.budget import cost_ratio
from kdprof.errors import UserError, unknown
from kdprof.records import CONTROL, REFERENCE, Interval, Run
from kdprof.stats.gain import Curve, compute_equivalent_gain, slope
from kdprof.stats.seeds import (
    ROUNDING,
    Cell,
    Contrast,
    SeedModel,
    fit,
    fit_separately,
    further_seeds,
    pooling,
    t_quantile,
    tukey_factor,
)
from kdprof.store import different_devices

from .axes import ORDERED_BY, Axis, available
from .results import Results, final_miou, run_notes, shortened
from .verdict import Flip, Gain, Pair, Standing, Verdict
from .verdict_text import sentences

CONFIDENCE = 0.95
SAME_COMPUTE = 1e-6
"""Budgets whose log compute differs less are at one amount."""
EXACT_AXES = ("iterations", "samples", "flop")
"""Axes on which the cost of a step is known without error."""


@dataclass(frozen=True)
class Evidence:
    """The scores of all finished runs, and the models that compare them."""

    results: Results
    scores: dict[Cell, dict[int, float]]
    """mIoU in percentage points of each seed of each (method, budget)."""
    pooled: SeedModel | None
    """Of all methods; None if their variances differ or nothing has two seeds."""
    pool_budgets: bool
    """True if the variance is pooled over budgets, too."""

    def seeds(self, *methods: str, budget: str) -> int:
        """Return the smallest number of seeds of some methods under a budget."""
        return min(len(self.scores[method, budget]) for method in methods)

    def model(self, first: str, second: str) -> SeedModel:
        """Return the model that compares two methods: of all, or of these two alone if variances
        are not pooled."""
        if self.pooled is not None:
            return self.pooled
        pair = frozenset((first, second))
        if pair not in self._of_pairs:
            both = {cell: found for cell, found in self.scores.items() if cell[0] in pair}
            self._of_pairs[pair] = fit(both, pool_budgets=False)
        return self._of_pairs[pair]

    @cached_property
    def of_all(self) -> SeedModel:
        """The model of all methods, each with its own variance if they are not pooled."""
        return self.pooled or fit_separately(self.scores)

    @cached_property
    def _of_pairs(self) -> dict[frozenset[str], SeedModel]:
        return {}  # every axis and budget asks for the same pairs

    def curve(self, method: str, axis: Axis) -> Curve:
        """Return a method's budgets on an axis, at the mean compute of their runs.

        Raises:
            UserError: a run has no such quantity.
        """
        left_out = self.left_out_of_curve(method)
        places = {
            cell: self._log_compute(cell, axis)
            for cell in self.scores
            if cell[0] == method and cell not in left_out
        }
        ordered = sorted(places, key=lambda cell: places[cell])
        return Curve(ordered, np.array([places[cell] for cell in ordered]))

    def left_out_of_curve(self, method: str) -> list[Cell]:
        """Return the budgets with one seed if two or more have several: they would leave the whole
        curve without an interval."""
        cells = [cell for cell in self.scores if cell[0] == method]
        single = [cell for cell in cells if len(self.scores[cell]) < 2]
        return single if len(cells) - len(single) > 1 else []

    def _log_compute(self, cell: Cell, axis: Axis) -> float:
        spent = [axis.quantity(run) for run in self.results.group(*cell)]
        known = [value for value in spent if value is not None and value > 0]
        if len(known) < len(spent):
            raise UserError(f"{axis.name} of {cell[0]} {cell[1]}: not recorded for every run")
        return float(np.log(np.mean(known)))


def evidence(results: Results) -> Evidence:
    """Return the scores of the finished runs and how they are compared."""
    scores: dict[Cell, dict[int, float]] = {}
    for method in results.methods():
        for budget in results.budgets():
            if group := results.group(method, budget):
                scores[method, budget] = {run.seed: 100 * final_miou(run) for run in group}
    found = pooling(scores, independent=not _share_trunk(results.finished))
    model = fit(scores, pool_budgets=found.budgets) if found.methods else None
    if model is not None and min(model.freedom.values()) < 1:
        model = None  # every cell has one seed
    return Evidence(results, scores, model, found.budgets)


def _share_trunk(runs: Sequence[Run]) -> bool:
    return any(run.trunk_s for run in runs)


def judge(
    results: Results,
    versus: Sequence[str] = (),
    *,
    axis: str = "seconds",
    confidence: float = CONFIDENCE,
) -> Verdict:
    """Return the verdict on the finished runs.

    Args:
        versus: the controls of the gain; by default kd and none, as far as they were trained.
        axis: the axis of compute that the sentences speak of.

    Raises:
        UserError: a control was not trained.
    """
    found = evidence(results)
    axes = _comparable_axes(results)
    controls = _controls(results.methods(), versus)
    gains = [
        gain(found, method, control, each, confidence=confidence)
        for each in axes
        if each.name != "samples"
        for control in controls
        for method in results.methods()
        if method != control
    ]
    if any(each.name == "samples" for each in axes):
        # A study has one batch size: the same curves in another unit.
        gains += [replace(one, axis="samples") for one in gains if one.axis == "iterations"]
    pairs = [
        _better_first(found, budget, first, second, confidence)
        for budget in results.budgets()
        for first, second in combinations(_ranked(found, budget), 2)
    ]
    rng = np.random.default_rng(0)
    draws = _draws(found, rng)
    standings = [standing for each in axes if (standing := _standing(found, each))]
    flips = _flips(found, axes, standings, draws)
    best = _best(found, draws)
    notes = _notes(found, axes, standings)
    headline = sentences(results, gains, pairs, best, flips, standings, axis, controls)
    return Verdict(headline, gains, pairs, best, standings, flips, notes)


def _comparable_axes(results: Results) -> list[Axis]:
    return [axis for axis in available(results) if not incomparable(results, axis.name)]


def incomparable(results: Results, axis_name: str) -> str:
    """Return why runs cannot be compared on an axis, or nothing: seconds and joules of different
    devices are different things."""
    if axis_name in ("seconds", "gpu-hours", "joules") and len(results.devices()) > 1:
        return "runs are from different devices; use iterations or flop"
    return ""


def _controls(methods: list[str], versus: Sequence[str]) -> list[str]:
    if missing := [name for name in versus if name not in methods]:
        raise UserError(*(unknown("trained method", name, methods) for name in missing))
    return list(versus) or [name for name in (CONTROL, REFERENCE) if name in methods]


def _ranked(found: Evidence, budget: str) -> list[str]:
    """Return the methods of a budget, the best mean, adjusted for seeds, first."""
    model = found.of_all
    means = {
        method: float(mean)
        for (method, own), mean in zip(model.cells, model.means, strict=True)
        if own == budget
    }
    return sorted(means, key=lambda method: (-round(means[method] / ROUNDING), method))


# Gain


def gain(
    found: Evidence, method: str, versus: str, axis: Axis, *, confidence: float = CONFIDENCE
) -> Gain:
    """Return the compute-equivalent gain of a method over a control on an axis."""
    if why := incomparable(found.results, axis.name):
        return Gain(method, versus, axis.name, None, reason=why)
    try:
        curves = [found.curve(name, axis) for name in (method, versus)]
    except UserError as error:
        return Gain(method, versus, axis.name, None, reason=str(error))
    made = Gain(method, versus, axis.name, None, **_seeds_of(found, curves))
    if short := [c.cells[0][0] for c in curves if np.ptp(c.logs) < SAME_COMPUTE]:
        reason = f"{' and '.join(short)} trained at one amount of compute: a curve needs two"
        return replace(made, reason=reason)
    model = found.model(method, versus)
    slopes = slopes_of(model, curves)
    if falling := [name for name, each in slopes.items() if each.value <= 0]:
        return replace(made, reason=does_not_rise(falling))
    without = _why_no_interval(made.seeds, slopes, confidence)
    shift = compute_equivalent_gain(
        model,
        *curves,
        confidence=confidence,
        intervals=not without,
        cost_error=0.0 if axis.name in EXACT_AXES else _cost_error(found, method, versus),
    )
    reasons = [_bound_text(method, versus, shift.bound), without]
    if not without and not shift.overlap:
        reasons.append("no equal compute: their budgets lie apart on this axis")
    return replace(
        made,
        value=shift.value,
        bound=shift.bound,
        low=shift.low,
        high=shift.high,
        has_interval=shift.has_interval,
        probability=shift.probability,
        reason="; ".join(filter(None, reasons)),
    )


def slopes_of(model: SeedModel, curves: Sequence[Curve]) -> dict[str, Contrast]:
    """Return the slope of each curve over log compute, by its method."""
    return {curve.cells[0][0]: slope(model, curve) for curve in curves}


def does_not_rise(methods: Sequence[str]) -> str:
    """Return why methods whose curves fall with compute have no gain."""
    return f"accuracy of {' and '.join(methods)} does not rise with compute"


def _seeds_of(found: Evidence, curves: Sequence[Curve]) -> dict[str, Any]:
    each = {c.cells[0][0]: min(len(found.scores[cell]) for cell in c.cells) for c in curves}
    return {"seeds": min(each.values()), "seeds_of": each}


def _why_no_interval(seeds: int, slopes: Mapping[str, Contrast], confidence: float) -> str:
    """Return why a gain has no interval, or nothing."""
    if seeds < 2:
        return "one seed, so no interval"
    if min(each.freedom for each in slopes.values()) < 1:
        return "no interval: the runs say nothing about their variance"
    why = why_doubtful(slopes, confidence)
    return f"no interval: {why}" if why else ""


def why_doubtful(slopes: Mapping[str, Contrast], confidence: float) -> str:
    """Return which curves are not shown to rise, or nothing."""
    doubtful = [
        name for name, each in slopes.items() if each.freedom < 1 or each.probability() < confidence
    ]
    if not doubtful:
        return ""
    return f"accuracy of {' and '.join(doubtful)} may not rise with compute, by these seeds"


def _bound_text(method: str, versus: str, bound: str) -> str:
    if not bound:
        return ""
    return (
        f"{method} is {'better' if bound == '>' else 'worse'} than {versus} over all compute that "
        "both curves can be compared at; nothing is extrapolated"
    )


def _cost_error(found: Evidence, method: str, versus: str) -> float:
    """Return the half-width of the 95 % interval of the log of the ratio of the two steps' costs; 0
    if the runs were not planned with Costs that have one."""
    ratio = ratio_of_costs(found.results, method, versus)
    return 0.0 if ratio is None else float(np.log(ratio.high / ratio.low)) / 2


def ratio_of_costs(results: Results, first: str, second: str) -> Interval | None:
    """Return the ratio of the costs of two methods' iterations that their runs were planned with;
    None if a run names no stored Cost that has a ratio, or the two are of different devices."""
    costs = []
    for name in (first, second):
        planned = [run for run in results.finished if run.method == name and run.cost_key]
        cost = results.cost_of(planned[-1]) if planned else None
        if cost is None or cost.ratio is None:
            return None
        costs.append(cost)
    if different_devices(costs):
        return None
    median, low, high = cost_ratio(*costs)
    return Interval(median=median, low=low, high=high)


# Differences


def pair(
    found: Evidence, budget: str, first: str, second: str, *, confidence: float = CONFIDENCE
) -> Pair:
    """Return the difference between two methods under a budget."""
    seeds = found.seeds(first, second, budget=budget)
    if seeds < 2:
        gap = _raw_difference(found, budget, first, second)
        return Pair(budget, first, second, gap, seeds=seeds, reason="one seed, so no interval")
    contrast = found.model(first, second).difference(budget, first, second)
    if contrast.freedom < 1:
        why = "no interval: the runs say nothing about their variance"
        return Pair(budget, first, second, contrast.value, seeds=seeds, reason=why)
    low, high = contrast.interval(confidence)
    reach = _simultaneous(found, budget, contrast.freedom, confidence) * contrast.error
    return Pair(
        budget,
        first,
        second,
        contrast.value,
        low,
        high,
        contrast.value - reach,
        contrast.value + reach,
        contrast.probability(),
        seeds,
        further_seeds(contrast, seeds, confidence),
    )


def _raw_difference(found: Evidence, budget: str, first: str, second: str) -> float:
    """Return the difference of means, over the seeds that both have if there are any."""
    here, there = found.scores[first, budget], found.scores[second, budget]
    common = here.keys() & there.keys()
    means = [np.mean([values[s] for s in common or values]) for values in (here, there)]
    gap = float(means[0] - means[1])
    return gap if abs(gap) > ROUNDING else 0.0


def _better_first(found: Evidence, budget: str, first: str, second: str, confidence: float) -> Pair:
    """Return the pair so that its difference is not negative: adjusted for the seeds of the two
    methods alone, it may be another than in the ranking of all."""
    made = pair(found, budget, first, second, confidence=confidence)
    if made.difference >= 0:
        return made
    return pair(found, budget, second, first, confidence=confidence)


def _simultaneous(found: Evidence, budget: str, freedom: float, confidence: float) -> float:
    """Return by how many standard errors the interval of a difference reaches that holds for all
    pairs of the budget together: Tukey-Kramer, or Bonferroni's bound without a common variance."""
    methods = sum(own == budget for _, own in found.scores)
    if found.pooled is not None:
        return tukey_factor(methods, freedom, confidence)
    pairs = methods * (methods - 1) / 2
    return t_quantile(1 - (1 - confidence) / 2 / pairs, freedom)


# Ranks


def _draws(found: Evidence, rng: np.random.Generator) -> tuple[SeedModel, np.ndarray] | None:
    """Return a model of all cells and draws of their true means; None if one seed is all."""
    model = found.of_all
    if min(model.freedom.values()) < 1:
        return None
    return model, model.draws(rng)


def _best(
    found: Evidence, draws: tuple[SeedModel, np.ndarray] | None
) -> dict[str, dict[str, float]]:
    """Return P(best) by budget and method, the most likely first; of budgets in which all methods
    have several seeds."""
    chances = {}
    for budget in found.results.budgets():
        cells = [cell for cell in found.scores if cell[1] == budget]
        if draws is None or min(len(found.scores[cell]) for cell in cells) < 2:
            continue
        model, drawn = draws
        own = drawn[:, [model.cells.index(cell) for cell in cells]]
        winners = own >= own.max(axis=1, keepdims=True) - ROUNDING
        shares = (winners / winners.sum(axis=1, keepdims=True)).mean(axis=0)
        order = np.argsort(-shares, kind="stable")
        chances[budget] = {cells[i][0]: float(shares[i]) for i in order}
    return chances


def _standing(found: Evidence, axis: Axis) -> Standing | None:
    """Return the accuracy of all methods with a curve at the largest compute that all of them
    reached, or None if there is no amount that all budgets cover."""
    curves = _curves(found, axis)
    if len(curves) < 2:
        return None
    at = min(curve.logs[-1] for curve in curves.values())
    if at < max(curve.logs[0] for curve in curves.values()):
        return None
    model = found.of_all
    scores = {
        method: float(curve.weights(at) @ model.means[[model.cells.index(c) for c in curve.cells]])
        for method, curve in curves.items()
    }
    order = sorted(scores, key=lambda method: (-round(scores[method] / ROUNDING), method))
    return Standing(axis.name, float(np.exp(at)), {method: scores[method] for method in order})


def _curves(found: Evidence, axis: Axis) -> dict[str, Curve]:
    """Return the curves of the methods that have two budgets or more."""
    curves = {method: found.curve(method, axis) for method in found.results.methods()}
    return {m: curve for m, curve in curves.items() if np.ptp(curve.logs) >= SAME_COMPUTE}


def _flips(
    found: Evidence,
    axes: Sequence[Axis],
    standings: Sequence[Standing],
    draws: tuple[SeedModel, np.ndarray] | None,
) -> list[Flip]:
    """Return the pairs whose order at equal iterations differs from that on another axis, the most
    probable flip first."""
    by_axis = {standing.axis: standing for standing in standings}
    base = by_axis.get(ORDERED_BY)
    if base is None:
        return []
    drawn = {} if draws is None else {a.name: _drawn_at(found, a, by_axis, draws) for a in axes}
    flips = []
    for other in standings:
        if other.axis in (ORDERED_BY, "samples"):  # one batch size: samples order as iterations
            continue
        both = [m for m in base.miou_percent if m in other.miou_percent]
        for first, second in combinations(both, 2):
            gaps = [s.miou_percent[first] - s.miou_percent[second] for s in (base, other)]
            if gaps[0] * gaps[1] < 0 and min(map(abs, gaps)) > ROUNDING:
                chance = None
                if drawn and _repeated(found, first, second):
                    here, there = drawn[base.axis], drawn[other.axis]
                    kept = (here[first] > here[second]) & (there[first] < there[second])
                    chance = float(kept.mean())
                axes_pair = (base.axis, other.axis)
                flips.append(Flip(first, second, axes_pair, (gaps[0], gaps[1]), chance))
    return sorted(flips, key=lambda flip: (-(flip.probability or 0), flip.axes, flip.first))


def _repeated(found: Evidence, *methods: str) -> bool:
    """Return whether the curves of some methods have several seeds."""
    numbers = [[len(s) for (m, _), s in found.scores.items() if m == method] for method in methods]
    return all(sum(number > 1 for number in own) > 1 for own in numbers)


def _drawn_at(
    found: Evidence,
    axis: Axis,
    standings: dict[str, Standing],
    draws: tuple[SeedModel, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return draws of each method's true accuracy at the standing's compute."""
    if axis.name not in standings:
        return {}
    model, drawn = draws
    at = np.log(standings[axis.name].at)
    return {
        method: drawn[:, [model.cells.index(c) for c in curve.cells]] @ curve.weights(at)
        for method, curve in _curves(found, axis).items()
    }


def _notes(found: Evidence, axes: Sequence[Axis], standings: Sequence[Standing]) -> list[str]:
    """Return how the verdict was computed and what it leaves out."""
    results = found.results
    notes = _how(found)
    cells = [cell for method in results.methods() for cell in found.left_out_of_curve(method)]
    if cells:
        notes.append(f"Left out of curves, one seed: {shortened([' '.join(c) for c in cells])}.")
    ranked = {method for standing in standings for method in standing.miou_percent}
    if standings and (left := sorted(set(results.methods()) - ranked)):
        notes.append(f"In no rank on an axis, because trained at one budget: {shortened(left)}.")
    without = [a.name for a in axes if a.name not in {s.axis for s in standings}]
    if without and len(results.budgets()) > 1:
        notes.append(f"No rank at equal {', '.join(without)}: no amount is covered by all curves.")
    if len(results.devices()) > 1:
        notes.append("Runs are from different devices: no gain in seconds or joules.")
    return notes + run_notes(results)


def _how(found: Evidence) -> list[str]:
    """Return how differences are estimated; nothing if no pair has an interval."""
    apart = {budget: _is_apart(found, budget) for budget in found.results.budgets()}
    known = {budget: one for budget, one in apart.items() if one is not None}
    if not known:
        return []
    pooled = found.pooled is not None
    how = {
        (True, True): "one variance for all methods and budgets",
        (True, False): "one variance per budget for all methods",
        (False, False): "each pair's own variance, because those of the methods differ",
    }[pooled, found.pool_budgets and pooled and not all(known.values())]
    shared = _share_trunk(found.results.finished)
    trunk = "; budgets share a trunk, so their noise is correlated" if shared else ""
    if all(known.values()):
        few = "the methods share too few seeds to be compared within seeds"
        return [f"Differences are of means over seeds, with {how}{trunk}: {few}."]
    notes = [f"Differences are within seeds, with {how}{trunk}."]
    if some := [budget for budget, one in known.items() if one]:
        notes.append(
            f"Not so at {shortened(some)}, where methods share too few seeds: differences are of "
            "means over seeds there, with the variance of that budget."
        )
    return notes


def _is_apart(found: Evidence, budget: str) -> bool | None:
    """Return whether methods are not compared within seeds under a budget, some at least; None if
    no pair of it has an interval."""
    repeated = [m for (m, own), seeds in found.scores.items() if own == budget and len(seeds) > 1]
    pairs = list(combinations(repeated, 2))
    if not pairs:
        return None
    return any(budget not in found.model(*pair).within_seeds for pair in pairs)
