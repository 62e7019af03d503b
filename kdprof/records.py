"""The records kdprof writes and reads: Cost, Run, curve and ledger entries.

Quantities carry their unit in their name; 1 multiply-add = 2 FLOP. A value that is not available is
None, and ``unavailable`` holds the reason under the same key. Every number is finite, in its range
and in order with the others, and every name can be printed: a record that says otherwise is damaged
or was written by hand.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from kdprof.visible import printable

REFERENCE = "none"
"""The method that cost ratios refer to: training without distillation."""
CONTROL = "kd"
"""Plain logit distillation: differences in mIoU refer to it, schedules are converted to it."""
CONTROLS = (REFERENCE, CONTROL)
"""The methods that every comparison contains at the same budget, unless they are switched off."""


METHOD_NAME = re.compile(r"[\w+-]{1,60}(:[\w+-]{1,60})?")
"""Names of methods: words with hyphens, and a variant after a colon. Folders are named after them,
so nothing else can stand in them."""
LONGEST_NAME = 300
"""Characters of a device's or a step's name."""
ROUNDING = 1e-6
"""By how much two numbers that were computed apart may be out of order."""


def _name(text: str) -> str:
    if not text or printable(text) != text:
        raise ValueError("must be a name of visible characters")
    return text


def _method_name(text: str) -> str:
    if not METHOD_NAME.fullmatch(text):
        raise ValueError("must be the name of a method, such as cwd:feature")
    return text


def _finite(value: Any) -> Any:
    """Refuse numbers that JSON does not have, at any depth: they would be stored as null."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _finite(item)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must hold finite numbers, not {value}")
    return value


Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_name)]
MethodName = Annotated[str, AfterValidator(_method_name)]
Facts = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Values of JSON whose keys are not fixed."""
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Moment = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
"""A time in UTC as ISO 8601 writes it, to the second: the later of two texts is the later time."""


PARTS_OF_FLOP = ("teacher", "student", "objective", "backward", "auxiliary")
"""The parts of a step's FLOP."""


class Record(BaseModel):
    """Base class of all that is stored. Unknown keys are errors, so that an older version cannot
    misread a newer file."""

    model_config = ConfigDict(
        extra="forbid", populate_by_name=True, serialize_by_alias=True, allow_inf_nan=False
    )


def _check_order(low: float | None, value: float | None, high: float | None) -> None:
    known = [end for end in (low, value, high) if end is not None]
    slack = ROUNDING * max(map(abs, known), default=0.0)
    if any(one > other + slack for one, other in itertools.pairwise(known)):
        raise ValueError("low, the value and high must be in this order")


class Interval(Record):
    """A median with the ends of its 95 % confidence interval."""

    median: Positive
    low: Positive
    high: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.median, self.high)
        return self


class Ratio(Interval):
    """A latency divided by that of the method ``to``, with a 95 % interval."""

    to: Name


def complete_sum(amounts: Iterable[float | None]) -> float | None:
    """Return a sum; None if an amount is not known, because a sum without it is no total."""
    known = list(amounts)
    return None if None in known else sum(amount for amount in known if amount is not None)


class Flop(Record):
    """Matrix FLOP of one step (convolutions and matrix products; 1 multiply-add = 2 FLOP).

    teacher, student and objective are forward passes; backward is all backward passes; auxiliary is
    the second optimiser's phase, forward and backward. The parts are None for a user's step, whose
    phases are not known. A part and the total are None if an operator has matrix work that is not
    counted; ``unavailable["flop.total"]`` names it.
    """

    teacher: Amount | None
    student: Amount | None
    objective: Amount | None
    backward: Amount | None
    auxiliary: Amount | None
    total: Amount | None
    counted: Amount
    """FLOP of the operators that are counted: the total, or a lower bound of it."""


class TermCost(Record):
    """The cost of one term of the objective: its forward and its share of the backward.

    Work that several terms need is divided equally among them.
    """

    weight: float
    forward_flop: Amount | None
    backward_flop: Amount | None
    """Matrix FLOP; None if an operator has matrix work that is not counted."""
    bytes_moved: Amount
    forward_s: Amount | None
    backward_s: Amount | None


