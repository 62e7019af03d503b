"""The operators of a real step, traced, and timed one by one over a few steps if requested."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from kdprof.measure.subject import Subject
from kdprof.measure.trace import StepTrace, Synchronisation
from kdprof.records import Operation, TermCost
from kdprof.step import TrainStep

HEAD_START_CYCLES = 2_000_000_000
"""About one second on a GPU."""
TIMED_STEPS = 3
COMPILED = (
    "the step is compiled: its operators, and their shares of a phase's seconds, are those of the "
    "step before compilation"
)


@dataclass(frozen=True)
class StepOperators:
    """The operators of a step."""

    operations: list[Operation]
    terms: dict[str, TermCost]
    """Their seconds are shares of the operators' in their phase."""
    synchronisations: list[Synchronisation]
    notes: list[str]
    """What limits the accuracy of these numbers."""
    timed: bool
    """False: operations and terms have no seconds."""


def traced_operators(subject: Subject, device: torch.device) -> StepOperators:
    """Trace the operators of one step, without their seconds."""
    with StepTrace(subject.traced, device=device) as trace:
        subject.run(trace.mark)
    terms = trace.terms(_weights(subject))
    return StepOperators(
        trace.operations(), terms, trace.synchronisations(), _notes(subject, trace), timed=False
    )


def timed_operators(subject: Subject, device: torch.device) -> StepOperators:
    """Time the operators of a few steps one by one; the median of each counts.

    Tracing every operator slows the step down, so these seconds are only used to divide the
    phases' seconds among the operators.
    """
    traces = []
    for _ in range(TIMED_STEPS):
        if device.type == "cuda":
            # The traced host is slower than the device. Without a head start, the time of every
            # operator would include the gap before it.
            torch.cuda._sleep(HEAD_START_CYCLES)
        with StepTrace(subject.traced, timed=True, device=device) as trace:
            subject.run(trace.mark)
        traces.append(trace)
    operations = [
        same[0].model_copy(update={"seconds": statistics.median(timed_s(o.seconds) for o in same)})
        for same in _grouped(trace.operations() for trace in traces)
    ]
    terms = _shares_of_terms(traces, _weights(subject))
    waits = traces[-1].synchronisations()
    return StepOperators(operations, terms, waits, _notes(subject, traces[-1]), timed=True)


def _weights(subject: Subject) -> Mapping[str, float]:
    return subject.traced.method.weights if subject.traced is not None else {}


def _notes(subject: Subject, trace: StepTrace) -> list[str]:
    return [*([] if trace.note is None else [trace.note]), *compiled_notes(subject.traced)]


def compiled_notes(step: TrainStep | None) -> list[str]:
    """Return what limits the accuracy of the operators of a compiled step."""
    return [COMPILED] if step is not None and step.settings.compile != "none" else []


def _shares_of_terms(traces: list[StepTrace], weights: Mapping[str, float]) -> dict[str, TermCost]:
    """Return the terms with the median of their shares of the operators' seconds."""
    shares: dict[str, list[tuple[float, float]]] = {}
    for trace in traces:
        watched = watched_seconds(trace.operations())
        forward, backward = (watched.get(p) or 1.0 for p in ("objective", "objective_backward"))
        for name, term in trace.terms(weights).items():
            own = (timed_s(term.forward_s) / forward, timed_s(term.backward_s) / backward)
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
    """Return the operations of several traces, grouped by phase, operator and kind."""
    found: dict[tuple[str, str, str], list[Operation]] = {}
    for operations in traces:
        for operation in operations:
            key = (operation.phase, operation.name, operation.kind)
            found.setdefault(key, []).append(operation)
    return list(found.values())


def timed_s(seconds: float | None) -> float:
    """Return the seconds of an operation or term from a trace that timed its operators."""
    assert seconds is not None, "the trace was timed"
    return seconds


def watched_seconds(operations: Iterable[Operation]) -> dict[str, float]:
    """Return the operators' own seconds, as a trace timed them, by phase."""
    found: dict[str, float] = {}
    for operation in operations:
        found[operation.phase] = found.get(operation.phase, 0.0) + timed_s(operation.seconds)
    return found
