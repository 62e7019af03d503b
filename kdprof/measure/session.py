"""One measuring session: everything about one step, in one process, in turn with the reference.

First the step alone, so that memory, energy and the operators' times are its own; then the
reference is built beside it and both take turns.
"""

from __future__ import annotations

import gc
import os
import statistics
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdprof.hardware import Hardware
from kdprof.measure.canary import Canary as CanaryKernel
from kdprof.measure.ceilings import higher, measure_ceilings, phase_bound, published_peak
from kdprof.measure.clock import clock_of
from kdprof.measure.energy import measure_energy
from kdprof.measure.latency import COLLECTED, Report, Samples, Session, time_in_turn
from kdprof.measure.memory import MemoryReading, read_memory
from kdprof.measure.subject import StudySubject, Subject, ignore_phase
from kdprof.measure.trace import StepTrace, Synchronisation
from kdprof.records import (
    Canary,
    Ceilings,
    Energy,
    Flop,
    Interval,
    Operation,
    PhaseBound,
    Ratio,
    TermCost,
)
from kdprof.stats import drift_of, median_interval, paired_ratio, relative_width
from kdprof.step import PHASES
from kdprof.store import replace_durably, slug
from kdprof.study import MeasureSettings

TRACED_STEPS = 3
HEAD_START_CYCLES = 2_000_000_000
"""About a second of a GPU."""
PARTS = {
    "teacher": ("teacher_forward",),
    "student": ("student_forward",),
    "objective": ("objective",),
    "backward": ("task_loss", "objective_backward", "student_backward"),
    "auxiliary": ("auxiliary",),
}
"""Parts of a step's FLOP and the phases that do them."""
LOADER_BOUND = 0.02
"""An iteration this much longer than its step is bound by the loader."""


COMPILED = (
    "the step is compiled: its operators are those of the step that is not, and share out the "
    "compiled phases' seconds like those of the other"
)


@dataclass(frozen=True)
class Files:
    """What else a session writes, where it was asked for."""

    trace: Path | None = None
    """A Chrome trace of two steps."""
    memory_timeline: Path | None = None
    """The CUDA allocator's history of two steps, for torch's viewer."""

    def to_json(self) -> dict[str, str]:
        """Return the files that were asked for."""
        return {key: str(path) for key, path in vars(self).items() if path is not None}

    @classmethod
    def from_json(cls, files: Mapping[str, str]) -> Files:
        """Return what :meth:`to_json` was made of."""
        return cls(**{key: Path(path) for key, path in files.items()})

    def of(self, name: str) -> Files:
        """Return the files of one of several steps: its name is put in."""
        return Files(
            *(path and path.with_stem(f"{path.stem}.{slug(name)}") for path in vars(self).values())
        )


@dataclass(frozen=True)
class Traced:
    """The operators of a step, timed one by one."""

    operations: list[Operation]
    terms: dict[str, TermCost]
    """Their seconds are shares of the operators' in their phase."""
    synchronisations: list[Synchronisation]
    notes: list[str]
    """What could not be told apart."""


@dataclass(frozen=True)
class Alone:
    """What was read of a step with nothing else resident."""

    memory: MemoryReading
    traced: Traced
    energy_j: float | None
    energy: Energy | None
    no_energy: str | None


@dataclass(frozen=True)
class Surroundings:
    """What a session is told about the rest of the measurement."""

    reference: str
    precision: str | None
    """Which ceilings the step is compared with: those of fp32 where nobody said."""

    def peak_of(self, device: str) -> float | None:
        """Return the device's published FLOP per second; None where nobody knows."""
        return None if self.precision is None else published_peak(device, self.precision)

    def no_peak(self, device: str) -> str:
        """Return why there is none."""
        if self.precision is None:
            return "the step's precision was not given"
        return f"no published {self.precision} peak is known for {device}"


