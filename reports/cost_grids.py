"""The grids of step costs, and how their cells are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, get_args

from kdprof.records import (
    PARTS_OF_FLOP,
    REFERENCE,
    Cost,
    CountedCost,
    Interval,
    Operation,
    OperationKind,
    Ratio,
    TermCost,
    complete_sum,
)

from .results import device_text
from .text import AT_LEAST, HIDDEN, MISSING, Estimate, Grid, digits, figures, flagged, size

HIDDEN_LIMIT = 0.10
"""Matching by FLOP is not valid for a method whose hidden-cost index is further from 0."""

Columns = Mapping[str, Callable[[Cost], str]]


def _grid(title: str, columns: Columns, costs: Iterable[Cost]) -> Grid:
    rows = [[text(cost) for text in columns.values()] for cost in costs]
    return Grid(title, list(columns), rows)


def main_grid(costs: Sequence[Cost], *, brief: bool = False, wide: bool = False) -> Grid:
    """Return the main grid.

    Args:
        brief: for a terminal: narrow intervals as ``±``, without columns of the throughput grid.
        wide: with those columns nevertheless.
    """
    unit, scale = time_unit(costs)
    all_process = all(cost.memory_bytes.peak_allocated is None for cost in costs)
    moved = {"moved (GB)": _moved} if wide or not brief else {}
    used = {"MFU %": _mfu} if wide or not brief else {}
    columns = {
        "method": _name,
        f"step ({unit})": lambda cost: _estimate(cost.latency_s, scale, brief),
        f"/ {reference_name(costs)}": lambda cost: _ratio(cost, cost.ratio, brief),
        f"end-to-end ({unit})": lambda cost: _estimate(cost.end_to_end_s, scale, brief),
        "GFLOP": _gflop,
        "hidden %": _hidden,
        **moved,
        "process memory" if all_process else "memory": lambda cost: memory_text(
            cost, not all_process
        ),
        "energy (J)": lambda cost: _figures(cost.energy_j),
        **used,
    }
    devices = device_text(sorted({cost.device for cost in costs}))
    return _grid(f"Cost of one step on {devices}", columns, costs)


def throughput_grid(costs: Sequence[Cost], *, brief: bool = False) -> Grid:
    """Return the rates of the whole step, and their shares of the measured ceilings.

    Args:
        brief: with the columns that the brief main grid leaves out.
    """
    shared = {"moved (GB)": _moved, "MFU %": _mfu} if brief else {}
    columns = {
        "method": _name,
        "GFLOP/s": lambda cost: _figures(_rate(cost, flop_total(cost), 1e9)),
        "% of matmul": lambda cost: _number(
            _rate(cost, flop_total(cost), cost.ceilings and cost.ceilings.matmul_flop_per_s / 100),
            ".1f",
        ),
        "GB/s": lambda cost: _figures(_rate(cost, cost.bytes_moved, 1e9)),
        "% of copy": lambda cost: _number(
            _rate(cost, cost.bytes_moved, cost.ceilings and cost.ceilings.copy_bytes_per_s / 100),
            ".1f",
        ),
        "FLOP/byte": lambda cost: _figures(_intensity(cost)),
        **shared,
    }
    return _grid("Throughput of one step", columns, costs)


def phase_grid(costs: Sequence[Cost]) -> Grid:
    """Return the phases as shares of the step."""
    # Phases that take no time in any method are left out: they would only widen the table.
    phases = _names(cost.phases_s for cost in costs)
    taken = {name for cost in costs for name, s in (cost.phases_s or {}).items() if s > 0}
    columns: dict[str, Callable[[Cost], str]] = {"method": _name}
    for phase in (phase for phase in phases if phase in taken):
        columns[phase_words(phase)] = partial(_phase_share, phase=phase)
    return _grid("Phases, % of the step", columns, costs)


def _names(records: Iterable[Mapping[str, object] | None]) -> list[str]:
    """Return the keys of all records, in the order of the record with most keys."""
    found = sorted((record or {} for record in records), key=len, reverse=True)
    return list(dict.fromkeys(name for record in found for name in record))


def detail_grids(costs: Sequence[Cost], top: int | None = None) -> list[Grid]:
    """Return the grids of terms, bounds and operators; of uncounted ones, ``top`` per method."""
    return [_term_grid(costs), _bound_grid(costs), _kind_grid(costs), _uncounted_grid(costs, top)]


def _term_grid(costs: Sequence[Cost]) -> Grid:
    header = ("method", "term", "weight", "forward (ms)", "backward (ms)", "% of step",
              "GFLOP", "note")  # fmt: skip
    rows = [
        [
            _name(cost),
            name,
            f"{term.weight:g}",
            _number(term.forward_s, ".3f", 1e3),
            _number(term.backward_s, ".3f", 1e3),
            _percent_of_step(cost, _term_seconds(term)),
            _figures(complete_sum((term.forward_flop, term.backward_flop)), scale=1e-9),
            "computed, weight 0" if _is_wasted(term) else "",
        ]
        for cost, name, term in _terms(costs)
    ]
    return Grid("Terms of the objectives", header, rows, ("term", "note"))


def _bound_grid(costs: Sequence[Cost]) -> Grid:
    columns: dict[str, Callable[[Cost], str]] = {"method": _name}
    for phase in _names(cost.bounds for cost in costs):
        columns[phase_words(phase)] = partial(_bound, phase=phase)
    title = "What bounds the phases (C compute, M memory, O overhead), % of the ceiling reached"
    return _grid(title, columns, costs)


def _kind_grid(costs: Sequence[Cost]) -> Grid:
    timed = [_seconds_by_kind(cost) for cost in costs]
    kinds = [k for k in get_args(OperationKind) if any(s and s.get(k) for s in timed)]
    rows = [
        [_name(cost), *(_percent_of_step(cost, s.get(k, 0.0) if s else None) for k in kinds)]
        for cost, s in zip(costs, timed, strict=True)
    ]
    return Grid("Operators by kind, % of the step", ["method", *kinds], rows)


def _uncounted_grid(costs: Sequence[Cost], top: int | None) -> Grid:
    rows = [
        [_name(cost), one.name, one.work, f"{one.calls:,}", _percent_of_step(cost, one.seconds)]
        for cost in costs
        for one in uncounted_operators(cost)[:top]
    ]
    header = ("method", "operator", "work", "calls", "% of step")
    return Grid("Operators whose FLOP are not counted", header, rows, ("operator", "work"))


def count_grid(costs: Sequence[Cost]) -> Grid:
    """Return the FLOP of one step by part, of Costs that have FLOP."""
    reference = next((flop_total(c) for c in costs if c.flop and c.method == REFERENCE), None)

    def to_reference(cost: Cost) -> str:
        total = flop_total(cost)
        return MISSING if total is None or not reference else f"{total / reference:.2f}"

    columns: dict[str, Callable[[Cost], str]] = {"method": _name}
    for part in PARTS_OF_FLOP:
        columns[part] = partial(_part_flop, part=part)
    columns["total"] = _total_gflop
    columns[f"/ {REFERENCE}"] = to_reference
    columns["other"] = lambda cost: _number(other_flop(cost), ",.2f", 1e-9)
    columns["moved (GB)"] = _moved
    return _grid("GFLOP of one step, counted", columns, costs)


def counted_terms_grid(costs: Sequence[Cost]) -> Grid:
    """Return the counted FLOP of every term."""
    header = ("method", "term", "weight", "forward", "backward", "moved (GB)", "note")
    rows = [
        [
            _name(cost),
            name,
            f"{term.weight:g}",
            _figures(term.forward_flop, scale=1e-9),
            _figures(term.backward_flop, scale=1e-9),
            figures(term.bytes_moved / 1e9),
            "computed, weight 0" if _is_wasted(term) else "",
        ]
        for cost, name, term in _terms(costs)
    ]
    return Grid("GFLOP of the objectives' terms", header, rows, ("term", "note"))


def module_grid(costs: Sequence[CountedCost], depth: int | None = None) -> Grid:
    """Return the forward FLOP of the networks' modules, ``depth`` levels deep."""
    rows = [
        [
            network,
            name,
            f"{flop / 1e9:,.3f}",
            f"{100 * flop / max(modules.values()):.1f}",
        ]
        for network, modules in _networks(costs)
        for name, flop in modules.items()
        if flop and (depth is None or name.count(".") < depth)
    ]
    header = ("network", "module", "GFLOP", "%")
    return Grid("Forward GFLOP by module", header, rows, ("module",))


