"""Comparisons of methods from few seeds: cell means, their covariance, pooled over methods.

A cell is a method under a budget. The model is mIoU = cell + effect of the seed under the budget +
noise, fitted by least squares: a seed has the same initial weights and order of data for all
methods, so methods are compared within a seed, and a method with fewer seeds than others is not
judged by which seeds it got.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # its submodules load at first use: scipy.stats takes half a second

Cell = tuple[str, str]
"""(method, budget)."""
Scores = Mapping[Cell, Mapping[int, float]]
"""The mIoU of each seed of each cell, in percentage points."""

POOLING_SIGNIFICANCE = 0.2
"""Variances are pooled unless a test at this level says that they differ. Few seeds give the test
little power, and pooling what differs makes intervals of noisy methods too narrow."""
POWER = 0.9
MOST_SEEDS = 1000
"""More seeds than this are not proposed."""
NULL_DRAWS = 4000
POSTERIOR_DRAWS = 10_000
ROUNDING = 1e-9
"""Percentage points below which a value or an error is 0."""


@dataclass(frozen=True)
class Contrast:
    """An estimated difference with its standard error; ``freedom`` 0 = no error is known."""

    value: float
    error: float
    freedom: float

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the ends of the two-sided interval by Student's t."""
        reach = t_quantile(0.5 + confidence / 2, self.freedom) * self.error
        return self.value - reach, self.value + reach

    def probability(self) -> float:
        """Return P(true difference > 0): the confidence distribution by Student's t."""
        if self.error == 0:
            return 0.5 + 0.5 * float(np.sign(self.value))
        return float(scipy.special.stdtr(self.freedom, self.value / self.error))


def t_quantile(level: float, freedom: float) -> float:
    """Return the quantile of Student's t."""
    return float(scipy.special.stdtrit(freedom, level))


@dataclass(frozen=True)
class SeedModel:
    """Cell means adjusted for the seeds' effects, and how they vary.

    Only differences between methods are estimated: the level that all methods share is not.
    """

    cells: list[Cell]
    means: np.ndarray
    """Of each cell, adjusted for the effects of its seeds."""
    covariance: np.ndarray
    """Of the means, from the noise of single runs, cells x cells."""
    freedom: dict[str, float]
    """Degrees of freedom of the noise's variance, by budget."""
    seed_covariance: np.ndarray
    """Of what the means of each budget share through its seeds, cells x cells. It cancels in a
    difference under one budget, not between budgets."""
    seed_freedom: float
    cell_freedom: np.ndarray | None = None
    """Degrees of freedom of each cell's own variance, if methods have no common one."""
    within_seeds: frozenset[str] = frozenset()
    """Budgets whose methods are compared within seeds; under the others their means are."""

    def contrasts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return values, standard errors and degrees of freedom of linear combinations of cells.

        Args:
            weights: combinations x cells; the weights of each combination add up to 0.

        The degrees of freedom are those of Satterthwaite 1946 for the sum of two variances.
        """
        used = np.flatnonzero(weights.any(axis=0))  # two methods' cells out of those of forty
        weights = weights[:, used]
        square = np.ix_(used, used)
        noise = np.maximum(_quadratic(weights, self.covariance[square]), 0)
        seeds = np.maximum(_quadratic(weights, self.seed_covariance[square]), 0)
        every = np.array([self.freedom[self.cells[place][1]] for place in used])
        least = np.where(weights != 0, np.maximum(every, ROUNDING), np.inf).min(axis=1)
        total = noise + seeds
        parts = noise**2 / least + (seeds**2 / self.seed_freedom if self.seed_freedom else 0)
        freedom = np.where(total > ROUNDING**2, total**2 / np.where(parts > 0, parts, 1), least)
        values, errors = weights @ self.means[used], np.sqrt(total)
        return _exact_zero(values), _exact_zero(errors), freedom

    def difference(self, budget: str, first: str, second: str) -> Contrast:
        """Return the difference between two methods under a budget."""
        weights = np.zeros((1, len(self.cells)))
        weights[0, self.cells.index((first, budget))] = 1
        weights[0, self.cells.index((second, budget))] = -1
        (value,), (error,), (freedom,) = self.contrasts(weights)
        return Contrast(float(value), float(error), float(freedom))

    def draws(self, rng: np.random.Generator) -> np.ndarray:
        """Return draws of the true means, draws x cells: multivariate t around the estimates."""
        if self.cell_freedom is not None:
            size = (POSTERIOR_DRAWS, len(self.cells))
            return self.means + rng.standard_t(self.cell_freedom, size) * np.sqrt(
                np.diag(self.covariance)
            )
        noise = _scaled_normal(rng, self.covariance, min(self.freedom.values()))
        if not self.seed_freedom:
            return self.means + noise
        return self.means + noise + _scaled_normal(rng, self.seed_covariance, self.seed_freedom)


def _quadratic(weights: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return w M w for each row w."""
    return np.einsum("ij,ij->i", weights @ matrix, weights)


