"""The last part: a study at matched budgets, with as many seeds as the minutes allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdprof.records import Cost
from kdprof.reports.atlas_check import without_paths
from kdprof.store import Store, newest_by_method

from .base import Part
from .plan import plan_budgets, plan_teacher, seed_s
from .state import StudyRecord

COSTS = "study-costs"
"""Folder of the study's Costs, in the working folder. They are measured before the budgets are
known, and a folder of results belongs to one study."""
STUDY = "study"
RESULTS = f"../{STUDY}"
"""The folder of results, as the processes see it from the working folder."""
MEASURED, TEACHER, REPORT = "study costs", "study teacher", "study report"
FORECAST_SMALLEST_S = 2.0
"""Of the smallest budget, before it is known."""


class Studying(Part):
    """Costs, the teacher, budgets, then one piece for each seed of all methods, and the report."""

    name = "study"

    def forecast_s(self) -> float:
        size, done = self.call.size, self.call.state.is_done
        seeds = [n for n in range(size.most_seeds) if not done(_seed(n))]
        if not seeds:
            return 0.0
        before = 0.0 if done(MEASURED) else size.start_s + size.method_s * len(size.study_methods)
        before += 0.0 if done(TEACHER) else size.start_s
        return before + len(seeds) * self._seed_s() + size.report_s

    def do(self, ends_s: float) -> None:
        if not self.forecast_s():
            return
        trained = []
        if self._costs(ends_s) and self._teacher(ends_s):
            self._plan_budgets(ends_s)
            trained = self._trained()
        for number in range(self.call.size.most_seeds):
            name = _seed(number)
            if self.call.state.is_done(name):
                continue
            if not self._ready():
                self.call.leave(name, "the study has no Costs or no teacher yet")
            elif self._fits(name, self._seed_s(), ends_s + self.call.size.report_s):
                overrides = self._overrides(seeds=number + 1)
                limit_s = self._left_s(ends_s) - self.call.size.report_s
                self.call.run(name, "train", self._training(overrides), limit_s)
                trained = self._trained()
        if trained:
            arguments = {"out": RESULTS, "budgets": self._plan().budgets}
            self.call.run(REPORT, "report", arguments, self._left_s(ends_s))

    def _ready(self) -> bool:
        return self.call.state.is_done(MEASURED) and self.call.state.is_done(TEACHER)

    def _trained(self) -> list[str]:
        """Return the seeds that have runs."""
        done = self.call.state.record.pieces
        return [n for n in map(_seed, range(self.call.size.most_seeds)) if n in done]

    def _costs(self, ends_s: float) -> bool:
        """Measure the study's methods; return whether that is done."""
        size = self.call.size
        if self.call.state.is_done(MEASURED):
            return True
        if not self._fits(MEASURED, size.start_s + size.method_s, ends_s):
            return False
        overrides = self._unplanned() | {"budgets": []}
        arguments = {**self._source(overrides), "measuring": dict(size.measuring), "out": COSTS}
        found = self.call.run(MEASURED, "measure", arguments, self._left_s(ends_s))
        if found.result:
            # Budgets need the Cost of every method: the next call tries again.
            failed = [f"{name} failed: {why}" for name, why in found.result.items()]
            reason = without_paths("; ".join(failed))
            self.call.state.note(
                MEASURED, found.model_copy(update={"state": "failed", "reason": reason})
            )
            self.call.leave(MEASURED, reason)
        return self.call.state.is_done(MEASURED)

    def _teacher(self, ends_s: float) -> bool:
        """Train the teacher; return whether that is done."""
        state, size = self.call.state, self.call.size
        if state.is_done(TEACHER):
            return True
        if state.record.study is None:
            iterations = self._teacher_iterations(ends_s)
            if iterations < size.least_teacher_iterations:
                least = f"{size.least_teacher_iterations} iterations"
                self.call.leave(TEACHER, f"its share of the time left allows fewer than {least}")
                return False
            state.record.study = StudyRecord(teacher_iterations=iterations)
            state.save()
        if not self._fits(TEACHER, size.start_s, ends_s):
            return False
        arguments = self._training(self._overrides(seeds=1)) | {"costs": COSTS}
        self.call.run(TEACHER, "teacher", arguments, self._left_s(ends_s))
        return state.is_done(TEACHER)

    def _teacher_iterations(self, ends_s: float) -> int:
        forward_s = (self._measured()["kd"].phases_s or {})["teacher_forward"]
        available_s = self._available_s(ends_s) - self.call.size.start_s
        return plan_teacher(max(0.0, available_s), forward_s, self.call.size)

    def failures(self) -> Iterator[str]:
        for name in self._trained():
            yield from (f"{name}: {failure}" for failure in self.call.state.result(name) or ())

    def _plan_budgets(self, ends_s: float) -> None:
        """Choose the budgets, by the time that there is now; they are fixed by the first seed."""
        plan = self._plan()
        if not self._trained():
            costs = self._measured().items()
            iteration_s = {name: one.seconds_per_iteration().median for name, one in costs}
            available_s = self._available_s(ends_s)
            plan.budgets = plan_budgets(available_s, iteration_s, self._run_s(), self.call.size)
            self.call.state.save()

    def _measured(self) -> dict[str, Cost]:
        return newest_by_method(Store(self.call.work / COSTS).costs())

    def _available_s(self, ends_s: float) -> float:
        """Return the seconds that the planned seeds have for their runs."""
        size = self.call.size
        return max(0.0, self._left_s(ends_s) - size.report_s - size.planned_seeds * size.start_s)

    def _run_s(self) -> float:
        """Return the seconds of a run but for its training. The first evaluation reads all images,
        and the teacher is the larger network: the others take no longer."""
        size, folder = self.call.size, self.call.folder / STUDY
        teacher = Store(folder).teacher_folder().read_run() if folder.exists() else None
        return size.run_s + (teacher.eval_s if teacher else size.evaluation_s)

    def _plan(self) -> StudyRecord:
        found = self.call.state.record.study
        assert found is not None, "the study is planned before it is trained"
        return found

    def _seed_s(self) -> float:
        """Return the seconds of a seed: those of the last one that was trained, or the forecast."""
        size, pieces = self.call.size, self.call.state.record.pieces
        known = [pieces[n].seconds for n in self._trained() if pieces[n].state == "done"]
        if known:
            return known[-1]
        plan = self.call.state.record.study
        budgets = plan.budgets if plan else []
        smallest_s = float(budgets[0].removesuffix("s")) if budgets else FORECAST_SMALLEST_S
        return size.start_s + seed_s(smallest_s, len(size.study_methods), self._run_s())

    def _source(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return {"source": self.call.size.study, "overrides": overrides}

    def _training(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return {**self._source(overrides), "out": RESULTS}

    def _unplanned(self) -> dict[str, Any]:
        """Return the settings of the study but for its budgets and its teacher."""
        size = self.call.size
        return {
            **size.study_changes,
            "data": self.call.data or "synthetic",
            "device": self.call.device,
            "methods": list(size.study_methods),
            "student_backbone_weights": "none",
            "teacher_backbone_weights": "none",
            "step.schedule": "wsd",
            "evaluation.points": 1,
        }

    def _overrides(self, seeds: int) -> dict[str, Any]:
        plan = self._plan()
        return self._unplanned() | {
            "budgets": plan.budgets,
            "teacher_training.iterations": plan.teacher_iterations,
            "seeds": seeds,
        }


def _seed(number: int) -> str:
    return f"study seed {number}"