OperationKind = Literal[
    "matrix", "elementwise", "reduction", "softmax", "normalisation", "resize", "pooling",
    "gather", "copy", "optimizer", "communication", "uncounted",
]  # fmt: skip
"""The kind of work of a torch operator. ``uncounted``: there is no formula for it."""


class Operation(Record):
    """One operator within one phase of a step, all its calls together."""

    phase: Name
    name: Name
    """The name in torch, such as ``aten.convolution``."""
    kind: OperationKind
    calls: Count
    matrix_flop: Amount | None
    """None if it has matrix work that is not counted."""
    uncounted: str | None = None
    """Why ``matrix_flop`` is None."""
    other_flop: Amount | None
    """Arithmetic outside matrix products, by the table in docs/measuring.md; None if there is no
    formula for the operator."""
    bytes_read: Amount
    bytes_written: Amount
    seconds: Amount | None
    """Share of the phase's measured seconds; None if single operators were not timed."""


class Memory(Record):
    """Peaks over one step, in bytes. ``process``: the whole process, from the operating system."""

    peak_allocated: Count | None
    peak_reserved: Count | None
    process: Count | None
    phases: dict[Name, Count] | None
    """Peak within each phase: allocated on a GPU, resident set of the process on a CPU."""
    phases_reserved: dict[Name, Count] | None
    """Peak that the CUDA allocator reserved within each phase."""


class Energy(Record):
    """How ``energy_j`` was measured."""

    source: Name
    """The counter that was read."""
    window_s: Positive
    steps: Annotated[int, Field(ge=1)]
    counter_period_s: Amount
    """Time between updates of the counter."""
    idle_w: Amount | None
    """Power before the steps ran; ``energy_j`` includes it."""
    power_integral_j: Amount | None
    """Energy per step from integrating sampled power, as a cross-check."""
    around_blocks: bool = False
    """True if it was read around the timed blocks, not in a window of its own; the two values above
    are None then."""


class Ceilings(Record):
    """The highest rates that were measured on this device; not those of a data sheet."""

    matmul_flop_per_s: Positive
    exact_matmul_flop_per_s: Positive | None = None
    """With tf32 only, where matrix products are exact: their rate in float32."""
    copy_bytes_per_s: Positive
    """Bytes read plus bytes written."""
    precision: Name


class PhaseBound(Record):
    """What limits one phase, by the roofline model with the measured ceilings."""

    matrix_flop: Amount
    bytes_moved: Amount
    intensity: Amount | None
    """Matrix FLOP per byte; None if no bytes are moved."""
    ceiling_share: Amount
    """Shortest time by the roofline, divided by the measured time: 1 = at the ceiling."""
    bound: Literal["compute", "memory", "overhead"]
    """overhead: neither ceiling explains a third of the measured time."""


class Canary(Record):
    """A fixed kernel timed between the blocks: it shows changes of the machine's speed."""

    median_s: Positive
    drift: Amount
    """Largest relative change between quarters of the measurement."""
    steady: bool
    """False if that change exceeds the precision target and is statistically significant."""
    samples_s: list[Positive]


class Outlier(Record):
    """A sample far above the others. It is not removed from the samples."""

    of: Literal["step", "end_to_end"]
    round: Count
    step: Count
    """Index in the round; 0 for a block of end-to-end iterations, whose number is ``round``."""
    seconds: Positive
    times_median: Positive
    cause: Name
    """``unknown`` if no cause was observed."""


