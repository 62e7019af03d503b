"""How methods are found: built-in by name, custom ones in .py files."""

import pytest

from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.methods.cwd import CWD


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown method 'cwdd'; did you mean 'cwd'"):
        find_method("cwdd")


MINE = """
from __future__ import annotations
from kdprof.method import Method

class MyKD(Method):
    taps = ("logits",)
    weights = {"mine": 1.0}
    temperature: float = 2.0

    def forward(self, student, teacher, labels):
        return {"mine": (student.logits - teacher.logits).square().mean()}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize("spec", ["./mine.py:MyKD", "mine.py:MyKD", "mine.py"])
def test_a_method_in_a_file_is_found(mine, spec):
    mine(MINE)
    found = find_method(spec)
    assert (found.cls.name, found.origin) == ("mykd", "mine.py")
    assert found.cls(temperature=3).settings() == {"temperature": 3.0, "weights": {"mine": 1.0}}
    assert find_method(spec).cls is found.cls


def test_a_file_may_use_the_name_of_a_built_in(mine):
    """Found all the same; that a study cannot hold both is said where it is resolved."""
    mine(MINE.replace("class MyKD(Method):", "class MyKD(Method):\n    name = 'cwd'"))
    assert find_method("mine.py:MyKD").cls.name == "cwd"
    assert find_method("cwd").cls is CWD


def test_imported_methods_are_not_the_files_own(mine):
    mine(MINE + "\nfrom kdprof.methods.kd import KD\n")
    assert find_method("mine.py").cls.__name__ == "MyKD"
    with pytest.raises(UserError, match="unknown method class 'KD'"):
        find_method("mine.py:KD")


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (MINE, "gone.py:MyKD", r"method: no file gone\.py; give FILE.py:ClassName"),
        (MINE, "mine.py:MyKd", r"mine\.py: unknown method class 'MyKd'; did you mean 'MyKD'"),
        (
            MINE + "\nclass Two(Method): pass",
            "mine.py",
            r"holds several methods; write .*mine\.py:MyKD or .*mine\.py:Two",
        ),
        ("x = 1", "mine.py:MyKD", "unknown method class 'MyKD'; there are none"),
        ("1 / 0", "mine.py:MyKD", r"mine\.py cannot be imported: ZeroDivisionError"),
        ("import nowhere", "mine.py:MyKD", "cannot be imported: ModuleNotFoundError"),
        ("x = (", "mine.py:MyKD", "cannot be imported: SyntaxError"),
        (MINE.replace('"logits"', '"logit"'), "mine.py", "unknown tap 'logit'; did you mean"),
    ],
    ids=["no-file", "no-class", "which-class", "empty", "raises", "import", "syntax", "tap"],
)
def test_a_bad_file_is_one_line(mine, text, spec, message):
    mine(text)
    with pytest.raises(UserError, match=message) as raised:
        find_method(spec)
    assert len(str(raised.value).splitlines()) == 1


def test_a_mended_file_is_read_again(mine):
    mine("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        find_method("mine.py:MyKD")
    mine(MINE)
    assert find_method("mine.py:MyKD").cls.name == "mykd"
