"""Verdicts: known answers, independent formulas, and simulated studies whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from simulated_verdicts import Setting, decide, run, simulate

from kdprof.errors import UserError
from kdprof.records import Run
from kdprof.reports.axes import axis
from kdprof.reports.judge import evidence, gain, judge
from kdprof.reports.judge import pair as difference
from kdprof.reports.results import Results
from kdprof.reports.verdict_text import gain_text, markdown, need_text, probability_text
from kdprof.stats.gain import Curve, compute_equivalent_gain, slope
from kdprof.stats.seeds import (
    Contrast,
    equal_variances,
    fit,
    further_seeds,
    pooling,
    tukey_factor,
)
from kdprof.stats.sequential import confidence_sequence

# Differences within seeds


def scores(**methods: dict[str, list[float]]) -> dict:
    """Return the scores of ``method={"budget": [seed 0, seed 1, ...]}``."""
    return {
        (method, budget): dict(enumerate(values))
        for method, budgets in methods.items()
        for budget, values in budgets.items()
    }


def test_two_methods_are_compared_by_the_paired_t_test():
    a, b = [70.1, 71.0, 69.2, 70.7], [69.5, 70.1, 69.0, 69.9]
    found = fit(scores(a={"x": a}, b={"x": b}), pool_budgets=False).difference("x", "a", "b")
    oracle = scipy.stats.ttest_rel(a, b)
    interval = oracle.confidence_interval(0.95)
    assert found.value == pytest.approx(0.625)
    assert found.freedom == 3
    assert found.interval(0.95) == pytest.approx((interval.low, interval.high))
    assert found.probability() == pytest.approx(1 - oracle.pvalue / 2)


def test_variance_is_pooled_over_methods_as_in_a_two_way_analysis_of_variance():
    rng = np.random.default_rng(0)
    table = 70 + rng.standard_normal((4, 3))  # methods x seeds
    found = fit(
        scores(**{f"m{i}": {"x": list(row)} for i, row in enumerate(table)}), pool_budgets=False
    )
    difference = found.difference("x", "m0", "m2")
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    mean_square = (residuals**2).sum() / (3 * 2)
    assert difference.freedom == 6
    assert difference.value == pytest.approx(table[0].mean() - table[2].mean())
    assert difference.error == pytest.approx(math.sqrt(2 * mean_square / 3))


def test_a_method_with_fewer_seeds_is_not_judged_by_which_seeds_it_got():
    # Seed 2 is bad for everybody; b was only trained with it left out and is 1 point better.
    found = fit(
        scores(a={"x": [70.0, 71.0, 60.0]}, b={"x": [71.0, 72.0]}, c={"x": [70.5, 71.5, 60.5]}),
        pool_budgets=False,
    )
    assert found.difference("x", "b", "a").value == pytest.approx(1.0)
    assert found.difference("x", "b", "a").error == pytest.approx(0.0, abs=1e-9)


def test_methods_that_share_no_seed_are_compared_by_the_unpaired_t_test():
    a, b = [70.0, 71.0, 70.4], [68.0, 69.5, 69.1]
    table = {("a", "x"): dict(enumerate(a)), ("b", "x"): dict(enumerate(b, 10))}
    found = fit(table, pool_budgets=False).difference("x", "a", "b")
    oracle = scipy.stats.ttest_ind(a, b)
    assert found.freedom == 4
    assert found.value / found.error == pytest.approx(oracle.statistic)


SHARED = [((0, 1), (1, 2)), ((0, 1, 2), (2, 3, 4))]
"""Seeds of two methods that share one: method + seed would fit any scores exactly."""


@pytest.mark.parametrize("seeds", SHARED)
def test_methods_that_share_too_few_seeds_are_compared_by_the_unpaired_t_test(seeds):
    rng = np.random.default_rng(3)
    a, b = (list(70 + rng.standard_normal(len(own))) for own in seeds)
    table = {
        (method, "x"): dict(zip(own, values, strict=True))
        for method, own, values in zip("ab", seeds, (a, b), strict=True)
    }
    model = fit(table, pool_budgets=False)
    found = model.difference("x", "a", "b")
    oracle = scipy.stats.ttest_ind(a, b)
    interval = oracle.confidence_interval(0.95)
    assert model.within_seeds == frozenset()
    assert found.freedom == len(a) + len(b) - 2
    assert found.interval(0.95) == pytest.approx((interval.low, interval.high))


def test_two_shared_seeds_give_the_paired_t_test_of_these_two():
    a, b = {0: 70.0, 1: 71.2, 2: 70.1}, {1: 71.9, 2: 70.5, 3: 68.0}
    model = fit({("a", "x"): a, ("b", "x"): b}, pool_budgets=False)
    found = model.difference("x", "a", "b")
    oracle = scipy.stats.ttest_rel([a[1], a[2]], [b[1], b[2]])
    interval = oracle.confidence_interval(0.95)
    assert model.within_seeds == {"x"}
    assert found.freedom == 1
    assert found.interval(0.95) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("seeds", [*SHARED, ((0, 1, 2), (1, 2, 3)), ((0, 1), (1, 2), (2, 3))])
def test_equal_methods_with_few_shared_seeds_rarely_differ_significantly(seeds):
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(600):
        effect = 0.7 * rng.standard_normal(6)
        table = {
            (f"m{i}", "x"): {seed: 70 + effect[seed] + rng.standard_normal() for seed in own}
            for i, own in enumerate(seeds)
        }
        low, high = fit(table, pool_budgets=False).difference("x", "m0", "m1").interval(0.95)
        wrong += not low <= 0 <= high
    # 5 % and three standard deviations of 600 draws; less where seeds' effects widen the interval.
    assert wrong / 600 <= 0.077


def test_a_budget_without_seeds_effects_keeps_its_own_variance_when_budgets_are_pooled():
    """Within seeds x has almost no noise; in y the seeds' effects are part of it."""
    table = scores(a={"x": [70.0, 74.1, 67.0]}, b={"x": [70.1, 74.0, 67.0]})
    table |= {("a", "y"): {0: 70.0, 1: 74.0}, ("b", "y"): {1: 74.1, 2: 67.2}}
    model = fit(table, pool_budgets=True)
    found = model.difference("y", "a", "b")
    oracle = scipy.stats.ttest_ind([70.0, 74.0], [74.1, 67.2])
    assert model.within_seeds == {"x"}
    assert found.freedom == 2
    assert found.value / found.error == pytest.approx(oracle.statistic)
    assert model.difference("x", "a", "b").freedom == 2


