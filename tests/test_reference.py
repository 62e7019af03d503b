"""The command that makes a device's reference: its plan, its processes, and itself as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from cost_records import make_cost
from reference import data_root, left_of, minutes, parts_of, slug
from reference_parts.base import Call
from reference_parts.checking import Checks
from reference_parts.measuring import Measuring
from reference_parts.plan import (
    FULL,
    TINY,
    in_order,
    limits_s,
    plan_budgets,
    plan_teacher,
    seed_s,
    statements,
)
from reference_parts.runner import Runner
from reference_parts.state import PieceRecord, State
from reference_parts.studying import Studying

from kdprof.discovery import builtin_methods
from kdprof.errors import UserError
from kdprof.reports.atlas_check import check_folder
from kdprof.store import Store
from kdprof.study import load_study

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "reference.py"
IDENTITY = {"device": "GPU 1", "size": "full"}

# The plan


def test_the_most_valuable_is_measured_first():
    """Methods of every setting come before variants, and bf16 before tf32."""
    names = [piece.name for piece in FULL.pieces()]
    assert names[:2] == [
        "atlas cityscapes-pspnet-r18-bf16 methods",
        "atlas cityscapes-deeplabv3-r18-bf16 methods",
    ]
    assert len(names) == 3 * 2 * 5
    assert ["tf32" in name for name in names] == ([False] * 5 + [True] * 5) * 3
    kinds = [name.rpartition(" ")[2] for name in names]
    assert kinds == ["methods"] * 10 + ["variants"] * 10 + ["energy"] * 10
    assert in_order(["at", "kd", "cwd:feature", "none", "cwd"]) == [
        "none", "kd", "cwd", "at", "cwd:feature",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [FULL, TINY])
def test_settings_are_studies(size):
    for one in size.settings:
        study = load_study(one.preset, {**one.changes, "step.precision": size.precisions[0]})
        assert study.step.crop in ((512, 1024), (512, 512), (32, 48))
    study = load_study(size.study, {**size.study_changes, "methods": list(size.study_methods)})
    assert set(study.methods) <= builtin_methods().keys()


def forecasts(**seconds):
    return {"checks": 60, "atlas": 1000, "objectives": 60, "study": 1000, **seconds}


def test_twelve_minutes_are_divided_as_promised():
    limits = limits_s(720, forecasts(), FULL)
    assert limits == {"checks": 60, "atlas": 240, "objectives": 60, "study": 360}


def test_what_a_part_does_not_need_goes_to_the_next():
    """The study takes what finished parts leave; what it does not need goes to the atlas."""
    limits = limits_s(720, forecasts(checks=0, objectives=0), FULL)
    assert limits == {"checks": 0, "atlas": 240, "objectives": 0, "study": 480}
    limits = limits_s(720, forecasts(checks=0, objectives=0, study=0), FULL)
    assert limits == {"checks": 0, "atlas": 720, "objectives": 0, "study": 0}
    assert limits_s(720, forecasts(objectives=10), FULL)["objectives"] == 20


def test_seconds_of_a_seed():
    """Budgets 1, 2 and 4 s: a trunk of 3.2 s, branches of 0.2, 0.4 and 0.8 s; four evaluations."""
    assert seed_s(1.0, 3, run_s=0.5) == pytest.approx(3 * (3.2 + 1.4 + 4 * 0.5))


def test_the_largest_budgets_that_fit_are_taken():
    """Of 85 s a seed gets 42.5 s, a method 14.2: 4.6 B + 4 x 0.5 <= 14.2."""
    seconds = {"none": 0.01, "kd": 0.02, "cwd": 0.02}
    assert plan_budgets(85.0, seconds, 0.5, FULL) == ["2s", "4s", "8s"]
    assert plan_budgets(85.0, seconds, 2.5, FULL) == ["0.5s", "1s", "2s"]


def test_the_teacher_gets_a_share_of_the_time():
    """15 of 100 s, an iteration taking 3 x 0.05 s."""
    assert plan_teacher(100.0, 0.05, FULL) == 100
    assert plan_teacher(0.0, 0.05, FULL) == 0
    assert plan_teacher(1e9, 0.05, FULL) == FULL.most_teacher_iterations


def test_budgets_are_never_less_than_a_few_iterations():
    seconds = {"none": 0.1, "kd": 0.2, "dear": 0.7}
    assert plan_budgets(1.0, seconds, 0.5, FULL) == ["4s", "8s", "16s"]
    assert plan_budgets(1.0, {"dear": 100.0}, 0.5, FULL) == ["501s", "1002s", "2004s"]


def test_claims_are_about_what_was_trained():
    assert statements(["cwd", "kd", "none"], ["1s", "2s"]) == [
        "cwd > kd @ 2s", "none > kd @ 2s", "gain(cwd, kd) > 1",
    ]  # fmt: skip
    assert statements(["none"], ["1s"]) == []
    assert statements(["cwd", "kd"], ["1s"]) == ["cwd > kd @ 1s"]


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) Processor (2 threads)", "intel-xeon-processor-2-threads"),
    ],
)
def test_folders_are_named_after_devices(device, folder):
    assert slug(device) == folder


def test_only_camvid_s_folder_is_taken(tmp_path):
    assert data_root(None) is None
    assert data_root(f"camvid:{tmp_path}") == tmp_path
    for wrong in ("voc:/x", "camvid", f"camvid:{tmp_path}/none"):
        with pytest.raises(UserError, match="camvid"):
            data_root(wrong)


# What was done before


def test_a_reference_that_was_begun_otherwise_is_refused(tmp_path):
    state = State(tmp_path, IDENTITY)
    state.note("check parity", PieceRecord(state="done", seconds=1))
    assert State(tmp_path, IDENTITY).is_done("check parity")
    with pytest.raises(UserError, match=r"size was full, now tiny.*use another --out"):
        State(tmp_path, {**IDENTITY, "size": "tiny"})


def test_reasons_name_no_place(tmp_path):
    state = State(tmp_path, IDENTITY)
    state.note("x", PieceRecord(state="failed", seconds=1, reason="raised (/home/ann/kd.py:1)"))
    assert "raised (kd.py:1)" in (tmp_path / "reference.json").read_text()


def call_in(folder: Path, size=TINY, said=lambda text: None) -> Call:
    state, runner = State(folder, IDENTITY), Runner(folder, time.monotonic() + 60, said)
    work = folder / "work"
    work.mkdir()
    return Call(
        folder, "cpu", None, ["none", "kd", "cwd", "at"], {"torch": "2"}, size, state, runner
    )


def test_measured_methods_are_not_measured_again(tmp_path):
    """And the forecast of a setting is for the others only."""
    part = Measuring(call_in(tmp_path))
    piece, variants, _ = TINY.pieces()
    before = part.forecast_s()
    assert part._open(variants) == ["cwd:feature"]
    assert part._open(piece) == ["none", "kd", "cwd"]
    Store(tmp_path / "work" / piece.folder).write_cost(make_cost("none"))
    assert part._open(piece) == ["kd", "cwd"]
    assert part.forecast_s() == before - TINY.method_s


def test_energy_is_measured_again_where_blocks_were_too_short(tmp_path):
    part = Measuring(call_in(tmp_path))
    *_, piece = TINY.pieces()
    store = Store(tmp_path / "work" / piece.folder)
    short = {"energy_j": "timed blocks are too short; --detail measures it"}
    store.write_cost(make_cost("none", unavailable=short))
    store.write_cost(make_cost("kd"))  # no counter
    assert part._open(piece) == ["none"]


def note(call: Call, name: str, seconds: float, result, state="done") -> None:
    call.state.note(name, PieceRecord(state=state, seconds=seconds, result=result))


def test_seconds_of_a_method_are_those_of_methods_that_were_measured(tmp_path):
    """Not of energy, nor of a piece that measured nothing before it was stopped."""
    call = call_in(tmp_path)
    part, size = Measuring(call), call.size
    assert part._method_s() == size.method_s
    note(call, "atlas tiny-fp32 methods", size.start_s + 8, {"measured": 2, "failures": {}})
    note(call, "atlas tiny-fp32 variants", 50, {"measured": 0, "failures": {}}, "stopped")
    note(call, "atlas tiny-fp32 energy", 90, {"measured": 3, "failures": {}})
    assert part._method_s() == pytest.approx(4)


def test_what_failed_in_an_earlier_call_is_said_again(tmp_path):
    call = call_in(tmp_path)
    note(call, "check resume", 9, {"outcome": "failed", "lines": ["1 of 1 differ"]})
    note(call, "check parity", 9, {"outcome": "not checked", "lines": ["no folder"]})
    note(call, "check doctor", 9, {"outcome": "passed", "lines": ["x"]})
    note(call, "study seed 0", 9, ["kd 1s seed 0: its process was killed"])
    note(call, "study seed 1", 9, [])
    left = left_of(call, parts_of(call))
    assert left == [
        "failed: check parity: not checked: no folder",
        "failed: check resume: failed: 1 of 1 differ",
        "failed: study seed 0: kd 1s seed 0: its process was killed",
    ]


def test_a_study_without_time_for_its_teacher_waits(tmp_path):
    """Its plan would be kept by all later calls."""
    call = call_in(tmp_path)
    note(call, "study costs", 9, {})
    for name in call.size.study_methods:
        cost = make_cost(name, phases_s={"teacher_forward": 1.0, "student_forward": 1.0})
        Store(call.work / "study-costs").write_cost(cost)
    part = Studying(call)
    part.do(ends_s=call.runner.left_s() - 50)  # 15 % of some 22 s, 3 s an iteration
    assert call.state.record.study is None
    assert "allows fewer than 2 iterations" in call.state.record.not_done["study teacher"]


def test_what_does_not_fit_is_listed_with_what_it_needs(tmp_path):
    call = call_in(tmp_path)
    part = Checks(call)
    part.do(ends_s=call.runner.left_s() - TINY.least_s / 2)
    assert call.state.record.pieces == {}
    assert call.state.record.not_done["check resume"] == "needs about 25 s"


# Pieces in processes


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    said: list[str] = []
    return Runner(tmp_path_factory.mktemp("work"), time.monotonic() + 200, said.append)


def test_a_piece_that_fails_says_why(runner):
    found = runner.run("x", "identify", {"device": "cuda:77", "data": None}, 60)
    assert found.state == "failed"
    assert "cuda:77" in found.reason


def test_a_piece_that_dies_says_how(runner, tmp_path, monkeypatch):
    """Such as one that the system kills for lack of memory."""
    folder = tmp_path / "reference_parts"
    folder.mkdir()
    (folder / "work.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("reference_parts.runner.BENCHMARKS", tmp_path)
    found = runner.run("x", "check", {}, 60)
    assert found.state == "failed"
    assert "for lack of memory" in found.reason


def test_a_piece_ends_with_its_time(runner):
    found = runner.run("x", "identify", {"device": "cpu", "data": None}, 0.5)
    assert found.state == "stopped"
    assert "were up" in found.reason
    assert runner.run("x", "identify", {}, 0.0).reason == "no time was left"


# The command


def command(out: Path, *options: str) -> list[str]:
    program = [sys.executable, str(PROGRAM), "--tiny", "--device", "cpu", "--out", str(out)]
    return [*program, *options]


def done_pieces(out: Path) -> dict:
    (state,) = out.glob("*/reference.json")
    pieces = json.loads(state.read_text())["pieces"]
    return {name: piece for name, piece in pieces.items() if piece["state"] == "done"}


def run(out: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(out, *options), capture_output=True, text=True, env=environment, check=False
    )


def killed_when(out: Path, line: str) -> None:
    """Start the command and kill it when it says that a piece has begun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(out, "--minutes", "4"), stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for said in process.stdout:
            if line in said:
                time.sleep(2)
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_reference_goes_on(tmp_path):
    """What is not done within the minutes of a call is left to the next."""
    killed_when(tmp_path, "atlas tiny-fp32 methods: at most")
    first = done_pieces(tmp_path)
    assert "check doctor" in first
    assert not any(name.startswith("study") for name in first)
    for _ in range(3):
        done = run(tmp_path, "--minutes", "4")
        assert done.returncode == 0, done.stderr
        if "not done" not in done.stdout:
            break
    assert "not done" not in done.stdout
    assert done_pieces(tmp_path).items() >= first.items()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert made >= {
        "README.md", "checks.md", "atlas.md", "atlas.csv", "atlas.json", "tiny-fp32/cost.png",
        "tiny-fp32/memory.png", "tiny-fp32/costs.md", "objectives.md", "objectives.json",
        "study/study.toml", "study/reports/index.html", "study/reports/curves.png",
    }  # fmt: skip
    assert len(list((folder / "study" / "claims").glob("cwd-gt-kd-*s.json"))) == 1
    assert {run.seed for run in Store(folder / "study").runs() if run.finished} == {0, 1}
    left = check_folder(folder, names={str(tmp_path)}, without=("work",))
    assert not [line for line in left if "names a place or a person" in line]
    _, left = (folder / "README.md").read_text().split("## Not done, or not right\n")
    # Depends on the machine: how quiet it is, and whether the authors' numbers are there.
    known = ("methods are unreliable", "check parity: not checked", "the reference is complete")
    assert all(any(text in line for text in known) for line in left.splitlines() if line)
    refused = run(tmp_path, "--data", f"camvid:{tmp_path}")
    assert refused.returncode == 2
    assert "was begun otherwise (data was synthetic" in refused.stderr


def test_wrong_data_are_refused_before_anything_is_written(tmp_path):
    done = run(tmp_path / "out", "--data", "voc:/x")
    assert done.returncode == 2
    assert "the study is CamVid's" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_a_number_above_0(text):
    with pytest.raises(ArgumentTypeError, match=f"above 0, not '{text}'"):
        minutes(text)
