"""What reaches the terminal and the reports: nothing that a name could smuggle in."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cost_records import make_cost
from rich.table import Table
from rich.text import Text
from run_records import a_run, a_store

from kdprof import cli
from kdprof.cli import output
from kdprof.cli.environment import explained, settle
from kdprof.records import Decision
from kdprof.reports.costs import costs_csv, costs_markdown
from kdprof.reports.judge import judge
from kdprof.reports.results import collect
from kdprof.reports.text import csv_cell, markdown_text
from kdprof.reports.verdict_text import markdown
from kdprof.store import Store

HOSTILE = "\x1b[31mred\x07\x9b31m\u202egnp\r\x00"
CONTROL = set("\x1b\x07\x9b\u202e\r\x00")


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = os.environ | options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-P", "-m", "kdprof", *arguments],
        text=True, env=environment, check=False, timeout=120,
        **({"capture_output": True} | options),
    )  # fmt: skip


def test_every_way_to_the_terminal_spells_control_characters_out(capsys):
    output.say(HOSTILE)
    output.complain(f"unknown method '{HOSTILE}'\nand more")
    table = Table("what")
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for console in (output.console(), output.console(stderr=True)):
        console.print(HOSTILE, soft_wrap=True)
        console.print(table)
    captured = capsys.readouterr()
    for text in captured:
        assert not CONTROL & set(text)
        assert "\\x1b[31mred" in text
        assert "\\u202e" in text
    assert captured.err.startswith("kdprof: unknown method")


def test_colours_of_kdprofs_own_stay(monkeypatch):
    from rich.console import Console

    made = output.console()
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.push_render_hook(made._render_hooks[0])
    console.print(Text(HOSTILE, "red"))
    assert console.file.getvalue().startswith("\x1b[31m\\x1b[31mred")


def test_markup_of_a_name_is_text(capsys):
    output.console().print("[bold]a[/x] :smile:")
    assert capsys.readouterr().out == "[bold]a[/x] :smile:\n"


@pytest.mark.parametrize(
    "arguments", [("methods", HOSTILE[:-1]), ("evaluate", "--model", "pspnet-r18", "--weights", "w",
    "--data", "synthetic", "--scales", HOSTILE[:-1]), ("convert", HOSTILE[:-1])],
)  # fmt: skip
def test_an_error_message_spells_them_out(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert not CONTROL & set(done.stdout + done.stderr)
    assert "\\x1b[31m" in done.stderr


def test_a_long_value_is_not_echoed_whole(capsys):
    output.complain("x" * 10_240)
    assert len(capsys.readouterr().err) < 1100


def test_a_cost_with_a_hostile_device_is_refused_and_a_strange_one_is_escaped(tmp_path):
    device = '<img src=x onerror=alert(1)> [click](http://x) | "=1+1"'
    cost = make_cost("kd", device=device)
    text = costs_markdown([cost])
    assert "<img" not in text.replace("\\<img", "")
    assert "](" not in text.replace("]\\(", "")
    store = Store(tmp_path)
    store.write_cost(make_cost("kd"))
    path = store.cost_path("kd", "key-kd")
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "\\u001b[31mcpu"'))
    store.study.write_text("")
    done = CliRunner().invoke(cli.cli, ["convert", "40k@kd", "--out", str(tmp_path)])
    assert "visible characters" in str(done.exception)


@pytest.mark.parametrize(
    ("cell", "written"),
    [("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("-cmd", "'-cmd"), ("+3.0 %", "'+3.0 %"),
     ("-0.5", "-0.5"), ("+1e-5", "+1e-5"), ("cwd", "cwd"), (-0.5, -0.5), ("a\x1bb", "a\\x1bb")],
)  # fmt: skip
def test_a_cell_is_no_formula(cell, written):
    assert csv_cell(cell) == written
    assert "=HYPERLINK" not in costs_csv([make_cost("kd", device="=HYPERLINK()")]).replace("'=", "")


def test_what_a_decision_or_a_claim_says_is_text_in_the_verdict(tmp_path):
    store = a_store(tmp_path, [a_run("kd"), a_run("cwd", miou=0.72)])
    said = "kd > <img src=x onerror=alert(1)> [click](http://x)\u202e @ 40k@cwd"
    store.write_decision(
        Decision(
            statement=said, confidence=0.95, max_seeds=4, outcome="undecided", looks=[],
            saved_runs=0, saved_s=0.0,
        )
    )  # fmt: skip
    results = collect(store)
    text = markdown(results, judge(results))
    assert r"kd > \<img src=x onerror=alert(1)> [click]\(http://x)\u202e @" in text


def test_numbers_in_markdown_stay_as_they_are():
    for text in ("71.3 [70.9-71.7]", "< 0.5", "> 2", "a <= b"):
        assert markdown_text(text) == text


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"},
     {"TERM": ""}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)  # fmt: skip
def test_no_terminal_is_an_error(environment):
    done = run("methods", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cwd:feature" in done.stdout


def test_output_that_cannot_be_written_is_a_failure():
    with Path("/dev/full").open("w") as full:
        done = run("methods", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "kdprof: No space left on device: the disk is full; free space there, or choose another "
        "folder (--out, TMPDIR)"
    ]


def test_an_error_of_the_system_names_the_file_and_the_mend():
    assert explained(OSError(28, "No space left on device", "/a/costs.md")).startswith(
        "/a/costs.md: No space left on device: the disk is full"
    )
    for number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOENT):
        assert "--debug" not in explained(OSError(number, os.strerror(number), "/a"))
    assert "--debug" in explained(OSError(5, "Input/output error", "/a"))


def test_an_account_without_a_name_and_a_notebooks_backend_are_settled(monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    settle()
    import getpass

    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert os.environ["MPLBACKEND"] == "agg"
    monkeypatch.setenv("USER", "")  # for monkeypatch to take away what settle() set


def test_a_process_group_meets_where_every_machine_can(monkeypatch):
    """A name that does not resolve is no reason to wait without a word."""
    from kdprof.launch import group

    found = []
    monkeypatch.setattr(group, "elastic_launch", lambda config, _: found.append(config) or print)
    group.run_group([], 2)
    assert (found[0].local_addr, found[0].rdzv_endpoint) == ("127.0.0.1", "127.0.0.1:0")


def test_with_json_standard_output_holds_records_alone(tmp_path):
    code = (
        "from kdprof.cli import output; kept = output.kept_for_records(); kept.__enter__(); "
        "print('a print of a network'); output.say('[]'); output.console().print('[1]')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n[1]\n", "a print of a network\n")