def _exact_zero(values: np.ndarray) -> np.ndarray:
    """Return the values without what rounding made of 0: ties must be no evidence."""
    return np.where(np.abs(values) < ROUNDING, 0.0, values)


def _scaled_normal(rng: np.random.Generator, covariance: np.ndarray, freedom: float) -> np.ndarray:
    """Return draws of a multivariate t around 0."""
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0))
    normal = rng.standard_normal((POSTERIOR_DRAWS, len(covariance))) @ root.T
    return normal / np.sqrt(rng.chisquare(freedom, (POSTERIOR_DRAWS, 1)) / freedom)


def fit(scores: Scores, *, pool_budgets: bool) -> SeedModel:
    """Fit the model to the scores of several methods.

    Args:
        pool_budgets: True if the variance is the same under all budgets and their noise is
            independent; else each budget has its variance, and the covariance between budgets is
            that of the residuals of one method and seed (runs that share a trunk). Budgets whose
            methods are not compared within seeds are never pooled: their variance contains that of
            the seeds' effects. A budget whose runs say nothing about its variance, such as one seed
            of each method, gets that of the others.
    """
    rows = [(method, budget, seed) for method, budget in scores for seed in scores[method, budget]]
    observed = np.array([scores[method, budget][seed] for method, budget, seed in rows])
    maps = _least_squares(list(scores), rows)
    table = dict(zip(rows, maps.residuals @ observed, strict=True))
    alike = maps.within_seeds() if pool_budgets else frozenset()
    between = _between_budgets(table, maps.freedom, alike)
    noise = _noise(rows, between)
    seed_covariance, seed_freedom = _seed_covariance(maps, observed, rows, between)
    budget_of = np.array([[own == budget for budget in maps.freedom] for _, own in scores], float)
    return SeedModel(
        list(scores),
        maps.means @ observed,
        maps.means @ noise @ maps.means.T,
        _shared_freedom(maps.freedom, alike),
        budget_of @ seed_covariance @ budget_of.T,
        seed_freedom,
        within_seeds=maps.within_seeds(),
    )


def _shared_freedom(own: Mapping[str, float], alike: Collection[str]) -> dict[str, float]:
    """Return the degrees of freedom of the variance that each budget gets.

    Args:
        own: those of the budget's own residuals.
        alike: budgets that have one variance.
    """
    least = min((value for value in own.values() if value >= 1), default=0.0)
    together = _sum_known(own, alike)
    return {
        budget: together if together and budget in alike else max(value, least)
        for budget, value in own.items()
    }


def _sum_known(freedom: Mapping[str, float], budgets: Collection[str]) -> float:
    return sum(freedom[budget] for budget in budgets if freedom[budget] >= 1)


def fit_separately(scores: Scores) -> SeedModel:
    """Fit each method's own variance, without seeds' effects, for probabilities among methods whose
    variances differ. A cell with one seed has the largest variance of the others."""
    cells = list(scores)
    values = [np.array(list(scores[cell].values())) for cell in cells]
    variances = [np.var(v, ddof=1) if v.size > 1 else math.nan for v in values]
    known = [v for v in variances if not math.isnan(v)]
    worst = max(known, default=0.0)
    errors = [
        (worst if math.isnan(variance) else variance) / v.size
        for variance, v in zip(variances, values, strict=True)
    ]
    every = np.array([float(v.size - 1) for v in values])
    least = float(every[every > 0].min(initial=np.inf)) if every.any() else 0.0
    means = np.array([v.mean() for v in values])
    nothing = np.zeros((len(cells), len(cells)))
    by_budget = {budget: least for _, budget in cells}
    own = np.maximum(every, 1.0)
    return SeedModel(cells, means, np.diag(errors), by_budget, nothing, 0.0, own)


@dataclass(frozen=True)
class _Maps:
    """Linear maps from the observed scores to estimates, and degrees of freedom by budget."""

    means: np.ndarray
    residuals: np.ndarray
    seeds: dict[tuple[str, int], np.ndarray]
    """To the effect of each seed of each budget, against the mean of the budget's seeds."""
    freedom: dict[str, float]

    def within_seeds(self) -> frozenset[str]:
        """Return the budgets whose seeds have an effect in the fit."""
        return frozenset(budget for budget, _ in self.seeds)


