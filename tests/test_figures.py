"""Figures as a reader of a paper sees them: at print size, with few and many methods."""

import io
import itertools
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import matplotlib as mpl
import pytest
from click.testing import CliRunner
from cost_records import gpu_cost, make_cost, memory, ratio
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from run_records import (
    BUDGETS,
    SIX,
    STORES,
    a_cost,
    a_run,
    a_store,
    half_finished,
    matrix,
)

from kdprof.cli import cli
from kdprof.errors import UserError
from kdprof.records import Spent
from kdprof.reports import axes, results
from kdprof.reports.figures import cost_bars, curves, flips, gains, memory_bars, schedules
from kdprof.reports.figures.files import render, render_schedules
from kdprof.reports.figures.looks import COLOURS, HATCH, PHASE_COLOURS, folder_looks, looks
from kdprof.reports.figures.sheet import INCH, apart, fitted, text_width
from kdprof.reports.text import flagged
from kdprof.reports.verdict import Flip, Gain, Standing, Verdict
from kdprof.reports.verdict_text import gain_text

WIDTHS = (84, 174)
MANY = (
    "none", "kd", *(f"a_method_of_thirty_characters{n}" for n in range(9)),
    *(f"another_{n}_with_long_name:cirkd" for n in range(9)),
)  # fmt: skip
EMPTY = Verdict([], [], [], {}, [], [])


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path)


def curves_of(store, gains=(), **options):
    found = results.collect(store)
    return curves.draw(found, folder_looks(store.runs(), store.costs()), gains, **options)


def a_gain(method="cwd", value=1.25, low=1.1, high=1.4, **changes) -> Gain:
    known = {"probability": 0.98, "seeds": 5}
    made = replace(Gain(method, "kd", "seconds", value, "", low, high, **known), **changes)
    return replace(made, has_interval=made.value is not None and made.seeds > 1)


def some_gains(methods) -> list[Gain]:
    """Estimates, bounds, open ends, one seed and unknown ones, over two controls."""
    kinds = [
        {},
        {"value": 3.1, "bound": ">", "low": 2.5, "high": None, "reason": "beyond"},
        {"value": 0.3, "bound": "<", "low": None, "high": 0.4, "reason": "beyond"},
        {"low": None},
        {"low": None, "high": None, "probability": None, "seeds": 1},
        {"value": None, "low": None, "high": None, "probability": None, "reason": "one budget"},
    ]
    return [
        a_gain(method, versus=control, **kinds[number % len(kinds)])
        for control in ("kd", "none")
        for number, method in enumerate(methods)
        if method != control
    ]


def a_verdict(methods=SIX, *, seeds=5, of=some_gains) -> Verdict:
    """Neighbouring methods change their order, so that labels crowd."""
    here = {name: 72 - 0.01 * number for number, name in enumerate(methods)}
    there = {name: 71 + 0.01 * number for number, name in enumerate(methods)}
    chances = (0.97, 0.6, 0.2) if seeds > 1 else (None,)
    changed = [
        Flip(first, second, ("iterations", "seconds"), (0.01, -0.01), chances[n % len(chances)])
        for n, (first, second) in enumerate(itertools.pairwise(methods))
    ]
    standings = [Standing("iterations", 4e4, here), Standing("seconds", 7200.0, there)]
    return Verdict([], of(methods), [], {}, standings, changed)


def two_ends(store):
    found = results.collect(store)
    return axes.axis(found, "iterations"), axes.axis(found, "seconds")


def a_schedule(method, dataset, **changes) -> SimpleNamespace:
    """As kdprof.published makes it; that module needs torch."""
    fields = ("iterations", "batch", "crop", "seconds", "seconds_low", "seconds_high", "scale",
              "kd_iterations", "kd_iterations_low", "kd_iterations_high", "reason")  # fmt: skip
    empty = {"method": method, "dataset": dataset, "unreliable": (), **dict.fromkeys(fields)}
    return SimpleNamespace(**(empty | changes))


