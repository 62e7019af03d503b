"""What the verdict says in words: budgets, factors, marks and notes."""

from dataclasses import replace

import pytest
from cost_records import ratio
from run_records import a_cost, a_run, a_store

from kdprof.records import Failure, Run, Spent
from kdprof.reports.claims import effect_text, make_claim
from kdprof.reports.figures.files import render
from kdprof.reports.judge import judge
from kdprof.reports.page import render as render_page
from kdprof.reports.results import collect
from kdprof.reports.text import factor
from kdprof.reports.verdict import Gain
from kdprof.reports.verdict_text import gain_text, markdown, need_text
from kdprof.store import Store

Cells = dict[str, dict[str, tuple[float, dict[int, float]]]]


def runs_of(cells: Cells, **changes) -> list[Run]:
    """Return runs of ``method: {budget: (seconds, {seed: mIoU in %})}``, 10 iterations a second."""
    return [
        a_run(method, budget, seed, miou / 100, iterations=round(10 * seconds),
              iterations_done=round(10 * seconds), train_s=Spent(planned=seconds, actual=seconds),
              **changes)
        for method, budgets in cells.items()
        for budget, (seconds, scores) in budgets.items()
        for seed, miou in scores.items()
    ]  # fmt: skip


def seeds(*scores: float, first: int = 0) -> dict[int, float]:
    return dict(enumerate(scores, first))


def judged(store: Store) -> tuple[list[str], str]:
    """Return the sentences and the Markdown of the verdict on a folder."""
    results = collect(store)
    verdict = judge(results)
    return verdict.sentences, markdown(results, verdict)


# Budgets

TWICE = {
    "kd": {"1k": (100.0, seeds(70, 70.4, 70.1)), "2k": (200.0, seeds(72, 72.3, 71.8))},
    "fitnet": {"1k": (150.0, seeds(71, 71.2, 71.3)), "2k": (300.0, seeds(73, 73.4, 72.9))},
}


def test_without_a_budget_of_compute_the_sentence_says_what_is_equal(tmp_path):
    sentences, text = judged(a_store(tmp_path, runs_of(TWICE)))
    assert sentences[1].startswith("At equal iterations (2k), not equal compute, fitnet has the")
    assert "## 2k: differences at equal iterations" in text


def test_the_largest_budget_of_compute_is_spoken_of_not_a_larger_one_of_iterations(tmp_path):
    """2k takes fitnet 300 s, more than any other budget."""
    cells = {method: dict(budgets) for method, budgets in TWICE.items()}
    cells["kd"]["2k@kd"] = (200.0, seeds(72, 72.3, 71.8))
    cells["fitnet"]["2k@kd"] = (200.0, seeds(72.4, 72.8, 72.1))
    sentences, text = judged(a_store(tmp_path, runs_of(cells)))
    assert sentences[1].startswith("At 2k@kd, fitnet has the best mean")
    assert "## 2k@kd: differences at equal wall-clock" in text


# Factors


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0010, "0.0010"), (0.0423, "0.042"), (0.0996, "0.100"), (0.1, "0.10"), (0.81, "0.81"),
     (9.94, "9.94"), (9.96, "10"), (1234.5, "1,234")],
)  # fmt: skip
def test_a_factor_never_reads_as_zero(value, text):
    assert factor(value) == text


def test_large_gains_keep_their_inverse_and_its_ends():
    one = Gain("a", "kd", "seconds", 980.0, "", 740.0, None, has_interval=True, seeds=3)
    assert gain_text(one) == "980x [740 or more]"
    assert need_text(one) == "0.0010x [0.0014 or less]"
    assert need_text(replace(one, high=2000.0)) == "0.0010x [0.00050-0.0014]"


def test_a_claim_writes_small_factors_with_the_same_figures(tmp_path):
    fast = {"1s": (1.0, seeds(59.9, 60.2)), "1000s": (1000.0, seeds(70, 70.3))}
    slow = {"1s": (1.0, seeds(50, 50.2)), "1000s": (1000.0, seeds(60.1, 60))}
    store = a_store(tmp_path, runs_of({"kd": slow, "fitnet": fast}))
    text = effect_text(make_claim(store, "gain(kd, fitnet) < 1"))
    assert text.startswith("0.0010x [-, 0.0014")


# Seeds


def test_methods_that_share_no_seed_are_not_said_to_be_compared_within_seeds(tmp_path):
    cells = {"kd": {"100s": (100.0, seeds(72, 72.5, 71.6))},
             "fitnet": {"100s": (100.0, seeds(73, 73.2, 72.1, first=3))}}  # fmt: skip
    _, text = judged(a_store(tmp_path, runs_of(cells)))
    assert "within seeds, with" not in text
    assert "- Differences are of means over seeds, with one variance per budget" in text


