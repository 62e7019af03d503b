import re
from decimal import Decimal
from math import exp

import pytest
from cost_records import make_cost, ratio
from hypothesis import given, settings
from hypothesis import strategies as st

from kdprof.budget import _UNITS, _amount_behind, convert, parse_budget
from kdprof.errors import UserError


@pytest.mark.parametrize(
    ("text", "amount", "unit", "method"),
    [
        ("40k@cwd", 40_000, "iterations", "cwd"),
        ("500@cwd:feature", 500, "iterations", "cwd:feature"),
        ("40k", 40_000, "iterations", None),
        ("1.5k", 1500, "iterations", None),
        ("2M", 2_000_000, "iterations", None),
        ("2h", 7200, "s", None),
        ("30min", 1800, "s", None),
        ("90 s", 90, "s", None),
        ("1.5d", 129_600, "s", None),
        ("5e17flop", 5e17, "flop", None),
        ("3Pflop", 3e15, "flop", None),
        ("800kJ", 8e5, "J", None),
        ("1.5kWh", 5.4e6, "J", None),
        ("320ksample+100ksample", 420_000, "samples", None),
        ("10k@mgd:one+5k@mgd:one", 15_000, "iterations", "mgd:one"),
        ("10k@kd+cwd", 10_000, "iterations", "kd+cwd"),
        ("10k@kd+2x", 10_000, "iterations", "kd+2x"),
        ("10k@kd+cwd + 5e+2@kd+cwd", 10_500, "iterations", "kd+cwd"),
        ("5e+17flop+1e+17flop", 6e17, "flop", None),
    ],
)
def test_parse(text, amount, unit, method):
    budget = parse_budget(text)
    assert (budget.amount, budget.unit, budget.method) == (pytest.approx(amount), unit, method)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "malformed"),
        ("soon", "malformed"),
        ("-3h", "malformed"),
        ("40q", "unknown unit 'q'"),
        ("2h@cwd", "only iterations"),
        ("0", "smaller than one iteration"),
        ("0s", "smaller than one iteration"),
        ("1.5", "not a whole number"),
        ("0.5@kd", "not a whole number"),
        ("40k@", "malformed"),
        ("1h+", "malformed"),
        ("+1h", "malformed"),
        ("1h++1h", "malformed"),
        ("10k@kd+5k@cwd", "cannot be added"),
        ("10k@kd+2h", r"'\+2h' is no iterations of a method, so it cannot be added"),
        ("10k@kd+5k", r"such as \+5k@METHOD, or give two budgets"),
        ("10k@kd + 5", r"'\+5' is no iterations"),
        ("10k+5k@cwd", "cannot be added"),
    ],
)
def test_malformed_budget_says_what_to_write(text, cause):
    with pytest.raises(UserError, match=cause) as error:
        parse_budget(text)
    assert "\n" not in str(error.value)


def by_method(text, costs):
    return {c.method: c for c in convert(parse_budget(text), costs)}


def test_iterations_of_another_method_by_hand():
    """kd takes half as long as cwd, so it gets twice the iterations."""
    found = by_method("40k@cwd", {"cwd": make_cost("cwd", 0.2), "kd": make_cost("kd", 0.1)})
    assert found["cwd"].iterations == 40_000
    assert found["kd"].iterations == 80_000
    assert found["kd"].seconds == pytest.approx(8000)
    assert found["kd"].iterations_equal_flop == 40_000


def test_seconds_flop_and_plain_iterations_by_hand():
    costs = {"a": make_cost("a", 0.5, flop=2e9), "b": make_cost("b", 0.25, flop=8e9)}
    assert {m: c.iterations for m, c in by_method("2min", costs).items()} == {"a": 240, "b": 480}
    assert {m: c.iterations for m, c in by_method("4e12flop", costs).items()} == {
        "a": 2000,
        "b": 500,
    }
    assert {m: c.iterations for m, c in by_method("7k", costs).items()} == {"a": 7000, "b": 7000}
    assert by_method("7k", costs)["a"].seconds == pytest.approx(3500)


