"""docs/write-a-method.md: what it shows runs as it is written."""

import json
import re
import shlex
from pathlib import Path

import pytest
from processes import kdprof

from kdprof import cli

TEXT = (Path(__file__).parent.parent / "docs" / "write-a-method.md").read_text()
TEN_LINES, WHOLE = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
    for line in block.splitlines()
]


def count(folder: Path, code: str, *names: str) -> dict[str, dict]:
    """Count a step of the named methods in ``mine.py``."""
    (folder / "mine.py").write_text(code)
    methods = [word for name in names for word in ("--method", f"./mine.py:{name}")]
    done = kdprof(
        "measure", "--study", "quickstart", *methods, "--count-only", "--json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return {cost["method"]: cost for cost in json.loads(done.stdout)}


def test_ten_lines_are_ten_and_count(tmp_path):
    assert len([line for line in TEN_LINES.splitlines() if line.strip()]) <= 10
    costs = count(tmp_path, TEN_LINES, "MyKD")
    assert list(costs["mykd"]["terms"]) == ["cosine"]


def test_the_whole_file_counts_with_its_variant(tmp_path):
    costs = count(tmp_path, WHOLE, "MyKD", "MySharpKD")
    assert costs.keys() == {"none", "mykd", "mykd:sharp"}
    assert costs["mykd"]["terms"]["cosine"]["weight"] == 1
    assert costs["mykd:sharp"]["terms"]["cosine"]["weight"] == 10
    assert costs["mykd:sharp"]["settings"]["method"]["power"] == 2
    # The adaptor: a product of the head's channels at every position, forward and backward.
    assert costs["mykd"]["flop"]["objective"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.py"]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_has_its_options(line):
    program, command, *arguments = shlex.split(line)
    assert program == "kdprof"
    known = cli.cli.commands[command]
    known.make_context(command, arguments)
