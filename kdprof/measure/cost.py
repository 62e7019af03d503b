"""The only builder of Costs: from a session's readings of a step, or from its counts.

These are pure functions of readings: nothing here runs a step or queries a device.
"""

from __future__ import annotations

import statistics
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kdprof.hardware.device import versions
from kdprof.measure.ceilings import phase_bound, published_peak
from kdprof.measure.latency import COLLECTED
from kdprof.measure.operator_times import StepOperators, timed_s, watched_seconds
from kdprof.measure.session import Readings
from kdprof.records import (
    Canary,
    Ceilings,
    Cost,
    CountedCost,
    Flop,
    Interval,
    Memory,
    Operation,
    PhaseBound,
    Ratio,
    TermCost,
    complete_sum,
)
from kdprof.stats.intervals import drift_of, median_interval, paired_ratio
from kdprof.step import PHASES

PARTS = {
    "teacher": ("teacher_forward",),
    "student": ("student_forward",),
    "objective": ("objective",),
    "backward": ("task_loss", "objective_backward", "student_backward"),
    "auxiliary": ("auxiliary",),
}
"""Parts of a step's FLOP, and the phases that belong to each."""
LOADER_BOUND = 0.02
"""An end-to-end iteration that takes this share longer than its step is bound by the loader."""
COUNTED = "counted, not run (--count-only)"
CALLABLE = "a callable step is one phase"
NO_DETAIL = "not requested (--detail)"
OWN_DATA = "the step loads its own data"
NOTHING_LOADED = "placeholder images stand for the data set's files: nothing is loaded"


@dataclass(frozen=True)
class Identity:
    """What identifies a Cost.

    Attributes:
        method: the method's name, or that of a user's step.
        gpus: devices that run the step together.
        key: hash of everything that changes the cost.
        settings: the values that the key is made from.
    """

    method: str
    gpus: int
    key: str
    settings: dict[str, Any]


def measured_cost(
    identity: Identity,
    readings: Readings,
    reference: str,
    warnings: Sequence[str] = (),
    process: str | None = None,
) -> Cost:
    """Return the Cost of a step that was measured.

    Args:
        reference: name of the method or step that it was interleaved with.
        warnings: further warnings, which do not make the Cost unreliable.
        process: why the measuring process was started anew before this step; None if it was not.
    """
    bench, alone = readings.bench, readings.alone
    timed = _timed(readings, reference)
    canary = _canary(readings)
    doubts = [*readings.distrust, *_doubts(readings, canary)]
    counted = _counted(readings, timed)
    peak = _published_peak(readings)
    return Cost(
        method=identity.method,
        device=bench.hardware.name,
        gpus=identity.gpus,
        key=identity.key,
        session=uuid.uuid4().hex[:12],
        measured_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **timed,
        outliers=readings.outliers,
        canary=canary,
        **counted,
        ceilings=bench.ceilings,
        mfu=_utilisation(counted["flop"], timed["latency_s"].median, peak),
        memory_bytes=alone.memory.memory,
        energy_j=readings.energy.joules,
        energy=readings.energy.how,
        reliable=not doubts,
        warnings=[
            *doubts,
            *_loader_warnings(timed),
            *_trace_warnings(counted["terms"], alone.operators),
            *warnings,
            *_pause_warnings(readings.paused_s),
        ],
        unavailable=_unavailable(readings, timed, counted, peak),
        timing={**_timing(readings), "process_restarted_after": process},
        hardware={
            "name": bench.hardware.name,
            "before": alone.before,
            "after": readings.after,
            **_seen(readings.during),
        },
        settings=identity.settings,
        versions=versions(),
    )


