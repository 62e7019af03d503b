"""Fuzzed folders of results: their records, their names, their damage, and what reads them.

Every case begins with a copy of some real records, those of ``reports/reference/``.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import socket
from functools import cache
from pathlib import Path
from random import Random

import fuzz_texts as texts
import torch
from fuzz_case import (
    ACCEPTED,
    LOST,
    REFUSED,
    WRONG,
    Case,
    Printed,
    Wrong,
    bytes_read,
    check_kept,
    contents,
    limited,
    run,
)
from pydantic import ValidationError

from kdprof.budget import parse_budget
from kdprof.errors import UserError
from kdprof.models import build
from kdprof.records import ClaimRecord, Cost, CurvePoint, Decision, LedgerEntry, Record, Run
from kdprof.reports import costs, page, table, verdict_text
from kdprof.reports.judge import judge
from kdprof.reports.results import collect
from kdprof.store import RunFolder, Store, read_lines, read_record, run_place, write_record
from kdprof.study import load_study

REFERENCE = Path(__file__).resolve().parent.parent / "reports" / "reference" / "camvid-cpu"
METHODS = ("none", "kd", "cwd")
SEEDS = (0, 1)
MOST_READ = 64 * 2**20
"""Bytes that a command may read before it refuses a file without end."""


@cache
def _budgets() -> tuple[str, ...]:
    found = {path.name for path in (REFERENCE / "runs" / "kd").iterdir()}
    return tuple(sorted(found, key=lambda text: parse_budget(text).amount)[:2])


@cache
def _sources() -> tuple[Path, ...]:
    """Return the files that are copied, relative to the reference."""
    costs_of = [path for m in METHODS for path in (REFERENCE / "costs").glob(f"{m}-*.json")]
    runs = [
        REFERENCE / run_place("run", m, b, s) for m in METHODS for b in _budgets() for s in SEEDS
    ]
    inside = [path for folder in (REFERENCE / "teacher", *runs) for path in folder.iterdir()]
    files = [REFERENCE / "study.toml", *costs_of, *inside]
    return tuple(path.relative_to(REFERENCE) for path in sorted(files))


def good_folder(case: Case) -> Store:
    """Return a folder with Costs, runs, a claim and a decision, without reports."""
    root = case.folder / "out"
    for path in _sources():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REFERENCE / path, root / path)
    store = Store(root)
    store.write_decision(
        Decision(
            statement=statement(), confidence=0.95, max_seeds=4, outcome="undecided", looks=[],
            saved_runs=1, saved_s=1.0,
        )
    )  # fmt: skip
    store.claims.mkdir()
    (store.claims / "a.json").write_text(_claim())
    return store


@cache
def _claim() -> str:
    """Return a claim of the reference as it is stored; it is about more runs than a case has."""
    return next(iter(sorted((REFERENCE / "claims").glob("*.json")))).read_text()


def statement(random: Random | None = None) -> str:
    """Return a claim about methods of a good folder, the same one without ``random``."""
    budget = _budgets()[-1]
    if random is None:
        return f"cwd > kd @ {budget}"
    forms = (f"cwd > kd @ {budget}", f"kd ~ none within 1 @ {budget}", "gain(cwd, kd) > 1.1",
             "gain(none, kd) < 2 on flop")  # fmt: skip
    return random.choice(forms)


def student_of(store: Store) -> RunFolder:
    """Return the folder of a finished run of a good folder; it has no checkpoint."""
    return store.run_folder("kd", _budgets()[0], SEEDS[0])


@cache
def _checkpoint() -> bytes:
    """Return the checkpoint of a run of the reference, with random weights."""
    study = load_study(str(REFERENCE / "study.toml"), {})
    record = REFERENCE / run_place("run", "kd", _budgets()[0], SEEDS[0]) / "run.json"
    classes = read_record(record, Run).miou_per_class or {}
    file = io.BytesIO()
    student = build(study.student, len(classes)).state_dict()
    torch.save({"iteration": 1, "step": {"student": student}}, file)
    return file.getvalue()


KINDS: dict[str, type[Record]] = {
    "run.json": Run, "curve.jsonl": CurvePoint, "ledger.jsonl": LedgerEntry, "claims": ClaimRecord,
    "costs": Cost, "decisions": Decision,
}  # fmt: skip


def _records(store: Store) -> list[Path]:
    return sorted(path for path in store.root.rglob("*.json*") if path.parent != store.reports)


def _kind(path: Path) -> type[Record]:
    return KINDS.get(path.name) or KINDS[path.parent.name]


def _some_record(case: Case, store: Store) -> Path:
    """Return a record: as often a Cost as a run, of which there are more."""
    every = _records(store)
    kinds = sorted({_kind(path).__name__ for path in every})
    kind = case.random.choice(kinds)
    return case.random.choice([path for path in every if _kind(path).__name__ == kind])


# Commands on a folder


def use(case: Case, store: Store) -> Printed:
    """Run one of the commands that read a folder, on this one, and check what it wrote."""
    before, out = contents(store.root), ("--out", store.root)
    claims = sorted(store.claims.glob("*.json")) if store.claims.is_dir() else []
    ways = [
        lambda: run(case, "status", *out),
        lambda: _as_json(run(case, "status", *out, "--json")),
        lambda: run(case, "convert", case.random.choice(("40k@cwd", "2h", "1e15flop", "9")), *out),
        lambda: _as_json(run(case, "convert", "40k@kd", *out, "--json")),
        lambda: run(case, "compare", store.root, store.root),
        lambda: run(case, "claim", statement(case.random), *out),
        lambda: run(case, "verify", *claims) if claims else run(case, "status", *out),
        lambda: run(case, "export", case.folder / "student.pth", "--method", "kd", "--budget",
                    _budgets()[0], *out),
        lambda: _tables(case, store),
        lambda: _tables(case, store),
    ]  # fmt: skip
    done = case.random.choice(ways)()
    check_kept(before, store.root, ("reports/", "claims/"))
    texts.check_reports(store.root, before)
    return done


def _as_json(done: Printed) -> Printed:
    if not done.code:
        try:
            json.loads(done.out)
        except ValueError as error:
            raise Wrong(WRONG, f"--json printed no JSON: {error}") from None
    return done


def _tables(case: Case, store: Store) -> Printed:
    """Write all reports but the figures."""
    case.tell("write tables, verdict and page")
    try:
        results = collect(store)
        verdict = judge(results)
        table.render(store)
        verdict_text.render(store, results, verdict)
        costs.render(store)
        page.render(store, verdict, "seconds")
    except UserError as error:
        return Printed(2, "", str(error))
    return Printed(0, "", "")


# Injection


def injection(case: Case) -> str:
    """A record or the study says a hostile name; what is printed and written stays text."""
    store = good_folder(case)
    text = texts.hostile(case.random)
    if case.random.random() < 0.2:
        key = case.random.choice(("student", "teacher", "data"))
        case.tell(f"study.toml: {key} = {text!r}")
        kept = [line for line in store.study.read_text().splitlines() if not line.startswith(key)]
        quoted = json.dumps(text.encode("utf-8", "replace").decode())
        store.study.write_text("\n".join([f"{key} = {quoted}", *kept]), "utf-8")
    else:
        path = _some_record(case, store)
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        content = json.loads(lines[0])
        places = texts.text_places(content)
        if case.random.random() < 0.3 or not places:
            owner = case.random.choice([content, *(v for v in content.values() if type(v) is dict)])
            key = case.random.choice(list(owner) or [""])
            owner[text] = owner.pop(key, 0.5)
            case.tell(f"{path.name}: key {key!r} is {text!r}")
        else:
            owner, key = case.random.choice(places)
            case.tell(f"{path.name}: {key!r} is {text!r}")
            owner[key] = text
        path.write_text("\n".join([json.dumps(content), *lines[1:], ""]))
    return use(case, store).outcome


# Records


def records(case: Case) -> str:
    """A record holds what it cannot hold, or is damaged; it is refused by name, or used."""
    store = good_folder(case)
    path = _some_record(case, store)
    kind, data = _kind(path), path.read_bytes()
    if case.random.random() < 0.6:
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        content, how = texts.changed_json(case.random, json.loads(lines[0]))
        made = b"\n".join([json.dumps(content).encode(), *lines[1:], b""])
    elif case.random.random() < 0.2:
        other = _some_record(case, store)
        made, how = other.read_bytes(), f"holds {other.relative_to(store.root)}"
    else:
        made, how = texts.damaged(case.random, data)
    path.write_bytes(made)
    case.tell(f"{path.relative_to(store.root)}: {how}")
    refusal = _refusal(path, kind, case)
    done = use(case, store)
    if done.code == 2 and refusal and "is no" in done.err and path.name not in done.err:
        raise Wrong(WRONG, f"does not name {path.name}: {done.err}")
    return REFUSED if refusal else done.outcome


def _refusal(path: Path, kind: type[Record], case: Case) -> str | None:
    """Return why a record is refused; None if it is read, and then read again as it was written."""
    try:
        if path.suffix == ".jsonl":
            read_lines(path, kind)
            return None
        found = read_record(path, kind)
    except UserError as error:
        if str(path) not in str(error):
            raise Wrong(WRONG, f"does not name the file: {error}") from None
        return str(error)
    again = case.folder / "again.json"
    write_record(again, found)
    if read_record(again, kind) != found:
        raise Wrong(LOST, f"{kind.__name__} is not read as it is written")
    return None


# Figures


def figures(case: Case) -> str:
    """Names that mean something in mathtext, XML or a file name are drawn as they are."""
    store = good_folder(case)
    text = texts.hostile(case.random)
    for path in (*store.root.glob("runs/*/*/*/run.json"), *store.root.glob("costs/*.json")):
        content = json.loads(path.read_text())
        content["device"] = text
        path.write_text(json.dumps(content))
    method = case.random.choice(("cwd", "a", "+-", "-", "\u00e9", "\u6f22\u5b57", "_x_", "k" * 60))
    _rename(store, "cwd", method)
    case.tell(f"device {text!r}, cwd is {method!r}")
    before = contents(store.root)
    kind = case.random.choice(("svg", "svg", "png", "pdf"))
    arguments = ["--format", kind, "--x", case.random.choice(("seconds", "flop", "joules"))]
    if case.random.random() < 0.5:
        arguments += ["--width", case.random.choice(("84", "174", "0", "-1", "nan", "inf", "1e9"))]
    if case.random.random() < 0.3:
        arguments += ["--method", case.random.choice((method, "kd", texts.argument(case.random)))]
    done = run(case, "plot", "--out", store.root, *arguments)
    check_kept(before, store.root, ("reports/",))
    texts.check_reports(store.root, before)
    return done.outcome


def _rename(store: Store, old: str, new: str) -> None:
    """Call a method of a folder by another name, wherever it stands."""
    for path in _records(store):
        text = path.read_text()
        if f'"method": "{old}"' in text:
            path.write_text(text.replace(f'"method": "{old}"', f'"method": "{new}"'), "utf-8")
            if path.parent.name == "costs":
                path.rename(path.with_name(path.name.replace(f"{old}-", f"{new}-", 1)))
    if new != old:
        (store.root / "runs" / old).rename(store.root / "runs" / new)


# Reading


def reading(case: Case) -> str:
    """A file is a pipe, a device, a folder or has no end: refused, fast, and hardly read."""
    store = good_folder(case)
    inside = [*_records(store), store.study, store.root / "teacher" / "checkpoint.pt"]
    path = case.random.choice([*inside, *[case.folder / "other"] * 8])
    kind = _special(case, path)
    case.tell(f"{path.name} is {kind}")
    began = bytes_read()
    done = use(case, store) if path in inside else _read_other(case, store, path)
    if path not in inside and kind != "empty" and done.code not in _refusing(case):
        raise Wrong(WRONG, f"exit code {done.code} for {kind}: {done.out} {done.err}")
    if (amount := bytes_read() - began) > MOST_READ:
        raise Wrong(WRONG, f"read {amount / 2**20:.0f} MiB of {kind}")
    return done.outcome


def _refusing(case: Case) -> set[int]:
    """Return the exit codes of a refusal; ``data check`` lists what it finds, with 1."""
    return {1} if "'data' 'check'" in case.told[-1] else {2}


def _special(case: Case, path: Path) -> str:
    """Put something that is no regular file of a usual size in place of a file."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = case.random.choice(
        ("pipe", "folder", "socket", "loop", "dangling", "huge", "/dev/zero", "/dev/full",
         "/dev/urandom", "/dev/tty", "empty"),
    )  # fmt: skip
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        _socket(path)
    elif kind in ("loop", "dangling"):
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    elif kind.startswith("/dev"):
        path.symlink_to(kind)
    else:
        with path.open("wb") as file:
            file.truncate(2**40 if kind == "huge" else 0)  # without a byte on the disk
    return kind


