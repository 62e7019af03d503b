"""From a resolved study to Costs: what one step of each method costs on this device."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import torch

from kdprof.device import versions
from kdprof.errors import UserError
from kdprof.measure.clock import StepClock
from kdprof.measure.count import Count, count_step, fake_tensors
from kdprof.measure.latency import Samples, Timer, time_rounds, to_device
from kdprof.measure.memory import available_bytes, peak_memory
from kdprof.progress import Progress
from kdprof.records import Cost, Flop, Interval, Memory, Ratio
from kdprof.resolve import REFERENCE, ResolvedStudy
from kdprof.stats import median_interval, ratio_interval

LOADER_BOUND = 0.02
"""An iteration this much longer than its step is bound by the loader."""
MEMORY_STEPS = 2
NO_BYTES = "this version counts matrix FLOP only"


def measure(study: ResolvedStudy, names: list[str], progress: Progress) -> list[Cost]:
    """Measure the step of each named method, and of the reference beside them.

    Raises:
        UserError: a step cannot fit into the device's memory.
    """
    names = list(dict.fromkeys([REFERENCE, *names]))
    counts = _counts_that_fit(study, names, progress)
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
    for name, timer in timers.items():
        settled = "settled" if timer.samples.settled else "had not settled"
        progress.detail(f"{name}: {settled} after {timer.samples.warmup_steps} warm-up steps")
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


def count_costs(study: ResolvedStudy, names: list[str], progress: Progress) -> list[Cost]:
    """Count the FLOP of each named method's step without running it: no device is needed.

    The Costs have no latency and no memory, with the reason; they are no basis for a budget.
    """
    names = list(dict.fromkeys([REFERENCE, *names]))
    return [_counted(study, name, made.flop) for name, made in _counts(study, names, progress)]


def _counted(study: ResolvedStudy, name: str, flop: Flop) -> Cost:
    fields = ("latency_s", "ratio", "end_to_end_s", "phases_s", "memory_bytes", "energy_j")
    return Cost(
        method=name,
        device="none: counted, not run",
        key=study.cost_key(name),
        session="",
        latency_s=None,
        ratio=None,
        end_to_end_s=None,
        samples_s=[],
        end_to_end_samples_s=[],
        phases_s=None,
        flop=flop,
        bytes_moved=None,
        memory_bytes=Memory(peak_allocated=None, peak_reserved=None, process=None),
        energy_j=None,
        reliable=True,
        warnings=[],
        unavailable={
            **dict.fromkeys(fields, "counted, not run (--count-only)"),
            "bytes_moved": NO_BYTES,
        },
        timing={},
        hardware={},
        settings=study.cost_settings(name),
        versions=versions(),
    )


def _counts(
    study: ResolvedStudy, names: list[str], progress: Progress
) -> Iterator[tuple[str, Count]]:
    mode, teacher = fake_tensors(), study.teacher()
    with progress.task("counting FLOP", len(names)) as advance:
        for name in names:
            yield name, count_step(study.step(name, teacher, device=torch.device("cpu")), mode)
            advance(1)


def _counts_that_fit(
    study: ResolvedStudy, names: list[str], progress: Progress
) -> dict[str, Count]:
    """Count each step and refuse, before any of them runs, what cannot fit into memory."""
    step, free = study.study.step, available_bytes(study.device)
    counts = dict(_counts(study, names, progress))
    problems = [
        f"a step of '{name}' with batch {step.batch} and crop {step.crop[0]}x{step.crop[1]} needs "
        f"at least {made.least_memory_bytes / 2**30:.1f} GiB, {study.device} has "
        f"{free / 2**30:.1f} GiB free; lower --crop or --batch"
        for name, made in counts.items()
        if free is not None and made.least_memory_bytes > free
    ]
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
            "bytes_moved": NO_BYTES,
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
