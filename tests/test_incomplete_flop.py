"""A total of FLOP that misses an operator is shown as a lower bound, and used for nothing."""

import json
import sys

import pytest
from cost_records import make_cost
from run_records import a_cost, a_run, a_store
from small_study import small_toml

from kdprof import cli
from kdprof.budget import convert, parse_budget
from kdprof.errors import UserError
from kdprof.measure.cost import hidden_cost
from kdprof.records import Cost, Flop, complete_sum
from kdprof.reports import table
from kdprof.reports.axes import available, axis
from kdprof.reports.comparison import compare
from kdprof.reports.costs import costs_csv, costs_latex, costs_markdown
from kdprof.reports.judge import judge
from kdprof.reports.results import collect, flop_notes
from kdprof.store import read_record

SPECTRAL = '''
import torch
import torch.nn.functional as F
from kdprof.method import Method


class Spectral(Method):
    """Mean difference between spectra, and mean squared error between logits."""

    taps = ("logits",)
    weights = {"spectra": 1.0, "mse": 1.0}

    def forward(self, student, teacher, labels):
        gap = torch.fft.rfft2(student.logits - teacher.logits)
        return {"spectra": gap.abs().mean(), "mse": F.mse_loss(student.logits, teacher.logits)}
'''
FORWARD = "aten._fft_r2c (1 x in objective)"