def _least_squares(cells: list[Cell], rows: list[tuple[str, str, int]]) -> _Maps:
    """Return the fit of every budget: method + seed, or the method alone where seeds do not connect
    the methods."""
    means = np.zeros((len(cells), len(rows)))
    residuals = np.zeros((len(rows), len(rows)))
    seeds, freedom = {}, {}
    for budget in dict.fromkeys(budget for _, budget in cells):
        own = [place for place, (_, of, _) in enumerate(rows) if of == budget]
        methods = [method for method, of in cells if of == budget]
        numbers = sorted({rows[place][2] for place in own})
        design = _design([rows[place] for place in own], methods, numbers)
        inverse = np.linalg.pinv(design)
        effects = inverse[len(methods) :]
        # Adjusted mean: the method's effect plus the mean effect of all seeds.
        average = effects.sum(axis=0) / max(1, len(effects))
        places = [cells.index((method, budget)) for method in methods]
        means[np.ix_(places, own)] = inverse[: len(methods)] + average
        residuals[np.ix_(own, own)] = np.eye(len(own)) - design @ inverse
        freedom[budget] = float(len(own) - np.linalg.matrix_rank(design))
        for number, effect in zip(numbers[: len(effects)], effects - average, strict=True):
            seeds[budget, number] = np.zeros(len(rows))
            seeds[budget, number][own] = effect
    return _Maps(means, residuals, seeds, freedom)


def _design(rows: list[tuple[str, str, int]], methods: list[str], seeds: list[int]) -> np.ndarray:
    """Return the design matrix of a budget: one column per method, then one per seed.

    Without the seeds' columns if a budget has one method, or methods that share no seed, directly
    or through others: their differences could not be told from the seeds' effects. Without them,
    too, where they would leave no residual and the methods alone do, such as seeds 0 and 1 of one
    method and 1 and 2 of another: such a fit is exact for any noise, so it has no variance.
    """
    design = np.zeros((len(rows), len(methods) + len(seeds)))
    for row, (method, _, seed) in enumerate(rows):
        design[row, methods.index(method)] = 1
        design[row, len(methods) + seeds.index(seed)] = 1
    rank = np.linalg.matrix_rank(design)
    connected = rank == len(methods) + len(seeds) - 1
    # With several seeds of one method only, no pair has an interval: the means of the others are
    # better adjusted for which seeds they got.
    repeated = (design[:, : len(methods)].sum(axis=0) > 1).sum() > 1
    exact = len(rows) == rank and repeated
    return design if connected and len(methods) > 1 and not exact else design[:, : len(methods)]


def _between_budgets(
    residuals: Mapping[tuple[str, str, int], float],
    freedom: Mapping[str, float],
    alike: Collection[str],
) -> np.ndarray:
    """Return the covariance of one method and seed's noise between budgets, budgets x budgets.

    Args:
        alike: budgets that have one variance and independent noise.
    """
    between = np.zeros((len(freedom), len(freedom)))
    for i, first in enumerate(freedom):
        for j, second in enumerate(freedom):
            if first in alike or second in alike:
                continue
            products = [
                value * residuals[method, second, seed]
                for (method, budget, seed), value in residuals.items()
                if budget == first and (method, second, seed) in residuals
            ]
            between[i, j] = sum(products) / max(min(freedom[first], freedom[second]), 1)
    common = _pooled(residuals, freedom, alike)
    for place, (budget, value) in enumerate(freedom.items()):
        if budget in alike and common is not None:
            between[place, place] = common
        elif value < 1:
            between[place, place] = _pooled(residuals, freedom, freedom) or 0.0
    return _semidefinite(between)


def _pooled(
    residuals: Mapping[tuple[str, str, int], float],
    freedom: Mapping[str, float],
    budgets: Collection[str],
) -> float | None:
    """Return the variance of the residuals of some budgets; None if nothing is known of it."""
    squares = [value**2 for (_, budget, _), value in residuals.items() if budget in budgets]
    together = _sum_known(freedom, budgets)
    return sum(squares) / together if together else None