def _socket(path: Path) -> None:
    """Make a socket; its address may have 100 bytes only, so it is bound from its folder."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _read_other(case: Case, store: Store, path: Path) -> Printed:
    """Give a file to a command that reads one."""
    nowhere = ("--device", "nosuch", "--in-process", "--out", case.folder / "new")
    network = ("--model", "pspnet-test_resnet", "--data", "synthetic")
    ways: list[tuple[object, ...]] = [
        ("compare", path, store.root),
        ("compare", store.root, path),
        ("verify", path),
        ("measure", "--study", path, *nowhere),
        ("measure", "--baseline", path, *nowhere),
        ("measure", "--teacher-weights", path, "--study", "quickstart", *nowhere),
        ("measure", "--method", f"{path}.py:Mine", *nowhere),
        ("train", "--study", path, "--budget", "9", *nowhere),
        ("plan", "--study", f"{path}/study.toml", *nowhere),
        ("evaluate", *network, "--weights", path),
        ("data", "check", f"folder:{path}"),
        ("data", "check", f"voc:{path}"),
        ("doctor", "--study", path, "--set", "device=nosuch"),
        ("status", "--out", path),
        ("plot", "--out", path),
        ("claim", statement(), "--out", path),
        ("methods", f"{path}:Mine"),
    ]
    return run(case, *case.random.choice(ways))


# Writing


def writing(case: Case) -> str:
    """What cannot be written is said with the file's name; nothing is half-written or lost."""
    store = good_folder(case)
    before, way = contents(store.root), case.random.randrange(4)
    if way == 0:
        most = case.random.choice((0, 1, 100, 1000, 4000, 20_000, 100_000))
        case.tell(f"files may have {most} bytes")
        with limited(resource.RLIMIT_FSIZE, most):
            done = _write(case, store)
    elif way == 1:
        place = case.random.choice(("reports", "claims"))
        shutil.rmtree(store.root / place, ignore_errors=True)
        before = contents(store.root)
        case.tell(f"{place} is {_special(case, store.root / place)}")
        done = _write(case, store)
    elif way == 2:
        target = case.folder / f"made{case.random.choice(('.pth', '.safetensors', '.x', ''))}"
        case.tell(f"{target.name} is {_special(case, target)}")
        student_of(store).checkpoint.write_bytes(_checkpoint())
        before = contents(store.root)
        done = run(case, "export", target, "--method", "kd", "--budget", _budgets()[0],
                   "--out", store.root)  # fmt: skip
    else:
        name = texts.argument(case.random)
        done = run(case, "claim", statement(case.random), "--name", name, "--out", store.root)
    check_kept(before, store.root, ("reports/", "claims/"))
    texts.check_reports(store.root, before)
    _check_inside(case)
    return REFUSED if done.code else ACCEPTED


