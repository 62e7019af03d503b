"""Forecast the steps of a published setting on a GPU that was not at hand, and score the forecast.

    python benchmarks/forecast.py             the score, and the table of docs/reproduce.md
    python benchmarks/forecast.py --update    count the steps again and put the table into the page

The matrix FLOP of a phase need a time at the device's ceiling, and its bytes one at the speed of a
copy; both together are its ideal time. Teacher and student reached a fraction of that speed that
hardly differs between methods, so it is taken from the phases that were timed on the H200. The
objectives differ: their FLOP and bytes have one fraction each, fitted over all methods. The task
loss was written anew since it was timed, so it is forecast like an objective. Each method is scored
with fractions from the others: its step with the task loss that was timed, and its objective.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdprof.records import FirstReading
from kdprof.store import read_record

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "reports" / "reference" / "first-reading-h200"
STEPS, TIMED, COUNTED = (
    FOLDER / name for name in ("steps.json", "phases.json", "counted-now.json")
)
PAGE = ROOT / "docs" / "reproduce.md"

NETWORKS = ("teacher_forward", "student_forward", "student_backward")
LOSS = "task_loss"
OBJECTIVE = ("objective", "objective_backward")
ITERATIONS = 80_000
A100 = {"matmul": 312e12 / 989e12, "copy": 2.039e12 / 4.8e12}
"""bfloat16 peak and bandwidth of the A100 (80 GB) over the H200's, from NVIDIA's data sheets."""


class Work(NamedTuple):
    """What a phase has to do."""

    matrix_flop: float
    bytes: float


Phases = Mapping[str, Work]


class Device(NamedTuple):
    """Ceilings of a device: FLOP/s of matrix products, bytes/s of a copy (read and written)."""

    flop_per_s: float
    bytes_per_s: float

    def ideal_s(self, work: Work) -> np.ndarray:
        """Return the seconds (2,) that the FLOP and the bytes of a phase need at full speed."""
        return np.array([work.matrix_flop / self.flop_per_s, work.bytes / self.bytes_per_s])


class Timed(NamedTuple):
    """A step that was timed by phase."""

    step_s: float
    seconds: Mapping[str, float]
    work: Phases


class Fractions(NamedTuple):
    """Which share of the ideal speed each phase reached.

    Attributes:
        phases: of the networks and of the task loss as it was timed.
        objective: of the FLOP and of the bytes of objectives.
        spread: standard deviation of the logarithm of an objective's seconds over its forecast.
        loss_miss: seconds of the task loss that was timed over its forecast as an objective.
    """

    phases: Mapping[str, float]
    objective: np.ndarray
    spread: float
    loss_miss: float


class Forecast(NamedTuple):
    """Seconds of a step, with a 95 % interval from how the objectives scatter, and from how far
    the one task loss that was timed lies from its forecast.

    Attributes:
        objective_s: the part of the objective and its backward.
    """

    seconds: float
    low: float
    high: float
    objective_s: float


def timed_steps() -> tuple[Device, dict[str, Timed]]:
    """Return the device and the steps that were timed on it, by method."""
    found = json.loads(TIMED.read_text())
    step_s, steps = read_record(STEPS, FirstReading).step_s, {}
    for name, phases in found["methods"].items():
        work = {phase: Work(one["matrix_flop"], one["bytes"]) for phase, one in phases.items()}
        seconds = {phase: one["seconds"] for phase, one in phases.items()}
        steps[name] = Timed(step_s[name], seconds, work)
    return Device(found["matmul_flop_per_s"], found["copy_bytes_per_s"]), steps


def fractions(device: Device, steps: Iterable[Timed]) -> Fractions:
    """Return the fractions that timed steps reached."""
    steps = list(steps)
    phases = {
        phase: float(
            np.median([_fraction(device, step, phase) for step in steps if phase in step.work])
        )
        for phase in (*NETWORKS, LOSS)
    }
    ideal, seconds = _objectives(device, steps)
    # Relative errors count alike for cheap and dear objectives.
    inverse = np.linalg.lstsq(ideal / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    misses = np.log(seconds / (ideal @ inverse))
    losses = [
        step.seconds[LOSS] / float(device.ideal_s(step.work[LOSS]) @ inverse) for step in steps
    ]
    spread = float(np.sqrt(np.mean(misses**2)))
    return Fractions(phases, 1 / inverse, spread, float(np.median(losses)))


def _fraction(device: Device, step: Timed, phase: str) -> float:
    return float(device.ideal_s(step.work[phase]).sum() / step.seconds[phase])


def _objectives(device: Device, steps: Sequence[Timed]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ideal times (n, 2) and the seconds (n,) of the objectives of steps."""
    found = [
        (device.ideal_s(step.work[phase]), step.seconds[phase])
        for step in steps
        for phase in OBJECTIVE
        if phase in step.work
    ]
    return np.array([ideal for ideal, _ in found]), np.array([seconds for _, seconds in found])


