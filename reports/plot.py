"""All that ``kdprof plot`` writes: figures, tables, the verdict and the page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdprof.store import Store, different_devices, newest_by_method

from . import costs, page, table, verdict_text
from .figures.files import NAMES, render
from .figures.sheet import FORMATS, PAGE
from .judge import judge
from .results import collect
from .verdict import Verdict


@dataclass(frozen=True)
class Written:
    """What was written, and what the reader of the files must know."""

    files: list[Path]
    others: list[Path]
    """Files beside them with names that ``plot`` uses, which this call did not write: the records
    do not allow them any more, or they were not asked for. They may show an earlier state."""
    verdict: Verdict | None
    """None if no run was trained; then only costs are shown."""
    notes: list[str]
    """What was left out, and why."""


def write_all(
    store: Store,
    *,
    x: str = "seconds",
    versus: Sequence[str] = (),
    methods: Collection[str] = (),
    formats: Sequence[str] = FORMATS,
    width_mm: float = PAGE,
) -> Written:
    """Write every report that the records of a folder allow.

    Args:
        versus: see :func:`kdprof.reports.judge.judge`; the others are those of
            :func:`kdprof.reports.figures.files.render`.

    Raises:
        UserError: an argument is not valid (then nothing is written), or there is nothing to show.
    """
    only_costs = not store.runs() and bool(store.costs())
    results = None if only_costs else collect(store)
    verdict = None if results is None else judge(results, versus, axis=x)
    why = different_devices(newest_by_method(store.costs()).values())
    # First, because it refuses arguments that are not valid before it writes.
    paths = render(store, verdict, x=x, formats=formats, width_mm=width_mm, methods=methods)
    if results is not None and verdict is not None:
        paths += [*table.render(store), *verdict_text.render(store, results, verdict)]
    if not why:
        paths += costs.render(store)
    paths.append(page.render(store, verdict, x))
    notes = [f"no figures and tables of costs: {why}; measure all methods on one"] if why else []
    return Written(paths, _others(store, paths), verdict, notes)


_TEXTS = ("table.md", "table.csv", "table.tex", "verdict.md", "verdict.json", "costs.md",
          "costs.csv", "costs.tex")  # fmt: skip


def _others(store: Store, written: Collection[Path]) -> list[Path]:
    """Return the files with names of :func:`write_all` that it did not write this time."""
    names = [*(f"{name}.{suffix}" for name in NAMES for suffix in FORMATS), *_TEXTS]
    paths = [store.reports / name for name in names]
    return [path for path in paths if path not in written and path.is_file()]