# Cells


def _name(cost: Cost) -> str:
    return flagged(cost.method, not cost.reliable)


def phase_words(phase: str) -> str:
    """Return a phase's name in words."""
    return phase.removesuffix("_s").replace("_", " ")


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return MISSING if value is None else format(value * scale, form)


def _figures(value: float | None, number: int = 3, scale: float = 1) -> str:
    return MISSING if value is None else figures(value * scale, number)


def time_unit(costs: Sequence[Cost]) -> tuple[str, float]:
    """Return the time unit of the whole table, and how many of them are a second."""
    longest = max((cost.latency_s.median for cost in costs if cost.latency_s), default=0.0)
    return ("s", 1.0) if longest >= 1 else ("ms", 1e3)


def _estimate(interval: Interval | None, scale: float, brief: bool) -> str:
    if interval is None:
        return MISSING
    value, low, high = (scale * end for end in (interval.median, interval.low, interval.high))
    found = Estimate(value, low, high)
    decimals = digits(value, high - value)
    return found.brief(decimals) if brief else found.text(decimals)


def _ratio(cost: Cost, ratio: Ratio | None, brief: bool) -> str:
    # The reference is 1 by definition: an interval would claim a measurement.
    return "1" if ratio and ratio.to == cost.method else _estimate(ratio, 1, brief)


