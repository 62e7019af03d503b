import numpy as np
import pytest
from scipy import stats as scipy_stats

from kdprof.stats import mean_interval, median_interval, ratio_interval


def test_constant_samples_have_no_width():
    assert median_interval([[2.0, 2.0]] * 5) == (2.0, 2.0, 2.0)
    assert ratio_interval([[3.0]] * 5, [[2.0]] * 5, paired=True) == (1.5, 1.5, 1.5)


def test_mean_interval_by_hand():
    """Student's t with 2 degrees of freedom: 4.3027 standard errors."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)
    assert (mean, low, high) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half))
    assert mean_interval([5.0]) == (5.0, None, None)
    assert mean_interval([5.0, 5.0]) == (5.0, 5.0, 5.0)


def test_median_interval_covers_the_truth():
    """Rounds with a mood of their own: at least 90 of 100 intervals hold the true median."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        rounds = 1 + 0.05 * rng.standard_normal((15, 1)) + 0.01 * rng.standard_normal((15, 4))
        _, low, high = median_interval(rounds.tolist())
        hits += low <= 1 <= high
    assert hits >= 90


def test_ratio_agrees_with_scipy_bootstrap():
    rng = np.random.default_rng(1)
    above, below = 2 + 0.1 * rng.standard_normal(40), 1 + 0.1 * rng.standard_normal(40)

    def statistic(a, b, axis):
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    expected = scipy_stats.bootstrap(
        (above, below), statistic, paired=True, method="percentile", rng=2
    ).confidence_interval
    _, low, high = ratio_interval(above[:, None], below[:, None], paired=True)
    assert low == pytest.approx(expected.low, abs=0.02)
    assert high == pytest.approx(expected.high, abs=0.02)


def test_pairing_cancels_what_both_share():
    rng = np.random.default_rng(3)
    mood = rng.uniform(1, 3, (12, 1))
    above, below = (1.1 * mood).tolist(), mood.tolist()
    paired, unpaired = (ratio_interval(above, below, paired=p) for p in (True, False))
    assert paired[2] - paired[1] < 1e-9
    assert unpaired[2] - unpaired[1] > 0.1
