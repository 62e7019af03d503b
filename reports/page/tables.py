"""Tables whose columns sort, with the exact number behind every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, exact, join, tag


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, and the number that it is sorted by."""

    text: str
    value: float | None = None
    """None sorts by the text; a dash sorts last."""
    title: str | None = None
    """What hovering shows."""
    target: str | None = None
    """The id of the element on the page that the cell leads to."""
    also: tuple[float | None, ...] = ()
    """Further numbers in the text, such as the ends of an interval."""


@dataclass(frozen=True)
class Line:
    """A row of a table; the first cell is its header."""

    cells: Sequence[Cell]
    id: str | None = None


def table(
    caption: str, header: Sequence[str], lines: Sequence[Line], words: Sequence[str] = ()
) -> Markup:
    """Return a table in a region that scrolls sideways where it is too wide.

    Args:
        words: columns of text, which are left-aligned; the first one always is.
    """
    left = {0, *(number for number, name in enumerate(header) if name in words)}
    heads = [
        tag(
            "th",
            tag("button", name, type="button"),
            scope="col",
            aria_sort="none",
            class_="word" if number in left else None,
        )
        for number, name in enumerate(header)
    ]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *(_line(line, left) for line in lines)),
    )
    return tag("div", made, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _line(line: Line, left: set[int]) -> Markup:
    cells = [
        tag(
            "td" if number else "th",
            tag("a", cell.text, href=f"#{cell.target}") if cell.target else cell.text,
            class_="word" if number in left else None,
            scope=None if number else "row",
            title=cell.title,
            data_value=exact(cell.value),
            data_also=exact(*cell.also),
        )
        for number, cell in enumerate(line.cells)
    ]
    return tag("tr", *cells, id=line.id)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Return a list of names and what they are."""
    return tag("dl", join(*(tag("div", tag("dt", name), tag("dd", text)) for name, text in pairs)))
