"""Fuzzed settings, budgets, claims, options of the command line and text files."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import click
import fuzz_texts as texts
from fuzz_case import ACCEPTED, LOST, WRONG, Case, Wrong, check_kept, contents, run
from fuzz_folders import REFERENCE, good_folder, statement
from pydantic import BaseModel

from kdprof.budget import LONGEST_TEXT, parse_budget
from kdprof.claims import parse_claim
from kdprof.cli import COMMANDS
from kdprof.study import (
    Study,
    claim_folder,
    load_study,
    parse_assignments,
    presets,
)

VALUES = (
    "0", "1", "2", "-1", "0.5", "1.0", "1e400", "inf", "-inf", "nan", "1e308", "5e-324", "true",
    "false", "9223372036854775807", "9223372036854775808", "1_000", "0x10", "1e3", "", " ", "none",
    "None", "null", "x", '"x"', "''", '"a" "b"', "[1, 2]", "[]", "[[1]]", "[1, nan]", "{a = 1}",
    "{}", "{a = {b = inf}}", "512x1024", "2x2", "0x0", "\u00b2x\u00b2", "9" * 5000 + "x1",
    "2024-01-01", "12:30:00", "2024-01-01T00:00:00Z", "4 # a comment", "4\nseeds = 3",
    "4\n[step]\nbatch = 3", "=", "a=b", "'", '"', "\\", '"\\u202e"', "[" * 3000, "x" * 5000,
    '"""a\nb"""', '["kd", "kd"]', '["9", "9"]', "usual", "memory", "bf16", "cwd", "imagenet",
)  # fmt: skip


def settings(case: Case) -> str:
    """What a study is given is refused, or is in the written study and is read back equal."""
    given = [_assignment(case.random) for _ in range(case.random.choice((1, 1, 1, 2, 3)))]
    case.tell(f"--set {given!r}")
    source = _source(case) if case.random.random() < 0.3 else None
    found = parse_assignments(given)
    study = load_study(source, found)
    file = case.folder / "out" / "study.toml"
    claim_folder(file, study)
    if load_study(str(file), {}) != study:
        raise Wrong(LOST, f"the study is not read as it is written: {file.read_text()}")
    written = tomllib.loads(file.read_text())
    for key, value in found.items():
        if not _holds(written, key, value):
            raise Wrong(LOST, f"{key} = {value!r} is not in the written study")
    if sum(text.count("=") > 0 for text in given) and not found:
        raise Wrong(LOST, "nothing was set")
    return ACCEPTED


def _assignment(random: Random) -> str:
    keys = [*_keys(Study), "method_settings.kd.temperature", "method_settings.cwd.weights.cwd",
            "method_settings.new.a", "data_settings.label_map.5",
            "data_settings.label_map.x"]  # fmt: skip
    key = random.choice(keys)
    if random.random() < 0.1:
        key = random.choice(
            (key + "s", key[1:], key.upper(), f"{key}.x", texts.hostile(random), "a." * 3000)
        )
    value = random.choice(VALUES) if random.random() < 0.8 else texts.hostile(random)
    return f"{key}={value}" if random.random() < 0.98 else key


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _keys(inner, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def _holds(written: Mapping[str, Any], key: str, value: Any) -> bool:
    """Return whether a written study has a value, in whatever way it is written."""
    inner: Any = written
    for part in key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return False
        inner = inner[part]
    if isinstance(value, str) and isinstance(inner, list):  # HEIGHTxWIDTH
        return "x".join(map(str, inner)) == value.replace(" ", "")
    if isinstance(value, list) and isinstance(inner, list):
        texts_of = [str(item) for item in value]
        kept = [str(item) for item in inner]
        return kept in (texts_of, list(dict.fromkeys(texts_of))) or value == inner
    if isinstance(value, (int, float, str)) and isinstance(inner, (int, float, str)):
        return str(value) == str(inner) or _number(value) == _number(inner)
    return bool(value == inner) or isinstance(value, Mapping)


def _number(value: Any) -> float:
    """Return what a value is as a number; pydantic reads texts and true as numbers."""
    if isinstance(value, str) and value.lower() in ("true", "yes", "on", "y", "t"):
        return 1.0
    if isinstance(value, str) and value.lower() in ("false", "no", "off", "n", "f"):
        return 0.0
    try:
        return float(value)
    except ValueError:
        return math.nan


def _source(case: Case) -> str:
    """Return a preset, or a file of a study with some change."""
    name = case.random.choice(presets())
    if case.random.random() < 0.5:
        case.tell(f"--study {name}")
        return name
    file = case.folder / "study.toml"
    text, how = _changed_toml(case.random, (REFERENCE / "study.toml").read_text())
    case.tell(f"study file: {how}")
    file.write_bytes(text)
    return str(file)


def _changed_toml(random: Random, text: str) -> tuple[bytes, str]:
    if random.random() < 0.5:
        return texts.damaged(random, text.encode())
    lines = text.splitlines()
    place = random.randrange(len(lines))
    key = lines[place].partition("=")[0]
    lines[place] = f"{key}= {random.choice(VALUES)}"
    return "\n".join(lines).encode("utf-8", "replace"), f"line {place} is {lines[place][:200]!r}"


# The grammar of budgets and claims, options


def grammar(case: Case) -> str:
    """A budget, a claim or an option is refused in one line, or means what it says."""
    return case.random.choice((_budget, _budget, _budget, _claim, _claim, _option))(case)


def _budget(case: Case) -> str:
    text = _budget_text(case.random)
    case.tell(f"budget {text!r}")
    found = parse_budget(text)
    if not (math.isfinite(found.amount) and found.amount > 0) or len(text) > LONGEST_TEXT:
        raise Wrong(WRONG, f"an amount of {found.amount}")
    if parse_budget(found.text) != found or found.text.strip() != text.strip():
        raise Wrong(LOST, f"is {found.text!r}")
    if found.unit != "iterations" or found.amount >= 2:
        half = parse_budget(found.half())
        if not 0.2 < half.amount / found.amount < 0.8 or half.unit != found.unit:
            raise Wrong(WRONG, f"half of it is {found.half()}")
    return ACCEPTED


def _budget_text(random: Random) -> str:
    number = random.choice(
        ("0", "1", "9", "40", "1.5", "1e3", "5e17", "1e400", "1e308", "1e-5", "-1", "+1", "nan",
         "inf", "1_0", "\u0664", "\u00b2", "0x1", "9" * 120, ".5", "5.", "1,5", "")
    )  # fmt: skip
    unit = random.choice(
        ("", "k", "M", "G", "sample", "ksample", "epoch", "s", "min", "h", "d", "flop", "Eflop",
         "J", "kWh", "K", "S", "H", "hours", "q", " k", "\tk", "\nk")
    )  # fmt: skip
    text = f"{number}{unit}"
    if random.random() < 0.4:
        text += "@" + random.choice(
            ("kd", "cwd:feature", "", "@", "a b", "..", texts.hostile(random))
        )
    if random.random() < 0.2:
        text += "+" + random.choice((text, "1h", "9", "", "+"))
    return text if random.random() < 0.9 else texts.hostile(random)


def _claim(case: Case) -> str:
    random = case.random
    name = lambda: random.choice(("kd", "cwd", "a:b", "..", "gain(a,", texts.hostile(random)))  # noqa: E731
    number = random.choice(("1.1", "0", "-1", "1e400", "nan", "1e-400", "0.3", "1e309", ""))
    budget = _budget_text(random)
    text = random.choice(
        (f"{name()} > {name()} @ {budget}", f"{name()} ~ {name()} within {number} @ {budget}",
         f"gain({name()}, {name()}) > {number}", f"gain({name()}, {name()}) < {number} on flop",
         f"{name()}>{name()} @ 9", f"gain(cwd, kd) > 1.2 on {name()}", f"a > b @ {name()}",
         texts.hostile(random))
    )  # fmt: skip
    case.tell(f"claim {text!r}")
    found = parse_claim(text)
    if not math.isfinite(found.threshold):
        raise Wrong(WRONG, f"the threshold is {found.threshold}")
    if parse_claim(found.text()) != found:
        raise Wrong(LOST, f"is written as {found.text()!r}")
    return ACCEPTED


NOWHERE = ("--device", "nosuch", "--in-process")
FIXED: dict[str, tuple[object, ...]] = {
    "measure": ("--study", "quickstart", *NOWHERE),
    "plan": ("--study", "quickstart", *NOWHERE),
    "train": ("--study", "quickstart", *NOWHERE),
    "decide": ("kd > none @ 9", "--study", "quickstart", *NOWHERE),
    "evaluate": ("--model", "pspnet-test_resnet", "--data", "synthetic", "--weights", "nowhere"),
    "doctor": ("--set", "device=nosuch"),
    "export": ("made.pth",),
}
"""What makes a command stop before it works, with every option but those that stop it."""


def _option(case: Case) -> str:
    """Give a hostile text to one option or argument of a command."""
    store = good_folder(case)
    commands = [command for command in COMMANDS if command.name not in ("demo", "data")]
    command = case.random.choice(commands)
    fixed = FIXED.get(command.name or "", ())
    named = [
        parameter
        for parameter in command.params
        if not getattr(parameter, "is_flag", False) and not set(parameter.opts) & set(fixed)
    ]
    parameter = case.random.choice(named)
    value = case.random.choice(
        (texts.hostile(case.random), case.random.choice(VALUES), _budget_text(case.random))
    )
    value = texts.as_argument(value)
    out = ("--out", store.root) if "--out" not in parameter.opts and _takes_out(command) else ()
    given = (f"{parameter.opts[0]}={value}",)
    if isinstance(parameter, click.Argument):
        fixed, given = () if command.name == "export" else fixed, ("--", value)
    before = contents(case.folder)
    done = run(case, command.name, *fixed, *out, *given)
    check_kept(before, case.folder, ("out/reports/", "out/claims/"))
    if done.code == 2 and (made := contents(case.folder).keys() - before.keys()):
        raise Wrong(WRONG, f"refused, but wrote {sorted(made)}")
    texts.check_reports(case.folder, before)
    return done.outcome


def _takes_out(command: click.Command) -> bool:
    return any("--out" in parameter.opts for parameter in command.params)


# Text files


def text(case: Case) -> str:
    """A text file is of another encoding, damaged, huge or deep: used, or refused in one line."""
    path = case.folder / case.random.choice(("given.toml", "given.json", "given"))
    if case.random.random() < 0.1:
        path = case.folder / case.random.choice(("x" * 5000, "/".join(["y" * 200] * 30)))
    else:
        content, how = _content(case.random)
        case.tell(f"{path.name}: {how}")
        path.write_bytes(content)
    nowhere = (*NOWHERE, "--out", case.folder / "new")
    store = good_folder(case)
    ways: list[tuple[object, ...]] = [
        ("measure", "--study", path, *nowhere),
        ("plan", "--study", path, "--budget", "9", *nowhere),
        ("train", "--study", path, "--budget", "9", *nowhere),
        ("decide", "kd > none @ 9", "--study", path, *nowhere),
        ("measure", "--baseline", path, *nowhere),
        ("compare", path, store.root),
        ("compare", store.root, path),
        ("verify", path),
        ("data", "check", "synthetic", "--study", path, "--set", "x=1"),
        ("claim", statement(), "--out", _with_study(store.root, path)),
        ("convert", "--published", "--out", _with_study(store.root, path)),
    ]
    return run(case, *case.random.choice(ways)).outcome


def _with_study(root: Path, path: Path) -> Path:
    """Put a file in place of a folder's study."""
    if len(path.name) < 100 and path.exists():
        (root / "study.toml").write_bytes(path.read_bytes())
    return root