def test_only_ratios_compare_methods():
    """Measured while the machine was three times slower, kd still takes half as long as cwd."""
    cwd = make_cost("cwd", 0.2, ratio=ratio(2.0))
    kd = make_cost("kd", 0.3, ratio=ratio(1.0))
    assert by_method("1000@cwd", {"cwd": cwd, "kd": kd})["kd"].iterations == 2000


def test_errors_of_two_sessions_add_up_in_quadrature():
    """3 and 4 % make 5 %."""
    cwd, kd = make_cost("cwd", ratio=ratio(2.0, 0.03)), make_cost("kd", ratio=ratio(1.0, 0.04))
    found = by_method("100k@cwd", {"cwd": cwd, "kd": kd})["kd"]
    assert found.iterations == 200_000
    assert found.low == pytest.approx(200_000 * exp(-0.05), abs=1)
    assert found.high == pytest.approx(200_000 * exp(0.05), abs=1)


def test_what_is_made_of_unreliable_costs_says_so():
    costs = {
        "none": make_cost("none", 0.1, ratio=ratio(1.0)),
        "kd": make_cost("kd", 0.2, ratio=ratio(2.0), reliable=False),
        "cwd": make_cost("cwd", 0.2, ratio=ratio(2.0)),
    }
    assert by_method("100@kd", costs)["cwd"].unreliable == ("kd",)
    assert by_method("100@cwd", costs)["kd"].unreliable == ("kd",)
    assert by_method("100@cwd", costs)["none"].unreliable == ()
    assert by_method("100", costs)["kd"].unreliable == ()


def test_seconds_are_the_references_times_the_ratio():
    """So that equal budgets are equal seconds, whenever the methods were measured."""
    none = make_cost("none", 0.1, ratio=ratio(1.0))
    kd = make_cost("kd", 0.5, ratio=ratio(2.0))
    found = by_method("100@kd", {"none": none, "kd": kd})
    assert found["kd"].seconds == pytest.approx(20)
    assert found["none"].seconds == pytest.approx(20)
    assert by_method("60s", {"none": none, "kd": kd})["kd"].iterations == 300


def test_one_disturbed_session_does_not_set_the_scale():
    """Beside cwd the reference took a hundred times its time; three sessions say 0.1 s."""
    costs = {name: make_cost(name, 0.2, ratio=ratio(2.0)) for name in ("none", "kd", "fitnet")}
    slow = make_cost("cwd", 20.0, ratio=ratio(2.0), reference_samples_s=[[10.0] * 2] * 4)
    found = by_method("60s", {**costs, "cwd": slow})
    assert {c.iterations for c in found.values()} == {300}


def test_interval_follows_from_the_measurement():
    found = by_method("100s", {"a": make_cost("a", ratio=ratio(1.0, 0.25))})["a"]
    expected = [1000 * exp(-0.25), 1000, 1000 * exp(0.25)]
    assert [found.low, found.iterations, found.high] == pytest.approx(expected, abs=1)


def test_loader_seconds_are_used_where_they_were_measured():
    fed = {"end_to_end_samples_s": [0.4] * 4, "reference_end_to_end_samples_s": [0.1] * 4}
    cost = make_cost("a", 0.2, end_to_end_ratio=ratio(4.0), **fed)
    assert by_method("40s", {"a": cost})["a"].iterations == 100


def test_budget_below_one_iteration_names_every_method():
    costs = {"a": make_cost("a", 30.0), "b": make_cost("b", 40.0), "c": make_cost("c", 1.0)}
    with pytest.raises(UserError) as error:
        convert(parse_budget("10s"), costs)
    assert len(error.value.problems) == 2


def test_energy_is_refused_with_its_reason():
    with pytest.raises(UserError, match="no counter"):
        convert(parse_budget("800kJ"), {"a": make_cost("a", 1.0)})


def test_unmeasured_reference_names_the_command():
    with pytest.raises(UserError, match="kdprof measure --method cwd"):
        convert(parse_budget("40k@cwd"), {"a": make_cost("a", 1.0)})


@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.integers(100, 10**6))
def test_equal_compute_means_equal_seconds(one, other, iterations):
    costs = {"a": make_cost("a", one), "b": make_cost("b", other)}
    found = convert(parse_budget(f"{iterations * 1000}@a"), costs)
    seconds = [c.seconds for c in found]
    assert seconds[1] == pytest.approx(seconds[0], rel=max(1e-3, other / seconds[0]))


