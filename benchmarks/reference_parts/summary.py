"""The page that says what a reference consists of and what is missing: README.md of a device."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress

from kdprof.reports.atlas_check import check_folder
from kdprof.store import write_atomic

from .base import WORK, Call
from .studying import REPORT, STUDY

FILES = {
    "atlas.md": "what an iteration of each method costs: tables, phases, what is missing",
    "atlas.csv": "the same in full precision",
    "atlas.json": "the record that both are made from",
    "checks.md": "what the device has; whether its numbers are right and repeat",
    "objectives.md": "dear objectives against their equations written out",
    "objectives.json": "the same for programs",
    f"{STUDY}/reports/verdict.md": "what each method buys at equal compute",
    f"{STUDY}/reports/index.html": "the same as a page",
    f"{STUDY}/claims": "claims with their evidence; `kdprof verify` computes them again",
    "reference.json": "what was done, how long each piece took, and how it ended",
}
IGNORED = f"{WORK}/\n*.pt\nlock\nlog.jsonl\n"
"""Not part of the reference: samples of every step, checkpoints, locks."""
COMMON = {"root", "user", "ubuntu", "localhost"}
"""Names that are nobody's."""


def write(call: Call, left: Sequence[str]) -> None:
    """Write README.md of the device's folder, and what git leaves out of it.

    Args:
        left: what was not done, failed, or keeps the folder out of the reference.
    """
    parts = [*_head(call), *_files(call), *_figures(call), *_study(call), *_left(left)]
    write_atomic(call.folder / "README.md", "\n".join(parts))
    write_atomic(call.folder / ".gitignore", IGNORED)


def _head(call: Call) -> Iterator[str]:
    identity = call.state.record.identity
    yield f"# Reference on {identity['device']}"
    yield ""
    yield "Made by `python benchmarks/reference.py`. " + (
        "**A tiny run, which shows that all parts work and says nothing about the methods.**"
        if identity["size"] == "tiny"
        else "Networks start from random weights, so that mIoU ranks nothing at full size."
    )
    yield ""
    yield "- versions: " + ", ".join(f"{k} {v}" for k, v in call.versions.items())
    yield f"- data of the study: {identity['data']}"
    yield ""


def _files(call: Call) -> Iterator[str]:
    yield "| file | is |"
    yield "| :-- | :-- |"
    for name, what in FILES.items():
        if (call.folder / name).exists():
            yield f"| [{name}]({name}) | {what} |"
    yield ""


def _figures(call: Call) -> Iterator[str]:
    for piece in call.size.pieces():
        pages = sorted((call.folder / piece.folder).glob("*.md"))
        if piece.what != "methods" or not pages:
            continue
        yield f"## {piece.setting.name}, {piece.precision}"
        yield ""
        yield from (f"[{path.name}]({piece.folder}/{path.name})" for path in pages)
        yield ""
        for path in sorted((call.folder / piece.folder).glob("*.png")):
            yield f"![{path.stem}]({piece.folder}/{path.name})"
            yield ""


def _study(call: Call) -> Iterator[str]:
    plan, found = call.state.record.study, call.state.result(REPORT)
    if plan is None or not plan.budgets:
        return
    yield "## Study"
    yield ""
    yield (
        f"Budgets {', '.join(plan.budgets)}; teacher: {plan.teacher_iterations} iterations from "
        "random weights; methods share trunks (wsd)."
    )
    yield ""
    if found is None:
        return
    yield from (f"> {sentence}" for sentence in found["sentences"])
    yield ""
    yield from (f"- `{statement}`: {outcome}" for statement, outcome in found["claims"].items())
    yield ""
    yield f"![accuracy against compute]({STUDY}/reports/curves.png)"
    yield ""


def _left(left: Sequence[str]) -> Iterator[str]:
    yield "## Not done, or not right"
    yield ""
    yield from (f"- {line}" for line in left)
    if not left:
        yield "Nothing: the reference is complete."
    yield ""


def problems(call: Call) -> list[str]:
    """Return what keeps the folder out of the reference, names of this machine included."""
    names = {socket.gethostname()}
    with suppress(KeyError, OSError):
        names.add(getpass.getuser())
    return check_folder(call.folder, names=names - COMMON, without=(WORK,))
