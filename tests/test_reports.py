import ast
import csv
import io
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text
from rich.console import Console

import kdprof.reports
from kdprof.budget import Conversion
from kdprof.errors import UserError
from kdprof.records import Cost, Flop, Interval, Memory, Ratio, Run, Spent
from kdprof.reports import conversion, costs, curves, results, table
from kdprof.reports.text import Estimate, Grid, duration, size
from kdprof.store import Store, write_record

SIX = ("none", "kd", "cwd", "cirkd", "mgd", "af_dcd")
BUDGETS = ("5k@cwd", "10k@cwd", "40k@cwd")


def a_run(method="cwd", budget="40k@cwd", seed=0, miou=0.7, **changes) -> Run:
    values = {
        "method": method,
        "budget": budget,
        "seed": seed,
        "device": "NVIDIA H200",
        "iterations": 40_000,
        "iterations_done": 40_000,
        "miou": miou,
        "miou_per_class": None,
        "best_miou": miou,
        "train_s": Spent(planned=7200.0, actual=7200.0),
        "eval_s": 30.0,
        "checkpoint_s": 1.0,
        "flop": 1.8e17,
        "energy_j": None,
        "cost_key": "key",
        "finished": True,
        "versions": {},
    }
    return Run(**(values | changes))


def a_cost(method="cwd", latency=0.2, **changes) -> Cost:
    values = {
        "method": method,
        "device": "NVIDIA H200",
        "key": "key",
        "session": "one",
        "latency_s": Interval(median=latency, low=0.99 * latency, high=1.02 * latency),
        "ratio": Ratio(median=latency / 0.1, low=latency / 0.11, high=latency / 0.09, to="none"),
        "end_to_end_s": None,
        "samples_s": [[latency, latency]] * 3,
        "end_to_end_samples_s": [],
        "phases_s": {"teacher_forward": 0.3 * latency, "objective": 0.7 * latency, "data": 0.0},
        "flop": Flop(teacher=1e9, student=1e9, objective=0, backward=2e9, auxiliary=0, total=4e9),
        "bytes_moved": None,
        "memory_bytes": Memory(peak_allocated=3 * 2**30, peak_reserved=None, process=None),
        "energy_j": None,
        "reliable": True,
        "warnings": [],
        "unavailable": {"energy_j": "no NVML", "end_to_end_s": "no loader"},
        "timing": {},
        "hardware": {},
        "settings": {},
        "versions": {},
    }
    return Cost(**(values | changes))


def a_store(root: Path, runs=(), stored_costs=(), teacher: float | None = 0.79) -> Store:
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root)
    store.study.write_text('data = "camvid:/d"\nstudent = "pspnet-r18"\nteacher = "pspnet-r101"\n')
    for run in runs:
        write_record(store.run_folder(run.method, run.budget, run.seed).record, run)
    for cost in stored_costs:
        store.write_cost(cost)
    if teacher is not None:
        record = a_run("none", "80k", miou=teacher, train_s=Spent(planned=None, actual=36_000.0))
        write_record(store.teacher_folder().record, record)
    return store


def matrix(methods=SIX, budgets=BUDGETS, seeds=3) -> list[Run]:
    """Dearer methods are better per iteration, and get fewer of them."""
    found = []
    for (m, method), (b, budget), seed in itertools.product(
        enumerate(methods), enumerate(budgets), range(seeds)
    ):
        seconds = (900.0, 1800.0, 7200.0)[b]
        done = int(seconds / (0.1 + 0.02 * m))
        miou = 0.6 + 0.04 * b + 0.002 * (m * 7 % 5) + 0.003 * ((seed * 5 + m) % 3)
        spent = Spent(planned=seconds, actual=seconds * (1 + 0.002 * (seed - 1)))
        found.append(a_run(method, budget, seed, miou, iterations_done=done, train_s=spent))
    return found


def half_finished() -> list[Run]:
    return [
        run.model_copy(update={"finished": False, "miou": None, "iterations_done": 17})
        if run.budget == "40k@cwd" and (run.method in ("kd", "mgd") or run.seed == 2)
        else run
        for run in matrix()
    ]


def with_drift() -> list[Run]:
    runs = matrix()
    runs[4] = runs[4].model_copy(update={"train_s": Spent(planned=1800.0, actual=1890.0)})
    return runs


COSTS = [a_cost(method, 0.1 + 0.02 * place) for place, method in enumerate(SIX)]
STORES = {
    "one run": lambda root: a_store(root, [a_run(device="Some Model @ 2 GHz (2 threads)")]),
    "full": lambda root: a_store(root, matrix(), COSTS),
    "half-finished": lambda root: a_store(root, half_finished(), COSTS),
    "no teacher": lambda root: a_store(root, matrix(), COSTS, teacher=None),
    "drifted": lambda root: a_store(
        root, with_drift(), [*COSTS[:4], a_cost("mgd", reliable=False, warnings=["throttled"])]
    ),
}


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
    assert kd.missing["delta_points"] == "kd is the baseline"


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
    assert "cwd 40k@cwd seed 0, +3.0 %" in printed(table.print_table, store)


