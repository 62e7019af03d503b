"""The atlas of costs: what an iteration of each method costs at the published settings of a device.

``atlas.json`` is the record; ``atlas.md`` and ``atlas.csv`` are made from it alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from kdprof.records import (
    ATLAS_ITERATIONS,
    ATLAS_METHOD,
    REFERENCE,
    Atlas,
    AtlasCost,
    AtlasSetting,
    Cost,
    Interval,
)
from kdprof.stats.intervals import ratio_of
from kdprof.store import record_json, write_together

from .atlas_check import without_paths
from .cost_grids import phase_words
from .text import MISSING, Grid, csv_cell, digits, figures, flagged, markdown_text, size

CONVERTED = f"{ATLAS_ITERATIONS:,} of {ATLAS_METHOD} are"
SHOWN_S = 5e-6
"""A phase that takes less in every method would be a column of zeros."""
GROUPED_ABOVE = 3
"""So many methods with the same note are named with it; more are counted."""

# From Costs to the record


def setting_of(
    name: str, costs: Sequence[Cost], not_measured: Mapping[str, str] | None = None
) -> AtlasSetting:
    """Return the Costs of one setting without their samples, texts without paths.

    Args:
        costs: at least one, all of the same study.
        not_measured: methods without a Cost, with the reason.
    """
    by_method = {cost.method: cost for cost in costs}
    settings = [cost.settings for cost in costs]
    step = settings[0]["step"]
    teachers = [one["teacher"] for one in settings if one["teacher"]]
    return AtlasSetting(
        name=name,
        precision=step["precision"],
        student=settings[0]["student"],
        teacher=teachers[0] if teachers else MISSING,
        data=settings[0]["data"],
        classes=settings[0]["classes"],
        batch=step["batch"],
        crop=tuple(step["crop"]),
        placeholder_images=settings[0]["placeholder_images"],
        costs=[_without_samples(cost, by_method) for cost in costs],
        not_measured={name: without_paths(why) for name, why in (not_measured or {}).items()},
    )


def _without_samples(cost: Cost, costs: Mapping[str, Cost]) -> AtlasCost:
    iterations, missing = _converted(cost, costs)
    operators = None if cost.operations is None else sum(one.calls for one in cost.operations)
    memory = cost.memory_bytes
    fields = {
        "latency_s": cost.latency_s,
        "ratio": cost.ratio,
        "iterations": iterations,
        "phases_s": cost.phases_s,
        "flop": cost.flop,
        "bytes_moved": cost.bytes_moved,
        "operators": operators,
        "peak_allocated_bytes": memory.peak_allocated,
        "process_bytes": memory.process,
        "energy_j": cost.energy_j,
    }
    given = {
        **cost.unavailable,
        "iterations": missing,
        "operators": cost.unavailable.get("operations", ""),
        **{
            ours: cost.unavailable.get(f"memory_bytes.{theirs}")
            or cost.unavailable.get("memory_bytes", "")
            for ours, theirs in (
                ("peak_allocated_bytes", "peak_allocated"),
                ("process_bytes", "process"),
            )
        },
    }
    reasons = {
        name: without_paths(given.get(name) or "not measured")
        for name, value in fields.items()
        if value is None
    }
    return AtlasCost(
        method=cost.method,
        reliable=cost.reliable,
        warnings=[without_paths(text) for text in cost.warnings],
        unavailable=reasons,
        **fields,
    )


def _converted(cost: Cost, costs: Mapping[str, Cost]) -> tuple[Interval | None, str]:
    """Return the iterations whose steps take as long as those of the atlas's method, or why not.

    The ratios are those of the steps, which the table shows, and not of end-to-end iterations.
    """
    other = costs.get(ATLAS_METHOD)
    if other is None:
        return None, f"{ATLAS_METHOD} has no cost here"
    if other.ratio is None or cost.ratio is None:
        return None, cost.unavailable.get("ratio", "not measured")
    if cost is other:
        factors: tuple[float, ...] = (1.0, 1.0, 1.0)
    else:
        factors = ratio_of(*((r.median, r.low, r.high) for r in (other.ratio, cost.ratio)))
    value, low, high = (ATLAS_ITERATIONS * factor for factor in factors)
    return Interval(median=value, low=low, high=high), ""


def write(folder: Path, atlas: Atlas) -> list[Path]:
    """Write ``atlas.json``, ``atlas.md`` and ``atlas.csv`` into a folder, all or none."""
    texts = {"json": record_json(atlas), "md": markdown(atlas), "csv": table_csv(atlas)}
    paths = {folder / f"atlas.{suffix}": text for suffix, text in texts.items()}
    write_together(paths)
    return list(paths)


# From the record to text


def markdown(atlas: Atlas) -> str:
    """Return every setting's tables and notes as Markdown."""
    title = "counted, not run" if atlas.device is None else atlas.device
    parts = [f"# Atlas of costs: {markdown_text(title)}", facts(atlas)]
    for setting in atlas.settings:
        parts += setting_parts(setting, level=2, phases=True)
    return "\n\n".join(parts) + "\n"