def counted_cost(
    identity: Identity,
    operations: Sequence[Operation],
    terms: Mapping[str, TermCost],
    modules_flop: dict[str, dict[str, float]] | None,
) -> CountedCost:
    """Return the Cost of a step that was counted, not run; no budget can be converted with it."""
    run_only = (
        "measured_at", "latency_s", "ratio", "end_to_end_s", "end_to_end_ratio", "canary",
        "phases_s", "hidden_cost", "ceilings", "bounds", "mfu", "energy_j", "energy",
    )  # fmt: skip
    unavailable = dict.fromkeys((*run_only, "memory_bytes"), COUNTED)
    if modules_flop is None:
        unavailable["modules_flop"] = "not requested (--modules)"
    if (missed := uncounted_work(operations)) is not None:
        unavailable["flop.total"] = missed
    return CountedCost(
        method=identity.method,
        gpus=identity.gpus,
        device="none: counted, not run",
        key=identity.key,
        session="",
        **dict.fromkeys(run_only),
        samples_s=[],
        reference_samples_s=[],
        end_to_end_samples_s=[],
        reference_end_to_end_samples_s=[],
        outliers=[],
        terms=dict(terms),
        flop=flop_of(operations),
        modules_flop=modules_flop,
        operations=list(operations),
        bytes_moved=bytes_moved(operations),
        memory_bytes=Memory(**dict.fromkeys(Memory.model_fields)),
        reliable=True,
        warnings=[],
        unavailable=unavailable,
        timing={},
        hardware={},
        settings=identity.settings,
        versions=versions(),
    )


# What was timed


def _timed(readings: Readings, to: str) -> dict[str, Any]:
    own, reference = readings.timed.own, readings.timed.reference
    latency = _interval(own.rounds)
    ours = [[seconds] for seconds in own.end_to_end_s]
    theirs = [[seconds] for seconds in reference.end_to_end_s]
    return {
        "latency_s": latency,
        "ratio": _ratio(own.rounds, reference.rounds, to),
        "end_to_end_s": _interval(ours) if ours else None,
        "end_to_end_ratio": _ratio(ours, theirs, to) if ours else None,
        "samples_s": own.rounds,
        "reference_samples_s": reference.rounds,
        "end_to_end_samples_s": own.end_to_end_s,
        "reference_end_to_end_samples_s": reference.end_to_end_s,
        "phases_s": own.phases_of(latency.median) if own.blocks[0].phases_s[0] else None,
    }


def _interval(rounds: list[list[float]]) -> Interval:
    median, low, high = median_interval(rounds)
    return Interval(median=median, low=low, high=high)


def _ratio(rounds: list[list[float]], reference: list[list[float]], to: str) -> Ratio:
    median, low, high = paired_ratio(rounds, reference)
    return Ratio(median=median, low=low, high=high, to=to)


def _canary(readings: Readings) -> Canary:
    samples_s = readings.timed.canary_s
    drift, steady = drift_of(samples_s, readings.bench.settings.precision_target)
    return Canary(
        median_s=statistics.median(samples_s), drift=drift, steady=steady, samples_s=samples_s
    )


def _doubts(readings: Readings, canary: Canary) -> list[str]:
    """Return why the session's own readings make the Cost unreliable."""
    own, reference, found = readings.timed.own, readings.timed.reference, []
    if own.unsettled is not None:
        found.append(f"did not settle before it was timed: {own.unsettled}")
    if reference is not own and reference.unsettled is not None:
        found.append(f"the reference did not settle before it was timed: {reference.unsettled}")
    if not canary.steady:
        found.append(
            f"the machine's own speed drifted by {canary.drift:.1%} while measuring (seen in a "
            "fixed kernel)"
        )
    if leaked_bytes := readings.alone.memory.leaked_bytes:
        found.append(f"leaks {leaked_bytes / 2**20:.2g} MiB with every step")
    return found


# What was counted


def _counted(readings: Readings, timed: Mapping[str, Any]) -> dict[str, Any]:
    latency, phases = timed["latency_s"].median, timed["phases_s"]
    seconds = phases if phases is not None else {"step": latency}
    read = readings.alone.operators
    operations = _scaled(read.operations, seconds) if read.timed else read.operations
    terms = _scaled_terms(read, seconds) if phases is not None and read.timed else read.terms
    flop = flop_of(operations)
    return {
        "operations": operations,
        "terms": terms if phases is not None else None,
        "flop": flop,
        "bytes_moved": bytes_moved(operations),
        "hidden_cost": hidden_cost(
            flop.total, total_flop(readings.reference), timed["ratio"].median
        ),
        "bounds": _bounds(operations, seconds, readings.bench.ceilings),
    }


