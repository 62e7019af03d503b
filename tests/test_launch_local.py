"""Many runs at once on this machine, as real processes."""

import json
import os
import signal
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from processes import Command, kdprof
from small_study import price, small_study, small_toml, train_small

from kdprof.errors import UserError
from kdprof.launch import Job, jobs_of, local
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder, Store, write_record
from kdprof.study import claim_folder
from kdprof.train import checkpoint
from kdprof.train.runs import train_named

pytestmark = pytest.mark.slow

METHODS = '''
import os, signal, time
from pathlib import Path
from subprocess import CompletedProcess
from kdprof.method import Method
class Slow(Method):
    """Time enough for a signal."""
    taps = ("logits",)
    weights = {"mean": 0.01}
    def forward(self, student, teacher, labels):
        time.sleep(0.05)
        return {"mean": student.logits.mean()}
class Dies(Slow):
    """Its process is killed, once it trains."""
    def forward(self, student, teacher, labels):
        if Path(__file__).with_name("armed").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(student, teacher, labels)
class Raises(Slow):
    """Fails, once it trains."""
    def forward(self, student, teacher, labels):
        if Path(__file__).with_name("armed").exists():
            raise ValueError("armed")
        return super().forward(student, teacher, labels)
'''


def specs(folder: Path, *names: str) -> list[str]:
    (folder / "mine.py").write_text(METHODS)
    return [f"{folder / 'mine.py'}:{name}" for name in names]


def start(folder: Path, out: Path, *options: str, **changes) -> Command:
    price(out, small_study(**changes))
    study = small_toml(folder, **changes)
    shared = ("--launcher", "local", "--no-control")
    return Command("train", "--study", study, "--out", out, *shared, *options)


def run(*arguments, **changes) -> CompletedProcess:
    return start(*arguments, **changes).end()


def weights(folder: RunFolder) -> dict:
    state, damage = checkpoint.load(folder)
    assert damage is None
    return state["step"]


def wait_for(happened) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_at_once_are_the_runs_of_one_process(tmp_path):
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "kd 6 seed 0: mIoU" in done.stderr  # relayed
    assert "2 runs trained" in done.stdout
    ours, alone = Store(tmp_path / "out"), Store(tmp_path / "alone")
    train_small(alone.root)
    for method in ("none", "kd"):
        folders = [store.run_folder(method, "6", 0) for store in (ours, alone)]
        torch.testing.assert_close(*map(weights, folders), rtol=0, atol=0)
        assert [folder.read_run().concurrent_runs for folder in folders] == [1, 0]
    again = run(tmp_path, tmp_path / "out", "--json")
    assert again.returncode == 0
    assert {record["finished"] for record in json.loads(again.stdout)} == {True}


