"""Intervals that stay valid however often one looks: for training seeds until one knows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

EFFECT_SCALE = 1.5
"""Standard deviation of the prior on the standardised difference (mean over standard deviation of
the differences within seeds). It sets at which number of seeds the interval is narrowest, never its
validity; docs/verdicts.md has the seeds that other values need."""


def confidence_sequence(
    differences: Sequence[float], confidence: float, *, scale: float = EFFECT_SCALE
) -> tuple[float, float]:
    """Return the ends of the anytime-valid interval of the mean of normal differences.

    With probability ``confidence`` the intervals after every number of seeds all contain the mean,
    so one may look after each seed and stop when it suits. It is the sequential t-test of Lai 1976
    as Wang and Ramdas 2025 (arXiv:2310.03722) write it: the mixture of likelihood ratios of the
    t-statistic over a normal prior on the standardised mean is a martingale that exceeds
    1 / (1 - confidence) with probability 1 - confidence at most (Ville's inequality).

    Args:
        differences: one per seed, in the order of the seeds.

    The ends are infinite with one difference, and while there are too few for any to be excluded.
    """
    data = np.asarray(differences, float)
    count = data.size
    if count < 2:
        return -math.inf, math.inf
    mean, deviation = float(data.mean()), float(data.std(ddof=1))
    shrink = 1 / (1 + count * scale**2)
    # The martingale is sqrt(r) ((1 + x) / (1 + r x))^(n/2) with x = t^2 / (n - 1), r = shrink.
    limit = (1 / ((1 - confidence) * math.sqrt(shrink))) ** (2 / count)
    if limit * shrink >= 1:
        return -math.inf, math.inf
    largest = (limit - 1) / (1 - limit * shrink)
    reach = deviation / math.sqrt(count) * math.sqrt((count - 1) * largest)
    return mean - reach, mean + reach


def fewest_seeds(confidence: float, *, scale: float = EFFECT_SCALE) -> int:
    """Return the smallest number of seeds after which an interval can be finite."""
    count = 2
    while math.isinf(
        confidence_sequence(list(map(float, range(count))), confidence, scale=scale)[0]
    ):
        count += 1
    return count
