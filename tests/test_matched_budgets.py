"""Runs that keep to their budgets: pace, trunks and branches, ledger, plan and status."""

import csv
import json
import time
from dataclasses import replace

import pytest
import torch
from small_study import price, small_study, small_toml, train_small
from step_observer import observing, signal_at

from kdprof import cli
from kdprof.budget import seconds_per_iteration
from kdprof.cli.output import stdout
from kdprof.errors import UserError
from kdprof.records import LedgerEntry, Run, Spent
from kdprof.reports import table
from kdprof.resolve import ResolvedStudy
from kdprof.schedule import decay_start
from kdprof.store import Held, RunFolder, Store, append_line, write_record
from kdprof.train import checkpoint
from kdprof.train.cells import Cell, cells_of
from kdprof.train.ledger import Ledger
from kdprof.train.loop import Interrupted
from kdprof.train.pace import Enforced, Spending, pace_of
from kdprof.train.plan import _checkpoint_bytes, forecast
from kdprof.train.prepare import stored_costs
from kdprof.train.runs import Summary, _left, _without_failed

WSD = {"step__schedule": "wsd", "step__decay_fraction": 0.5, "methods": ["kd"]}


def weights(folder):
    return checkpoint.read(folder.checkpoint)["step"]["student"]


def record(**changes) -> Run:
    values = {
        "method": "kd", "budget": "6", "seed": 0, "device": "d", "iterations": 100,
        "schedule_iterations": 100,
        "iterations_done": 0, "miou": None, "miou_per_class": None, "best_miou": None,
        "train_s": Spent(planned=50.0, actual=0.0), "eval_s": 0, "checkpoint_s": 0, "flop": None,
        "energy_j": None, "cost_key": "k", "finished": False, "versions": {},
    }  # fmt: skip
    return Run(**(values | changes))


# What a budget makes equal


def test_tables_say_which_work_is_equal_where_it_is_not_compute(tmp_path, capsys):
    """F1: two epochs, twelve samples and six iterations are the same six steps of two of the six
    images for every method, and none of them is equal wall-clock."""
    budgets = {"2epoch": "epochs", "12sample": "samples", "6": "iterations"}
    train_small(tmp_path, budgets=list(budgets))
    store = Store(tmp_path)
    assert {run.iterations for run in store.runs()} == {6}
    table.render(store)
    written = (store.reports / "table.md").read_text()
    rows = list(csv.DictReader((store.reports / "table.csv").read_text().splitlines()))
    for budget, equal in budgets.items():
        assert f"{budget}: equal {equal}\n" in written
        assert {row["matched"] for row in rows if row["budget"] == budget} == {equal}
    table.print_table(store, stdout())
    for text in (written, capsys.readouterr().out):
        assert "equal wall-clock" not in text


# Pace


def test_an_enforced_run_is_where_its_spending_is():
    spent = [0.0]
    pace = pace_of(record(enforce="time"), None, Spending(lambda: spent[0], lambda: 0.0))
    assert isinstance(pace, Enforced)
    assert [pace.position(7), pace.reached(1, 7)] == [0.0, False]
    spent[0] = 25.0
    assert pace.position(0) == 50.0
    assert pace.reached(50, 0)
    assert not pace.reached(51, 99)
    spent[0] = 80.0
    assert pace.position(0) == 100.0


def test_what_cannot_be_enforced_is_refused():
    spending = Spending(lambda: 0.0, lambda: 0.0)
    with pytest.raises(UserError, match="no planned seconds"):
        pace_of(record(enforce="time", train_s=Spent(planned=None, actual=0)), None, spending)
    with pytest.raises(UserError, match="has no energy_j"):
        pace_of(record(enforce="energy"), None, spending)


def test_time_is_enforced(tmp_path):
    """The run ends within a step of its planned seconds, its rate at the end of the schedule."""
    train_small(tmp_path, methods=["none"], budgets=["1s"], training__enforce="time",
                step__min_learning_rate=0.0)  # fmt: skip
    folder = Store(tmp_path).run_folder("none", "1s", 0)
    run = folder.read_run()
    assert run.finished
    assert run.enforce == "time"
    each = run.train_s.actual / run.iterations_done
    assert run.train_s.planned <= run.train_s.actual + run.startup_s
    assert run.train_s.actual <= run.train_s.planned + 5 * each  # a noisy machine's longest step
    last = folder.read_curve()[-1]
    assert last.learning_rate < 0.2 * 0.01


