"""The whole page."""

from __future__ import annotations

import tomllib
from collections.abc import Callable

from .. import table
from ..results import device_text, study_text
from . import charts
from .content import Content, Section
from .curve_section import curve_section
from .looks import stylesheet
from .markup import Markup, package_file, tag
from .record_sections import measure_section, note_section, record_section, study_section
from .table_sections import cost_section, table_section
from .verdict_sections import flip_section, gain_section

SENTENCES = 3
"""At most so many sentences of the verdict stand at the top."""


def document(content: Content) -> str:
    """Return the whole page."""
    sections = [section for make in SECTIONS if (section := make(content)) is not None]
    title = f"kdprof: {_study_line(content)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", package_file("page.css"), stylesheet(content.looks, content.phases)),
    )
    links = [tag("li", tag("a", part.short, href=f"#{part.id}")) for part in sections]
    body = tag(
        "body",
        charts.HATCH,
        _top(content),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *(part.markup() for part in sections)),
        tag("div", id="tip", role="status", hidden=True),
        tag("script", package_file("page.js")),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _study_line(content: Content) -> str:
    return study_text(tomllib.loads(content.store.study.read_text()))


def _top(content: Content) -> Markup:
    sentences = content.verdict.sentences[:SENTENCES] if content.verdict else []
    if not sentences:
        sentences = ["No run is finished, so there is no verdict: this page shows measured costs."]
    shown = tag("div", *(tag("p", sentence) for sentence in sentences), class_="verdict")
    lines = table.header(content.results) if content.results else _cost_header(content)
    return tag("header", tag("h1", "What does distillation buy?"), shown,
               tag("p", " ".join(lines), class_="soft"))  # fmt: skip


def _cost_header(content: Content) -> list[str]:
    return [f"Device: {device_text(sorted({cost.device for cost in content.costs}))}."]


SECTIONS: tuple[Callable[[Content], Section | None], ...] = (
    gain_section, curve_section, flip_section, cost_section, table_section, note_section,
    measure_section, study_section, record_section,
)  # fmt: skip
"""The page from top to bottom; a section is left out where there is nothing to show."""
