"""Give kdprof hostile inputs, and count how it takes them.

    python benchmarks/fuzz.py --cases 12000 --seed 0
    python benchmarks/fuzz.py --seed 0 --only records --case 17

Every case is made from the seed, its class and its number alone, so that the second line replays
one. Commands run in this process, as their users give them, with limits of time and memory. What
each class holds stands in the first line of its function; what is counted in ``fuzz_case.py``. The
exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import fuzz_data
import fuzz_folders
import fuzz_settings
import fuzz_weights
from fuzz_case import ACCEPTED, FINDINGS, REFUSED, Case, Outcome, Work, judged

LIMIT_S = 60.0
"""Seconds after which a case hangs: the slowest takes two."""
SHOWN = 20
"""Findings of a class that are printed."""


class Class(NamedTuple):
    """A class of inputs.

    Attributes:
        share: of all cases, in parts: cheap cases have more.
    """

    work: Work
    share: int


CLASSES = {
    "injection": Class(fuzz_folders.injection, 12),
    "reading": Class(fuzz_folders.reading, 10),
    "records": Class(fuzz_folders.records, 20),
    "settings": Class(fuzz_settings.settings, 16),
    "figures": Class(fuzz_folders.figures, 1),
    "grammar": Class(fuzz_settings.grammar, 30),
    "text": Class(fuzz_settings.text, 8),
    "weights": Class(fuzz_weights.weights, 8),
    "writing": Class(fuzz_folders.writing, 4),
    "places": Class(fuzz_folders.places, 6),
    "store": Class(fuzz_folders.store, 10),
    "data": Class(fuzz_data.data, 10),
}


class Found(NamedTuple):
    """A case that was judged."""

    name: str
    number: int
    outcome: Outcome
    story: str


def fuzz(name: str, numbers: Iterator[int] | range, seed: int, root: Path) -> Iterator[Found]:
    """Judge the cases of a class, each in an empty folder below ``root``."""
    for number in numbers:
        folder, canary = root / "case", root / "canary"
        folder.mkdir()
        case = Case(Random(f"{seed}/{name}/{number}"), folder, canary)
        outcome = judged(CLASSES[name].work, case, LIMIT_S)
        yield Found(name, number, outcome, case.story())
        shutil.rmtree(folder)
        if canary.exists():
            canary.rmdir()


def counts(cases: int) -> dict[str, int]:
    """Divide a number of cases among the classes; each has at least one."""
    every = sum(kind.share for kind in CLASSES.values())
    return {name: max(1, round(cases * kind.share / every)) for name, kind in CLASSES.items()}


def tables(found: dict[str, Counter[str]]) -> str:
    """Return the counts as a table in Markdown."""
    columns = (REFUSED, ACCEPTED, *FINDINGS)
    lines = [
        f"| class | cases | {' | '.join(columns)} |",
        "| :-- |" + " --: |" * (1 + len(columns)),
    ]
    total: Counter[str] = sum(found.values(), Counter())
    for name, count in {**found, "all": total}.items():
        cells = (count.total(), *(count[column] for column in columns))
        lines.append(f"| {name} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def report(found: Found, seed: int) -> str:
    """Return a finding, and how to replay it."""
    return (
        f"{found.outcome.kind}: --seed {seed} --only {found.name} --case {found.number}\n"
        f"{found.story}\n{found.outcome.why}\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, print the findings and the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all classes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CLASSES, action="append", help="repeatable")
    parser.add_argument("--case", type=int, help="replay this case of the class")
    given = parser.parse_args(arguments)
    if given.case is not None and len(given.only or ()) != 1:
        parser.error("--case is a number within a class; give one --only")
    found: dict[str, Counter[str]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kdprof-fuzz-", dir=_scratch()) as root:
        for name in given.only or CLASSES:
            number = counts(given.cases)[name] if not given.only else given.cases
            numbers = range(number) if given.case is None else range(given.case, given.case + 1)
            found[name] = Counter()
            for one in fuzz(name, numbers, given.seed, Path(root)):
                found[name][one.outcome.kind] += 1
                bad = one.outcome.kind in FINDINGS
                if given.case is not None or (bad and _findings(found[name]) <= SHOWN):
                    print(report(one, given.seed), file=sys.stderr, flush=True)
    print(tables(found))
    print(f"\nseed {given.seed}, {time.monotonic() - began:.0f} s")
    return int(any(map(_findings, found.values())))


def _scratch() -> str | None:
    """Return a folder in memory, where there is one: folders are made and removed faster there."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.access(memory, os.W_OK) else None


def _findings(count: Counter[str]) -> int:
    return sum(count[kind] for kind in FINDINGS)


if __name__ == "__main__":
    sys.exit(main())
