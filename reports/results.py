"""What all reports of runs share: the finished runs, their costs, and how texts name them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from kdprof.budget import parse_budget
from kdprof.errors import UserError
from kdprof.records import Cost, Decision, Run
from kdprof.store import Store, newest, read_toml

from .text import MISSING, UNRELIABLE, flagged

DRIFT_LIMIT = 0.02
"""A run whose seconds are further than this fraction from the planned ones is flagged."""

NAMED_AT_MOST = 4
"""A note names at most this many runs or methods, and counts the others."""


@dataclass(frozen=True)
class Results:
    """The runs of a store, split by whether they can be compared."""

    finished: list[Run]
    left_out: list[Run]
    """Unfinished, or finished without an mIoU."""
    teacher: Run | None
    study: dict[str, Any]
    """Content of study.toml."""
    costs: list[Cost]
    """Every stored Cost."""
    decisions: list[Decision] = field(default_factory=list)
    """Comparisons whose seeds were added until they were decided."""

    def methods(self) -> list[str]:
        """Return the names of the compared methods, in alphabetical order."""
        return sorted({run.method for run in self.finished})

    def budgets(self) -> list[str]:
        """Return the budgets, the smallest (in mean seconds spent) first."""
        spent: dict[str, list[float]] = {}
        for run in self.finished:
            spent.setdefault(run.budget, []).append(run.train_s.actual)
        return sorted(spent, key=lambda budget: (sum(spent[budget]) / len(spent[budget]), budget))

    def group(self, method: str, budget: str) -> list[Run]:
        """Return the finished runs of a method under a budget, by seed."""
        return self._groups.get((method, budget), [])

    @cached_property
    def _groups(self) -> dict[tuple[str, str], list[Run]]:
        found: dict[tuple[str, str], list[Run]] = {}
        for run in sorted(self.finished, key=lambda run: run.seed):
            found.setdefault((run.method, run.budget), []).append(run)
        return found

    def cost_of(self, run: Run) -> Cost | None:
        """Return the Cost that a run was planned with; if it had no plan, the newest Cost of its
        method on its device."""
        if run.cost_key is None:
            return self._newest(run.method, run.device)
        same = [c for c in self.costs if (c.method, c.key) == (run.method, run.cost_key)]
        return same[-1] if same else None

    def planning_costs(self, run: Run) -> list[Cost]:
        """Return the stored Costs of a run's plan: of its method and of its budget's method."""
        own = self.cost_of(run)
        if own is None or run.cost_key is None:
            return []
        other = parse_budget(run.budget).method
        of_budget = self._newest(other, own.device) if other not in (None, run.method) else None
        return [own] if of_budget is None else [own, of_budget]

    def _newest(self, method: str, device: str) -> Cost | None:
        found = [c for c in self.costs if (c.method, c.device) == (method, device)]
        return newest(found) if found else None

    def unreliable(self) -> list[Cost]:
        """Return the unreliable Costs that finished runs were planned with."""
        found = {
            (cost.method, cost.key): cost
            for run in self.finished
            for cost in self.planning_costs(run)
            if not cost.reliable
        }
        return [found[key] for key in sorted(found)]

    def flagged_names(self) -> dict[str, str]:
        """Return the name of each compared method, marked if its Cost is an unreliable one that
        runs were planned with."""
        bad = {cost.method for cost in self.unreliable()}
        return {name: flagged(name, name in bad) for name in self.methods()}

    def devices(self) -> list[str]:
        """Return the devices that the finished runs were trained on."""
        return sorted({run.device for run in self.finished})


def collect(store: Store) -> Results:
    """Read what a report of runs needs.

    Raises:
        UserError: the store has no run, or no finished one, or a file is damaged.
    """
    runs = store.runs()
    usable = [run for run in runs if _usable(run)]
    if not usable:
        state = f"none of its {len(runs)} runs is finished" if runs else "no runs yet"
        raise UserError(
            f"nothing to report in {store.root}: {state}; run 'kdprof train --budget 40k@kd "
            f"--method kd --out {store.root}' first"
        )
    store.require()
    left_out = [run for run in runs if not _usable(run)]
    study = read_toml(store.study)
    return Results(usable, left_out, store.teacher_run(), study, store.costs(), store.decisions())


def _usable(run: Run) -> bool:
    return run.finished and run.miou is not None


def final_miou(run: Run) -> float:
    """Return the mIoU of one of :attr:`Results.finished`, a fraction."""
    assert run.miou is not None, "a run without an mIoU is left out"
    return run.miou


def drifted(run: Run) -> bool:
    """Return whether a run spent over 2 % more or fewer seconds than planned."""
    drift = run.train_s.drift()
    return drift is not None and abs(drift) > DRIFT_LIMIT


def drift_text(run: Run) -> str:
    """Return how far a run is off its planned seconds: ``+3.0 %``, or a dash without a plan."""
    drift = run.train_s.drift()
    return MISSING if drift is None else f"{100 * drift:+.1f} %"


def is_cpu(device: str) -> bool:
    """Return whether a record's device name is a CPU's: ``cpu``, or ``<model> (<n> threads)``."""
    return re.search(r"\bcpu\b|\(\d+ threads\)$", device, re.IGNORECASE) is not None


def device_text(devices: Iterable[str]) -> str:
    """Return the devices for a header; CPUs are marked as such."""
    named = [f"CPU: {d}" if is_cpu(d) and d.lower() != "cpu" else d for d in devices]
    return ", ".join(named)


def study_text(study: dict[str, Any]) -> str:
    """Return data, student and teacher of a study.toml in one line."""
    data = str(study.get("data", "?")).partition(":")[0]
    return f"{data}, student {study.get('student', '?')}, teacher {study.get('teacher', '?')}"


def shortened(names: Sequence[str]) -> str:
    """Return the first four names, comma-separated, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    listed = ", ".join(names[:NAMED_AT_MOST])
    return f"{listed} and {more} more" if more > 0 else listed


