"""The records kdprof writes and reads: Cost, Run, curve and ledger entries.

Quantities carry their unit in their name; 1 multiply-add = 2 FLOP. What is not available is None,
and ``unavailable`` holds the reason under the same key.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1


class Record(BaseModel):
    """Base of everything stored: unknown keys are refused, so an old reader fails loudly."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Interval(Record):
    """A median with the ends of its 95 % confidence interval."""

    median: float
    low: float
    high: float


class Ratio(Interval):
    """A latency divided by that of the method ``to``, with a 95 % interval."""

    to: str


class Flop(Record):
    """Matrix FLOP of one step (convolutions and matrix products; 1 multiply-add = 2 FLOP).

    teacher, student and objective are forward; backward is everything the backward passes do;
    auxiliary is the second optimiser's phase, forward and backward.
    """

    teacher: float
    student: float
    objective: float
    backward: float
    auxiliary: float
    total: float


class Memory(Record):
    """Peaks over one step, in bytes. ``process``: the whole process as the system sees it."""

    peak_allocated: int | None
    peak_reserved: int | None
    process: int | None


class Cost(Record):
    """What one TrainStep of a method costs on one device."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    method: str
    device: str
    key: str
    """Hash of everything that changes the cost."""
    session: str
    """Costs measured in the same interleaved rounds share it; their samples are paired."""
    latency_s: Interval | None
    ratio: Ratio | None
    end_to_end_s: Interval | None
    """Seconds per iteration with the real loader."""
    samples_s: list[list[float]]
    """Step latencies, one list per round."""
    end_to_end_samples_s: list[list[float]]
    phases_s: dict[str, float] | None
    """Seconds of each phase: its mean share of the timed steps times the median step, so that the
    phases add up to ``latency_s.median``."""
    flop: Flop | None
    bytes_moved: float | None
    memory_bytes: Memory
    energy_j: float | None
    reliable: bool
    warnings: list[str]
    unavailable: dict[str, str]
    """Why a field is None."""
    timing: dict[str, Any]
    """Which timing rules applied: clock, warm-up steps, rounds, why measuring stopped."""
    hardware: dict[str, Any]
    """State of the device before and after."""
    settings: dict[str, Any]
    """The study's fields and method settings that the key is made of."""
    versions: dict[str, str]

    def seconds_per_iteration(self) -> Interval:
        """Return what an iteration takes from a run's clock: with the loader where that was
        measured, else the step alone."""
        found = self.end_to_end_s or self.latency_s
        assert found is not None, "a stored Cost has a latency"
        return found


class Spent(Record):
    """Seconds of training: what the conversion promised and what the ledger adds up to."""

    planned: float | None
    actual: float

    def drift(self) -> float | None:
        """Return (actual - planned) / planned, or None where nothing was planned."""
        return None if not self.planned else self.actual / self.planned - 1


class Run(Record):
    """One training of (method, budget, seed)."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    method: str
    budget: str
    seed: int
    device: str
    iterations: int
    """Iterations this run is planned to make; the learning-rate schedule spans them."""
    iterations_done: int
    miou: float | None
    """Of the last iterate, over the classes present in the validation labels; a fraction."""
    miou_per_class: dict[str, float | None] | None
    best_miou: float | None
    """Best of the evaluations made; biased upwards, reported but never compared."""
    train_s: Spent
    """Excludes evaluation and checkpoint writing."""
    eval_s: float
    checkpoint_s: float
    flop: float | None
    energy_j: float | None
    cost_key: str | None
    """The Cost the budget was converted with; None for the teacher."""
    finished: bool
    unavailable: dict[str, str] = {}
    versions: dict[str, str]


class CurvePoint(Record):
    """One evaluation during a run (a line of curve.jsonl)."""

    iteration: int
    train_s: float
    miou: float
    losses: dict[str, float]
    """Unweighted terms of the last step before the evaluation."""
    learning_rate: float


class LedgerEntry(Record):
    """Compute spent between two moments of a run (a line of ledger.jsonl)."""

    kind: Literal["train", "eval", "checkpoint"]
    iteration: int
    """Iterations done when the entry was written."""
    seconds: float