def schedules_of(methods) -> list[SimpleNamespace]:
    return [
        a_schedule(
            method, dataset, iterations=length, batch=8, crop=(512, 1024), seconds=0.4 * length + n,
            seconds_low=0.39 * length, seconds_high=0.42 * length, scale=1.0 if n % 2 else 2.0,
            kd_iterations=length, kd_iterations_low=length, kd_iterations_high=length,
        )
        for n, method in enumerate(methods)
        for dataset in ("Cityscapes", "ADE20K")
        for length in (40_000, 80_000)
    ]  # fmt: skip


def costs_of(methods) -> list:
    return [
        gpu_cost(
            "cirkd",
            ratio=ratio(1 + number / 7, 0.004),
            reliable=number % 4 != 3,
            settings={"student": "pspnet-r18", "step": {"batch": 8, "crop": [512, 1024]}},
        ).model_copy(update={"method": method, "key": f"key-{method}"})
        for number, method in enumerate(methods)
    ]


def every_figure(root, methods, *, seeds, width):
    costs, verdict = costs_of(methods), a_verdict(methods, seeds=seeds)
    store = a_store(root, matrix(methods, seeds=seeds), costs)
    own, how = looks(methods), {"width_mm": width}
    left, right = two_ends(store)
    names = {cost.method: flagged(cost.method, not cost.reliable) for cost in costs}
    return {
        "curves": curves.draw(results.collect(store), own, verdict.gains, **how),
        "cost": cost_bars.draw(costs, own, **how),
        "memory": memory_bars.draw(costs, own, **how),
        "flips": flips.draw(verdict, (left, right), own, names, **how),
        "gain": gains.draw(verdict.gains, right, own, names, **how),
        "schedules": schedules.draw(schedules_of(methods), costs, own, **how),
    }


def texts_of(figure) -> list[str]:
    shown = figure.findobj(lambda a: isinstance(a, Text) and a.get_visible() and a.get_text())
    return [text.get_text() for text in shown]


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
            assert text.get_fontsize() >= 6
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one, other)


# All figures


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("methods", "seeds"), [(SIX[:3], 5), (MANY[:8], 1), (MANY, 2)])
def test_texts_are_inside_apart_and_large_enough(tmp_path, methods, seeds, width):
    for name, figure in every_figure(tmp_path, methods, seeds=seeds, width=width).items():
        assert figure.get_figwidth() * INCH == pytest.approx(width), name
        assert_texts_apart(figure)


def test_files_are_what_they_are_called_and_stay_the_same(tmp_path):
    store = a_store(tmp_path, matrix(), costs_of(SIX))
    paths = render(store, a_verdict(), width_mm=84)
    names = ("curves", "flips", "gain", "cost", "memory")
    assert [path.name for path in paths] == [
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf")
    ]
    first = [path.read_bytes() for path in paths]
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert all(
        data.startswith(starts[path.suffix]) for path, data in zip(paths, first, strict=True)
    )
    assert Image.open(io.BytesIO(first[0])).width == pytest.approx(84 / INCH * 300, abs=1)
    assert [path.read_bytes() for path in render(store, a_verdict(), width_mm=84)] == first


def test_costs_are_drawn_where_no_run_exists(tmp_path):
    store = a_store(tmp_path, stored_costs=costs_of(SIX), teacher=None)
    made = [path.name for path in render(store, None, formats=["svg"])]
    assert made == ["cost.svg", "memory.svg"]
    assert [path.name for path in render_schedules(store, schedules_of(SIX), formats=["pdf"])] == [
        "schedules.pdf"
    ]


def test_figures_without_their_numbers_are_not_written(tmp_path):
    store = a_store(tmp_path, matrix())
    assert [path.name for path in render(store, EMPTY, formats=["svg"])] == ["curves.svg"]


