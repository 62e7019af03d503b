"""Compute-equivalent gain: how far one accuracy curve has to be moved to lie on another.

Called compute-equivalent gain by Davidson et al. 2023 (arXiv:2312.07413), compute multiplier
elsewhere; video coding compares rates at equal quality in the same way (Bjontegaard 2001, BD-rate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from .seeds import Cell, Contrast, SeedModel, t_quantile

STEPS = 401
"""Shifts that are tried; the result is interpolated between them."""
POINTS = 32
"""Points of the common range at which two curves are compared."""


@dataclass(frozen=True)
class Curve:
    """The budgets of a method on an axis of compute, the smallest first."""

    cells: list[Cell]
    logs: np.ndarray
    """Log of the compute of each cell."""

    def weights(self, at: np.ndarray) -> np.ndarray:
        """Return the weights of the cells in the piecewise linear curve, ``at.shape`` x cells."""
        identity = np.eye(len(self.cells))
        return np.stack([np.interp(at, self.logs, row) for row in identity], axis=-1)


@dataclass(frozen=True)
class Shift:
    """The gain of a curve over another, as a factor; None = open or not known (see Gain)."""

    value: float | None
    bound: str
    low: float | None
    high: float | None
    probability: float | None
    has_interval: bool
    overlap: bool = True
    """False if the two have no equal compute: their budgets lie apart on this axis."""


def compute_equivalent_gain(
    model: SeedModel,
    curve: Curve,
    control: Curve,
    *,
    confidence: float,
    intervals: bool = True,
    cost_error: float = 0.0,
) -> Shift:
    """Return the factor g by which the control's compute exceeds the method's at equal accuracy.

    The method's curve f and the control's h are piecewise linear in the log of compute. For a shift
    d = log g, D(d) is the mean over the common range of f(u) - h(u + d): how much better the method
    is than the control with g times its compute. It is a linear combination of cell means, so for
    each d it has a t-distribution. The estimate is the d where D changes its sign; the interval is
    all d at which D is not significantly different from 0 (Fieller's principle), so it covers the
    truth as often as the t-test does, with few seeds and flat curves, too. Where noise makes D
    cross 0 several times, the length of {d : D(d) > 0} decides, which is the crossing of the
    monotone rearrangement of D. Nothing is extrapolated: d ends where the ranges only touch.

    Both curves must rise with compute (:func:`slope`): where they fall, D grows with d, and the
    same crossing would call the method that needs more compute the one that saves it.

    Args:
        intervals: False if there is one seed, or if it is not known that both curves rise: only the
            estimate is computed.
        cost_error: half-width of the 95 % interval of the log of the step's cost ratio; it widens
            the interval by adding in quadrature.
    """
    shifts = np.linspace(control.logs[0] - curve.logs[-1], control.logs[-1] - curve.logs[0], STEPS)
    weights = difference_weights(model.cells, curve, control, shifts)
    values, errors, freedom = model.contrasts(weights)
    estimate, bound = _crossing(shifts, values)
    if not intervals:
        overlap = bool(shifts[0] <= 0 <= shifts[-1])
        return Shift(math.exp(estimate), bound, None, None, None, False, overlap)
    reach = scipy.special.stdtrit(freedom, 0.5 + confidence / 2)
    low, high = _accepted(shifts, np.abs(values) - reach * errors, values)
    # The interval of the cost ratio has 95 %; at another confidence it is scaled like a normal's.
    extra = cost_error * t_quantile(0.5 + confidence / 2, 1e6) / t_quantile(0.975, 1e6)
    ends = (
        None if low is None else math.exp(estimate - math.hypot(estimate - low, extra)),
        None if high is None else math.exp(estimate + math.hypot(high - estimate, extra)),
    )
    probability = _probability(model, curve, control, cost_error)
    return Shift(math.exp(estimate), bound, *ends, probability, True, probability is not None)


def slope(model: SeedModel, curve: Curve) -> Contrast:
    """Return the least-squares slope of a curve's cells, percentage points per unit of log compute.

    It is a linear combination of cell means, too, so ``probability()`` is how sure it is that the
    curve rises; that needs more than one seed.
    """
    centred = curve.logs - curve.logs.mean()
    weights = np.zeros((1, len(model.cells)))
    weights[0, [model.cells.index(cell) for cell in curve.cells]] = centred / (centred @ centred)
    (value,), (error,), (freedom,) = model.contrasts(weights)
    return Contrast(float(value), float(error), float(freedom))


def difference_weights(
    cells: Sequence[Cell], curve: Curve, control: Curve, shifts: np.ndarray
) -> np.ndarray:
    """Return the weights of ``cells`` in D (see above) at each shift, shifts x cells."""
    low = np.maximum(curve.logs[0], control.logs[0] - shifts)
    high = np.minimum(curve.logs[-1], control.logs[-1] - shifts)
    middles = (np.arange(POINTS) + 0.5) / POINTS
    at = low[:, None] + middles * (high - low)[:, None]
    weights = np.zeros((len(shifts), len(cells)))
    for own, found in (
        (curve.cells, curve.weights(at).mean(axis=1)),
        (control.cells, -control.weights(at + shifts[:, None]).mean(axis=1)),
    ):
        weights[:, [cells.index(cell) for cell in own]] = found
    return weights


def _crossing(shifts: np.ndarray, values: np.ndarray) -> tuple[float, str]:
    """Return where the values fall through 0, and ``>`` or ``<`` if they do not."""
    if (values > 0).all():
        return float(shifts[-1]), ">"
    if (values < 0).all():
        return float(shifts[0]), "<"
    return float(shifts[0] + _length_above(shifts, values)), ""


def _length_above(shifts: np.ndarray, values: np.ndarray) -> float:
    """Return the length of the set in which the piecewise linear function is above 0; half of
    that in which it is 0, so that two methods that change places have inverse gains."""
    step = shifts[1] - shifts[0]
    left, right = values[:-1], values[1:]
    above = np.maximum(left, right).clip(min=0)
    span = np.abs(right - left)
    share = np.where((left > 0) & (right > 0), 1.0, above / np.where(span > 0, span, 1.0))
    share = np.where((left == 0) & (right == 0), 0.5, share)
    return float(step * share.clip(max=1).sum())


def _accepted(
    shifts: np.ndarray, excess: np.ndarray, values: np.ndarray
) -> tuple[float | None, float | None]:
    """Return the ends of the shifts whose excess over the critical value is not positive; None =
    open. If all are rejected, the interval lies outside the measured range."""
    inside = np.flatnonzero(excess <= 0)
    if inside.size == 0:
        crossing = np.flatnonzero(np.diff(np.sign(values)))
        if crossing.size:  # the step of the grid is wider than the interval
            return float(shifts[crossing[0]]), float(shifts[crossing[-1] + 1])
        return (float(shifts[-1]), None) if values[0] > 0 else (None, float(shifts[0]))
    first, last = int(inside[0]), int(inside[-1])
    low = None if first == 0 else _root(shifts, excess, first - 1)
    high = None if last == len(shifts) - 1 else _root(shifts, excess, last)
    return low, high


def _root(shifts: np.ndarray, excess: np.ndarray, place: int) -> float:
    """Return where the excess changes sign between two neighbouring shifts."""
    left, right = excess[place], excess[place + 1]
    return float(shifts[place] + (shifts[place + 1] - shifts[place]) * left / (left - right))


def _probability(model: SeedModel, curve: Curve, control: Curve, cost_error: float) -> float | None:
    """Return P(gain > 1), which is P(D(0) > 0); None if the two have no equal compute."""
    if not control.logs[0] - curve.logs[-1] <= 0 <= control.logs[-1] - curve.logs[0]:
        return None
    near = np.array([-0.05, 0.0, 0.05])
    values, errors, freedom = model.contrasts(difference_weights(model.cells, curve, control, near))
    slope = abs(values[2] - values[0]) / 0.1
    error = math.hypot(errors[1], slope * cost_error / t_quantile(0.975, 1e6))
    return Contrast(float(values[1]), error, float(freedom[1])).probability()
