"""Table: what one step of each method costs, on a terminal, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from kdprof.errors import UserError
from kdprof.records import Cost, CountedCost, Interval
from kdprof.stats.intervals import relative_width
from kdprof.store import Store, newest_by_method, write_together

from .cost_grids import (
    HIDDEN_LIMIT,
    count_grid,
    counted_terms_grid,
    detail_grids,
    flop_misleads,
    flop_total,
    main_grid,
    memory_text,
    misses_flop,
    module_grid,
    other_flop,
    phase_grid,
    phase_words,
    reference_name,
    throughput_grid,
    uncounted_operators,
)
from .results import count
from .text import (
    AT_LEAST,
    HIDDEN,
    MISSING,
    UNRELIABLE,
    Grid,
    csv_cell,
    figures,
    markdown_text,
    print_notes,
)

TOP_OPERATORS = 3
"""Uncounted operators that a terminal shows per method."""
MODULE_DEPTH = 2
"""Levels of modules that a terminal shows."""

_FIELDS = {
    "latency_s": "step latency",
    "ratio": "ratio to the reference",
    "end_to_end_s": "end-to-end time",
    "flop": "FLOP",
    "hidden_cost": "hidden cost",
    "bytes_moved": "bytes moved",
    "memory_bytes": "memory",
    "energy_j": "energy",
    "mfu": "MFU",
    "phases_s": "phases",
    "terms": "terms",
    "ceilings": "ceilings",
    "bounds": "bounds",
    "operations": "operators",
    "canary": "canary",
}
"""How notes name a field that is not available."""
_DETAILS = {"terms", "bounds", "operations"}
_COUNTED = {"flop", "bytes_moved", "terms", "operations"}


def measure_table(costs: Sequence[Cost], console: Console, *, detail: bool = False) -> None:
    """Print what a step costs, how fast it runs, its phases, and the notes.

    Args:
        detail: also print terms, bounds and operators, which Markdown always has.

    Raises:
        UserError: there are no costs.
    """
    ordered = _ordered(costs)
    grids = [
        main_grid(ordered, brief=True),
        throughput_grid(ordered, brief=True),
        phase_grid(ordered),
        *(detail_grids(ordered, TOP_OPERATORS) if detail else []),
    ]
    for grid in _with_content(map(Grid.without_empty, grids)):
        grid.print(console)
    left_out = set() if detail else _DETAILS
    print_notes(_notes(ordered, _FIELDS.keys() - left_out), console)


def count_table(costs: Sequence[CountedCost], console: Console, *, detail: bool = False) -> None:
    """Print the FLOP of one step by part and by term, of Costs that were counted, not timed.

    Args:
        detail: print modules of every depth, not only two levels, if they were counted.
    """
    counted = [cost for cost in costs if cost.flop]
    depth = None if detail else MODULE_DEPTH
    grids = [count_grid(counted), counted_terms_grid(counted), module_grid(counted, depth)]
    for grid in _with_content(map(Grid.without_empty, grids)):
        grid.print(console)
    print_notes(_count_notes(counted), console)


def render(store: Store) -> list[Path]:
    """Write ``costs.md``, ``costs.csv`` and ``costs.tex`` of the newest Cost of each method into
    ``reports/``; write nothing if no Cost is stored.

    Raises:
        UserError: the costs come from different devices, or it is not known which is the newest.
    """
    if not store.costs():
        return []
    return _write(store.reports / "costs", list(store.latest_costs().values()))


def render_steps(store: Store) -> list[Path]:
    """Write the same files, named ``steps.*``, of the newest Cost of each user's step."""
    costs = newest_by_method(store.step_costs())
    return _write(store.reports / "steps", list(costs.values())) if costs else []


def _write(stem: Path, costs: Sequence[Cost]) -> list[Path]:
    made = {"md": costs_markdown, "csv": costs_csv, "tex": costs_latex}
    paths = {stem.with_suffix(f".{suffix}"): text for suffix, text in made.items()}
    write_together({path: text(costs) for path, text in paths.items()})
    return list(paths)


def costs_markdown(costs: Sequence[Cost]) -> str:
    """Return every grid and the notes as Markdown.

    Raises:
        UserError: there are no costs.
    """
    ordered = _ordered(costs)
    grids = [
        main_grid(ordered),
        throughput_grid(ordered),
        phase_grid(ordered),
        *detail_grids(ordered),
    ]
    parts = [
        part
        for grid in _with_content(grids)
        for part in (f"## {markdown_text(grid.title)}", grid.markdown())
    ]
    notes = "\n".join(f"- {markdown_text(note)}" for note in _notes(ordered))
    return "\n\n".join([*parts, "## Notes", notes]) + "\n"