@pytest.mark.parametrize(
    ("budget", "key", "matched"),
    [
        ("40k@cwd", "k", "wall-clock"),
        ("2h", "k", "wall-clock"),
        ("5e17flop", "k", "FLOP"),
        ("800kJ", "k", "energy"),
        ("1.5kWh", "k", "energy"),
        ("40k", None, "iterations"),
    ],
)
def test_a_budget_says_what_it_makes_equal(budget, key, matched):
    assert table.matched(a_run(budget=budget, cost_key=key)) == matched


def test_iteration_budget_has_no_plan_and_says_so(tmp_path):
    run = a_run("mine.MyKD", "40k", cost_key=None, train_s=Spent(planned=None, actual=7200.0))
    store = a_store(tmp_path, [run])
    (row,) = table.rows(store)
    assert (row.planned_s, row.drift_percent, row.reliable) == (None, None, None)
    assert "'-' in planned, drift: no seconds were planned (all)." in printed(
        table.print_table, store
    )
    curves.render(store, formats=["svg"])


def test_latency_ratio_is_taken_from_the_cost_or_from_its_session(tmp_path):
    other = Ratio(median=1, low=1, high=1, to="cwd")
    stored = [a_cost("none", 0.1, ratio=other), a_cost("cwd", 0.3, ratio=other), a_cost("kd", 0.15)]
    runs = [a_run(m) for m in ("none", "cwd", "kd")]
    ratio = {row.method: row.latency_ratio for row in table.rows(a_store(tmp_path, runs, stored))}
    assert ratio["cwd"].value == pytest.approx(3)
    assert (ratio["kd"].value, ratio["kd"].high) == pytest.approx((1.5, 0.15 / 0.09))


def test_latency_ratio_across_sessions_is_refused(tmp_path):
    stored = [a_cost("none", 0.1, session="two"), a_cost("cwd", 0.3, ratio=None)]
    (row,) = table.rows(a_store(tmp_path, [a_run()], stored))
    assert row.latency_ratio is None
    assert row.missing["latency_ratio"] == "not measured in one session with none"


def test_unreliable_cost_of_the_budgets_method_taints_every_run_planned_with_it(tmp_path):
    stored = [a_cost("cwd", reliable=False, warnings=["throttled"]), a_cost("kd")]
    runs = [a_run("kd"), a_run("kd", "2h", train_s=Spent(planned=7200.0, actual=7200.0))]
    store = a_store(tmp_path, runs, stored)
    assert {row.budget: row.reliable for row in table.rows(store)} == {"40k@cwd": False, "2h": True}
    assert "† Planned with an unreliable cost, cwd: throttled." in printed(table.print_table, store)


def test_bars_are_extremes_below_three_seeds_and_t_intervals_from_three():
    assert curves.spread([70.0, 72.0]) == (71, 70, 72)
    assert curves.spread([70.0, 71.0, 72.0]) == pytest.approx((71, 68.51586, 73.48414), abs=1e-4)


@pytest.mark.parametrize(
    ("seconds", "label", "value"),
    [(90, "(s)", 90), (600, "(min)", 10), (7200, "(h)", 2)],
)
def test_time_axis_has_a_readable_unit(tmp_path, seconds, label, value):
    run = a_run(train_s=Spent(planned=None, actual=seconds))
    axis = curves.x_axes(results.collect(a_store(tmp_path, [run])), "seconds")[0]
    assert axis.label == f"training wall-clock {label}"
    assert axis.of(run) == value


def test_device_hours_count_devices_and_name_their_kind(tmp_path):
    run = a_run(device="4 x NVIDIA H200")
    axis = curves.x_axes(results.collect(a_store(tmp_path, [run])), "gpu-hours")[0]
    assert (axis.label, axis.of(run)) == ("training compute (GPU-hours)", 8)
    run = a_run(device="AMD EPYC 7763 64-Core Processor (8 threads)")
    axis = curves.x_axes(results.collect(a_store(tmp_path, [run])), "gpu-hours")[0]
    assert axis.label == "training compute (CPU-hours)"


def test_flop_axis_states_its_convention_and_refuses_a_store_without_flop(tmp_path):
    axis = curves.x_axes(results.collect(a_store(tmp_path / "a", [a_run()])), "flop")[0]
    assert axis.label == "training compute (PFLOP; 1 multiply-add = 2 FLOP)"
    assert axis.of(a_run()) == pytest.approx(180)
    bare = a_run(flop=None, unavailable={"flop": "unknown operator"})
    with pytest.raises(UserError, match=r"unknown operator.*plot against seconds"):
        curves.render(a_store(tmp_path / "b", [bare]), "flop")


