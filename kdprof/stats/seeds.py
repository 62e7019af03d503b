"""Comparisons of methods from few seeds: cell means, their covariance, pooled over methods.

A cell is a method under a budget. The model is mIoU = cell + effect of the seed under the budget +
noise, fitted by least squares: a seed has the same initial weights and order of data for all
methods, so methods are compared within a seed, and a method with fewer seeds than others is not
judged by which seeds it got.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # its submodules load at first use: scipy.stats takes half a second

Cell = tuple[str, str]
"""(method, budget)."""
Scores = Mapping[Cell, Mapping[int, float]]
"""The mIoU of each seed of each cell, in percentage points."""

POOLING_SIGNIFICANCE = 0.05
"""Variances are pooled unless a test at this level says that they differ."""
POWER = 0.9
MOST_SEEDS = 1000
"""More seeds than this are not proposed."""
NULL_DRAWS = 4000
POSTERIOR_DRAWS = 10_000


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
    """Cell means adjusted for the seeds' effects, and their covariance.

    Only differences between methods are meaningful in ``covariance``: the level that all methods
    share is not estimated.
    """

    cells: list[Cell]
    means: np.ndarray
    """Of each cell, adjusted for the effects of its seeds."""
    covariance: np.ndarray
    """Of the means, cells x cells."""
    freedom: dict[str, float]
    """Degrees of freedom of the variance, by budget."""

    def contrasts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the values and standard errors of linear combinations of the cells.

        Args:
            weights: combinations x cells; the weights of each combination add up to 0.
        """
        variance = np.einsum("ij,ij->i", weights @ self.covariance, weights)
        return weights @ self.means, np.sqrt(np.maximum(variance, 0))

    def difference(self, budget: str, first: str, second: str) -> Contrast:
        """Return the difference between two methods under a budget."""
        weights = np.zeros((1, len(self.cells)))
        weights[0, self.cells.index((first, budget))] = 1
        weights[0, self.cells.index((second, budget))] = -1
        (value,), (error,) = self.contrasts(weights)
        return Contrast(float(value), float(error), self.freedom[budget])

    def freedom_of(self, budgets: Iterable[str]) -> float:
        """Return the degrees of freedom of a contrast over several budgets: the smallest."""
        return min(self.freedom[budget] for budget in budgets)

    def draws(self, rng: np.random.Generator) -> np.ndarray:
        """Return draws of the true means, draws x cells: multivariate t around the estimates."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))
        noise = rng.standard_normal((POSTERIOR_DRAWS, len(self.cells))) @ root.T
        freedom = min(self.freedom.values())
        scale = np.sqrt(rng.chisquare(freedom, (POSTERIOR_DRAWS, 1)) / freedom)
        return self.means + noise / scale


def fit(scores: Scores, *, pool_budgets: bool) -> SeedModel:
    """Fit the model to the scores of several methods.

    Args:
        pool_budgets: True if the variance is the same under all budgets and their noise is
            independent; else each budget has its variance, and the covariance between budgets is
            that of the residuals of one method and seed (runs that share a trunk).
    """
    cells = list(scores)
    index = [(method, budget, seed) for method, budget in cells for seed in scores[method, budget]]
    observed = np.array([scores[method, budget][seed] for method, budget, seed in index])
    means_of, residual_of, freedom = _least_squares(cells, index)
    residuals = residual_of @ observed
    noise = _noise(index, residuals, freedom, pool_budgets)
    covariance = means_of @ noise @ means_of.T
    if pool_budgets:
        freedom = dict.fromkeys(freedom, sum(freedom.values()))
    return SeedModel(cells, means_of @ observed, covariance, freedom)


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
    freedom = float(min((v.size - 1 for v in values if v.size > 1), default=0))
    means = np.array([v.mean() for v in values])
    return SeedModel(cells, means, np.diag(errors), {budget: freedom for _, budget in cells})


def _least_squares(
    cells: list[Cell], index: list[tuple[str, str, int]]
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Return the maps from observations to adjusted means and to residuals, and the degrees of
    freedom by budget. Every budget is a fit of its own: method + seed, or the method alone where
    seeds do not connect the methods."""
    means_of = np.zeros((len(cells), len(index)))
    residual_of = np.zeros((len(index), len(index)))
    freedom = {}
    for budget in dict.fromkeys(budget for _, budget in cells):
        rows = [i for i, (_, own, _) in enumerate(index) if own == budget]
        methods = [method for method, own in cells if own == budget]
        design = _design([index[i] for i in rows], methods)
        inverse = np.linalg.pinv(design)
        # Adjusted mean: the method's effect plus the mean effect of all seeds.
        average = inverse[len(methods) :].sum(axis=0) / max(1, design.shape[1] - len(methods))
        places = [cells.index((method, budget)) for method in methods]
        means_of[np.ix_(places, rows)] = inverse[: len(methods)] + average
        residual_of[np.ix_(rows, rows)] = np.eye(len(rows)) - design @ inverse
        freedom[budget] = float(len(rows) - np.linalg.matrix_rank(design))
    return means_of, residual_of, freedom


def _design(rows: list[tuple[str, str, int]], methods: list[str]) -> np.ndarray:
    """Return the design matrix of a budget: one column per method, then one per seed.

    Without the seeds' columns if a budget has one method, or methods that share no seed, directly
    or through others: their differences could not be told from the seeds' effects.
    """
    seeds = sorted({seed for _, _, seed in rows})
    design = np.zeros((len(rows), len(methods) + len(seeds)))
    for row, (method, _, seed) in enumerate(rows):
        design[row, methods.index(method)] = 1
        design[row, len(methods) + seeds.index(seed)] = 1
    connected = np.linalg.matrix_rank(design) == len(methods) + len(seeds) - 1
    return design if connected and len(methods) > 1 else design[:, : len(methods)]


def _noise(
    index: list[tuple[str, str, int]],
    residuals: np.ndarray,
    freedom: Mapping[str, float],
    pool_budgets: bool,
) -> np.ndarray:
    """Return the covariance of the observations."""
    if pool_budgets:
        variance = float(residuals @ residuals) / max(sum(freedom.values()), 1)
        return variance * np.eye(len(index))
    table = dict(zip(index, residuals, strict=True))
    between = {}
    for first in freedom:
        for second in freedom:
            products = [
                value * table[method, second, seed]
                for (method, budget, seed), value in table.items()
                if budget == first and (method, second, seed) in table
            ]
            between[first, second] = sum(products) / max(min(freedom[first], freedom[second]), 1)
    noise = np.zeros((len(index), len(index)))
    series: dict[tuple[str, int], list[int]] = {}
    for i, (method, _, seed) in enumerate(index):
        series.setdefault((method, seed), []).append(i)
    for places in series.values():
        budgets = [index[i][1] for i in places]
        noise[np.ix_(places, places)] = [[between[a, b] for b in budgets] for a in budgets]
    return noise


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

    0 if it is shown already; None if more than :data:`MOST_SEEDS` are needed. The true difference
    may be smaller than the estimated one: this is a plan, not a promise.
    """
    low, high = contrast.interval(confidence)
    if low > 0 or high < 0:
        return 0
    spread = contrast.error * math.sqrt(seeds)
    numbers = np.arange(seeds + 1, seeds + MOST_SEEDS + 1)
    freedom = contrast.freedom * numbers / seeds
    needed = scipy.special.stdtrit(freedom, 0.5 + confidence / 2) + scipy.special.ndtri(POWER)
    enough = abs(contrast.value) >= needed * spread / np.sqrt(numbers)
    return int(numbers[enough.argmax()]) - seeds if enough.any() else None
