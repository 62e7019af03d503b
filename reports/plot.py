"""All that ``kdprof plot`` writes: figures, tables, the verdict and the page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from kdprof.store import Store

from . import costs, page, table, verdict_text
from .figures.files import render
from .figures.sheet import FORMATS, PAGE
from .judge import judge
from .results import collect
from .verdict import Verdict


def write_all(
    store: Store,
    *,
    x: str = "seconds",
    versus: Sequence[str] = (),
    methods: Collection[str] = (),
    formats: Sequence[str] = FORMATS,
    width_mm: float = PAGE,
) -> tuple[list[Path], Verdict | None]:
    """Write every report that the records of a folder allow.

    Args:
        versus: see :func:`kdprof.reports.judge.judge`; the others are those of
            :func:`kdprof.reports.figures.files.render`.

    Returns:
        The files, and the verdict; None if no run was trained, then only costs are shown.

    Raises:
        UserError: an argument is not valid (then nothing is written), or there is nothing to show.
    """
    only_costs = not store.runs() and bool(store.costs())
    results = None if only_costs else collect(store)
    verdict = None if results is None else judge(results, versus, axis=x)
    # First, because it refuses arguments that are not valid before it writes.
    paths = render(store, verdict, x=x, formats=formats, width_mm=width_mm, methods=methods)
    if results is not None and verdict is not None:
        paths += [*table.render(store), *verdict_text.render(store, results, verdict)]
    return [*paths, *costs.render(store), page.render(store, verdict, x)], verdict
