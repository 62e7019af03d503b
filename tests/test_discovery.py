"""How methods are found: built-in by name, custom ones in .py files."""

import pytest
from processes import kdprof

from kdprof import discovery
from kdprof.discovery import builtin_methods, find_method
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


# Installed packages


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with one module, whose entry point is the object ``MyKD``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text, package, name="coolkd"):
        (tmp_path / f"{package}.py").write_text(text)
        told = tmp_path / f"{package}-1.0.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (told / "entry_points.txt").write_text(f"[kdprof.methods]\n{name} = {package}:MyKD\n")
        discovery._found.cache_clear()

    yield write
    discovery._found.cache_clear()


def test_an_installed_method_is_found_by_its_name(install, capsys):
    install(MINE, "installed_well")
    found = find_method("mykd")
    assert (found.cls.__name__, found.origin) == ("MyKD", "installed_well:MyKD")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        ("import nowhere_at_all", "coolkd", "cannot be loaded: ModuleNotFoundError: No module"),
        ("raise ValueError('a\\nb')", "coolkd", "cannot be loaded: ValueError: a b; mend or"),
        ("x = 1", "coolkd", "cannot be loaded: AttributeError: module"),
        ("MyKD = 3", "coolkd", "is no subclass of kdprof.method.Method; mend its entry point"),
        ("class MyKD: name = 'x'", "coolkd", "is no subclass of kdprof.method.Method"),
        ("from kdprof.method import Method as MyKD", "coolkd", "is no subclass of kdprof.method"),
        (MINE.replace('"logits"', '"logit"'), "coolkd", "cannot be loaded: UserError: "),
        (
            MINE.replace("class MyKD(Method):", "class MyKD(Method):\n    name = 'cwd'"),
            "cwd",
            "has the name 'cwd' of another method; change its class attribute 'name'",
        ),
    ],
    ids=["import", "raises", "no class", "number", "class", "base", "tap", "clash"],
)
def test_a_broken_package_breaks_no_other_method(install, capsys, request, text, asked, message):
    package = f"broken_{request.node.callspec.id.replace(' ', '_')}"
    install(text, package)
    assert find_method("kd").origin == "built-in"
    assert set(builtin_methods()) >= {"kd", "cwd", "none"}
    assert "coolkd" not in builtin_methods()
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert line.startswith(f"kdprof: the installed method 'coolkd' ({package}:MyKD of {package}) ")
    assert message in line
    with pytest.raises(UserError) as raised:
        find_method(asked)
    assert line == f"kdprof: {raised.value}"


@pytest.mark.parametrize("name", ["kd", "none", "mykd"])
def test_a_broken_package_takes_no_name_away(install, capsys, name):
    """Two are controls; the third is a method of another package."""
    install(MINE, f"well_beside_{name}")
    install("1 / 0", f"broken_as_{name}", name)
    origins = {"mykd": f"well_beside_{name}:MyKD"}
    assert find_method(name).origin == origins.get(name, "built-in")
    assert builtin_methods()[name] is find_method(name)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kdprof: the installed method '{name}' (broken_as_{name}:MyKD of ")
    assert "ZeroDivisionError" in line


def test_a_package_that_works_under_the_name_of_a_built_in_is_refused_beside_a_broken_one(install):
    install(MINE.replace("class MyKD(Method):", "class MyKD(Method):\n    name = 'kd'"), "also_kd")
    install("1 / 0", "broken_beside_it", "kd")
    with pytest.raises(
        UserError, match=r"\(also_kd:MyKD of also_kd\) has the name 'kd' of another"
    ):
        find_method("kd")


def test_commands_run_beside_a_broken_package(install):
    install("1 / 0", "broken_for_commands")
    done = kdprof("methods", "kd")
    assert done.returncode == 0
    assert done.stderr.count("broken_for_commands:MyKD") == 1
    done = kdprof("methods", "coolkd")
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr.splitlines()[-1]
