"""The command line as a user has it: output, exit codes, files."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from builders import MY_METHOD
from click.testing import CliRunner
from cost_records import make_cost
from PIL import Image
from processes import Command, cold, kdprof
from small_study import small_study, small_toml

from kdprof import cli
from kdprof.store import Store
from kdprof.study import claim_folder

SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = ["", "methods", "measure", "compare", "convert", "plan", "train", "status", "plot",
            "claim", "verify", "decide", "evaluate", "export", "data", "data check", "demo",
            "doctor"]  # fmt: skip


def refused(capsys, monkeypatch, *arguments) -> list[str]:
    """Run in this process, expect exit code 2, and return the lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["kdprof", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured.err
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert all(line.startswith("kdprof: ") for line in lines)
    return lines


@pytest.mark.parametrize("command", COMMANDS)
def test_help_snapshot(command):
    """Run with KDPROF_UPDATE_SNAPSHOTS=1 to accept a change, and review its diff."""
    found = CliRunner().invoke(cli.cli, [*command.split(), "--help"], prog_name="kdprof").output
    path = SNAPSHOTS / f"help-{command.replace(' ', '-') or 'kdprof'}.txt"
    if os.environ.get("KDPROF_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


def test_record_keys_snapshot():
    """What others script against."""
    path = SNAPSHOTS / "record-keys.json"
    from kdprof.records import ClaimRecord, Cost, CurvePoint, Decision, LedgerEntry, Run

    keys = {
        kind.__name__: sorted(field.alias or name for name, field in kind.model_fields.items())
        for kind in (Cost, Run, CurvePoint, LedgerEntry, ClaimRecord, Decision)
    }
    if os.environ.get("KDPROF_UPDATE_SNAPSHOTS"):
        path.write_text(json.dumps(keys, indent=2) + "\n")
    assert keys == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "--method", "cvd"], "unknown method 'cvd'; did you mean 'cwd'?"),
        (["measure", "--student", "pspnet-resnet81"], "did you mean 'resnet18'"),
        (["measure", "--teacher", "pspnt-r18"], "did you mean 'pspnet-r18'?"),
        (["measure", "--data", "camvit:x"], "unknown data set 'camvit'; did you mean 'camvid'?"),
        (["measure", "--data", "camvid:/no/such/place"], "no folder /no"),
        (["train", "--budget", "9", "--data", "camvid"], "give camvid:ROOT"),
        (["measure", "--study", "quikstart"], "did you mean 'quickstart'?"),
        (["measure", "--set", "step.bach=4"], "unknown key 'step.bach'; did you mean 'batch'?"),
        (["measure", "--set", "step.batch"], "write key=value"),
        (["measure", "--crop", "big"], "HEIGHTxWIDTH"),
        (["measure", "--crop", "4x4"], "crop"),
        (["measure", "--batch", "1"], "batch"),
        (["measure", "--device", "cuda"], "use --device cpu"),
        (["measure", "--device", "tpu"], "give auto, cpu, cuda or cuda:N"),
        (["measure", "--precision", "int8"], "fp32"),
        (["measure", "--precision", "tf32", "--device", "cpu"], "use --precision fp32"),
        (["train", "--budget", "9", "--precision", "tf32", "--device", "cpu"], "this is a CPU"),
        (["measure", "--method", "./none.py:My"], "none.py; give FILE.py:ClassName"),
        (["measure", "--set", "method_settings.kd.temprature=2"], "did you mean 'temperature'?"),
        (
            ["measure", "--set", "method_settings.cirkd.images_per_group=3", "--batch", "4"],
            "method 'cirkd': images_per_group = 3 must divide the 4 images of a device",
        ),
        (["train"], "no budget given"),
        (["plan"], "no budget given"),
        (["train", "--budget", "40q"], "unknown unit 'q'"),
        (["train", "--budget", "0"], "smaller than one iteration"),
        (["train", "--budget", "4k@cvd"], "unknown method 'cvd'"),
        (["train", "--budget", "1k", "--seeds", "0"], "seeds"),
        (["convert", "soon"], "malformed"),
        (["convert", "40k@cwd"], "holds no study"),
        (["plot"], "holds no study"),
        (["methods", "cvd"], "did you mean 'cwd'?"),
        (["plot", "--data", "camvid:/d"], "'plot' reads the study of a folder of results"),
        (["convert", "1k", "--device", "cpu"], "takes no --device; leave it out"),
        (["status", "--student", "pspnet-r18"], "choose the folder with --out"),
        (["compare", "a", "b", "--precision", "bf16"], "takes no --precision"),
        (["plot", "--methods", "cwd"], "No such option"),
        (["measure", "--backbone-weights", "none"], "--student-backbone-weights"),
        (["frobnicate"], "No such command"),
        (["plot", "--x", "hours"], "seconds"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments, message, capsys, monkeypatch, tmp_path
):
    out = tmp_path / "out"
    if "kdprof" not in arguments and arguments[0] in ("measure", "train", "convert", "plot"):
        arguments = [*arguments, "--out", out]
    if arguments[0] in ("measure", "train") and "--study" not in arguments:
        study = small_toml(tmp_path, budgets=[])
        arguments = [*arguments, "--study", study]
    monkeypatch.chdir(tmp_path)
    lines = refused(capsys, monkeypatch, *arguments)
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not out.exists()