def facts(atlas: Atlas) -> str:
    """Return in one line what the figures depend on."""
    versions = ", ".join(f"{name} {value}" for name, value in atlas.versions.items())
    counted = "Counted for a GPU on fake tensors, nothing ran,"
    how = "Measured" if atlas.kind == "measured" else counted
    return markdown_text(f"{how} with {versions}.")


def setting_parts(setting: AtlasSetting, *, level: int, phases: bool) -> list[str]:
    """Return the blocks of Markdown of one setting: title, tables, notes."""
    costs = ordered(setting.costs)
    timed = any(cost.latency_s for cost in costs)
    grids = [cost_grid(costs) if timed else counted_grid(costs)]
    grids += [phase_grid(costs)] if phases and timed else []
    made = [grid.without_empty().markdown() for grid in grids if costs and len(grid.header) > 1]
    notes = [f"- {markdown_text(note)}" for note in _notes(setting)]
    title = f"{'#' * level} {markdown_text(setting_title(setting))}"
    return [title, *made, *(["\n".join(notes)] if notes else [])]


def setting_title(setting: AtlasSetting) -> str:
    """Return a setting in words."""
    crop = "x".join(map(str, setting.crop))
    return (
        f"{setting.data}: {setting.teacher} -> {setting.student}, {crop}, batch {setting.batch}, "
        f"{setting.precision}"
    )


def ordered(costs: Iterable[AtlasCost]) -> list[AtlasCost]:
    """Return the costs, the smallest first: by ratio to the reference, else by FLOP and bytes."""

    def place(cost: AtlasCost) -> tuple[float, float, float]:
        ratio = cost.ratio.median if cost.ratio else math.inf
        # As many figures as are shown: else rows that look alike would be in no order.
        flop = float(f"{cost.flop.total:.3g}") if cost.flop else math.inf
        return ratio, flop, cost.bytes_moved or math.inf

    return sorted(costs, key=place)


def cost_grid(costs: Sequence[AtlasCost]) -> Grid:
    """Return what a step costs; columns that no method has are dashes throughout."""
    columns: dict[str, Callable[[AtlasCost], str]] = {
        "method": lambda cost: flagged(cost.method, not cost.reliable),
        "step (ms)": lambda cost: _interval(cost.latency_s, 1e3, brief=True),
        f"/ {REFERENCE} [95 %]": _ratio,
        CONVERTED: _iterations,
        "memory": _memory,
        "TFLOP": lambda cost: _figures(_flop(cost), 1e-12),
        "moved (GB)": lambda cost: _figures(cost.bytes_moved, 1e-9),
        "energy (J)": lambda cost: _figures(cost.energy_j, 1),
    }
    return _grid(columns, costs)


def counted_grid(costs: Sequence[AtlasCost]) -> Grid:
    """Return the work of a step, which needs no device, as amounts and over the reference's."""
    of = {cost.method: cost for cost in costs}
    flop, moved = (
        (_flop(of[REFERENCE]), of[REFERENCE].bytes_moved) if REFERENCE in of else (None, None)
    )
    columns: dict[str, Callable[[AtlasCost], str]] = {
        "method": lambda cost: cost.method,
        "TFLOP": lambda cost: _figures(_flop(cost), 1e-12),
        f"TFLOP / {REFERENCE}": lambda cost: _share(_flop(cost), flop),
        "moved (GB)": lambda cost: _figures(cost.bytes_moved, 1e-9),
        f"moved / {REFERENCE}": lambda cost: _share(cost.bytes_moved, moved),
        "operators": lambda cost: MISSING if cost.operators is None else f"{cost.operators:,}",
    }
    return _grid(columns, costs)


def _flop(cost: AtlasCost) -> float | None:
    return None if cost.flop is None else cost.flop.total


def phase_grid(costs: Sequence[AtlasCost]) -> Grid:
    """Return the milliseconds of each phase."""
    longest = max((cost.phases_s or {} for cost in costs), key=len, default={})
    taken = [
        name
        for name in longest
        if any((cost.phases_s or {}).get(name, 0) > SHOWN_S for cost in costs)
    ]
    columns: dict[str, Callable[[AtlasCost], str]] = {
        "ms of": lambda cost: flagged(cost.method, not cost.reliable)
    }
    for name in taken:
        columns[phase_words(name)] = partial(_phase, name=name)
    return _grid(columns, costs)