def test_gains_hold_where_two_methods_share_one_seed():
    rng, inside = np.random.default_rng(0), []
    for _ in range(80):
        results, truth = simulate(Setting(2, 3, 3, seed_effect=0.6), rng)
        kept = [run for run in results.finished if run.seed in ((0, 1), (1, 2))[run.method == "kd"]]
        for each in judge(_results(kept), ["none"]).gains:
            if each.axis == "seconds" and each.value is not None:
                true = truth.gain("seconds", "kd", "none")
                inside.append((each.low or 0) <= true <= (each.high or math.inf))
    assert len(inside) > 60
    assert np.mean(inside) >= 0.9


def test_without_a_degree_of_freedom_there_is_no_interval_but_a_reason():
    results = a_study(Setting(3, 2, 2))
    found = evidence(results)
    nothing = replace(found.pooled, freedom=dict.fromkeys(results.budgets(), 0.0))
    blind = replace(found, pooled=nothing)
    gap = difference(blind, results.budgets()[0], "kd", "none")
    factor = gain(blind, "kd", "none", axis(results, "iterations"))
    for one in (gap, factor):
        assert (one.low, one.high, one.probability) == (None, None, None)
        assert one.reason == "no interval: the runs say nothing about their variance"
    assert not factor.has_interval


def test_a_budget_that_one_method_alone_was_trained_at_is_part_of_its_curve():
    runs = [run for run in _line("kd", 0.1, 0.0) if run.budget != "400s"]
    verdict = judge(_results([*runs, *_line("a", 0.2, 2.5)]))
    (found,) = [g for g in verdict.gains if (g.method, g.axis) == ("a", "seconds")]
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(math.sqrt(2) / 2, rel=0.1)