def test_a_method_has_one_colour_in_all_figures_and_with_fewer_methods(tmp_path):
    drawn = every_figure(tmp_path, SIX, seeds=2, width=174)
    for method, look in looks(SIX).items():
        if method in ("none", "kd"):
            continue
        for name, figure in drawn.items():
            lines = figure.findobj(mpl.lines.Line2D)
            used = {to_hex(line.get_color()) for line in lines if line.get_marker() == look.marker}
            assert to_hex(look.colour) in used, (name, method)
    store = a_store(tmp_path / "few", matrix(), costs_of(SIX))
    both = [render(store, a_verdict(), formats=["svg"], methods=m) for m in ((), ("mgd", "none"))]
    assert [path.name for path in both[0]] == [path.name for path in both[1]]
    colour = folder_looks(store.runs(), store.costs())["mgd"].colour
    others = {c.lower() for c in COLOURS} - {colour.lower()}
    for name in ("memory", "gain"):
        text = (store.reports / f"{name}.svg").read_text().lower()
        assert colour.lower() in text
        assert not [other for other in others if other in text]


def test_looks_do_not_depend_on_order_and_twenty_two_differ():
    names = [*SIX, *(f"outside_{n}" for n in range(16))]
    assert looks(names) == looks(reversed(names))
    assert len({(look.colour, look.marker) for look in looks(names).values()}) == 22
    assert len({(look.colour, look.dash) for look in looks(names).values()}) == 22