class Cost(Record):
    """The cost of one TrainStep of a method on one device, or on several that share its batch.

    For several devices ``energy_j`` is the sum; FLOP, bytes, memory and operators are those of rank
    0, and the same on the others.
    """

    schema_version: Literal[5] = Field(default=5, alias="schema")
    method: Name
    device: Name
    gpus: Annotated[int, Field(ge=1)] = 1
    """Devices that run the step together, each on its share of the batch."""
    key: Name
    """Hash of everything that changes the cost."""
    session: str
    """The process that measured it; samples of one session are paired round by round."""
    measured_at: Moment | None = None
    """When it was measured, by the clock of its machine: of several Costs of a method the newest
    counts. None in records that were written before there was this field. No part of ``key``."""
    latency_s: Interval | None
    ratio: Ratio | None
    end_to_end_s: Interval | None
    """Seconds per end-to-end iteration, with the real data loader."""
    end_to_end_ratio: Ratio | None
    samples_s: list[list[Positive]]
    """Step latencies, one list per round."""
    reference_samples_s: list[list[Positive]]
    """Step latencies of the method ``ratio.to``, interleaved with these."""
    end_to_end_samples_s: list[Positive]
    """One per block of end-to-end iterations; empty if nothing is loaded."""
    reference_end_to_end_samples_s: list[Positive]
    outliers: list[Outlier]
    canary: Canary | None
    phases_s: dict[Name, Amount] | None
    """Seconds of each phase: its mean share of the timed steps times the median step, so that the
    phases add up to ``latency_s.median``."""
    terms: dict[Name, TermCost] | None
    flop: Flop | None
    operations: list[Operation] | None
    bytes_moved: Amount | None
    hidden_cost: Annotated[float, Field(le=1)] | None
    """Hidden-cost index: the share of the step's time that its matrix FLOP do not explain at the
    reference's seconds per FLOP. Negative if they predict more time than was measured."""
    ceilings: Ceilings | None
    bounds: dict[str, PhaseBound] | None
    mfu: Amount | None
    """Model FLOP utilisation: FLOP per second over the device's published peak."""
    memory_bytes: Memory
    energy_j: Amount | None
    energy: Energy | None
    reliable: bool
    warnings: list[str]
    unavailable: dict[str, str]
    """Why a field is None."""
    timing: Facts
    """Which timing rules applied: clock, warm-up steps, rounds, why measuring stopped; and where
    the measurement's own time went (``stages_s``)."""
    hardware: Facts
    """State of the device before, during and after."""
    settings: Facts
    """The study's fields and method settings that the key is computed from."""
    versions: dict[str, str]

    def flop_per_iteration(self) -> float | None:
        """Return the matrix FLOP of one step on all its devices; None if not all are counted, see
        :meth:`why_no_flop`."""
        total = None if self.flop is None else self.flop.total
        return None if total is None else total * self.gpus

    def why_no_flop(self) -> str:
        """Return why the step has no total of FLOP."""
        return self.unavailable.get("flop.total") or self.unavailable.get("flop", "not measured")

    def seconds_per_iteration(self) -> Interval:
        """Return the seconds of one iteration of a run: end-to-end if that was measured, else of
        the step alone."""
        found = self.end_to_end_s or self.latency_s
        assert found is not None, "a stored Cost has a latency"
        return found

    def reference_rounds(self, *, end_to_end: bool) -> list[list[float]]:
        """Return the seconds of the reference that this method was interleaved with, by round: of
        end-to-end iterations, or of steps alone."""
        if end_to_end:
            return [[seconds] for seconds in self.reference_end_to_end_samples_s]
        return self.reference_samples_s

    def ratio_per_iteration(self) -> Ratio:
        """Return :meth:`seconds_per_iteration` divided by that of the interleaved reference."""
        found = self.end_to_end_ratio or self.ratio
        assert found is not None, "a stored Cost has a ratio"
        return found

    @model_validator(mode="before")
    @classmethod
    def _from_older_schemas(cls, values: Any) -> Any:
        """Read a record of schema 4, whose total of FLOP missed operators without a word, or 3,
        which also had a count by module that was always null."""
        if isinstance(values, dict) and values.get("schema") == 3:
            values = {key: v for key, v in values.items() if key != "modules_flop"} | {"schema": 4}
            reasons = values.get("unavailable") or {}
            values["unavailable"] = {k: v for k, v in reasons.items() if k != "modules_flop"}
        if isinstance(values, dict) and values.get("schema") == 4:
            values = _with_marked_flop(values)
        return values