def test_flop_are_enforced_exactly(tmp_path):
    train_small(tmp_path, methods=["kd"], budgets=["5"], training__enforce="flop")
    assert Store(tmp_path).run_folder("kd", "5", 0).read_run().iterations_done == 5


# Schedules


def rates_of(out, **changes):
    rates = []

    def record(step, iteration):
        if step.method.name == "kd":
            rates.append(step._optimizer.param_groups[0]["lr"])

    with observing(after=record):
        train_small(out, methods=["kd"], budgets=["4"], **changes)
    return rates[-4:]


def test_a_truncated_schedule_is_cut_where_the_budget_ends(tmp_path):
    whole = rates_of(tmp_path / "a")
    cut = rates_of(
        tmp_path / "b", training__schedule_span="truncate",
        training__schedule_iterations=8,
    )  # fmt: skip
    power, floor = 0.9, 1e-4
    for rates, span in ((whole, 4), (cut, 8)):
        wanted = [floor + (0.01 - floor) * (1 - i / span) ** power for i in range(4)]
        assert rates == pytest.approx(wanted)


def test_truncate_without_a_span_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"training\.schedule_iterations"):
        train_small(tmp_path, training__schedule_span="truncate")


# Trunk and branches


def test_a_branch_is_the_run_that_was_trained_alone(tmp_path):
    """wsd: bit for bit, and the larger budget pays only for what the trunk lacked."""
    budgets, wsd = ["4", "8"], WSD | {"step__optimizer": "adamw", "step__max_gradient_norm": 1.0}
    summary = train_small(tmp_path / "shared", budgets=budgets, **wsd)
    assert not summary.failures
    shared = Store(tmp_path / "shared")
    trunk = shared.trunk_folder("kd", 0)
    assert trunk.read_run().iterations_done == 4
    assert trunk.mark(2).exists()
    for budget in budgets:
        # Alone: a fresh folder whose only budget this is has its own trunk; take that away too.
        alone = Store(tmp_path / f"alone{budget}")
        train_small(
            alone.root, budgets=[budget], training__schedule_span="truncate",
            training__schedule_iterations=int(budget), **wsd,
        )  # fmt: skip
        assert not alone.trunk_folders()
        one, other = (store.run_folder("kd", budget, 0) for store in (shared, alone))
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
        run = one.read_run()
        assert run.iterations_done == int(budget)
        assert 0 < run.trunk_s < run.train_s.actual
        entries = one.read_ledger()
        assert next(e.kind for e in entries) == "trunk"
        own = sum(e.seconds for e in entries if e.kind == "train")
        assert run.train_s.actual == pytest.approx(run.trunk_s + own)


def test_a_trunk_grows_for_a_larger_budget(tmp_path):
    train_small(tmp_path, budgets=["4"], **WSD)
    summary = train_small(tmp_path, budgets=["4", "8"], **WSD)
    assert (len(summary.finished), summary.skipped) == (1, 1)
    trunk = Store(tmp_path).trunk_folder("kd", 0).read_run()
    assert trunk.iterations_done == 4
    grown = Store(tmp_path).run_folder("kd", "8", 0).read_run()
    assert grown.trunk_s == pytest.approx(trunk.train_s.actual)


def fail_in_the_trunk(step, iteration):
    if iteration == 3:
        raise ValueError("wrong")


@pytest.mark.parametrize("budgets", [["4", "8"], ["8", "4"]])
def test_a_trunk_that_fails_later_leaves_the_smaller_budgets(tmp_path, budgets):
    """Its marks are 2 and 4; the step after iteration 3 fails."""
    with observing(8, before=fail_in_the_trunk):
        summary = train_small(tmp_path, budgets=budgets, **WSD)
    assert [run.budget for run in summary.finished] == ["4"]
    assert summary.finished[0].trunk_s > 0
    (failure,) = summary.failures
    assert failure.startswith("kd 8 seed 0: the step raised ValueError: wrong")
    assert Store(tmp_path).trunk_folder("kd", 0).read_run().state() == "failed"
    again = train_small(tmp_path, budgets=budgets, **WSD)
    assert [run.budget for run in again.finished] == ["8"]
    assert again.finished[0].trunk_s > 0