def test_unknown_names_and_silly_widths_are_refused(tmp_path):
    store = a_store(tmp_path, [a_run("cwd"), a_run("kd")])
    for options, message in (
        ({"x": "second"}, "did you mean 'seconds'"),
        ({"formats": ["jpg"]}, "unknown figure format 'jpg'"),
        ({"methods": ["cwdd"]}, "unknown method 'cwdd'; did you mean 'cwd'"),
        ({"width_mm": 5}, "cannot be 5 mm wide; use 70 to 400"),
        ({"width_mm": float("nan")}, "cannot be nan mm wide"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            render(store, EMPTY, **options)


def test_rendering_leaves_the_users_matplotlib_alone(tmp_path):
    before = dict(mpl.rcParams)
    render(a_store(tmp_path, [a_run()]), EMPTY, formats=["png"])
    assert dict(mpl.rcParams) == before


def test_figures_need_neither_torch_nor_pyplot():
    code = (
        "import sys; from kdprof.reports.figures import files; "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signs_in_names_are_text(tmp_path):
    device = "GPU $x$ and $_{y}"
    figure = curves_of(a_store(tmp_path, [a_run(device=device), a_run("none", device=device)]))
    assert any(device in " ".join(text.split()) for text in texts_of(figure))
    assert_texts_apart(figure)


# The command


def plot(store, *options):
    return CliRunner().invoke(cli, ["plot", "--out", str(store.root), *options])


def test_plot_takes_format_width_method_and_x(tmp_path):
    store = a_store(tmp_path, matrix(SIX[:3]), costs_of(SIX[:3]))
    done = plot(store, "--format", "svg", "--format", "png", "--width", "84", "--method", "kd",
                "--x", "flop")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not list(store.reports.glob("*.pdf"))
    assert {"curves.svg", "curves.png", "cost.svg"} <= {p.name for p in store.reports.glob("*")}
    assert Image.open(store.reports / "cost.png").width == pytest.approx(992, abs=1)


@pytest.mark.parametrize(
    "options",
    [("--format", "jpg"), ("--width", "9"), ("--width", "x"), ("--method", "cwwd"), ("--x", "h")],
)
def test_wrong_values_of_plot_are_refused(tmp_path, options):
    done = plot(a_store(tmp_path, matrix(SIX[:3])), *options)
    code = done.exception.exit_code if isinstance(done.exception, UserError) else done.exit_code
    assert code == 2
    assert not list((tmp_path / "reports").glob("curves.*"))


@pytest.mark.parametrize("options", [("--figure",), ("--width", "84"), ("--format", "png")])
def test_convert_refuses_options_of_a_figure_that_it_does_not_draw(tmp_path, options):
    done = CliRunner().invoke(cli, ["convert", "40k@cwd", "--out", str(tmp_path), *options])
    assert isinstance(done.exception, UserError)
    assert "add --" in str(done.exception)


# Accuracy against compute


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
    run = a_run(device="4 x NVIDIA H200", gpus=4)
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
    with pytest.raises(UserError, match=r"unknown operator.*use the axis seconds"):
        render(a_store(tmp_path / "b", [bare]), EMPTY, x="flop")


def test_axis_is_logarithmic_only_over_a_wide_range(tmp_path):
    narrow, wide = BUDGETS[:2], BUDGETS
    for budgets, scale in ((narrow, "linear"), (wide, "log")):
        store = a_store(tmp_path / scale, matrix(budgets=budgets))
        assert curves_of(store).axes[0].get_xscale() == scale


def test_runs_that_are_left_out_are_counted(tmp_path):
    found = results.collect(a_store(tmp_path, half_finished()))
    text = curves.notes(found, curves.x_axes(found, "seconds")[0])
    assert "Left out, not finished: 10 runs." in text


def test_a_run_without_a_plan_is_drawn(tmp_path):
    run = a_run("mykd", "40k", cost_key=None, train_s=Spent(planned=None, actual=7200.0))
    curves_of(a_store(tmp_path, [run]))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_text_overlaps_or_leaves_the_figure(store, width):
    assert_texts_apart(curves_of(store, width_mm=width))


@pytest.mark.parametrize("x", ["gpu-hours", "flop", "joules", "samples", "iterations"])
def test_texts_stay_apart_on_every_axis(x, tmp_path):
    store = STORES["drifted"](tmp_path)
    found = results.collect(store)
    runs = [run.model_copy(update={"energy_j": 3e5}) for run in found.finished]
    found = replace(found, finished=runs, study=found.study | {"step": {"batch": 8}})
    figure = curves.draw(found, folder_looks(runs, store.costs()), x=x)
    assert len(figure.axes) == (1 if x == "iterations" else 2)
    assert_texts_apart(figure)


def test_a_drifted_point_is_hollow_in_both_panels(tmp_path):
    figure = curves_of(STORES["drifted"](tmp_path))
    assert "Hollow: more than 2 % off the planned wall-clock (1 of 54 runs;" in " ".join(
        texts_of(figure)
    )
    for panel in figure.axes:
        assert sum(line.get_markerfacecolor() == "white" for line in panel.lines) == 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("methods", [SIX, MANY])
def test_bars_of_one_budget_do_not_cover_one_another(tmp_path, methods, width):
    budgets = ("5k@cwd", "10k@cwd", "40k@cwd")
    figure = curves_of(a_store(tmp_path, matrix(methods, budgets)), width_mm=width)
    figure.canvas.draw()
    panel = figure.axes[0]
    bars = [c.get_segments() for c in panel.collections]
    for budget in range(len(budgets)):
        places = sorted(
            panel.transData.transform((own[budget][0][0], 70))[0] / figure.dpi * 72 for own in bars
        )
        # Bars are 0.8 points wide.
        assert min(b - a for a, b in itertools.pairwise(places)) > 0.8
        assert panel.bbox.x0 / figure.dpi * 72 < places[0]
        assert places[-1] < panel.bbox.x1 / figure.dpi * 72


@pytest.mark.parametrize(("methods", "written"), [(SIX[:4], True), (SIX, False)])
def test_gains_are_written_beside_few_curves(tmp_path, methods, written):
    store = a_store(tmp_path, matrix(methods))
    figure = curves_of(store, [a_gain("cwd"), a_gain("none", 0.5, 0.4, 0.7)])
    assert ("cwd 0.80x [0.71-0.91]" in texts_of(figure)) == written
    assert ("of kd's compute for the same mIoU:" in texts_of(figure)) == written
    assert_texts_apart(figure)


def test_key_positions_keep_their_gap_order_and_bounds():
    found = apart([0.5, 0.5, 0.51, 0.9], 0.1, 0.05, 0.95)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= 0.05
    assert found[-1] <= 0.95
    assert sum(found[:3]) / 3 == pytest.approx(0.503, abs=0.01)


def test_long_names_keep_their_ends_within_the_room():
    short = fitted("cross_image_relational_kd:variant_b", 25)
    assert short.startswith("cross_")
    assert short.endswith("riant_b")
    assert text_width(short) <= 25


# Cost and memory


def bars_of(figure) -> list:
    return [b for b in figure.axes[0].patches if b.get_width() and b.get_fill()]


def test_bars_are_the_phases_of_the_records(tmp_path):
    costs = [gpu_cost("cirkd"), gpu_cost("none"), gpu_cost("kd")]
    figure = cost_bars.draw(costs, looks(SIX))
    for row, cost in enumerate([costs[1], costs[2], costs[0]]):
        own = {
            to_hex(bar.get_facecolor()): bar.get_width() / 1e3
            for bar in bars_of(figure)
            if abs(bar.get_y() + bar.get_height() / 2 - row) < 0.1
        }
        wanted = {to_hex(PHASE_COLOURS[p]): s for p, s in cost.phases_s.items() if s}
        assert own == pytest.approx(wanted)
    assert [t for t in texts_of(figure) if t.startswith(("1x", "1.79", "3.44"))] == [
        "1x", "1.791x [1.783-1.800]", "3.44x [3.42-3.46]",
    ]  # fmt: skip


def test_unreliable_bars_are_hatched_and_explained(tmp_path):
    more = {"reliable": False, "memory_bytes": memory(peak_allocated=2**33)}
    costs = [a_cost("none", 0.1), a_cost("cwd", 0.2, **more)]
    for draw in (cost_bars.draw, memory_bars.draw):
        figure = draw(costs, looks(SIX))
        hatched = [b for b in figure.axes[0].patches if b.get_hatch() == HATCH]
        assert [round(b.get_y() + b.get_height() / 2) for b in hatched] == [1]
        assert "cwd†" in texts_of(figure)
        assert "Hatched: UNRELIABLE (cwd†)" in " ".join(texts_of(figure))


def test_a_step_without_phases_or_ratio_is_one_bar():
    figure = cost_bars.draw([make_cost("mine", 0.2, phases_s=None, ratio=None)], looks(["mine"]))
    assert [bar.get_width() for bar in bars_of(figure)] == [200]
    assert "no ratio" in texts_of(figure)
    assert "Phases not measured: mine." in " ".join(texts_of(figure))


def test_memory_is_the_allocators_or_else_the_process_but_never_both():
    gpu = [
        a_cost("none", memory_bytes=memory(peak_allocated=2**30, process=2**33)),
        a_cost("kd", memory_bytes=memory(peak_allocated=3 * 2**29, peak_reserved=2**31)),
        a_cost("cwd", memory_bytes=memory(process=2**33)),
    ]
    figure = memory_bars.draw(gpu, looks(SIX))
    assert sorted(bar.get_width() for bar in bars_of(figure)) == [0.5, 1, 1.5]
    assert {"1.00 GiB, 1x", "1.50 GiB, 1.50x"} <= set(texts_of(figure))
    assert "Not known: cwd." in " ".join(texts_of(figure))
    figure = memory_bars.draw([make_cost("none"), make_cost("kd")], looks(SIX))
    assert "peak memory of the process (GiB)" in texts_of(figure)


# Gains and flips


def test_gains_are_sorted_with_bounds_hollow_and_open_ends_as_arrows(tmp_path):
    axis = two_ends(a_store(tmp_path, matrix()))[1]
    found = [
        a_gain("cwd"),
        a_gain("cirkd", 3.1, 2.5, None, bound=">", reason="beyond"),
        a_gain("mgd", None, None, None, probability=None, reason="one budget"),
        a_gain("af_dcd", 0.8, None, None, probability=None, seeds=1),
        a_gain("cwd", 9.0, axis="flop"),
    ]
    figure = gains.draw(found, axis, looks(SIX), {name: name for name in SIX} | {"mgd": "mgd†"})
    (panel,) = figure.axes
    points = {
        line.get_ydata()[0]: (line.get_xdata()[0], line.get_markerfacecolor() == "white")
        for line in panel.lines
        if line.get_marker() in {look.marker for look in looks(SIX).values()}
        and line.get_xdata()[0] in (1.25, 3.1, 0.8)
    }
    assert points == {0: (3.1, True), 1: (1.25, False), 2: (0.8, False)}
    spans = {line.get_ydata()[0]: tuple(line.get_xdata()) for line in panel.lines[1:]
             if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"}  # fmt: skip
    assert spans[0] == (2.5, panel.get_xlim()[1])
    assert spans[1] == (1.1, 1.4)
    assert spans[2] == (0.8, 0.8)
    assert {*map(gain_text, found[:2]), "0.98"} <= set(texts_of(figure))
    text = " ".join(texts_of(figure))
    assert "Not known: mgd (one budget)." in text
    assert "mgd†" in texts_of(figure)
    assert "planned with an unreliable Cost" in text
    assert 1 in [line.get_xdata()[0] for line in panel.lines]


def test_large_gains_have_more_ticks_than_the_one(tmp_path):
    axis = two_ends(a_store(tmp_path, matrix()))[1]
    figure = gains.draw(
        [a_gain("cwd", 980.0, 740.0, None)], axis, looks(SIX), {"cwd": "cwd", "kd": "kd"}
    )
    (panel,) = figure.axes
    assert list(panel.get_xticks()) == [1, 100]


def test_flips_are_coloured_unless_unlikely_and_the_others_grey(tmp_path):
    verdict = a_verdict(("none", "kd", "cwd", "cirkd", "mgd"))
    sure, likely, unlikely, _ = verdict.flips
    verdict = replace(verdict, flips=[sure, replace(likely, second="cirkd"), unlikely])
    ends = two_ends(a_store(tmp_path, matrix()))
    figure = flips.draw(verdict, ends, looks(SIX), {name: name for name in SIX} | {"cwd": "cwd†"})
    drawn = [line for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    colours = {next(iter(line.get_ydata())): line.get_color() for line in drawn}
    grey = [72 - 0.01 * n for n in (2, 4)]
    assert [at for at, colour in colours.items() if colour == "#b0b0b0"] == grey
    text = " ".join(texts_of(figure))
    assert "none over kd (+0.01 to -0.01 points, P = 0.97)" in text
    assert "1 pair is grey" in text
    assert "cwd†" in text
    assert "planned with an unreliable Cost" in text
    assert [line.get_linestyle() for line in drawn].count("--") == 1


def test_schedules_are_drawn_longest_first_with_forecasts_hollow():
    found = [*schedules_of(("kd", "cwd")), a_schedule("mgd", "VOC", reason="epochs")]
    figure = schedules.draw(found, costs_of(("kd", "cwd")), looks(SIX))
    assert len(figure.axes) == 2
    for panel in figure.axes:
        marks = [line for line in panel.lines if line.get_marker() in ("s", "^", "D")]
        hours = [line.get_xdata()[0] for line in marks]
        assert hours == sorted(hours, reverse=True)
        assert [line.get_markerfacecolor() == "white" for line in marks].count(True) == 2
    with pytest.raises(UserError, match="no published schedule"):
        schedules.draw(found[-1:], [], looks(SIX))


@pytest.mark.parametrize("option", ["--method", "--versus"])
def test_a_wrong_name_leaves_no_file(tmp_path, option):
    store = a_store(tmp_path, matrix(), [a_cost("kd")])
    done = CliRunner().invoke(cli, ["plot", "--out", str(store.root), option, "kdd"])
    assert getattr(done.exception, "exit_code", done.exit_code) == 2
    assert "did you mean 'kd'" in str(done.exception)
    assert not store.reports.exists()