@pytest.mark.parametrize(
    ("text", "matched", "is_compute"),
    [
        ("40k@cwd", "wall-clock", True),
        ("1h+30min", "wall-clock", True),
        ("5e17flop", "FLOP", True),
        ("2Pflop", "FLOP", True),
        ("800kJ", "energy", True),
        ("1.5kWh", "energy", True),
        ("40k", "iterations", False),
        ("1e3", "iterations", False),
        ("2k+1k", "iterations", False),
        ("320ksample", "samples", False),
        ("20epoch", "epochs", False),
    ],
)
def test_a_budget_says_what_it_makes_equal(text, matched, is_compute):
    budget = parse_budget(text)
    assert (budget.matches, budget.is_compute) == (matched, is_compute)


@pytest.mark.parametrize(
    "text",
    ["1e400@kd", "1e308d", "1e309flop", "1e15@kd", "1e300h", "1e9epoch", "9" * 99, "9" * 5000,
     "+".join(["999999999@kd"] * 5), "1e400", "40k@../x", "40k@a.b", "1h+1e308d"],
)  # fmt: skip
def test_a_budget_is_finite_and_no_larger_than_any_training(text):
    with pytest.raises(UserError, match=r"more than|characters|no name of a method") as refused:
        parse_budget(text)
    assert len(str(refused.value)) < 400


NUMBERS = st.from_regex(r"\A[1-9](e[+]?[01])?\Z")
BLANKS = st.sampled_from(["", " "])
NAMES = (
    st.from_regex(r"\A[a-z0-9_+-]{1,6}(:[a-z0-9_+-]{1,6})?\Z")
    .filter(
        lambda name: not re.search(r"\de", name)  # x+5e+3k@... has an exponent
    )
    .filter(lambda name: not _amount_behind(name))
)  # kd+2h is refused: a sum of other things


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.sampled_from(sorted(_UNITS)), BLANKS)
def test_amounts_of_every_unit_can_be_added(numbers, unit, blank):
    total = sum(map(float, numbers)) * _UNITS[unit][1]
    budget = parse_budget(f"{blank}+{blank}".join(f"{number}{blank}{unit}" for number in numbers))
    assert (budget.amount, budget.unit) == (pytest.approx(total), _UNITS[unit][0])


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.sampled_from(["", "k"]), NAMES)
def test_iterations_of_every_method_can_be_added(numbers, unit, name):
    budget = parse_budget("+".join(f"{number}{unit}@{name}" for number in numbers))
    assert budget.method == name
    assert budget.amount == pytest.approx(sum(map(float, numbers)) * _UNITS[unit][1])


@settings(max_examples=300, deadline=None)
@given(
    st.from_regex(r"\A[0-9]{1,4}(\.[0-9]{1,2})?(e[+-]?[0-9]{1,3})?[a-zA-Z]{0,6}(@[a-z.:/]{1,5})?\Z")
)
def test_any_text_is_a_finite_budget_or_is_refused(text):
    try:
        budget = parse_budget(text)
    except UserError:
        return
    assert 0 < budget.amount < 1e28
    parse_budget(budget.half())


@pytest.mark.parametrize(("unit", "factor"), [("k", 10**3), ("M", 10**6)])
def test_every_written_number_of_whole_iterations_is_whole(unit, factor):
    """16.1 x 1000 and 4.1 x 1,000,000 are not whole in floats."""
    for places in (1, 2, 3):
        for digits in range(10**places, 10**places + 3000, 7):
            number = Decimal(digits).scaleb(-places)
            assert parse_budget(f"{number}{unit}").amount == int(number * factor)


@pytest.mark.parametrize("text", ["16.1005k", "2.0000001M", "1e-4k", "1e-400k"])
def test_parts_of_an_iteration_are_refused(text):
    with pytest.raises(UserError, match=r"whole number|smaller than one"):
        parse_budget(text)


def test_an_exponent_without_end_is_refused_at_once():
    for text in ("1e999999999k", "9e99999999999999999999", "1e308kWh"):
        with pytest.raises(UserError, match="more than"):
            parse_budget(text)
