"""Runs as jobs of a cluster: a real one, of this machine alone."""

import os
import re
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from processes import kdprof
from slurm_cluster import Cluster, missing
from small_study import small_toml, train_small

from kdprof.errors import UserError
from kdprof.launch import slurm
from kdprof.store import RunFolder, Store
from kdprof.train import checkpoint

pytestmark = pytest.mark.slow

METHOD = '''
import time
from pathlib import Path
from kdprof.method import Method
class Slow(Method):
    """Takes time enough to be interrupted, as long as it is to."""
    taps = ("logits",)
    weights = {"mean": 0.01}
    def forward(self, student, teacher, labels):
        if Path(__file__).with_name("slow").exists():
            time.sleep(0.1)
        return {"mean": (student.logits - teacher.logits).mean()}
'''
SEEDS = 3
reason = missing()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster") / "slurm") as running:
        if not running.has_node():
            pytest.skip(f"no node came up: {running.told()}")
        yield running


def command(folder: Path, *options: str, **changes) -> list[str]:
    study = str(small_toml(folder, **changes))
    shared = ("--out", str(folder / "out"), "--no-control", "--launcher", "slurm")
    return ["train", "--study", study, *shared, *options]


def submit(folder: Path, cluster: Cluster, *options: str, **changes) -> CompletedProcess:
    """Submit as a user does, on nodes where every process has one thread."""
    return kdprof(*command(folder, *options, **changes), **cluster.environment)


def iterations_done(folder: RunFolder) -> int:
    run = folder.read_run()
    return run.iterations_done if run else -1


def begins(cluster: Cluster, folder: RunFolder, task: str) -> None:
    """Wait until a task has trained for a while."""
    cluster.wait(lambda: iterations_done(folder) >= 0 and task in cluster.running())
    time.sleep(1)


def restarts(cluster: Cluster, task: str) -> int:
    found = re.search(r"Restarts=(\d+)", cluster.run("scontrol", "show", "job", task))
    return int(found.group(1))


@pytest.mark.skipif(bool(reason), reason=str(reason))
@pytest.mark.timeout(1200)
def test_requeued_preempted_and_left_by_their_node_they_end_the_same(tmp_path, cluster):
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "slow").touch()
    changes = {
        "methods": [f"{tmp_path / 'mine.py'}:Slow"],
        "budgets": ["200"],
        "seeds": SEEDS,
        "training.checkpoint_every_s": 0.5,
    }
    done = submit(tmp_path, cluster, "--slurm", "cpus=1", "--slurm", "time=00:30:00", **changes)
    assert done.returncode == 0, done.stderr
    assert "submitted 3 runs as 3 tasks" in done.stdout
    array = re.search(r"\((\d+)_0 ", done.stdout).group(1)
    tasks = [f"{array}_{index}" for index in range(SEEDS)]
    store = Store(tmp_path / "out")
    folders = [store.run_folder("slow", "200", seed) for seed in range(SEEDS)]

    again = submit(tmp_path, cluster, **changes)
    assert again.returncode == 2
    assert "are in the queue already" in again.stderr

    begins(cluster, folders[0], tasks[0])
    cluster.run("scontrol", "requeue", tasks[0])
    begins(cluster, folders[1], tasks[1])
    cluster.run("scancel", "--signal=USR2", tasks[1])  # as before a time limit
    cluster.wait(lambda: tasks[1] not in cluster.running())
    assert 0 < iterations_done(folders[1]) < 200
    begins(cluster, folders[2], tasks[2])
    assert restarts(cluster, tasks[0]) == restarts(cluster, tasks[1]) == 1
    cluster.kill_node()
    cluster.start_node_again()
    (tmp_path / "slow").unlink()
    cluster.wait(lambda: not cluster.queue(), 300)

    assert restarts(cluster, tasks[2]) == 1
    assert all(folder.read_run().finished for folder in folders)
    train_small(tmp_path / "alone", **changes)
    alone = Store(tmp_path / "alone")
    for seed, folder in enumerate(folders):
        expected = alone.run_folder("slow", "200", seed)
        torch.testing.assert_close(weights(folder), weights(expected), rtol=0, atol=0)
        assert folder.read_run().concurrent_runs is None
    report(cluster, store, tasks)

    over = submit(tmp_path, cluster, **changes)
    assert over.returncode == 2
    assert "every run of" in over.stderr


def weights(folder: RunFolder) -> dict:
    state, damage = checkpoint.load(folder)
    assert damage is None
    return state["step"]


def report(cluster: Cluster, store: Store, tasks: list[str]) -> None:
    """Keep what the cluster said, where it is asked for."""
    if not (place := os.environ.get("KDPROF_SLURM_LOG")):
        return
    jobs = [cluster.run("scontrol", "show", "job", task) for task in tasks]
    logs = [path.read_text() for path in sorted(store.slurm.glob("*_log.out"))]
    controller = (cluster.folder / "slurmctld.log").read_text()
    Path(place).write_text("\n".join([controller, *jobs, *logs]))


def test_options_of_the_cluster():
    found = slurm.parse_options(["partition=gpu", "time=1:30:10", "cpus=8", "memory=32GB"])
    assert found == {
        "partition": "gpu", "time": 91, "cpus_per_task": 8, "mem": "32GB", "signal_delay_s": 120
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        slurm.parse_options(["partion=gpu", "time=soon", "cpus=", "gpus=two"])
    told = str(error.value)
    assert "did you mean 'partition'" in told
    assert "--slurm time=soon: time must be minutes, or HH:MM:SS" in told
    assert "--slurm cpus=: write cpus=VALUE" in told
    assert "--slurm gpus=two: gpus must be a whole number" in told


def test_without_a_cluster_it_is_refused_in_one_line(tmp_path):
    done = kdprof(*command(tmp_path), PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "submit from a machine of a Slurm cluster" in done.stderr


def test_options_without_the_launcher_are_refused(tmp_path):
    done = kdprof(*command(tmp_path)[:-2], "--slurm", "cpus=1")
    assert done.returncode == 2
    assert "add --launcher slurm" in done.stderr
