"""Table: what one step of each method costs. Of stored Costs, on a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from kdprof.errors import UserError
from kdprof.records import Cost, Interval
from kdprof.store import Store, write_atomic

from .results import device_text
from .text import MISSING, Estimate, Grid, print_notes, size


def measure_table(costs: Sequence[Cost], console: Console) -> None:
    """Print the costs, the shares of the phases, and the notes.

    Raises:
        UserError: there are no costs.
    """
    for grid in _grids(costs):
        grid.print(console)
    print_notes(_notes(costs), console)


def count_table(costs: Sequence[Cost], console: Console) -> None:
    """Print the matrix FLOP of one step by part; for costs that were counted, not timed."""
    parts = ("teacher", "student", "objective", "backward", "auxiliary", "total")
    reference = next((c.flop.total for c in costs if c.flop and c.method == "none"), None)
    rows = [
        [
            cost.method,
            *(f"{getattr(cost.flop, part) / 1e9:,.2f}" for part in parts),
            MISSING if reference is None else f"{cost.flop.total / reference:.2f}",
        ]
        for cost in costs
        if cost.flop is not None
    ]
    Grid("GFLOP of one step, counted", ("method", *parts, "/ none"), rows).print(console)
    note = (
        "1 multiply-add = 2 FLOP; convolutions and matrix products only. Teacher, student and "
        "objective are forward; auxiliary is a second optimiser's work."
    )
    print_notes([note], console)


def render(store: Store) -> list[Path]:
    """Write ``reports/costs.md`` of the newest Cost of each method; nothing where none is stored.

    Raises:
        UserError: the costs come from different devices.
    """
    if not store.costs():
        return []
    path = store.reports / "costs.md"
    write_atomic(path, costs_markdown(list(store.latest_costs().values())))
    return [path]


def costs_markdown(costs: Sequence[Cost]) -> str:
    """Return the same as Markdown.

    Raises:
        UserError: there are no costs.
    """
    parts = [part for grid in _grids(costs) for part in (f"## {grid.title}", grid.markdown())]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(costs))]) + "\n"


def _grids(costs: Sequence[Cost]) -> list[Grid]:
    if not costs:
        raise UserError("no costs yet; run 'kdprof measure --method kd' first")
    found = [_cost_grid(costs)]
    if any(cost.phases_s for cost in costs):
        found.append(_phase_grid(costs))
    return found


def _cost_grid(costs: Sequence[Cost]) -> Grid:
    unit, scale = _time_unit(costs)
    references = sorted({cost.ratio.to for cost in costs if cost.ratio})
    header = (
        "method", f"step ({unit})", f"/ {' or '.join(references) or 'reference'}",
        f"with loader ({unit})", "GFLOP", "memory", "energy (J)",
    )  # fmt: skip
    devices = device_text(sorted({cost.device for cost in costs}))
    return Grid(f"Cost of one step on {devices}", header, [_cells(cost, scale) for cost in costs])


def _time_unit(costs: Sequence[Cost]) -> tuple[str, float]:
    """Return one unit for the whole table, and its number per second."""
    longest = max((cost.latency_s.median for cost in costs if cost.latency_s), default=0.0)
    return ("s", 1.0) if longest >= 1 else ("ms", 1e3)


def _cells(cost: Cost, scale: float) -> list[str]:
    return [
        cost.method + "†" * (not cost.reliable),
        _interval(cost.latency_s, scale),
        _interval(cost.ratio, 1),
        _interval(cost.end_to_end_s, scale),
        MISSING if cost.flop is None else f"{cost.flop.total / 1e9:,.4g}",
        _memory(cost),
        MISSING if cost.energy_j is None else f"{cost.energy_j:.3g}",
    ]


def _interval(interval: Interval | None, scale: float) -> str:
    if interval is None:
        return MISSING
    median, low, high = (scale * end for end in (interval.median, interval.low, interval.high))
    decimals = 1 if median >= 100 else 2 if median >= 1 else 3
    return Estimate(median, low, high).text(decimals)


def _memory(cost: Cost) -> str:
    """Return the allocator's peak or, where there is no allocator to ask, the process's."""
    if cost.memory_bytes.peak_allocated is not None:
        return size(cost.memory_bytes.peak_allocated)
    if cost.memory_bytes.process is not None:
        return f"{size(cost.memory_bytes.process)} (process)"
    return MISSING


def _phase_grid(costs: Sequence[Cost]) -> Grid:
    # Phases that take no time in any method would only widen the table.
    taken = (phase for cost in costs for phase, s in (cost.phases_s or {}).items() if s > 0)
    phases = list(dict.fromkeys(taken))
    rows = [[cost.method, *(_share(cost, name) for name in phases)] for cost in costs]
    header = ["method", *(name.removesuffix("_s").replace("_", " ") for name in phases)]
    return Grid("Phases, % of the step", header, rows)


def _share(cost: Cost, phase: str) -> str:
    if not cost.phases_s or phase not in cost.phases_s:
        return MISSING
    return f"{100 * cost.phases_s[phase] / sum(cost.phases_s.values()):.1f}"


def _notes(costs: Sequence[Cost]) -> list[str]:
    found = [
        "Medians; brackets are 95 % intervals. 1 multiply-add = 2 FLOP; all passes of a step are "
        "counted, backward included. Memory is the allocator's peak, or (process) the peak of the "
        "whole process where there is no allocator to ask."
    ]
    if len({cost.session for cost in costs}) > 1:
        found.append("From several measuring sessions: only ratios within one were interleaved.")
    if len({cost.device for cost in costs}) > 1:
        found.append("From several devices: the latencies do not compare.")
    for cost in costs:
        if not cost.reliable or cost.warnings:
            label = "Warning for" if cost.reliable else "† UNRELIABLE:"
            found.append(f"{label} {cost.method}: {'; '.join(cost.warnings) or 'no reason given'}.")
    return found + _missing_notes(costs)


def _missing_notes(costs: Sequence[Cost]) -> list[str]:
    """Return why cells hold a dash: one note per column and reason."""
    absent: dict[str, Callable[[Cost], bool]] = {
        "latency_s": lambda cost: cost.latency_s is None,
        "ratio": lambda cost: cost.ratio is None,
        "end_to_end_s": lambda cost: cost.end_to_end_s is None,
        "flop": lambda cost: cost.flop is None,
        "memory_bytes": lambda cost: _memory(cost) == MISSING,
        "energy_j": lambda cost: cost.energy_j is None,
        "phases_s": lambda cost: cost.phases_s is None,
    }
    where: dict[tuple[str, str], list[str]] = {}
    for cost in costs:
        for name in (name for name, is_absent in absent.items() if is_absent(cost)):
            reason = cost.unavailable.get(name, "not measured")
            where.setdefault((name, reason), []).append(cost.method)
    return [
        f"'{MISSING}' in {name}: {reason} "
        f"({'all' if len(methods) == len(costs) else ', '.join(methods)})."
        for (name, reason), methods in where.items()
    ]
