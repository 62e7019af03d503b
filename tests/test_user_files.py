"""Methods, networks and steps in users' files are imported by one rule."""

import sys

import pytest

from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.measure.user_step import StepSource
from kdprof.models import build
from kdprof.user_files import import_file

FILE = """
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


def test_a_module_of_another_folder_is_not_taken_for_the_one_beside(folder, tmp_path):
    import_file(folder / "file.py")
    other = tmp_path / "other"
    other.mkdir()
    helper = f"helper_{tmp_path.name}.py"
    (other / helper).write_text("WIDTH = 64\n")
    (other / "file.py").write_text((folder / "file.py").read_text())
    with pytest.raises(UserError, match=rf"other/{helper} has the name of .*mine/{helper}"):
        import_file(other / "file.py")
