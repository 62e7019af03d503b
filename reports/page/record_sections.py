"""The sections that say where the numbers come from: notes, measurement, study, records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdprof.records import Cost, Run

from .. import table
from ..results import Results, device_text, drift_text, final_miou
from ..text import MISSING, duration, flagged
from .content import Content, Section, cost_id, folded, runs_id
from .markup import Markup, tag
from .tables import Cell, Line, facts
from .tables import table as sortable


def note_section(content: Content) -> Section | None:
    """Return the notes of the tables and of the verdict, folded away."""
    notes = table.notes(content.results, content.rows) if content.results else []
    notes += content.verdict.notes if content.verdict else []
    notes = list(dict.fromkeys(notes))  # both tell what is to be known of the runs
    if not notes:
        return None
    shown = tag("ul", *(tag("li", note) for note in notes))
    return Section("notes", "Notes", "Notes", [folded(f"{len(notes)} notes", False, shown)])


def measure_section(content: Content) -> Section | None:
    """Return the timing rules, and how each Cost was measured; None if no Cost is stored."""
    costs = content.costs
    if not costs:
        return None
    pairs = [
        ("device", device_text(sorted({cost.device for cost in costs}))),
        ("precision", _precisions(costs)),
        ("clock", _values(cost.timing.get("clock") for cost in costs)),
        ("interval", _values(cost.timing.get("interval") for cost in costs)),
        ("garbage collector", _values(cost.timing.get("garbage_collector") for cost in costs)),
        ("energy", _energy_text(costs)),
        ("versions", _versions(costs)),
    ]
    header = ("method", "reliable", "warnings", "warm-up steps", "rounds", "steps per round",
              "end-to-end blocks", "outliers", "canary drift", "why it stopped")  # fmt: skip
    lines = [Line(_measured_cells(cost), cost_id(cost)) for cost in costs]
    words = ("reliable", "warnings", "why it stopped")
    listed = sortable("How each Cost was measured", header, lines, words)
    bad = [cost.method for cost in costs if not cost.reliable]
    state = f"unreliable: {', '.join(bad)}" if bad else "all reliable"
    return Section(
        "measured",
        "Measurement",
        "How it was measured",
        [facts([pair for pair in pairs if pair[1]]),
         folded(f"{len(costs)} Costs, {state}", bool(bad), listed)],
    )  # fmt: skip


def _measured_cells(cost: Cost) -> list[Cell]:
    timing = cost.timing
    warnings = "; ".join(cost.warnings) or MISSING
    counts = (timing.get(n) for n in ("warmup_steps", "rounds", "steps_per_round",
                                      "end_to_end_blocks"))  # fmt: skip
    drift = cost.canary.drift if cost.canary else None
    return [
        Cell(flagged(cost.method, not cost.reliable)),
        Cell("yes" if cost.reliable else "no"),
        Cell(warnings),
        *(Cell(MISSING if number is None else f"{number:,}", number) for number in counts),
        Cell(f"{len(cost.outliers):,}", len(cost.outliers)),
        Cell(MISSING if drift is None else f"{100 * drift:.1f} %", drift),
        Cell(str(timing.get("stopped", MISSING))),
    ]


def _values(found: Any) -> str:
    return ", ".join(sorted({str(value) for value in found if value is not None}))


def _precisions(costs: Sequence[Cost]) -> str:
    return _values(cost.settings.get("step", {}).get("precision") for cost in costs)


def _energy_text(costs: Sequence[Cost]) -> str:
    if sources := _values(cost.energy.source for cost in costs if cost.energy):
        return sources
    reasons = _values(cost.unavailable.get("energy_j") for cost in costs)
    return f"not measured: {reasons or 'no reason recorded'}"


def _versions(costs: Sequence[Cost]) -> str:
    names = dict.fromkeys(name for cost in costs for name in cost.versions)
    return ", ".join(f"{n} {_values(cost.versions.get(n) for cost in costs)}" for n in names)


def study_section(content: Content) -> Section:
    """Return study.toml."""
    text = tag("pre", content.store.study.read_text(), tabindex="0")
    return Section("study", "Study", "The study", [folded("study.toml", False, text)])


def record_section(content: Content) -> Section:
    """Return where each number comes from."""
    lead = tag(
        "p",
        "Every number of this page comes from these files of the results folder. The SHA-256 is "
        "abbreviated; hovering shows all of it.",
        class_="soft",
    )
    parts = [lead]
    if content.results:
        parts.append(folded("Runs", False, _run_table(content, content.results), long=True))
    if content.costs:
        header = ("method", "key", "device", "file", "SHA-256")
        lines = [
            Line(
                [
                    Cell(cost.method),
                    Cell(cost.key),
                    Cell(cost.device),
                    *_file(content, content.store.cost_path(cost.method, cost.key)),
                ]
            )
            for cost in content.costs
        ]
        costs = sortable("Records of costs", header, lines, header)
        parts.append(folded("Costs", False, costs))
    others = [name for name in content.hashes if not name.startswith(("runs/", "costs/"))]
    lines = [Line(_file(content, content.store.root / name)) for name in others]
    rest = sortable("Other records", ("file", "SHA-256"), lines, ("SHA-256",))
    parts.append(folded("Study, teacher, decisions", False, rest))
    return Section("records", "Records", "Where the numbers come from", parts)


def _run_table(content: Content, results: Results) -> Markup:
    header = ("method", "budget", "seed", "mIoU %", "iterations", "seconds", "drift", "file",
              "SHA-256")  # fmt: skip
    lines = []
    for row in content.rows:
        for place, run in enumerate(results.group(row.method, row.budget)):
            path = content.store.run_folder(run.method, run.budget, run.seed).record
            own = _run_cells(run) + _file(content, path)
            lines.append(Line(own, None if place else runs_id(run.method, run.budget)))
    words = ("budget", "file", "SHA-256")
    return sortable("Records of runs", header, lines, words)


def _run_cells(run: Run) -> list[Cell]:
    miou = 100 * final_miou(run)
    return [
        Cell(run.method),
        Cell(run.budget),
        Cell(str(run.seed), run.seed),
        Cell(f"{miou:.2f}", miou),
        Cell(f"{run.iterations_done:,}", run.iterations_done),
        Cell(duration(run.train_s.actual), run.train_s.actual),
        Cell(drift_text(run), run.train_s.drift()),
    ]


def _file(content: Content, path: Path) -> list[Cell]:
    name = path.relative_to(content.store.root).as_posix()
    whole = content.hashes.get(name, "")
    return [Cell(name), Cell(whole[:12] or MISSING, title=whole or None)]
