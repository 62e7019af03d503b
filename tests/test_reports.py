import ast
import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cost_records import GFLOP, alike, counted, gpu_cost, outlier
from rich.console import Console
from run_records import (
    STORES,
    a_cost,
    a_run,
    a_store,
    allocated,
    half_finished,
)

import kdprof.reports
from kdprof.budget import Conversion
from kdprof.errors import UserError
from kdprof.records import Canary, Cost, CountedCost, Interval, Ratio, Run, Spent, TermCost
from kdprof.reports import claims, conversion, costs, judge, results, table
from kdprof.reports.axes import axis
from kdprof.reports.figures import curves
from kdprof.reports.status import status_table
from kdprof.reports.text import Estimate, Grid, duration, figures, size
from kdprof.store import Store

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path)


def printed(call, *arguments, **options) -> str:
    console = Console(file=io.StringIO(), **options)
    call(*arguments, console)
    return console.file.getvalue()


# Numbers


def test_means_intervals_and_paired_differences_are_those_computed_by_hand(tmp_path):
    mious = {"kd": (0.70, 0.71, 0.72), "cwd": (0.71, 0.73, 0.72)}
    runs = [a_run(m, seed=s, miou=v) for m in mious for s, v in enumerate(mious[m])]
    cwd, kd = table.rows(a_store(tmp_path, runs))
    # sem = 1 / sqrt(3); t(0.975, 2) = 4.30265; half an interval is their product.
    assert (cwd.method, cwd.rank, kd.rank, cwd.seeds) == ("cwd", 1, 2, 3)
    assert (kd.miou_percent.value, kd.miou_percent.low, kd.miou_percent.high) == pytest.approx(
        (71, 71 - 2.48414, 71 + 2.48414), abs=1e-4
    )
    # Differences by seed: 1, 2, 0.
    assert (cwd.delta_points.value, cwd.delta_points.high) == pytest.approx((1, 3.48414), abs=1e-4)
    assert kd.delta_points is None
    assert kd.missing["delta_points"] == "kd is the control"


def test_difference_uses_only_seeds_that_both_finished(tmp_path):
    runs = [
        a_run("kd", seed=1, miou=0.70),
        a_run("cwd", seed=0, miou=0.9),
        a_run(seed=1, miou=0.72),
    ]
    row = next(row for row in table.rows(a_store(tmp_path, runs)) if row.method == "cwd")
    assert (row.seeds, row.delta_points) == (2, Estimate(pytest.approx(2.0)))


def test_ranks_are_within_a_budget_and_ties_share_one(tmp_path):
    values = {("a", "1h"): 0.5, ("b", "1h"): 0.6, ("c", "1h"): 0.6, ("a", "2h"): 0.7}
    runs = [
        a_run(m, b, miou=v, train_s=Spent(planned=None, actual=float(b[0]) * 3600))
        for (m, b), v in values.items()
    ]
    found = [(row.budget, row.method, row.rank) for row in table.rows(a_store(tmp_path, runs))]
    assert found == [("1h", "b", 1), ("1h", "c", 1), ("1h", "a", 3), ("2h", "a", 1)]


@pytest.mark.parametrize(
    ("actual", "flagged"), [(98.1, False), (97.9, True), (101.9, False), (102.1, True)]
)
def test_a_run_is_flagged_beyond_two_percent_either_way(actual, flagged):
    assert results.drifted(a_run(train_s=Spent(planned=100.0, actual=actual))) is flagged


def test_drift_of_one_seed_flags_the_row_though_the_mean_is_on_plan(tmp_path):
    spent = [Spent(planned=100.0, actual=seconds) for seconds in (103.0, 97.0)]
    store = a_store(tmp_path, [a_run(seed=s, train_s=spent[s]) for s in (0, 1)])
    (row,) = table.rows(store)
    assert row.drifted
    assert row.drift_percent == pytest.approx(0)
    note = "2 of 2 runs (* in the table) spent 3 % more or less than planned (median +0 %)"
    assert note in printed(table.print_table, store)
    table.render(store)
    assert "0: +3.0 %; 1: -3.0 %" in (store.reports / "table.csv").read_text()