def reference_name(costs: Sequence[Cost]) -> str:
    """Return the name of the reference, the method that the ratios are to."""
    return " or ".join(sorted({cost.ratio.to for cost in costs if cost.ratio})) or "reference"


def _hidden(cost: Cost) -> str:
    if cost.hidden_cost is None:
        return MISSING
    return f"{round(100 * cost.hidden_cost):+d}" + HIDDEN * flop_misleads(cost)


def flop_misleads(cost: Cost) -> bool:
    """Return whether matching by FLOP is not valid for a method."""
    return cost.hidden_cost is not None and abs(cost.hidden_cost) > HIDDEN_LIMIT


def _moved(cost: Cost) -> str:
    return _figures(cost.bytes_moved, scale=1e-9)


def _mfu(cost: Cost) -> str:
    return _number(cost.mfu, ".1f", 100)


def memory_text(cost: Cost, name_kind: bool = True) -> str:
    """Return the allocator's peak, or the process's if the allocator's is not known."""
    if cost.memory_bytes.peak_allocated is not None:
        return size(cost.memory_bytes.peak_allocated)
    if cost.memory_bytes.process is not None:
        return size(cost.memory_bytes.process) + " (process)" * name_kind
    return MISSING


def flop_total(cost: Cost) -> float | None:
    """Return the matrix FLOP of the whole step; None if they are not known, or not all of them."""
    return None if cost.flop is None else cost.flop.total


def misses_flop(cost: Cost) -> bool:
    """Return whether an operator of the step has matrix work that is not counted."""
    return cost.flop is not None and cost.flop.total is None


def _gflop(cost: Cost) -> str:
    """Return the total in 4 figures, or what is counted of it."""
    if cost.flop is None:
        return MISSING
    return AT_LEAST * misses_flop(cost) + figures(cost.flop.counted / 1e9, 4)


def _total_gflop(cost: Cost) -> str:
    if cost.flop is None:
        return MISSING
    return AT_LEAST * misses_flop(cost) + f"{cost.flop.counted / 1e9:,.2f}"


