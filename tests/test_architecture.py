"""The house rules that no reader should have to check."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kdprof": ROOT / "kdprof", "kdprof.methods": ROOT / "methods"}
FOLDERS["kdprof.reports"] = ROOT / "reports"

LEAVES = {"errors", "visible", "records", "stats", "store", "budget", "study", "claims"}
"""Know neither torch nor each other's users."""

MAY_IMPORT = {
    "errors": set(),
    "imports": set(),
    "interrupts": set(),
    "progress": set(),
    "presets": set(),
    "records": {"visible"},
    "visible": set(),
    "stats": set(),
    "store": {"errors", "records"},
    "budget": {"errors", "records", "stats"},
    "claims": {"budget", "errors"},
    "study": {"budget", "errors", "store", "user_files"},
    "pauses": {"errors"},
    "processes": {"errors", "store"},
    "user_files": {"errors", "store"},
    "method": {"errors", "records"},
    "discovery": {"errors", "method", "user_files"},
    "resized": {"hardware", "method"},
    "hardware": {"errors"},
    "distributed": {"errors"},
    "data": {"errors", "method", "pauses", "progress", "store", "study", "visible"},
    "models": {"errors", "hardware", "imports", "method", "store", "user_files"},
    "schedule": {"study"},
    "optimizer": {"errors", "method", "study", "user_files"},
    "step": {
        "errors", "distributed", "hardware", "method", "optimizer", "resized", "schedule", "study",
    },
    "step_feed": {"data", "step"},
    "evaluate": {
        "data", "errors", "hardware", "method", "models", "pauses", "progress", "records",
        "resized",
    },
    "published": {"budget", "data", "discovery", "errors", "method", "models", "records", "study"},
    "resolve": {
        "budget", "data", "discovery", "distributed", "errors", "evaluate", "step_feed", "hardware",
        "method", "models", "optimizer", "progress", "records", "step", "store", "study",
        "user_files",
    },
    "measure": {
        "data", "distributed", "errors", "hardware", "interrupts", "method", "models", "optimizer",
        "pauses", "processes", "progress", "records", "resized", "resolve", "stats", "step",
        "step_feed", "store", "study", "user_files",
    },
    "method_checks": {
        "discovery", "distributed", "errors", "measure", "method", "processes", "step", "study",
    },
    "train": {
        "budget", "data", "distributed", "errors", "evaluate", "step_feed", "hardware", "measure",
        "models", "optimizer", "pauses", "processes", "progress", "published", "records", "resolve",
        "schedule", "store", "study",
    },
    "workflow": {
        "distributed", "measure", "processes", "progress", "records", "resolve", "store", "study",
        "train",
    },
    "launch": {
        "distributed", "errors", "hardware", "processes", "progress", "records", "resolve",
        "store", "study", "train", "workflow",
    },
    "methods": {"errors", "hardware", "method", "resized"},
    "reports": {
        "budget", "claims", "data", "discovery", "errors", "evaluate", "measure", "method",
        "method_checks", "published", "records", "stats", "store", "train", "visible",
    },
    "decide": {
        "claims", "discovery", "errors", "records", "reports", "stats", "store", "study",
        "workflow",
    },
    "demo": {"budget", "progress", "reports", "train", "workflow"},
}  # fmt: skip
"""Who may import whom, by the first name below kdprof. Nothing imports cli; cli imports all."""

LAYERS = [
    line.split()
    for line in (ROOT / "docs" / "architecture.md").read_text().split("```")[3].splitlines()
    if line
]
"""The rooms as docs/architecture.md draws them, from the top."""

HEAVY = {"torch", "timm", "torchvision", "fvcore"}


def sources():
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if package == "kdprof.reports" and "reference" in path.parts:
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]), path


def imports_of(module: str, path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("module", "path"), list(sources()), ids=lambda value: str(value))
def test_imports_go_one_way(module, path):
    me = part(module)
    if me in ("cli", "__init__", "__main__"):
        return
    names = {m for m in imports_of(module, path) if m.startswith("kdprof.")}
    known = {*MAY_IMPORT, "cli"}
    others = {part(name) for name in names} & known - {me}
    assert others <= MAY_IMPORT[me], f"{module} imports {others - MAY_IMPORT[me]}"


def test_the_drawn_rooms_are_those_there_are_and_import_downwards_only():
    """So there is no circle of imports, either."""
    level = {room: -number for number, rooms in enumerate(LAYERS) for room in rooms}
    assert level.keys() == MAY_IMPORT.keys() | {"cli"}
    there = {part(module) for module, _ in sources()} - {"__init__", "__main__"}
    assert there == level.keys()
    for room, others in MAY_IMPORT.items():
        assert all(level[other] < level[room] for other in others), room


@pytest.mark.parametrize(("module", "path"), list(sources()), ids=lambda value: str(value))
def test_only_the_engine_knows_torch(module, path):
    if part(module) in LEAVES | {"reports", "progress"}:
        assert not {m.split(".")[0] for m in imports_of(module, path)} & HEAVY


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "methods").glob("*.py")))
def test_methods_import_only_the_contract_and_torch(name):
    allowed = {"torch", "kdprof", *sys.stdlib_module_names}
    if name.endswith("_triton"):  # kernels, which are imported where they run only
        allowed.add("triton")
    path = ROOT / "methods" / f"{name}.py"
    assert {m.split(".")[0] for m in imports_of(f"kdprof.methods.{name}", path)} <= allowed


def test_help_imports_no_torch():
    """What keeps `kdprof --help` fast: 0.1 s instead of 2."""
    code = (
        "import sys, kdprof.cli\n"
        "try: kdprof.cli.cli(['--help'], standalone_mode=False)\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'matplotlib', 'scipy'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "measure" in done.stdout


def test_every_package_is_installed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    inside = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "kdprof").rglob("__init__.py")}
    beside = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "reports").rglob("__init__.py")}
    wanted = {name.replace(os.sep, ".") for name in inside} | {"kdprof.methods"}
    wanted |= {f"kdprof.{name.replace(os.sep, '.')}" for name in beside}
    assert sorted(listed) == sorted(wanted)


def test_files_say_nothing_of_the_machine_they_were_written_on():
    """No absolute path of a workplace, no registry host."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    texts = [ROOT / f for f in listed if Path(f).suffix in {".py", ".md", ".toml", ".txt", ".json"}]
    guilty = [t for t in texts if t.exists() and "/" + "work/" in t.read_text(errors="ignore")]
    assert not guilty