def costs_latex(costs: Sequence[Cost]) -> str:
    r"""Return the main grid as a ``table`` for ``\usepackage{booktabs}``.

    Raises:
        UserError: there are no costs.
    """
    ordered = _ordered(costs)
    notes = [*_conventions(ordered), *_validity(ordered), *_missing(ordered)]
    table = main_grid(ordered, brief=True, wide=True).without_empty().latex("tab:costs", notes)
    return f"% Made by kdprof plot. Needs \\usepackage{{booktabs}}.\n{table}\n"


def costs_csv(costs: Sequence[Cost]) -> str:
    """Return one line per method in full precision; the last column says why cells are empty.

    Raises:
        UserError: there are no costs.
    """
    lines = [_flat(cost) for cost in _ordered(costs)]
    text = io.StringIO()
    columns = list(dict.fromkeys(name for line in lines for name in line if name != "missing"))
    writer = csv.DictWriter(text, [*columns, "missing"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(cell) for name, cell in line.items()} for line in lines)
    return text.getvalue()


def _ordered(costs: Sequence[Cost]) -> list[Cost]:
    """Return the Costs, the smallest ratio to the reference first, those without a ratio last.

    Latencies do not decide: they were taken at different times.
    """
    if not costs:
        raise UserError("no costs yet; run 'kdprof measure --method kd' first")
    return sorted(costs, key=lambda cost: cost.ratio.median if cost.ratio else math.inf)


def _with_content(grids: Iterable[Grid]) -> list[Grid]:
    return [grid for grid in grids if grid.rows and not set(grid.header) <= {"method"}]


# Notes


def _notes(costs: Sequence[Cost], fields: Collection[str] = tuple(_FIELDS)) -> list[str]:
    """Return the notes for the reader, and why any of ``fields`` is not available."""
    return [
        *_conventions(costs),
        *_validity(costs),
        *_warnings(costs),
        *_outlier_notes(costs),
        *_canary_notes(costs),
        *_ceiling_notes(costs),
        *_stop_notes(costs),
        *_missing(costs, fields),
    ]


def _conventions(costs: Sequence[Cost]) -> list[str]:
    reference = f"'{reference_name(costs)}'"
    found = [
        "Medians with 95 % intervals. Each method was interleaved with "
        f"{reference}: ratios are paired round by round, latencies of different methods are not.",
        "1 multiply-add = 2 FLOP; GFLOP are the matrix products and convolutions of the whole "
        "step, backward included.",
    ]
    if any(cost.hidden_cost is not None for cost in costs):
        found.append(
            "Hidden cost: the share of the step's time that its FLOP do not explain at the "
            f"seconds per FLOP of {reference}."
        )
    if any(cost.bytes_moved is not None for cost in costs):
        found.append("Moved: bytes that all operators read and write; 1 GB = 1e9 bytes.")
    allocated = [cost.memory_bytes.peak_allocated is not None for cost in costs]
    if any(allocated):
        found.append("Memory: the allocator's peak.")
    if not all(allocated):
        found.append(
            "Process memory: the peak of the whole process, Python and libraries included."
        )
    if sources := sorted({cost.energy.source for cost in costs if cost.energy}):
        found.append(f"Energy: {', '.join(sources)}; idle power is part of it.")
    if len({cost.device for cost in costs}) > 1:
        found.append("The Costs are from several devices: their latencies cannot be compared.")
    return found


def _validity(costs: Sequence[Cost]) -> list[str]:
    """Return which numbers must not be used, and for what."""
    found = _unreliable(costs)
    misled = [
        f"{cost.method} {_mismatch(cost.hidden_cost)}"
        for cost in costs
        if cost.hidden_cost is not None and flop_misleads(cost)
    ]
    if misled:
        found.append(
            f"{HIDDEN} FLOP matching is not valid for this method: its hidden cost is beyond "
            f"±{100 * HIDDEN_LIMIT:g} %. Iterations at equal FLOP, relative to those at equal "
            f"time: {', '.join(misled)}."
        )
    return [*found, *_incomplete(costs)]


