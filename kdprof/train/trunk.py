"""Trunks: the training before any decay, which runs of several budgets share under wsd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdprof.resolve import ResolvedStudy
from kdprof.schedule import decay_start
from kdprof.store import Store
from kdprof.study import Study

if TYPE_CHECKING:
    from kdprof.train.cells import Cell


@dataclass(frozen=True)
class Trunk:
    """The state from which a run begins instead of from iteration 0; several budgets share it."""

    state: Path
    """A checkpoint of the trunk at the iteration where this run's decay begins."""


@dataclass(frozen=True)
class TrunkPlan:
    """The plan of the training before any decay that several budgets of a method and seed share.

    Attributes:
        marks: by budget, the iteration at which its decay begins; the largest one ends the trunk.
        longest: the cell with the most iterations.
    """

    method: str
    seed: int
    marks: Mapping[str, int]
    longest: Cell

    def mark(self, store: Store, cell: Cell) -> Path:
        """Return the file of the state where a cell's decay begins."""
        return store.trunk_folder(self.method, self.seed).mark(self.marks[cell.budget])

    def done(self, store: Store) -> int:
        """Return the iterations of the trunk that are saved; it goes on from there."""
        run = store.trunk_folder(self.method, self.seed).read_run()
        if run is not None and run.failure is not None:
            return run.failure.checkpoint_iteration or 0
        return run.iterations_done if run is not None else 0


def shares_trunks(study: Study) -> bool:
    """Return whether a method is trained once per seed until its budgets' decays begin."""
    training = study.training
    shared = training.enforce == "iterations" and training.schedule_span == "stretch"
    return study.step.schedule == "wsd" and shared


def trunk_plan(study: ResolvedStudy, cells: Sequence[Cell], cell: Cell) -> TrunkPlan | None:
    """Return the trunk from which a cell branches off; None if it is trained alone.

    Runs share a trunk if the learning rate before the decay does not depend on their length.
    """
    if not shares_trunks(study.plain):
        return None
    family = [c for c in cells if (c.method, c.seed) == (cell.method, cell.seed)]
    marks = {c.budget: decay_start(study.step, c.span) for c in family}
    longest = max(family, key=lambda c: c.iterations)
    return TrunkPlan(cell.method, cell.seed, marks, longest) if marks[cell.budget] else None