@pytest.mark.parametrize(
    ("budget", "matched"),
    [
        ("40k@cwd", "wall-clock"),
        ("5e17flop", "FLOP"),
        ("1.5kWh", "energy"),
        ("2k+1k", "iterations"),
        ("320ksample", "samples"),
        ("20epoch", "epochs"),
    ],
)
def test_titles_say_what_a_budget_makes_equal(tmp_path, budget, matched):
    store = a_store(tmp_path, [a_run(budget=budget)])
    assert f"{budget}: equal {matched}" in printed(table.print_table, store)
    table.render(store)
    assert f"## {budget}: equal {matched}" in (store.reports / "table.md").read_text()
    assert f",{matched}," in (store.reports / "table.csv").read_text()


def test_iteration_budget_has_no_plan_and_says_so(tmp_path):
    run = a_run("mykd", "40k", cost_key=None, train_s=Spent(planned=None, actual=7200.0))
    store = a_store(tmp_path, [run])
    (row,) = table.rows(store)
    assert (row.planned_s, row.drift_percent, row.reliable) == (None, None, None)
    assert "'-' in planned, drift: no seconds were planned (all)." in printed(
        table.print_table, store
    )


def test_latency_ratio_is_the_costs_own(tmp_path):
    beside_cwd = Ratio(median=1, low=1, high=1, to="cwd")
    unknown = {"ratio": "the reference failed"}
    stored = [
        a_cost("kd", 0.15),
        a_cost("cwd", 0.3, ratio=beside_cwd),
        a_cost("mgd", ratio=None, unavailable=unknown),
    ]
    runs = [a_run(m) for m in ("none", "cwd", "kd", "mgd")]
    made = {row.method: row for row in table.rows(a_store(tmp_path, runs, stored))}
    ratio = made["kd"].latency_ratio
    assert (ratio.value, ratio.high) == pytest.approx((1.5, 0.15 / 0.09))
    assert {m: row.missing["latency_ratio"] for m, row in made.items() if m != "kd"} == {
        "none": "no stored cost of the method",
        "cwd": "its ratio is to cwd",
        "mgd": "the reference failed",
    }


def test_unreliable_cost_of_the_budgets_method_taints_every_run_planned_with_it(tmp_path):
    stored = [a_cost("cwd", reliable=False, warnings=["throttled"]), a_cost("kd")]
    runs = [a_run("kd"), a_run("kd", "2h", train_s=Spent(planned=7200.0, actual=7200.0))]
    store = a_store(tmp_path, runs, stored)
    assert {row.budget: row.reliable for row in table.rows(store)} == {"40k@cwd": False, "2h": True}
    note = "† Planned with an unreliable cost: cwd; costs.md says why of each."
    assert note in printed(table.print_table, store)


# Every report over every kind of store


def test_every_report_of_runs_renders_and_files_stay_the_same(store):
    first = [path.read_bytes() for path in table.render(store)]
    again = table.render(store)
    assert [path.name for path in again] == ["table.md", "table.csv", "table.tex"]
    assert [path.read_bytes() for path in again] == first
    assert printed(table.print_table, store)


def test_markdown_and_csv_hold_every_row(store):
    table.render(store)
    made = table.rows(store)
    lines = list(csv.DictReader(io.StringIO((store.reports / "table.csv").read_text())))
    assert [(line["budget"], line["method"]) for line in lines] == [
        (row.budget, row.method) for row in made
    ]
    for line in lines:
        empty = {name for name in line if line[name] == "" and not name.endswith(("low", "high"))}
        assert all(name in line["missing"] for name in empty - {"missing"})
    text = (store.reports / "table.md").read_text()
    assert text.count("\n| ") - text.count("| :-- |") - text.count("| method |") == len(made)


def test_left_out_runs_are_in_no_mean_and_are_named(tmp_path):
    store = a_store(tmp_path, half_finished())
    seeds = {(row.method, row.budget): row.seeds for row in table.rows(store)}
    assert seeds["cwd", "40k@cwd"] == 2
    assert ("kd", "40k@cwd") not in seeds
    text = printed(table.print_table, store)
    assert "kd 40k@cwd seed 0 (not finished, 17 of 40,000 iterations) and 6 more." in text


@pytest.mark.parametrize("report", [table.render, table.rows])
def test_nothing_to_report_names_the_command(report, tmp_path):
    with pytest.raises(UserError, match="no runs yet; run 'kdprof train"):
        report(Store(tmp_path))
    with pytest.raises(UserError, match="none of its 1 runs is finished; run 'kdprof train"):
        report(a_store(tmp_path, [a_run(finished=False, miou=None)]))


# Costs, conversion, text


