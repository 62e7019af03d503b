import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from small_study import price, small_study, small_toml, train_small
from step_observer import observing, signal_at, stopped_at

from kdprof.errors import KdprofError, UserError
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder, Store
from kdprof.study import claim_folder
from kdprof.train import checkpoint, loop
from kdprof.train.loop import Interrupted
from kdprof.train.prepare import prepare
from kdprof.train.runs import train


def weights(folder: RunFolder) -> dict:
    state, damage = checkpoint.load(folder)
    assert damage is None
    return state["step"]


def assert_same_training(one: RunFolder, other: RunFolder) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    curves = [
        [(p.iteration, p.miou, p.losses) for p in folder.read_curve()] for folder in (one, other)
    ]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Store:
    """none and kd, two budgets in iterations, trained without a break."""
    out = tmp_path_factory.mktemp("trained")
    summary = train_small(out, budgets=["3", "6"])
    assert (len(summary.finished), summary.skipped, summary.failures) == (4, 0, [])
    return Store(out)


def test_every_cell_has_its_record_curve_and_ledger(trained):
    assert len(trained.runs()) == 4
    for folder in trained.run_folders():
        run = folder.read_run()
        assert run.finished
        assert run.iterations_done == run.iterations == int(run.budget)
        assert [p.iteration for p in folder.read_curve()] == [
            -(-run.iterations // 2),
            run.iterations,
        ]
        ledger = folder.read_ledger()
        assert run.train_s.actual == pytest.approx(
            sum(e.seconds for e in ledger if e.kind == "train")
        )
        assert run.eval_s == pytest.approx(sum(e.seconds for e in ledger if e.kind == "eval"))
        assert run.miou == folder.read_curve()[-1].miou
        assert run.best_miou == max(p.miou for p in folder.read_curve())
        assert run.train_s.planned > 0
        cost = trained.read_cost(run.method, run.cost_key)
        assert run.flop == cost.flop.total * run.iterations


def test_finished_runs_are_left_alone(trained):
    before = {p: p.stat().st_mtime_ns for p in trained.root.rglob("*.pt")}
    summary = train_small(trained.root, budgets=["3", "6"])
    assert (len(summary.finished), summary.skipped) == (0, 4)
    assert {p: p.stat().st_mtime_ns for p in trained.root.rglob("*.pt")} == before


def test_finished_run_with_other_settings_is_not_taken_for_this_one(trained):
    changes = {"method_settings.kd.temperature": 4.0}
    with pytest.raises(UserError, match=r"kd/3/0: temperature of the method was 1.0, is 4.0"):
        train_small(trained.root, budgets=["3"], methods=["kd"], **changes)


def test_teacher_is_trained_once_and_reported_apart(trained):
    run = trained.teacher_run()
    assert run.finished
    assert run.iterations == 4
    assert "teacher" not in {r.method for r in trained.runs()}
    before = trained.teacher_folder().checkpoint.stat().st_mtime_ns
    train_small(trained.root, budgets=["2"], methods=["kd"])
    assert trained.teacher_folder().checkpoint.stat().st_mtime_ns == before


def test_the_evaluation_of_a_given_teacher_is_timed_as_a_runs_is(trained, tmp_path, monkeypatch):
    """By the clock that stands still while the process is stopped."""
    weights = f"{trained.teacher_folder().checkpoint}#step.student"
    moments = iter([100.0, 102.5])
    monkeypatch.setattr("kdprof.train.teacher.running_s", lambda: next(moments))
    train_small(tmp_path, budgets=["2"], methods=["kd"], teacher_weights=weights)
    assert Store(tmp_path).teacher_run().eval_s == 2.5


def test_controls_are_part_of_a_comparison(tmp_path):
    names = ResolvedStudy(small_study(methods=["cwd"])).method_names(control=True)
    assert names == ["none", "kd", "cwd"]


def test_paired_seeds_share_initialisation_and_data():
    study = ResolvedStudy(small_study(methods=["none", "kd", "fitnet"]))
    teacher = study.factory.placed_teacher()
    steps = [study.factory.step(name, teacher, seed=3) for name in ("none", "kd", "fitnet")]
    for step in steps[1:]:
        for ours, theirs in zip(
            step.student.parameters(), steps[0].student.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    other = study.factory.step("none", None, seed=4)
    assert not torch.equal(
        other.student.decode_head.conv_seg.weight, steps[0].student.decode_head.conv_seg.weight
    )
    assert not torch.equal(
        study.factory.batches(3).batch(0)[0], study.factory.batches(4).batch(0)[0]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_stopped_and_continued_is_the_uninterrupted_run(trained, tmp_path, number, stop_after):
    """A signal in the middle, at an evaluation, and after the last iteration."""
    again = pytest.raises(Interrupted, match="run the same command again")
    with observing(6, before=signal_at(stop_after - 1, number)), again:
        train_small(tmp_path, methods=["kd"])
    folder = Store(tmp_path).run_folder("kd", "6", 0)
    assert folder.read_run().iterations_done == stop_after
    assert not folder.read_run().finished
    train_small(tmp_path, methods=["kd"])
    assert folder.read_run().finished
    assert_same_training(folder, trained.run_folder("kd", "6", 0))


@pytest.mark.parametrize("enforce", ["iterations", "time"])
def test_a_stopped_process_does_not_train(tmp_path, enforce):
    """Its seconds are no training, no waiting and no part of a budget in time."""
    changes = {"budgets": ["20"], "methods": ["kd"], "training__enforce": enforce}
    began = time.perf_counter()
    with observing(20, before=stopped_at(3, seconds=3.0)):
        summary = train_small(tmp_path, **changes)
    passed_s = time.perf_counter() - began
    (run,) = summary.finished
    assert run.paused_s == pytest.approx(3.0, abs=0.5)
    assert run.train_s.actual + run.eval_s + run.startup_s < passed_s - 2.4
    assert run.data_wait_s <= run.train_s.actual + run.startup_s
    if enforce == "time":
        assert run.train_s.actual > 0.8 * run.train_s.planned
    assert "it was stopped for" in loop.outcome(run)


@pytest.mark.slow
def test_killed_again_and_again_ends_with_the_same_weights(trained, tmp_path):
    """SIGKILL of the real process at growing times; what is left is continued each time."""
    changes, out = {"methods": ["kd"], "evaluation__points": 6}, tmp_path / "out"
    study = small_toml(tmp_path, **changes)
    price(out, small_study(**changes))
    command = [sys.executable, "-m", "kdprof", "train", "--study", str(study), "--out", str(out)]
    folder = Store(out).run_folder("kd", "6", 0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill in range(3):
        process = subprocess.Popen([*command, "--no-control", "-q"], env=environment)
        deadline = time.monotonic() + 120
        wanted = kill + 1
        while process.poll() is None and time.monotonic() < deadline:
            if len(folder.read_curve()) >= wanted:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--no-control", "-q"], env=environment, check=True)
    assert folder.read_run().finished
    torch.testing.assert_close(
        weights(folder), weights(trained.run_folder("kd", "6", 0)), rtol=0, atol=0
    )
    assert [p.iteration for p in folder.read_curve()] == [1, 2, 3, 4, 5, 6]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
        content[largest.header_offset + 200 + largest.file_size // 2] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "empty", "bit flipped"])
def test_damaged_checkpoint_falls_back_to_the_previous(tmp_path, how):
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        checkpoint.save(folder, {"iteration": iteration, "w": torch.arange(5000.0) + iteration})
    damage(folder.checkpoint, how)
    state, told = checkpoint.load(folder)
    assert state["iteration"] == 1
    assert "checkpoint.pt is damaged" in told
    assert "\n" not in told
    damage(folder.previous_checkpoint, how)
    with pytest.raises(KdprofError, match="no whole one is left"):
        checkpoint.load(folder)


def test_run_with_damaged_checkpoint_ends_the_same(trained, tmp_path):
    with observing(6, before=signal_at(4)), pytest.raises(Interrupted):
        train_small(tmp_path, methods=["kd"])
    folder = Store(tmp_path).run_folder("kd", "6", 0)
    damage(folder.checkpoint, "truncated")
    train_small(tmp_path, methods=["kd"])
    assert_same_training(folder, trained.run_folder("kd", "6", 0))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_failing_write_keeps_a_whole_checkpoint(tmp_path, monkeypatch, failing, call):
    """Disk trouble at each file operation of the writer in turn."""
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        checkpoint.save(folder, {"iteration": iteration})
    owner = os if failing == "fsync" else Path
    real, calls = getattr(owner, failing), 0

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(owner, failing, fail)
    with contextlib.suppress(OSError):
        checkpoint.save(folder, {"iteration": 3})
    monkeypatch.undo()
    state, told = checkpoint.load(folder)
    assert told is None
    assert state["iteration"] in (2, 3)


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/kdprof-was-here",))


def test_checkpoint_never_runs_code(tmp_path):
    folder = RunFolder(tmp_path)
    torch.save({"iteration": Malicious()}, folder.checkpoint)
    with pytest.raises(KdprofError, match=r"is damaged .it holds more than tensors and plain"):
        checkpoint.load(folder)
    assert not Path("/tmp/kdprof-was-here").exists()


BAD_METHODS = '''
from kdprof.method import Method
class Nan(Method):
    """Not a number, once it is armed."""
    taps = ("logits",)
    weights = {"bad": 1.0}
    armed = False
    def forward(self, student, teacher, labels):
        return {"bad": (float("nan") if self.armed else 1.0) * student.logits.mean()}
class Raises(Nan):
    pass
class Unmeasurable(Nan):
    def forward(self, student, teacher, labels):
        raise ValueError("never works")
'''


def test_runs_that_fail_do_not_spoil_the_others(tmp_path):
    file, store = tmp_path / "bad.py", Store(tmp_path / "out")
    file.write_text(BAD_METHODS)
    names = ["nan", "raises", "unmeasurable", "kd"]
    specs = [f"{file}:{name.title()}" for name in names[:-1]]
    study = small_study(methods=[*specs, "kd"])
    price(store.root, study.model_copy(update={"methods": study.methods[:2]}))
    resolved = ResolvedStudy(study)
    prepared = prepare(resolved, store, names, Progress(None))
    claim_folder(store.study, study)
    resolved.methods["nan"].cls.armed = True
    resolved.methods["raises"].cls.forward = _divide_by_zero
    summary = train(resolved, store, Progress(None), control=False, prepared=prepared)
    assert {run.method for run in summary.finished} == {"kd"}
    unmeasured, nan, raised = summary.failures
    assert "method 'unmeasurable': the step raised ValueError: never works" in unmeasured
    assert re.search(r"nan 6 seed 0: bad is nan at iteration 0", nan)
    assert re.search(r"raises 6 seed 0: the step raised ZeroDivisionError: .*test_train.py", raised)
    runs = {run.method: run for run in store.runs()}
    assert runs.keys() == {"nan", "raises", "kd"}
    assert not runs["nan"].finished
    assert runs["nan"].state() == "failed"
    assert (runs["nan"].failure.iteration, runs["nan"].failure.term) == (0, "bad")
    assert runs["nan"].failure.checkpoint_iteration is None
    assert "ZeroDivisionError" not in runs["raises"].failure.reason


def _divide_by_zero(self, student, teacher, labels):
    return 1 / 0


def test_interrupted_run_keeps_its_length(tmp_path, monkeypatch):
    """Its learning rates were set for it, whatever a later measurement says."""
    monkeypatch.setattr(loop.TrainingRun, "_train_until", _interrupt)
    with pytest.raises(Interrupted):
        train_small(tmp_path, methods=["none"], budgets=["1s"])
    monkeypatch.undo()
    folder = Store(tmp_path).run_folder("none", "1s", 0)
    record = json.loads(folder.record.read_text())
    record["iterations"] = 5
    folder.record.write_text(json.dumps(record))
    train_small(tmp_path, methods=["none"], budgets=["1s"])
    assert folder.read_run().iterations_done == 5


def _interrupt(self, stop, advance):
    raise Interrupted("stopped")


def test_budget_that_buys_nothing_is_refused_before_any_training(tmp_path):
    with pytest.raises(UserError, match="smaller than one iteration of 'none'"):
        train_small(tmp_path, budgets=["0.0001s"])
    assert not list(tmp_path.rglob("run.json"))


def test_other_seeds_are_as_long_as_the_first(tmp_path):
    """Measured again in between, on a machine of another mood."""
    train_small(tmp_path, methods=["none", "kd"], budgets=["6@kd"])
    store = Store(tmp_path)
    lengths = {run.method: run.iterations for run in store.runs()}
    for cost in store.costs():
        slower = {key: 3 * value for key, value in vars(cost.ratio).items() if key != "to"}
        ratio = cost.ratio.model_copy(update=slower if cost.method == "kd" else {})
        store.write_cost(cost.model_copy(update={"ratio": ratio, "end_to_end_ratio": ratio}))
    train_small(tmp_path, methods=["none", "kd"], budgets=["6@kd"], seeds=2)
    assert {run.method: run.iterations for run in store.runs() if run.seed == 1} == lengths
