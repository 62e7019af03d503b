"""From the finished runs of a folder to a verdict: who is better, by how much, how surely.

Everything is computed from stored records. ``docs/verdicts.md`` has the formulas and how often the
intervals cover the truth in simulated studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from kdprof.budget import cost_ratio
from kdprof.errors import UserError, unknown
from kdprof.records import CONTROL, REFERENCE, Run
from kdprof.stats.gain import Curve, compute_equivalent_gain
from kdprof.stats.seeds import (
    Cell,
    SeedModel,
    fit,
    fit_separately,
    further_seeds,
    pooling,
    t_quantile,
    tukey_factor,
)

from .axes import Axis, available
from .results import Results, classes_notes, decision_note, final_miou
from .verdict import Flip, Gain, Pair, Standing, Verdict
from .verdict_text import sentences

CONFIDENCE = 0.95
ORDERED_BY = "iterations"
"""Rank flips are searched between this axis, at which papers compare, and every other."""


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

    def seeds(self, *methods: str, budget: str | None = None) -> int:
        """Return the smallest number of seeds of some methods, under all budgets or one."""
        return min(
            len(found)
            for (method, own), found in self.scores.items()
            if method in methods and budget in (None, own)
        )

    def model(self, first: str, second: str) -> SeedModel:
        """Return the model that compares two methods: of all, or of these two alone if variances
        are not pooled."""
        if self.pooled is not None:
            return self.pooled
        both = {cell: found for cell, found in self.scores.items() if cell[0] in (first, second)}
        return fit(both, pool_budgets=False)

    def curve(self, method: str, axis: Axis) -> Curve:
        """Return a method's budgets on an axis, at the mean compute of their runs."""
        places = {}
        for cell in self.scores:
            if cell[0] == method:
                spent = [axis.quantity(run) for run in self.results.group(*cell)]
                places[cell] = float(np.log(np.mean([x for x in spent if x is not None])))
        cells = sorted(places, key=lambda cell: places[cell])
        return Curve(cells, np.array([places[cell] for cell in cells]))


def evidence(results: Results) -> Evidence:
    """Return the scores of the finished runs and how they are compared."""
    scores: dict[Cell, dict[int, float]] = {}
    for method in results.methods():
        for budget in results.budgets():
            if group := results.group(method, budget):
                scores[method, budget] = {run.seed: 100 * final_miou(run) for run in group}
    found = pooling(scores, independent=not _share_trunk(results.finished))
    replicated = any(len(seeds) > 1 for seeds in scores.values())
    model = fit(scores, pool_budgets=found.budgets) if found.methods and replicated else None
    if model is not None and min(model.freedom.values()) < 1:
        model = None  # under one budget all methods have one seed
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
        for control in controls
        for method in results.methods()
        if method != control
    ]
    pairs = [
        pair(found, budget, first, second, confidence=confidence)
        for budget in results.budgets()
        for first, second in combinations(_ranked(found, budget), 2)
    ]
    rng = np.random.default_rng(0)
    draws = _draws(found, rng)
    standings = [standing for each in axes if (standing := _standing(found, each))]
    flips = _flips(found, axes, standings, draws)
    best = _best(found, draws)
    notes = _notes(found, axes, standings)
    headline = sentences(results, gains, pairs, best, flips, axis, controls)
    return Verdict(headline, gains, pairs, best, standings, flips, notes)


def _comparable_axes(results: Results) -> list[Axis]:
    """Return the axes; seconds and joules of different devices cannot be compared."""
    axes = available(results)
    if len(results.devices()) > 1:
        axes = [axis for axis in axes if axis.name not in ("seconds", "joules")]
    return axes


def _controls(methods: list[str], versus: Sequence[str]) -> list[str]:
    if missing := [name for name in versus if name not in methods]:
        raise UserError(*(unknown("trained method", name, methods) for name in missing))
    return list(versus) or [name for name in (CONTROL, REFERENCE) if name in methods]


def _ranked(found: Evidence, budget: str) -> list[str]:
    """Return the methods of a budget, the best mean first."""
    means = {
        method: float(np.mean(list(seeds.values())))
        for (method, own), seeds in found.scores.items()
        if own == budget
    }
    return sorted(means, key=lambda method: (-means[method], method))


# Gain


def gain(
    found: Evidence, method: str, versus: str, axis: Axis, *, confidence: float = CONFIDENCE
) -> Gain:
    """Return the compute-equivalent gain of a method over a control on an axis."""
    seeds = found.seeds(method, versus)
    curves = [found.curve(name, axis) for name in (method, versus)]
    if single := [c.cells[0][0] for c in curves if len(c.cells) < 2]:
        reason = f"{' and '.join(single)} trained at one budget: a curve needs two"
        return Gain(method, versus, axis.name, None, seeds=seeds, reason=reason)
    repeated = seeds > 1
    model = found.model(method, versus)
    shift = compute_equivalent_gain(
        model,
        *curves,
        confidence=confidence,
        intervals=repeated,
        cost_error=_cost_error(found, method, versus) if axis.name in ("seconds", "joules") else 0,
    )
    reasons = []
    if shift.bound:
        better = "better" if shift.bound == ">" else "worse"
        reasons.append(
            f"{method} is {better} than {versus} over all compute that both curves can be compared "
            "at; nothing is extrapolated"
        )
    if not repeated:
        reasons.append("one seed, so no interval")
    elif not shift.overlap:
        reasons.append("no equal compute: their budgets lie apart on this axis")
    return Gain(
        method,
        versus,
        axis.name,
        shift.value,
        shift.bound,
        shift.low,
        shift.high,
        shift.probability,
        seeds,
        "; ".join(reasons),
    )