def _with_marked_flop(values: dict[str, Any]) -> dict[str, Any]:
    """Return a Cost of schema 4 as one of schema 5. Its total of FLOP stands if all its operators
    were counted as they are now."""
    values = values | {"schema": 5}
    flop, operations = values.get("flop"), values.get("operations") or []
    if not isinstance(flop, dict) or not isinstance(operations, list):
        return values
    values["flop"] = flop | {"counted": flop.get("total")}
    names = [o.get("name", "") for o in operations if isinstance(o, dict) and _is_miscounted(o)]
    if names:
        values["flop"] |= dict.fromkeys((*PARTS_OF_FLOP, "total"))
        values["hidden_cost"] = values["mfu"] = None
        reason = f"an older kdprof did not count {', '.join(dict.fromkeys(names))}; measure again"
        missing = dict.fromkeys(("flop.total", "hidden_cost", "mfu"), reason)
        values["unavailable"] = (values.get("unavailable") or {}) | missing
    return values


def _is_miscounted(operation: dict[str, Any]) -> bool:
    name = str(operation.get("name"))
    return operation.get("kind") == "uncounted" or "attention" in name


class CountedCost(Cost):
    """The counted cost of a step that did not run, without latency, memory and energy."""

    modules_flop: dict[str, dict[str, float]] | None
    """Forward matrix FLOP of ``student`` and ``teacher`` by module, as fvcore counts them."""


class Spent(Record):
    """Seconds of training: planned by the conversion, and the sum of the ledger."""

    planned: Amount | None
    actual: Amount

    def drift(self) -> float | None:
        """Return (actual - planned) / planned, or None if nothing was planned."""
        return None if not self.planned else self.actual / self.planned - 1


class Failure(Record):
    """Why a run ended before its budget was used up."""

    iteration: Count
    """Iteration, from 0, of the step that failed, or of the last step that was begun."""
    term: str | None
    """The loss term that is not finite, if that is the reason."""
    reason: str
    checkpoint_iteration: Count | None
    """Iterations of the last good checkpoint; None if none exists."""


AbsentClasses = Literal["skip", "zero"]
"""skip: a class in no validation label has no IoU; zero: it has an IoU of 0 if it is predicted
anywhere, and none otherwise."""
RunKind = Literal["run", "teacher", "trunk"]
"""run: the training of one (method, budget, seed); teacher: the training of the teacher; trunk: the
part of training that a method's wsd runs share."""


def run_label(kind: RunKind, method: str, budget: str, seed: int) -> str:
    """Return the name of a run in messages and reports, such as ``cwd 40k@cwd seed 0``."""
    if kind == "teacher":
        return "teacher"
    return f"{method} {'trunk' if kind == 'trunk' else budget} seed {seed}"