def _scaled(operations: list[Operation], seconds: Mapping[str, float]) -> list[Operation]:
    """Divide each phase's seconds among its operators, in proportion to their own seconds."""
    watched = watched_seconds(operations)
    return [
        o.model_copy(update={"seconds": timed_s(o.seconds) * seconds[o.phase] / watched[o.phase]})
        for o in operations
        if watched[o.phase] and o.phase in seconds
    ]


def _scaled_terms(traced: StepOperators, phases: Mapping[str, float]) -> dict[str, TermCost]:
    forward, backward = (phases[name] for name in ("objective", "objective_backward"))
    return {
        name: term.model_copy(
            update={
                "forward_s": timed_s(term.forward_s) * forward,
                "backward_s": timed_s(term.backward_s) * backward,
            }
        )
        for name, term in traced.terms.items()
    }


def total_flop(operations: Iterable[Operation]) -> float | None:
    """Return the matrix FLOP of a step's operators; None if any is not counted."""
    return complete_sum(operation.matrix_flop for operation in operations)


def uncounted_work(operations: Iterable[Operation]) -> str | None:
    """Return which operators have matrix work that is not counted, how often they are called and
    why there is no count; None if the total of FLOP is complete."""
    missed: dict[str, list[str]] = {}
    for one in operations:
        if one.matrix_flop is None:
            calls = f"{one.name} ({one.calls} x in {one.phase})"
            missed.setdefault(one.uncounted or "no formula", []).append(calls)
    listed = (f"{', '.join(calls)}, because {reason}" for reason, calls in missed.items())
    return f"not counted: {'; '.join(listed)}" if missed else None


def bytes_moved(operations: Iterable[Operation]) -> float:
    """Return the bytes that a step's operators read and write."""
    return sum(operation.bytes_read + operation.bytes_written for operation in operations)


def flop_of(operations: Sequence[Operation]) -> Flop:
    """Return the matrix FLOP of a step's operators, by part if every operator has a known phase."""
    parts = {
        part: total_flop(o for o in operations if o.phase in phases)
        for part, phases in PARTS.items()
    }
    known = all(operation.phase in PHASES for operation in operations)
    return Flop(
        **(parts if known else dict.fromkeys(parts)),
        total=total_flop(operations),
        counted=sum(operation.matrix_flop or 0.0 for operation in operations),
    )


def hidden_cost(flop: float | None, reference_flop: float | None, ratio: float) -> float | None:
    """Return the share of a step's time that its matrix FLOP do not explain; None if either total
    is incomplete, or the reference has none.

    The FLOP explain the time that they would take at the reference's seconds per FLOP: of a step
    with r times the reference's time and f times its FLOP, 1 - f / r is hidden. A budget that
    matches FLOP instead of time would give it 1 / (1 - index) times the time of the reference.
    """
    if flop is None or not reference_flop:
        return None
    return 1 - flop / reference_flop / ratio


def _utilisation(flop: Flop, latency_s: float, peak: float | None) -> float | None:
    return None if peak is None or flop.total is None else flop.total / latency_s / peak


def _bounds(
    operations: list[Operation], seconds: Mapping[str, float], ceilings: Ceilings
) -> dict[str, PhaseBound]:
    found = {}
    for phase, spent in seconds.items():
        own = [o for o in operations if o.phase == phase]
        flop = total_flop(own)
        products = total_flop(o for o in own if "convolution" not in o.name)
        if own and spent > 0 and flop is not None and products is not None:
            found[phase] = phase_bound(
                flop, bytes_moved(own), spent, ceilings, product_flop=products
            )
    return found


def _published_peak(readings: Readings) -> float | None:
    bench = readings.bench
    if bench.precision is None:
        return None
    return published_peak(bench.hardware.name, bench.precision)


# What a reader must know


def _loader_warnings(timed: Mapping[str, Any]) -> list[str]:
    step, whole = timed["latency_s"], timed["end_to_end_s"]
    if whole is None:
        return []
    excess = whole.median / step.median - 1
    if excess <= LOADER_BOUND or whole.low <= step.median:
        return []
    return [
        f"LOADER-BOUND: an end-to-end iteration takes {excess:.0%} longer than its step; part of "
        "the comparison is about loading data ('kdprof doctor --study' says what to set)"
    ]


