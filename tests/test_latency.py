"""The timing engine, on simulated machines whose noise is known and on this one."""

import gc
import time

import calibration
import numpy as np
import pytest
import torch
from builders import Mimic, tiny_batch, tiny_step
from simulated import (
    QuietHardware,
    SimulatedCanary,
    SimulatedClock,
    SimulatedStep,
    measure_simulated,
    quiet,
)

from kdprof.data.base import Classes, SegmentationData
from kdprof.measure import latency
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import CpuClock, phase_seconds
from kdprof.measure.latency import Stopwatch, collector_off, time_interleaved
from kdprof.measure.study_step import StudySubject
from kdprof.measure.subject import BadStep
from kdprof.measure.user_step import CallableSubject
from kdprof.stats import drift_of
from kdprof.step import PHASES
from kdprof.step_feed import StepFeed
from kdprof.study import MeasureSettings

BRIEF = MeasureSettings(least_rounds=3, max_time_s=0.001, steps=2)


@pytest.mark.parametrize("machine", ["independent", "drifting", "disturbed"])
def test_a_step_is_seldom_called_different_from_itself(machine):
    """A/A: 5 % at most, and what chance adds in 120 repeats; the benchmark makes many more."""
    made = calibration.simulated(machine, 0.0, 120, max_time_s=10)
    assert made.called_different() <= 0.1
    assert np.median(made.rounds) >= 10


@pytest.mark.parametrize("delay", calibration.DELAYS)
def test_an_injected_delay_is_estimated(delay):
    assert calibration.on_a_quiet_clock(delay) == pytest.approx(1 + delay, abs=1e-9)
    made = calibration.simulated("drifting", delay, 30, max_time_s=10)
    assert made.error_points() <= 1
    assert made.missed() <= 0.2


def test_a_large_difference_is_called():
    assert calibration.simulated("disturbed", 0.2, 20, max_time_s=10).called_different() == 1


def test_measuring_stops_at_the_target_or_when_time_is_up():
    steps = {"a": 0.01, "b": 0.01}
    precise, _ = measure_simulated(steps, quiet(), max_time_s=1000)
    assert precise.rounds == 12, "narrow at 10 and again at 12"
    assert precise.stopped == "the interval is 0.00% wide, target 1.00%"
    noisy = calibration.MACHINES["independent"](np.random.default_rng(0), 0.5)
    late, clock = measure_simulated(steps, noisy, max_time_s=2)
    assert "max_time_s = 2 was up" in late.stopped
    assert 2 < clock.seconds < 4


