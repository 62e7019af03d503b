"""``index.html``: one self-contained page that shows a folder of results.

``markup.py`` escapes, ``charts.py`` draws SVG from numbers, ``tables.py`` makes tables that sort,
``looks.py`` has colours and markers, ``*_section*.py`` make the sections from ``content.py``,
``document.py`` puts them together; ``page.css`` and ``page.js`` become part of the page.
"""

from __future__ import annotations

from pathlib import Path

from kdprof.errors import UserError
from kdprof.store import Store, write_atomic

from .. import table
from ..results import collect
from ..verdict import Verdict
from .content import Content
from .document import document


def render(store: Store, verdict: Verdict | None, x: str = "seconds") -> Path:
    """Write ``reports/index.html`` and return it.

    Args:
        verdict: None if no run is finished; then the page shows the costs alone.
        x: name of the axis of compute that is shown first, if every run has it.

    Raises:
        UserError: the folder has neither a finished run nor a Cost.
    """
    results = None if verdict is None else collect(store)
    costs = sorted(results.costs if results else store.costs(), key=lambda cost: cost.method)
    if results is None and not costs:
        raise UserError(f"nothing to show in {store.root}: no finished run and no cost")
    rows = table.rows(store) if results else []
    path = store.reports / "index.html"
    write_atomic(path, document(Content(store, results, verdict, costs, rows, x)))
    return path
