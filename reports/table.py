"""Table: accuracy and cost of every method under every budget, with intervals.

Intervals are 95 % by Student's t over seeds; a single seed has none.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from kdprof.budget import parse_budget
from kdprof.records import CONTROL, REFERENCE, Cost, Run
from kdprof.stats.intervals import mean_interval
from kdprof.store import Store, write_together

from .results import (
    Results,
    collect,
    count,
    device_text,
    drift_text,
    drifted,
    final_miou,
    run_notes,
    study_text,
)
from .text import (
    MISSING,
    Estimate,
    Grid,
    csv_cell,
    duration,
    flagged,
    markdown_text,
    print_notes,
)


@dataclass(frozen=True)
class Row:
    """One method under one budget; means over its finished seeds."""

    budget: str
    matched: str
    """What the budget makes equal among methods."""
    method: str
    iterations: int
    planned_s: float | None
    actual_s: float
    drift_percent: float | None
    miou_percent: Estimate
    seeds: int
    delta_points: Estimate | None
    """mIoU minus that of kd, percentage points, paired by seed."""
    rank: int
    """By mean mIoU within the budget; 1 is best."""
    latency_ratio: Estimate | None
    """Step latency divided by that of none."""
    reliable: bool | None
    """True if all Costs that the runs were planned with are reliable; None if none is stored."""
    drifted: bool
    """True if any of the runs is more than 2 % off its planned seconds."""
    drift_by_seed: str
    """How far each run is off its planned seconds: ``0: +3.0 %; 1: -0.4 %``."""
    classes: str = ""
    """How many classes the mIoU is the mean over: ``2 of 19``; empty if not recorded."""
    groups_percent: dict[str, Estimate] = field(default_factory=dict)
    """mIoU over groups of classes: old and new in a class-incremental scenario."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a field is None."""


def rows(store: Store) -> list[Row]:
    """Return the rows, the smallest budget first, by rank within a budget.

    Raises:
        UserError: the store has no finished run.
    """
    return _rows(collect(store))


def _rows(results: Results) -> list[Row]:
    found = []
    for budget in results.budgets():
        made = [
            _row(results, group)
            for method in results.methods()
            if (group := results.group(method, budget))
        ]
        made.sort(key=lambda row: (-row.miou_percent.value, row.method))
        found += [replace(row, rank=_rank(row, made)) for row in made]
    return found


def _rank(row: Row, rivals: Sequence[Row]) -> int:
    """Return 1 + the number of better methods, so that equal means share a rank."""
    return 1 + sum(rival.miou_percent.value > row.miou_percent.value for rival in rivals)


def _row(results: Results, group: list[Run]) -> Row:
    first = group[0]
    missing: dict[str, str] = {}
    planned = [run.train_s.planned for run in group if run.train_s.planned]
    if len(planned) < len(group):
        missing["planned_s"] = missing["drift_percent"] = "no seconds were planned"
    planned_s = float(np.mean(planned)) if "planned_s" not in missing else None
    actual_s = float(np.mean([run.train_s.actual for run in group]))
    costs = [cost for run in group for cost in results.planning_costs(run)]
    if not costs:
        missing["reliable"] = "not planned with a stored cost"
    if not (classes := _classes(group)):
        missing["classes"] = "no IoU by class was recorded"
    return Row(
        budget=first.budget,
        matched=parse_budget(first.budget).matches,
        method=first.method,
        iterations=round(np.mean([run.iterations_done for run in group])),
        planned_s=planned_s,
        actual_s=actual_s,
        drift_percent=100 * (actual_s / planned_s - 1) if planned_s else None,
        miou_percent=Estimate(*mean_interval([100 * final_miou(run) for run in group])),
        seeds=len(group),
        delta_points=_delta(results, group, missing),
        rank=0,
        latency_ratio=_latency_ratio(results.cost_of(group[-1]), missing),
        reliable=all(cost.reliable for cost in costs) if costs else None,
        drifted=any(map(drifted, group)),
        drift_by_seed="; ".join(f"{run.seed}: {drift_text(run)}" for run in group),
        classes=classes,
        groups_percent=_groups(group),
        missing=missing,
    )


def _classes(group: list[Run]) -> str:
    found = sorted({scored for run in group if (scored := run.classes_scored()) is not None})
    return "; ".join(f"{number} of {every}" for number, every in found)