def test_what_seeds_share_between_budgets_does_not_cancel_in_a_gain():
    """With seed effects above the noise, D of two budgets varies by them, too."""
    found = run(Setting(4, 3, 4, noise=0.2, seed_effect=0.8), 60)
    hits, trials = found.gains
    assert hits / trials == pytest.approx(0.95, abs=0.05)


def test_equal_scores_are_no_evidence():
    table = {m: {"x": [70.1, 70.7, 69.9], "y": [71.3, 71.1, 72.2]} for m in ("a", "b", "c")}
    found = fit(scores(**table), pool_budgets=True).difference("x", "a", "b")
    assert (found.value, found.error) == (0.0, 0.0)
    assert found.probability() == 0.5


def test_the_better_method_of_a_pair_is_named_first_with_unequal_seeds():
    runs = a_study(Setting(4, 2, 4, seed_effect=3.0)).finished
    fewer = [run for run in runs if run.method != "m0" or run.seed < 2]
    verdict = judge(_results(fewer))
    assert all(pair.difference >= 0 for pair in verdict.pairs)
    assert all(pair.probability >= 0.5 for pair in verdict.pairs)


def test_nothing_is_not_a_number(tmp_path):
    """Folders as they are left: seeds missing here and there, budgets of one method."""
    rng = np.random.default_rng(7)
    for number in range(40):
        runs = a_study(Setting(4, 3, 3, trunk=bool(number % 2)), number).finished
        kept = [run for run in runs if rng.random() < 0.7]
        verdict = judge(_results(kept)) if kept else None
        numbers = [] if verdict is None else [
            value for one in (*verdict.gains, *verdict.pairs, *verdict.flips)
            for value in vars(one).values() if isinstance(value, float)
        ]  # fmt: skip
        assert np.isfinite(numbers).all()


def test_noise_shared_by_the_budgets_of_a_trunk_is_not_counted_as_several_observations():
    rng = np.random.default_rng(1)
    common = rng.standard_normal((3, 6))
    table = {f"m{i}": {b: list(70 + common[i]) for b in "xyz"} for i in range(3)}
    model = fit(scores(**table), pool_budgets=False)
    weights = np.zeros((1, 9))
    for cell, sign in (("m0", 1), ("m1", -1)):
        for budget in "xyz":
            weights[0, model.cells.index((cell, budget))] = sign / 3
    _, (error,), (freedom,) = model.contrasts(weights)
    assert error == pytest.approx(model.difference("x", "m0", "m1").error)
    assert freedom == pytest.approx(10)


def test_equal_variances_is_bartletts_test_and_holds_with_two_values_per_group():
    rng = np.random.default_rng(2)
    groups = rng.standard_normal((4, 30)) * np.array([[1], [1.2], [1], [1.5]])
    assert equal_variances(groups) == pytest.approx(scipy.stats.bartlett(*groups).pvalue, abs=0.02)
    pairs = rng.standard_normal((400, 5, 2))
    assert np.mean([equal_variances(study) < 0.05 for study in pairs]) == pytest.approx(
        0.05, abs=0.03
    )


@pytest.mark.parametrize(
    ("groups", "p"),
    [([[1.0, 1.0], [2.0, 2.0]], 1.0), ([[1.0, 2.0]], 1.0), ([[1.0], [2.0]], 1.0)],
)
def test_variances_that_cannot_be_compared_do_not_differ(groups, p):
    assert equal_variances(groups) == p


def test_a_run_that_never_varies_among_others_that_do_ends_the_pooling():
    rng = np.random.default_rng(0)
    table = {f"m{i}": {"x": list(rng.standard_normal(5))} for i in range(3)}
    assert pooling(scores(**table), independent=True).methods
    assert not pooling(scores(**table, still={"x": [70.0] * 5}), independent=True).methods


def test_tukey_factor_is_that_of_the_tables():
    assert tukey_factor(3, 10, 0.95) == pytest.approx(3.877 / math.sqrt(2), rel=1e-3)
    assert tukey_factor(2, 10, 0.95) == pytest.approx(scipy.stats.t.ppf(0.975, 10), rel=1e-6)


