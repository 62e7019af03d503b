"""One measuring session: all readings of one step, in one process, together with the reference.

The step first runs alone, so that memory, energy and the operators' times are its own; then the
reference is built as well, and both are timed in interleaved rounds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kdprof.hardware import Hardware
from kdprof.hardware.base import State
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.ceilings import higher, measure_ceilings
from kdprof.measure.clock import clock_of
from kdprof.measure.energy import EnergyReading, measure_energy
from kdprof.measure.latency import OnRound, Session, time_interleaved
from kdprof.measure.memory import MemoryReading, read_memory
from kdprof.measure.operator_times import Traced, trace_steps
from kdprof.measure.profiles import Files, write_files
from kdprof.measure.subject import Subject
from kdprof.records import Ceilings, Operation, Outlier
from kdprof.step import ignore_phase
from kdprof.study import MeasureSettings

TRACED_STEPS = 3


@dataclass(frozen=True)
class Readings:
    """All readings of one step in a session.

    Attributes:
        device: the hardware's name.
        clock: the timer's name.
        memory, traced, energy: read with nothing else resident.
        reference: the operators of the reference's step, which may be this step.
        before, during, after: states of the hardware around and between the timed blocks.
        distrust: why the hardware's state makes the Cost unreliable.
    """

    device: str
    clock: str
    settings: MeasureSettings
    precision: str | None
    ceilings: Ceilings
    memory: MemoryReading
    traced: Traced
    energy: EnergyReading
    reference: list[Operation]
    timed: Session
    outliers: list[Outlier]
    before: State
    during: list[State]
    after: State
    distrust: list[str]


def run_session(
    subject: Subject,
    build_reference: Callable[[], Subject] | None,
    *,
    device: torch.device,
    hardware: Hardware,
    settings: MeasureSettings,
    precision: str | None,
    files: Files,
    on_round: OnRound,
) -> Readings:
    """Measure one step.

    Args:
        build_reference: builds the reference's step; None if ``subject`` is the reference.
        precision: of the ceilings that the step is compared with; None = fp32.

    Raises:
        BadStep: a loss is not finite.
    """
    before, clock = hardware.state(), clock_of(device)
    ceilings = measure_ceilings(device, precision or "fp32")
    memory = read_memory(subject, device, hardware)
    traced = trace_steps(subject, device, TRACED_STEPS)

    def run_steps(count: int) -> None:
        for _ in range(count):
            subject.run(ignore_phase)

    energy = measure_energy(run_steps, hardware.energy_meter(), clock.synchronize)
    subjects = [subject] if build_reference is None else [subject, build_reference()]
    reference = trace_steps(subjects[-1], device, 1).operations
    canary = CanaryKernel(device, clock)
    gc.collect()  # what the readings above left
    timed = time_interleaved(
        subjects, settings, clock=clock, canary=canary, hardware=hardware, on_round=on_round
    )
    after = hardware.state()
    ceilings = higher(ceilings, measure_ceilings(device, precision or "fp32"))
    during = [r for s in timed.samples for b in s.blocks for r in (b.before, b.after)]
    write_files(subject, files)
    return Readings(
        device=hardware.name,
        clock=clock.name,
        settings=settings,
        precision=precision,
        ceilings=ceilings,
        memory=memory,
        traced=traced,
        energy=energy,
        reference=reference,
        timed=timed,
        outliers=timed.own.outliers(hardware),
        before=before,
        during=during,
        after=after,
        distrust=hardware.problems(before, during, after),
    )
