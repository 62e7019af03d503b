"""Matched-budget training: every (method, budget, seed) of a study, the teacher first."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch

from kdprof.budget import parse_budget
from kdprof.data import require_files
from kdprof.errors import KdprofError, UserError
from kdprof.evaluate import evaluate
from kdprof.measure import measure
from kdprof.measure.isolation import explain
from kdprof.models import SegmentationNetwork
from kdprof.parallel import LostContact
from kdprof.progress import Progress
from kdprof.records import REFERENCE, Cost, Run
from kdprof.resolve import ResolvedStudy
from kdprof.store import Held, RunFolder, Store, write_record
from kdprof.train import checkpoint
from kdprof.train.cells import TEACHER, TRUNK, Cell, TrunkPlan, cells_of, new_run, trunk_plan
from kdprof.train.loggers import check_loggers
from kdprof.train.loop import Interrupted, TrainingRun, Trunk, Validation


class Prepared(NamedTuple):
    """What training needs to know before it begins."""

    costs: dict[str, Cost]
    failures: list[str]
    """Methods that could not be measured, with the reason."""


@dataclass
class Summary:
    """What a call of :func:`train` did."""

    finished: list[Run] = field(default_factory=list)
    skipped: int = 0
    """Runs that were finished before."""
    elsewhere: list[str] = field(default_factory=list)
    """Runs that other processes are training, as messages call them."""
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

    A finished run is left alone, an interrupted one continues, one that another process holds is
    left to it. A run that fails does not keep the others from being made.

    Args:
        prepared: what :func:`prepare` returned for these methods, where it was called before.

    Raises:
        UserError: a budget buys less than an iteration of a method, or a step does not fit.
        Interrupted: a signal came; everything is saved.
    """
    require_files(study.study.data)
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
    beside: int | None = 0,
) -> Summary:
    """Train the cells of a method, a seed and some of the study's budgets, whose Costs are there.

    Args:
        beside: runs that other processes train on this machine meanwhile; None = not known.

    Raises:
        UserError: a Cost that is needed was not measured on this device.
        Interrupted: a signal came; everything is saved.
    """
    _check_runs(study, store, [method])
    costs = _stored_costs(study, store, [method])
    cells = cells_of(study, store, [method], costs)
    named = [cell for cell in cells if cell.seed == seed and cell.budget in budgets]
    waiting = [cell for cell in named if not cell.is_finished(store)]
    summary = Summary(skipped=len(named) - len(waiting))
    if waiting:
        _train_waiting(study, store, costs, progress, cells, waiting, summary, beside)
    return summary


def needs_teacher(study: ResolvedStudy, names: Iterable[str]) -> bool:
    """Return whether any of the named methods is trained with a teacher."""
    return study.starts_as_teacher or any(study.methods[n].cls.needs_teacher() for n in names)


def _train_waiting(
    study: ResolvedStudy,
    store: Store,
    costs: Mapping[str, Cost],
    progress: Progress,
    cells: Sequence[Cell],
    waiting: Sequence[Cell],
    summary: Summary,
    beside: int | None = 0,
) -> None:
    """Train the waiting ones of a study's cells, after the teacher."""
    if study.ranks and study.ranks.restarts:
        waiting = _without_failed(store, waiting, summary)
    elif study.study.step.gpus > 1 and not study.ranks:
        raise UserError(f"step.gpus = {study.study.step.gpus}: a run of several needs torchrun")
    teacher = None
    if needs_teacher(study, {cell.method for cell in waiting}):
        teacher = trained_teacher(study, store, progress)
    work = _Work(study, store, costs, teacher, progress, cells, beside)
    held = _train_cells(work, waiting, summary)
    # By now the holder may be through with them, or dead.
    held = _train_cells(work, held, summary) if held else []
    summary.elsewhere = [cell.label() for cell in held]


def _without_failed(store: Store, cells: Sequence[Cell], summary: Summary) -> list[Cell]:
    """Leave out the cells whose failure had the group started again: they would fail once more."""
    runs = [(cell, cell.folder(store).read_run()) for cell in cells]
    failed = [(cell, run.failure) for cell, run in runs if run is not None and run.failure]
    summary.failures += [f"{cell.label()}: {failure.reason}" for cell, failure in failed]
    aside = {cell for cell, _ in failed}
    return [cell for cell in cells if cell not in aside]


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
            # Out of memory, a mistake in a user's method: the other runs are still wanted.
            own = isinstance(error, KdprofError)  # names its run itself
            failure = f"{'' if own else cell.label() + ': '}{explain(error)}"
            summary.failures.append(failure)
            work.progress.say(f"{count}failed: {failure}")
            continue
        summary.finished.append(run)
        work.progress.say(f"{label}: {_outcome(run)}")
    return held


