"""The timing engine, on simulated machines whose noise is known and on this one."""

import gc
import time
import weakref

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
from step_observer import stopped_at

from kdprof.data import ENDLESS
from kdprof.data.base import Classes, SegmentationData
from kdprof.measure import latency
from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import CpuClock, phase_seconds
from kdprof.measure.end_to_end import LEAST_BLOCKS, Iterations, time_end_to_end
from kdprof.measure.latency import WARMUP_WINDOW, Stopwatch, collector_off, time_interleaved
from kdprof.measure.study_step import StudySubject
from kdprof.measure.subject import BadStep
from kdprof.measure.user_step import CallableSubject
from kdprof.stats.intervals import drift_of
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
    assert late.stopped == "2 s were up before the target of 1.00%"
    assert 2 < clock.seconds < 3


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
    watches = [Stopwatch(step, clock, QuietHardware()) for step in steps]
    session = time_interleaved(watches, settings, clock=clock, canary=canary)
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
    unsettled = watch.warm_up()
    if noise is quiet:
        assert unsettled is None
        assert watch.samples.warmup_steps == 2 * latency.WARMUP_WINDOW
    else:
        assert "still changed by -14%" in unsettled
        assert watch.samples.warmup_steps == latency.WARMUP_MOST_STEPS


def test_a_growing_allocator_is_not_settled(monkeypatch):
    held = iter(range(1000))
    monkeypatch.setattr(latency, "_reserved_bytes", lambda: next(held))
    clock = SimulatedClock()
    watch = Stopwatch(SimulatedStep("a", 0.01, clock, quiet()), clock, QuietHardware())
    assert "allocator still grew" in watch.warm_up()


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
        [Stopwatch(Collecting("a", 0.01, clock, noise), clock, QuietHardware())],
        MeasureSettings(least_rounds=12, max_time_s=0.1),
        clock=clock,
        canary=SimulatedCanary(clock, noise),
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
        [Stopwatch(SimulatedStep("a", 0.01, clock, noise), clock, Throttled())],
        MeasureSettings(least_rounds=12, max_time_s=0.1),
        clock=clock,
        canary=SimulatedCanary(clock, quiet()),
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
    watches = [Stopwatch(subject, clock, QuietHardware()) for subject in subjects]
    return time_interleaved(watches, settings, clock=clock, canary=canary)


def no_loader(step):
    return StudySubject(StepFeed(step, None, tiny_batch()), loads=False)


def test_nan_is_no_step():
    with pytest.raises(BadStep, match=r"not finite after \d+ steps \(.*logits = nan"):
        real_session(no_loader(tiny_step(Diverging)))


def test_nan_of_a_callable_is_no_step():
    with pytest.raises(BadStep, match="not finite"):
        real_session(CallableSubject("mine", lambda: torch.tensor(float("inf"))))


def test_a_block_in_which_the_process_was_stopped_is_timed_again():
    stop, calls = stopped_at(20, seconds=2.5), iter(range(1_000_000))

    def step():
        stop(None, next(calls))
        time.sleep(0.01)

    clock = CpuClock()
    began = clock.now()
    session = real_session(CallableSubject("mine", step), settings=MeasureSettings(max_time_s=1))
    assert max(s for block in session.own.blocks for s in block.step_s) < 0.8
    assert clock.now() - began < 3.0, "the stop is not part of the time for measuring either"


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
    samples = latency.Samples()
    feed = StepFeed(tiny_step(Mimic, batch=1), batches, tiny_batch(batch=1))
    iterations = Iterations(feed, CpuClock(), 0.1, samples)
    feed.begin(0, ENDLESS)
    try:
        assert not iterations.loader_keeps_up()
        iterations.time_block(keeps_up=False)
    finally:
        feed.close()
    assert samples.end_to_end_s == pytest.approx([expected_s], rel=0.25)
    assert samples.waited_s == pytest.approx(samples.end_to_end_s, rel=0.2)


def test_steps_share_one_loader_that_is_started_once(monkeypatch):
    starts = []
    begin = StepFeed.begin
    monkeypatch.setattr(
        StepFeed, "begin", lambda feed, *span: (starts.append(span), begin(feed, *span))
    )
    feeds = [StepFeed(tiny_step(Mimic, batch=1), SleepyBatches(0, 0.0)) for _ in range(2)]
    samples = [latency.Samples(), latency.Samples()]
    steps = [
        Iterations(feed, CpuClock(), 0.3, own) for feed, own in zip(feeds, samples, strict=True)
    ]
    time_end_to_end(steps, clock=CpuClock(), precision_target=1e-9, most_s=0.0)
    assert starts == [(0, ENDLESS)]
    assert [len(own.end_to_end_s) for own in samples] == [LEAST_BLOCKS, LEAST_BLOCKS]
    assert [feed._feeder for feed in feeds] == [None, None]