def test_a_trunk_that_another_machine_has_taken_is_no_success(tmp_path):
    """Its marks are 2 and 4; it is taken between them."""
    lock = Store(tmp_path).trunk_folder("kd", 0).path / "lock"

    def take(step, iteration):
        if iteration == 2:
            lock.write_text('{"host": "elsewhere 1", "pid": 7}')

    with observing(8, after=take):
        summary = train_small(tmp_path, budgets=["4", "8"], **WSD)
    (failure,) = summary.failures
    assert "trunks/kd/0 is being trained on elsewhere (process 7), which took it over" in failure
    assert summary.elsewhere == ["kd 8 seed 0"]


def test_a_group_that_starts_again_leaves_out_what_needs_a_failed_trunk(tmp_path):
    """On several GPUs a failure restarts all processes, which must not come to it again."""
    with observing(8, before=fail_in_the_trunk):
        train_small(tmp_path, budgets=["8"], **WSD)
    budgets = ["4", "8", "12"]
    study, store = ResolvedStudy(small_study(budgets=budgets, **WSD)), Store(tmp_path)
    price(tmp_path, study.plain)
    cells = cells_of(study, store, ["kd"], stored_costs(study, store, ["kd"]))
    store.trunk_folder("kd", 0).mark(2).touch()
    summary = Summary()
    left = _without_failed(study, store, cells, cells, summary)
    assert [cell.budget for cell in left] == ["4"]
    assert summary.failures == [f"kd {budget} seed 0: wrong" for budget in ("8", "12")]


@pytest.mark.parametrize("writer", ["write", "save"])
def test_a_crash_beside_a_checkpoint_loses_no_mark(tmp_path, monkeypatch, writer):
    real = getattr(checkpoint, writer)

    def die(place, state):
        if (state["run"]["kind"], state["iteration"]) == ("trunk", 2):
            raise KeyboardInterrupt  # as a kill: nothing of ours runs
        real(place, state)

    monkeypatch.setattr(checkpoint, writer, die)
    with pytest.raises(KeyboardInterrupt):
        train_small(tmp_path, budgets=["4", "8"], **WSD)
    monkeypatch.undo()
    train_small(tmp_path, budgets=["4", "8"], **WSD)
    runs = Store(tmp_path).runs()
    assert len(runs) == 2
    assert all(run.trunk_s > 0 for run in runs)


@pytest.mark.parametrize(
    "calls",
    [
        [["4", "8", "12"]],  # marks 2, 4, 6
        [["4", "8"], ["12"]],  # the trunk has 4 of 6 iterations
        [["8", "12"], ["4", "16"]],  # the trunk has passed the mark of 4, which is trained alone
        [["12"], ["16", "14"]],
    ],
)
def test_the_plan_is_what_is_trained(tmp_path, calls):
    """Counted: the steps of kd, and the checkpoints on the disk."""
    made, budgets = [], []
    often = {**WSD, "training__checkpoint_every_s": 1e-9}
    for more in calls:
        budgets += more
        study = ResolvedStudy(small_study(budgets=budgets, **often))
        price(tmp_path, study.plain)
        costs = stored_costs(study, Store(tmp_path), ["kd"])
        planned = forecast(study, Store(tmp_path), ["kd"], costs)
        each = seconds_per_iteration(costs["kd"], costs)[0]
        before = list(tmp_path.glob("[rt]*s/**/*.pt"))
        made.clear()
        with observing(after=lambda step, i: step.method.name == "kd" and made.append(i)):
            train_small(tmp_path, budgets=budgets, **often)
        iterations = sum(one.seconds - one.saved_s for one in planned) / each
        assert iterations == pytest.approx(len(made))
        files = len(list(tmp_path.glob("[rt]*s/**/*.pt"))) - len(before)
        assert sum(one.disk_bytes for one in planned) == files * _checkpoint_bytes(study, "kd")


def test_a_trunk_that_grew_has_the_planned_seconds_of_its_length(tmp_path):
    """Its start-up is what exceeds them."""
    train_small(tmp_path, budgets=["4"], **WSD)
    trunk = Store(tmp_path).trunk_folder("kd", 0)
    before = trunk.read_run()
    train_small(tmp_path, budgets=["4", "12"], **WSD)
    assert (before.iterations, trunk.read_run().iterations) == (2, 6)
    planned_s = trunk.read_run().train_s.planned
    assert planned_s == pytest.approx(3 * before.train_s.planned)


def test_decay_begins_where_the_record_says():
    settings = small_study(**WSD).step
    assert [decay_start(settings, n) for n in (4, 8)] == [2, 4]


# Ledger


