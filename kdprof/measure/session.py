"""One measuring session: all readings of one step, in one process, together with the reference.

The step first runs alone, so that memory, energy and operators are its own; then the reference is
built as well, and both are timed in interleaved rounds.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from kdprof.hardware import Hardware
from kdprof.hardware.base import State
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.ceilings import higher, measure_ceilings
from kdprof.measure.clock import Clock, clock_of
from kdprof.measure.end_to_end import LEAST_BLOCKS, Iterations, time_end_to_end
from kdprof.measure.energy import EnergyReading, energy_of_blocks, measure_energy
from kdprof.measure.latency import (
    BLOCK_S,
    WARMUP_WINDOW,
    Block,
    OnRound,
    Samples,
    Session,
    Stopwatch,
    time_interleaved,
    widest_interval,
)
from kdprof.measure.memory import MemoryReading, read_memory
from kdprof.measure.operator_times import StepOperators, timed_operators, traced_operators
from kdprof.measure.stages import Stages
from kdprof.measure.subject import Subject
from kdprof.pauses import paused_s, unpaused
from kdprof.records import Ceilings, Operation, Outlier
from kdprof.step import ignore_phase
from kdprof.study import MeasureSettings

Limit = Callable[[float], float | None]
"""Given about how long a step takes: the seconds from now on after which no further round starts;
None for the settings' own time."""

END_TO_END_SHARE = 0.5
"""Blocks of end-to-end iterations take at most this share of a step's measuring time."""


@dataclass
class Bench:
    """What all sessions of a process share.

    Attributes:
        precision: that of the steps; None if it is not known.
        ceilings: of fp32 if the precision is not known; the higher of two readings once a session
            has ended.
        energy_window: True to measure energy in a window of its own, not around timed blocks.
    """

    device: torch.device
    hardware: Hardware
    settings: MeasureSettings
    precision: str | None
    clock: Clock
    canary: CanaryKernel
    ceilings: Ceilings
    stages: Stages
    energy_window: bool
    has_looked_again: bool = False

    @classmethod
    def of(
        cls,
        device: torch.device,
        hardware: Hardware,
        settings: MeasureSettings,
        precision: str | None,
        stages: Stages,
        *,
        needs_energy: bool = False,
    ) -> Bench:
        """Return the bench of a device, after measuring its ceilings."""
        clock = clock_of(device)
        with stages.timed("ceilings"):
            ceilings = unpaused(lambda: measure_ceilings(device, precision or "fp32"))
        return cls(
            device=device,
            hardware=hardware,
            settings=settings,
            precision=precision,
            clock=clock,
            canary=CanaryKernel(device, clock),
            ceilings=ceilings,
            stages=stages,
            energy_window=settings.detail or needs_energy,
        )

    def look_again(self) -> None:
        """Measure the ceilings once more after the first session: the first reading may have been
        disturbed, or have met a GPU whose clock was still low. A device without the memory for it
        keeps that reading."""
        if self.has_looked_again:
            return
        self.has_looked_again = True
        with self.stages.timed("ceilings"), suppress(torch.OutOfMemoryError):
            precision = self.ceilings.precision
            found = unpaused(lambda: measure_ceilings(self.device, precision))
            self.ceilings = higher(self.ceilings, found)


@dataclass(frozen=True)
class Alone:
    """Readings of a step with nothing else resident than what it needs.

    Attributes:
        before: state of the hardware before it ran.
    """

    before: State
    memory: MemoryReading
    operators: StepOperators
    energy: EnergyReading | None
    """None: to be taken from the timed blocks."""

    @property
    def step_s(self) -> float:
        """About how long a step takes, by the last ones."""
        return statistics.median(self.memory.step_s[-WARMUP_WINDOW:])


@dataclass(frozen=True)
class Readings:
    """All readings of one step in a session.

    Attributes:
        reference: the operators of the reference's step, which may be this step.
        reference_step_s: about the latency of the reference's step.
        first_s: seconds of the very first steps of both, in which kernels are searched for and
            compiled; so long they take again when both are built anew.
        after: state of the hardware after the timed blocks.
        most_s: how long the rounds could take because of other methods or of a short training;
            None: only the settings limited them.
        during: states around and between the timed blocks.
        distrust: why the hardware's state makes the Cost unreliable.
        stages_s: where the time of this measurement went.
        paused_s: how long the process was stopped meanwhile; what it was timing was timed again.
    """

    bench: Bench
    alone: Alone
    reference: list[Operation]
    reference_step_s: float
    first_s: float
    timed: Session
    energy: EnergyReading
    outliers: list[Outlier]
    during: list[State]
    after: State
    most_s: float | None
    distrust: list[str]
    stages_s: dict[str, float]
    paused_s: float

    @property
    def width(self) -> float:
        """The relative width of the interval of the ratio that budgets are converted with: of
        end-to-end iterations if there are any, else of steps."""
        samples = self.timed.samples
        iterations = [[[seconds] for seconds in one.end_to_end_s] for one in samples]
        return widest_interval(iterations if iterations[0] else [one.rounds for one in samples])

    @property
    def least_visit_s(self) -> float:
        """About the least time in which rounds can be added once both have taken their first
        steps: a warm-up and a round."""
        return (2 * WARMUP_WINDOW + 1) * (self.alone.step_s + self.reference_step_s)


