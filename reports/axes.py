"""The axes of compute that runs are compared on, and their readable units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kdprof.errors import UserError, unknown
from kdprof.records import Run

from .results import Results, is_cpu
from .text import figures

TIME_UNITS = ((1, "s", "seconds"), (60, "min", "minutes"), (3600, "h", "hours"))
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


@dataclass(frozen=True)
class Axis:
    """A quantity of a run to compare at, in its own unit and in a readable one."""

    name: str
    """As on the command line: ``seconds``."""
    label: str
    """Of a figure's axis, with the readable unit."""
    unit: float
    """The quantity is divided by it to be readable."""
    unit_name: str
    quantity: Callable[[Run], float | None]
    """The run's quantity (seconds, FLOP, joules, ...), or None if the record lacks it."""

    @property
    def compute(self) -> str:
        """What it measures, in a sentence: ``wall-clock``."""
        return COMPUTE[self.name]

    def of(self, run: Run) -> float | None:
        """Return the run's quantity in the readable unit, or None if the record lacks it."""
        value = self.quantity(run)
        return None if value is None else value / self.unit

    def text(self, value: float) -> str:
        """Return a quantity in the readable unit: ``2.5 h``."""
        return f"{figures(value / self.unit)} {self.unit_name}".strip()


COMPUTE = {
    "seconds": "wall-clock",
    "gpu-hours": "device time",
    "flop": "FLOP",
    "joules": "energy",
    "samples": "samples",
    "iterations": "iterations",
}
"""What each axis measures, in a sentence, by its name on the command line."""
AXES = tuple(COMPUTE)
ORDERED_BY = "iterations"
"""The axis at which papers compare: rank flips are searched between it and every other."""


def axis(results: Results, name: str) -> Axis:
    """Return an axis in the unit that suits the runs.

    Raises:
        UserError: ``name`` is unknown, or a finished run lacks that quantity.
    """
    makers = dict(
        zip(AXES, (_seconds, _gpu_hours, _flop, _joules, _samples, _iterations), strict=True)
    )
    if name not in makers:
        raise UserError(unknown("x axis", name, makers))
    return makers[name](results)


def available(results: Results) -> list[Axis]:
    """Return the axes, without GPU-hours, whose quantity every finished run has."""
    found = []
    for name in AXES:
        try:
            made = axis(results, name)
        except UserError:
            continue
        if name != "gpu-hours" and all(made.quantity(run) for run in results.finished):
            found.append(made)
    return found


def _seconds(results: Results) -> Axis:
    unit, short, _ = _time_unit(max(run.train_s.actual for run in results.finished))
    where = " on a CPU" if all(is_cpu(run.device) for run in results.finished) else ""
    label = f"training wall-clock{where} ({short})"
    return Axis("seconds", label, unit, short, lambda run: run.train_s.actual)


def _gpu_hours(results: Results) -> Axis:
    def device_seconds(run: Run) -> float:
        return run.train_s.actual * run.gpus

    unit, _, long = _time_unit(max(map(device_seconds, results.finished)))
    kinds = "/".join(sorted({"CPU" if is_cpu(run.device) else "GPU" for run in results.finished}))
    name = f"{kinds}-{long}"
    label = f"training compute ({name})"
    return Axis("gpu-hours", label, unit, name, device_seconds)


def _flop(results: Results) -> Axis:
    unit, prefix = _prefix("flop", lambda run: run.flop, results)
    label = f"training compute ({prefix}FLOP; 1 multiply-add = 2 FLOP)"
    return Axis("flop", label, unit, f"{prefix}FLOP", lambda run: run.flop)


def _joules(results: Results) -> Axis:
    unit, prefix = _prefix("energy_j", lambda run: run.energy_j, results)
    label = f"training energy ({prefix}J)"
    return Axis("joules", label, unit, f"{prefix}J", lambda run: run.energy_j)


def _prefix(
    field: str, amount: Callable[[Run], float | None], results: Results
) -> tuple[float, str]:
    lacking = [run for run in results.finished if not amount(run)]
    if lacking:
        methods = ", ".join(dict.fromkeys(run.method for run in lacking))
        reason = lacking[0].unavailable.get(field, "not recorded")
        raise UserError(
            f"no {field} of {methods} is known ({reason}); use the axis seconds or iterations"
        )
    most = max(amount(run) or 0.0 for run in results.finished)
    return next((unit, prefix) for unit, prefix in PREFIXES if most >= unit or unit == 1)


def _samples(results: Results) -> Axis:
    batch = results.study.get("step", {}).get("batch")
    if batch is None:
        raise UserError("study.toml has no batch, so samples are not known; use iterations")
    unit, name = _thousands(max(run.iterations_done for run in results.finished) * batch, "images")
    label = f"training images seen ({name})" if unit > 1 else "training images seen"
    return Axis("samples", label, unit, name, lambda run: run.iterations_done * batch)


def _iterations(results: Results) -> Axis:
    unit, name = _thousands(max(run.iterations_done for run in results.finished), "iterations")
    label = "iterations (thousand)" if unit > 1 else "iterations"
    return Axis("iterations", label, unit, name, lambda run: run.iterations_done)


def _thousands(most: float, noun: str) -> tuple[float, str]:
    return (1000, f"thousand {noun}") if most >= 10_000 else (1, noun)


def _time_unit(seconds: float) -> tuple[float, str, str]:
    """Return the largest unit of which ``seconds`` contain at least two."""
    return next((u for u in reversed(TIME_UNITS) if seconds >= 2 * u[0]), TIME_UNITS[0])