def test_work_after_the_checkpoint_is_lost(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for kind, iteration, seconds in (
        ("train", 3, 1.0), ("eval", 3, 2.0), ("checkpoint", 3, 0.5), ("train", 5, 4.0),
        ("eval", 5, 8.0), ("train", 6, 16.0),
    ):  # fmt: skip
        append_line(path, LedgerEntry(kind=kind, iteration=iteration, seconds=seconds))
    ledger = Ledger(path)
    ledger.rewind(5, evaluated={3})
    assert dict(ledger.spent_s) == {"train": 5.0, "eval": 2.0, "checkpoint": 0.5, "lost": 24.0}
    assert Ledger(path).spent_s == ledger.spent_s
    ledger.rewind(5, evaluated={3})
    assert ledger.spent_s["lost"] == 24.0


def test_a_line_that_a_power_cut_left_incomplete_is_removed(tmp_path):
    """Right after a checkpoint, so that no work was lost."""
    path = tmp_path / "ledger.jsonl"
    append_line(path, LedgerEntry(kind="train", iteration=3, seconds=1.0))
    with path.open("ab") as file:
        file.write(b'{"kind":"checkpoint","iter')
    ledger = Ledger(path)
    ledger.rewind(3, evaluated=())
    for iteration in (4, 5):
        ledger.book("train", iteration, 1.0)
    assert Ledger(path).spent_s == {"train": 3.0}


def test_a_stopped_run_books_what_it_lost(tmp_path):
    """The process dies after the log was written and before the next checkpoint."""

    def die(step, iteration):
        if iteration == 5:
            raise KeyboardInterrupt  # as a kill: nothing of ours runs

    settings = {"methods": ["kd"], "training__log_every": 1}
    with observing(6, before=die), pytest.raises(KeyboardInterrupt):
        train_small(tmp_path / "out", **settings)
    train_small(tmp_path / "out", **settings)
    run = Store(tmp_path / "out").run_folder("kd", "6", 0).read_run()
    assert run.finished
    assert run.lost_s > 0
    entries = Store(tmp_path / "out").run_folder("kd", "6", 0).read_ledger()
    assert sum(e.kind == "train" for e in entries) >= 6
    assert run.train_s.actual == pytest.approx(sum(e.seconds for e in entries if e.kind == "train"))


def test_start_up_is_apart_or_counted(tmp_path):
    """A first step that compiles for a second. The planned time of steps is not exact."""

    def compile_slowly(step, iteration):
        if iteration == 0:
            time.sleep(1)

    found = {}
    for mode in ("apart", "counted"):
        with observing(6, before=compile_slowly):
            train_small(tmp_path / mode, methods=["none"], training__startup=mode)
        found[mode] = Store(tmp_path / mode).run_folder("none", "6", 0).read_run()
        assert found[mode].startup == mode
    assert found["apart"].startup_s >= 0.8
    assert found["counted"].startup_s == 0
    assert found["counted"].train_s.actual >= 1


def test_the_log_has_every_term_and_its_lines_once(tmp_path):
    settings = {"methods": ["kd"], "training__log_every": 1}
    with observing(6, before=signal_at(4)), pytest.raises(Interrupted):
        train_small(tmp_path / "out", **settings)
    train_small(tmp_path / "out", **settings)
    lines = Store(tmp_path / "out").run_folder("kd", "6", 0).log.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["iteration"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert set(found[0]["losses"]) == {"task", "task_aux", "kd"}


# Locks


def test_a_lease_of_another_machine_counts_until_it_is_old(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        assert folder.is_held()
    assert not folder.is_held()
    import json
    import os
    import time

    file = folder.path / "lock"
    lease = json.dumps({"host": "elsewhere", "pid": 7})
    file.write_text(lease)
    with pytest.raises(Held, match=r"trained on elsewhere \(process 7\)"), folder.lock():
        pass
    for renewed in (time.time() - 3600, time.time() + 3600):  # it died, or a clock was set back
        file.write_text(lease)
        os.utime(file, (renewed, renewed))
        with folder.lock():
            pass


def test_a_torn_or_foreign_lease_file_is_no_lease(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for text in ('{"host": "else', "[1]", '{"host": "h", "pid": "x"}'):
        (folder.path / "lock").write_text(text)
        with folder.lock():
            pass


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path):
    folder = Store(tmp_path).run_folder("kd", "6", 0)
    with folder.lock():
        summary = train_small(tmp_path)
    assert [run.method for run in summary.finished] == ["none"]
    assert summary.elsewhere == ["kd 6 seed 0"]
    assert not summary.failures


def test_a_command_that_lost_a_run_says_so_and_fails(tmp_path, capsys, monkeypatch):
    """Another machine took the first run while this one slept; the second one is still trained."""
    study = small_study(methods=["none", "kd"], budgets=["6"])
    price(tmp_path / "out", study)
    lock = Store(tmp_path / "out").run_folder("none", "6", 0).path / "lock"

    def take(step, iteration):
        if iteration == 3 and step.method.name == "none":
            lock.write_text('{"host": "elsewhere 1", "pid": 7}')

    file = small_toml(tmp_path, methods=["none", "kd"], budgets=["6"])
    command = ["kdprof", "train", "--study", str(file), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    with observing(6, after=take), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "none/6/0 is being trained on elsewhere (process 7), which took it over" in said.err
    assert "1 runs trained" in said.out
    assert "0 are held by other processes, 1 failed" in said.out


# What is told


def test_status_tells_failed_stopped_and_running(tmp_path, capsys):
    from rich.console import Console

    from kdprof.reports.status import status_table

    store = Store(tmp_path)
    for seed, changes in enumerate(
        (
            {"finished": True, "miou": 0.5, "train_s": Spent(planned=50.0, actual=53.0)},
            {"failure": {"iteration": 3, "term": "kd", "reason": "kd is nan",
                         "checkpoint_iteration": None}},
            {}, {"lost_s": 4.0},
        )
    ):  # fmt: skip
        folder = store.run_folder("kd", "6", seed)
        folder.path.mkdir(parents=True)
        write_record(folder.record, record(seed=seed, **changes))
    with store.run_folder("kd", "6", 2).lock():
        status_table(store, Console(width=200))
    lines = capsys.readouterr().out
    for words in ("finished", "failed", "running", "stopped", "+6.0%", "kd is nan",
                  "1 of 1 finished runs more than 2 %"):  # fmt: skip
        assert words in lines


def test_status_does_not_guess_whether_a_run_is_held(tmp_path, capsys, monkeypatch):
    from rich.console import Console

    from kdprof.reports.status import status_table

    write_record(Store(tmp_path).run_folder("kd", "6", 0).record, record())
    status_table(Store(tmp_path), Console(width=200))
    assert "stopped" in (lines := capsys.readouterr().out)
    assert "not known" not in lines
    monkeypatch.setattr(RunFolder, "is_held", lambda folder: None)
    status_table(Store(tmp_path), Console(width=200))
    assert "stopped" not in (lines := capsys.readouterr().out)
    assert lines.count("not known") == 2  # the state, and what it means


def test_status_tells_what_a_shared_trunk_saved(tmp_path, capsys):
    """Runs of 50 s and 90 s that share the first 40 s and 80 s of a trunk of 80 s. Before the
    second one has begun, nothing is saved and nothing is lost."""
    from rich.console import Console

    from kdprof.reports.status import status_table

    store = Store(tmp_path)

    def write(folder, spent_s, **changes):
        spent = Spent(planned=None, actual=spent_s)
        write_record(folder.record, record(train_s=spent, **changes))

    write(store.trunk_folder("kd", 0), 80.0, kind="trunk", budget="")
    write(store.run_folder("kd", "2", 0), 50.0, budget="2", trunk_s=40.0)
    write(store.run_folder("none", "2", 0), 33.0, method="none", budget="2", trunk_s=30.0)
    status_table(store, Console(width=200))
    assert "Shared trunks" not in capsys.readouterr().out
    write(store.run_folder("kd", "4", 0), 90.0, budget="4", trunk_s=80.0)
    status_table(store, Console(width=200))
    assert "Shared trunks (wsd) saved 40.0 s of 2.88 min." in capsys.readouterr().out


def test_a_bar_tells_what_is_left_of_the_study():
    ends = dict.fromkeys(("iterations", "low", "high", "span"), 6)
    cells = [
        Cell(method="kd", budget="6", seed=seed, planned_s=1800.0, **ends) for seed in range(4)
    ]
    assert _left(cells, 0, 0.0) == " (2:00:00 for all)"
    assert _left(cells, 1, 3600.0) == " (3:00:00 for all)"  # took twice its plan
    assert _left([replace(cells[0], planned_s=None)], 0, 1.0) == " (0:00:00 for all)"