def test_a_budget_whose_methods_share_too_few_seeds_is_named(tmp_path):
    cells = {
        "kd": {"100s": (100.0, seeds(70, 70.5, 69.6)), "200s": (200.0, seeds(72, 72.6))},
        "fitnet": {"100s": (100.0, seeds(71, 71.4, 70.1)), "200s": (200.0, seeds(73, 72, first=1))},
    }
    _, text = judged(a_store(tmp_path, runs_of(cells)))
    assert "- Differences are within seeds, with" in text
    assert "- Not so at 200s, where methods share too few seeds" in text


PARTIAL = {
    "kd": {"5k@kd": (500.0, seeds(66, 66.2)), "10k@kd": (1000.0, seeds(68, 68.1)),
           "20k@kd": (2000.0, seeds(70, 70.2))},
    "fitnet": {"5k@kd": (500.0, seeds(67, 67.1)), "10k@kd": (1000.0, seeds(69, 69.2)),
               "20k@kd": (2000.0, seeds(71))},
}  # fmt: skip


def test_a_claim_names_the_seeds_of_its_curves_and_what_was_left_out_of_them(tmp_path):
    store = a_store(tmp_path, runs_of(PARTIAL))
    claim = make_claim(store, "gain(fitnet, kd) > 1")
    assert claim.seeds == {"fitnet": 2, "kd": 2}
    assert claim.effect.low is not None
    assert "fitnet 20k@kd has one seed and is left out of the curve" in claim.notes
    _, text = judged(store)
    assert "- Left out of curves, one seed: fitnet 20k@kd." in text


# What is to be known of the runs


def a_doubtful_folder(root) -> Store:
    """fitnet has an unreliable Cost, one run drifted, one failed and one is not finished."""
    runs = runs_of(PARTIAL)
    runs[0] = runs[0].model_copy(update={"train_s": Spent(planned=500.0, actual=650.0)})
    failure = Failure(iteration=321, term="mse", reason="not finite", checkpoint_iteration=300)
    runs += [
        a_run("fitnet", "20k@kd", 1, None, iterations_done=321, finished=False, failure=failure),
        a_run("cwd", "20k@kd", 0, None, iterations_done=7, finished=False),
    ]
    costs = [a_cost("none", 0.1), a_cost("kd", 0.15),
             a_cost("fitnet", 0.2, reliable=False, warnings=["throttled"])]  # fmt: skip
    return a_store(root, runs, costs)


def test_the_verdict_has_the_notes_of_the_table_and_marks_unreliable_costs(tmp_path):
    store = a_doubtful_folder(tmp_path)
    _, text = judged(store)
    assert "| fitnet† |" in text
    assert "| kd† |" not in text
    assert "- 1 of 11 runs (* in the table) spent 30 % more or less than planned" in text
    assert "- † Planned with an unreliable cost: fitnet; costs.md says why of each." in text
    assert "fitnet 20k@kd seed 1 (failed, 321 of 40,000 iterations)" in text
    assert "cwd 20k@kd seed 0 (not finished, 7 of 40,000 iterations)" in text


def test_the_page_and_the_figures_mark_unreliable_costs_and_say_each_note_once(tmp_path):
    store = a_doubtful_folder(tmp_path)
    verdict = judge(collect(store))
    page = render_page(store, verdict).read_text()
    gains = page.partition('id="gain"')[2].partition("</section>")[0]
    assert '<span class="name">fitnet†</span>' in gains
    assert page.count("† Planned with an unreliable cost: fitnet") == 1
    for path in render(store, verdict, formats=["svg"]):
        if path.stem in ("gain", "flips"):
            assert "fitnet†" in path.read_text()


def test_runs_of_two_devices_have_no_ranks_and_no_ratio_for_that_reason(tmp_path):
    runs = [
        *runs_of({"kd": PARTIAL["kd"]}, flop=None),
        *runs_of({"fitnet": PARTIAL["fitnet"]}, device="NVIDIA A100", flop=None),
    ]
    costs = [a_cost("kd", ratio=ratio(1.5, 0.1)), a_cost("fitnet", device="NVIDIA A100")]
    store = a_store(tmp_path, runs, costs)
    sentences, _ = judged(store)
    assert sentences[0] == (
        "No compute-equivalent gain in wall-clock: runs are from different devices."
    )
    assert sentences[-1].endswith("at equal compute: the runs are from different devices.")
    claim = make_claim(store, "fitnet > kd @ 5k@kd")
    assert claim.cost_ratio is None
    assert claim.unavailable == {"cost_ratio": "runs are from different devices"}