def _semidefinite(matrix: np.ndarray) -> np.ndarray:
    """Return the nearest covariance matrix: negative eigenvalues become 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def _noise(rows: list[tuple[str, str, int]], between: np.ndarray) -> np.ndarray:
    """Return the covariance of the observations: only those of one method and seed share noise."""
    budgets = list(dict.fromkeys(budget for _, budget, _ in rows))
    noise = np.zeros((len(rows), len(rows)))
    series: dict[tuple[str, int], list[int]] = {}
    for place, (method, _, seed) in enumerate(rows):
        series.setdefault((method, seed), []).append(place)
    for places in series.values():
        own = [budgets.index(rows[place][1]) for place in places]
        noise[np.ix_(places, places)] = between[np.ix_(own, own)]
    return noise


def _seed_covariance(
    maps: _Maps, observed: np.ndarray, rows: list[tuple[str, str, int]], between: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the covariance of the mean seed effect of each budget, and its degrees of freedom.

    The spread of the estimated effects, less the part that is noise: each is a mean over methods.
    """
    budgets = list(maps.freedom)
    effects = {key: float(weights @ observed) for key, weights in maps.seeds.items()}
    methods = {key: sum((b, s) == key for _, b, s in rows) for key in effects}
    of = {budget: {s for b, s in effects if b == budget} for budget in budgets}
    found = np.zeros((len(budgets), len(budgets)))
    freedom = []
    for i, first in enumerate(budgets):
        for j, second in enumerate(budgets):
            common = of[first] & of[second]
            if len(common) < 2:
                continue
            products = [effects[first, s] * effects[second, s] for s in common]
            shared = np.mean([1 / max(methods[first, s], methods[second, s]) for s in common])
            spread = sum(products) / (len(common) - 1) - between[i, j] * shared
            found[i, j] = spread * len(common) / (len(of[first]) * len(of[second]))
            freedom.append(len(common) - 1)
    return _semidefinite(found), float(min(freedom, default=0))


# May variances be pooled?


def equal_variances(groups: Iterable[Iterable[float]]) -> float:
    """Return the p-value of Bartlett's test (1937) that all groups have one variance.

    Its null distribution is drawn instead of approximated: exact for normal noise down to two
    values per group. Levene's test is not used because with two values both are equally far from
    their mean, and with three one is always at the median. Groups of one value are left out; with
    fewer than two groups the result is 1.
    """
    data = [values for group in groups if (values := np.asarray(list(group), float)).size > 1]
    if len(data) < 2:
        return 1.0
    freedom = np.array([values.size - 1 for values in data], float)
    sums = np.array([[values.var(ddof=1) * (values.size - 1) for values in data]])
    if not sums.any():
        return 1.0
    null = np.random.default_rng(0).chisquare(freedom, (NULL_DRAWS, freedom.size))
    beyond = _bartlett(null, freedom) >= _bartlett(sums, freedom)[0]
    return float((1 + beyond.sum()) / (1 + NULL_DRAWS))


def _bartlett(sums: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return Bartlett's statistic of sums of squares, one per row; infinite if one sum is 0."""
    with np.errstate(divide="ignore"):
        logs = np.log(sums / freedom)
    pooled = np.log(sums.sum(axis=1) / freedom.sum())
    return freedom.sum() * pooled - logs @ freedom


@dataclass(frozen=True)
class Pooling:
    """Whether variances are pooled over methods, and over budgets, too."""

    methods: bool
    budgets: bool


def pooling(scores: Scores, *, independent: bool) -> Pooling:
    """Decide what is pooled.

    Args:
        independent: False if budgets share a trunk: their noise is correlated then, and pooling
            over budgets would count one observation several times.
    """
    budgets = list(dict.fromkeys(budget for _, budget in scores))
    groups = {
        budget: [seeds.values() for (_, own), seeds in scores.items() if own == budget]
        for budget in budgets
    }
    tests = [equal_variances(group) for group in groups.values()]
    # Budgets that share a trunk repeat one test: Bonferroni's bound holds for these, too.
    methods = min(tests, default=1.0) * len(tests) >= POOLING_SIGNIFICANCE
    if not (methods and independent and len(budgets) > 1):
        return Pooling(methods, False)
    every = equal_variances(seeds.values() for seeds in scores.values())
    return Pooling(methods, every >= POOLING_SIGNIFICANCE)


# Several pairs, further seeds


@lru_cache
def tukey_factor(methods: int, freedom: float, confidence: float) -> float:
    """Return by how many standard errors of a difference the simultaneous interval of all pairs
    reaches (Tukey 1953, Kramer 1956)."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(confidence, methods, freedom)) / math.sqrt(2)


def further_seeds(contrast: Contrast, seeds: int, confidence: float) -> int | None:
    """Return how many seeds more would show a difference of this size with 90 % power.

    0 if it is shown already; None if more than :data:`MOST_SEEDS` are needed, or if the estimated
    difference is 0, which no number of seeds would show. The true difference may be smaller than
    the estimated one: this is a plan, not a promise.
    """
    if contrast.value == 0:
        return None
    low, high = contrast.interval(confidence)
    if low > 0 or high < 0:
        return 0
    spread = contrast.error * math.sqrt(seeds)
    numbers = np.arange(seeds + 1, seeds + MOST_SEEDS + 1)
    freedom = contrast.freedom * numbers / seeds
    needed = scipy.special.stdtrit(freedom, 0.5 + confidence / 2) + scipy.special.ndtri(POWER)
    enough = abs(contrast.value) >= needed * spread / np.sqrt(numbers)
    return int(numbers[enough.argmax()]) - seeds if enough.any() else None
