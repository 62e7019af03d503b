"""HTML and SVG from text: everything that is not :class:`Markup` already is escaped.

Characters that control a terminal, or change the direction of text, are spelled out.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files

from kdprof.visible import printable

VOID = frozenset({"br", "col", "hr", "input", "meta"})
"""HTML elements that have no end tag."""

Attribute = str | float | bool | None


class Markup(str):
    """Text that is HTML, made by this module from escaped parts or from files of the page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        children: text, which is escaped, or markup, which is not.
        attributes: underscores become dashes, a last one is dropped (``class_``). None and False
            leave the attribute out, True writes its name alone.
    """
    start = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{start}>")
    return Markup(f"<{name}{start}>{join(*children)}</{name}>")


def join(*parts: str) -> Markup:
    """Return the parts one after the other; those that are not markup are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in parts))


def package_file(name: str) -> Markup:
    """Return the text of a file of this package, a stylesheet or script of our own."""
    return Markup(files(__package__).joinpath(name).read_text("utf-8"))


def exact(*values: float | None) -> str | None:
    """Return numbers for an attribute, without visible rounding; None if there are none.

    Shown numbers carry them, so that a script can sort by them and a test can find them in records.
    """
    known = [f"{value:.12g}" for value in values if value is not None]
    return " ".join(known) or None


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f' {name}="{_escaped(text)}"'


def _escaped(text: str) -> str:
    return escape("\n".join(map(printable, text.split("\n"))))
