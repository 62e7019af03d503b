"""Methods, networks and steps in users' files are imported by one rule."""

import json
import sys
from pathlib import Path

import pytest
from processes import kdprof

from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.measure.user_step import StepSource
from kdprof.models import build
from kdprof.user_files import import_file, named_in_file

FILE = """
print("a print of the file")
import torch
from torch import nn
from {helper} import WIDTH
from kdprof.method import Method
from kdprof.models import AdaptedNetwork


class Mine(Method):
    taps = ("logits",)
    weights = {{"l2": WIDTH}}

    def forward(self, student, teacher, labels):
        from {helper} import WIDTH

        return {{"l2": WIDTH}}


def network(classes):
    print("a print of the network")
    body = nn.Conv2d(3, classes, 1)
    return AdaptedNetwork(body, lambda net, x: {{"logits": net(x), "head": x}}, classes, name="s")


def make_step():
    return lambda: float(WIDTH)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's file beside a module that it imports, seen from another folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = tmp_path / "mine"
    made.mkdir()
    (made / f"helper_{tmp_path.name}.py").write_text("WIDTH = 8\n")
    (made / "file.py").write_text(FILE.format(helper=f"helper_{tmp_path.name}"))
    yield made
    sys.modules.pop(f"helper_{tmp_path.name}", None)


def test_every_kind_of_file_finds_the_modules_next_to_it(folder):
    method = find_method(f"{folder}/file.py:Mine").cls
    assert method.weights == {"l2": 8}
    assert method.forward(None, None, None, None) == {"l2": 8}
    assert build(f"{folder}/file.py:network", 3).info.num_classes == 3
    assert StepSource.parse(f"{folder}/file.py:make_step").make()() == 8.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mine.py:MyKD", ("mine.py", "MyKD")),
        ("./a:b/mine.py:f", ("a:b/mine.py", "f")),
        ("a:b/mine.py", ("a:b/mine.py", "")),
        ("cwd:feature", None),
        ("mine.pyc:f", None),
        ("", None),
    ],
)
def test_names_in_files_have_one_form(text, found):
    assert named_in_file(text) == (found and (Path(found[0]), found[1]))


def test_the_home_folder_is_known_for_every_kind(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_method("~/mine/file.py:Mine").cls.__name__ == "Mine"
    assert build("~/mine/file.py:network", 3).info.num_classes == 3
    assert StepSource.parse("~/mine/file.py:make_step").make()() == 8.0


def test_a_command_finds_them_too_and_prints_of_users_are_no_records(folder):
    """F15, and prints of users' files beside ``--json``: a command in the file's folder, whose
    folder is not on the path."""
    done = kdprof(
        "measure", "--count-only", "--json", "--study", "quickstart", "--method", "none",
        "--student", "./file.py:network", "--teacher", "./file.py:network",
        "--set", "step.aux_weight=0", "--crop", "64x96", "--batch", "2", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a print of the network" in done.stderr
    (cost,) = json.loads(done.stdout)
    # A 1x1 convolution of 3 colours into the 12 classes, forward and its weights' gradient.
    assert cost["flop"]["total"] == 2 * (2 * 2 * 64 * 96 * 3 * 12)


def test_a_module_of_another_folder_is_not_taken_for_the_one_beside(folder, tmp_path):
    import_file(folder / "file.py")
    other = tmp_path / "other"
    other.mkdir()
    helper = f"helper_{tmp_path.name}.py"
    (other / helper).write_text("WIDTH = 64\n")
    (other / "file.py").write_text((folder / "file.py").read_text())
    with pytest.raises(UserError, match=rf"other/{helper} has the name of .*mine/{helper}"):
        import_file(other / "file.py")