def gpu_costs() -> list[Cost]:
    no_peak = {"mfu": "no published fp32 peak is known for NVIDIA H200"}
    late = {"stopped": "max_time_s = 60 was up before the target of 1.00%", "rounds": 12}
    seen = [outlier("another process"), outlier("another process"), outlier("unknown")]
    throttled = ["the GPU was throttled (power cap)"]
    return [
        gpu_cost("cirkd", outliers=seen, timing=late, warnings=["synchronises the device"]),
        gpu_cost("cwd", reliable=False, warnings=throttled, mfu=None, unavailable=no_peak),
        gpu_cost("none"),
        gpu_cost("kd"),
    ]


def gpu_counts() -> list[CountedCost]:
    return [counted(cost) for cost in gpu_costs()]


def on_a_terminal(call, *arguments, **options) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    call(*arguments, console, **options)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


RENDERED = {
    "costs.txt": lambda: on_a_terminal(costs.measure_table, gpu_costs()),
    "costs-detail.txt": lambda: on_a_terminal(costs.measure_table, gpu_costs(), detail=True),
    "costs-cpu.txt": lambda: on_a_terminal(costs.measure_table, [a_cost(device="cpu")]),
    "costs-count.txt": lambda: on_a_terminal(costs.count_table, gpu_counts()),
    "costs.md": lambda: costs.costs_markdown(gpu_costs()),
    "costs.tex": lambda: costs.costs_latex(gpu_costs()),
    "costs.csv": lambda: costs.costs_csv(gpu_costs()),
}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_costs_snapshot(name):
    """Run with KDPROF_UPDATE_SNAPSHOTS=1 to accept a change, and review its diff."""
    path, found = SNAPSHOTS / name, RENDERED[name]()
    if os.environ.get("KDPROF_UPDATE_SNAPSHOTS"):
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize("detail", [False, True])
def test_costs_fit_a_terminal_of_a_hundred_columns(detail):
    text = on_a_terminal(costs.measure_table, gpu_costs(), detail=detail)
    grids = text[: text.index("Medians with")]
    assert max(map(len, grids.splitlines())) <= 100
    assert ("Terms" in text, "What bounds" in text, "Operators" in text) == (detail,) * 3


def test_measure_table_shows_units_reasons_and_unreliable_costs():
    stored = [
        a_cost("none", 0.1),
        a_cost("cwd", 0.2, reliable=False, warnings=["GPU throttled"], flop=None,
               unavailable={"flop": "unknown operator", "energy_j": "no counter"},
               memory_bytes=allocated(None, process=2**29)),
    ]  # fmt: skip
    assert "200.0 [198.0-204.0]" in costs.costs_markdown(stored)
    assert "2.00 [1.82-2.22]" in costs.costs_markdown(stored)
    assert "200.0±4.0" in printed(costs.measure_table, stored)
    for text in (costs.costs_markdown(stored), printed(costs.measure_table, stored)):
        assert "3.00 GiB" in text
        assert "512 MiB (process)" in text
        assert "1 multiply-add = 2 FLOP" in text
        assert "† cwd is UNRELIABLE: GPU throttled." in text
        assert "No FLOP (cwd): unknown operator." in text
        assert "No energy (all methods): no counter." in text
        assert "30.0" in text
        assert "70.0" in text
    with pytest.raises(UserError, match="kdprof measure"):
        costs.costs_markdown([])


def test_hidden_cost_says_what_matching_by_flop_would_do():
    """With a quarter of the time explained by FLOP, FLOP promise four times the iterations."""
    index = {"a": 0.75, "b": -0.25, "c": 0.1, "d": 1.0}
    text = costs.costs_markdown([a_cost(m, hidden_cost=value) for m, value in index.items()])
    assert "those at equal time: a 4.00 times, b 0.800 times, d without limit." in text
    assert [cell in text for cell in ("+75‡", "-25‡", "+10 |", "+100‡")] == [True] * 4


def test_outliers_canary_and_stop_are_told():
    canary = Canary(median_s=1e-3, drift=0.062, steady=False, samples_s=[1e-3])
    text = costs.costs_markdown(
        [
            a_cost("cwd", outliers=[outlier("unknown")], canary=canary),
            a_cost("kd", 0.1, latency_s=alike(0.1), timing={"stopped": "interrupted"}),
        ]
    )
    assert "cwd: 1 of 8 samples is an outlier (1 unknown)." in text
    assert "drifted by 6.2 %; the machine was not steady while measuring cwd (6.2 %)." in text
    assert "Measuring stopped, interrupted: kd 20 %" in text
    assert "No canary (kd): not asked for." in text