def test_all_problems_at_once(capsys, monkeypatch, tmp_path):
    study = small_toml(tmp_path)
    lines = refused(
        capsys, monkeypatch, "measure", "--study", study, "--out", tmp_path / "out",
        "--method", "cvd", "--student", "pspnet-resnet81", "--data", "camvid:/no/place",
        "--device", "cuda:7",
    )  # fmt: skip
    assert len(lines) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["measure", "train"])
def test_crop_larger_than_memory_is_refused_and_leaves_nothing(
    command, capsys, monkeypatch, tmp_path
):
    study = small_toml(tmp_path)
    lines = refused(
        capsys, monkeypatch, command, "--study", study, "--out", tmp_path / "out", "-q",
        "--crop", "32768x32768",
    )  # fmt: skip
    assert all("GiB free; lower --crop or --batch" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_output_folder_of_another_study(capsys, monkeypatch, tmp_path):
    claim_folder(tmp_path / "out" / "study.toml", small_study())
    study = small_toml(tmp_path)
    (line,) = refused(
        capsys, monkeypatch, "measure", "--study", study, "--out", tmp_path / "out",
        "--batch", "3",
    )  # fmt: skip
    assert "holds another study (step.batch is 2 there, 3 here); use another --out" in line


def test_plot_with_a_study_but_no_runs(capsys, monkeypatch, tmp_path):
    claim_folder(tmp_path / "study.toml", small_study())
    (line,) = refused(capsys, monkeypatch, "plot", "--out", tmp_path)
    assert "kdprof train" in line


def test_convert_prints_every_measured_method(capsys, monkeypatch, tmp_path):
    claim_folder(tmp_path / "study.toml", small_study())
    for method, seconds in (("none", 0.05), ("kd", 0.1), ("cwd", 0.2)):
        Store(tmp_path).write_cost(make_cost(method, seconds))
    monkeypatch.setattr(sys, "argv", ["kdprof", "convert", "40k@cwd", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    printed = capsys.readouterr().out
    for method, iterations in (("none", "160"), ("kd", "80"), ("cwd", "40")):
        assert re.search(rf"{method}\s+{iterations}.?000", printed)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    found = {c["method"]: c["iterations"] for c in json.loads(capsys.readouterr().out)}
    assert found == {"none": 160_000, "kd": 80_000, "cwd": 40_000}


def camvid_tree(root: Path, *, train=4, val=2, size=(56, 40)) -> Path:
    for split, count in (("train", train), ("val", val)):
        for folder, mode, colour in ((split, "RGB", (90, 120, 30)), (f"{split}annot", "L", 3)):
            (root / folder).mkdir(parents=True)
            for i in range(count):
                Image.new(mode, size, colour).save(root / folder / f"{i}.png")
    return root


def test_damaged_image_met_in_training_is_one_line(tmp_path):
    root = camvid_tree(tmp_path / "data")
    path = root / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    study = small_toml(tmp_path, data=f"camvid:{root}")
    done = kdprof("measure", "--study", study, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "2.png cannot be read" in done.stderr.splitlines()[-1]


def test_readme_example_is_this_method(repo):
    """The README's ten lines are what the next test runs."""
    assert MY_METHOD.strip() in (repo / "README.md").read_text()


def test_whole_road_as_processes_with_a_method_from_outside(tmp_path):
    """measure -> convert -> train -> plot, as the README says it."""
    (tmp_path / "mine.py").write_text(MY_METHOD)
    study, out = small_toml(tmp_path, budgets=[]), tmp_path / "my results"
    shared = ["--study", study, "--out", out, "--method", "./mine.py:MyKD"]
    measured = cold("measure", *shared, "--json", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert measured.stderr == ""
    costs = {cost["method"]: cost for cost in json.loads(measured.stdout)}
    assert costs.keys() == {"none", "mykd"}
    for cost in costs.values():
        total = sum(cost["phases_s"].values())
        assert cost["latency_s"]["low"] <= cost["latency_s"]["median"] <= cost["latency_s"]["high"]
        assert total > 0
        assert cost["energy_j"] is None
        assert cost["unavailable"]["energy_j"]
    converted = kdprof("convert", "4@mykd", "--out", out, "--json")
    assert {c["method"] for c in json.loads(converted.stdout)} == {"none", "mykd"}
    trained = kdprof(
        "train",
        "-v",
        "--out",
        out,
        "--method",
        "./mine.py:MyKD",
        "--budget",
        "4@mykd",
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"mykd 4@mykd seed 0: iteration 4: mIoU [\d.]+ %; task [\d.]+", trained.stderr)
    assert re.search(r"kd: \d+ rounds; ", trained.stderr)
    assert "mykd" in trained.stdout
    runs = {run.method: run for run in Store(out).runs()}
    assert runs.keys() == {"none", "kd", "mykd"}
    assert runs["mykd"].iterations == 4
    plotted = kdprof("plot", "--out", out)
    assert plotted.returncode == 0, plotted.stderr
    written = re.findall(r"wrote (.+)", plotted.stdout)
    names = {"curves.png", "curves.svg", "curves.pdf", "table.md", "table.csv", "table.tex"}
    names |= {"costs.md", "costs.csv", "costs.tex", "verdict.md", "verdict.json", "index.html"}
    names |= {f"{figure}.{kind}" for figure in ("cost", "memory") for kind in ("png", "svg", "pdf")}
    assert {Path(p).name for p in written} == names
    assert all(Path(p).stat().st_size > 0 for p in written)


def test_count_only_at_full_published_size(capsys, monkeypatch, tmp_path):
    """PSPNet-R101 -> R18, batch 8, 512x1024: the teacher's convolutions take 511.749 G
    multiply-adds an image with 19 classes, and the synthetic data has 7 fewer. Without a GPU,
    without the memory, and without leaving a file."""
    out = tmp_path / "out"
    arguments = ["kdprof", "measure", "--method", "kd", "--count-only", "--json", "-q"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--device", "cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    costs = {cost["method"]: cost for cost in json.loads(capsys.readouterr().out)}
    multiply_adds = 511.749e9 - 7 * 512 * 64 * 128
    assert costs["kd"]["flop"]["teacher"] == pytest.approx(2 * 8 * multiply_adds, rel=1e-5)
    assert costs["none"]["flop"]["teacher"] == 0
    assert costs["kd"]["latency_s"] is None
    assert costs["kd"]["unavailable"]["latency_s"] == "counted, not run (--count-only)"
    assert not out.exists()


def test_traceback_only_with_debug(tmp_path):
    (tmp_path / "bad.py").write_text(MY_METHOD.replace("student.logits,", "student.head,"))
    study = small_toml(tmp_path)
    arguments = ["measure", "--study", study, "--out", tmp_path / "o", "--method", "./bad.py:MyKD"]
    plain = kdprof(*arguments, cwd=tmp_path)
    assert plain.returncode == 1
    assert "Traceback" not in plain.stderr
    assert "tap 'head' was read but not declared" in plain.stderr
    assert "Traceback" in kdprof("--debug", *arguments, cwd=tmp_path).stderr


def test_methods_list_and_card(capsys, monkeypatch):
    for arguments, expected in (
        ([], ["ifvd", "cwd:feature", "10 fitnet + 1 kd"]),
        (["ifvd"], ["200 ifv", "second optimiser", "Wang et al.", "74.54"]),
    ):
        monkeypatch.setattr(sys, "argv", ["kdprof", "methods", *arguments])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit):
            cli.main()
        printed = capsys.readouterr().out
        assert [text for text in expected if text not in printed] == []


def test_doctor_says_what_is_missing():
    done = kdprof("doctor")
    assert done.returncode == 0, done.stderr
    assert "GPU" in done.stdout
    assert "torch" in done.stdout


def test_doctor_refuses_a_study_before_it_prints_anything():
    done = kdprof("doctor", "--data", "camvid:/nowhere", "--set", "data_settings.in_memory=true")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "set data_settings.cache to" in done.stderr


WAITS = '''
import time
from pathlib import Path
from kdprof.method import Method

class Waits(Method):
    """Says that it is measured, and takes its time."""
    taps = ("logits",)
    weights = {"mean": 1.0}

    def forward(self, student, teacher, labels):
        Path(__file__).with_name("measured").touch()
        time.sleep(0.1)
        return {"mean": student.logits.mean()}
'''


@pytest.mark.parametrize("group", [[], ["data"]])
def test_a_command_without_arguments_prints_its_help(group):
    done = kdprof(*group)
    assert done.returncode == 2
    assert done.stderr == kdprof(*group, "--help").stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_measurement_that_is_interrupted_says_so(tmp_path, number, debug):
    (tmp_path / "mine.py").write_text(WAITS)
    study = small_toml(tmp_path, methods=[f"{tmp_path / 'mine.py'}:Waits"], measure__max_time_s=300)
    process = Command(*debug, "measure", "--study", study, "--out", tmp_path / "out")
    while not (tmp_path / "measured").exists():
        assert process.runs()
        time.sleep(0.01)
    process.send_signal(number)
    done = process.end()
    if not debug:
        assert done.returncode == 130
        lines = [line for line in done.stderr.splitlines() if line]
        assert lines[-1] == "kdprof: interrupted; all written files are complete"
        assert "Traceback" not in done.stderr
    else:
        assert "Interrupt" in done.stderr or "Abort" in done.stderr
