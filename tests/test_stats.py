import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kdprof.stats.intervals import (
    _ranks,
    block_length,
    drift_of,
    mean_interval,
    median_interval,
    outliers,
    paired_ratio,
    product_of,
    ratio_of,
    relative_width,
    unpaired_ratio,
)


def covered(intervals, truth: float) -> float:
    """Share of the intervals that hold the truth."""
    return float(np.mean([low <= truth <= high for _, low, high in intervals]))


def autoregression(rng, count: int, coefficient: float) -> np.ndarray:
    values = np.zeros(count + 50)
    for i, shock in enumerate(rng.standard_normal(count + 50)):
        values[i] = coefficient * values[i - 1] + shock
    return values[50:]


def test_constant_samples_have_no_width():
    assert median_interval([[2.0, 2.0]] * 5) == pytest.approx((2.0, 2.0, 2.0))
    assert paired_ratio([[3.0]] * 5, [[2.0]] * 5) == pytest.approx((1.5, 1.5, 1.5))
    assert unpaired_ratio([[3.0]] * 5, [[2.0]] * 9) == pytest.approx((1.5, 1.5, 1.5))


def test_mean_interval_by_hand():
    """Student's t with 2 degrees of freedom: 4.3027 standard errors."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / np.sqrt(3)
    assert (mean, low, high) == (2.0, pytest.approx(2 - half), pytest.approx(2 + half))
    assert mean_interval([5.0]) == (5.0, None, None)
    assert mean_interval([5.0, 5.0]) == (5.0, 5.0, 5.0)


@pytest.mark.parametrize("rounds", [8, 12, 30])
def test_median_interval_covers_the_truth(rounds):
    """Rounds with a mood of their own: 95 of 100, less what chance takes in 300 repeats."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(300):
        mood = 0.05 * rng.standard_normal((rounds, 1))
        made.append(median_interval(np.exp(mood + 0.01 * rng.standard_normal((rounds, 5)))))
    assert covered(made, 1.0) >= 0.92


def test_interval_covers_under_heavy_tails():
    """A seventh of the rounds disturbed up to threefold, on both sides."""
    rng = np.random.default_rng(2)
    made = []
    for _ in range(300):
        shocks = (rng.random(15) < 0.15) * rng.uniform(-1, 1, 15)
        made.append(median_interval(np.exp(0.01 * rng.standard_normal(15) + shocks)[:, None]))
    assert covered(made, 1.0) >= 0.92


def test_autocorrelation_widens_the_interval():
    """With neighbours alike, independent resampling covers far too seldom; blocks help."""
    rng = np.random.default_rng(4)
    series = [np.exp(0.02 * autoregression(rng, 60, 0.6)) for _ in range(200)]
    blocked = [median_interval(values[:, None]) for values in series]
    independent = []
    for values in series:
        ends = scipy_stats.bootstrap((values,), np.median, n_resamples=300, method="percentile")
        independent.append((1.0, *ends.confidence_interval))
    assert covered(independent, 1.0) < 0.8
    assert covered(blocked, 1.0) >= 0.87


def test_block_length():
    rng = np.random.default_rng(5)
    independent = [block_length(rng.standard_normal(100)) for _ in range(50)]
    correlated = [block_length(autoregression(rng, 100, 0.8)) for _ in range(50)]
    assert np.median(independent) == 1
    assert np.median(correlated) >= 8
    assert block_length(np.ones(20)) == 1
    assert max(correlated) <= 25


def test_close_to_scipy_bootstrap_with_many_rounds():
    rng = np.random.default_rng(1)
    above = np.exp(math.log(2) + 0.05 * rng.standard_normal(400))
    expected = scipy_stats.bootstrap(
        (above,), np.median, method="percentile", rng=2
    ).confidence_interval
    _, low, high = median_interval(above[:, None])
    assert low == pytest.approx(expected.low, rel=0.003)
    assert high == pytest.approx(expected.high, rel=0.003)


def test_pairing_cancels_what_both_share():
    rng = np.random.default_rng(3)
    mood = rng.uniform(1, 3, (12, 1))
    above, below = (1.1 * mood).tolist(), mood.tolist()
    assert paired_ratio(above, below) == pytest.approx((1.1, 1.1, 1.1))
    assert relative_width(unpaired_ratio(above, below)) > 0.1


def test_ratios_of_ratios_by_hand():
    """Half-widths on the log scale: 3 and 4 thousandths make 5."""
    first = tuple(math.exp(v) for v in (0.7, 0.697, 0.703))
    second = tuple(math.exp(v) for v in (0.2, 0.196, 0.204))
    assert ratio_of(first, second) == pytest.approx(tuple(map(math.exp, (0.5, 0.495, 0.505))))
    assert product_of(first, second) == pytest.approx(tuple(map(math.exp, (0.9, 0.895, 0.905))))


def test_drift():
    rng = np.random.default_rng(6)
    steady = 1 + 0.002 * rng.standard_normal(40)
    slowed = steady * np.repeat([1.0, 1.0, 1.0, 1.05], 10)
    assert drift_of(steady, 0.01) == (pytest.approx(0, abs=0.005), True)
    drift, is_steady = drift_of(slowed, 0.01)
    assert drift == pytest.approx(0.05, abs=0.01)
    assert not is_steady
    noisy = 1 + 0.2 * rng.random(16)
    assert drift_of(noisy, 0.01)[1], "noise is not drift"


def test_drift_of_too_few_samples_tells_nothing():
    assert drift_of([1.0, 1.5, 1.0], 0.01) == (0.5, True)
    assert drift_of([1.0], 0.01) == (0.0, True)


def test_steady_machines_are_seldom_called_drifting():
    rng = np.random.default_rng(7)
    called = sum(not drift_of(1 + 0.1 * rng.random(24), 0.001)[1] for _ in range(300))
    assert called <= 0.03 * 300


def test_outliers_are_found_and_placed():
    rng = np.random.default_rng(8)
    rounds = np.exp(0.01 * rng.standard_normal((12, 3)))
    rounds[4, 1] *= 1.5
    ((number, step, times),) = outliers(rounds.tolist())
    assert (number, step) == (4, 1)
    assert times == pytest.approx(1.5, rel=0.05)
    assert outliers([[1.0, 1.0]] * 5) == []


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_the_interval_of_a_mean_is_scipys(count):
    values = np.random.default_rng(count).normal(size=count)
    mean, low, high = mean_interval(values)
    wanted = scipy_stats.t.interval(0.95, count - 1, loc=mean, scale=scipy_stats.sem(values))
    assert (low, high) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 2.0, 0.5, 2.0]])
def test_equal_values_share_a_rank(values):
    assert list(_ranks(np.array(values))) == list(scipy_stats.rankdata(values))