def test_every_reason_is_in_every_file(tmp_path):
    stored = [a_cost("none", 0.1), a_cost("cwd", reliable=False, warnings=["GPU throttled"])]
    paths = costs.render(a_store(tmp_path, stored_costs=stored))
    assert [path.name for path in paths] == ["costs.md", "costs.csv", "costs.tex"]
    assert all("GPU throttled" in path.read_text() for path in paths)
    assert all("no counter" in path.read_text() for path in paths)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in costs.render(Store(tmp_path))] == first
    assert costs.render(a_store(tmp_path / "empty")) == []


def test_csv_keeps_full_precision_and_explains_empty_cells():
    stored = [a_cost("cwd", 0.1 + 0.2), gpu_cost("kd")]
    kd, cwd = csv.DictReader(io.StringIO(costs.costs_csv(stored)))
    assert float(cwd["step_s"]) == 0.1 + 0.2
    assert float(kd["matrix_flop"]) == GFLOP["kd"] * 1e9
    assert (cwd["energy_j"], cwd["phase_optimizer_s"]) == ("", "")
    assert "energy_j: no counter" in cwd["missing"]
    assert kd["missing"] == ""


def test_a_term_that_is_paid_for_nothing_is_named():
    def term(weight, seconds):
        return TermCost(weight=weight, forward_flop=0, backward_flop=0, bytes_moved=0,
                        forward_s=seconds, backward_s=0.0)  # fmt: skip

    terms = {"free": term(0, 0.0), "wasted": term(0, 0.01), "used": term(1, 0.01)}
    lines = costs.costs_markdown([a_cost(terms=terms)]).splitlines()
    assert [line.split(" | ")[1] for line in lines if "computed, weight 0" in line] == ["wasted"]


def test_latex_is_balanced_and_escaped():
    stored = [
        a_cost("my_kd#1&{x}", reliable=False, warnings=["50% of $HOME\\a ~^ [x] \u2192 <|>"]),
        a_cost("none", 0.1, hidden_cost=-0.2),
    ]
    text = costs.costs_latex(stored)
    for name in ("table", "tabular", "minipage"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    assert "my\\_kd\\#1\\&\\{x\\}$^{\\dagger}$ & " in text
    assert "hidden \\%" in text
    assert "$-$20$^{\\ddagger}$" in text
    bare = re.sub(r"\\[\\&%$#_{}]|\$(-|\\pm|\^\{\\d?dagger\})\$", "", text)
    assert not re.search(r"[$#~^<>|†‡±]|[^\x00-\x7f]", bare)
    assert bare.count("{") == bare.count("}")
    # One comment in front; all else that starts one is escaped.
    assert bare.count("%") == 1
    rows = text[text.index("\\toprule") : text.index("\\bottomrule")].split("\\\\\n")[:-1]
    columns = len(re.search(r"\{tabular\}\{(\w+)\}", text).group(1))
    assert [len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows] == [columns] * 3


def test_counted_costs_are_told_by_part_term_and_module():
    modules = {"student": {"total": 4e9, "head": 1e9, "head.a": 1e9, "head.a.b": 1e9, "body": 0.0}}
    found = [counted(gpu_cost(name), modules) for name in ("none", "cirkd")]
    text = printed(costs.count_table, found)
    assert "2.44" in text
    assert "memory_region" in text
    assert "Not in other, without a formula: aten.topk, aten.grid_sampler_2d (cirkd)." in text
    shown = [line.split() for line in text.splitlines() if line.startswith("student")]
    assert shown == [
        ["student", "total", "4.000", "100.0"],
        ["student", "head", "1.000", "25.0"],
        ["student", "head.a", "1.000", "25.0"],
    ]
    assert "head.a.b" in on_a_terminal(costs.count_table, found, detail=True)
    assert "by module" not in on_a_terminal(costs.count_table, gpu_counts(), detail=True)


def test_conversion_table_puts_the_cheapest_first_and_explains_dashes():
    made = [
        Conversion("cirkd", 20_000, 19_800, 20_300, 7200.0, None),
        Conversion("cwd", 40_000, 40_000, 40_000, 7200.0, 40_000),
    ]
    text = printed(conversion.conversion_table, "40k@cwd", made)
    assert text.index("40,000") < text.index("20,000")
    assert "[19,800-20,300]" in text
    assert "2.00 h" in text
    assert "'-' at equal FLOP" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_whatever_the_terminals_width(tmp_path, width):
    store = STORES["full"](tmp_path)
    text = printed(table.print_table, store, force_terminal=True, width=width, color_system=None)
    for row in table.rows(store):
        assert f"{row.iterations:,}" in text
        assert f"{row.miou_percent.value:.2f}" in text
    grid = text[text.index("5k@cwd") : text.index("mIoU is")]
    assert width < 80 or max(map(len, grid.splitlines())) <= width


def test_markup_and_pipes_in_names_are_text():
    grid = Grid("[bold]t", ("method", "n"), [["my[red]|kd", "1"]])
    assert "my[red]\\|kd" in grid.markdown()
    assert "my[red]|kd" in printed(grid.print)


@pytest.mark.parametrize(
    ("high", "text"), [(105.0, "100.0±5.0"), (125.0, "100.0 [80.0-125.0]"), (100.02, "100.00±0.02")]
)
def test_a_terminal_shows_the_ends_of_wide_intervals(high, text):
    interval = Interval(median=0.1, low=10 / high, high=high / 1e3)
    assert f" {text} " in printed(costs.measure_table, [a_cost(latency_s=interval)])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.012345, "0.0123"), (9.876, "9.88"), (1234.5, "1,234"), (-56.78, "-56.8")],
)
def test_figures_have_no_exponent(value, text):
    assert figures(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.50 s"), (41, "41.0 s"), (119, "119 s"), (120, "2.00 min"), (36_000, "10.0 h")],
)
def test_durations_have_three_figures(seconds, text):
    assert duration(seconds) == text