class Run(Record):
    """One training."""

    schema_version: Literal[5] = Field(default=5, alias="schema")
    kind: RunKind = "run"
    method: MethodName
    """The method of a run or trunk; for the teacher, the method that it is trained with."""
    budget: str
    """Empty for a teacher or a trunk."""
    seed: Count
    device: Name
    iterations: Count
    """Planned iterations of this run."""
    schedule_iterations: Count
    """Iterations that the learning-rate schedule spans."""
    enforce: str = "iterations"
    """What ends the run: its iterations, or its planned time, energy or flop."""
    startup: str = "apart"
    """``counted`` if the start-up of its processes is part of ``train_s``, else ``apart``."""
    gpus: Annotated[int, Field(ge=1)] = 1
    """Devices that trained it together: its GPU-seconds are ``train_s`` times this number."""
    concurrent_runs: Count | None = 0
    """The largest number of other runs that were trained on the same machine at the same time. They
    share its memory bandwidth, so that planned seconds do not hold. None = not known (a cluster's
    node)."""
    iterations_done: Count
    absent_classes: AbsentClasses = "skip"
    """How classes that are in no validation label count."""
    miou: Share | None
    """mIoU after the last iteration, the mean over the classes of ``miou_per_class`` that have a
    value; a fraction."""
    miou_per_class: dict[str, Share | None] | None
    miou_of: dict[str, Share | None] = {}
    """mIoU over groups of classes: old and new in a class-incremental scenario, else empty."""
    best_miou: Share | None
    """Best mIoU of all evaluations; it is biased upwards, so it is reported but never compared."""
    train_s: Spent
    """Excludes evaluation, checkpoint writing, logging and lost work; includes ``trunk_s``."""
    trunk_s: Amount = 0.0
    """The part of ``train_s`` that was spent once for several budgets (wsd)."""
    startup_s: Amount = 0.0
    """Time of the first steps beyond the planned time, if it is not part of ``train_s``."""
    eval_s: Amount
    checkpoint_s: Amount
    logging_s: Amount = 0.0
    lost_s: Amount = 0.0
    """Recorded seconds of work that a crash lost and that was done again."""
    paused_s: Amount = 0.0
    """Seconds in which its process was stopped or the machine suspended; part of no other time. Its
    energy contains what the device drew meanwhile."""
    data_wait_s: Amount | None = None
    """The part of ``train_s`` in which the step waited for its batch."""
    flop: Amount | None
    """FLOP of training on all its devices."""
    energy_j: Amount | None
    """Energy of the training alone, from the devices' counters."""
    cost_key: str | None
    """The Cost the budget was converted with; None for the teacher."""
    identity: dict[str, str] | None = None
    """What its weights and scores depend on, by name; None in records of schema 4 and older."""
    finished: bool
    failure: Failure | None = None
    unavailable: dict[str, str] = {}
    versions: dict[str, str]

    def state(self) -> str:
        """Return finished, failed or begun."""
        if self.finished:
            return "finished"
        return "failed" if self.failure else "begun"

    def classes_scored(self) -> tuple[int, int] | None:
        """Return how many classes the mIoU is the mean over, and of how many; None before it was
        scored."""
        if not self.miou_per_class:
            return None
        scored = sum(iou is not None for iou in self.miou_per_class.values())
        return scored, len(self.miou_per_class)

    def label(self) -> str:
        """Return its name in messages and reports."""
        return run_label(self.kind, self.method, self.budget, self.seed)

    @model_validator(mode="after")
    def _shares_its_trunk(self) -> Self:
        if self.trunk_s > self.train_s.actual * (1 + ROUNDING):
            raise ValueError("trunk_s must be a part of train_s")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_older_schemas(cls, values: Any) -> Any:
        """Read a record of schema 4, without ``identity``, of 3, without ``absent_classes``, or of
        2, in which ``teacher`` was a method and ``trunk`` a budget."""
        if not isinstance(values, dict) or values.get("schema") not in (2, 3, 4):
            return values
        values = dict(values, schema=5)
        if "beside" in values:
            values["concurrent_runs"] = values.pop("beside")
        if values.get("method") == "teacher" and values.get("cost_key") is None:
            values |= {"kind": "teacher", "method": REFERENCE, "budget": ""}
        elif values.get("budget") == "trunk":
            values |= {"kind": "trunk", "budget": ""}
        return values


class CurvePoint(Record):
    """One evaluation during a run (a line of curve.jsonl)."""

    iteration: Count
    train_s: Amount
    miou: Share
    losses: dict[str, float]
    """Unweighted terms of the last step before the evaluation."""
    learning_rate: Amount


class LogLine(Record):
    """The state of a run, written every few iterations (a line of log.jsonl)."""

    iteration: Count
    """Iterations done."""
    train_s: Amount
    losses: dict[str, float]
    """Unweighted terms of the last step."""
    learning_rate: Amount


class LedgerEntry(Record):
    """Compute spent between two moments of a run (a line of ledger.jsonl)."""

    kind: Literal["train", "trunk", "startup", "eval", "checkpoint", "logging", "lost", "paused"]
    iteration: Count
    """Iterations done when the entry was written."""
    seconds: Amount
    energy_j: Amount | None = None
    """Energy of training or start-up, if the device has a counter."""