def _content(random: Random) -> tuple[bytes, str]:
    deep = random.choice((50, 1000, 100_000))
    made: tuple[tuple[str, str], ...] = (
        ("deep lists", f"a = {'[' * deep}{']' * deep}"),
        ("deep tables", f"a = {'{a = ' * deep}1{'}' * deep}"),
        ("deep keys", f"{'a.' * deep}a = 1"),
        ("deep JSON", "[" * deep + "]" * deep),
        ("deep JSON objects", '{"a":' * deep + "1" + "}" * deep),
        ("a value of 10 kB", f'student = "{"x" * 10_240}"'),
        ("a key of 10 kB", f"{'x' * 10_240} = 1"),
        ("an unknown key", f"{json.dumps(texts.hostile(random))} = 1"),
        ("many keys", "\n".join(f"a{number} = 1" for number in range(5000))),
        ("a hostile value", f"student = {json.dumps(texts.hostile(random))}"),
        ("hostile text", texts.hostile(random)),
        ("nothing", ""),
        ("a long number", f"seeds = {'9' * 5000}"),
        ("a long float", f"seeds = 1e{'9' * 500}"),
    )
    how, written = random.choice(made)
    if random.random() < 0.5:
        good = random.choice(("study.toml", "claims", "costs"))
        path = REFERENCE / good
        path = path if path.is_file() else sorted(path.glob("*.json"))[0]
        how, written = path.name, path.read_text()
    data = written.encode("utf-8", "surrogatepass")
    if random.random() < 0.7:
        data, also = texts.damaged(random, data)
        how = f"{how}, {also}"
    return data, how
