"""The records kdprof writes and reads: Cost, Run, curve and ledger entries.

Quantities carry their unit in their name; 1 multiply-add = 2 FLOP. What is not available is None,
and ``unavailable`` holds the reason under the same key.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

REFERENCE = "none"
"""The method that every other one's cost is a ratio to: the student alone."""
CONTROL = "kd"
"""Plain logit distillation: differences in mIoU are to it, schedules are converted to it."""
CONTROLS = (REFERENCE, CONTROL)
"""The methods that every comparison holds at the same budget, unless it is told not to."""


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
    auxiliary is the second optimiser's phase, forward and backward. The parts are None of a step
    that is not kdprof's own: nobody knows where one ends there.
    """

    teacher: float | None
    student: float | None
    objective: float | None
    backward: float | None
    auxiliary: float | None
    total: float


class TermCost(Record):
    """What one term of the objective costs: its forward and its own share of the backward.

    Work that several terms need is shared out equally among them.
    """

    weight: float
    forward_flop: float
    backward_flop: float
    """Matrix FLOP."""
    bytes_moved: float
    forward_s: float | None
    backward_s: float | None


OperationKind = Literal[
    "matrix", "elementwise", "reduction", "softmax", "normalisation", "resize", "pooling",
    "gather", "copy", "optimizer", "communication", "uncounted",
]  # fmt: skip
"""What a torch operator does. ``uncounted``: no formula knows it."""


class Operation(Record):
    """One operator within one phase of a step, all its calls together."""

    phase: str
    name: str
    """As torch calls it: ``aten.convolution``."""
    kind: OperationKind
    calls: int
    matrix_flop: float
    other_flop: float | None
    """Arithmetic outside matrix products, by the table in docs/measuring.md; None where no formula
    knows the operator."""
    bytes_read: float
    bytes_written: float
    seconds: float | None
    """Share of the phase's measured seconds; None where the step was counted, not run."""


class Memory(Record):
    """Peaks over one step, in bytes. ``process``: the whole process as the system sees it."""

    peak_allocated: int | None
    peak_reserved: int | None
    process: int | None
    phases: dict[str, int] | None
    """Peak within each phase: allocated on a GPU, resident set of the process on a CPU."""
    phases_reserved: dict[str, int] | None
    """Peak that the CUDA allocator reserved within each phase."""


class Energy(Record):
    """How ``energy_j`` was measured."""

    source: str
    """The counter that was read."""
    window_s: float
    steps: int
    counter_period_s: float
    """How often the counter moves; a window is at least ten of these."""
    idle_w: float | None
    """Power before the steps ran; it is part of ``energy_j``."""
    power_integral_j: float | None
    """Energy per step by integrating sampled power instead: a cross-check."""


class Ceilings(Record):
    """What the device reaches here, measured in place, not a datasheet's."""

    matmul_flop_per_s: float
    copy_bytes_per_s: float
    """Bytes read plus bytes written."""
    precision: str


class PhaseBound(Record):
    """What bounds one phase, by the roofline of the measured ceilings."""

    matrix_flop: float
    bytes_moved: float
    intensity: float | None
    """Matrix FLOP per byte; None where nothing is moved."""
    ceiling_share: float
    """Time the roofline allows divided by the time measured: 1 = at the ceiling."""
    bound: Literal["compute", "memory", "overhead"]
    """overhead: under a third of the measured time is explained by either ceiling."""


class Canary(Record):
    """A fixed kernel timed between the blocks: what the machine itself did meanwhile."""

    median_s: float
    drift: float
    """Largest relative change between quarters of the measurement."""
    steady: bool
    """False where that change exceeds the precision target and is no noise."""
    samples_s: list[float]


class Outlier(Record):
    """A sample far above the others. It stays in the samples."""

    of: Literal["step", "end_to_end"]
    round: int
    step: int
    """Of the round; 0 for an iteration with the loader, of which a round has one sample."""
    seconds: float
    times_median: float
    cause: str
    """``unknown`` where nothing was seen."""


