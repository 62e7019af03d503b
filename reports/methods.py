"""What ``kdprof methods`` prints: the methods as text."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .text import narrow_table

if TYPE_CHECKING:
    from kdprof.discovery import MethodEntry
    from kdprof.method import Method, Recipe

FAMILIES = ("control", "logit", "feature", "attention", "relational", "incremental")
"""The order of the list; other families come last."""
TAPS = {
    "logits": "class scores at the head's resolution, before any resize",
    "aux": "class scores of the auxiliary head, on c4",
    "head": "head feature: input of the last 1x1 classifier",
    "classifier": "weight of the last 1x1 classifier",
    "c2": "backbone stage 1",
    "c3": "backbone stage 2",
    "c4": "backbone stage 3",
    "c5": "backbone stage 4, the last",
    "labels": "class of each pixel of the crop",
}
READABLE = 100
"""Longest line of running text, in columns."""
MOST_TERMS = 4
WIDE = 110
"""From this width on, the list also shows titles."""
MARKS = (
    "* Also trains a network or tokens of its own, with a second optimiser.",
    "= These terms replace the task loss.",
)
MORE = 'Details of one: "kdprof methods NAME". All methods on one page: docs/methods.md.'
ADDED = "Added to the task loss: cross-entropy, and 0.4 of it for the auxiliary head."


def bundle(cls: type[Method]) -> str:
    """Return the weighted terms that a method adds to the task loss: ``10 fitnet + 1 kd``."""
    terms = _terms(cls.weights) or "-"
    extra = _terms(cls.auxiliary_weights)
    return f"{terms}; second optimiser: {extra}" if extra else terms


def short_bundle(cls: type[Method], width: int) -> str:
    """Return the student's terms in lines of ``width`` columns, broken between terms.

    Only the first ones of many terms; with marks that :data:`MARKS` explains.
    """
    terms = ("= " * cls.replaces_task_loss + _terms(cls.weights)).split(" + ")
    if len(terms) > MOST_TERMS + 1:
        terms = [*terms[:MOST_TERMS], f"{len(terms) - MOST_TERMS} more"]
    terms[-1] += "*" * bool(cls.auxiliary_weights)
    lines = [terms[0] or "-"]
    for term in terms[1:]:
        longer = f"{lines[-1]} + {term}"
        if len(longer) + 2 <= width:
            lines[-1] = longer
        else:
            lines[-1] += " +"
            lines.append(term)
    return "\n".join(lines)


def short_paper(cls: type[Method]) -> str:
    """Return the venue and year, or the year alone if there is no venue."""
    venue = re.match(r"(.+? (?:19|20)\d\d)\b", cls.paper.split(",")[0])
    year = re.search(r"\b(19|20)\d\d\b", cls.paper.split(";")[0].replace(".", "_"))
    if venue and "arXiv" not in venue[1] and ";" not in venue[1]:
        return venue[1].replace("technical report", "report").replace(" workshops", "W")
    return f"arXiv {year[0]}" if year else cls.paper.split(";")[0]


def by_family(methods: Mapping[str, MethodEntry]) -> list[tuple[str, list[str]]]:
    """Return the families in order, each with its methods by name, variants after their method."""

    def family(name: str) -> str:
        root = methods.get(name.partition(":")[0], methods[name])
        return root.cls.family.split(" ")[0]

    def place(name: str) -> tuple[int, str, str]:
        found = family(name)
        return (FAMILIES.index(found) if found in FAMILIES else len(FAMILIES), found, name)

    return [(key, list(names)) for key, names in groupby(sorted(methods, key=place), key=family)]


def print_methods(methods: Mapping[str, MethodEntry], console: Console) -> None:
    """Print one or two lines per method, variants under their method."""
    longest = max(2 + len(name) for name in methods)
    widths = {"method": longest, "title": 33, "adds (weight term)": 0, "reads": 18, "paper": 12}
    if console.width < WIDE:
        del widths["title"]
    gaps = 2 * (len(widths) - 1)
    room = max(20, console.width - sum(widths.values()) - gaps)
    widths["adds (weight term)"] = room
    table = narrow_table()
    for column, width in widths.items():
        table.add_column(column, width=width, overflow="fold")
    for family, names in by_family(methods):
        table.add_row(Text(family.upper(), "bold"))
        for name in names:
            cells = _line(name, methods, room)
            table.add_row(*(cells[column] for column in widths))
        table.add_section()
    console.print(table, "", sep="\n")
    for note in (ADDED, *MARKS, MORE):
        console.print(note, highlight=False, markup=False)


def _line(name: str, methods: Mapping[str, MethodEntry], room: int) -> dict[str, Text]:
    cls = methods[name].cls
    root, colon, _ = name.partition(":")
    variant = bool(colon) and root in methods
    return {
        "method": Text(f"  {name}" if variant else name, "" if variant else "bold"),
        "title": Text(cls.title),
        "adds (weight term)": Text(short_bundle(cls, room)),
        "reads": Text(" ".join(cls.taps) or "-"),
        "paper": Text(short_paper(cls), "dim"),
    }


def print_method(found: MethodEntry, console: Console) -> None:
    """Print everything that is known about one method."""
    cls = found.cls
    gap = "  " if len(cls.name) + 2 + len(cls.title) <= console.width else "\n"
    console.print(Text.assemble((cls.name, "bold"), gap, cls.title), soft_wrap=True)
    origin = "" if found.origin == "built-in" else f", from {found.origin}"
    paper = [cls.paper] if cls.paper not in ("", "-") else []
    _print(console, "; ".join([*paper, cls.family]) + origin)
    for heading, lines in _sections(cls):
        console.print()
        console.print(Text(heading, "bold"))
        for line in lines:
            _print(console, line, "  ")


def _print(console: Console, line: str, indent: str = "") -> None:
    """Print a line, folded at the terminal's width, its later lines below its text."""
    own = line[: len(line) - len(line.lstrip(" "))]
    label = found[0] if (found := re.match(r"\S+ {2,}|- ", line.strip())) else ""
    hanging = indent + own + (" " * len(label) or "  " * bool(own))
    folded = textwrap.wrap(
        line.strip(),
        min(console.width, READABLE),
        initial_indent=indent + own,
        subsequent_indent=hanging,
        break_on_hyphens=False,
    )
    for one in folded or [""]:
        console.print(one, highlight=False, markup=False, soft_wrap=True)


