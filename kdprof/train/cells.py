"""Cells: the trainings that a study consists of, one per (method, budget, seed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdprof.budget import Conversion, convert, parse_budget
from kdprof.errors import UserError
from kdprof.hardware.device import versions
from kdprof.models.names import published_pair
from kdprof.published import published_iterations
from kdprof.records import Cost, Run, RunKind, Spent, run_label
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import run_identity, teacher_identity
from kdprof.store import RunFolder, Store
from kdprof.train.trunk import TrunkPlan


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One planned training.

    Attributes:
        kind: a run of a method, the teacher's training, or the trunk of several runs.
        method: of a run or trunk; for the teacher, the objective that it is trained with.
        budget: empty unless the kind is ``run``.
        iterations: planned length; ``low`` and ``high`` are the ends of its 95 % interval, which
            follows from the measurement's.
        span: iterations that its learning-rate schedule spans.
        planned_s: forecast wall-clock; None if nothing is forecast.
    """

    kind: RunKind = "run"
    method: str
    budget: str = ""
    seed: int = 0
    iterations: int
    low: int
    high: int
    span: int
    planned_s: float | None = None

    @classmethod
    def teacher(cls, method: str, iterations: int) -> Cell:
        """Return the teacher's own training; 0 iterations if its weights are given."""
        return cls(
            kind="teacher",
            method=method,
            iterations=iterations,
            low=iterations,
            high=iterations,
            span=iterations,
        )

    @classmethod
    def trunk(cls, plan: TrunkPlan) -> Cell:
        """Return the trunk of a plan; its forecast uses the longest run's pace."""
        longest, end = plan.longest, max(plan.marks.values())
        planned_s = longest.planned_s
        return cls(
            kind="trunk",
            method=plan.method,
            seed=plan.seed,
            iterations=end,
            low=end,
            high=end,
            span=longest.span,
            planned_s=None if planned_s is None else planned_s / longest.iterations * end,
        )

    def label(self) -> str:
        """Return its name in messages."""
        return run_label(self.kind, self.method, self.budget, self.seed)

    def folder(self, store: Store) -> RunFolder:
        """Return the folder of its files."""
        if self.kind == "teacher":
            return store.teacher_folder()
        if self.kind == "trunk":
            return store.trunk_folder(self.method, self.seed)
        return store.run_folder(self.method, self.budget, self.seed)

    def is_finished(self, store: Store) -> bool:
        """Return whether it has been trained to its end."""
        run = self.folder(store).read_run()
        return run is not None and run.finished


def cells_of(
    study: ResolvedStudy, store: Store, names: Sequence[str], costs: Mapping[str, Cost]
) -> list[Cell]:
    """Return the cells of the named methods, ordered by budget, then by seed.

    Raises:
        UserError: a budget is less than one iteration of a method, or all warm-up, or a schedule
            has no span.
    """
    cells = []
    # All seeds of a run must have one length, even if its method was measured again since.
    before = {(run.method, run.budget): run for run in store.runs()}
    for text in study.budgets:
        budget = parse_budget(text)
        images = len(study.data.train("student")) if budget.unit == "epochs" else None
        bought = {c.method: c for c in convert(budget, costs, epoch_images=images)}
        for seed in range(study.seeds):
            for name in names:
                made = before.get((name, text))
                cells.append(_cell(study, bought[name], text, seed, made))
    return cells


def _cell(
    study: ResolvedStudy, bought: Conversion, budget: str, seed: int, made: Run | None
) -> Cell:
    iterations = made.iterations if made else bought.iterations
    planned_s = made.train_s.planned if made else bought.seconds
    span = made.schedule_iterations if made else _span(study, bought.method, iterations)
    low, high = (iterations, iterations) if made else (bought.low, bought.high)
    if not made:
        check_warmup(study, min(span, iterations), f"the budget {budget} of {bought.method}")
    return Cell(
        method=bought.method,
        budget=budget,
        seed=seed,
        iterations=iterations,
        low=low,
        high=high,
        span=span,
        planned_s=planned_s,
    )


def check_warmup(study: ResolvedStudy, iterations: int, what: str) -> None:
    """Refuse a training that would end before its learning rate is the base rate.

    Raises:
        UserError: it has no iteration after the warm-up.
    """
    warmup = study.step.warmup_iterations
    if 0 < iterations <= warmup:
        raise UserError(
            f"{what} is {iterations} iterations, all of them warm-up (step.warmup_iterations = "
            f"{warmup}); use more iterations, or a shorter warm-up"
        )


def _span(study: ResolvedStudy, method: str, iterations: int) -> int:
    training = study.training
    if training.schedule_span == "stretch":
        return iterations
    if training.schedule_span == "published":
        cls = study.methods[method].cls
        teacher = str(study.teacher_name) if cls.needs_teacher() else None
        networks = published_pair(teacher, study.plain.student)
        return published_iterations(cls, study.data.name, networks, study.step)
    if training.schedule_iterations is None:
        raise UserError(
            "training.schedule_span = 'truncate' needs training.schedule_iterations: the length "
            "of the schedule before it is cut"
        )
    return training.schedule_iterations


def identity_of(study: ResolvedStudy, kind: RunKind, method: str) -> dict[str, str]:
    """Return what a cell's weights and scores depend on, by name."""
    return teacher_identity(study) if kind == "teacher" else run_identity(study, method)


def new_run(study: ResolvedStudy, cell: Cell, cost: Cost | None) -> Run:
    """Return the record of a run that has not started."""
    training = study.training
    return Run(
        kind=cell.kind,
        method=cell.method,
        budget=cell.budget,
        seed=cell.seed,
        device=study.hardware.name,
        iterations=cell.iterations,
        schedule_iterations=cell.span,
        enforce=training.enforce if cost else "iterations",
        startup=training.startup,
        gpus=study.step.gpus,
        iterations_done=0,
        absent_classes=study.evaluation.absent_classes,
        miou=None,
        miou_per_class=None,
        best_miou=None,
        train_s=Spent(planned=cell.planned_s, actual=0.0),
        eval_s=0.0,
        checkpoint_s=0.0,
        flop=None,
        energy_j=None,
        cost_key=cost.key if cost else None,
        identity=identity_of(study, cell.kind, cell.method),
        finished=False,
        unavailable={"energy_j": study.hardware.energy_meter().reason or "nothing trained yet"},
        versions=versions(),
    )