def test_further_seeds_have_the_power_that_they_promise():
    contrast = Contrast(value=1.0, error=1.0 / math.sqrt(3), freedom=2.0)
    more = further_seeds(contrast, 3, 0.95)
    rng = np.random.default_rng(3)
    trials = 1.0 + rng.standard_normal((4000, 3 + more))
    won = scipy.stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05
    assert won.mean() == pytest.approx(0.9, abs=0.03)
    assert further_seeds(Contrast(5.0, 0.1, 4.0), 3, 0.95) == 0
    assert further_seeds(Contrast(0.0, 1.0, 4.0), 3, 0.95) is None
    assert further_seeds(Contrast(0.0, 0.0, 4.0), 3, 0.95) is None


# Compute-equivalent gain


def lines(shift: float, slope: float = 2.0, seeds: int = 3, noise: float = 0.0):
    """Return the gain of a straight curve over another, which needs ``shift`` times the compute."""
    rng = np.random.default_rng(4)
    logs = np.log([1.0, 2.0, 4.0])
    table = {
        name: {
            budget: list(60 + slope * (at + up) + noise * rng.standard_normal(seeds))
            for budget, at in zip("xyz", logs, strict=True)
        }
        for name, up in (("a", math.log(shift)), ("b", 0.0))
    }
    model = fit(scores(**table), pool_budgets=True)
    curves = [Curve([(name, budget) for budget in "xyz"], logs) for name in "ab"]
    return compute_equivalent_gain(model, *curves, confidence=0.95)


@pytest.mark.parametrize("shift", [0.4, 0.7, 1.0, 1.3, 2.5])
def test_the_gain_of_a_shifted_curve_is_the_shift(shift):
    found = lines(shift, noise=1e-4)
    assert found.bound == ""
    assert found.value == pytest.approx(shift, rel=1e-3)
    assert found.low < shift < found.high
    assert found.probability == pytest.approx(0.5 + 0.5 * np.sign(shift - 1), abs=0.4)


@pytest.mark.parametrize(("shift", "bound", "limit"), [(9.0, ">", 4.0), (0.1, "<", 0.25)])
def test_a_gain_beyond_the_budgets_is_a_bound_not_an_extrapolation(shift, bound, limit):
    found = lines(shift, noise=1e-4)
    assert (found.bound, found.value) == (bound, pytest.approx(limit))
    ends = (found.low, found.high)
    assert ends == ((pytest.approx(4.0), None) if bound == ">" else (None, pytest.approx(0.25)))


def test_curves_that_noise_covers_have_no_limits():
    found = lines(1.0, slope=0.0, noise=1.0)
    assert (found.low, found.high) == (None, None)


def test_where_noise_breaks_the_curves_the_gain_is_the_length_of_the_better_part():
    # D falls from + to -, rises above 0 and falls again: one crossing after rearrangement.
    logs = np.log([1.0, 2.0, 4.0, 8.0])
    table = {"a": dict(zip("wxyz", [60, 63, 61, 64], strict=True)),
             "b": dict(zip("wxyz", [60, 62, 62, 64], strict=True))}  # fmt: skip
    model = fit(
        {(m, b): {0: v} for m, budgets in table.items() for b, v in budgets.items()},
        pool_budgets=False,
    )
    curves = [Curve([(name, budget) for budget in "wxyz"], logs) for name in "ab"]
    found = compute_equivalent_gain(model, *curves, confidence=0.95, intervals=False)
    assert found.bound == ""
    assert found.value == pytest.approx(1.0, rel=0.1)
    assert (found.low, found.high, found.probability) == (None, None, None)