def run_session(
    subject: Subject,
    build_reference: Callable[[], Subject] | None,
    *,
    device: torch.device,
    hardware: Hardware,
    settings: MeasureSettings,
    around: Surroundings,
    files: Files,
    report: Report,
) -> dict[str, Any]:
    """Measure one step and return the fields of its Cost that come from running it.

    Args:
        build_reference: makes the reference's step; None for the reference itself.

    Raises:
        BadStep: a loss is not finite.
    """
    before = hardware.state()
    ceilings = measure_ceilings(device, around.precision or "fp32")
    alone = _read_alone(subject, device, hardware)
    subjects = [subject] if build_reference is None else [subject, build_reference()]
    reference_flop = total_flop(_trace(subjects[-1], device, 1).operations)
    clock = clock_of(device)
    canary = CanaryKernel(device, clock)
    gc.collect()  # what the passes above left
    session = time_in_turn(
        subjects, settings, clock=clock, canary=canary, hardware=hardware, report=report
    )
    after = hardware.state()
    ceilings = higher(ceilings, measure_ceilings(device, around.precision or "fp32"))
    own, reference = session.samples[0], session.samples[-1]
    during = [r for s in session.samples for b in s.blocks for r in (b.before, b.after)]
    _write_files(subject, files)
    problems = hardware.problems(before, during, after)
    timed = _timed_fields(own, reference, around.reference)
    canary_record = _canary(session, settings)
    problems += _distrust(own, reference, alone.memory, canary_record)
    counted = _counted_fields(
        alone.traced, timed, reference_flop, ceilings, around.peak_of(hardware.name)
    )
    warnings = [*problems, *_loader_warnings(timed), *_trace_warnings(counted, alone.traced)]
    return {
        **timed,
        **counted,
        "session": uuid.uuid4().hex[:12],
        "device": hardware.name,
        "outliers": own.outliers(hardware),
        "canary": canary_record,
        "memory_bytes": alone.memory.memory,
        "energy_j": alone.energy_j,
        "energy": alone.energy,
        "reliable": not problems,
        "warnings": warnings,
        "unavailable": _unavailable(alone, timed, counted, hardware.name, around),
        "timing": _timing(session, own, settings, timed, clock.name),
        "hardware": {"name": hardware.name, "before": before, "after": after, **_seen(during)},
    }


def _read_alone(subject: Subject, device: torch.device, hardware: Hardware) -> Alone:
    memory = read_memory(subject, device, hardware)
    traced = _trace(subject, device, TRACED_STEPS)
    clock = clock_of(device)

    def run_steps(count: int) -> None:
        for _ in range(count):
            subject.run(ignore_phase)

    joules, how, reason = measure_energy(run_steps, hardware.energy_meter(), clock.synchronize)
    return Alone(memory, traced, joules, how, reason)


def _trace(subject: Subject, device: torch.device, steps: int) -> Traced:
    """Time the operators of a few steps one by one; the median of each counts.

    Watching every operator slows the step, so these seconds only share out those of the phases.
    """
    step = subject.step if isinstance(subject, StudySubject) else None
    traces = []
    for _ in range(steps):
        if device.type == "cuda":
            # The watched host is slower than the device: it gets a head start, or every operator
            # would be timed with the gap before it.
            torch.cuda._sleep(HEAD_START_CYCLES)
        with StepTrace(step, timed=True, device=device) as trace:
            subject.run(trace.mark)
        traces.append(trace)
    weights = step.method.weights if step is not None else {}
    operations = [
        same[0].model_copy(update={"seconds": statistics.median(o.seconds for o in same)})
        for same in _grouped(trace.operations() for trace in traces)
    ]
    last = traces[-1]
    notes = [] if last.note is None else [last.note]
    if step is not None and step.settings.compile != "none":
        notes.append(COMPILED)
    return Traced(operations, _shares_of_terms(traces, weights), last.synchronisations(), notes)


def _shares_of_terms(traces: list[StepTrace], weights: Mapping[str, float]) -> dict[str, TermCost]:
    """Return the terms with the median of their shares of the operators' seconds."""
    shares: dict[str, list[tuple[float, float]]] = {}
    for trace in traces:
        watched = _watched_s(trace.operations())
        forward, backward = (watched.get(p) or 1.0 for p in ("objective", "objective_backward"))
        for name, term in trace.terms(weights).items():
            own = (term.forward_s / forward, term.backward_s / backward)
            shares.setdefault(name, []).append(own)
    return {
        name: term.model_copy(
            update={
                key: statistics.median(pair[place] for pair in shares[name])
                for place, key in enumerate(("forward_s", "backward_s"))
            }
        )
        for name, term in traces[-1].terms(weights).items()
    }


def _grouped(traces: Iterable[list[Operation]]) -> list[list[Operation]]:
    """Return the operations of several traces, each with its like in the others."""
    found: dict[tuple[str, str, str], list[Operation]] = {}
    for operations in traces:
        for operation in operations:
            like = (operation.phase, operation.name, operation.kind)
            found.setdefault(like, []).append(operation)
    return list(found.values())


def _write_files(subject: Subject, files: Files) -> None:
    """Write what was asked for, after the timing: profilers slow down what runs after them."""
    for path, write in ((files.trace, _write_trace), (files.memory_timeline, _write_timeline)):
        if path is not None:
            unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                write(subject, unfinished)
                replace_durably(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)


