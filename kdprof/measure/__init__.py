"""From a resolved study to Costs: what one step of each method costs on this device."""

from __future__ import annotations

import uuid

import torch

from kdprof.device import versions
from kdprof.errors import UserError
from kdprof.measure.clock import StepClock
from kdprof.measure.count import Count, count_step
from kdprof.measure.latency import Samples, Timer, time_rounds, to_device
from kdprof.measure.memory import available_bytes, peak_memory
from kdprof.progress import Progress
from kdprof.records import Cost, Interval, Memory, Ratio
from kdprof.resolve import REFERENCE, ResolvedStudy
from kdprof.stats import median_interval, ratio_interval

LOADER_BOUND = 0.02
"""An iteration this much longer than its step is bound by the loader."""
MEMORY_STEPS = 2


def measure(study: ResolvedStudy, names: list[str], progress: Progress) -> list[Cost]:
    """Measure the step of each named method, and of the reference beside them.

    Raises:
        UserError: a step cannot fit into the device's memory.
    """
    names = list(dict.fromkeys([REFERENCE, *names]))
    counts = _count(study, names, progress)
    before = study.hardware.state()
    teacher = study.placed_teacher()
    batches = study.batches(seed=0)
    resident = to_device(batches.batch(0), study.device)
    steps, memories = {}, {}
    with progress.task("memory", len(names)) as advance:
        for name in names:
            memories[name] = peak_memory(
                lambda name=name: _run_steps(study, name, teacher, resident),
                study.device,
                study.hardware,
            )
            advance(1)
    for name in names:
        steps[name] = study.step(name, teacher)
    timers = {name: Timer(step, resident, batches) for name, step in steps.items()}
    with progress.task("latency", study.study.measure.rounds) as advance:
        rounds, stopped = time_rounds(timers, study.study.measure, advance)
    after = study.hardware.state()
    session = uuid.uuid4().hex[:12]
    hardware = {"name": study.hardware.name, "before": before, "after": after}
    timing = {
        "clock": StepClock(study.device).name,
        "rounds": rounds,
        "steps_per_round": study.study.measure.steps,
        "stopped": stopped,
        "interval": "95 %, bootstrap over rounds",
    }
    return [
        _cost(
            study,
            timer,
            timers[REFERENCE].samples,
            counts[name],
            memories[name],
            {"session": session, "hardware": hardware, "timing": timing},
        )
        for name, timer in timers.items()
    ]


def _count(study: ResolvedStudy, names: list[str], progress: Progress) -> dict[str, Count]:
    """Count each step and refuse, before any of them runs, what cannot fit into memory."""
    step = study.study.step
    cpu = torch.device("cpu")
    counts, problems = {}, []
    free = available_bytes(study.device)
    with progress.task("counting FLOP", len(names)) as advance:
        for name in names:
            make = lambda name=name: study.step(name, study.teacher(), device=cpu)  # noqa: E731
            counts[name] = count_step(make, step.batch, step.crop)
            needed = counts[name].least_memory_bytes
            if free is not None and needed > free:
                problems.append(
                    f"a step of '{name}' with batch {step.batch} and crop {step.crop[0]}x"
                    f"{step.crop[1]} needs at least {needed / 2**30:.1f} GiB, {study.device} has "
                    f"{free / 2**30:.1f} GiB free; lower --crop or --batch"
                )
            advance(1)
    if problems:
        raise UserError(*problems)
    return counts


def _run_steps(study: ResolvedStudy, name: str, teacher: object, resident: tuple) -> None:
    step = study.step(name, teacher)
    for iteration in range(MEMORY_STEPS):
        step(*resident, iteration)


def _cost(
    study: ResolvedStudy,
    timer: Timer,
    reference: Samples,
    count: Count,
    memory: tuple[Memory, dict[str, str]],
    session: dict,
) -> Cost:
    name, samples = timer.step.method.name, timer.samples
    latency = _interval(samples.step_s)
    end_to_end = _interval(samples.end_to_end_s)
    paired = ratio_interval(samples.step_s, reference.step_s, paired=True)
    hardware, timing = session["hardware"], dict(session["timing"])
    untrusted = study.hardware.problems(hardware["before"], hardware["after"])
    if not samples.settled:
        untrusted.append(f"the latency never settled in {samples.warmup_steps} warm-up steps")
    notes = _loader_notes(latency, end_to_end) + list(timer.step.method.notes)
    timing["warmup_steps"] = samples.warmup_steps
    return Cost(
        method=name,
        device=study.hardware.name,
        key=study.cost_key(name),
        session=session["session"],
        latency_s=latency,
        ratio=Ratio(**dict(zip(("median", "low", "high"), paired, strict=True)), to=REFERENCE),
        end_to_end_s=end_to_end,
        samples_s=samples.step_s,
        end_to_end_samples_s=samples.end_to_end_s,
        phases_s=samples.phases_of(latency.median),
        flop=count.flop,
        bytes_moved=None,
        memory_bytes=memory[0],
        energy_j=None,
        reliable=not untrusted,
        warnings=untrusted + notes,
        unavailable={
            "bytes_moved": "this version counts matrix FLOP only",
            "energy_j": study.hardware.energy_unavailable(),
            **memory[1],
        },
        timing=timing,
        hardware=hardware,
        settings=study.cost_settings(name),
        versions=versions(),
    )


def _interval(rounds: list[list[float]]) -> Interval:
    median, low, high = median_interval(rounds)
    return Interval(median=median, low=low, high=high)


def _loader_notes(step: Interval, end_to_end: Interval) -> list[str]:
    excess = end_to_end.median / step.median - 1
    if excess <= LOADER_BOUND or end_to_end.low <= step.median:
        return []
    return [
        f"LOADER-BOUND: an iteration with the loader takes {excess:.0%} longer than its step; "
        "part of the comparison is about loading data (raise data_settings.workers)"
    ]