def _groups(group: list[Run]) -> dict[str, Estimate]:
    """Return the mIoU of each group of classes for which every run has one."""
    found = {}
    for name in group[0].miou_of:
        scores = [100 * miou for run in group if (miou := run.miou_of.get(name)) is not None]
        if len(scores) == len(group):
            found[name] = Estimate(*mean_interval(scores))
    return found


def _delta(results: Results, group: list[Run], missing: dict[str, str]) -> Estimate | None:
    """Return mIoU minus that of kd, over the seeds that both finished."""
    if group[0].method == CONTROL:
        missing["delta_points"] = f"{CONTROL} is the control"
        return None
    control = {run.seed: final_miou(run) for run in results.group(CONTROL, group[0].budget)}
    gains = [100 * (final_miou(run) - control[run.seed]) for run in group if run.seed in control]
    if not gains:
        missing["delta_points"] = f"{CONTROL} has no finished run of the same budget and seed"
        return None
    return Estimate(*mean_interval(gains))


def _latency_ratio(cost: Cost | None, missing: dict[str, str]) -> Estimate | None:
    if cost is None:
        missing["latency_ratio"] = "no stored cost of the method"
        return None
    ratio = cost.ratio
    if ratio is None or ratio.to != REFERENCE:
        # Separate sessions differ in clocks and load, so no ratio is computed across them.
        why = f"its ratio is to {ratio.to}" if ratio else cost.unavailable.get("ratio", "not known")
        missing["latency_ratio"] = why
        return None
    return Estimate(ratio.median, ratio.low, ratio.high)


def render(store: Store) -> list[Path]:
    """Write ``table.md``, ``table.csv`` and ``table.tex`` into ``reports/`` and return the files.

    Raises:
        UserError: the store has no finished run.
    """
    results = collect(store)
    made = _rows(results)
    texts = {
        "table.md": _markdown(results, made),
        "table.csv": _csv(made),
        "table.tex": _latex(results, made),
    }
    paths = {store.reports / name: text for name, text in texts.items()}
    write_together(paths)
    return list(paths)


def print_table(store: Store, console: Console) -> None:
    """Print the table, one grid per budget, and its notes.

    Raises:
        UserError: the store has no finished run.
    """
    results = collect(store)
    made = _rows(results)
    print_notes(header(results), console)
    for grid in grids(made, compact=True):
        grid.print(console)
    print_notes(notes(results, made), console)


def header(results: Results) -> list[str]:
    """Return the study, the device and the teacher, whose cost is part of no run."""
    lines = [f"Study: {study_text(results.study)}.", f"Device: {device_text(results.devices())}."]
    teacher = results.teacher
    if teacher is None:
        return [*lines, "Teacher: no run in this folder."]
    miou = MISSING if teacher.miou is None else f"{100 * teacher.miou:.2f} %"
    if not teacher.iterations:
        return [*lines, f"Teacher: mIoU {miou}; it was not trained here."]
    state = "" if teacher.finished else ", not finished"
    return [
        *lines,
        f"Teacher: mIoU {miou}; training it took {duration(teacher.train_s.actual)} "
        f"({count(teacher.iterations_done, 'iteration')}{state}), part of no run's compute.",
    ]


def grids(made: Sequence[Row], *, compact: bool = False) -> list[Grid]:
    """Return one grid of text per budget; ``compact`` fits a terminal of 80 columns, without the
    planned seconds (they follow from the drift) and the interval of the step's ratio."""
    cells = [_cells(row, compact) for row in made]
    budgets = dict.fromkeys((row.budget, row.matched) for row in made)
    return [
        Grid(
            f"{budget}: equal {equal}",
            list(cells[0]),
            [
                list(texts.values())
                for row, texts in zip(made, cells, strict=True)
                if (row.budget, row.matched) == (budget, equal)
            ],
        )
        for budget, equal in budgets
    ]


def _cells(row: Row, compact: bool) -> dict[str, str]:
    """Return a row's texts by column."""
    name = flagged(row.method + "*" * row.drifted, row.reliable is False)
    delta, ratio = row.delta_points, row.latency_ratio
    if compact and ratio:
        ratio = Estimate(ratio.value)
    planned = {"planned": MISSING if row.planned_s is None else duration(row.planned_s)}
    return {
        "method": name,
        "#" if compact else "rank": str(row.rank),
        "mIoU %": row.miou_percent.plus_minus(2),
        **{f"{name} %": found.plus_minus(2) for name, found in row.groups_percent.items()},
        f"vs {CONTROL}": delta.plus_minus(2, signed=True) if delta else MISSING,
        "seeds": str(row.seeds),
        "iter." if compact else "iterations": f"{row.iterations:,}",
        **({} if compact else planned),
        "actual": duration(row.actual_s),
        "drift": MISSING if row.drift_percent is None else f"{row.drift_percent:+.1f} %",
        f"step / {REFERENCE}": ratio.text(2) if ratio else MISSING,
    }


