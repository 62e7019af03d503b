"""The sections with tables: what a step costs, and accuracy at matched compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kdprof.budget import parse_budget
from kdprof.records import REFERENCE, Cost
from kdprof.store import different_devices

from .. import cost_grids, table
from ..text import MISSING, Estimate
from ..verdict import Pair, Verdict
from ..verdict_text import further_text
from . import charts
from .content import Content, Section, chance, cost_id, folded, runs_id, signed
from .markup import Markup, tag
from .tables import Cell, Line
from .tables import table as sortable


def cost_section(content: Content) -> Section | None:
    """Return bars by phase and the table of costs, or why they are not compared; None if no Cost is
    stored."""
    costs = content.newest
    if not costs:
        return None
    if why := different_devices(costs):
        parts = [tag("p", f"Not compared: {why}.")]
        return Section("cost", "Cost per step", "What one step costs", parts)
    rows = [_stack(cost, content.phases) for cost in costs if cost.phases_s]
    words = {phase: cost_grids.phase_words(phase) for phase in content.phases}
    parts = [
        tag("p", _cost_lead(costs), class_="soft"),
        tag("figure", charts.stacks(rows, content.phases, words)) if rows else Markup(),
        _cost_table(costs),
    ]
    return Section("cost", "Cost per step", "What one step costs", parts)


def _cost_lead(costs: Sequence[Cost]) -> str:
    reference = cost_grids.reference_name(costs)
    text = (
        "Seconds of one training step by phase, the cheapest ratio first; at the end the ratio to "
        f"{reference}, paired round by round, and the step's median."
    )
    hatched = any(not cost.reliable for cost in costs)
    return text + " Hatched: measured unreliably, see how it was measured." * hatched


def _stack(cost: Cost, phases: Iterable[str]) -> charts.Stack:
    own = cost.phases_s or {}
    ratio, latency = cost.ratio, cost.latency_s
    texts = [f"{ratio.median:.2f}x {ratio.to}"] if ratio else []
    texts += [f"{1e3 * latency.median:.4g} ms"] if latency else []
    return charts.Stack(
        cost.method,
        {phase: own[phase] for phase in phases if own.get(phase, 0) > 0},
        not cost.reliable,
        ", ".join(texts),
        (ratio.median if ratio else None, latency.median if latency else None),
    )


def _cost_table(costs: Sequence[Cost]) -> Markup:
    grid = cost_grids.main_grid(costs).without_empty()
    lines = [
        Line([_cost_cell(cost, name, text) for name, text in zip(grid.header, row, strict=True)])
        for cost, row in zip(costs, grid.rows, strict=True)
    ]
    return sortable(grid.title, grid.header, lines)


def _cost_cell(cost: Cost, column: str, text: str) -> Cell:
    if column == "method":
        return Cell(text, target=cost_id(cost))
    make = next(make for start, make in COST_COLUMNS.items() if column.startswith(start))
    value = make(cost)
    if value is None or isinstance(value, (int, float)):
        return Cell(text, value)
    return Cell(text, value.median, also=(value.low, value.high))


COST_COLUMNS: dict[str, Callable[[Cost], Any]] = {
    "step": lambda cost: cost.latency_s,
    "/ ": lambda cost: cost.ratio,
    "end-to-end": lambda cost: cost.end_to_end_s,
    "GFLOP": cost_grids.flop_total,
    "hidden": lambda cost: cost.hidden_cost,
    "moved": lambda cost: cost.bytes_moved,
    "memory": lambda cost: cost.memory_bytes.peak_allocated or cost.memory_bytes.process,
    "process": lambda cost: cost.memory_bytes.process,
    "energy": lambda cost: cost.energy_j,
    "MFU": lambda cost: cost.mfu,
}
"""The number behind each column of the main grid of costs, by how its title begins."""


def table_section(content: Content) -> Section | None:
    """Return the tables of results and of differences; None if no run is finished."""
    if content.results is None:
        return None
    budgets = content.results.budgets()
    parts = [
        folded(f"{grid.title}", place >= len(budgets) - 2, _result_table(content, grid, own))
        for place, (grid, own) in enumerate(_by_budget(content))
    ]
    if content.verdict:
        parts += [_pair_table(budget, content.verdict) for budget in reversed(budgets)]
    return Section("tables", "Tables", "Accuracy and cost at matched compute", parts)


def _by_budget(content: Content) -> list[tuple[table.Grid, list[table.Row]]]:
    return [
        (grid, [row for row in content.rows if grid.title == f"{row.budget}: equal {row.matched}"])
        for grid in table.grids(content.rows)
    ]


def _result_table(content: Content, grid: table.Grid, rows: Sequence[table.Row]) -> Markup:
    best = content.verdict.best.get(rows[0].budget, {}) if content.verdict else {}
    lines = []
    for row, texts in zip(rows, grid.rows, strict=True):
        named = zip(grid.header, texts, strict=True)
        cells = [_result_cell(row, name, text) for name, text in named]
        cells += [chance(best.get(row.method))] if best else []
        lines.append(Line(cells))
    header = [*grid.header, *(["P(best)"] if best else [])]
    return sortable(grid.title, header, lines)


def _result_cell(row: table.Row, column: str, text: str) -> Cell:
    if column == "method":
        return Cell(text, title=row.drift_by_seed if row.drifted else None)
    if column == "seeds":
        return Cell(text, row.seeds, "the records of these runs", runs_id(row.method, row.budget))
    estimate = _estimates(row).get(column)
    if estimate is not None:
        return Cell(text, estimate.value, also=(estimate.low, estimate.high))
    values: dict[str, float | None] = {
        "rank": row.rank,
        "iterations": row.iterations,
        "planned": row.planned_s,
        "actual": row.actual_s,
        "drift": row.drift_percent,
    }
    return Cell(text, values.get(column))


def _estimates(row: table.Row) -> dict[str, Estimate | None]:
    return {
        "mIoU %": row.miou_percent,
        f"vs {table.CONTROL}": row.delta_points,
        f"step / {REFERENCE}": row.latency_ratio,
        **{f"{name} %": found for name, found in row.groups_percent.items()},
    }


def _pair_table(budget: str, verdict: Verdict) -> Markup:
    pairs = [pair for pair in verdict.pairs if pair.budget == budget]
    if not pairs:
        return Markup()
    header = ("better", "worse", "points", "95 % interval", "all pairs", "P(better)", "seeds",
              "further seeds")  # fmt: skip
    lines = [Line(_pair_cells(pair)) for pair in pairs]
    lead = tag(
        "p",
        "'All pairs' holds for all pairs of the budget together. Further seeds would show a "
        "difference of this size with 90 % power.",
        class_="soft",
    )
    title = f"{budget}: differences between methods at equal {parse_budget(budget).matches}"
    return folded(title, False, lead, sortable(title, header, lines, ("worse",)), long=True)


def _pair_cells(pair: Pair) -> list[Cell]:
    more = further_text(pair)
    return [
        Cell(pair.first),
        Cell(pair.second),
        signed(pair.difference),
        _interval(pair.low, pair.high),
        _interval(pair.simultaneous_low, pair.simultaneous_high),
        chance(pair.probability),
        Cell(str(pair.seeds), pair.seeds),
        Cell(more, math.inf if more == "> 1000" else pair.more_seeds),
    ]


def _interval(low: float | None, high: float | None) -> Cell:
    if low is None or high is None:
        return Cell(MISSING)
    return Cell(f"[{low:+.2f}, {high:+.2f}]", low, also=(high,))