@pytest.mark.parametrize(
    ("step_s", "steps", "untimed", "rounds"), [(0.01, 3, 1, 10), (0.2, 2, 1, 5), (0.8, 1, 0, 5)]
)
def test_slow_steps_get_short_blocks_and_few_rounds(step_s, steps, untimed, rounds):
    session, clock = measure_simulated({"a": step_s, "b": step_s}, quiet(), max_time_s=1e-3)
    assert session.rounds == rounds
    assert {len(block) for block in session.own.rounds} == {steps}
    run = 2 * (2 * latency.WARMUP_WINDOW + rounds * (steps + untimed)) * step_s
    assert clock.seconds == pytest.approx(run + rounds * 1e-3)


def test_a_session_can_be_continued():
    """Its samples are added to, and further rounds are made until the interval is narrow."""
    noise = calibration.MACHINES["independent"](np.random.default_rng(3), 0.1)
    clock = SimulatedClock()
    steps = [SimulatedStep(name, 0.01, clock, noise) for name in "ab"]
    tools = {"clock": clock, "canary": SimulatedCanary(clock, quiet())}
    brief = MeasureSettings(max_time_s=1000, precision_target=0.05)
    watches = [Stopwatch(step, clock, QuietHardware()) for step in steps]
    first = time_interleaved(watches, brief, most_s=0.1, **tools)
    assert first.rounds == 10
    again = [
        Stopwatch(step, clock, QuietHardware(), samples=samples)
        for step, samples in zip(steps, first.samples, strict=True)
    ]
    second = time_interleaved(again, brief, earlier=first, **tools)
    assert second.rounds > 10
    assert [len(s.blocks) for s in second.samples] == [second.rounds, second.rounds]
    assert len(second.canary_s) == second.rounds
    assert second.taken_s > first.taken_s
    assert latency.widest_interval([s.rounds for s in second.samples]) <= 0.05


def test_warm_up_counts_steps_that_ran_before():
    clock = SimulatedClock()
    step = SimulatedStep("a", 0.01, clock, quiet())
    watch = Stopwatch(step, clock, QuietHardware(), ran_s=[0.02, 0.01, 0.01, 0.01, 0.01, 0.01])
    assert watch.warm_up() is None
    assert clock.seconds == 0


def continued(noises, **settings):
    """Time a step against itself for 0.1 s, then go on with the second noise."""
    clock, found = SimulatedClock(), None
    for noise in noises:
        samples = found.samples if found else [latency.Samples() for _ in "ab"]
        watches = [
            Stopwatch(SimulatedStep(name, 0.01, clock, noise), clock, QuietHardware(), samples=one)
            for name, one in zip("ab", samples, strict=True)
        ]
        found, before = (
            time_interleaved(
                watches,
                MeasureSettings(**settings),
                clock=clock,
                canary=SimulatedCanary(clock, quiet()),
                most_s=0.1,
                earlier=found,
            ),
            found,
        )
    return before, found


def test_rounds_after_a_warm_up_that_did_not_settle_are_not_added():
    first, second = continued([quiet(), falling()], precision_target=1e-9)
    assert second.rounds == first.rounds == len(second.own.blocks)
    assert second.own.unsettled is None
    assert second.taken_s > first.taken_s


def test_rounds_that_had_not_settled_are_dropped_for_those_that_have():
    _, second = continued([falling(), quiet()], precision_target=1e-9)
    assert [one.unsettled for one in second.samples] == [None, None]
    assert [max(own) for own in second.own.rounds] == pytest.approx([0.01] * second.rounds)
    assert second.rounds == len(second.own.blocks) == len(second.canary_s)


def test_the_time_of_a_method_is_that_of_all_its_visits():
    first, second = continued([quiet(), quiet()], precision_target=1e-9, max_time_s=1.0)
    assert first.taken_s == pytest.approx(0.93)
    assert second.stopped.startswith("1 s were up")


def test_the_canary_is_in_memory_while_rounds_run_only(monkeypatch):
    """On a GPU its matrix of 128 MiB would be counted as a step's memory."""
    made, full = [], torch.full

    def follow(*size, **kind):
        matrix = full(*size, **kind)
        made.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(torch, "full", follow)
    clock = CpuClock()
    canary = CanaryKernel(torch.device("cpu"), clock)
    assert made == []
    alive = []

    def work():
        alive.append([matrix() is not None for matrix in made])

    watch = Stopwatch(CallableSubject("mine", work), clock, QuietHardware())
    session = time_interleaved([watch], BRIEF, clock=clock, canary=canary)
    assert alive[:WARMUP_WINDOW] == [[]] * WARMUP_WINDOW
    assert alive[-session.rounds :] == [[True]] * session.rounds
    assert [matrix() for matrix in made] == [None]
