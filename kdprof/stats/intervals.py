"""Intervals: medians, ratios, means over seeds, drift, outliers. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy  # its submodules load at first use: scipy.stats takes half a second

RESAMPLES = 500
CONFIDENCE = 0.95
STOPPING_MARGIN = 1.05
"""Widens an interval because of adaptive stopping: in simulations it lowers the share of wrong
conclusions from just under 5 % to 4 %."""
OUTLIER_DEVIATIONS = 5.0
"""A sample this many robust standard deviations above the median is an outlier."""
NORMAL_DEVIATION = 1.4826
"""Converts a median absolute deviation to a standard deviation, for normal noise."""
DRIFT_SIGNIFICANCE = 0.01
"""The significance level of the test for drift of the canary."""

Rounds = Sequence[Sequence[float]]
Numbers = tuple[float, float, float]
"""(median, low, high)."""


def _round_levels(rounds: Rounds) -> np.ndarray:
    """Return the log of each round's median. Steps of one round are correlated (clock, cache,
    load), so a round counts as one observation."""
    return np.log([float(np.median(samples)) for samples in rounds])


def block_length(values: np.ndarray) -> int:
    """Return how many neighbouring values a bootstrap must keep together.

    This is the rule of Carlstein (1986) for a first-order autoregression. Its coefficient is
    estimated on ranks, which are robust to outliers. The result is at most a quarter of the values,
    and 1 if neighbours are not positively correlated.
    """
    count = len(values)
    ranks = _ranks(values) - (count + 1) / 2
    spread = float(np.square(ranks).sum())
    if spread == 0:
        return 1
    correlation = float((ranks[1:] * ranks[:-1]).sum()) / spread
    if correlation <= 1 / math.sqrt(count):
        return 1
    best = (1.5 * count * (2 * correlation / (1 - correlation**2)) ** 2) ** (1 / 3)
    return max(1, min(round(best), count // 4))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, from 1; equal values have the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _t_quantile(freedom: float) -> float:
    """Return by how many standard errors a two-sided interval of Student's t reaches."""
    return float(scipy.special.stdtrit(freedom, 0.5 + CONFIDENCE / 2))


def _median_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the median of values in order of time and the half-width of its 95 % interval.

    The standard error comes from a circular block bootstrap (Politis and Romano 1992). The quantile
    is that of Student's t, with the number of blocks minus one as degrees of freedom, because
    percentiles of a bootstrap over a dozen rounds would be too narrow. The error is at least that
    of a normal sample with the same median absolute deviation. It is widened by STOPPING_MARGIN:
    measuring stops when the interval is narrow, which favours intervals that are too narrow by
    chance.
    """
    count, length = len(values), block_length(values)
    blocks = count / length
    rng = np.random.default_rng(0)
    starts = rng.integers(count, size=(RESAMPLES, math.ceil(blocks)))
    drawn = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    middle, freedom = float(np.median(values)), max(blocks - 1, 1.0)
    resampled = float(np.median(values[drawn], axis=1).std(ddof=1)) * math.sqrt(blocks / freedom)
    deviation = NORMAL_DEVIATION * float(np.median(np.abs(values - middle)))
    error = max(resampled, math.sqrt(math.pi / 2 / blocks) * deviation)
    return middle, STOPPING_MARGIN * error * _t_quantile(freedom)


def _from_logs(middle: float, half_width: float) -> Numbers:
    ends = (middle, middle - half_width, middle + half_width)
    return tuple(math.exp(value) for value in ends)  # type: ignore[return-value]


def median_interval(rounds: Rounds) -> Numbers:
    """Return (median of the rounds' medians, low, high), 95 % by block bootstrap over rounds.

    ``rounds`` are in order of time, at least two. The interval is symmetric on a log scale.
    """
    return _from_logs(*_median_and_error(_round_levels(rounds)))


def paired_ratio(rounds: Rounds, reference: Rounds) -> Numbers:
    """Return (median ratio of the rounds' medians, low, high), 95 %.

    Round i of both was measured interleaved, so that drift of the machine cancels in its ratio.
    """
    return _from_logs(*_median_and_error(_round_levels(rounds) - _round_levels(reference)))


def unpaired_ratio(rounds: Rounds, reference: Rounds) -> Numbers:
    """Return (ratio of the medians, low, high), 95 %, of two independent sessions."""
    return ratio_of(median_interval(rounds), median_interval(reference))


def ratio_of(above: Numbers, below: Numbers) -> Numbers:
    """Return (ratio, low, high) of two independent estimates: errors add in quadrature."""
    (top, top_error), (bottom, bottom_error) = map(_to_logs, (above, below))
    return _from_logs(top - bottom, math.hypot(top_error, bottom_error))


def product_of(first: Numbers, second: Numbers) -> Numbers:
    """Return (product, low, high) of two independent estimates."""
    (one, one_error), (two, two_error) = map(_to_logs, (first, second))
    return _from_logs(one + two, math.hypot(one_error, two_error))


def _to_logs(interval: Numbers) -> tuple[float, float]:
    median, low, high = map(math.log, interval)
    return median, (high - low) / 2


def relative_width(interval: Numbers) -> float:
    """Return the width of an interval as a fraction of its median."""
    median, low, high = interval
    return (high - low) / median


def drift_of(samples: Sequence[float], tolerance: float) -> tuple[float, bool]:
    """Return how far a fixed kernel's time drifted, and whether it was steady.

    Args:
        samples: in order of time; fewer than four are too few for the test and count as steady.
        tolerance: relative drift that does not matter.

    The drift is the largest relative difference between the medians of four quarters of the
    samples. Not steady: it exceeds the tolerance, and the first half differs from the second, or
    the middle half from the rest, by more than chance (Mann-Whitney, both at half the level). Two
    groups are compared because four would have too little power for a dozen samples, the number in
    a short measurement.
    """
    if len(samples) < 4:
        return max(samples) / min(samples) - 1, True
    quarters = np.array_split(np.asarray(samples, float), 4)
    levels = [float(np.median(part)) for part in quarters]
    drift = max(levels) / min(levels) - 1
    if drift <= tolerance:
        return drift, True
    first, second, third, last = quarters
    halves = ((first, second), (third, last)), ((second, third), (first, last))
    chance = min(
        scipy.stats.mannwhitneyu(np.concatenate(one), np.concatenate(other)).pvalue
        for one, other in halves
    )
    return drift, bool(chance >= DRIFT_SIGNIFICANCE / 2)


def outliers(rounds: Rounds) -> list[tuple[int, int, float]]:
    """Return (round, step, times the median) of every sample far above the others.

    The limit is a multiple of the median absolute deviation of all samples, on a log scale.
    """
    logs = [np.log(samples) for samples in rounds]
    everything = np.concatenate(logs)
    level = float(np.median(everything))
    deviation = NORMAL_DEVIATION * float(np.median(np.abs(everything - level)))
    limit = OUTLIER_DEVIATIONS * deviation
    return [
        (number, step, math.exp(value - level))
        for number, part in enumerate(logs)
        for step, value in enumerate(part)
        if limit and value - level > limit
    ]


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return (mean, low, high), 95 % by Student's t; the ends are None for a single value."""
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if data.size < 2:
        return mean, None, None
    if np.ptp(data) == 0:
        return mean, mean, mean
    reach = _t_quantile(data.size - 1) * float(data.std(ddof=1)) / math.sqrt(data.size)
    return mean, mean - reach, mean + reach
