"""TensorBoard's files as its own reader finds them, and W&B offline."""

from itertools import pairwise

import pytest
from processes import kdprof
from small_study import price, small_study, small_toml, train_small

from kdprof.errors import UserError
from kdprof.records import LogLine
from kdprof.store import Store, read_lines
from kdprof.study import join_study
from kdprof.train import checkpoint, loggers

LOGGING = {"training.loggers": ["tensorboard"], "training.log_every": 2}


def scalars(store: Store) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = store.run_folder("kd", "6", 0).path / "tensorboard"
    found = EventAccumulator(str(folder)).Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def test_tensorboard_has_what_the_log_has(tmp_path):
    train_small(tmp_path, methods=["kd"], **LOGGING)
    store = Store(tmp_path)
    folder, found = store.run_folder("kd", "6", 0), scalars(store)
    lines = read_lines(folder.log, LogLine)
    wanted = [(line.iteration, pytest.approx(line.losses["kd"])) for line in lines]
    assert found["loss/kd"] == wanted
    assert {"loss/task", "loss/task_aux", "learning_rate", "train_s"} < found.keys()
    curve = [(p.iteration, pytest.approx(p.miou)) for p in folder.read_curve()]
    assert found["miou"] == curve
    assert folder.read_run().logging_s > 0


def test_a_continued_run_has_no_point_twice(tmp_path):
    """Killed after its last checkpoint, at iteration 3: what came later is made again."""
    train_small(tmp_path, methods=["kd"], **LOGGING)
    folder = Store(tmp_path).run_folder("kd", "6", 0)
    folder.checkpoint.unlink()
    previous, damage = checkpoint.recover(folder)
    assert damage is None
    assert previous["iteration"] == 3
    folder.record.unlink()
    train_small(tmp_path, methods=["kd"], **LOGGING)
    steps = [step for step, _ in scalars(Store(tmp_path))["loss/kd"]]
    assert steps[-1] == 6
    assert all(one < other for one, other in pairwise(steps))


def test_a_logger_that_is_not_installed_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'tensorboard' is not installed; pip install"):
        train_small(tmp_path, methods=["kd"], **LOGGING)
    assert not Store(tmp_path).costs()


def test_loggers_are_no_part_of_what_is_compared(tmp_path):
    (tmp_path / "study.toml").write_text(small_study().to_toml())
    join_study(tmp_path / "study.toml", small_study(**{"training.loggers": ["tensorboard"]}))


def test_weights_and_biases_works_offline(tmp_path):
    changes = {"training.loggers": ["wandb"], "methods": ["none"]}
    study = small_toml(tmp_path, **changes)
    price(tmp_path / "out", small_study(**changes))
    done = kdprof("train", "--study", study, "--out", tmp_path / "out", "--no-control")
    assert done.returncode == 0, done.stderr
    folder = Store(tmp_path / "out").run_folder("none", "6", 0).path
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