def test_axis_is_logarithmic_only_over_a_wide_range(tmp_path):
    narrow, wide = BUDGETS[:2], BUDGETS
    for budgets, scale in ((narrow, "linear"), (wide, "log")):
        store = a_store(tmp_path / scale, matrix(budgets=budgets))
        assert curves.draw(results.collect(store)).axes[0].get_xscale() == scale


# Every report over every kind of store


def test_every_report_of_runs_renders_and_files_stay_the_same(store):
    first = [path.read_bytes() for path in curves.render(store) + table.render(store)]
    again = curves.render(store) + table.render(store)
    assert [path.name for path in again] == [
        "curves.png", "curves.svg", "curves.pdf", "table.md", "table.csv",
    ]  # fmt: skip
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
    assert "Left out: kd 40k@cwd seed 0, not finished (17 of 40,000 iterations)." in text
    assert "Left out, not finished: 10 runs." in curves.notes(
        results.collect(store), curves.x_axes(results.collect(store), "seconds")[0]
    )


@pytest.mark.parametrize("report", [curves.render, table.render, table.rows])
def test_nothing_to_report_names_the_command(report, tmp_path):
    with pytest.raises(UserError, match="no runs yet; run 'kdprof train"):
        report(Store(tmp_path))
    with pytest.raises(UserError, match="none of its 1 runs is finished; run 'kdprof train"):
        report(a_store(tmp_path, [a_run(finished=False, miou=None)]))


def test_unknown_axis_and_format_are_refused(tmp_path):
    store = a_store(tmp_path, [a_run()])
    with pytest.raises(UserError, match="did you mean 'seconds'"):
        curves.render(store, "second")
    with pytest.raises(UserError, match="unknown figure format 'jpg'"):
        curves.render(store, formats=["jpg"])


# The look of the figure


def assert_texts_apart(figure) -> None:
    figure.canvas.draw()
    whole = figure.bbox
    boxes = {}
    for text in figure.findobj(lambda a: isinstance(a, Text) and a.get_visible() and a.get_text()):
        box = text.get_window_extent()
        if box.width and box.height:
            boxes[text] = box
            assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
            assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
            assert text.get_fontsize() >= 7
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


def test_no_text_overlaps_or_leaves_the_figure(store):
    assert_texts_apart(curves.draw(results.collect(store)))


@pytest.mark.parametrize("x", ["gpu-hours", "flop", "iterations"])
def test_texts_stay_apart_on_every_axis(x, tmp_path):
    assert_texts_apart(curves.draw(results.collect(STORES["drifted"](tmp_path)), x))


def test_twenty_two_methods_with_long_names_still_fit(tmp_path):
    names = [*SIX, *(f"a_very_long_outside_method_{n}" for n in range(16))]
    figure = curves.draw(results.collect(a_store(tmp_path, matrix(names))))
    assert_texts_apart(figure)
    looks = curves._looks(names)
    assert len({(look.colour, look.marker) for look in looks.values()}) == 22


def test_a_drifted_point_is_hollow_in_both_panels(tmp_path):
    figure = curves.draw(results.collect(STORES["drifted"](tmp_path)))
    for panel in figure.axes:
        assert sum(line.get_markerfacecolor() == "white" for line in panel.lines) == 1


def test_rendering_leaves_the_users_matplotlib_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    curves.render(a_store(tmp_path, [a_run()]), formats=["png"])
    assert dict(mpl.rcParams) == before


def test_key_positions_keep_their_gap_order_and_bounds():
    found = curves._apart([0.5, 0.5, 0.51, 0.9], 0.1, 0.05, 0.95)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= 0.05
    assert found[-1] <= 0.95
    assert sum(found[:3]) / 3 == pytest.approx(0.503, abs=0.01)


# Costs, conversion, text


def test_measure_table_shows_units_reasons_and_unreliable_costs():
    stored = [
        a_cost("none", 0.1),
        a_cost("cwd", 0.2, reliable=False, warnings=["GPU throttled"], flop=None,
               unavailable={"flop": "unknown operator", "energy_j": "no NVML"},
               memory_bytes=Memory(peak_allocated=None, peak_reserved=None, process=2**29)),
    ]  # fmt: skip
    for text in (costs.costs_markdown(stored), printed(costs.measure_table, stored)):
        assert "200.0 [198.0-204.0]" in text
        assert "2.00 [1.82-2.22]" in text
        assert "3.00 GiB" in text
        assert "512 MiB (process)" in text
        assert "1 multiply-add = 2 FLOP" in text
        assert "UNRELIABLE: cwd: GPU throttled." in text
        assert "'-' in flop: unknown operator (cwd)." in text
        assert "'-' in energy_j: no NVML (all)." in text
        assert "30.0" in text
        assert "70.0" in text
    with pytest.raises(UserError, match="kdprof measure"):
        costs.costs_markdown([])


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
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("kdprof"):
                assert module in {
                    "kdprof.store", "kdprof.stats", "kdprof.records", "kdprof.errors",
                }  # fmt: skip
    code = (
        "import sys; from kdprof.reports import curves, table, costs, conversion; "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