def _sections(cls: type[Method]) -> Iterator[tuple[str, list[str]]]:
    if cls.equation:
        yield "Equation", [cls.equation]
    yield f"Terms {place_of_terms(cls)}", list(_term_lines(cls))
    yield "Reads", [f"{tap:<10}  {what}" for tap, what in tap_meanings(cls)] or ["nothing"]
    if cls.cost_drivers:
        yield "What a step costs", [cls.cost_drivers]
    yield "In words", _with_gaps(paragraphs(cls))
    if cls.hyper:
        name = f"--set method_settings.{cls.name}.KEY=VALUE"
        yield f"Settings ({name})", setting_lines(cls)
    heading = "Published recipes (iterations x batch x crop; mIoU in percent)"
    yield heading, _recipe_lines(cls) or ["none known for segmentation"]


def place_of_terms(cls: type[Method]) -> str:
    """Return how the terms relate to the task loss."""
    return "in place of the task loss" if cls.replaces_task_loss else "added to the task loss"


def _term_lines(cls: type[Method]) -> Iterator[str]:
    if not cls.weights:
        yield "none"
    for term, weight in cls.weights.items():
        yield f"{_number(weight):>8}  {term}"
    for term, weight in cls.auxiliary_weights.items():
        yield f"{_number(weight):>8}  {term} (trained by a second optimiser)"


def tap_meanings(cls: type[Method]) -> list[tuple[str, str]]:
    """Return each tap with its meaning and the networks that it is read from."""
    teacher, student = cls.read_of_teacher(), cls.student_taps()
    found = []
    for tap in TAPS:
        if tap == "labels" and tap in cls.taps:
            found.append((tap, TAPS[tap]))
        elif tap in student or tap in teacher:
            whose = [
                who for who, taps in (("student", student), ("teacher", teacher)) if tap in taps
            ]
            found.append((tap, f"{TAPS[tap]}; {' and '.join(whose)}"))
    return found


def setting_lines(cls: type[Method]) -> list[str]:
    """Return ``temperature = 1.0 (float)`` for each setting, the value as in a study file."""
    return [f"{name} = {_value(h.default)} ({h.type.__name__})" for name, h in cls.hyper.items()]


