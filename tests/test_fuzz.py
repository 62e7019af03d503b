"""A fixed share of the fuzzer, and what it must notice."""

import re
import signal
import subprocess
import time
from pathlib import Path
from random import Random

import fuzz
import fuzz_texts
import pytest
from fuzz_case import ACCEPTED, FINDINGS, REFUSED, Case, Wrong, check_kept, contents, judged

from kdprof.errors import UserError

CASES = 200
SEED = 0


def a_case(folder: Path) -> Case:
    return Case(Random(0), folder, folder / "canary")


def test_no_hostile_input_of_a_fixed_share_does_harm(capsys):
    """Some of every class; ``python benchmarks/fuzz.py --cases 12000`` tries many more."""
    code = fuzz.main(["--cases", str(CASES), "--seed", str(SEED)])
    told = capsys.readouterr()
    assert code == 0, told.err
    numbers = [list(map(int, re.findall(r"\d+", row))) for row in told.out.splitlines()[2:-2]]
    assert len(numbers) == len(fuzz.CLASSES) + 1
    for cases, refused, accepted, *findings in numbers:
        assert cases == refused + accepted > 0
        assert findings == [0] * len(FINDINGS)


def hangs(case: Case) -> str:
    time.sleep(30)
    return ACCEPTED


def fills_memory(case: Case) -> str:
    return str(len(bytearray(2**36)))


def refuses(case: Case) -> str:
    raise UserError("give another")


def crashes(case: Case) -> str:
    raise KeyError("step")


def panics(case: Case) -> str:
    raise BaseException("as Rust does")


def makes_the_canary(case: Case) -> str:
    case.canary.mkdir()
    return REFUSED


def starts_a_process(case: Case) -> str:
    subprocess.run(["true"], check=True)
    return ACCEPTED


def replaces_a_file(case: Case) -> str:
    (case.folder / "a").write_text("old")
    before = contents(case.folder)
    (case.folder / "a").write_text("new")
    check_kept(before, case.folder)
    return ACCEPTED


@pytest.mark.parametrize(
    ("work", "kind"),
    [(hangs, "hangs"), (fills_memory, "tracebacks"), (refuses, REFUSED), (crashes, "tracebacks"),
     (panics, "tracebacks"), (makes_the_canary, "code run"), (starts_a_process, "code run"),
     (replaces_a_file, "lost")],
)  # fmt: skip
def test_what_a_case_does_is_noticed(tmp_path, work, kind):
    before = signal.getsignal(signal.SIGALRM)
    assert judged(work, a_case(tmp_path), limit_s=0.2 if work is hangs else 20).kind == kind
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_case_can_be_replayed(capsys):
    stories = []
    for _ in range(2):
        fuzz.main(["--only", "grammar", "--case", "3", "--seed", "7"])
        stories.append(capsys.readouterr().err)
    assert stories[0] == stories[1]
    assert "--seed 7 --only grammar --case 3" in stories[0]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [("a.md", "| <img src=x> |", "tags"), ("a.md", "| a | nan |", "numbers"),
     ("a.md", "\x1b[31m", "control characters"), ("a.md", "[a](http://x)", "a link"),
     ("a.csv", "a,b\n=1+1,2\n", "a formula"), ("a.csv", "a,b\n1\n", "different lengths"),
     ("a.svg", "<svg><a></svg>", "no XML"), ("a.tex", r"\input{x}", "a command"),
     ("a.tex", "{", "unequal braces"), ("b.json", '{"a": NaN}', "no JSON"),
     ("a.html", '<p><img src=x onerror="alert(1)"></p>', "img")],
)  # fmt: skip
def test_a_report_that_is_wrong_is_noticed(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(Wrong, match=problem):
        fuzz_texts.check_reports(tmp_path)
