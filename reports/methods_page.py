"""The methods as one Markdown page, ``docs/methods.md``, generated from the classes alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .methods import (
    bundle,
    by_family,
    miou_text,
    pair_text,
    schedule_text,
    setting_lines,
    short_paper,
    source_text,
    tap_meanings,
    training_text,
)

if TYPE_CHECKING:
    from kdprof.discovery import MethodEntry
    from kdprof.method import Method

REGENERATE = "kdprof methods --markdown > docs/methods.md"
INTRODUCTION = f"""\
# The methods

Generated from the classes by `{REGENERATE}`; edit
`methods/*.py`, not this page.

## How to read a card

- **Adds**: what the method adds to the task loss (cross-entropy of the resized logits plus 0.4
  times that of the auxiliary head), as weight and term. A weight means nothing without the
  reduction of its term, which the equation gives.
- **Symbols**: S student, T teacher or a temperature; N images on one device, C channels or classes,
  h x w the network's output grid, H x W the crop; z logits, f features, y labels, p a position or
  a probability; A a learnt 1x1 convolution from the student's channels to the teacher's.
- **Cost**: what makes a step expensive, in words; `kdprof measure` gives the numbers, and
  [objectives.md](objectives.md) compares kdprof's objectives with published code.
- **Published recipes**: iterations x batch (of all devices) x crop. mIoU in percent, "student
  alone -> distilled", on the validation images unless marked "test"; the teacher's in brackets.
  A question mark or "not published" marks a value that was looked for and not found; "recalled"
  marks a value from memory of a paper, not verified. No value is a guess.
- **Every published gain starts from another student alone**: 69.10, 69.85, 72.55, 74.23 and 74.87
  are all "PSPNet-R18 on Cityscapes". Crop, augmentation, teacher and whether the last or the best
  checkpoint is reported differ between recipes.
- **Images each**: how many images a GPU had. An objective that couples the images of a device has
  the setting `images_per_group`: with that number in it, one GPU with the whole batch computes what
  the published GPUs did together.
- **kdprof's rule** marks a choice of kdprof that no paper states.
"""


def markdown(methods: Mapping[str, MethodEntry]) -> str:
    """Return the page of the built-in methods among ``methods``."""
    builtin = {name: found for name, found in methods.items() if found.origin == "built-in"}
    families = by_family(builtin)
    parts = [INTRODUCTION, _index(builtin, families)]
    for family, names in families:
        parts.append(f"## {family.capitalize()}\n")
        parts += [_card(builtin[name].cls) for name in names]
    return "\n".join(parts)


def _index(methods: Mapping[str, MethodEntry], families: Sequence[tuple[str, list[str]]]) -> str:
    rows = [
        [f"[`{name}`](#{_anchor(name)})", _text(cls.title), _text(short_paper(cls))]
        for _, names in families
        for name in names
        for cls in [methods[name].cls]
    ]
    return _table(["method", "title", "published"], rows)


def _card(cls: type[Method]) -> str:
    lines = [f'### <a id="{_anchor(cls.name)}"></a>`{cls.name}`: {_text(cls.title)}', ""]
    paper = [_text(cls.paper)] if cls.paper != "-" else []
    lines.append(f"{'; '.join([*paper, cls.family])}.")
    if cls.equation:
        lines += ["", "```text", *_equation(cls.equation), "```"]
    lines += ["", *(f"- **{label}**: {text}" for label, text in _facts(cls)), ""]
    for paragraph in _paragraphs(cls):
        lines += [paragraph, ""]
    lines.append(_recipes(cls))
    return "\n".join(lines)


def _equation(equation: str) -> list[str]:
    """Split an equation into its definitions, one per line."""
    return re.split(r"; (?=[A-Za-z]\S* ?(?:\(f\))? =|[a-z]+ = )", equation)


def _facts(cls: type[Method]) -> Iterator[tuple[str, str]]:
    terms = bundle(cls)
    adds = "nothing" if terms == "-" else f"`{terms}`"
    yield ("Replaces the task loss by" if cls.replaces_task_loss else "Adds"), adds
    taps = [f"`{tap}` ({what})" for tap, what in tap_meanings(cls)]
    yield "Reads", "; ".join(taps) or "nothing"
    settings = [f"`{line}`" for line in setting_lines(cls)]
    yield "Settings", ", ".join(settings) or "none"
    yield "Cost", _text(cls.cost_drivers or "not described")


def _paragraphs(cls: type[Method]) -> Iterator[str]:
    """Yield the docstring's blocks as Markdown; a list stays one block."""
    for block in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        items = [" ".join(piece.split()) for piece in re.split(r"\n(?=- )", block)]
        yield "\n".join(_prose(item) for item in items)


def _prose(text: str) -> str:
    """Convert a docstring's markup to Markdown, and escape what Markdown would interpret."""
    text = re.sub(r":\w+:`([^`]*)`|``([^`]*)``", r"`\1\2`", text)
    pieces = text.split("`")
    return "`".join(piece if place % 2 else _text(piece) for place, piece in enumerate(pieces))


def _text(text: str) -> str:
    """Escape plain text: stars, tags, and underscores that would begin an emphasis."""
    text = text.replace("*", r"\*").replace("<", r"\<")
    return re.sub(r"(?<![A-Za-z0-9])_", r"\\_", text)


def _recipes(cls: type[Method]) -> str:
    if not cls.recipes:
        return "No published recipe for segmentation is known.\n"
    header = ["data", "networks", "iterations x batch x crop", "training", "mIoU", "source"]
    rows = [
        [
            recipe.dataset,
            pair_text(recipe, cls),
            schedule_text(recipe),
            training_text(recipe),
            miou_text(recipe),
            source_text(recipe),
        ]
        for recipe in cls.recipes
    ]
    return _table(header, [[_text(cell) for cell in row] for row in rows])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in cells) + "\n"


def _anchor(name: str) -> str:
    return name.replace(":", "-").replace("_", "-")