def test_uncertain_costs_widen_the_gain():
    narrow = lines(1.3, noise=0.05)
    logs = np.log([1.0, 2.0, 4.0])
    rng = np.random.default_rng(4)
    table = {
        name: {
            budget: list(60 + 2 * (at + up) + 0.05 * rng.standard_normal(3))
            for budget, at in zip("xyz", logs, strict=True)
        }
        for name, up in (("a", math.log(1.3)), ("b", 0.0))
    }
    model = fit(scores(**table), pool_budgets=True)
    curves = [Curve([(name, budget) for budget in "xyz"], logs) for name in "ab"]
    wide = compute_equivalent_gain(model, *curves, confidence=0.95, cost_error=0.2)
    assert wide.value == narrow.value
    assert math.log(wide.high / wide.value) == pytest.approx(
        math.hypot(math.log(narrow.high / narrow.value), 0.2)
    )
    assert wide.probability < narrow.probability


# Curves that do not rise, and ties


def _curves(miou_percent: dict[str, list[list[float]]]) -> Results:
    """Return runs of ``method: [seeds at 100 s, at 200 s, ...]``; an iteration takes 0.1 s."""
    template = a_study(Setting(3, 1, 1)).finished[0]
    runs = []
    for method, budgets in miou_percent.items():
        for place, scores in enumerate(budgets):
            seconds = 100.0 * 2**place
            spent = template.train_s.model_copy(update={"planned": seconds, "actual": seconds})
            changes = {"method": method, "budget": f"{seconds:g}s", "train_s": spent,
                       "iterations_done": round(10 * seconds)}  # fmt: skip
            runs += [
                template.model_copy(update=changes | {"seed": seed, "miou": score / 100})
                for seed, score in enumerate(scores)
            ]
    return _results(runs)


FALLING = [[72, 72.2, 71.9], [70.1, 70, 70.2], [68, 68.1, 67.9]]
RISING = [[66, 66.2, 65.9], [68.1, 68, 68.2], [70, 70.1, 69.9]]


@pytest.mark.parametrize(
    ("fitnet", "kd", "who"),
    [(FALLING, FALLING, "fitnet and kd"), (FALLING, RISING, "fitnet"), (RISING, FALLING, "kd")],
)
def test_a_curve_that_falls_with_compute_has_no_gain(fitnet, kd, who):
    """Where both fall, the curve of the better method lies at less compute than the control's at
    equal accuracy, or at more: the crossing of D is no gain."""
    better = [[score + 1 for score in scores] for scores in fitnet]
    results = _curves({"kd": kd, "fitnet": better})
    verdict = judge(results)
    (found,) = [g for g in verdict.gains if g.axis == "seconds"]
    assert (found.value, found.low, found.high, found.probability) == (None, None, None, None)
    assert found.reason == f"accuracy of {who} does not rise with compute"
    assert found.reason in verdict.sentences[0]


def test_a_rise_that_the_seeds_do_not_show_gives_no_interval():
    """At equal compute fitnet is surely better within seeds; whether accuracy rises is noise of
    the seeds, whose effects differ from budget to budget."""
    kd = [[66.0, 70.0, 68.0], [70.2, 66.3, 69.0]]
    fitnet = [[score + 0.2 + 0.01 * seed for seed, score in enumerate(scores)] for scores in kd]
    verdict = judge(_curves({"kd": kd, "fitnet": fitnet}))
    (found,) = [g for g in verdict.gains if g.axis == "seconds"]
    assert found.value > 1
    assert (found.has_interval, found.low, found.high, found.probability) == (False, *[None] * 3)
    assert "accuracy of fitnet and kd may not rise with compute" in found.reason
    assert found.reason in verdict.sentences[0]
    assert verdict.pairs[0].probability > 0.95


def test_curves_that_are_flat_in_truth_seldom_get_a_gain_with_an_interval():
    """Both are noise around levels one point apart: no compute makes the control as good."""
    rng, stated = np.random.default_rng(1), 0
    for _ in range(60):
        shared = 0.4 * rng.standard_normal((3, 3))
        points = {
            name: (level + shared + 0.4 * rng.standard_normal((3, 3))).tolist()
            for name, level in (("kd", 70.0), ("a", 71.0))
        }
        (found,) = [g for g in judge(_curves(points)).gains if g.axis == "seconds"]
        stated += found.has_interval
    assert stated <= 3  # 5 %


