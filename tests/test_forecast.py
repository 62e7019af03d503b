"""The forecast of steps on a GPU: by hand, scored against what an H200 took, and its page."""

import forecast
import numpy as np
import pytest
from forecast import Device, Timed, Work

DEVICE = Device(flop_per_s=1e12, bytes_per_s=1e9)


def step(flop: float, size: float, seconds: float) -> Timed:
    """A step whose networks take twice their ideal time of 1 s, with an objective."""
    work = dict.fromkeys((*forecast.NETWORKS, forecast.LOSS), Work(5e11, 5e8))
    taken = dict.fromkeys(work, 2.0)
    work |= {"objective": Work(flop, size)}
    return Timed(8.0 + seconds, taken | {"objective": seconds}, work)


def test_the_ideal_time_is_that_of_flop_and_of_bytes():
    assert DEVICE.ideal_s(Work(2e12, 3e9)).tolist() == [2.0, 3.0]


def test_fractions_are_found_again():
    """Objectives that reach 0.8 of the FLOP and 0.25 of the bytes: 1 / 0.8 + 2 / 0.25 = 9.25 s."""
    steps = [step(1e12, 2e9, 9.25), step(4e12, 1e9, 9.0), step(0, 1e9, 4.0)]
    reached = forecast.fractions(DEVICE, steps)
    assert reached.phases == dict.fromkeys((*forecast.NETWORKS, forecast.LOSS), 0.5)
    assert reached.objective == pytest.approx([0.8, 0.25])
    assert reached.spread == pytest.approx(0, abs=1e-9)
    assert reached.loss_miss == pytest.approx(2 / (0.5 / 0.8 + 0.5 / 0.25))
    found = forecast.forecast(DEVICE, step(8e12, 0, 0).work, reached, old_loss=True)
    assert found.seconds == pytest.approx(8 + 8 / 0.8)
    assert found.objective_s == pytest.approx(8 / 0.8)


def test_another_task_loss_is_forecast_like_an_objective():
    """The upper end allows for the miss of the task loss that was timed, if that is larger."""
    networks = dict.fromkeys(forecast.NETWORKS, 0.5)
    loss_s, factor = 0.5 / 0.8 + 0.5 / 0.25, np.exp(1.96 * 0.5)
    for loss_miss, most in ((1.5, factor), (4.0, 4.0)):
        reached = forecast.Fractions(networks, np.array([0.8, 0.25]), 0.5, loss_miss)
        found = forecast.forecast(DEVICE, step(0, 0, 0).work, reached, old_loss=False)
        assert found.seconds == pytest.approx(6 + loss_s)
        assert found.low == pytest.approx(6 + loss_s / factor)
        assert found.high == pytest.approx(6 + loss_s * most)
        assert found.objective_s == 0


def test_the_score_against_the_h200():
    """Every method is forecast from the others; the table says each error."""
    print(forecast.score_table())
    scores = forecast.scores()
    errors = {name: found.seconds / one.step_s - 1 for name, (one, found) in scores.items()}
    assert len(errors) == 18
    family = {name for name, error in errors.items() if abs(error) > 0.06}
    assert family == {"cirkd", "cirkd:minibatch", "cirkdv2"}
    assert max(abs(error) for error in errors.values()) < 0.26


def test_the_interval_holds_what_was_timed():
    outside = [
        name
        for name, (one, found) in forecast.scores().items()
        if not 0.97 * found.low <= one.step_s <= 1.03 * found.high
    ]
    assert outside == []


def test_the_page_shows_these_tables():
    page = forecast.PAGE.read_text()
    made = "python benchmarks/forecast.py --update"
    assert forecast.page_with_tables(page) == page, f"make docs/reproduce.md again: {made}"
    assert forecast.score_table() in page
    assert forecast.forecast_table() in page