def notes(results: Results, made: Sequence[Row]) -> list[str]:
    """Return what a reader must know before comparing the numbers, one sentence each."""
    found = [
        "mIoU is the last iterate's, mean over seeds; rank is by it. Intervals are 95 %: ± by "
        f"Student's t over seeds, brackets by bootstrap over rounds. 'vs {CONTROL}' is in "
        "percentage points, paired by seed, with the variance of that pair alone; the verdict and "
        "claims pool variances where they may, so their intervals differ. Times exclude evaluation "
        "and checkpoints."
    ]
    if gpus := {run.gpus for run in results.finished} - {1}:
        found.append(
            f"A run is trained by {' or '.join(map(str, sorted(gpus)))} devices together: its "
            "GPU-hours are its time multiplied by their number (plot --x gpu-hours)."
        )
    if any(row.groups_percent for row in made):
        found.append(
            "old: mIoU over the classes that the teacher knows, with the background; new: over "
            "those that only the student learned."
        )
    if single := [f"{row.method} {row.budget}" for row in made if row.seeds == 1]:
        every = len(single) == len(made)
        found.append(f"One seed, so no interval: {'all' if every else ', '.join(single)}.")
    if len(results.devices()) > 1:
        found.append("Runs are from different devices: their wall-clock times cannot be compared.")
    found += run_notes(results)
    return found + _missing_notes(made)


def _missing_notes(made: Sequence[Row]) -> list[str]:
    """Return the reasons for dashes: one note per column and reason."""
    titles = {"planned_s": "planned, drift", "delta_points": f"vs {CONTROL}",
              "latency_ratio": f"step / {REFERENCE}", "reliable": "reliability"}  # fmt: skip
    where: dict[tuple[str, str], list[str]] = {}
    for row in made:
        for name, reason in row.missing.items():
            if name in titles:
                where.setdefault((titles[name], reason), []).append(f"{row.method} {row.budget}")
    return [
        f"'{MISSING}' in {title}: {reason} "
        f"({'all' if len(cells) == len(made) else ', '.join(cells)})."
        for (title, reason), cells in where.items()
        if not reason.startswith(CONTROL + " is")  # obvious from the table
    ]


def _markdown(results: Results, made: Sequence[Row]) -> str:
    parts = [
        "# Accuracy at matched compute",
        "\n".join(f"- {markdown_text(line)}" for line in header(results)),
    ]
    for grid in grids(made):
        parts += [f"## {markdown_text(grid.title)}", grid.markdown()]
    parts += ["## Notes", "\n".join(f"- {markdown_text(note)}" for note in notes(results, made))]
    return "\n\n".join(parts) + "\n"


def _latex(results: Results, made: Sequence[Row]) -> str:
    r"""Return a ``table`` per budget for ``\usepackage{booktabs}``; the last one has the notes."""
    found = grids(made, compact=True)
    below = notes(results, made)
    tables = [
        grid.without_empty().latex(f"tab:accuracy-{number}", below if number == len(found) else ())
        for number, grid in enumerate(found, 1)
    ]
    return "\n\n".join(["% Made by kdprof plot. Needs \\usepackage{booktabs}.", *tables]) + "\n"


def _csv(made: Sequence[Row]) -> str:
    """Return one line per row; an estimate takes three columns, and the last column has the reasons
    for empty cells."""
    lines = [_flat(row) for row in made]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(cell) for name, cell in line.items()} for line in lines)
    return text.getvalue()


def _flat(row: Row) -> dict[str, str]:
    estimates = {"miou_percent", "delta_points", "latency_ratio"}
    flat: dict[str, str] = {}
    for name in (f.name for f in fields(row) if f.name not in ("missing", "groups_percent")):
        value = getattr(row, name)
        if name in estimates:
            for part in ("value", "low", "high"):
                column = name if part == "value" else f"{name}_{part}"
                flat[column] = _plain(getattr(value, part, None))
        else:
            flat[name] = _plain(value)
    for name, found in row.groups_percent.items():
        flat[f"miou_{name}_percent"] = _plain(found.value)
    flat["missing"] = "; ".join(f"{name}: {reason}" for name, reason in row.missing.items())
    return flat


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