def forecast(device: Device, work: Phases, reached: Fractions, *, old_loss: bool) -> Forecast:
    """Return the seconds of a step on a device.

    Args:
        old_loss: True if its task loss is the one that was timed; another one is forecast like an
            objective.
    """

    def as_timed_s(phases: Sequence[str]) -> float:
        return sum(
            device.ideal_s(work[one]).sum() / reached.phases[one] for one in phases if one in work
        )

    def as_objective_s(phases: Sequence[str]) -> float:
        inverse = 1 / reached.objective
        return sum(float(device.ideal_s(work[one]) @ inverse) for one in phases if one in work)

    fixed_s = as_timed_s([*NETWORKS, LOSS] if old_loss else NETWORKS)
    loss_s = 0.0 if old_loss else as_objective_s([LOSS])
    objective_s, factor = as_objective_s(OBJECTIVE), math.exp(1.96 * reached.spread)
    return Forecast(
        fixed_s + loss_s + objective_s,
        fixed_s + (loss_s + objective_s) / factor,
        fixed_s + loss_s * max(factor, reached.loss_miss) + objective_s * factor,
        objective_s,
    )


def scores() -> dict[str, tuple[Timed, Forecast]]:
    """Return for each timed method its step and the forecast from all other methods."""
    device, steps = timed_steps()
    found = {}
    for name, step in steps.items():
        others = [one for other, one in steps.items() if other != name]
        reached = fractions(device, others)
        found[name] = step, forecast(device, step.work, reached, old_loss=True)
    return found


def score_table() -> str:
    """Return the score as Markdown."""
    columns = ("method", "step, ms", "forecast", "error", "objective, ms", "forecast", "error")
    lines = [f"| {' | '.join(columns)} |", "| :-- " + "| --: " * 6 + "|"]
    for name, (step, found) in scores().items():
        objective_s = sum(step.seconds.get(phase, 0.0) for phase in OBJECTIVE)
        cells = [*_scored(step.step_s, found.seconds), *_scored(objective_s, found.objective_s)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scored(timed_s: float, forecast_s: float) -> tuple[str, str, str]:
    """Return the cells of a time, its forecast and the error; dashes if nothing was timed."""
    if not timed_s:
        return "-", "-", "-"
    percent = round(100 * (forecast_s / timed_s - 1))
    error = f"{percent:+d} %".replace("-", "\N{MINUS SIGN}") if percent else "0 %"
    places = 1 if timed_s >= 0.01 else 2
    return f"{1e3 * timed_s:.{places}f}", f"{1e3 * forecast_s:.{places}f}", error


def forecast_table() -> str:
    """Return the forecast of the steps as they are now, as Markdown."""
    h200, steps = timed_steps()
    reached = fractions(h200, steps.values())
    a100 = Device(h200.flop_per_s * A100["matmul"], h200.bytes_per_s * A100["copy"])
    columns = "| method | TFLOP | H200, ms per step | 80k iterations | A100, ms per step |"
    lines = [columns, "| :-- | --: | --: | --: | --: |"]
    for name, work in counted_now().items():
        there, elsewhere = (
            forecast(device, work, reached, old_loss=False) for device in (h200, a100)
        )
        tflop = sum(one.matrix_flop for one in work.values()) / 1e12
        hours = ITERATIONS * there.seconds / 3600
        lines.append(f"| {name} | {tflop:.3g} | {_ms(there)} | {hours:.2g} h | {_ms(elsewhere)} |")
    return "\n".join(lines)


def _ms(found: Forecast) -> str:
    shown = found.seconds, found.low, found.high
    seconds, low, high = (f"{1e3 * one:.{0 if one >= 0.1 else 1}f}" for one in shown)
    return seconds if low == high else f"{seconds} [{low}-{high}]"


def counted_now() -> dict[str, Phases]:
    """Return the work of each method's step as it was counted last, by phase."""
    found: dict[str, dict[str, Any]] = json.loads(COUNTED.read_text())
    return {
        method: {phase: Work(*amounts) for phase, amounts in phases.items()}
        for method, phases in found.items()
    }


def count() -> None:
    """Count the step of every method and store its work by phase."""
    command = [sys.executable, "-m", "kdprof", "measure", "--study", "cityscapes-pspnet-r18"]
    options = ["--precision", "bf16", "--count-only", "--method", "all", "--json"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    found: dict[str, dict[str, list[float]]] = {}
    for cost in json.loads(done.stdout):
        phases = found.setdefault(cost["method"], {})
        for one in cost["operations"]:
            work = phases.setdefault(one["phase"], [0.0, 0.0])
            work[0] += one["matrix_flop"]
            work[1] += one["bytes_read"] + one["bytes_written"]
    COUNTED.write_text(json.dumps(found, indent=1) + "\n")


def page_with_tables(page: str) -> str:
    """Return the page with the tables of today's code between its marks."""
    for mark, table in (("forecast", forecast_table()), ("score", score_table())):
        pattern = rf"(<!-- {mark} -->\n).*?(\n<!-- end of {mark} -->)"
        page = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], page, flags=re.DOTALL)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="count again, write the page")
    if parser.parse_args().update:
        count()
        PAGE.write_text(page_with_tables(PAGE.read_text()))
    print(score_table(), forecast_table(), sep="\n\n")


if __name__ == "__main__":
    main()
