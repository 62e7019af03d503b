"""Plan: what a study will cost, known before any of it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from kdprof.budget import seconds_per_iteration
from kdprof.errors import UserError
from kdprof.optimizer import state_per_value
from kdprof.records import Cost
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.train.cells import Cell, cells_of
from kdprof.train.trunk import trunk_plan

KEPT = 2
"""Checkpoints that a run keeps."""


@dataclass(frozen=True)
class Forecast:
    """What the runs of a method under a budget will cost, all seeds together."""

    method: str
    budget: str
    runs: int
    finished: int
    iterations: int
    """Of each run; ``low`` and ``high`` are the ends of the conversion's 95 % interval, equal to it
    if a run has started."""
    low: int
    high: int
    seconds: float
    """Of the runs that are not finished, without evaluation; ``seconds_low`` and ``seconds_high``
    follow from the interval of the seconds per iteration."""
    seconds_low: float
    seconds_high: float
    saved_s: float
    """Seconds that sharing trunks saves (wsd), of what is trained from now on; ``seconds`` includes
    them."""
    energy_j: float | None
    """Of the same runs; None if the device has no counter."""
    disk_bytes: int | None
    """Of their checkpoints, and of those that trunks still write for them. None with a user's
    optimiser, whose state is not known before it runs."""
    unreliable: bool
    """True if the underlying Cost is unreliable."""


def forecast(
    study: ResolvedStudy, store: Store, names: Sequence[str], costs: Mapping[str, Cost]
) -> list[Forecast]:
    """Return the forecast of every (method, budget) of a study, ordered by budget.

    Raises:
        UserError: the study has no budget, or one that is less than an iteration of a method.
    """
    if not study.budgets:
        raise UserError("no budget given; add --budget, such as --budget 2k@kd or --budget 10min")
    cells = cells_of(study, store, names, costs)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.budget), []).append(cell)
    waiting = [cell for cell in cells if not cell.is_finished(store)]
    shares = _shares(study, store, cells, waiting)
    return [_forecast(study, group, shares, costs) for group in groups.values()]


def _forecast(
    study: ResolvedStudy,
    group: Sequence[Cell],
    shares: Mapping[Cell, _Share],
    costs: Mapping[str, Cost],
) -> Forecast:
    """Return the forecast of the cells of a method and budget; the unfinished ones have shares."""
    first = group[0]
    cost = costs[first.method]
    waiting = [cell for cell in group if cell in shares]
    iterations = sum(cell.iterations for cell in waiting)
    each, low, high = seconds_per_iteration(cost, costs)
    saved = sum(shares[cell].saved for cell in waiting)
    files = sum(KEPT + shares[cell].files for cell in waiting)
    checkpoint_bytes = _checkpoint_bytes(study, first.method)
    return Forecast(
        method=first.method,
        budget=first.budget,
        runs=len(group),
        finished=len(group) - len(waiting),
        iterations=first.iterations,
        low=first.low,
        high=first.high,
        seconds=iterations * each,
        seconds_low=iterations * low,
        seconds_high=iterations * high,
        saved_s=saved * each,
        energy_j=None if cost.energy_j is None else iterations * cost.energy_j,
        disk_bytes=None if checkpoint_bytes is None else files * checkpoint_bytes,
        unreliable=not cost.reliable,
    )


@dataclass(frozen=True)
class _Share:
    """What an unfinished cell has of its trunk (wsd).

    Attributes:
        saved: iterations that it need not train itself, less those that its trunk lacks if no other
            cell trains these.
        files: checkpoints that its trunk will write then.
    """

    saved: int = 0
    files: int = 0


def _shares(
    study: ResolvedStudy, store: Store, cells: Sequence[Cell], waiting: Sequence[Cell]
) -> dict[Cell, _Share]:
    """Return the share of each waiting cell: the longest one pays for what its trunk lacks."""
    shares = dict.fromkeys(waiting, _Share())
    longest: dict[tuple[str, int], Cell] = {}
    for cell in sorted(waiting, key=lambda one: one.iterations):
        plan = trunk_plan(study, cells, cell)
        if plan is None:
            continue
        to_come = plan.marks[cell.budget] > plan.done(store)
        if to_come or plan.mark(store, cell).exists():
            shares[cell] = _Share(saved=plan.marks[cell.budget])
        if to_come:
            longest[cell.method, cell.seed] = cell
    for cell in longest.values():
        plan = trunk_plan(study, cells, cell)
        assert plan is not None, "it has a trunk"
        done = plan.done(store)
        files = len({mark for mark in plan.marks.values() if mark > done}) + (0 if done else KEPT)
        lacking = max(plan.marks.values()) - done
        shares[cell] = replace(shares[cell], saved=shares[cell].saved - lacking, files=files)
    return shares


def _checkpoint_bytes(study: ResolvedStudy, method: str) -> int | None:
    """Return the size of a checkpoint: weights, buffers and optimiser state of student and extras;
    None if the optimiser's is not known."""
    kept = state_per_value(study.step)
    if kept is None:
        return None
    parts = study.factory.student(0), study.factory.method(method)
    return sum(_state_bytes(part, kept) for part in parts)


def _state_bytes(module: nn.Module, kept: int) -> int:
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return kept * trained + sum(t.numel() * t.element_size() for t in module.state_dict().values())