def _write(case: Case, store: Store) -> Printed:
    if case.random.random() < 0.1:
        return run(case, "plot", "--format", "svg", "--out", store.root)
    return run(case, "claim", statement(case.random), "--out", store.root)


def _check_inside(case: Case) -> None:
    """Check that nothing was written outside the case's folder.

    Raises:
        Wrong: something was.
    """
    allowed = {"out", "made", "made.pth", "made.safetensors", "made.x", "again.json", "nowhere"}
    if others := {path.name for path in case.folder.iterdir()} - allowed:
        raise Wrong(WRONG, f"written beside the folder of results: {others}")


# Folders of runs


def places(case: Case) -> str:
    """Two runs never share a folder, and no name leads out of the folder of results."""
    names = [_run_name(case.random) for _ in range(2)]
    found = []
    for method, budget in names:
        case.tell(f"method {method!r}, budget {budget!r}")
        content = json.loads((REFERENCE / "runs" / "kd" / _budgets()[0] / "0/run.json").read_text())
        content |= {"method": method, "budget": budget}
        try:
            parse_budget(budget)
            made = Run.model_validate(content)
        except (UserError, ValidationError):
            continue
        place = run_place(made.kind, made.method, made.budget, made.seed)
        if len(place.parts) != 4 or {"..", "."} & set(place.parts):
            raise Wrong(WRONG, f"leads to {place}")
        if any(len(part.encode()) > 255 for part in place.parts):
            raise Wrong(WRONG, f"no file system has {place}")
        store = Store(case.folder)
        store.run_folder(made.method, made.budget, made.seed).path.mkdir(
            parents=True, exist_ok=True
        )
        write_record(store.run_folder(made.method, made.budget, made.seed).record, made)
        found.append(made)
    if len({(run.method, run.budget) for run in found}) != len(Store(case.folder).runs()):
        raise Wrong(LOST, "one run replaced another")
    return ACCEPTED if len(found) == 2 else REFUSED