def paragraphs(cls: type[Method]) -> list[str]:
    """Return the docstring's paragraphs and list items, each as one line without markup."""
    found: list[str] = []
    for block in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        for piece in re.split(r"\n(?=- )", block):
            found.append(" ".join(piece.split()))
    return [re.sub(r":\w+:`([^`]*)`|``([^`]*)``", r"\1\2", text) for text in found if text]


def _with_gaps(texts: Sequence[str]) -> list[str]:
    """Return the paragraphs with an empty line between them, but none within a list."""
    lines: list[str] = []
    for text in texts:
        if lines and not (text.startswith("- ") and lines[-1].startswith("- ")):
            lines.append("")
        lines.append(text)
    return lines


def schedule_text(recipe: Recipe) -> str:
    """Return ``80,000 x 8 x 512x1024``, with a question mark for each part not published."""
    length = "?" if recipe.iterations is None else f"{recipe.iterations:,}"
    if recipe.iterations is None and recipe.epochs is not None:
        length = f"{recipe.epochs} epochs"
    crop = "?" if recipe.crop is None else "x".join(map(str, recipe.crop))
    if (length, recipe.batch, crop) == ("?", None, "?"):
        return "schedule not published"
    return f"{length} x {recipe.batch or '?'} x {crop}"


def pair_text(recipe: Recipe, cls: type[Method]) -> str:
    """Return ``PSPNet-R101 (79.74) -> PSPNet-R18``, or only the student if no teacher is run."""
    if not cls.needs_teacher():
        return recipe.student
    miou = "" if recipe.teacher_miou is None else f" ({recipe.teacher_miou:.2f})"
    return f"{recipe.teacher or '?'}{miou} -> {recipe.student}"


def miou_text(recipe: Recipe) -> str:
    """Return ``74.23 -> 77.57``, student alone and distilled, with a question mark if unknown."""
    if recipe.miou is None and recipe.student_miou is None:
        return "not published"
    distilled = "?" if recipe.miou is None else f"{recipe.miou:.2f}"
    alone = "" if recipe.student_miou is None else f"{recipe.student_miou:.2f} -> "
    return f"{alone}{distilled}" + (f" ({recipe.split})" if recipe.split != "val" else "")


def source_text(recipe: Recipe) -> str:
    """Return the source, preceded by the weights that differ from the method's."""
    return f"weights {_terms(recipe.weights)}; {recipe.source}" if recipe.weights else recipe.source


def training_text(recipe: Recipe) -> str:
    """Return the optimiser, its schedule, the GPUs and the images on each."""
    gpus = _gpus_text(recipe)
    if recipe.optimizer == recipe.schedule == "not stated":
        return f"optimiser not stated{gpus}"
    schedule = "schedule not stated" if recipe.schedule == "not stated" else recipe.schedule
    return f"{recipe.optimizer}; {schedule}{gpus}"


def _gpus_text(recipe: Recipe) -> str:
    """Return ``; 8 RTX 3090, 2 images each``; nothing if it was not published."""
    if recipe.gpus is None:
        return ""
    images = recipe.images_per_gpu
    share = "" if images is None else f", {images} image{'s' * (images > 1)}"
    each = " each" if share and recipe.gpus > 1 else ""
    return f"; {recipe.gpus} {recipe.gpu or 'GPU' + 's' * (recipe.gpus > 1)}{share}{each}"


def _recipe_lines(cls: type[Method]) -> list[str]:
    """Return a heading for each schedule, and under it the recipes that use it."""
    lines: list[str] = []
    schedules: dict[tuple[str, str], list[Recipe]] = {}
    for recipe in cls.recipes:
        schedules.setdefault((schedule_text(recipe), training_text(recipe)), []).append(recipe)
    for (schedule, training), recipes in schedules.items():
        if lines:
            lines.append("")
        lines.append(f"{schedule}; {training}")
        for recipe in recipes:
            lines.append(f"  {recipe.dataset}  {pair_text(recipe, cls)}: {miou_text(recipe)}")
            lines.append(f"      {source_text(recipe)}")
    return lines


def _terms(weights: Mapping[str, float]) -> str:
    return " + ".join(f"{_number(weight)} {name}" for name, weight in weights.items())


def _number(weight: float) -> str:
    """Return a weight, without an exponent if it is a whole number."""
    return str(int(weight)) if weight == int(weight) else f"{weight:g}".replace("e-0", "e-")


def _value(default: object) -> str:
    """Return a default as the TOML of a study writes it."""
    return str(default).lower() if isinstance(default, bool) else json.dumps(default)
