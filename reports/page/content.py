"""What the page is made from, and the pieces that its sections share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kdprof.records import Cost
from kdprof.store import Store, newest_by_method

from .. import table
from ..axes import Axis, available
from ..results import Results
from ..text import MISSING, figures
from ..verdict import Verdict
from ..verdict_text import probability_text
from .looks import Look, looks, phase_classes
from .markup import Markup, tag
from .tables import Cell


@dataclass(frozen=True)
class Content:
    """What the page is made from."""

    store: Store
    results: Results | None
    """None if no run is finished."""
    verdict: Verdict | None
    costs: list[Cost]
    """Every stored Cost, ordered by method."""
    rows: list[table.Row]
    x: str
    """Name of the axis that is shown first, if every run has it."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every record, by path in the folder."""
        return self.store.hashes()

    @cached_property
    def newest(self) -> list[Cost]:
        """The newest Cost of each method, the smallest ratio first, those without one last."""
        found = newest_by_method(self.costs)
        return sorted(found.values(), key=lambda c: c.ratio.median if c.ratio else math.inf)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """The look of each method, measured or trained."""
        runs = [*self.results.finished, *self.results.left_out] if self.results else []
        return looks(runs, self.costs)

    @cached_property
    def phases(self) -> dict[str, str]:
        """The phases that take time in any method, and the class of each."""
        taken = {p for cost in self.newest for p, s in (cost.phases_s or {}).items() if s > 0}
        return phase_classes(sorted(taken))

    @cached_property
    def axes(self) -> list[Axis]:
        """The axes of compute that every run has, the chosen one first."""
        found = available(self.results) if self.results else []
        return sorted(found, key=lambda axis: axis.name != self.x)


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading."""

    id: str
    short: str
    """In the list of sections."""
    title: str
    content: Sequence[str]

    def markup(self) -> Markup:
        """Return the section."""
        return tag("section", tag("h2", self.title), *self.content, id=self.id)


def switched(name: str, found: dict[str, tuple[str, Markup]]) -> list[Markup]:
    """Return panels of which one is shown, and radio buttons that choose it.

    Args:
        found: name of the axis -> its words and its panel.
    """
    first = next(iter(found))
    buttons = [
        tag(
            "label", tag("input", type="radio", name=name, value=axis, checked=axis == first), words
        )
        for axis, (words, _) in found.items()
    ]
    panels = [
        tag("div", panel, data_panel=axis, hidden=axis != first)
        for axis, (_, panel) in found.items()
    ]
    if len(found) == 1:
        return panels
    legend = tag("legend", "Compare at")
    return [tag("fieldset", legend, *buttons, class_="switch"), *panels]


def folded(summary: str, is_open: bool, *content: str, long: bool = False) -> Markup:
    """Return a folded part; ``long`` ones stay folded on paper."""
    class_ = "long" if long else None
    return tag("details", tag("summary", summary), *content, open=is_open, class_=class_)


def signed(value: float) -> Cell:
    """Return the cell of a difference in percentage points."""
    return Cell(f"{value:+.2f}", value)


def chance(value: float | None) -> Cell:
    """Return the cell of a probability, never written as certainty."""
    return Cell(MISSING if value is None else probability_text(value), value)


def amount(axis: Axis, value: float) -> str:
    """Return an amount in the axis' readable unit, without an exponent: ``3,140 iterations``."""
    return f"{figures(value / axis.unit)} {axis.unit_name}".strip()


def cost_id(cost: Cost) -> str:
    """Return the id of the row that says how a Cost was measured."""
    return _id("cost", cost.method, cost.key)


def runs_id(method: str, budget: str) -> str:
    """Return the id of the first row of the records of a method under a budget."""
    return _id("runs", method, budget)


def _id(kind: str, *names: str) -> str:
    # Names have characters that links would have to escape.
    return f"{kind}-{hashlib.sha256(repr(names).encode()).hexdigest()[:12]}"