def _part_flop(cost: Cost, part: str) -> str:
    return _number(getattr(cost.flop, part), ",.2f", 1e-9)


def _rate(cost: Cost, amount: float | None, per: float | None) -> float | None:
    """Return an amount per second of the step, in units of ``per``."""
    if amount is None or per is None or cost.latency_s is None:
        return None
    return amount / cost.latency_s.median / per


def _intensity(cost: Cost) -> float | None:
    total = flop_total(cost)
    return None if total is None or not cost.bytes_moved else total / cost.bytes_moved


def _phase_share(cost: Cost, phase: str) -> str:
    if not cost.phases_s or phase not in cost.phases_s:
        return MISSING
    return f"{100 * cost.phases_s[phase] / sum(cost.phases_s.values()):.1f}"


def _percent_of_step(cost: Cost, seconds: float | None) -> str:
    if seconds is None or cost.latency_s is None:
        return MISSING
    return f"{100 * seconds / cost.latency_s.median:.1f}"


def _bound(cost: Cost, phase: str) -> str:
    found = (cost.bounds or {}).get(phase)
    if found is None:
        return MISSING
    return f"{found.bound[0].upper()} {100 * found.ceiling_share:.0f}"


def _terms(costs: Iterable[Cost]) -> list[tuple[Cost, str, TermCost]]:
    return [(cost, name, term) for cost in costs for name, term in (cost.terms or {}).items()]


def _term_seconds(term: TermCost) -> float | None:
    known = [seconds for seconds in (term.forward_s, term.backward_s) if seconds is not None]
    return sum(known) if known else None


def _is_wasted(term: TermCost) -> bool:
    work = _term_seconds(term) or term.forward_flop or term.backward_flop or term.bytes_moved
    return term.weight == 0 and work > 0


def _seconds_by_kind(cost: Cost) -> dict[str, float] | None:
    """Return the seconds of each kind of operator; None if no operator was timed."""
    found: dict[str, float] = {}
    for one in cost.operations or ():
        if one.seconds is not None:
            found[one.kind] = found.get(one.kind, 0.0) + one.seconds
    return found or None


class UncountedOperator(NamedTuple):
    """An operator without a formula, all its calls together.

    Attributes:
        work: what is not counted, ``matrix`` or ``other``.
    """

    name: str
    work: str
    calls: int
    seconds: float | None


def uncounted_operators(cost: Cost) -> list[UncountedOperator]:
    """Return the operators without a formula: those with matrix work first, then the slowest."""
    groups: dict[tuple[str, str], list[Operation]] = {}
    for one in cost.operations or ():
        if one.kind == "uncounted":
            work = "matrix" if one.matrix_flop is None else "other"
            groups.setdefault((one.name, work), []).append(one)
    found = [
        UncountedOperator(name, work, sum(one.calls for one in group), _seconds(group))
        for (name, work), group in groups.items()
    ]
    return sorted(found, key=lambda one: (one.work, -(one.seconds or 0), one.name))


def _seconds(group: Sequence[Operation]) -> float | None:
    known = [one.seconds for one in group if one.seconds is not None]
    return sum(known) if len(known) == len(group) else None


def other_flop(cost: Cost) -> float | None:
    """Return the FLOP outside matrix products, of the operators that have a formula."""
    if cost.operations is None:
        return None
    return sum(one.other_flop or 0 for one in cost.operations)


def _networks(costs: Iterable[CountedCost]) -> list[tuple[str, dict[str, float]]]:
    """Return the counts by module of each network; methods with equal counts share an entry."""
    found: dict[tuple, tuple[str, dict[str, float], list[str]]] = {}
    for cost in costs:
        for network, modules in (cost.modules_flop or {}).items():
            key = (network, *modules.items())
            found.setdefault(key, (network, modules, []))[2].append(cost.method)
    several = Counter(network for network, _, _ in found.values())
    return [
        (f"{network} ({', '.join(methods)})" if several[network] > 1 else network, modules)
        for network, modules, methods in found.values()
    ]