def _write_trace(subject: Subject, path: Path) -> None:
    """Write a Chrome trace of two steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            subject.run(ignore_phase)
    profiler.export_chrome_trace(str(path))


def _write_timeline(subject: Subject, path: Path) -> None:
    """Write the CUDA allocator's history over two steps, for torch's memory viewer."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        for _ in range(2):
            subject.run(ignore_phase)
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _timed_fields(own: Samples, reference: Samples, to: str) -> dict[str, Any]:
    latency = _interval(own.rounds)
    fed = [[seconds] for seconds in own.fed_s]
    beside = [[seconds] for seconds in reference.fed_s]
    return {
        "latency_s": latency,
        "ratio": _ratio(own.rounds, reference.rounds, to),
        "end_to_end_s": _interval(fed) if fed else None,
        "end_to_end_ratio": _ratio(fed, beside, to) if fed else None,
        "samples_s": own.rounds,
        "reference_samples_s": reference.rounds,
        "end_to_end_samples_s": own.fed_s,
        "reference_end_to_end_samples_s": reference.fed_s,
        "phases_s": own.phases_of(latency.median) if own.blocks[0].phases_s[0] else None,
    }


def _interval(rounds: list[list[float]]) -> Interval:
    median, low, high = median_interval(rounds)
    return Interval(median=median, low=low, high=high)


def _ratio(rounds: list[list[float]], reference: list[list[float]], to: str) -> Ratio:
    median, low, high = paired_ratio(rounds, reference)
    return Ratio(median=median, low=low, high=high, to=to)


def _canary(session: Session, settings: MeasureSettings) -> Canary:
    drift, steady = drift_of(session.canary_s, settings.precision_target)
    return Canary(
        median_s=statistics.median(session.canary_s),
        drift=drift,
        steady=steady,
        samples_s=session.canary_s,
    )


def _distrust(own: Samples, reference: Samples, memory: MemoryReading, canary: Canary) -> list[str]:
    """Return what this session itself saw that makes its numbers doubtful."""
    found = []
    if own.settled is not None:
        found.append(f"never settled before it was timed: {own.settled}")
    if reference is not own and reference.settled is not None:
        found.append(f"the reference beside it never settled: {reference.settled}")
    if not canary.steady:
        found.append(
            f"the machine itself drifted by {canary.drift:.1%} while measuring (a fixed kernel did)"
        )
    if memory.leaked_bytes:
        found.append(f"leaks {memory.leaked_bytes / 2**20:.2g} MiB with every step")
    return found


def _counted_fields(
    traced: Traced,
    timed: Mapping[str, Any],
    reference_flop: float,
    ceilings: Ceilings,
    peak: float | None,
) -> dict[str, Any]:
    latency, phases = timed["latency_s"].median, timed["phases_s"]
    seconds = phases if phases is not None else {"step": latency}
    operations = _scaled(traced.operations, seconds)
    flop = flop_of(operations)
    return {
        "operations": operations,
        "terms": _scaled_terms(traced, seconds) if phases is not None else None,
        "flop": flop,
        "modules_flop": None,
        "bytes_moved": sum(o.bytes_read + o.bytes_written for o in operations),
        "hidden_cost": hidden_cost(flop.total, reference_flop, timed["ratio"].median),
        "ceilings": ceilings,
        "bounds": _bounds(operations, seconds, ceilings),
        "mfu": _utilisation(flop.total, latency, peak),
    }


def _scaled(operations: list[Operation], seconds: Mapping[str, float]) -> list[Operation]:
    """Share out each phase's seconds over its operators, in proportion to their own."""
    watched = _watched_s(operations)
    return [
        o.model_copy(update={"seconds": o.seconds * seconds[o.phase] / watched[o.phase]})
        for o in operations
        if watched[o.phase] and o.phase in seconds
    ]


def _watched_s(operations: Iterable[Operation]) -> dict[str, float]:
    found: dict[str, float] = {}
    for operation in operations:
        found[operation.phase] = found.get(operation.phase, 0.0) + operation.seconds
    return found


def _scaled_terms(traced: Traced, phases: Mapping[str, float]) -> dict[str, TermCost]:
    forward, backward = (phases[name] for name in ("objective", "objective_backward"))
    return {
        name: term.model_copy(
            update={
                "forward_s": term.forward_s * forward,
                "backward_s": term.backward_s * backward,
            }
        )
        for name, term in traced.terms.items()
    }


def total_flop(operations: Iterable[Operation]) -> float:
    """Return the matrix FLOP of a step's operators."""
    return sum(operation.matrix_flop for operation in operations)