def _run_name(random: Random) -> tuple[str, str]:
    parts = ("kd", "cwd", "a", "A", ".", ":", "-", "+", "_", "/", "..", " ", "\n", "\u00e9",
             "\u6f22" * 20, "e\u0301", "x" * 30)  # fmt: skip
    method = "".join(random.choice(parts) for _ in range(random.choice((1, 1, 2, 3))))
    budgets = ("9", "09", "9.0", "9e0", "2h", "1h+30min", "9@kd", f"9@{method}", "1.5h", "9\u2028k",
               "\u0669", texts.hostile(random))  # fmt: skip
    return method, random.choice(budgets)


# Damaged folders


def store(case: Case) -> str:
    """A folder lacks files, or has others: commands say so, and leave the good ones as they are."""
    made = good_folder(case)
    for _ in range(case.random.choice((1, 1, 2, 4))):
        _break(case, made)
    return use(case, made).outcome


def _break(case: Case, made: Store) -> None:
    paths = sorted(made.root.rglob("*"))
    files = [path for path in paths if path.is_file()]
    path = case.random.choice(files) if files else made.root / "x"
    folder = case.random.choice([made.root, *(path for path in paths if path.is_dir())])
    way = case.random.choice(
        ("remove", "remove folder", "empty", "cut", "temporary", "stray", "copy", "move", "lock",
         "file for folder", "folder for file", "odd name"),
    )  # fmt: skip
    case.tell(f"{way}: {path.relative_to(made.root)}, {folder.relative_to(made.root)}")
    if way == "remove":
        path.unlink(missing_ok=True)
    elif way in ("remove folder", "file for folder") and folder != made.root:
        shutil.rmtree(folder)
        if way == "file for folder":
            folder.write_text("x")
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "cut" and path.exists():
        path.write_bytes(path.read_bytes()[: case.random.randrange(1 + path.stat().st_size)])
    elif way == "temporary":
        (path.parent / f".{path.name}.123.tmp").write_text('{"half":')
    elif way == "stray":
        name = case.random.choice((".DS_Store", "notes.txt", "0 (1)", "x.json", "run.json"))
        (folder / name).write_text(case.random.choice(("", "x", "{}", "[]")))
    elif way in ("copy", "move") and path.exists():
        target = folder / path.name
        if not target.exists():
            (shutil.copy if way == "copy" else shutil.move)(path, target)
    elif way == "lock":
        text = case.random.choice(("", "{", '{"host": 1, "pid": "x"}', '{"host": "", "pid": 1}',
                                   '{"host": "x y", "pid": -1}', "[]", "null"))  # fmt: skip
        (path.parent / "lock").write_text(text)
    elif way == "folder for file" and path.exists():
        path.unlink()
        path.mkdir()
    elif way == "odd name":
        name = texts.argument(case.random).replace("/", "")[:60].strip(".") or "x"
        (folder / name).mkdir(exist_ok=True)
