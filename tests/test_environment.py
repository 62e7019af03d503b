"""Systems that lack something: locks, a name that resolves, an account, a screen.

Each situation is the real one: a process that has not what it lacks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import VARIABLES, kdprof
from run_records import a_run, a_store
from small_study import price, small_study, small_toml

from kdprof.store import Store

NO_FLOCK = """
#include <errno.h>
int flock(int file, int how) { errno = ENOSYS; return -1; }
"""


def command(*arguments, before=(), environment=None, **options) -> subprocess.CompletedProcess:
    """Run ``kdprof`` in a new Python, by another program where ``before`` is given."""
    return subprocess.run(
        [*before, sys.executable, "-m", "kdprof", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=250,
        env={**os.environ, **VARIABLES, **(environment or {})}, **options,
    )  # fmt: skip


def may_run(*words) -> bool:
    try:
        return not subprocess.run(words, capture_output=True, check=False).returncode
    except OSError:
        return False


def lines_of_own(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("kdprof: ")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_study_is_trained_where_files_cannot_be_locked(tmp_path):
    """F9: a file system of a cluster, whose flock fails."""
    (tmp_path / "noflock.c").write_text(NO_FLOCK)
    library = tmp_path / "noflock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "noflock.c"], cwd=tmp_path, check=True)
    preloaded = {"LD_PRELOAD": str(library)}
    study, out = small_toml(tmp_path, methods=["none"]), tmp_path / "out"
    price(out, small_study(methods=["none"]))
    arguments = ("train", "--study", study, "--out", out, "--no-control")
    done = command(*arguments, environment=preloaded)
    assert done.returncode == 0, done.stderr
    assert "has no locks" in done.stderr
    assert [run.finished for run in Store(out).runs()] == [True]
    again = command(*arguments, environment=preloaded)
    assert "0 runs trained, 1 were finished before" in again.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not may_run("unshare", "--uts", "true"),
    reason="needs the right to give a process another host name",
)
def test_processes_meet_where_the_machines_name_does_not_resolve(tmp_path):
    """F10: a container whose host name is in no table."""
    changes = {"methods": ["none"], "step__gpus": 2, "measure__in_process": False}
    study, out = small_toml(tmp_path, **changes), tmp_path / "out"
    named = ("unshare", "--uts", "sh", "-c", 'hostname nosuchhost-xyz && exec "$0" "$@"')
    done = command("train", "--study", study, "--out", out, "--no-control", "-q", before=named)
    assert done.returncode == 0, done.stderr
    assert [(run.finished, run.gpus) for run in Store(out).runs()] == [(True, 2)]


NOBODY = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups")


@pytest.mark.slow
@pytest.mark.skipif(
    not may_run(*NOBODY, sys.executable, "-c", "import kdprof"),
    reason="needs the right to become another user, who may read this installation",
)
def test_an_id_without_an_account_has_a_doctor():
    """F17: a container that runs as a number."""
    here = {"HOME": "/", "USER": "", "LOGNAME": "", "LNAME": "", "USERNAME": ""}
    done = command("doctor", before=NOBODY, environment=here, cwd="/")
    assert done.returncode == 0, done.stderr
    assert lines_of_own(done) == []
    assert "torch" in done.stdout


def test_figures_are_written_whatever_a_notebook_asks_for(tmp_path):
    """F16: MPLBACKEND as a notebook's kernel leaves it."""
    store = a_store(tmp_path / "out", [a_run("kd"), a_run("cwd", miou=0.72)])
    backend = "module://matplotlib_inline.backend_inline"
    done = kdprof("plot", "--out", store.root, "--format", "png", MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert Path(store.reports / "curves.png").read_bytes().startswith(b"\x89PNG")