def test_sizes_are_binary():
    assert (size(2**30), size(5 * 2**20)) == ("1.00 GiB", "5 MiB")


# The house


def test_reports_need_neither_torch_nor_the_engine():
    folder = Path(kdprof.reports.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("kdprof"):
                assert module.startswith("kdprof.stats.") or module in {
                    "kdprof.store",
                    "kdprof.records",
                    "kdprof.errors",
                    "kdprof.budget",
                    "kdprof.claims",
                    "kdprof.visible",
                    "kdprof.reports.comparison",
                }
    code = (
        "import sys; from kdprof.reports import table, costs, conversion, comparison, claims; "
        "from kdprof.reports import page; "
        "from kdprof.reports.figures import files; "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Over which classes an mIoU is the mean


def scored(*ious, **changes) -> list[Run]:
    per_class = {f"c{number}": iou for number, iou in enumerate(ious)}
    return [a_run(method, miou_per_class=per_class, **changes) for method in ("kd", "cwd")]


def texts_of(store: Store) -> dict[str, str]:
    found = results.collect(store)
    console = Console(width=300, file=io.StringIO())
    status_table(store, console)
    paths = table.render(store)
    return {
        "status": console.file.getvalue(),
        "markdown": paths[0].read_text(),
        "csv": paths[1].read_text(),
        "figure": " ".join(curves.notes(found, axis(found, "seconds"))),
        "verdict": " ".join(judge.judge(found).notes),
        "claim": " ".join(claims.make_claim(store, "cwd > kd @ 40k@cwd").notes),
    }


def test_a_mean_over_some_of_the_classes_is_said_everywhere(tmp_path):
    texts = texts_of(a_store(tmp_path, scored(0.7, 0.7, *[None] * 17)))
    for where in ("status", "markdown", "figure", "verdict", "claim"):
        assert "IoU is the mean over 2 of 19 classes" in texts[where], where
        assert "IoU of 0" not in texts[where]
    (first, *_) = csv.DictReader(io.StringIO(texts["csv"]))
    assert first["classes"] == "2 of 19"


def test_a_mean_over_all_classes_needs_no_sentence(tmp_path):
    texts = texts_of(a_store(tmp_path, scored(0.7, 0.7)))
    assert not any("is the mean over" in text for text in texts.values())


def test_absent_classes_that_count_as_zero_are_said(tmp_path):
    runs = scored(0.7, 0.0, None, absent_classes="zero")
    runs[1] = runs[1].model_copy(update={"miou_per_class": {"c0": 0.7, "c1": None, "c2": None}})
    texts = texts_of(a_store(tmp_path, runs))
    for where in ("status", "markdown", "figure", "verdict"):
        assert "the mean over 1 to 2 of 3 classes" in texts[where], where
        assert "counts with an IoU of 0 (evaluation.absent_classes)" in texts[where], where