class Cost(Record):
    """What one TrainStep of a method costs on one device, or on several that share its batch.

    Of several, ``energy_j`` is the sum; FLOP, bytes, memory and the operators are rank 0's, and
    every other's are the same.
    """

    schema_version: Literal[4] = Field(default=4, alias="schema")
    method: str
    device: str
    gpus: int = 1
    """Devices that made the step together, each on its share of the batch."""
    key: str
    """Hash of everything that changes the cost."""
    session: str
    """The process that measured it; samples of one session are paired round by round."""
    latency_s: Interval | None
    ratio: Ratio | None
    end_to_end_s: Interval | None
    """Seconds per iteration with the real loader."""
    end_to_end_ratio: Ratio | None
    samples_s: list[list[float]]
    """Step latencies, one list per round."""
    reference_samples_s: list[list[float]]
    """Step latencies of the method ``ratio.to``, taken in turn with these."""
    end_to_end_samples_s: list[float]
    """One per round."""
    reference_end_to_end_samples_s: list[float]
    outliers: list[Outlier]
    canary: Canary | None
    phases_s: dict[str, float] | None
    """Seconds of each phase: its mean share of the timed steps times the median step, so that the
    phases add up to ``latency_s.median``."""
    terms: dict[str, TermCost] | None
    flop: Flop | None
    operations: list[Operation] | None
    bytes_moved: float | None
    hidden_cost: float | None
    """Hidden-cost index: the share of the step's time that its matrix FLOP do not explain at the
    reference's seconds per FLOP. Negative where they promise more time than is taken."""
    ceilings: Ceilings | None
    bounds: dict[str, PhaseBound] | None
    mfu: float | None
    """Model FLOP utilisation: FLOP per second over the device's published peak."""
    memory_bytes: Memory
    energy_j: float | None
    energy: Energy | None
    reliable: bool
    warnings: list[str]
    unavailable: dict[str, str]
    """Why a field is None."""
    timing: dict[str, Any]
    """Which timing rules applied: clock, warm-up steps, rounds, why measuring stopped."""
    hardware: dict[str, Any]
    """State of the device before, during and after."""
    settings: dict[str, Any]
    """The study's fields and method settings that the key is made of."""
    versions: dict[str, str]

    def flop_per_iteration(self) -> float | None:
        """Return the matrix FLOP of one step on all its devices; None where not counted."""
        return None if self.flop is None else self.flop.total * self.gpus

    def seconds_per_iteration(self) -> Interval:
        """Return what an iteration takes from a run's clock: with the loader where that was
        measured, else the step alone."""
        found = self.end_to_end_s or self.latency_s
        assert found is not None, "a stored Cost has a latency"
        return found

    def reference_rounds(self, *, end_to_end: bool) -> list[list[float]]:
        """Return the seconds of the reference that it was interleaved with, by round; of its steps
        alone, or of iterations with the loader."""
        if end_to_end:
            return [[seconds] for seconds in self.reference_end_to_end_samples_s]
        return self.reference_samples_s

    def ratio_per_iteration(self) -> Ratio:
        """Return :meth:`seconds_per_iteration` divided by that of the reference beside it."""
        found = self.end_to_end_ratio or self.ratio
        assert found is not None, "a stored Cost has a ratio"
        return found

    @model_validator(mode="before")
    @classmethod
    def _from_schema_3(cls, values: Any) -> Any:
        """Read a record of schema 3, which had a count by module that was always null."""
        if isinstance(values, dict) and values.get("schema") == 3:
            values = {key: v for key, v in values.items() if key != "modules_flop"} | {"schema": 4}
            reasons = values.get("unavailable") or {}
            values["unavailable"] = {k: v for k, v in reasons.items() if k != "modules_flop"}
        return values


class CountedCost(Cost):
    """What was counted of a step that did not run: no latency, memory or energy."""

    modules_flop: dict[str, dict[str, float]] | None
    """Forward matrix FLOP of ``student`` and ``teacher`` by module, as fvcore counts them."""


class Spent(Record):
    """Seconds of training: what the conversion promised and what the ledger adds up to."""

    planned: float | None
    actual: float

    def drift(self) -> float | None:
        """Return (actual - planned) / planned, or None where nothing was planned."""
        return None if not self.planned else self.actual / self.planned - 1


class Failure(Record):
    """Why a run ended before its budget did."""

    iteration: int
    """From 0; of the step that failed, or the last one that was begun."""
    term: str | None
    """The loss term that is not finite, where that is the reason."""
    reason: str
    checkpoint_iteration: int | None
    """Iterations of the last good checkpoint; None where there is none."""


RunKind = Literal["run", "teacher", "trunk"]
"""A training of (method, budget, seed); the teacher's own; what a method's wsd runs share."""