def _cost_error(found: Evidence, method: str, versus: str) -> float:
    """Return the half-width of the 95 % interval of the log of the ratio of the two steps' costs; 0
    if the runs were not planned with Costs that have one."""
    costs = [found.results.cost_of(_a_run(found.results, name)) for name in (method, versus)]
    if any(cost is None or cost.ratio is None for cost in costs):
        return 0.0
    _, low, high = cost_ratio(*costs)  # type: ignore[arg-type]
    return float(np.log(high / low)) / 2


def _a_run(results: Results, method: str) -> Run:
    return next(run for run in reversed(results.finished) if run.method == method)


# Differences


def pair(
    found: Evidence, budget: str, first: str, second: str, *, confidence: float = CONFIDENCE
) -> Pair:
    """Return the difference between two methods under a budget."""
    seeds = found.seeds(first, second, budget=budget)
    if seeds < 2:
        values = [np.mean(list(found.scores[name, budget].values())) for name in (first, second)]
        return Pair(budget, first, second, float(values[0] - values[1]), seeds=seeds)
    contrast = found.model(first, second).difference(budget, first, second)
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
    """Return a model of all methods and draws of their true means; None if one seed is all."""
    model = found.pooled
    if model is None:
        if min(map(len, found.scores.values())) < 2:
            return None
        model = fit_separately(found.scores)
    return model, model.draws(rng)


def _best(
    found: Evidence, draws: tuple[SeedModel, np.ndarray] | None
) -> dict[str, dict[str, float]]:
    """Return P(best) by budget and method, the most likely first."""
    chances = {}
    for budget in found.results.budgets():
        cells = [cell for cell in found.scores if cell[1] == budget]
        if draws is None or min(len(found.scores[cell]) for cell in cells) < 2:
            continue
        model, drawn = draws
        winners = drawn[:, [model.cells.index(cell) for cell in cells]].argmax(axis=1)
        shares = np.bincount(winners, minlength=len(cells)) / len(winners)
        order = np.argsort(-shares, kind="stable")
        chances[budget] = {cells[i][0]: float(shares[i]) for i in order}
    return chances


def _standing(found: Evidence, axis: Axis) -> Standing | None:
    """Return the accuracy of all methods at the largest compute that all of them reached, or None
    if there is no amount that all budgets cover."""
    curves = {method: found.curve(method, axis) for method in found.results.methods()}
    at = min(curve.logs[-1] for curve in curves.values())
    if at < max(curve.logs[0] for curve in curves.values()):
        return None
    model = found.pooled or fit_separately(found.scores)
    scores = {
        method: float(curve.weights(at) @ model.means[[model.cells.index(c) for c in curve.cells]])
        for method, curve in curves.items()
    }
    order = sorted(scores, key=lambda method: (-scores[method], method))
    return Standing(axis.name, float(np.exp(at)), {method: scores[method] for method in order})


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
        for first, second in combinations(base.miou_percent, 2):
            gaps = [s.miou_percent[first] - s.miou_percent[second] for s in (base, other)]
            if gaps[0] * gaps[1] < 0:
                chance = None
                if drawn and found.seeds(first, second) > 1:
                    here, there = drawn[base.axis], drawn[other.axis]
                    kept = (here[first] > here[second]) & (there[first] < there[second])
                    chance = float(kept.mean())
                axes_pair = (base.axis, other.axis)
                flips.append(Flip(first, second, axes_pair, (gaps[0], gaps[1]), chance))
    return sorted(flips, key=lambda flip: (-(flip.probability or 0), flip.axes, flip.first))


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
    curves = {method: found.curve(method, axis) for method in found.results.methods()}
    return {
        method: drawn[:, [model.cells.index(c) for c in curve.cells]] @ curve.weights(at)
        for method, curve in curves.items()
    }


def _notes(found: Evidence, axes: Sequence[Axis], standings: Sequence[Standing]) -> list[str]:
    """Return how the verdict was computed and what it leaves out."""
    notes = []
    if max(map(len, found.scores.values())) > 1:
        how = {
            (True, True): "one variance for all methods and budgets",
            (True, False): "one variance per budget for all methods",
            (False, False): "each pair's own variance, because those of the methods differ",
        }[found.pooled is not None, found.pool_budgets and found.pooled is not None]
        shared = _share_trunk(found.results.finished)
        trunk = "; budgets share a trunk, so their noise is correlated" if shared else ""
        notes.append(f"Differences are within seeds, with {how}{trunk}.")
    without = [a.name for a in axes if a.name not in {s.axis for s in standings}]
    if without and len(found.results.budgets()) > 1:
        notes.append(f"No rank at equal {', '.join(without)}: no amount is covered by all methods.")
    if len(found.results.devices()) > 1:
        notes.append("Runs are from different devices: no gain in seconds or joules.")
    notes += classes_notes(found.results.finished)
    return notes + list(map(decision_note, found.results.decisions))