def flop_of(operations: Sequence[Operation]) -> Flop:
    """Return the matrix FLOP of a step's operators, by part where they tell the parts."""
    total = total_flop(operations)
    parts = {
        part: total_flop(o for o in operations if o.phase in phases)
        for part, phases in PARTS.items()
    }
    known = all(operation.phase in PHASES for operation in operations)
    return Flop(**(parts if known else dict.fromkeys(parts)), total=total)


def hidden_cost(flop: float, reference_flop: float, ratio: float) -> float | None:
    """Return the share of a step's time that its matrix FLOP do not explain.

    Explained is what they would take at the reference's seconds per FLOP: a step of r times the
    reference's time and f times its FLOP has 1 - f / r hidden. Matching FLOP instead of time would
    give it 1 / (1 - index) times the time of the reference.
    """
    if reference_flop == 0:
        return None
    return 1 - flop / reference_flop / ratio


def _bounds(
    operations: list[Operation], seconds: Mapping[str, float], ceilings: Ceilings
) -> dict[str, PhaseBound]:
    found = {}
    for phase, spent in seconds.items():
        own = [o for o in operations if o.phase == phase]
        if own and spent > 0:
            flop = sum(o.matrix_flop for o in own)
            moved = sum(o.bytes_read + o.bytes_written for o in own)
            found[phase] = phase_bound(flop, moved, spent, ceilings)
    return found


def _utilisation(flop: float, latency_s: float, peak: float | None) -> float | None:
    return None if peak is None else flop / latency_s / peak


def _loader_warnings(timed: Mapping[str, Any]) -> list[str]:
    step, fed = timed["latency_s"], timed["end_to_end_s"]
    if fed is None:
        return []
    excess = fed.median / step.median - 1
    if excess <= LOADER_BOUND or fed.low <= step.median:
        return []
    return [
        f"LOADER-BOUND: an iteration with the loader takes {excess:.0%} longer than its step; "
        "part of the comparison is about loading data ('kdprof doctor --study' says what to set)"
    ]


def _trace_warnings(counted: Mapping[str, Any], traced: Traced) -> list[str]:
    found = [
        f"paid but weight 0: term '{name}' takes "
        f"{1e3 * (term.forward_s + term.backward_s):.3g} ms of every step"
        for name, term in (counted["terms"] or {}).items()
        if term.weight == 0
    ]
    found += [
        f"synchronises the device: {s.operator} in {s.phase} at {s.where}, {s.calls} x per step"
        for s in traced.synchronisations
    ]
    return found + traced.notes


def _unavailable(
    alone: Alone,
    timed: Mapping[str, Any],
    counted: Mapping[str, Any],
    device: str,
    around: Surroundings,
) -> dict[str, str]:
    found = dict(alone.memory.unavailable)
    found["modules_flop"] = "not asked for (--modules)"
    if alone.energy_j is None:
        found["energy_j"] = alone.no_energy or "not measured"
    if counted["mfu"] is None:
        found["mfu"] = around.no_peak(device)
    if timed["phases_s"] is None:
        reason = "a callable step is one phase"
        found |= dict.fromkeys(("phases_s", "terms"), reason)
        found |= dict.fromkeys(("end_to_end_s", "end_to_end_ratio"), "the step loads its own data")
    if counted["hidden_cost"] is None:
        found["hidden_cost"] = "the reference does no matrix FLOP"
    return found


def _timing(
    session: Session, own: Samples, settings: MeasureSettings, timed: Mapping[str, Any], clock: str
) -> dict[str, Any]:
    ratio = timed["ratio"]
    return {
        "clock": clock,
        "rounds": session.rounds,
        "steps_per_round": settings.steps,
        "warmup_steps": own.warmup_steps,
        "stopped": session.stopped,
        "precision_target": settings.precision_target,
        "ratio_width": relative_width((ratio.median, ratio.low, ratio.high)),
        "interval": "95 %, block bootstrap over rounds, Student's t",
        "garbage_collector": COLLECTED,
        "loader_wait_s": statistics.median(own.waited_s) if own.waited_s else None,
        "isolated": not settings.in_process,
    }


def _seen(during: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the range of every number read while the steps ran, and how often which reason held
    the clock down."""
    numbers: dict[str, list[float]] = {}
    reasons = Counter(r for reading in during for r in reading.get("throttle_reasons") or ())
    for reading in during:
        for name, value in reading.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(name, []).append(value)
    spans = {name: [min(values), max(values)] for name, values in numbers.items()}
    return {"during": spans, "throttle_reasons_during": dict(reasons), "readings": len(during)}