def test_subjects_take_turns_in_random_order():
    seen = []

    class Told(SimulatedStep):
        def run(self, mark):
            seen.append(self.name)
            super().run(mark)

    clock = SimulatedClock()
    steps = [Told(name, 0.01, clock, quiet()) for name in "abc"]
    settings = MeasureSettings(least_rounds=12, max_time_s=1, steps=3)
    canary = SimulatedCanary(clock, quiet())
    session = time_interleaved(
        steps, settings, clock=clock, canary=canary, hardware=QuietHardware()
    )
    assert session.rounds == 12
    timed = "".join(seen)[-12 * 3 * 4 :]
    blocks = [timed[i : i + 4] for i in range(0, len(timed), 4)]
    assert all(len(set(block)) == 1 for block in blocks), "one untimed and three timed steps"
    rounds = ["".join(b[0] for b in blocks[i : i + 3]) for i in range(0, len(blocks), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2
    assert len(session.canary_s) == 12


def falling():
    """A step that gets 5 % faster every time, for ever."""
    factor = 1.0
    while True:
        factor *= 0.95
        yield factor


@pytest.mark.parametrize("noise", [quiet, falling])
def test_warm_up_ends_when_settled_or_says_that_it_never_was(noise):
    clock = SimulatedClock()
    watch = Stopwatch(SimulatedStep("a", 0.01, clock, noise()), clock, QuietHardware())
    watch.warm_up()
    if noise is quiet:
        assert watch.samples.unsettled is None
        assert watch.samples.warmup_steps == 2 * latency.WARMUP_WINDOW
    else:
        assert "still changed by -14%" in watch.samples.unsettled
        assert watch.samples.warmup_steps == latency.WARMUP_MOST_STEPS


def test_a_growing_allocator_is_not_settled(monkeypatch):
    held = iter(range(1000))
    monkeypatch.setattr(latency, "_reserved_bytes", lambda: next(held))
    clock = SimulatedClock()
    watch = Stopwatch(SimulatedStep("a", 0.01, clock, quiet()), clock, QuietHardware())
    watch.warm_up()
    assert "allocator still grew" in watch.samples.unsettled


def test_a_slow_machine_is_told_by_the_canary():
    def slowing():
        for count in range(10**9):
            yield 1 + 0.0005 * count

    session, _ = measure_simulated({"a": 0.01}, slowing(), max_time_s=3)
    drift, steady = drift_of(session.canary_s, 0.01)
    assert drift > 0.02
    assert not steady


def test_ratio_survives_a_drifting_machine():
    """Both steps get slower together by half: the ratio stays."""

    def slowing():
        for count in range(10**9):
            yield 1 + 0.001 * count

    session, _ = measure_simulated({"delayed": 0.0105, "base": 0.01}, slowing(), max_time_s=5)
    median, low, high = calibration._ratio(session)
    assert median == pytest.approx(1.05, abs=0.005)
    assert low <= 1.05 <= high


def test_an_outlier_keeps_its_place_and_has_its_cause():
    class Collecting(SimulatedStep):
        def run(self, mark):
            super().run(mark)
            if 30 < len(taken) < 33:
                gc.collect()
                self.clock.seconds += 0.01
            taken.append(self.name)

    taken: list[str] = []
    clock = SimulatedClock()
    noise = calibration.MACHINES["independent"](np.random.default_rng(1), 0.005)
    session = time_interleaved(
        [Collecting("a", 0.01, clock, noise)],
        MeasureSettings(least_rounds=12, max_time_s=0.1),
        clock=clock,
        canary=SimulatedCanary(clock, noise),
        hardware=QuietHardware(),
    )
    (samples,) = session.samples
    found = samples.outliers(QuietHardware())
    assert found
    assert {o.cause for o in found} == {"garbage collection"}
    assert all(o.times_median == pytest.approx(2, rel=0.1) for o in found)
    assert samples.rounds[found[0].round][found[0].step] == found[0].seconds, "never dropped"


def test_a_stall_of_the_loader_is_told_from_a_slow_step():
    samples = latency.Samples(
        end_to_end_s=[0.10, 0.11, 0.10, 0.11, 0.50, 0.11, 0.10, 0.30],
        waited_s=[0.01, 0.02, 0.01, 0.02, 0.40, 0.02, 0.01, 0.02],
    )
    samples.blocks = [latency.Block([0.1, 0.1], [], {}, {}, 0) for _ in samples.end_to_end_s]
    found = samples.outliers(QuietHardware())
    assert [(o.of, o.round, o.cause) for o in found] == [
        ("end_to_end", 4, "data stall"),
        ("end_to_end", 7, "unknown"),
    ]


def test_the_hardware_names_the_cause_of_an_outlier():
    class Throttled(QuietHardware):
        def cause(self, before, after):
            return "clock drop"

    noise = iter([*[1.0, 1.01, 0.99] * 12, 3.0, *[1.0, 1.01, 0.99] * 30])
    clock = SimulatedClock()
    session = time_interleaved(
        [SimulatedStep("a", 0.01, clock, noise)],
        MeasureSettings(least_rounds=12, max_time_s=0.1),
        clock=clock,
        canary=SimulatedCanary(clock, quiet()),
        hardware=Throttled(),
    )
    (outlier,) = session.samples[0].outliers(Throttled())
    assert outlier.cause == "clock drop"


def test_the_garbage_collector_is_left_as_it_was_found():
    assert gc.isenabled()
    with collector_off() as runs:
        assert not gc.isenabled()
        gc.collect(0)
    assert gc.isenabled()
    assert runs == [0]
    callbacks = len(gc.callbacks)
    measure_simulated({"a": 0.01}, quiet(), max_time_s=0.1)
    assert len(gc.callbacks) == callbacks
    assert gc.isenabled()


class Diverging(Mimic):
    """Turns to nan at its fifth call."""

    calls = 0

    def forward(self, student, teacher, labels):
        self.calls += 1
        terms = super().forward(student, teacher, labels)
        if self.calls >= 5:
            terms["logits"] = terms["logits"] * float("nan")
        return terms


def real_session(*subjects, settings=BRIEF):
    clock = CpuClock()
    canary = CanaryKernel(torch.device("cpu"), clock)
    return time_interleaved(
        subjects, settings, clock=clock, canary=canary, hardware=QuietHardware()
    )


def no_loader(step):
    subject = StudySubject(StepFeed(step, None, tiny_batch()))
    subject.run_end_to_end = lambda count, first: None
    return subject


def test_nan_is_no_step():
    with pytest.raises(BadStep, match=r"not finite after \d+ steps \(.*logits = nan"):
        real_session(no_loader(tiny_step(Diverging)))


def test_nan_of_a_callable_is_no_step():
    with pytest.raises(BadStep, match="not finite"):
        real_session(CallableSubject("mine", lambda: torch.tensor(float("inf"))))


def test_phases_of_a_real_step_add_up():
    session = real_session(no_loader(tiny_step(Mimic)))
    (samples,) = session.samples
    for block in samples.blocks:
        for total, phases in zip(block.step_s, block.phases_s, strict=True):
            assert set(phases) == set(PHASES)
            assert sum(phases.values()) == pytest.approx(total, rel=1e-9)
    assert sum(samples.phases_of(2.0).values()) == pytest.approx(2.0)


def test_a_phase_marked_twice_is_added_up():
    stamps = [("", 0.0), ("a", 1.0), ("b", 3.0), ("a", 6.0)]
    assert phase_seconds(CpuClock(), stamps, ("a", "b", "c")) == {"a": 4.0, "b": 2.0, "c": 0.0}


class SleepyBatches:
    """Makes the loader's batches slowly; the real loader around it."""

    def __new__(cls, workers: int, seconds: float):
        from kdprof.data import Augmentation, Batches

        made = Batches(
            Sleepy(seconds),
            seed=0,
            batch=1,
            augmentation=Augmentation(crop=(16, 20), scale=(1.0, 1.0), flip=0, photometric=False),
            workers=workers,
        )
        return made


class Sleepy(SegmentationData):
    """A data set whose every sample takes a while, as from a slow disk."""

    def __init__(self, seconds: float):
        super().__init__("sleepy", "train", Classes(("a", "b", "c"), ((0, 0, 0),) * 3))
        self.seconds = seconds

    def __len__(self):
        return 50

    def __getitem__(self, index):
        time.sleep(self.seconds)
        images, labels = tiny_batch(index, batch=1)
        return images[0], labels[0]

    def label(self, index):
        return self[index][1]


@pytest.mark.parametrize(("workers", "expected_s"), [(0, 0.2), (2, 0.1)])
def test_a_slow_loader_is_timed_in_steady_state(workers, expected_s):
    """Two processes halve the wait; neither a full queue at the start nor bunches hide it."""
    batches = SleepyBatches(workers, 0.2)
    subject = StudySubject(StepFeed(tiny_step(Mimic, batch=1), batches, tiny_batch(batch=1)))
    found = subject.run_end_to_end(3, 0)
    assert found.seconds == pytest.approx(expected_s, rel=0.25)
    assert found.waited_s == pytest.approx(found.seconds, rel=0.2)
