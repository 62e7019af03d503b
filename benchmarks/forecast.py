"""Forecast the steps of a published setting on a GPU that was not at hand, and score the forecast.

    python benchmarks/forecast.py             the score, and the table of docs/reproduce.md
    python benchmarks/forecast.py --update    count the steps again and put the table into the page

A phase of a step takes at least what its matrix FLOP need at the device's ceiling and its bytes at
the speed of a copy: its floor. Teacher, student and task loss reached a fraction of their floors
that hardly differs between methods, so it is taken from the phases that were timed on the H200. The
objectives differ: their FLOP and bytes have one fraction each, fitted over all methods. Each method
is scored with fractions from the others.
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

    def floors_s(self, work: Work) -> np.ndarray:
        """Return the seconds that the FLOP and the bytes of a phase need at least."""
        return np.array([work.matrix_flop / self.flop_per_s, work.bytes / self.bytes_per_s])


class Timed(NamedTuple):
    """A step that was timed by phase."""

    step_s: float
    seconds: Mapping[str, float]
    work: Phases


class Fractions(NamedTuple):
    """Which share of its floor's speed each phase reached.

    Attributes:
        phases: of the networks and of the task loss as it was timed.
        objective: of the FLOP and of the bytes of objectives.
        spread: standard deviation of the logarithm of an objective's seconds over its forecast.
    """

    phases: Mapping[str, float]
    objective: np.ndarray
    spread: float


class Forecast(NamedTuple):
    """Seconds of a step, with a 95 % interval from how the objectives scatter."""

    seconds: float
    low: float
    high: float


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
    floors, seconds = _objectives(device, steps)
    # Relative errors count alike for cheap and dear objectives.
    inverse = np.linalg.lstsq(floors / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    misses = np.log(seconds / (floors @ inverse))
    return Fractions(phases, 1 / inverse, float(np.sqrt(np.mean(misses**2))))


def _fraction(device: Device, step: Timed, phase: str) -> float:
    return float(device.floors_s(step.work[phase]).sum() / step.seconds[phase])


def _objectives(device: Device, steps: Sequence[Timed]) -> tuple[np.ndarray, np.ndarray]:
    """Return the floors (n, 2) and the seconds (n,) of the objectives of steps."""
    found = [
        (device.floors_s(step.work[phase]), step.seconds[phase])
        for step in steps
        for phase in OBJECTIVE
        if phase in step.work
    ]
    return np.array([floors for floors, _ in found]), np.array([seconds for _, seconds in found])


def forecast(device: Device, work: Phases, reached: Fractions, *, old_loss: bool) -> Forecast:
    """Return the seconds of a step on a device.

    Args:
        old_loss: True if its task loss is the one that was timed; another one is forecast like an
            objective.
    """
    like_objectives = [*OBJECTIVE, *(() if old_loss else (LOSS,))]
    surely = [*NETWORKS, *((LOSS,) if old_loss else ())]
    fixed = sum(
        device.floors_s(work[phase]).sum() / reached.phases[phase]
        for phase in surely
        if phase in work
    )
    varying = sum(
        float(device.floors_s(work[phase]) @ (1 / reached.objective))
        for phase in like_objectives
        if phase in work
    )
    factor = math.exp(1.96 * reached.spread)
    return Forecast(fixed + varying, fixed + varying / factor, fixed + varying * factor)


def scores() -> dict[str, tuple[float, Forecast]]:
    """Return for each timed method its seconds and the forecast from all other methods."""
    device, steps = timed_steps()
    found = {}
    for name, step in steps.items():
        others = [one for other, one in steps.items() if other != name]
        reached = fractions(device, others)
        found[name] = step.step_s, forecast(device, step.work, reached, old_loss=True)
    return found


def score_table() -> str:
    """Return the score as Markdown."""
    lines = ["| method | timed, ms | forecast, ms | error |", "| :-- | --: | --: | --: |"]
    for name, (step_s, found) in scores().items():
        error = f"{100 * (found.seconds / step_s - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
        lines.append(f"| {name} | {1e3 * step_s:.1f} | {1e3 * found.seconds:.1f} | {error} |")
    return "\n".join(lines)


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
    seconds, low, high = (f"{1e3 * one:.{0 if one >= 0.1 else 1}f}" for one in found)
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