def _trace_warnings(terms: Mapping[str, TermCost] | None, traced: StepOperators) -> list[str]:
    found = [
        f"computed although its weight is 0: term '{name}' {_takes(term)} in every step"
        for name, term in (terms or {}).items()
        if term.weight == 0
    ]
    found += [
        f"synchronises the device: {s.operator} in {s.phase} at {s.where}, {s.calls} x per step"
        for s in traced.synchronisations
    ]
    return found + traced.notes


def _pause_warnings(paused_s: float) -> list[str]:
    if not paused_s:
        return []
    return [
        f"the process was stopped for {paused_s:.1f} s while measuring; what it was timing then "
        "was timed again"
    ]


def _takes(term: TermCost) -> str:
    if term.forward_s is None or term.backward_s is None:
        flop = complete_sum((term.forward_flop, term.backward_flop))
        takes = "FLOP that are not counted" if flop is None else f"{flop / 1e9:.3g} GFLOP"
        return f"takes {takes} and moves {term.bytes_moved / 2**20:.3g} MiB"
    return f"takes {1e3 * (term.forward_s + term.backward_s):.3g} ms"


def _unavailable(
    readings: Readings, timed: Mapping[str, Any], counted: Mapping[str, Any], peak: float | None
) -> dict[str, str]:
    found = dict(readings.alone.memory.unavailable)
    if readings.energy.joules is None:
        found["energy_j"] = readings.energy.reason or "not measured"
    missed = uncounted_work(counted["operations"])
    if missed is not None:
        phases = {o.phase for o in counted["operations"] if o.matrix_flop is None}
        bounds = (f"bounds.{phase}" for phase in sorted(phases))
        found |= dict.fromkeys(("flop.total", "mfu", *bounds), missed)
    if peak is None:
        found["mfu"] = _no_peak(readings)
    if timed["phases_s"] is None:
        found |= dict.fromkeys(("phases_s", "terms"), CALLABLE)
    if timed["end_to_end_s"] is None:
        why = OWN_DATA if timed["phases_s"] is None else NOTHING_LOADED
        found |= dict.fromkeys(("end_to_end_s", "end_to_end_ratio"), why)
    if not readings.alone.operators.timed:
        found |= dict.fromkeys(("operations.seconds", "terms.forward_s"), NO_DETAIL)
        found["terms.backward_s"] = NO_DETAIL
    if counted["hidden_cost"] is None:
        of_reference = uncounted_work(readings.reference)
        found["hidden_cost"] = (
            missed
            or (of_reference and f"of the reference, {of_reference}")
            or "the reference does no matrix FLOP"
        )
    return found


def _no_peak(readings: Readings) -> str:
    bench = readings.bench
    if bench.precision is None:
        return "the step's precision was not given"
    return f"no published {bench.precision} peak is known for {bench.hardware.name}"


def _timing(readings: Readings) -> dict[str, Any]:
    settings, own = readings.bench.settings, readings.timed.own
    return {
        "clock": readings.bench.clock.name,
        "rounds": readings.timed.rounds,
        "steps_per_round": len(own.rounds[-1]),
        "end_to_end_blocks": len(own.end_to_end_s),
        "warmup_steps": own.warmup_steps,
        "stopped": readings.timed.stopped,
        "precision_target": settings.precision_target,
        "ratio_width": readings.width,
        "taken_s": readings.timed.taken_s,
        "most_s": readings.most_s,
        "total_time_s": settings.total_time_s,
        "interval": "95 %, block bootstrap over rounds, Student's t",
        "garbage_collector": COLLECTED,
        "loader_wait_s": statistics.median(own.waited_s) if own.waited_s else None,
        "isolated": settings.isolated,
        "stages_s": readings.stages_s,
        "paused_s": readings.paused_s,
    }


def _seen(during: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the range of every number read while the steps ran, and how often each reason
    throttled the clock."""
    numbers: dict[str, list[float]] = {}
    reasons = Counter(r for reading in during for r in reading.get("throttle_reasons") or ())
    for reading in during:
        for name, value in reading.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(name, []).append(value)
    spans = {name: [min(values), max(values)] for name, values in numbers.items()}
    return {"during": spans, "throttle_reasons_during": dict(reasons), "readings": len(during)}
