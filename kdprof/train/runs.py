"""Train the runs of a study one after the other: all that are left, or a few named ones."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from kdprof.data import require_files
from kdprof.distributed.ranks import LostContact
from kdprof.errors import KdprofError, UserError
from kdprof.models import AnyNetwork
from kdprof.processes import explain
from kdprof.progress import Progress
from kdprof.records import Cost, Run
from kdprof.resolve import ResolvedStudy
from kdprof.step_feed import StepFeed
from kdprof.store import Held, Lost, Store
from kdprof.train.cells import Cell, cells_of, new_run
from kdprof.train.loop import Interrupted, TrainingRun, Validation, outcome
from kdprof.train.prepare import Prepared, check_runs, prepare, stored_costs
from kdprof.train.teacher import trained_teacher
from kdprof.train.trunk import Trunk, TrunkPlan, trunk_plan


@dataclass
class Summary:
    """The result of a call of :func:`train`."""

    finished: list[Run] = field(default_factory=list)
    skipped: int = 0
    """Runs that were finished before."""
    elsewhere: list[str] = field(default_factory=list)
    """Runs that other processes are training, by their names in messages."""
    failures: list[str] = field(default_factory=list)


def train(
    study: ResolvedStudy,
    store: Store,
    progress: Progress,
    *,
    control: bool = True,
    prepared: Prepared | None = None,
) -> Summary:
    """Measure what is missing, train the teacher, then every cell of the study.

    A finished run is skipped, an interrupted run continues, and a run that another process holds
    is left to that process. If a run fails, or another process takes it from this one, the others
    are still trained.

    Args:
        prepared: the result of :func:`prepare` for these methods, if it was called before.

    Raises:
        UserError: a budget is less than one iteration of a method, or a step does not fit.
        Interrupted: a signal was received; everything is saved.
    """
    require_files(study.plain.data)
    names = study.method_names(control=control)
    costs, failures = prepared or prepare(study, store, names, progress)
    summary = Summary(failures=list(failures))
    cells = cells_of(study, store, [name for name in names if name in costs], costs)
    waiting = [cell for cell in cells if not cell.is_finished(store)]
    summary.skipped = len(cells) - len(waiting)
    if waiting:
        _train_waiting(study, store, costs, progress, cells, waiting, summary)
    return summary


def train_named(
    study: ResolvedStudy,
    store: Store,
    progress: Progress,
    method: str,
    budgets: Collection[str],
    seed: int,
    *,
    concurrent_runs: int | None = 0,
) -> Summary:
    """Train the cells of a method, a seed and some of the study's budgets; Costs must be stored.

    Args:
        concurrent_runs: runs that other processes train on this machine at the same time; None =
            not known.

    Raises:
        UserError: a Cost that is needed was not measured on this device.
        Interrupted: a signal was received; everything is saved.
    """
    check_runs(study, store, [method])
    costs = stored_costs(study, store, [method])
    cells = cells_of(study, store, [method], costs)
    named = [cell for cell in cells if cell.seed == seed and cell.budget in budgets]
    waiting = [cell for cell in named if not cell.is_finished(store)]
    summary = Summary(skipped=len(named) - len(waiting))
    if waiting:
        _train_waiting(study, store, costs, progress, cells, waiting, summary, concurrent_runs)
    return summary


def _train_waiting(
    study: ResolvedStudy,
    store: Store,
    costs: Mapping[str, Cost],
    progress: Progress,
    cells: Sequence[Cell],
    waiting: Sequence[Cell],
    summary: Summary,
    concurrent_runs: int | None = 0,
) -> None:
    """Train the teacher if needed, then the waiting cells."""
    if study.ranks and study.ranks.restarts:
        waiting = _without_failed(study, store, cells, waiting, summary)
    elif study.step.gpus > 1 and not study.ranks:
        raise UserError(f"step.gpus = {study.step.gpus}: a run on several GPUs needs torchrun")
    teacher = None
    if study.needs_teacher({cell.method for cell in waiting}):
        teacher = trained_teacher(study, store, progress)
    work = _Work(study, store, costs, teacher, progress, cells, concurrent_runs)
    held = _train_cells(work, waiting, summary)
    # By now their holders may have finished them or died.
    held = _train_cells(work, held, summary) if held else []
    summary.elsewhere = [cell.label() for cell in held]


def _without_failed(
    study: ResolvedStudy,
    store: Store,
    cells: Sequence[Cell],
    waiting: Sequence[Cell],
    summary: Summary,
) -> list[Cell]:
    """Leave out the waiting cells whose failure restarted the group: they would fail again."""
    left = []
    for cell in waiting:
        failure = _failure(study, store, cells, cell)
        if failure is None:
            left.append(cell)
        else:
            summary.failures.append(f"{cell.label()}: {failure}")
    return left


def _failure(study: ResolvedStudy, store: Store, cells: Sequence[Cell], cell: Cell) -> str | None:
    """Return why a cell failed, or the trunk that it still needs; None if neither did."""
    run = cell.folder(store).read_run()
    if run is not None and run.failure is not None:
        return run.failure.reason
    plan = trunk_plan(study, cells, cell)
    if plan is None or plan.mark(store, cell).exists():
        return None
    trunk = store.trunk_folder(plan.method, plan.seed).read_run()
    return trunk.failure.reason if trunk is not None and trunk.failure is not None else None


def _train_cells(work: _Work, cells: Sequence[Cell], summary: Summary) -> list[Cell]:
    """Train cells one after the other; return those that other processes hold."""
    held, began = [], time.monotonic()
    for number, cell in enumerate(cells, 1):
        count = f"[{number}/{len(cells)}] " if len(cells) > 1 else ""
        label = count + cell.label()
        left = _left(cells, number - 1, time.monotonic() - began) if count else ""
        try:
            run = work.train(cell, label, left)
        except (Interrupted, LostContact):
            raise
        except Held:
            held.append(cell)
            continue
        except Exception as error:
            # For example out of memory or a mistake in a user's method: the other runs go on.
            names_run = isinstance(error, KdprofError)
            failure = f"{'' if names_run else cell.label() + ': '}{explain(error)}"
            summary.failures.append(failure)
            work.progress.say(f"{count}failed: {failure}")
            continue
        summary.finished.append(run)
        work.progress.say(f"{label}: {outcome(run)}")
    return held


def _left(cells: Sequence[Cell], done: int, elapsed_s: float) -> str:
    """Return what the progress bar says about the cells after the first ``done``: their planned
    time, times the ratio of actual to planned time of the cells before."""
    planned = [cell.planned_s or 0.0 for cell in cells]
    pace = elapsed_s / sum(planned[:done]) if sum(planned[:done]) else 1.0
    return f" ({timedelta(seconds=round(pace * sum(planned[done:])))} for all)"


@dataclass(frozen=True)
class _Work:
    """What all cells of a study share."""

    study: ResolvedStudy
    store: Store
    costs: Mapping[str, Cost]
    teacher: AnyNetwork | None
    progress: Progress
    cells: Sequence[Cell]
    concurrent_runs: int | None

    def train(self, cell: Cell, label: str, left: str) -> Run:
        """Train a cell, and first the trunk from which it branches off.

        Args:
            label: its name in messages and in the progress bar.
            left: what the progress bar adds about the runs that follow.
        """
        plan = trunk_plan(self.study, self.cells, cell)
        trunk = self._trunk(plan, cell, left) if plan else None
        return self._train(cell, label, left, trunk=trunk)

    def _trunk(self, plan: TrunkPlan, cell: Cell, left: str) -> Trunk | None:
        """Train the trunk as far as its branches need, and return where the cell branches off; None
        if the trunk no longer has that state."""
        state = plan.mark(self.store, cell)
        if not state.exists():
            self._train_trunk(plan, state, left)
        if state.exists():
            return Trunk(state)
        self.progress.say(
            f"{cell.label()}: its trunk passed iteration {plan.marks[cell.budget]} before this "
            "budget was added; it is trained alone"
        )
        return None

    def _train_trunk(self, plan: TrunkPlan, state: Path, left: str) -> None:
        """Train a trunk as far as all its branches need; if it fails after a branch's own state,
        say so and go on. A trunk that was lost to another process fails the branch: the branches
        that are left wait for that process.

        Args:
            state: the file that the branch begins from.
        """
        trunk = Cell.trunk(plan)
        try:
            run = self._train(trunk, trunk.label(), left, marks=set(plan.marks.values()))
        except (Interrupted, LostContact, Lost):
            raise
        except Exception as error:
            if not state.exists():
                raise
            self.progress.say(f"{trunk.label()} failed: {explain(error)}")
        else:
            self.progress.say(
                f"{trunk.label()}: {run.iterations} iterations, {run.train_s.actual:.1f} s"
            )

    def _train(
        self,
        cell: Cell,
        label: str,
        left: str,
        *,
        trunk: Trunk | None = None,
        marks: Collection[int] = (),
    ) -> Run:
        study, cost, folder = self.study, self.costs[cell.method], cell.folder(self.store)
        is_trunk = cell.kind == "trunk"
        with folder.lock():
            # An interrupted run keeps its length: its learning rates were set for it.
            made = None if is_trunk else folder.read_run()
            if made is not None and made.finished:
                return made  # another process finished it meanwhile
            run = made or new_run(study, cell, cost)
            run = run.model_copy(update={"concurrent_runs": self.concurrent_runs})
            study.factory.forget_steps()
            step = study.factory.step(
                cell.method, self.teacher, seed=cell.seed, iterations=run.schedule_iterations
            )
            training = TrainingRun(
                folder=folder,
                run=run,
                feed=StepFeed(step, study.factory.batches(cell.seed)),
                settings=study.training,
                validation=None if is_trunk else Validation.of(study, "student"),
                cost=cost,
                meter=study.hardware.energy_meter(),
                trunk=trunk,
                marks=marks,
            )
            return training.train(self.progress, label, left)
