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
from kdprof.reports.results import Results
from kdprof.reports.verdict_text import gain_text, markdown, need_text, probability_text
from kdprof.stats.gain import Curve, compute_equivalent_gain
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