class Effect(Record):
    """What a claim is about, as measured."""

    unit: Literal["points", "factor"]
    """Percentage points of mIoU, or a compute-equivalent gain."""
    value: float | None
    bound: str = ""
    """``>`` or ``<`` if a gain lies outside the measured budgets, see ``value``."""
    low: float | None
    """End of the interval at the claim's confidence; None if it is open or unknown."""
    high: float | None
    probability: Share | None
    """P(difference > 0), or P(gain > 1)."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.value, self.high)
        return self


Outcome = Literal["supported", "contradicted", "undecided"]


class ClaimRecord(Record):
    """A claim with all that is needed to check it (a file of ``claims/``)."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    statement: str
    confidence: Share
    outcome: Outcome
    reason: str
    """Why this outcome, in one sentence."""
    effect: Effect
    seeds: dict[Name, Count]
    """Finished seeds of each of the two methods that the claim is based on."""
    cost_ratio: Interval | None
    """Seconds per iteration of the first method divided by those of the second."""
    devices: list[str]
    versions: dict[str, str]
    study: Facts
    """Content of study.toml."""
    not_counted: list[str]
    notes: list[str]
    unavailable: dict[str, str] = {}
    files: dict[str, str]
    """SHA-256 of every record that the claim was computed from, by path in the folder."""


class Look(Record):
    """What a sequential comparison showed after some seeds."""

    seeds: Count
    value: float
    """Mean difference within seeds, percentage points: of the two methods under the budget, or of
    their curves after moving one by the claimed gain."""
    low: float | None
    """End of the anytime-valid interval; None if it is infinite."""
    high: float | None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.low, self.value, self.high)
        return self


class Decision(Record):
    """A claim for which seeds were trained until it was decided (a file of ``decisions/``)."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    statement: str
    confidence: Share
    max_seeds: Count
    outcome: Outcome
    """``undecided`` also while seeds are still added."""
    reason: str = ""
    """Why it could not be decided, if not for too few seeds."""
    looks: list[Look]
    """After 2, 3, ... seeds, up to the decision."""
    saved_runs: Count
    """Runs that ``max_seeds`` seeds would have needed beyond those that were trained."""
    saved_s: Amount
    """Seconds of training of these runs, at the mean of the trained ones."""

    @property
    def seeds(self) -> int:
        """Seeds at which it was decided, or at which the limit was reached."""
        return self.looks[-1].seeds if self.looks else 0


class AtlasCost(Record):
    """What a step of one method costs in a setting of an atlas: a Cost without its samples."""

    method: MethodName
    latency_s: Interval | None
    ratio: Ratio | None
    iterations: Interval | None
    """Iterations that take as long as :data:`ATLAS_ITERATIONS` of :data:`ATLAS_METHOD`."""
    phases_s: dict[Name, Amount] | None
    flop: Flop | None
    bytes_moved: Amount | None
    operators: Count | None
    """Operators of a step, each call counted."""
    peak_allocated_bytes: Count | None
    process_bytes: Count | None
    energy_j: Amount | None
    reliable: bool
    warnings: list[str]
    unavailable: dict[str, str]
    """Why a field is None."""


class AtlasSetting(Record):
    """The Costs of many methods at one published setting and precision."""

    name: Name
    """The preset, or the preset and what differs from it."""
    precision: Name
    student: Name
    teacher: Name
    data: Name
    classes: Count
    batch: Count
    crop: tuple[Count, Count]
    """Height x width, pixels."""
    placeholder_images: bool
    """True if images of the right size stood for the data set's files."""
    costs: list[AtlasCost]
    not_measured: dict[MethodName, str]
    """Methods without a Cost, with the reason."""


ATLAS_METHOD, ATLAS_ITERATIONS = "cwd", 40_000
"""An atlas says how many iterations of each method take as long as so many of this method."""


class Atlas(Record):
    """What an iteration of each method costs on one device (a file atlas.json)."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["measured", "counted"]
    """counted: on fake tensors, for a GPU; nothing ran, and there are no seconds."""
    device: Name | None
    """None if the steps were counted."""
    versions: dict[str, str]
    settings: list[AtlasSetting]


class FirstReading(Record):
    """Seconds of steps as a plain script read them, without intervals or checks."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    device: Name
    note: str
    """What was run, and what it lacks."""
    setting: Name
    precision: Name
    step_s: dict[MethodName, Positive]