def _incomplete(costs: Sequence[Cost]) -> list[str]:
    """Return which totals of FLOP miss operators, and which operators those are."""
    pairs = [(cost.why_no_flop(), cost.method) for cost in costs if misses_flop(cost)]
    return [
        f"{AT_LEAST} FLOP of {_methods_text(methods, costs)}: INCOMPLETE, a lower bound; {reason}. "
        "What needs a total is missing."
        for reason, methods in _grouped(pairs)
    ]


def _unreliable(costs: Sequence[Cost]) -> list[str]:
    return [
        f"{UNRELIABLE} {cost.method} is UNRELIABLE: {'; '.join(cost.warnings) or 'no reason'}."
        for cost in costs
        if not cost.reliable
    ]


def _mismatch(hidden_cost: float) -> str:
    """Return how many times the iterations of equal time a method gets at equal FLOP."""
    explained = 1 - hidden_cost
    return f"{figures(1 / explained)} times" if explained > 0 else "without limit"


def _warnings(costs: Sequence[Cost]) -> list[str]:
    """Return the warnings of reliable Costs; those of unreliable Costs are their reasons."""
    pairs = [(cost, warning) for cost in costs if cost.reliable for warning in cost.warnings]
    return [
        f"Warning ({_methods_text(methods, costs)}): {warning}."
        for warning, methods in _grouped((warning, cost.method) for cost, warning in pairs)
    ]


def _outlier_notes(costs: Sequence[Cost]) -> list[str]:
    found = []
    for cost in (cost for cost in costs if cost.outliers):
        total = sum(map(len, cost.samples_s)) + len(cost.end_to_end_samples_s)
        number = len(cost.outliers)
        causes = Counter(outlier.cause for outlier in cost.outliers).most_common()
        listed = ", ".join(f"{times} {cause}" for cause, times in causes)
        verb = "is an outlier" if number == 1 else "are outliers"
        found.append(f"{cost.method}: {number} of {count(total, 'sample')} {verb} ({listed}).")
    return found


def _canary_notes(costs: Sequence[Cost]) -> list[str]:
    drifts = [100 * cost.canary.drift for cost in costs if cost.canary]
    if not drifts:
        return []
    shaken = [
        f"{cost.method} ({100 * cost.canary.drift:.1f} %)"
        for cost in costs
        if cost.canary and not cost.canary.steady
    ]
    drifted = f"drifted by {_range(drifts, '{:.1f}'.format)} %"
    doubt = f"; the machine was not steady while measuring {', '.join(shaken)}" if shaken else ""
    return [f"Canary: a fixed kernel timed between the blocks {drifted}{doubt}."]


def _ceiling_notes(costs: Sequence[Cost]) -> list[str]:
    found = [cost.ceilings for cost in costs if cost.ceilings]
    if not found:
        return []
    products = _range([one.matmul_flop_per_s / 1e9 for one in found], figures)
    copies = _range([one.copy_bytes_per_s / 1e9 for one in found], figures)
    precisions = "/".join(sorted({one.precision for one in found}))
    return [
        f"Ceilings measured here: matmul {products} GFLOP/s ({precisions}), "
        f"copy {copies} GB/s (read + written)."
    ]


def _stop_notes(costs: Sequence[Cost]) -> list[str]:
    """Return why measuring stopped, with the precision reached."""
    stopped = _grouped((_why_stopped(c), _precision(c)) for c in costs if "stopped" in c.timing)
    if not stopped:
        return []
    listed = "; ".join(f"{why}: {', '.join(reached)}" for why, reached in stopped)
    return [
        f"Measuring stopped, {listed} (width of the 95 % interval of the ratio or, for the "
        "reference, of the latency)."
    ]


def _why_stopped(cost: Cost) -> str:
    # The record's own text contains the width, so each method would have a separate reason.
    target, width = cost.timing.get("precision_target"), _width(cost)
    if target and width is not None and width <= target:
        return f"target of {100 * target:g} % reached"
    return str(cost.timing["stopped"])


def _precision(cost: Cost) -> str:
    width = _width(cost)
    return cost.method if width is None else f"{cost.method} {figures(100 * width, 2)} %"


def _width(cost: Cost) -> float | None:
    """Return the relative width of the interval that measuring narrows."""
    own = cost.ratio is None or cost.ratio.to == cost.method
    interval = cost.latency_s if own else cost.ratio
    if interval is None:
        return None
    return relative_width((interval.median, interval.low, interval.high))


