"""Matched-budget training: every (method, budget, seed) of a study, the teacher first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kdprof.budget import convert, parse_budget
from kdprof.device import versions
from kdprof.errors import KdprofError, UserError
from kdprof.measure import measure
from kdprof.measure.isolation import explain
from kdprof.models import SegmentationNetwork
from kdprof.progress import Progress
from kdprof.records import REFERENCE, Cost, Run, Spent
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.train import checkpoint
from kdprof.train.loop import Interrupted, TrainingRun

TEACHER = "teacher"
"""What the teacher's own run has as its method."""


@dataclass(frozen=True)
class Cell:
    """One training to be made."""

    method: str
    budget: str
    seed: int
    iterations: int
    planned_s: float | None


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

    A finished run is left alone, an interrupted one continues. A run that fails does not keep the
    others from being made.

    Args:
        prepared: what :func:`prepare` returned for these methods, where it was called before.

    Raises:
        UserError: a budget buys less than an iteration of a method, or a step does not fit.
        Interrupted: a signal came; everything is saved.
    """
    names = study.method_names(control=control)
    costs, failures = prepared or prepare(study, store, names, progress)
    summary = Summary(failures=list(failures))
    cells = _cells(study, store, [name for name in names if name in costs], costs)
    waiting = [cell for cell in cells if not _is_finished(store, cell)]
    summary.skipped = len(cells) - len(waiting)
    if not waiting:
        return summary
    needs_teacher = study.starts_as_teacher or any(
        study.methods[cell.method].cls.needs_teacher() for cell in waiting
    )
    teacher = trained_teacher(study, store, progress) if needs_teacher else None
    for number, cell in enumerate(waiting, 1):
        label = f"[{number}/{len(waiting)}] {cell.method} {cell.budget} seed {cell.seed}"
        try:
            run = _train_cell(study, store, costs[cell.method], cell, teacher, progress, label)
        except Interrupted:
            raise
        except Exception as error:
            # Out of memory, a mistake in a user's method: the other runs are still wanted.
            own = isinstance(error, KdprofError)  # names its run itself
            told = f"{cell.method} {cell.budget} seed {cell.seed}: "
            failure = f"{'' if own else told}{explain(error)}"
            summary.failures.append(failure)
            progress.say(f"[{number}/{len(waiting)}] failed: {failure}")
            continue
        summary.finished.append(run)
        progress.say(f"{label}: {_outcome(run)}")
    return summary


def _check_runs(study: ResolvedStudy, store: Store, names: list[str]) -> None:
    """Refuse a folder whose runs were made under other conditions than this study would make.

    Raises:
        UserError: runs of the named methods had other settings, another device or other versions.
    """
    problems = [
        f"{folder.path} was trained with other method settings, on another device or with other "
        "versions; use another --out, or delete it to train it again"
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
        UserError: a step cannot fit into the device's memory, or the folder's runs were made under
            other conditions than this study would make.
        KdprofError: no Cost of a method that a budget is measured in.
    """
    _check_runs(study, store, names)
    budgets = [parse_budget(text) for text in study.study.budgets]
    named = [b.method for b in budgets if b.method]
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


def _cells(
    study: ResolvedStudy, store: Store, names: list[str], costs: dict[str, Cost]
) -> list[Cell]:
    cells = []
    # Other seeds of a run must be as long, even where its method was measured again since.
    before = {(run.method, run.budget): run for run in store.runs()}
    for text in study.study.budgets:
        bought = {c.method: c for c in convert(parse_budget(text), costs)}
        for seed in range(study.study.seeds):
            for name in names:
                made = before.get((name, text))
                iterations = made.iterations if made else bought[name].iterations
                planned = made.train_s.planned if made else bought[name].seconds
                cells.append(Cell(name, text, seed, iterations, planned))
    return cells


def _is_finished(store: Store, cell: Cell) -> bool:
    run = store.run_folder(cell.method, cell.budget, cell.seed).read_run()
    return run is not None and run.finished


def _outcome(run: Run) -> str:
    drift = run.train_s.drift()
    told = "" if drift is None else f" ({drift:+.1%} of plan)"
    return (
        f"mIoU {100 * (run.miou or 0):.2f} % after {run.iterations} iterations, "
        f"{run.train_s.actual:.1f} s{told}"
    )


def _train_cell(
    study: ResolvedStudy,
    store: Store,
    cost: Cost,
    cell: Cell,
    teacher: SegmentationNetwork | None,
    progress: Progress,
    label: str,
) -> Run:
    folder = store.run_folder(cell.method, cell.budget, cell.seed)
    with folder.lock():
        # An interrupted run keeps its length: its learning rates were set for it.
        run = folder.read_run() or _new_run(
            study, cell.method, cell.budget, cell.seed, cell.iterations, cell.planned_s, cost.key
        )
        step = study.step(cell.method, teacher, seed=cell.seed, iterations=run.iterations)
        training = TrainingRun(
            folder,
            run,
            step,
            study.batches(cell.seed),
            study.val_data,
            study.study.evaluation,
            None if cost.flop is None else cost.flop.total,
            study.scenario.groups() if study.scenario else {},
        )
        return training.train(progress, label)


def _new_run(
    study: ResolvedStudy,
    method: str,
    budget: str,
    seed: int,
    iterations: int,
    planned_s: float | None,
    cost_key: str | None,
) -> Run:
    return Run(
        method=method,
        budget=budget,
        seed=seed,
        device=study.hardware.name,
        iterations=iterations,
        iterations_done=0,
        miou=None,
        miou_per_class=None,
        best_miou=None,
        train_s=Spent(planned=planned_s, actual=0.0),
        eval_s=0.0,
        checkpoint_s=0.0,
        flop=None,
        energy_j=None,
        cost_key=cost_key,
        finished=False,
        unavailable={"energy_j": "measured per step, in the Cost; a run is not metered"},
        versions=versions(),
    )


def trained_teacher(study: ResolvedStudy, store: Store, progress: Progress) -> SegmentationNetwork:
    """Return the study's teacher, on the device; trained on the first call, read later.

    Its cost is in its own record and in no method's budget.
    """
    folder = store.teacher_folder()
    with folder.lock():
        run = folder.read_run()
        step = study.teacher_step()
        if run is None or not run.finished:
            iterations = study.study.teacher_training.iterations
            run = run or _new_run(study, TEACHER, str(iterations), 0, iterations, None, None)
            batches, settings = study.teacher_batches(), study.study.evaluation
            data = study.teacher_val_data
            training = TrainingRun(folder, run, step, batches, data, settings, None)
            run = training.train(progress, "teacher")
            progress.say(f"teacher: {_outcome(run)}")
            return step.student
    state, damage = checkpoint.load(folder)
    if damage is not None or state is None or state["iteration"] != run.iterations:
        raise KdprofError(
            f"{damage or 'the teacher has no checkpoint'}; delete {folder.path} to train it again"
        )
    step.student.load_state_dict(state["step"]["student"])
    return step.student