def _grid(columns: Mapping[str, Callable[[AtlasCost], str]], costs: Sequence[AtlasCost]) -> Grid:
    rows = [[text(cost) for text in columns.values()] for cost in costs]
    return Grid("", list(columns), rows)


def _figures(value: float | None, scale: float) -> str:
    return MISSING if value is None else figures(value * scale)


def _share(value: float | None, of: float | None) -> str:
    return MISSING if value is None or not of else f"{value / of:.2f}"


def _interval(found: Interval | None, scale: float, *, brief: bool = False) -> str:
    if found is None:
        return MISSING
    value, low, high = (scale * end for end in (found.median, found.low, found.high))
    decimals = digits(value, high - value)
    text = f"{value:.{decimals}f}"
    return text if brief else f"{text} [{low:.{decimals}f}-{high:.{decimals}f}]"


def _ratio(cost: AtlasCost) -> str:
    # The reference is 1 by definition: an interval would claim a measurement.
    return "1" if cost.ratio and cost.ratio.to == cost.method else _interval(cost.ratio, 1)


def _iterations(cost: AtlasCost) -> str:
    return MISSING if cost.iterations is None else f"{round(cost.iterations.median, -1):,.0f}"


def _memory(cost: AtlasCost) -> str:
    known = cost.peak_allocated_bytes or cost.process_bytes
    return MISSING if known is None else size(known)


def _phase(cost: AtlasCost, name: str) -> str:
    seconds = (cost.phases_s or {}).get(name)
    return MISSING if seconds is None else f"{1e3 * seconds:.2f}"


def _notes(setting: AtlasSetting) -> list[str]:
    notes, timed = [], [cost for cost in setting.costs if cost.latency_s is not None]
    if timed and setting.placeholder_images:
        notes.append("Images of the right size stood for the data set's files.")
    if timed and all(cost.peak_allocated_bytes is None for cost in timed):
        notes.append("Memory is the process's: no allocator of the device reports it.")
    notes += _grouped(
        (cost.method, f"UNRELIABLE: {text}")
        for cost in setting.costs
        if not cost.reliable
        for text in cost.warnings[:1]
    )
    shown = ("energy_j", "iterations", "ratio", "phases_s", "bytes_moved")
    notes += _grouped(
        (cost.method, f"no {field}: {cost.unavailable[field]}")
        for field in shown
        for cost in timed
        if field in cost.unavailable
    )
    notes += _grouped((name, f"not measured: {why}") for name, why in setting.not_measured.items())
    return notes


def _grouped(found: Iterable[tuple[str, str]]) -> list[str]:
    """Return each note once, after the methods that it is about."""
    methods: dict[str, list[str]] = {}
    for method, note in found:
        methods.setdefault(note, []).append(method)
    return [
        f"{', '.join(names) if len(names) <= GROUPED_ABOVE else f'{len(names)} methods'}: {note}"
        for note, names in methods.items()
    ]


def table_csv(atlas: Atlas) -> str:
    """Return a line per setting and method in full precision; the last column says why cells are
    empty."""
    lines = [
        _flat(atlas, setting, cost) for setting in atlas.settings for cost in ordered(setting.costs)
    ]
    names = list(dict.fromkeys(name for line in lines for name in line if name != "missing"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, "missing"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(cell) for name, cell in line.items()} for line in lines)
    return text.getvalue()


def _flat(atlas: Atlas, setting: AtlasSetting, cost: AtlasCost) -> dict[str, object]:
    line: dict[str, object] = {
        "device": atlas.device or "counted",
        "setting": setting.name,
        "precision": setting.precision,
        "method": cost.method,
        "reliable": cost.reliable,
    }
    for name in ("latency_s", "ratio", "iterations"):
        found: Interval | None = getattr(cost, name)
        ends = (found.median, found.low, found.high) if found else (None,) * 3
        line |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    line |= {f"{name}_s": seconds for name, seconds in (cost.phases_s or {}).items()}
    line |= {
        "flop": cost.flop.total if cost.flop else None,
        "bytes_moved": cost.bytes_moved,
        "operators": cost.operators,
        "peak_allocated_bytes": cost.peak_allocated_bytes,
        "process_bytes": cost.process_bytes,
        "energy_j": cost.energy_j,
        "missing": "; ".join(f"{name}: {why}" for name, why in cost.unavailable.items()),
    }
    return line
