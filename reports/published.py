"""Table: what published schedules cost on the measured device, and in iterations of kd."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from .text import MISSING, Grid, duration, figures, flagged, print_notes, unreliable_note

if TYPE_CHECKING:
    from kdprof.published import ConvertedSchedule
    from kdprof.records import Cost

FORECAST = "~"
FAR = 4
"""Beyond this factor, time does not grow like the pixels, because of fixed work and caches."""


def published_table(
    found: Sequence[ConvertedSchedule], costs: Sequence[Cost], console: Console
) -> None:
    """Print one grid per data set, the longest schedule first, and what was not converted."""
    converted = [one for one in found if one.reason is None]
    for dataset in dict.fromkeys(one.dataset for one in converted):
        rows = [one for one in converted if one.dataset == dataset]
        _grid(f"{dataset}: published schedules", rows).print(console)
    print_notes(notes(converted, costs), console)
    _print_missing([one for one in found if one.reason is not None], console)


def _grid(title: str, rows: list[ConvertedSchedule]) -> Grid:
    header = ("method", "published schedule", "device time", "= kd iterations")
    ordered = sorted(rows, key=lambda one: (-(one.seconds or 0), one.method))
    return Grid(title, header, [_cells(one) for one in ordered])


def _cells(one: ConvertedSchedule) -> list[str]:
    forecast = FORECAST if one.scale != 1 else ""
    return [
        flagged(one.method, bool(one.unreliable)),
        schedule_text(one),
        MISSING if one.seconds is None else forecast + duration(one.seconds),
        MISSING if one.kd_iterations is None else _interval(one),
    ]


def _interval(one: ConvertedSchedule) -> str:
    return f"{one.kd_iterations:,} [{one.kd_iterations_low:,}-{one.kd_iterations_high:,}]"


def schedule_text(one: ConvertedSchedule) -> str:
    """Return ``80k x 8 x 512x1024``."""
    assert one.iterations is not None
    assert one.crop is not None
    whole = one.iterations % 1000 == 0
    length = f"{one.iterations // 1000}k" if whole else f"{one.iterations:,}"
    return f"{length} x {one.batch} x {one.crop[0]}x{one.crop[1]}"


def notes(converted: Sequence[ConvertedSchedule], costs: Sequence[Cost]) -> list[str]:
    """Return how the conversions are to be read."""
    if not converted:
        return []
    here = measured(costs)
    found = [
        f"Schedule: iterations x batch x crop. Device time: on one {here['device']}, without "
        "evaluation.",
        f"Networks and classes are the measured ones ({here['networks']}), not the paper's: these "
        "are costs here, not those of the authors.",
        "= kd iterations: iterations of plain kd that take as long at the schedule's own batch and "
        f"crop; the ratio of the costs was measured at {here['step']}.",
    ]
    found += _forecast_notes({one.scale for one in converted if one.scale} - {1}, here["step"])
    if all(one.kd_iterations is None for one in converted):
        found.append("No cost of kd here: run 'kdprof measure --method kd' for its iterations.")
    return found + unreliable_note(method for one in converted for method in one.unreliable)


def _forecast_notes(scales: set[float], step: str) -> list[str]:
    """Return how seconds were scaled; no note if every schedule has the measured batch and crop."""
    if not scales:
        return []
    ends = dict.fromkeys(figures(end) for end in (min(scales), max(scales)))
    notes = [
        f"{FORECAST} Forecast, not measured: the step at {step} times {' to '.join(ends)}, as if "
        "time grew with images and crop pixels. A method whose work grows faster (see its cost: "
        "'kdprof methods NAME') takes longer in larger steps."
    ]
    if max(scales) > FAR or min(scales) < 1 / FAR:
        notes.append(
            f"Some of these are far from {step}: measure nearer to them (--batch, --crop) before "
            "you quote them."
        )
    return notes


def measured(costs: Sequence[Cost]) -> dict[str, str]:
    """Return the networks, the batch and crop, and the device of the Costs, as text."""
    settings = [cost.settings for cost in costs]
    students = _distinct(s.get("student") for s in settings)
    teachers = _distinct(s.get("teacher") for s in settings)
    with_teacher = f" with teacher {teachers}" if teachers else ""
    steps = [s["step"] for s in settings if "crop" in s.get("step", {})]
    shapes = _distinct("{} x {}x{}".format(step["batch"], *step["crop"]) for step in steps)
    device = _distinct(cost.device for cost in costs)
    return {"networks": f"{students}{with_teacher}", "step": shapes, "device": device}


def _distinct(names: Iterable[str | None]) -> str:
    """Return the distinct names, joined."""
    return " and ".join(dict.fromkeys(str(name) for name in names if name))


def _print_missing(missing: Sequence[ConvertedSchedule], console: Console) -> None:
    if missing:
        lines = dict.fromkeys(
            f"  {one.method}{f', {one.dataset}' if one.dataset else ''}: {one.reason}"
            for one in missing
        )
        console.print("", "Not converted:", *lines, sep="\n", soft_wrap=True)
