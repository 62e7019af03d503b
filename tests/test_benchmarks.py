"""The comparison of objectives with their oracles, as a process at the smallest sizes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import objectives
import pytest
import torch
import training
from oracles_core import ORACLES
from small_study import small_study

from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder

BROKEN = """
from oracles_core import kd

def broken(*taps):
    return {name: 1.01 * term for name, term in kd(*taps).items()}

ORACLES = {"kd": broken}
"""
HUNGRY = """
import time
import torch
from oracles_core import kd

def hungry(student, *rest):
    if student.logits.shape[3] > 12:
        kept = torch.ones(10**8)
        time.sleep(1)
    return kd(student, *rest)

ORACLES = {"kd": hungry}
"""


def benchmark(*arguments, folder=None, source=None) -> subprocess.CompletedProcess:
    """Run the real process, with one oracle of the test's where ``source`` is given."""
    if source:
        (folder / "oracles_test.py").write_text(source)
        arguments = (*arguments, "--oracles", folder)
    program = Path(objectives.__file__)
    fixed = ("--device", "cpu", "--threads", "1", "--repeats", "2")
    return subprocess.run(
        [sys.executable, program, *fixed, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def rows_of(markdown: str) -> dict[str, dict[str, str]]:
    """Return the table by method and column."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_bare_loop_does_the_work_of_ours(tmp_path):
    """A block of one timed iteration, without dropout, comes to the same weights."""
    study = ResolvedStudy(small_study(methods=["kd"], step__min_learning_rate=0.0))
    ours = training.OurLoop(study, "kd", 1, tmp_path)
    bare = training.BareLoop(study, "kd", 1)
    bare.student.load_state_dict(ours.step.student.state_dict())
    for network in (ours.step.student, bare.student):
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
                module.p = 0.0
    assert ours() > 0
    assert bare() > 0
    wanted, found = dict(ours.step.student.state_dict()), dict(bare.student.state_dict())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_loops_are_timed_after_what_was_queued(tmp_path, monkeypatch):
    """Two loader processes queue two batches each; the clock starts after these and two more."""
    monkeypatch.setattr(training, "STARTING", 2)
    study = ResolvedStudy(small_study(methods=["kd"], data_settings__workers=2))
    ours = training.OurLoop(study, "kd", 3, tmp_path)
    assert training.untimed(ours.batches) == 2 + 2 * 2
    began = time.perf_counter()
    seconds = ours()
    assert 0 < seconds < time.perf_counter() - began
    assert ours.trained_s == seconds
    assert 0 <= ours.waited_s <= seconds
    *_, line = RunFolder(tmp_path / "0").log.read_text().splitlines()
    assert json.loads(line)["iteration"] == 6 + 3


@pytest.mark.slow
def test_objectives_are_compared(tmp_path):
    done = benchmark(
        "--method", "kd", "--method", "cwd", "--scale", "16", "--out", tmp_path / "found.md"
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["cwd", "kd"]
    for row in rows.values():
        assert row["size compared"] == "4x8"
        assert row["literal at full size"] == "ran"
        assert all(float(row[name]) > 0 for name in ("ours s", "literal s", "ours GB, full"))
    assert "NOT the published size" in done.stdout
    assert "threads: 1" in done.stdout
    assert (tmp_path / "found.md").read_text() == done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(row["ratios"]) for row in found["rows"]] == [2, 2]
    assert all(row["furthest_terms"] < 1e-3 for row in found["rows"])


def test_a_wrong_oracle_is_not_timed(tmp_path):
    done = benchmark("--method", "kd", "--scale", "16", folder=tmp_path, source=BROKEN)
    assert done.returncode == 1
    assert "nothing is timed" in done.stderr
    assert "kd: the term 'kd' is" in done.stderr
    assert not done.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.slow
def test_an_oracle_that_needs_too_much_is_compared_at_a_smaller_size(tmp_path):
    """And one that nobody has written is named."""
    methods = ("--method", "kd", "--method", "cwd")
    limits = ("--scale", "4", "--memory-limit", "0.2")
    done = benchmark(*methods, *limits, folder=tmp_path, source=HUNGRY)
    assert done.returncode == 0, done.stderr
    assert "missing, without an oracle: cwd" in done.stdout
    (row,) = rows_of(done.stdout).values()
    assert row["literal at full size"] == "stopped: > 0.2 GB at 8x16"
    assert row["size compared"] == "4x8"
    assert float(row["ours s, full"]) > 0


def test_gradients_must_agree_too():
    def no_gradient(student, *rest):
        terms = ORACLES["kd"](student, *rest)
        return {name: term.detach() + 0 * student.logits.sum() for name, term in terms.items()}

    assert not list(objectives.disagreements("kd", ORACLES["kd"]))
    (problem,) = objectives.disagreements("kd", no_gradient)
    assert "gradient" in problem


def test_oracles_in_float64_are_timed_in_float32():
    x = torch.ones(2)
    with objectives.in_single_precision():
        assert (x.double() + torch.zeros(2, dtype=torch.float64)).dtype == torch.float32
    assert x.double().dtype == torch.float64


def test_peaks_are_the_run_s_own():
    device = torch.device("cpu")
    if not objectives.reset_peak(device):
        pytest.skip("this system cannot reset a process's peak memory")
    peaks = []
    for millions in (50, 5):
        objectives.trim()
        before = objectives.held_bytes(device)
        objectives.reset_peak(device)
        with objectives.freed_at_once():
            torch.ones(1_000_000 * millions).sum()
        peaks.append(objectives.peak_bytes(device) - before)
    assert peaks == pytest.approx([200e6, 20e6], rel=0.05, abs=2e6)