def read_alone(bench: Bench, subject: Subject, counted: StepOperators | None) -> Alone:
    """Read what a step needs, before the reference is built.

    Args:
        counted: the step's operators if they are known already; None to trace a real step.

    Raises:
        BadStep: a loss is not finite.
    """
    before = bench.hardware.state()
    with bench.stages.timed("memory"):
        memory = read_memory(subject, bench.device, bench.hardware, bench.clock)
    with bench.stages.timed("operators"):
        operators = _operators(bench, subject, counted)
    if not bench.energy_window:
        return Alone(before, memory, operators, None)

    def run_steps(count: int) -> None:
        for _ in range(count):
            subject.run(ignore_phase)

    with bench.stages.timed("energy"):
        meter = bench.hardware.energy_meter()
        energy = unpaused(lambda: measure_energy(run_steps, meter, bench.clock.synchronize))
    return Alone(before, memory, operators, energy)


def _operators(bench: Bench, subject: Subject, counted: StepOperators | None) -> StepOperators:
    if bench.settings.detail:
        return unpaused(lambda: timed_operators(subject, bench.device))
    # A step on fake tensors shows neither the waits for a GPU nor the kernels that it chooses.
    if counted is None or bench.device.type == "cuda":
        return traced_operators(subject, bench.device)
    return counted


def compare(
    bench: Bench,
    alone: Alone,
    subject: Subject,
    build_reference: Callable[[], Subject] | None,
    *,
    reference: list[Operation] | None,
    on_round: OnRound,
    limit: Limit = lambda step_s: None,
    earlier: Readings | None = None,
) -> Readings:
    """Time a step interleaved with the reference, and return all readings.

    Args:
        build_reference: builds the reference's step; None if ``subject`` is the reference.
        reference: the reference's operators if they are known already; None to trace them.
        limit: when no further round starts, if that is before the settings' time. It is asked after
            the first steps of subjects that are new.
        earlier: readings of the same step, which are continued.

    Raises:
        BadStep: a loss is not finite.
        UserError: a file that the loader needs cannot be used.
    """
    paused_before_s = paused_s() - (earlier.paused_s if earlier else 0.0)
    began = alone.before if earlier is None else bench.hardware.state()
    with bench.stages.timed("networks"):
        subjects = [subject] if build_reference is None else [subject, build_reference()]
    if reference is None:
        with bench.stages.timed("operators"):
            reference = traced_operators(subjects[-1], bench.device).operations
    before = earlier.timed.samples if earlier else [Samples() for _ in subjects]
    ran_s = [alone.memory.step_s if earlier is None else [], []]
    meter = bench.hardware.energy_meter()
    watches = [
        Stopwatch(one, bench.clock, bench.hardware, meter=meter, samples=samples, ran_s=seconds)
        for one, samples, seconds in zip(subjects, before, ran_s, strict=False)
    ]
    seen = {id(block) for watch in watches for block in watch.samples.blocks}
    first_s = _first_steps_s(bench, watches if earlier else watches[1:])
    first_s += alone.memory.step_s[0] if earlier is None else 0.0
    most_s = limit(alone.step_s)
    gc.collect()  # what the earlier readings left
    with bench.stages.timed("timed rounds"):
        timed = time_interleaved(
            watches,
            bench.settings,
            clock=bench.clock,
            canary=bench.canary,
            on_round=on_round,
            most_s=most_s,
            earlier=earlier.timed if earlier else None,
        )
    blocks = [block for watch in watches for block in watch.samples.blocks]
    added = [block for block in blocks if id(block) not in seen]
    if added:
        before_s = earlier.timed.taken_s if earlier else 0.0
        _time_end_to_end(bench, watches, timed.taken_s - before_s)
    after = bench.hardware.state()
    problems = bench.hardware.problems(began, _states(added), after)
    bench.look_again()
    return Readings(
        bench=bench,
        alone=alone,
        reference=reference,
        reference_step_s=watches[-1].step_s,
        first_s=first_s,
        timed=timed,
        energy=alone.energy or energy_of_blocks(meter, timed.own.blocks),
        outliers=timed.own.outliers(bench.hardware),
        during=_states(blocks),
        after=after,
        most_s=most_s,
        distrust=list(dict.fromkeys([*(earlier.distrust if earlier else []), *problems])),
        stages_s=_added(earlier.stages_s if earlier else {}, bench.stages.taken()),
        paused_s=paused_s() - paused_before_s,
    )


def _first_steps_s(bench: Bench, watches: Sequence[Stopwatch]) -> float:
    """Take the first steps of new subjects, outside the time of the rounds: a compiler may need
    minutes. Return the seconds of the very first ones."""
    if not watches:
        return 0.0
    with bench.stages.timed("first steps"):
        return sum(watch.begin() for watch in watches)


def _states(blocks: Sequence[Block]) -> list[State]:
    return [state for block in blocks for state in (block.before, block.after)]


def _time_end_to_end(bench: Bench, watches: list[Stopwatch], rounds_s: float) -> None:
    most_s = END_TO_END_SHARE * rounds_s
    block_s = min(BLOCK_S, most_s / (LEAST_BLOCKS * len(watches)))
    steps = [
        Iterations(feed, bench.clock, watch.step_s, watch.samples, block_s)
        for watch in watches
        if (feed := watch.subject.feed) is not None
    ]
    if not steps:
        return
    with bench.stages.timed("end-to-end"):
        time_end_to_end(
            steps,
            clock=bench.clock,
            precision_target=bench.settings.precision_target,
            most_s=most_s,
        )


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
