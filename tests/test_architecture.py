"""The house rules that no reader should have to check."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kdprof": ROOT / "kdprof", "kdprof.methods": ROOT / "methods"}
FOLDERS["kdprof.reports"] = ROOT / "reports"

LEAVES = {"errors", "records", "stats", "store", "budget", "study", "comparison"}
"""Know neither torch nor each other's users."""

MAY_IMPORT = {
    "errors": set(),
    "records": set(),
    "stats": set(),
    "store": {"errors", "records"},
    "budget": {"errors", "records", "stats"},
    "study": {"budget", "errors", "store"},
    "progress": set(),
    "method": {"errors"},
    "device": {"errors"},
    "hardware": {"errors"},
    "parallel": {"errors"},
    "data": {"errors", "method", "progress", "store", "study"},
    "models": {"errors", "method"},
    "schedule": {"study"},
    "step": {"errors", "method", "parallel", "schedule", "study"},
    "resolve": {
        "budget", "data", "device", "errors", "evaluate", "hardware", "method", "models",
        "parallel", "progress", "records", "step", "study",
    },
    "follow": {"data", "models", "parallel", "resolve", "step"},
    "export": {"device", "errors", "models", "store"},
    "evaluate": {"data", "device", "errors", "method", "models", "progress"},
    "measure": {
        "data", "device", "errors", "follow", "hardware", "models", "parallel", "progress",
        "records", "resolve", "stats", "step", "store", "study",
    },
    "train": {
        "budget", "data", "device", "errors", "evaluate", "hardware", "measure", "method",
        "models", "parallel", "progress", "records", "resolve", "schedule", "step", "store",
        "study",
    },
    "launch": {
        "device", "errors", "follow", "measure", "parallel", "progress", "resolve", "store",
        "study", "train",
    },
    "methods": {"errors", "method"},
    "comparison": {"errors", "records", "stats", "store"},
    "reports": {
        "budget", "comparison", "contract", "data", "errors", "evaluate", "published", "records",
        "stats", "store", "train",
    },
    "presets": set(),
    "catalogue": {"method"},
    "method_cards": {"catalogue", "method"},
    "published": {"budget", "errors", "method", "records"},
    "doctor": {"device", "hardware", "measure"},
    "contract": {"errors", "measure", "method", "parallel", "step", "study"},
    "demo": {
        "budget", "progress", "reports", "resolve", "store", "study", "train",
    },
}  # fmt: skip
"""Who may import whom, by the first name below kdprof. Nothing imports cli; cli imports all."""

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


@pytest.mark.parametrize(("module", "path"), list(sources()), ids=lambda value: str(value))
def test_only_the_engine_knows_torch(module, path):
    if part(module) in LEAVES | {"reports", "progress"}:
        assert not {m.split(".")[0] for m in imports_of(module, path)} & HEAVY


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "methods").glob("*.py")))
def test_methods_import_only_the_contract_and_torch(name):
    allowed = {"torch", "kdprof", *sys.stdlib_module_names}
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


def test_files_say_nothing_of_the_machine_they_were_written_on():
    """No absolute path of a workplace, no registry host."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    texts = [ROOT / f for f in listed if Path(f).suffix in {".py", ".md", ".toml", ".txt", ".json"}]
    guilty = [t for t in texts if t.exists() and "/" + "work/" in t.read_text(errors="ignore")]
    assert not guilty
