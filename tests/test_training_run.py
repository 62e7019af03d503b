"""One run by a clock that only its steps advance: what is booked as what, to the second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from small_study import price, small_study
from step_observer import Observer, observing, signal_at

from kdprof import store
from kdprof.data import feeder
from kdprof.progress import Progress
from kdprof.records import Cost, Run
from kdprof.resolve import ResolvedStudy
from kdprof.step_feed import StepFeed
from kdprof.store import Lost, RunFolder, Store
from kdprof.train import loop
from kdprof.train.cells import Cell, new_run
from kdprof.train.loop import Interrupted, TrainingRun, Validation

ITERATIONS, STEP_S, STARTUP_S, WATTS = 20, 0.5, 8.0, 10.0
"""Every step is as long as planned; the first step of a process takes 8 s longer, all at 10 W."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def read_j(self) -> float:
        return WATTS * self.now_s

    reason = None


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "running_s", clock)
    return clock


@contextmanager
def ticking(clock: Clock, also: Observer = lambda step, iteration: None) -> Iterator[list[float]]:
    """Let steps advance the clock, and yield the learning rates that they were taken with."""
    rates: list[float] = []

    def tick(step, iteration):
        clock.now_s += STEP_S if rates else STEP_S + STARTUP_S
        rates.append(step._optimizer.param_groups[0]["lr"])
        also(step, iteration)

    with observing(ITERATIONS, after=tick):
        yield rates


def train(root, clock: Clock, *, joules_each: float | None = None, **changes) -> Run:
    """Train none for some iterations, or go on with it."""
    study = ResolvedStudy(small_study(methods=["none"], evaluation__points=1, **changes))
    price(root, study.plain)
    (cost,) = (one for one in Store(root).costs() if one.method == "none")
    if joules_each is not None:
        cost = Cost.model_validate({**cost.model_dump(by_alias=True), "energy_j": joules_each})
    cell = Cell(
        method="none", budget="6", iterations=ITERATIONS, low=ITERATIONS, high=ITERATIONS,
        span=ITERATIONS, planned_s=ITERATIONS * STEP_S,
    )  # fmt: skip
    folder = cell.folder(Store(root))
    step = study.factory.step("none", None, iterations=ITERATIONS)
    with folder.lock():
        return TrainingRun(
            folder=folder,
            run=folder.read_run() or new_run(study, cell, cost),
            feed=StepFeed(step, study.factory.batches(0)),
            settings=study.training,
            validation=Validation.of(study, "student"),
            cost=cost,
            meter=clock,
        ).train(Progress(None), "test")


def folder_of(root) -> RunFolder:
    return Store(root).run_folder("none", "6", 0)


# Start-up