def test_the_slope_is_that_of_a_regression_of_the_means():
    logs = np.log([1.0, 2.0, 5.0])
    model = fit(scores(a={"x": [60.0, 61], "y": [62.0, 63], "z": [61.0, 64]}), pool_budgets=False)
    found = slope(model, Curve([("a", budget) for budget in "xyz"], logs))
    assert found.value == pytest.approx(scipy.stats.linregress(logs, [60.5, 62.5, 62.5]).slope)


def test_runs_that_are_all_equal_have_no_gain_and_share_the_chance():
    flat = [[70.0, 70.0], [70.0, 70.0]]
    verdict = judge(_curves({"kd": flat, "fitnet": flat, "cwd": flat}))
    assert {found.value for found in verdict.gains} == {None}
    assert all("does not rise with compute" in found.reason for found in verdict.gains)
    for chances in verdict.best.values():
        assert chances == pytest.approx(dict.fromkeys(("cwd", "fitnet", "kd"), 1 / 3))
    assert {found.more_seeds for found in verdict.pairs} == {None}
    assert verdict.flips == []
    assert verdict.sentences[1] == "At 200s, cwd and fitnet have the same mean (P(best) = 0.33)."


def test_two_curves_with_a_common_step_have_inverse_gains():
    """D is 0 over a whole range of shifts; half of it counts for each."""
    a, b = [[60.0], [60.0], [70.0]], [[50.0], [60.0], [60.0]]
    found = {
        (one.method, one.versus): one.value
        for one in judge(_curves({"a": a, "b": b}), versus=["a", "b"]).gains
        if one.axis == "seconds"
    }
    assert found["a", "b"] == pytest.approx(2**1.5, rel=0.01)
    assert found["a", "b"] * found["b", "a"] == pytest.approx(1)


# Verdicts on simulated studies


def a_study(setting: Setting, seed: int = 0) -> Results:
    return simulate(setting, np.random.default_rng(seed))[0]


@pytest.mark.parametrize(
    "setting",
    [Setting(3, 3, 3), Setting(4, 4, 2, trunk=True), Setting(4, 3, 3, equal=True)],
    ids=str,
)
def test_intervals_contain_the_truth_as_often_as_they_say(setting):
    """docs/verdicts.md has 1000 studies of each; these 60 would show a mistake of a formula."""
    found = run(setting, 60)
    for hits, trials in (found.pairs, found.gains):
        assert hits / trials == pytest.approx(0.95, abs=0.05)
    false, pairs = found.flips
    assert false / pairs <= 0.05


def test_a_flip_that_the_costs_make_is_found_and_named():
    cheap, dear = _line("cheap", 0.1, 0.0), _line("dear", 0.4, 1.0)
    results = _results([*cheap, *dear])
    verdict = judge(results)
    (flip,) = [flip for flip in verdict.flips if flip.axes == ("iterations", "seconds")]
    assert (flip.first, flip.second) == ("dear", "cheap")
    assert flip.probability > 0.95
    assert "dear > cheap reverses (P > 0.99)" in verdict.sentences[-1]
    assert verdict.best["400s"]["cheap"] > 0.99


def _line(method: str, seconds: float, points: float) -> list[Run]:
    """Return runs whose mIoU grows by 5 points per doubling of the iterations."""
    template = a_study(Setting(3, 1, 1)).finished[0]
    rng = np.random.default_rng(len(method))
    runs = []
    for budget in (100.0, 200.0, 400.0):
        iterations = round(budget / seconds)
        for seed in range(3):
            miou = 30 + points + 5 * math.log2(iterations / 250) + 0.05 * rng.standard_normal()
            spent = template.train_s.model_copy(update={"planned": budget, "actual": budget})
            change = {"method": method, "budget": f"{budget:g}s", "seed": seed, "train_s": spent,
                      "iterations_done": iterations, "miou": miou / 100}  # fmt: skip
            runs.append(template.model_copy(update=change))
    return runs


def _results(runs: list[Run]) -> Results:
    return Results(runs, [], None, {"step": {"batch": 8}}, [])


