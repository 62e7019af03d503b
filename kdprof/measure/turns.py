"""In which order and for how long the methods of a study are measured in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kdprof.measure.latency import OnRound
from kdprof.measure.study_step import StudyBench
from kdprof.pauses import running_s
from kdprof.records import Cost
from kdprof.study import MeasureSettings

TRAINING_SHARE = 0.1
"""Measuring takes at most this share of the planned training time, unless a time is set."""
LEAST_VISIT_S = 1.0
"""A method is not visited again for less time than this."""


@dataclass(frozen=True)
class TrainingPlan:
    """The training that Costs are measured for.

    Attributes:
        seconds: of budgets that are an amount of time.
        iterations: of the other budgets, by the method whose cost each of them has.
        teacher_iterations: of the teacher's own training.
    """

    seconds: float
    iterations: Mapping[str, float]
    teacher_iterations: float

    def in_reference_iterations(
        self, ratios: Mapping[str, float], teacher_ratio: float = 0.0
    ) -> PlannedTraining:
        """Return it in iterations of the reference.

        Args:
            ratios: about how many of these an iteration of each method takes; 1 where not given.
            teacher_ratio: the same of the teacher's own training.
        """
        found = sum(count * ratios.get(name, 1.0) for name, count in self.iterations.items())
        return PlannedTraining(self.seconds, found + self.teacher_iterations * teacher_ratio)


@dataclass(frozen=True)
class PlannedTraining:
    """About how long a training takes: fixed seconds, and iterations of the reference."""

    seconds: float = 0.0
    iterations: float = 0.0

    def lasts_s(self, iteration_s: float) -> float:
        """Return its seconds, given those of an iteration of the reference."""
        return self.seconds + self.iterations * iteration_s


@dataclass(frozen=True)
class Turns:
    """Measures methods in turn.

    Attributes:
        planned: the training that follows; None if nothing is trained.
        ended: called with each method's Cost so far.
        spent_s: what earlier processes of this measurement took.
        others: how many methods later processes of this measurement will measure.
    """

    bench: StudyBench
    settings: MeasureSettings
    planned: PlannedTraining | None
    on_round: Callable[[str], OnRound]
    ended: Callable[[Cost], None]
    spent_s: float = 0.0
    others: int = 0

    def take(self, names: Sequence[str]) -> None:
        """Measure every method once, then those again whose intervals are widest, as long as time
        is left. It ends early if a method leaves memory behind.

        Raises:
            BadStep: a loss is not finite.
            UserError: a file that the loader needs cannot be used.
        """
        began = running_s() - self.spent_s
        for done, name in enumerate(names):
            if self.bench.spoiled is not None:
                return
            self._visit(name, began, share=len(names) - done + self.others)
        while self.bench.spoiled is None and (widest := self._widest(names, began)) is not None:
            self._visit(widest, began, share=1)

    def _visit(self, name: str, began: float, share: int) -> None:
        def limit(step_s: float) -> float | None:
            remaining = self._remaining_s(began, step_s)
            return None if remaining is None else max(0.0, remaining) / share

        self.ended(self.bench.visit(name, self.on_round(name), limit))

    def _widest(self, names: Sequence[str], began: float) -> str | None:
        """Return the method to visit again; None if all are precise enough or time is up."""
        remaining = self._remaining_s(began, 0.0)
        if remaining is None or self.others:
            return None
        found = {name: self.bench.readings_of(name) for name in names}
        wide = {
            name: readings.width
            for name, readings in found.items()
            if (least_s := max(LEAST_VISIT_S, readings.least_visit_s))
            and readings.first_s + least_s <= remaining
            and readings.timed.taken_s + least_s <= self.settings.max_time_s
        }
        name = max(wide, key=lambda name: wide[name], default=None)
        return name if name and wide[name] > self.settings.precision_target else None

    def _remaining_s(self, began: float, step_s: float) -> float | None:
        """Return how much time is left for all methods; None if it is not limited.

        Args:
            step_s: stands for an iteration of the reference before the first method was measured.
        """
        total = self.settings.total_time_s
        if total is None and self.planned is not None:
            total = TRAINING_SHARE * self.planned.lasts_s(
                self.bench.reference_iteration_s() or step_s
            )
        return None if total is None else total - (running_s() - began)
