"""Cells: what a study comes down to, one training per (method, budget, seed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdprof.budget import Conversion, convert, parse_budget
from kdprof.device import versions
from kdprof.errors import UserError
from kdprof.records import Cost, Run, Spent
from kdprof.resolve import ResolvedStudy
from kdprof.schedule import decay_start
from kdprof.store import RunFolder, Store
from kdprof.study import Study

TEACHER = "teacher"
"""What the teacher's own run has as its method."""
TRUNK = "trunk"
"""What the run that a method's wsd runs share has as its budget."""


@dataclass(frozen=True)
class Cell:
    """One training to be made.

    Attributes:
        iterations: what it makes; ``low`` and ``high`` are the ends of the 95 % interval that
            follows from the measurement's.
        span: iterations that its learning-rate schedule spans.
        planned_s: forecast wall-clock; None where nothing is forecast.
    """

    method: str
    budget: str
    seed: int
    iterations: int
    low: int
    high: int
    span: int
    planned_s: float | None

    def label(self) -> str:
        """Return what messages call it."""
        return f"{self.method} {self.budget} seed {self.seed}"

    def folder(self, store: Store) -> RunFolder:
        """Return where its files are."""
        return store.run_folder(self.method, self.budget, self.seed)

    def is_finished(self, store: Store) -> bool:
        """Return whether it was trained to its end."""
        run = self.folder(store).read_run()
        return run is not None and run.finished


def cells_of(
    study: ResolvedStudy, store: Store, names: Sequence[str], costs: Mapping[str, Cost]
) -> list[Cell]:
    """Return the cells of the named methods, budget by budget, seed by seed.

    Raises:
        UserError: a budget buys less than an iteration of a method, or a schedule has no span.
    """
    cells = []
    # Other seeds of a run must be as long, even where its method was measured again since.
    before = {(run.method, run.budget): run for run in store.runs()}
    for text in study.study.budgets:
        budget = parse_budget(text)
        images = len(study.batches(0).data) if budget.unit == "epochs" else None
        bought = {c.method: c for c in convert(budget, costs, epoch_images=images)}
        for seed in range(study.study.seeds):
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
    return Cell(bought.method, budget, seed, iterations, low, high, span, planned_s)


def _span(study: ResolvedStudy, method: str, iterations: int) -> int:
    training = study.study.training
    if training.learning_rate == "stretch":
        return iterations
    if training.learning_rate == "truncate":
        if training.schedule_iterations is None:
            raise UserError(
                "training.learning_rate = 'truncate' needs training.schedule_iterations: what the "
                "schedule spans before it is cut"
            )
        return training.schedule_iterations
    recipes = study.methods[method].cls.recipes
    published = [recipe.iterations for recipe in recipes if recipe.iterations]
    if not published:
        raise UserError(
            f"training.learning_rate = 'published': no iterations of '{method}' were published; "
            "use stretch or truncate"
        )
    return published[0]


def new_run(study: ResolvedStudy, cell: Cell, cost: Cost | None) -> Run:
    """Return the record of a run that has not begun."""
    training = study.study.training
    return Run(
        method=cell.method,
        budget=cell.budget,
        seed=cell.seed,
        device=study.hardware.name,
        iterations=cell.iterations,
        schedule_iterations=cell.span,
        enforce=training.enforce if cost else "iterations",
        startup=training.startup,
        gpus=study.study.step.gpus,
        iterations_done=0,
        miou=None,
        miou_per_class=None,
        best_miou=None,
        train_s=Spent(planned=cell.planned_s, actual=0.0),
        eval_s=0.0,
        checkpoint_s=0.0,
        flop=None,
        energy_j=None,
        cost_key=cost.key if cost else None,
        finished=False,
        unavailable={"energy_j": study.hardware.energy_meter().reason or "nothing trained yet"},
        versions=versions(),
    )


@dataclass(frozen=True)
class TrunkPlan:
    """What several budgets of a method and seed share under wsd: training before any decay.

    Attributes:
        marks: by budget, the iteration at which its decay begins; the longest ends the trunk.
    """

    method: str
    seed: int
    marks: Mapping[str, int]
    longest: Cell


def shares_trunks(study: Study) -> bool:
    """Return whether a method and seed is trained once until its budgets' decays begin."""
    training = study.training
    shared = training.enforce == "iterations" and training.learning_rate == "stretch"
    return study.step.schedule == "wsd" and shared


def trunk_plan(study: ResolvedStudy, cells: Sequence[Cell], cell: Cell) -> TrunkPlan | None:
    """Return the trunk that a cell branches off from; None where it is trained alone.

    Runs share a trunk where the learning rate does not know their length before the decay.
    """
    if not shares_trunks(study.study):
        return None
    family = [c for c in cells if (c.method, c.seed) == (cell.method, cell.seed)]
    marks = {c.budget: decay_start(study.study.step, c.span) for c in family}
    longest = max(family, key=lambda c: c.iterations)
    return TrunkPlan(cell.method, cell.seed, marks, longest) if marks[cell.budget] else None