@pytest.mark.parametrize("enforce", ["iterations", "time", "energy"])
def test_start_up_spends_no_budget(tmp_path, clock, enforce):
    """10 s and 100 J for 20 iterations, and a first step that alone takes nearly all of it."""
    with ticking(clock) as rates:
        run = train(tmp_path, clock, joules_each=STEP_S * WATTS, training__enforce=enforce)
    assert run.iterations_done == ITERATIONS
    assert (run.train_s.actual, run.startup_s) == pytest.approx((10.0, 8.0))
    expected = [1e-4 + (0.01 - 1e-4) * (1 - i / ITERATIONS) ** 0.9 for i in range(ITERATIONS)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("enforce", ["time", "energy"])
@pytest.mark.parametrize("stop_after", [1, 2, 7])
def test_start_up_of_every_process_spends_no_budget(tmp_path, clock, enforce, stop_after):
    settings = {"joules_each": STEP_S * WATTS, "training__enforce": enforce}
    with ticking(clock, signal_at(stop_after - 1)), pytest.raises(Interrupted):
        train(tmp_path, clock, **settings)
    with ticking(clock):
        run = train(tmp_path, clock, **settings)
    assert run.iterations_done == ITERATIONS
    assert (run.train_s.actual, run.startup_s) == pytest.approx((10.0, 16.0))


@pytest.mark.parametrize("enforce", ["time", "energy"])
def test_start_up_that_is_counted_spends_the_budget(tmp_path, clock, enforce):
    settings = {"training__enforce": enforce, "training__startup": "counted"}
    with ticking(clock):
        run = train(tmp_path, clock, joules_each=STEP_S * WATTS, **settings)
    assert run.iterations_done == 4  # 8 s, and 0.5 s for each
    assert (run.train_s.actual, run.startup_s, run.energy_j) == pytest.approx((10.0, 0.0, 100.0))


def test_the_energy_of_start_up_is_that_of_its_seconds(tmp_path, clock):
    with ticking(clock):
        run = train(tmp_path, clock, joules_each=STEP_S * WATTS)
    assert run.energy_j == pytest.approx(WATTS * run.train_s.actual)
    booked = {"train": 0.0, "startup": 0.0}
    for entry in folder_of(tmp_path).read_ledger():
        if entry.kind in booked:
            booked[entry.kind] += entry.energy_j
    assert booked == pytest.approx({"train": 100.0, "startup": 80.0})


# Waiting for data


def test_no_wait_for_data_is_lost_at_a_checkpoint(tmp_path, clock, monkeypatch):
    """Each batch takes 1 s; a checkpoint after every step, and a crash in the tenth."""
    count = iter(range(10**6))
    monkeypatch.setattr(feeder, "running_s", lambda: float(next(count)))

    def die(step, iteration):
        if iteration == 9:
            raise KeyboardInterrupt  # as a kill: nothing of ours runs

    often = {"training__checkpoint_every_s": STEP_S / 2}
    with ticking(clock, die), pytest.raises(KeyboardInterrupt):
        train(tmp_path, clock, **often)
    assert folder_of(tmp_path).read_run().data_wait_s == 9.0
    with ticking(clock):
        assert train(tmp_path, clock, **often).data_wait_s == ITERATIONS


# The lease


def test_a_run_that_another_machine_has_taken_is_left_as_it_is(tmp_path, clock):
    """This machine slept: after the eighth step the other one's lease is in the file."""
    run, there = folder_of(tmp_path), {}

    def take(step, iteration):
        if iteration == 7:
            (run.path / "lock").write_text('{"host": "elsewhere 1", "pid": 7}')
            there.update({path: path.read_bytes() for path in run.path.iterdir()})

    often = {"training__log_every": 1, "training__checkpoint_every_s": STEP_S / 2}
    with ticking(clock, take), pytest.raises(Lost, match=r"trained on elsewhere \(process 7\)"):
        train(tmp_path, clock, **often)
    assert run.read_run().iterations_done == 7
    assert {path: path.read_bytes() for path in run.path.iterdir()} == there


def test_a_run_that_another_machine_has_taken_and_finished_stays_finished(
    tmp_path, clock, monkeypatch
):
    """This machine sleeps in its eighth step until the other one has trained the run to its end."""
    run, there = folder_of(tmp_path), {}
    monkeypatch.setattr(store, "SETTLE_S", 0.0)
    monkeypatch.setattr(store, "_flock", lambda file, how=0: False)  # each sees its own locks only
    often = {"training__log_every": 1, "training__checkpoint_every_s": STEP_S / 2}

    def sleep(step, iteration):
        if iteration == 7 and not there:
            there["begun"] = b""
            os.utime(run.path / "lock", (0, 0))
            monkeypatch.setattr(store, "_host", lambda: "elsewhere 1")
            assert train(tmp_path, clock, **often).finished
            del there["begun"]
            there.update({path: path.read_bytes() for path in run.path.iterdir()})

    with ticking(clock, sleep), pytest.raises(Lost, match=r"none/6/0 .* has ended"):
        train(tmp_path, clock, **often)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == there
    names = {path.name for path in there}
    assert names >= {"run.json", "ledger.jsonl", "curve.jsonl", "log.jsonl", "checkpoint.pt"}
    assert run.read_run().finished


def test_a_step_that_fails_then_writes_nothing_either(tmp_path, clock):
    def fail(step, iteration):
        (folder_of(tmp_path).path / "lock").write_text('{"host": "elsewhere 1", "pid": 7}')
        raise ValueError("wrong")

    with ticking(clock, fail), pytest.raises(ValueError, match="wrong"):
        train(tmp_path, clock)
    assert folder_of(tmp_path).read_run().failure is None


def test_evaluation_renews_the_lease(tmp_path, clock, monkeypatch):
    lock, real = folder_of(tmp_path).path / "lock", loop.evaluate

    def evaluate(*arguments, **keywords):
        os.utime(lock, (0, 0))
        scores = real(*arguments, **keywords)
        assert lock.stat().st_mtime > 0
        return scores

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with ticking(clock):
        assert train(tmp_path, clock).finished
