"""Pace: how much of its budget a run has spent, and so its position in the schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from kdprof.errors import UserError, no_flop
from kdprof.records import Cost, Run


@dataclass(frozen=True)
class Pace:
    """Progress of a run by the iterations it has made.

    Attributes:
        iterations: planned for the run; its position in the schedule is counted in these, however
            progress is measured.
    """

    iterations: int
    is_counted: ClassVar[bool] = True
    """True if the run ends after its planned iterations, False if another quantity ends it."""

    def position(self, done: int) -> float:
        """Return the run's position, from 0 to ``iterations``, after ``done`` iterations."""
        return done

    def reached(self, mark: int, done: int) -> bool:
        """Return whether the run has reached ``mark`` of its planned iterations."""
        return self.position(done) >= mark


@dataclass(frozen=True)
class Enforced(Pace):
    """Progress of a run by the share of its budget that it has spent.

    Attributes:
        amount: the budget in the unit of ``spent``.
        spent: returns the amount spent so far; must not wait for the device.
    """

    is_counted: ClassVar[bool] = False
    amount: float
    spent: Callable[[int], float]
    """A function of the iterations done."""

    def position(self, done: int) -> float:
        """Return the spent share of the budget, in planned iterations."""
        return min(1.0, self.spent(done) / self.amount) * self.iterations


@dataclass(frozen=True)
class Spending:
    """Live readings of a run, from which :func:`pace_of` chooses one."""

    seconds: Callable[[], float]
    joules: Callable[[], float]


def pace_of(run: Run, cost: Cost | None, spending: Spending) -> Pace:
    """Return the pace that a run's record asks for.

    Raises:
        UserError: the run or its Cost lacks the quantity to be enforced.
    """
    if run.enforce == "iterations":
        return Pace(run.iterations)
    if run.enforce == "time":
        if not run.train_s.planned:
            raise UserError("--enforce time: the run has no planned seconds; use iterations")
        return Enforced(run.iterations, run.train_s.planned, lambda done: spending.seconds())
    if run.enforce == "flop":
        each = cost and cost.flop_per_iteration()
        if not each:
            reason = cost.why_no_flop() if cost else "no Cost"
            raise UserError(no_flop("--enforce flop", run.method, reason))
        return Enforced(run.iterations, each * run.iterations, lambda done: each * done)
    if cost is None or cost.energy_j is None:
        reason = cost.unavailable.get("energy_j", "not measured") if cost else "no Cost"
        raise UserError(
            f"--enforce energy: the cost of '{run.method}' has no energy_j ({reason}); use "
            "--enforce time or iterations"
        )
    planned_j = cost.energy_j * run.iterations
    return Enforced(run.iterations, planned_j, lambda done: spending.joules())