def test_one_that_dies_and_one_that_raises_do_not_keep_the_others_from_being_made(tmp_path):
    methods = ["kd", *specs(tmp_path, "Dies", "Raises")]
    changes = {"methods": methods, "budgets": ["2"]}
    store = Store(tmp_path / "out")
    study = small_study(**changes)
    price(store.root, study)
    claim_folder(store.study, study)
    (tmp_path / "armed").touch()
    done = run(tmp_path, store.root, **changes)
    assert done.returncode == 1
    assert {run.method for run in store.runs() if run.finished} == {"kd"}
    last = done.stderr.splitlines()[-2:]
    assert any("dies 2 seed 0: its process was killed, most often" in line for line in last)
    assert any("raises 2 seed 0: the step raised ValueError: armed" in line for line in last)
    assert "1 runs trained, 0 were finished before, 0 are held by other processes, 2 failed" in (
        " ".join(done.stdout.split())
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_launcher_has_every_run_saved(tmp_path, number):
    """SIGKILL too: the workers notice that it is gone."""
    changes = {"methods": specs(tmp_path, "Slow"), "budgets": ["60"], "seeds": 3}
    store = Store(tmp_path / "out")
    folders = [store.run_folder("slow", "60", seed) for seed in range(3)]
    launcher = start(tmp_path, store.root, **changes)
    wait_for(lambda: all(folder.record.exists() for folder in folders[:2]))
    time.sleep(0.5)
    launcher.send_signal(number)
    stopped = launcher.end()
    if number != signal.SIGKILL:
        assert stopped.returncode == 130
        assert "run the same command again to continue" in stopped.stderr.splitlines()[-1]
        assert "Traceback" not in stopped.stderr
    wait_for(lambda: not any(folder.is_held() for folder in folders))
    runs = [folder.read_run() for folder in folders[:2]]
    assert all(0 < run.iterations_done < 60 for run in runs)
    assert all(folder.checkpoint.exists() for folder in folders[:2])
    assert not folders[2].record.exists()
    assert run(tmp_path, store.root, "-q", **changes).returncode == 0
    assert all(folder.read_run().finished for folder in folders)
    alone = Store(tmp_path / "alone")
    train_small(alone.root, **changes | {"seeds": 1})
    torch.testing.assert_close(
        weights(folders[0]), weights(alone.run_folder("slow", "60", 0)), rtol=0, atol=0
    )


def test_a_price_of_another_device_is_refused(tmp_path):
    train_small(tmp_path, methods=["none", "kd"])
    store = Store(tmp_path)
    for cost in store.costs():
        store.cost_path(cost.method, cost.key).unlink()
        store.write_cost(cost.model_copy(update={"device": "NVIDIA X", "key": "0"}))
    study = ResolvedStudy(small_study(seeds=2))
    with pytest.raises(UserError, match=r"'kd' has no cost .*, but on NVIDIA X: train there"):
        train_named(study, store, Progress(None), "kd", ["6"], 1)
    run = store.run_folder("kd", "6", 0).read_run()
    write_record(
        store.run_folder("kd", "6", 0).record,
        run.model_copy(update={"identity": {**run.identity, "device": "NVIDIA X"}}),
    )
    with pytest.raises(UserError, match=r"runs/kd/6/0: device was NVIDIA X, is .* here"):
        train_named(study, store, Progress(None), "kd", ["6"], 0)


def test_runs_that_share_a_trunk_are_one_job(tmp_path):
    names, budgets = ["none", "kd"], ["3", "6"]
    plain = jobs_of(ResolvedStudy(small_study(budgets=budgets)), Store(tmp_path), names)
    assert plain == [Job(name, 0, (text,)) for text in budgets for name in names]
    changes = {"budgets": budgets, "step.schedule": "wsd"}
    shared = jobs_of(ResolvedStudy(small_study(**changes)), Store(tmp_path), names)
    assert shared == [Job(name, 0, ("3", "6")) for name in names]


def test_finished_cells_are_no_job(tmp_path):
    train_small(tmp_path, methods=["kd"])
    study = ResolvedStudy(small_study(budgets=["6", "7"]))
    assert jobs_of(study, Store(tmp_path), ["kd"]) == [Job("kd", 0, ("7",))]


def test_each_gpu_is_one_slot(monkeypatch):
    monkeypatch.setattr(local, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.divide("auto", None)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.divide("cuda", None)] == ["3", "GPU-5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in local.divide("cuda", 1)] == ["3"]
    with pytest.raises(UserError, match="3 slots of 1 GPUs each: this machine has 2"):
        local.divide("auto", 3)
    with pytest.raises(UserError, match="uses all GPUs, not cuda:1"):
        local.divide("cuda:1", None)


def test_gpus_of_one_run_are_one_slot(monkeypatch):
    monkeypatch.setattr(local, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,3,2,1,0")
    shares = [slot["CUDA_VISIBLE_DEVICES"] for slot in local.divide("auto", None, 2)]
    assert shares == ["4,3", "2,1"]
    with pytest.raises(UserError, match="1 slots of 8 GPUs each: this machine has 5; lower"):
        local.divide("auto", None, 8)


def test_a_cpu_is_shared_out_by_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    torch.set_num_threads(8)
    assert len(local.divide("cpu", 4)) == 4
    assert torch.get_num_threads() == 2
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert len(local.divide("cpu", 16)) == 16
    assert torch.get_num_threads() == 1


def test_slots_without_the_launcher_are_refused(tmp_path):
    done = kdprof("train", "--out", tmp_path, "--slots", "2")
    assert done.returncode == 2
    assert "add --launcher local" in done.stderr
    assert done.stderr.count("\n") == 1
