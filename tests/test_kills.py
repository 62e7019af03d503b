"""Death at any moment: of the process, at every file operation, and of the disk."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import kdprof
from small_study import small_toml, train_small

from kdprof.store import RunFolder, Store
from kdprof.train import checkpoint

KILLS = Path(__file__).parents[1] / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path):
    """In a fresh process: what forks must not have computed with torch before it does."""
    done = subprocess.run(
        [sys.executable, KILLS, "--kills", "8", "--seed", "1"],
        capture_output=True, text=True, timeout=600, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.match(r"(\d+) kills over \d+ trainings: (\d+) differ", done.stdout)
    kills, differing = map(int, said.groups())
    assert kills == 8
    assert differing == 0


def in_child(work) -> int:
    """Run in a fork; return the signal that ended it, 0 where it ended by itself."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying_at(call: int, before: bool):
    """Make the ``call``-th file operation of this process its last, before or after it is done."""
    calls = 0

    def wrapped(real):
        def operation(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == call and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **keywords)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    os.fsync = wrapped(os.fsync)
    Path.replace = wrapped(Path.replace)
    torch.save = wrapped(torch.save)
    Path.open = wrapped(Path.open)


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_file_operation_of_the_checkpoint_writer(tmp_path, before):
    """Open, write, fsync of the file, both renames and the fsyncs of the folder, in turn."""
    killed = 0
    for call in range(1, 100):
        folder = RunFolder(tmp_path / f"{call}")
        folder.path.mkdir()
        for iteration in (1, 2):
            checkpoint.save(folder, {"iteration": iteration, "w": torch.arange(3000.0)})

        def save(call=call, folder=folder):
            dying_at(call, before)
            checkpoint.save(folder, {"iteration": 3, "w": torch.arange(3000.0)})

        if in_child(save) != signal.SIGKILL:
            break
        killed += 1
        state, damage = checkpoint.load(folder)
        assert damage is None
        assert state["iteration"] in (2, 3)
        checkpoint.save(folder, {"iteration": 4})
        assert checkpoint.load(folder)[0]["iteration"] == 4
    assert killed == 7  # open, save, fsync, and twice replace with its folder's fsync


def test_a_half_written_file_is_never_taken_for_a_checkpoint(tmp_path):
    """Killed while bytes are written: at growing sizes of the temporary file."""
    folder = RunFolder(tmp_path)
    checkpoint.save(folder, {"iteration": 1})
    whole = folder.checkpoint.read_bytes()
    for size in range(0, len(whole), len(whole) // 7):
        folder.checkpoint.with_suffix(".tmp").write_bytes(whole[:size])
        assert checkpoint.load(folder) == ({"iteration": 1}, None)
    checkpoint.save(folder, {"iteration": 2})
    assert checkpoint.load(folder)[0]["iteration"] == 2


def test_a_fallback_survives_the_next_save(tmp_path):
    """The damaged file must not become the previous one."""
    folder = RunFolder(tmp_path)
    for iteration in (1, 2):
        checkpoint.save(folder, {"iteration": iteration})
    folder.checkpoint.write_bytes(b"rubbish")
    state, damage = checkpoint.recover(folder)
    assert state["iteration"] == 1
    assert "damaged" in damage
    checkpoint.save(folder, {"iteration": 2})
    folder.checkpoint.write_bytes(b"rubbish again")
    assert checkpoint.recover(folder)[0]["iteration"] == 1


def test_a_full_disk_keeps_what_there_was_and_leaves_no_rubbish(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    checkpoint.save(folder, {"iteration": 1})

    def full(state, file):
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, {"iteration": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt"]
    assert checkpoint.load(folder)[0]["iteration"] == 1


def test_a_full_disk_fails_the_run_and_says_so(tmp_path, monkeypatch):
    real = torch.save

    def full(state, file):
        if state["run"]["method"] == "kd":
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    summary = train_small(tmp_path)
    assert [run.method for run in summary.finished] == ["none"]
    assert "No space left on device" in summary.failures[0]
    assert "No space left" in Store(tmp_path).run_folder("kd", "6", 0).read_run().failure.reason


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    """A file stands where the folder should be; even root cannot write into that."""
    (tmp_path / "file").touch()
    study = small_toml(tmp_path)
    done = kdprof("train", "--study", study, "--out", tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "use another --out" in done.stderr