def _left(cells: Sequence[Cell], done: int, elapsed_s: float) -> str:
    """Return what a bar says of the cells after the first ``done``: as long as was planned, times
    what the others took, all told, of their plan."""
    planned = [cell.planned_s or 0.0 for cell in cells]
    pace = elapsed_s / sum(planned[:done]) if sum(planned[:done]) else 1.0
    return f" ({timedelta(seconds=round(pace * sum(planned[done:])))} for all)"


def _check_runs(study: ResolvedStudy, store: Store, names: list[str]) -> None:
    """Refuse a folder whose runs were made under other conditions than this study would make.

    Raises:
        UserError: runs of the named methods had other settings, another device or other versions.
    """
    problems = [
        f"{folder.path} was trained with other method settings or code, on another device or "
        "with other versions; use another --out, or delete it to train it again"
        for folder in store.run_folders()
        if (run := folder.read_run()) is not None
        and run.method in names
        and run.cost_key != study.cost_key(run.method)
    ]
    if problems:
        raise UserError(*problems)


def prepare(study: ResolvedStudy, store: Store, names: list[str], progress: Progress) -> Prepared:
    """Return the Cost of every named method, of those that budgets name and of the reference,
    measuring what is missing and no more, and which could not be measured.

    Raises:
        UserError: a step cannot fit into the device's memory, a logger is not installed, or the
            folder's runs were made under other conditions than this study would make.
        KdprofError: no Cost of a method that a budget is measured in.
    """
    check_loggers(study.study.training.loggers)
    _check_runs(study, store, names)
    named = _budget_methods(study)
    wanted = list(dict.fromkeys([REFERENCE, *names, *named]))
    found = {name: store.read_cost(name, study.cost_key(name)) for name in wanted}
    missing = [name for name, cost in found.items() if cost is None]
    if not missing:
        return Prepared(found, [])
    progress.say(f"measuring {', '.join(missing)}")
    measured = measure(study, missing, progress, keep=store.write_cost)
    found |= {cost.method: cost for cost in measured.costs}
    if lost := [name for name in (REFERENCE, *named) if name in measured.failures]:
        raise KdprofError(
            f"nothing can be converted without {', '.join(lost)}\n{measured.summary()}"
        )
    costs = {name: cost for name, cost in found.items() if cost is not None}
    return Prepared(costs, measured.summary().splitlines())


def _budget_methods(study: ResolvedStudy) -> list[str]:
    """Return the methods that budgets are measured in."""
    budgets = [parse_budget(text) for text in study.study.budgets]
    return [budget.method for budget in budgets if budget.method]


def _stored_costs(study: ResolvedStudy, store: Store, names: Sequence[str]) -> dict[str, Cost]:
    """Return what :func:`prepare` would, measuring nothing.

    Raises:
        UserError: a Cost is missing, or was measured on another device.
    """
    wanted = dict.fromkeys([REFERENCE, *names, *_budget_methods(study)])
    found = {name: store.read_cost(name, study.cost_key(name)) for name in wanted}
    here = study.hardware.name
    elsewhere = {cost.method: cost.device for cost in store.costs() if cost.device != here}
    problems = [
        f"'{name}' has no cost under this study on {here}"
        + (f", but on {elsewhere[name]}: train there" if name in elsewhere else "; measure it here")
        for name, cost in found.items()
        if cost is None
    ]
    if problems:
        raise UserError(*problems)
    return found


def _outcome(run: Run) -> str:
    drift = run.train_s.drift()
    told = "" if drift is None else f" ({drift:+.1%} of plan)"
    return (
        f"mIoU {100 * (run.miou or 0):.2f} % after {run.iterations_done} iterations, "
        f"{run.train_s.actual:.1f} s{told}"
    )