def run_label(kind: RunKind, method: str, budget: str, seed: int) -> str:
    """Return what messages and reports call a run: ``cwd 40k@cwd seed 0``."""
    if kind == "teacher":
        return "teacher"
    return f"{method} {'trunk' if kind == 'trunk' else budget} seed {seed}"


class Run(Record):
    """One training."""

    schema_version: Literal[3] = Field(default=3, alias="schema")
    kind: RunKind = "run"
    method: str
    """Of a run or trunk; of the teacher, what it is trained with."""
    budget: str
    """Empty where the kind is no run."""
    seed: int
    device: str
    iterations: int
    """Iterations this run is planned to make."""
    schedule_iterations: int
    """What the learning-rate schedule spans."""
    enforce: str = "iterations"
    """What ends the run: its iterations, or its planned time, energy or flop."""
    startup: str = "apart"
    """Whether the start-up of its processes is counted in ``train_s``."""
    gpus: int = 1
    """Devices that trained it together: its GPU-seconds are ``train_s`` times these."""
    concurrent_runs: int | None = 0
    """Other runs that were trained on the same machine at the same time, at most: they share its
    memory bandwidth, so that planned seconds do not hold. None = not known (a cluster's node)."""
    iterations_done: int
    miou: float | None
    """Of the last iterate, over the classes present in the validation labels; a fraction."""
    miou_per_class: dict[str, float | None] | None
    miou_of: dict[str, float | None] = {}
    """Over groups of classes: old and new in a class-incremental scenario, else none."""
    best_miou: float | None
    """Best of the evaluations made; biased upwards, reported but never compared."""
    train_s: Spent
    """Excludes evaluation, checkpoint writing, logging and lost work; includes ``trunk_s``."""
    trunk_s: float = 0.0
    """The part of ``train_s`` that was spent once for several budgets (wsd)."""
    startup_s: float = 0.0
    """What first steps took beyond the planned, where it is not counted in ``train_s``."""
    eval_s: float
    checkpoint_s: float
    logging_s: float = 0.0
    lost_s: float = 0.0
    """Work that was done again after a crash, as far as it had been booked."""
    data_wait_s: float | None = None
    """The part of ``train_s`` in which the step waited for its batch."""
    flop: float | None
    """Of all its devices."""
    energy_j: float | None
    """Of the training alone, by the devices' own counters."""
    cost_key: str | None
    """The Cost the budget was converted with; None for the teacher."""
    finished: bool
    failure: Failure | None = None
    unavailable: dict[str, str] = {}
    versions: dict[str, str]

    def state(self) -> str:
        """Return finished, failed or begun."""
        if self.finished:
            return "finished"
        return "failed" if self.failure else "begun"

    def label(self) -> str:
        """Return what messages and reports call it."""
        return run_label(self.kind, self.method, self.budget, self.seed)

    @model_validator(mode="before")
    @classmethod
    def _from_schema_2(cls, values: Any) -> Any:
        """Read a record of schema 2: a teacher had a method, and a trunk a budget, of that name."""
        if not isinstance(values, dict) or values.get("schema") != 2:
            return values
        values = dict(values, schema=3)
        if "beside" in values:
            values["concurrent_runs"] = values.pop("beside")
        if values.get("method") == "teacher" and values.get("cost_key") is None:
            values |= {"kind": "teacher", "method": REFERENCE, "budget": ""}
        elif values.get("budget") == "trunk":
            values |= {"kind": "trunk", "budget": ""}
        return values


class CurvePoint(Record):
    """One evaluation during a run (a line of curve.jsonl)."""

    iteration: int
    train_s: float
    miou: float
    losses: dict[str, float]
    """Unweighted terms of the last step before the evaluation."""
    learning_rate: float


class LogLine(Record):
    """Where a run is (a line of log.jsonl), every few iterations."""

    iteration: int
    """Iterations done."""
    train_s: float
    losses: dict[str, float]
    """Unweighted terms of the last step."""
    learning_rate: float


class LedgerEntry(Record):
    """Compute spent between two moments of a run (a line of ledger.jsonl)."""

    kind: Literal["train", "trunk", "startup", "eval", "checkpoint", "logging", "lost"]
    iteration: int
    """Iterations done when the entry was written."""
    seconds: float
    energy_j: float | None = None
    """Of training, where the device has a counter."""
