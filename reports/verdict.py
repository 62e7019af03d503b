"""The verdict on a folder of runs: compute-equivalent gain, differences, rank flips, chances.

These are the nouns; ``judge.py`` computes them and ``verdict_text.py`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain of a method over a control on one axis of compute.

    The control needs ``value`` times the compute of the method for the same accuracy: 2 = the
    method saves half the compute, 0.7 = it wastes.
    """

    method: str
    versus: str
    axis: str
    """A name of :data:`kdprof.reports.axes.AXES`, such as ``seconds``."""
    value: float | None
    """None if it is not known; then ``reason`` says why."""
    bound: str = ""
    """``>`` or ``<`` if the gain lies outside the measured budgets: ``value`` is the largest or
    smallest gain that they can show. Empty if ``value`` is an estimate."""
    low: float | None = None
    """Lower end of the interval; None if it is open (the budgets can show no smaller gain) or if
    there is no interval."""
    high: float | None = None
    has_interval: bool = False
    """False with one seed, or where it is not known that accuracy rises with compute."""
    probability: float | None = None
    """P(gain > 1); None without an interval, and where the two have no equal compute."""
    seeds: int = 0
    """The smaller number of seeds of the two methods."""
    seeds_of: dict[str, int] = field(default_factory=dict)
    """The smallest number of seeds of a budget in the curve of each of the two."""
    reason: str = ""
    """Why the value is not known, is a bound, or has no interval or probability."""


@dataclass(frozen=True)
class Pair:
    """The difference between two methods under one budget, in percentage points of mIoU."""

    budget: str
    first: str
    second: str
    difference: float
    """mIoU of ``first`` minus that of ``second``."""
    low: float | None = None
    """Ends of the interval; None if there is none: ``reason`` says why."""
    high: float | None = None
    simultaneous_low: float | None = None
    """Ends of the interval that holds for all pairs of the budget together (Tukey-Kramer, or
    Bonferroni's bound where variances are not pooled); None without an interval."""
    simultaneous_high: float | None = None
    probability: float | None = None
    """P(``first`` is better); None without an interval."""
    seeds: int = 1
    more_seeds: int | None = None
    """Further seeds that would show a difference of this size with 90 % power; 0 if it is shown
    already; None with one seed, if over 1000 are needed, or if the difference is 0."""
    reason: str = ""
    """Why there is no interval."""


@dataclass(frozen=True)
class Standing:
    """The accuracy of the methods at one equal amount of compute, read off their curves."""

    axis: str
    at: float
    """The amount that all methods' curves cover, in the axis' own unit (seconds, FLOP, ...)."""
    miou_percent: dict[str, float]
    """Of each method, the best first."""


@dataclass(frozen=True)
class Flip:
    """Two methods whose order differs between two axes of compute."""

    first: str
    """The better method at equal compute on ``axes[0]``."""
    second: str
    """The better method at equal compute on ``axes[1]``."""
    axes: tuple[str, str]
    differences: tuple[float, float]
    """mIoU of ``first`` minus that of ``second`` on each axis, percentage points."""
    probability: float | None
    """P(``first`` is better on the first axis and ``second`` on the second); None with one seed."""


@dataclass(frozen=True)
class Verdict:
    """What the runs of a folder show."""

    sentences: list[str]
    """The verdict for a reader in a hurry: gain, differences, flips."""
    gains: list[Gain]
    pairs: list[Pair]
    best: dict[str, dict[str, float]]
    """P(best) of each method, by budget; without budgets that have one seed."""
    standings: list[Standing]
    flips: list[Flip]
    notes: list[str] = field(default_factory=list)
    """How it was computed and what was left out."""
