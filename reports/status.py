"""Table: how far the runs of a folder are, and their cost compared with the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from kdprof.records import Run
from kdprof.store import RunFolder, Store

from .results import classes_notes, drifted
from .text import MISSING, Grid, duration, print_notes

HEADER = ("run", "state", "iterations", "mIoU %", "spent", "planned", "drift", "off the clock",
          "lost")  # fmt: skip
UNKNOWN = "not known"


def status_table(store: Store, console: Console) -> None:
    """Print one line per run that was begun, the teacher's first."""
    folders = [store.teacher_folder(), *store.trunk_folders(), *store.run_folders()]
    begun = [(folder, run) for folder in folders if (run := folder.read_run()) is not None]
    if not begun:
        print_notes([f"{store.root}: nothing was trained yet."], console)
        return
    rows = [_cells(folder, run) for folder, run in begun]
    Grid(f"Runs in {store.root}", HEADER, rows).print(console)
    notes = _notes([run for _, run in begun])
    if any(UNKNOWN in row for row in rows):
        notes.append(
            f"'{UNKNOWN}': this account may not find out whether a process trains the run."
        )
    print_notes([*notes, *_saving(store)], console)


def _saving(store: Store) -> list[str]:
    """Return what shared trunks (wsd) have saved: the cost of each run contains its whole share.

    Of a trunk this is what its branches have of it, less the longest of these parts. What no branch
    has yet is no saving and no loss.
    """
    parts_s: dict[tuple[str, int], list[float]] = {}
    for run in store.runs():
        parts_s.setdefault((run.method, run.seed), []).append(run.trunk_s)
    saved_s = math.fsum(math.fsum(parts) - max(parts) for parts in parts_s.values())
    if not saved_s:
        return []
    spent_s = math.fsum(run.train_s.actual for run in store.runs())
    return [f"Shared trunks (wsd) saved {duration(saved_s)} of {duration(spent_s)}."]


def _cells(folder: RunFolder, run: Run) -> list[str]:
    drift = run.train_s.drift() if run.finished else None
    aside = run.eval_s + run.checkpoint_s + run.logging_s + run.startup_s
    return [
        run.label(),
        _state(folder, run),
        f"{run.iterations_done:,} of {run.iterations:,}",
        MISSING if run.miou is None else f"{100 * run.miou:.2f}",
        duration(run.train_s.actual),
        MISSING if run.train_s.planned is None else duration(run.train_s.planned),
        MISSING if drift is None else f"{drift:+.1%}",
        duration(aside),
        duration(run.lost_s) if run.lost_s else MISSING,
    ]


def _state(folder: RunFolder, run: Run) -> str:
    """Return finished, failed, running, stopped (begun, but no process holds the run), or not
    known (running or stopped)."""
    if run.state() != "begun":
        return run.state()
    return {True: "running", False: "stopped", None: UNKNOWN}[folder.is_held()]


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [
        f"{run.label()} failed at iteration {run.failure.iteration}: {run.failure.reason}"
        for run in runs
        if run.failure
    ]
    notes += [
        f"{run.label()} was stopped for {duration(run.paused_s)}: off the clock, but its energy "
        "contains what the device drew meanwhile."
        for run in runs
        if run.paused_s
    ]
    notes += classes_notes(runs)
    drifts = [
        abs(drift) for run in runs if run.finished and (drift := run.train_s.drift()) is not None
    ]
    if drifts:
        over = sum(map(drifted, (run for run in runs if run.finished)))
        mean = math.fsum(drifts) / len(drifts)
        notes.append(
            f"Forecast against actual: {mean:.1%} off on average, {max(drifts):.1%} at most; "
            f"{over} of {len(drifts)} finished runs more than 2 %."
        )
    notes.append(
        "Off the clock: evaluation, checkpoints, logging and start-up. Lost: trained again after a "
        "crash."
    )
    return notes