def _missing(costs: Sequence[Cost], fields: Collection[str] = tuple(_FIELDS)) -> list[str]:
    """Return why cells hold a dash or a grid is missing: one note per reason."""
    methods_of = _grouped(
        ((name, _reason(cost, name)), cost.method)
        for name in _FIELDS
        if name in fields
        for cost in costs
        if _is_missing(cost, name)
    )
    names_of = _grouped(
        ((reason, tuple(methods)), _FIELDS[name]) for (name, reason), methods in methods_of
    )
    return [
        f"No {', '.join(names)} ({_methods_text(methods, costs)}): {reason}."
        for (reason, methods), names in names_of
    ]


def _is_missing(cost: Cost, name: str) -> bool:
    return memory_text(cost) == MISSING if name == "memory_bytes" else getattr(cost, name) is None


def _reason(cost: Cost, name: str) -> str:
    reasons = (why for key, why in cost.unavailable.items() if key.split(".")[0] == name)
    return cost.unavailable.get(name) or next(reasons, "not measured")


def _count_notes(costs: Sequence[Cost]) -> list[str]:
    found = [
        "1 multiply-add = 2 FLOP; convolutions and matrix products only. Teacher, student and "
        "objective are forward; auxiliary is a second optimiser's work."
    ]
    if any(cost.operations for cost in costs):
        found.append(
            "Other: arithmetic outside matrix products, part of no total. Moved: bytes that all "
            "operators read and write; 1 GB = 1e9 bytes."
        )
    pairs = (
        (one.name, cost.method)
        for cost in costs
        for one in uncounted_operators(cost)
        if one.work == "other"
    )
    found += [
        f"Not in other, without a formula: {', '.join(names)} ({_methods_text(methods, costs)})."
        for methods, names in _grouped((tuple(m), name) for name, m in _grouped(pairs))
    ]
    return [*found, *_unreliable(costs), *_incomplete(costs), *_missing(costs, _COUNTED)]


def _grouped(pairs: Iterable[tuple]) -> list[tuple]:
    """Return (key, values) of each key, in order of appearance."""
    found: dict = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return list(found.items())


def _methods_text(methods: Sequence[str], costs: Sequence[Cost]) -> str:
    whole = len(costs) > 1 and len(methods) == len(costs)
    return "all methods" if whole else ", ".join(methods)


def _range(values: Sequence[float], written: Callable[[float], str]) -> str:
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low}-{high}"


# CSV


def _flat(cost: Cost) -> dict[str, str]:
    """Return a Cost as plain columns, with units in their names."""
    memory, canary = cost.memory_bytes, cost.canary
    values: dict[str, object] = {
        "method": cost.method,
        "device": cost.device,
        "reliable": cost.reliable,
        **_ends("step_s", cost.latency_s),
        **_ends("ratio", cost.ratio),
        "ratio_to": cost.ratio and cost.ratio.to,
        **_ends("end_to_end_s", cost.end_to_end_s),
        **_ends("end_to_end_ratio", cost.end_to_end_ratio),
        "matrix_flop": flop_total(cost),
        "counted_flop": cost.flop and cost.flop.counted,
        "other_flop": other_flop(cost),
        "hidden_cost_fraction": cost.hidden_cost,
        "flop_matching_valid": None if cost.hidden_cost is None else not flop_misleads(cost),
        "moved_bytes": cost.bytes_moved,
        "peak_allocated_bytes": memory.peak_allocated,
        "peak_reserved_bytes": memory.peak_reserved,
        "process_bytes": memory.process,
        "energy_j": cost.energy_j,
        "mfu_fraction": cost.mfu,
        **{f"phase_{phase_words(name).replace(' ', '_')}_s": s for name, s in _phases(cost)},
        "rounds": len(cost.samples_s),
        "samples": sum(map(len, cost.samples_s)),
        "outliers": len(cost.outliers),
        "canary_drift_fraction": canary and canary.drift,
        "stopped": cost.timing.get("stopped"),
        "warnings": "; ".join(cost.warnings),
        "missing": "; ".join(f"{name}: {why}" for name, why in sorted(_reasons(cost).items())),
    }
    return {name: _plain(value) for name, value in values.items()}


def _phases(cost: Cost) -> list[tuple[str, float]]:
    return list((cost.phases_s or {}).items())


def _reasons(cost: Cost) -> dict[str, str]:
    unexplained = {name: "not measured" for name in _FIELDS if _is_missing(cost, name)}
    return unexplained | cost.unavailable


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    ends = {name: "median", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: getattr(interval, end, None) for column, end in ends.items()}


def _plain(value: object) -> str:
    if value is None:
        return ""
    text = repr(value) if isinstance(value, float) else str(value)
    return " ".join(text.split())
