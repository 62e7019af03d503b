"""All that ``kdprof plot`` writes, what is left out, and what lies beside it."""

import pytest
from click.testing import CliRunner
from run_records import COSTS, a_cost, a_run, a_store, matrix

from kdprof.cli import cli
from kdprof.errors import UserError
from kdprof.records import Spent
from kdprof.reports.plot import write_all
from kdprof.store import write_record

TWO = ("none", "kd")


def test_figures_that_may_be_of_an_earlier_state_are_named(tmp_path):
    store = a_store(tmp_path, matrix(TWO), COSTS)
    before = write_all(store, formats=("png", "svg"))
    assert before.others == []
    other = [store.reports / name for name in ("schedules.png", "own.png", "steps.md")]
    for path in other:
        path.write_text("of another command")
    # A method whose budgets reach no amount of the others ends the ranking.
    for budget, seconds in (("5k@cwd", 1.0), ("10k@cwd", 2.0)):
        spent = Spent(planned=seconds, actual=seconds)
        run = a_run("mgd", budget, 0, 0.5 + seconds / 50, iterations_done=10, train_s=spent)
        write_record(store.run_folder("mgd", budget, 0).record, run)
    after = write_all(store, formats=("png",))
    left = {"flips.png", *(f"{name}.svg" for name in ("curves", "flips", "gain", "cost", "memory"))}
    assert {path.name for path in after.others} == left
    assert all(path.is_file() for path in (*after.files, *after.others, *other))


def test_an_edited_study_is_named_in_table_verdict_and_page(tmp_path):
    """The page prints study.toml, and the runs say what they were trained with."""
    settings = {"step.learning_rate": "0.01", "step.crop": "[64, 64]", "evaluation.points": "5"}
    runs = [run.model_copy(update={"identity": settings}) for run in matrix(TWO)]
    store = a_store(tmp_path, runs, COSTS)
    plain = "[step]\ncrop = [64, 64]\nlearning_rate = {}\n[evaluation]\npoints = 5\n"
    before = store.study.read_text()
    store.study.write_text(before + plain.format("0.010"))
    write_all(store, formats=("svg",))
    names = ("table.md", "verdict.md", "index.html")
    assert not any("edited" in (store.reports / name).read_text() for name in names)
    store.study.write_text(before + plain.format("0.02"))
    write_all(store, formats=("svg",))
    said = (
        "study.toml was edited after runs had been trained: step.learning_rate is 0.02 there, 0.01"
    )
    assert all(said in (store.reports / name).read_text() for name in names)


def test_the_accuracy_is_a_latex_table_too(tmp_path):
    store = a_store(tmp_path, matrix(TWO), COSTS)
    write_all(store, formats=("svg",))
    text = (store.reports / "table.tex").read_text()
    budgets = len({run.budget for run in matrix(TWO)})
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == budgets
    assert text.count("minipage") == 2  # around the notes of the last one
    assert text.count("mIoU is the last iterate's") == 1


def test_the_command_names_them(tmp_path):
    store = a_store(tmp_path, matrix(TWO), COSTS)
    write_all(store, formats=("png",))
    done = CliRunner().invoke(cli, ["plot", "--out", str(tmp_path), "--format", "svg"])
    assert done.exit_code == 0
    assert "may show an earlier state: curves.png, flips.png, gain.png" in done.output
    assert (store.reports / "curves.png").is_file()


def test_costs_of_two_devices_leave_out_their_figures_and_tables_alone(tmp_path):
    store = a_store(tmp_path, matrix(TWO), COSTS[:2])
    stems = {path.stem for path in write_all(store, formats=("png",)).files}
    assert {"cost", "memory", "costs"} <= stems
    store.write_cost(a_cost("cwd", 0.15, device="NVIDIA A100"))
    made = write_all(store, formats=("png",))
    assert {path.stem for path in made.files} == stems - {"cost", "memory", "costs"}
    assert {path.stem for path in made.others} == {"cost", "memory", "costs"}
    why = "the costs come from different devices (NVIDIA A100 and NVIDIA H200)"
    assert made.notes == [f"no figures and tables of costs: {why}; measure all methods on one"]
    assert f"Not compared: {why}." in (store.reports / "index.html").read_text()


def test_costs_of_two_devices_without_a_run_are_refused(tmp_path):
    store = a_store(tmp_path, [], [a_cost("kd"), a_cost("cwd", device="NVIDIA A100")])
    with pytest.raises(UserError, match="different devices"):
        write_all(store)
    assert not store.reports.exists()
