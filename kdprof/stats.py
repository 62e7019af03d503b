"""Intervals: medians, ratios of medians, means over seeds. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


def _resampled_medians(
    samples: np.ndarray, rng: np.random.Generator, pick: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the median of each bootstrap resample, and which rounds each drew.

    Whole rounds are drawn, not single steps: steps of one round share the machine's mood
    (clock, cache, neighbours), so they are not independent.
    """
    rounds = samples.shape[0]
    if pick is None:
        pick = rng.integers(rounds, size=(RESAMPLES, rounds))
    return np.median(samples[pick].reshape(RESAMPLES, -1), axis=1), pick


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(rounds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return (median, low, high) of the samples, 95 % by bootstrap over rounds.

    ``rounds`` is rectangular: the same number of samples in each round.
    """
    samples = np.asarray(rounds, dtype=float)
    medians, _ = _resampled_medians(samples, np.random.default_rng(0), None)
    return (float(np.median(samples)), *_percentiles(medians))


def ratio_interval(
    rounds: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], *, paired: bool
) -> tuple[float, float, float]:
    """Return (ratio of medians, low, high), 95 % by bootstrap over rounds.

    ``paired``: round i of both was taken side by side, so a resample draws the same rounds of
    both and drift that hit both cancels.
    """
    above, below = np.asarray(rounds, dtype=float), np.asarray(reference, dtype=float)
    rng = np.random.default_rng(0)
    top, pick = _resampled_medians(above, rng, None)
    bottom, _ = _resampled_medians(below, rng, pick if paired else None)
    return (float(np.median(above) / np.median(below)), *_percentiles(top / bottom))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return (mean, low, high), 95 % by Student's t; the ends are None for a single value."""
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if data.size < 2:
        return mean, None, None
    if np.ptp(data) == 0:
        return mean, mean, mean
    low, high = stats.t.interval(CONFIDENCE, data.size - 1, loc=mean, scale=stats.sem(data))
    return mean, float(low), float(high)
