"""A session of measuring on a simulated machine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated import MACHINES, QuietHardware, SimulatedCanary, SimulatedClock, SimulatedStep, quiet

from kdprof.measure import session
from kdprof.measure.latency import ignore_round
from kdprof.measure.session import Alone, Bench, Readings, compare
from kdprof.measure.stages import Stages
from kdprof.records import Ceilings
from kdprof.study import MeasureSettings

COMPILES_S = 100.0
STEP_S = 0.01
LOW = Ceilings(matmul_flop_per_s=1e12, copy_bytes_per_s=3e11, precision="fp32")
LATER = Ceilings(matmul_flop_per_s=2e12, copy_bytes_per_s=1e11, precision="fp32")


@pytest.fixture(autouse=True)
def looks(monkeypatch) -> list[tuple]:
    """The ceilings that were measured after a session."""
    asked = []

    def measure(*given):
        asked.append(given)
        return LATER

    monkeypatch.setattr(session, "measure_ceilings", measure)
    return asked


class Compiled(SimulatedStep):
    """A step whose first run takes long."""

    compiled = False

    def run(self, mark):
        self.clock.seconds += 0.0 if self.compiled else COMPILES_S
        self.compiled = True
        super().run(mark)


class Hardware(QuietHardware):
    def state(self):
        return {}

    def problems(self, before, during, after):
        return []

    def energy_meter(self):
        return SimpleNamespace(reason="no counter")


class Machine:
    """A machine whose steps are noisy, and the sessions on it."""

    def __init__(self, **settings):
        self.clock = SimulatedClock()
        self.noise = MACHINES["independent"](np.random.default_rng(0), 0.1)
        self.bench = Bench(
            device=torch.device("cpu"),
            hardware=Hardware(),
            settings=MeasureSettings(precision_target=1e-6, **settings),
            precision=None,
            clock=self.clock,
            canary=SimulatedCanary(self.clock, quiet()),
            ceilings=LOW,
            stages=Stages(),
            energy_window=False,
        )
        self.asked_at_s: list[float] = []

    def step(self, name: str) -> Compiled:
        return Compiled(name, STEP_S, self.clock, self.noise)

    def session(self, most_s: float | None = None, earlier: Readings | None = None) -> Readings:
        """Measure a step that was run alone before; if a session is continued, it is built anew."""
        subject = self.step("mine")
        subject.compiled = earlier is None
        memory = SimpleNamespace(step_s=[COMPILES_S + STEP_S, *[STEP_S] * 7])
        alone = Alone({}, memory, None, SimpleNamespace(joules=None))

        def limit(step_s):
            self.asked_at_s.append(self.clock.seconds)
            return most_s

        return compare(
            self.bench,
            alone,
            subject,
            lambda: self.step("none"),
            reference=[],
            on_round=ignore_round,
            limit=limit,
            earlier=earlier,
        )


def test_the_compiling_of_the_reference_takes_no_time_from_the_rounds():
    machine = Machine(max_time_s=8)
    found = machine.session()
    assert found.timed.stopped.startswith("8 s were up")
    assert 8 < found.timed.taken_s < 9
    assert found.timed.rounds > 8 / (2 * 30 * 2 * STEP_S)
    assert found.reference_step_s == pytest.approx(STEP_S, rel=0.2)
    assert found.first_s == pytest.approx(2 * COMPILES_S, rel=0.01)
    assert "first steps" in found.stages_s
    assert machine.clock.seconds < COMPILES_S + 10


def test_what_is_left_is_asked_after_the_first_steps():
    """So that all methods together keep to their time."""
    machine = Machine(max_time_s=8)
    found = machine.session(most_s=2)
    assert machine.asked_at_s == [pytest.approx(COMPILES_S, rel=0.01)]
    assert (found.most_s, found.timed.stopped[:3]) == (2, "2 s")


def test_both_compile_again_where_a_session_is_continued():
    machine = Machine(max_time_s=8)
    first = machine.session(most_s=2)
    second = machine.session(earlier=first)
    assert second.timed.rounds > 2 * first.timed.rounds
    assert 8 < second.timed.taken_s < 9
    assert second.first_s == pytest.approx(2 * COMPILES_S, rel=0.01)
    assert machine.clock.seconds == pytest.approx(3 * COMPILES_S, rel=0.05)


def test_a_reference_alone_takes_no_first_steps_twice():
    machine = Machine(max_time_s=8)
    subject, memory = machine.step("none"), SimpleNamespace(step_s=[STEP_S] * 8)
    alone = Alone({}, memory, None, SimpleNamespace(joules=None))
    subject.compiled = True
    found = compare(machine.bench, alone, subject, None, reference=[], on_round=ignore_round)
    assert "first steps" not in found.stages_s
    assert found.first_s == STEP_S
    assert machine.clock.seconds < 9


def test_the_higher_of_two_readings_is_the_ceiling_for_all_methods_of_a_process(looks):
    machine = Machine(max_time_s=0.1)
    for _ in range(2):
        found = machine.session()
        both = LOW.model_copy(update={"matmul_flop_per_s": LATER.matmul_flop_per_s})
        assert found.bench.ceilings == both
    assert looks == [(torch.device("cpu"), "fp32")]


def test_a_full_device_keeps_its_first_reading(monkeypatch):
    def fill(device, precision):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(session, "measure_ceilings", fill)
    assert Machine(max_time_s=0.1).session().bench.ceilings == LOW