@dataclass(frozen=True)
class _Work:
    """What the cells of a study have in common."""

    study: ResolvedStudy
    store: Store
    costs: Mapping[str, Cost]
    teacher: SegmentationNetwork | None
    progress: Progress
    cells: Sequence[Cell]
    beside: int | None

    def train(self, cell: Cell, label: str, left: str) -> Run:
        """Train a cell, and before it what it branches off from; ``left`` is for its bar."""
        plan = trunk_plan(self.study, self.cells, cell)
        trunk = self._trunk(plan, cell, left) if plan else None
        study = self.study
        validation = Validation(
            study.val_data,
            study.study.evaluation.batch,
            study.study.evaluation.points,
            study.scenario.groups() if study.scenario else {},
            study.views,
        )
        return self._train(cell, validation, label, left, trunk=trunk)

    def _trunk(self, plan: TrunkPlan, cell: Cell, left: str) -> Trunk | None:
        """Train the trunk as far as its branches need; return where a cell branches off."""
        folder = self.store.trunk_folder(plan.method, plan.seed)
        state = folder.mark(plan.marks[cell.budget])
        if not state.exists():
            marks = set(plan.marks.values())
            longest = plan.longest
            end = max(marks)
            share = None if longest.planned_s is None else longest.planned_s / longest.iterations
            trunk = Cell(
                plan.method, TRUNK, plan.seed, end, end, end, longest.span, share and share * end
            )
            label = f"{plan.method} trunk seed {plan.seed}"
            run = self._train(trunk, None, label, left, marks=marks)
            self.progress.say(f"{label}: {run.iterations} iterations, {run.train_s.actual:.1f} s")
        if state.exists():
            return Trunk(state)
        self.progress.say(
            f"{cell.label()}: its trunk went past iteration {plan.marks[cell.budget]} before this "
            "budget was known; trained alone"
        )
        return None

    def _train(
        self,
        cell: Cell,
        validation: Validation | None,
        label: str,
        left: str,
        *,
        trunk: Trunk | None = None,
        marks: set[int] | None = None,
    ) -> Run:
        study, cost = self.study, self.costs[cell.method]
        is_trunk = marks is not None
        folder = (
            self.store.trunk_folder(cell.method, cell.seed) if is_trunk else cell.folder(self.store)
        )
        with folder.lock():
            # An interrupted run keeps its length: its learning rates were set for it.
            made = None if is_trunk else folder.read_run()
            if made is not None and made.finished:
                return made  # by another process, since this one looked
            run = made or new_run(study, cell, cost)
            run = run.model_copy(update={"beside": self.beside})
            study.forget_steps()
            step = study.step(
                cell.method, self.teacher, seed=cell.seed, iterations=run.schedule_iterations
            )
            training = TrainingRun(
                folder,
                run,
                step,
                study.batches(cell.seed),
                validation,
                study.study.training,
                cost=cost,
                meter=study.hardware.energy_meter(),
                trunk=trunk,
                marks=marks or (),
            )
            return training.train(self.progress, label, left)


def trained_teacher(study: ResolvedStudy, store: Store, progress: Progress) -> SegmentationNetwork:
    """Return the study's teacher as steps read it; trained on the first call, read later.

    Its cost is in its own record and in no method's budget.
    """
    folder = store.teacher_folder()
    if (published := study.published_teacher()) is not None:
        network, told = published
        if not _is_finished(folder.read_run()):
            with folder.lock():
                _score_teacher(study, folder, network)
            progress.say(f"teacher: {told}; mIoU {100 * folder.read_run().miou:.2f} %")
        return study.frozen(network)
    if not _is_finished(folder.read_run()):
        with folder.lock():
            run = folder.read_run()
            if study.ranks and study.ranks.restarts and run is not None and run.failure:
                raise KdprofError(f"teacher: {run.failure.reason}")
            if not _is_finished(run):
                return study.frozen(_train_teacher(study, folder, run, progress))
    return study.frozen(_read_teacher(study, folder))


def _is_finished(run: Run | None) -> bool:
    return run is not None and run.finished


def _train_teacher(
    study: ResolvedStudy, folder: RunFolder, run: Run | None, progress: Progress
) -> SegmentationNetwork:
    iterations = study.study.teacher_training.iterations
    cell = Cell(TEACHER, str(iterations), 0, iterations, iterations, iterations, iterations, None)
    study.forget_steps()
    evaluation, step = study.study.evaluation, study.teacher_step()
    training = TrainingRun(
        folder,
        run or new_run(study, cell, None),
        step,
        study.teacher_batches(),
        Validation(study.teacher_val_data, evaluation.batch, evaluation.points, {}, study.views),
        study.study.training,
        meter=study.hardware.energy_meter(),
    )
    progress.say(f"teacher: {_outcome(training.train(progress, TEACHER))}")
    return step.student


def _score_teacher(study: ResolvedStudy, folder: RunFolder, network: SegmentationNetwork) -> None:
    """Write the record of a teacher that came with its weights."""
    began, data = time.monotonic(), study.teacher_val_data
    found = evaluate(
        network,
        data,
        study.device,
        batch=study.study.evaluation.batch,
        autocast=torch.autocast(study.device.type, enabled=False),
        views=study.views,
    )
    cell = Cell(TEACHER, "weights", 0, 0, 0, 0, 0, None)
    run = new_run(study, cell, None)
    scores = {
        "miou": found.miou,
        "best_miou": found.miou,
        "miou_per_class": dict(zip(data.class_names, found.per_class, strict=True)),
        "eval_s": time.monotonic() - began,
        "finished": True,
    }
    write_record(folder.record, run.model_copy(update=scores))


def _read_teacher(study: ResolvedStudy, folder: RunFolder) -> SegmentationNetwork:
    """Return the trained teacher.

    Raises:
        KdprofError: its weights are damaged or of another iteration.
    """
    state, damage = checkpoint.load(folder)
    if damage is not None or state is None or state["iteration"] != folder.read_run().iterations:
        raise KdprofError(
            f"{damage or 'the teacher has no checkpoint'}; delete {folder.path} to train it again"
        )
    teacher = study.placed_teacher()
    teacher.load_state_dict(state["step"]["student"])
    return teacher