def count(number: int, noun: str) -> str:
    """Return ``1 seed`` or ``3 seeds``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def classes_notes(runs: Sequence[Run]) -> list[str]:
    """Return over which classes the mIoU of some runs is a mean, if not over all or not as usual.

    Without such a sentence an mIoU over 2 of 19 classes looks like any other.
    """
    scored = {found for run in runs if (found := run.classes_scored()) is not None}
    notes = []
    if any(number < every for number, every in scored):
        numbers = sorted({number for number, _ in scored})
        every = max(every for _, every in scored)
        over = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        notes.append(
            f"mIoU is the mean over {over} of {every} classes: the others are in no validation "
            "label."
        )
    if any(run.absent_classes == "zero" for run in runs):
        notes.append(
            "A class that is predicted, but in no validation label, counts with an IoU of 0 "
            "(evaluation.absent_classes)."
        )
    return notes


def flop_notes(runs: Sequence[Run]) -> list[str]:
    """Return which runs have no total of FLOP because operators are not counted."""
    missed: dict[str, dict[str, None]] = {}
    for run in runs:
        if run.flop is None and "flop" in run.unavailable:
            missed.setdefault(run.unavailable["flop"], {})[run.method] = None
    return [
        f"No FLOP of {shortened(list(methods))}: {reason}. Methods are not compared by FLOP."
        for reason, methods in missed.items()
    ]


def run_notes(results: Results) -> list[str]:
    """Return what a reader must know about the runs before comparing them, whatever the report: one
    sentence each."""
    found = _study_notes(results)
    found += classes_notes(results.finished) + flop_notes(results.finished)
    if most := max((run.concurrent_runs or 0 for run in results.finished), default=0):
        found.append(
            f"Up to {most} concurrent runs on the same machine: they share its memory bandwidth, "
            "so planned seconds may not hold."
        )
    found += _drift_notes(results)
    if bad := results.unreliable():
        methods = shortened(sorted({cost.method for cost in bad}))
        found.append(
            f"{UNRELIABLE} Planned with an unreliable cost: {methods}; costs.md says why of each."
        )
    if results.left_out:
        labels = shortened([_unfinished(run) for run in results.left_out])
        found.append(f"Left out: {labels}.")
    return found + list(map(decision_note, results.decisions))


def _study_notes(results: Results) -> list[str]:
    """Return which settings of study.toml the runs were not trained with: the file was edited."""
    other: dict[str, set[str]] = {}
    for run in results.finished:
        for name, now in _settings(results.study):
            then = (run.identity or {}).get(name)
            if then is not None and json.loads(then) != now:
                other.setdefault(f"{name} is {json.dumps(now)} there", set()).add(then)
    changes = [f"{now}, {' or '.join(sorted(then))} in runs" for now, then in other.items()]
    if not changes:
        return []
    return [f"study.toml was edited after runs had been trained: {shortened(changes)}."]


def _settings(study: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings in the sections of a study, by the names that identities of runs have.
    Paths are not among them: identities name files by their content."""
    for section, settings in study.items():
        if isinstance(settings, Mapping):
            for name, value in settings.items():
                if not isinstance(value, Mapping) and (section, name) != ("step", "optimizer"):
                    yield f"{section}.{name}", value


def _drift_notes(results: Results) -> list[str]:
    """Return how many runs spent other seconds than planned and how far off they are, in one line;
    and what it means for the comparison if they are most of the runs."""
    off = [run.train_s.drift() or 0.0 for run in results.finished if drifted(run)]
    if not off:
        return []
    sizes = sorted(100 * abs(drift) for drift in off)
    low, high = f"{sizes[0]:.0f}", f"{sizes[-1]:.0f}"
    span = low if low == high else f"{low} to {high}"
    found = [
        f"{len(off)} of {count(len(results.finished), 'run')} (* in the table) spent {span} % more "
        f"or less than planned (median {100 * median(off):+.0f} %): table.csv has each."
    ]
    if 2 * len(off) > len(results.finished):
        found.append(
            "Most runs drifted, as on a busy machine: the budgets matched what was planned, not "
            "what was spent. Figures and gains use the seconds really spent."
        )
    return found


def _unfinished(run: Run) -> str:
    state = "no mIoU" if run.finished else "failed" if run.failure else "not finished"
    return f"{run.label()} ({state}, {run.iterations_done:,} of {run.iterations:,} iterations)"


def decision_note(decision: Decision) -> str:
    """Return what a reader of ordinary intervals must know about a comparison that was stopped."""
    return (
        f"Seeds were added until '{decision.statement}' was decided ({decision.outcome} after "
        f"{count(decision.seeds, 'seed')}, of {decision.max_seeds} at most): ordinary intervals do "
        "not allow for that; its own interval, in decisions/, does."
    )