def test_the_gain_in_seconds_counts_what_an_iteration_costs():
    results = _results([*_line("kd", 0.1, 0.0), *_line("a", 0.2, 2.5)])
    found = evidence(results)
    by_iterations = gain(found, "a", "kd", axis(results, "iterations"))
    by_seconds = gain(found, "a", "kd", axis(results, "seconds"))
    assert by_iterations.value == pytest.approx(math.sqrt(2), rel=0.05)
    assert by_seconds.value == pytest.approx(math.sqrt(2) / 2, rel=0.05)
    assert by_seconds.probability < 0.01
    assert need_text(by_seconds).startswith("1.4")


def test_one_seed_has_no_probability_and_the_sentences_say_so():
    verdict = judge(a_study(Setting(4, 2, 1)))
    assert {gain.probability for gain in verdict.gains} == {None}
    assert {(gain.low, gain.high) for gain in verdict.gains} == {(None, None)}
    assert {pair.low for pair in verdict.pairs} == {None}
    assert verdict.best == {}
    assert "one seed" in verdict.sentences[0]
    assert "one seed" in verdict.sentences[1]


def test_one_budget_has_no_gain_and_the_sentence_says_what_to_run():
    verdict = judge(a_study(Setting(3, 1, 3)))
    assert {gain.value for gain in verdict.gains} == {None}
    assert "run 'kdprof train --budget 1000@none'" in verdict.sentences[0]


def test_a_control_that_was_not_trained_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'none'"):
        judge(a_study(Setting(3, 2, 2)), versus=["nome"])


def test_runs_of_two_devices_have_no_gain_in_seconds():
    runs = a_study(Setting(3, 2, 2)).finished
    mixed = [run.model_copy(update={"device": "other"}) if run.seed else run for run in runs]
    verdict = judge(_results(mixed))
    assert {gain.axis for gain in verdict.gains} == {"samples", "iterations"}
    assert any("different devices" in note for note in verdict.notes)


def test_the_markdown_has_every_number_of_the_verdict():
    results = a_study(Setting(4, 3, 3))
    verdict = judge(results)
    text = markdown(results, verdict)
    for one in verdict.gains:
        assert gain_text(one) in text
    for pair in verdict.pairs:
        assert f"| {pair.first} | {pair.second} | {pair.difference:+.2f} |" in text


def test_probabilities_are_never_certain():
    shown = [probability_text(p) for p in (1.0, 0.995, 0.5, 0.0)]
    assert shown == ["> 0.99", "> 0.99", "0.50", "< 0.01"]


def test_uneven_noise_is_noticed_and_pairs_keep_their_own_variance():
    verdict = judge(a_study(replace(Setting(5, 3, 5), uneven=20.0)))
    assert any("own variance" in note for note in verdict.notes)
    # Without a common variance the intervals of all pairs are Bonferroni's, which are wider.
    assert all(p.simultaneous_low < p.low and p.high < p.simultaneous_high for p in verdict.pairs)


# Intervals for those who look after every seed


def test_the_ends_of_the_sequence_are_where_the_likelihood_ratio_reaches_twenty():
    data, scale = [0.9, 1.4, 0.7, 1.9, 1.2], 1.5
    for end in confidence_sequence(data, 0.95, scale=scale):
        shifted = np.asarray(data) - end
        t = shifted.mean() / shifted.std(ddof=1) * math.sqrt(len(data))

        def integrand(effect: float, t: float = t) -> float:
            likelihood = scipy.stats.nct.pdf(t, len(data) - 1, effect * math.sqrt(len(data)))
            return likelihood * scipy.stats.norm.pdf(effect, 0, scale)

        mixture = scipy.integrate.quad(integrand, -12, 12, points=[0, 1, 2, 3], limit=200)[0]
        assert mixture / scipy.stats.t.pdf(t, len(data) - 1) == pytest.approx(20, rel=1e-3)


def test_one_difference_excludes_nothing():
    assert confidence_sequence([3.0], 0.95) == (-math.inf, math.inf)


def test_looking_after_every_seed_is_wrong_in_at_most_five_percent():
    assert decide(0.0, 1000, scale=1.5).wrong <= 50
    certain = decide(3.0, 300, scale=1.5)
    assert certain.wrong == 0
    assert certain.right / 300 > 0.98
    assert certain.seeds / 300 < 7