def run_here(*arguments) -> int:
    """The exit code of a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kdprof", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code or 0


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectral")
    (folder / "mine.py").write_text(SPECTRAL)
    methods = ["none", "kd", f"{folder}/mine.py:Spectral"]
    return small_toml(folder, methods=methods, budgets=[])


@pytest.fixture(scope="module")
def measured(study):
    """A folder with the Costs of the method and of the reference."""
    out, methods = (
        study.parent / "out",
        ["--method", "none", "--method", f"{study.parent}/mine.py:Spectral"],
    )
    assert run_here("measure", "--study", study, *methods, "--out", out, "-q") == 0
    return out


def cost_of(folder, method: str) -> Cost:
    (file,) = (folder / "costs").glob(f"{method}-*.json")
    return read_record(file, Cost)


def test_a_count_shows_a_lower_bound_and_names_the_operators(study, capsys):
    assert run_here("measure", "--study", study, "--count-only") == 0
    printed = capsys.readouterr().out
    (total,) = [
        line.split() for line in printed.splitlines() if line.startswith("spectral") and "≥" in line
    ]
    assert total[3:5] == ["-", "-"]
    assert total[6].startswith("≥")
    assert total[7] == "-"
    assert f"INCOMPLETE, a lower bound; not counted: {FORWARD}" in printed
    assert run_here("measure", "--study", study, "--count-only", "--json", "-q") == 0
    found = {cost["method"]: cost for cost in json.loads(capsys.readouterr().out)}
    flop = found["spectral"]["flop"]
    assert (flop["total"], flop["objective"], flop["backward"]) == (None, None, None)
    assert flop["counted"] == found["kd"]["flop"]["total"] > 0
    assert FORWARD in found["spectral"]["unavailable"]["flop.total"]
    assert found["spectral"]["terms"]["spectra"]["forward_flop"] is None
    assert found["spectral"]["terms"]["mse"]["forward_flop"] == 0
    assert "flop.total" not in found["none"]["unavailable"]


@pytest.mark.parametrize(
    "needs", [["--budget", "1e12flop"], ["--budget", "9", "--enforce", "flop"]]
)
def test_what_needs_a_total_is_refused_before_anything_runs(study, tmp_path, capsys, needs):
    arguments = ["--study", study, "--out", tmp_path / "out", "-q", *needs]
    assert run_here("train", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    setting = "budget '1e12flop'" if "1e12flop" in needs else "--enforce flop"
    assert line.startswith(f"kdprof: {setting}: the step of 'spectral' has no total of FLOP")
    assert FORWARD in line
    assert line.endswith("register_flop_formula")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_measured_record_lacks_what_follows_from_the_total(measured):
    cost, plain = cost_of(measured, "spectral"), cost_of(measured, "none")
    assert (cost.flop.total, cost.hidden_cost, cost.mfu) == (None, None, None)
    assert cost.flop.counted > plain.flop.total > 0
    assert plain.hidden_cost == 0
    for field in ("flop.total", "hidden_cost", "bounds.objective"):
        assert FORWARD in cost.unavailable[field]
    assert "objective" not in cost.bounds
    assert {"student_forward", "teacher_forward"} <= cost.bounds.keys()
    assert cost.flop_per_iteration() is None


@pytest.mark.slow
def test_measured_costs_are_not_converted_by_flop(measured, study, tmp_path, capsys):
    assert run_here("convert", "1e12flop", "--out", measured) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert FORWARD in line
    assert run_here("convert", "40@none", "--out", measured) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    last = {row[0].strip("†"): row[-1] for row in rows}
    assert (last["none"], last["spectral"]) == ("40", "-")


# By records


def incomplete(method="cwd", **changes) -> Cost:
    parts = dict.fromkeys(("teacher", "student", "objective", "backward", "auxiliary", "total"))
    return a_cost(
        method, flop=Flop(**parts, counted=5e9), hidden_cost=None,
        unavailable={"flop.total": "not counted: x.y (2 x in step), because z"}, **changes,
    )  # fmt: skip


def test_sums():
    assert complete_sum([]) == 0
    assert complete_sum([1.0, 2.0]) == 3.0
    assert complete_sum([1.0, None]) is None


def test_no_hidden_cost_without_both_totals():
    assert hidden_cost(2.0, 1.0, 4.0) == 0.5
    assert hidden_cost(None, 1.0, 4.0) is hidden_cost(2.0, None, 4.0) is None


def test_a_budget_in_flop_names_every_incomplete_method():
    costs = {name: incomplete(name) for name in ("cwd", "kd")} | {"none": a_cost("none")}
    with pytest.raises(UserError) as refused:
        convert(parse_budget("1e15flop"), costs)
    assert len(refused.value.problems) == 2
    assert all("x.y (2 x in step), because z" in line for line in refused.value.problems)
    assert {c.method: c.iterations_equal_flop for c in convert(parse_budget("9@kd"), costs)} == {
        "cwd": None, "kd": None, "none": None,
    }  # fmt: skip


def test_every_table_of_costs_marks_it():
    costs = [incomplete("cwd"), make_cost("kd", 0.1)]
    assert "≥5" in costs_markdown(costs)
    assert "not counted: x.y" in costs_markdown(costs)
    assert "not counted: x.y" in costs_latex(costs)
    header, row, *_ = (line.split(",") for line in costs_csv([incomplete("cwd")]).splitlines())
    cells = dict(zip(header, row, strict=False))
    assert (cells["matrix_flop"], cells["counted_flop"]) == ("", "5000000000.0")


def test_a_comparison_says_why_it_has_no_change():
    change = compare([incomplete()], [a_cost("cwd")], 0.01).rows[0]
    assert change.flop is None
    assert change.missing["flop"] == "not counted: x.y (2 x in step), because z"


def test_runs_are_not_compared_on_an_axis_that_one_of_them_lacks(tmp_path):
    reason = {"flop": "not counted: x.y (2 x in step), because z"}
    runs = [a_run("kd", flop=1e15), a_run("cwd", flop=None, unavailable=reason)]
    results = collect(a_store(tmp_path, runs))
    assert "flop" not in {each.name for each in available(results)}
    (note,) = flop_notes(results.finished)
    assert note.startswith("No FLOP of cwd: not counted: x.y (2 x in step), because z.")
    assert note in table.notes(results, [])
    assert note in judge(results).notes
    with pytest.raises(UserError, match=r"no flop of cwd is known \(not counted: x.y"):
        axis(results, "flop")


def test_a_record_of_an_older_version_is_not_taken_for_complete():
    new = a_cost("cwd", flop=Flop(**dict.fromkeys(Flop.model_fields, 5e9)), hidden_cost=0.1)
    old = new.model_dump(mode="json", by_alias=True) | {"schema": 4}
    del old["flop"]["counted"]
    assert Cost(**old).flop == new.flop
    operation = {
        "phase": "objective", "name": "aten._fft_r2c", "kind": "uncounted", "calls": 1,
        "matrix_flop": 0, "other_flop": None, "bytes_read": 8, "bytes_written": 8, "seconds": None,
    }  # fmt: skip
    read = Cost(**old | {"operations": [operation]})
    assert (read.flop.total, read.flop.counted, read.hidden_cost) == (None, 5e9, None)
    assert "aten._fft_r2c; measure again" in read.why_no_flop()
