"""What `kdprof data check` prints, and its contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from kdprof.store import write_atomic

from .results import count
from .text import MISSING, Grid

if TYPE_CHECKING:
    from kdprof.data.check import DataCheck, SplitCheck

SIZES_SHOWN = 3
PROBLEMS_SHOWN = 20
PLACES_SHOWN = 12
OPACITY = 0.55
"""Opacity of a label's colours over its image."""
COLUMNS = 4
WIDTH_INCHES = 12
VOID_COLOUR = (0, 0, 0)
LEGEND_CLASSES = 30
"""With more classes than this the sheet has no legend."""


def print_check(found: DataCheck, console: Console) -> None:
    """Print counts, sizes, classes and problems."""
    _counts(found).print(console)
    if found.usual is not None:
        crop, fit = ("x".join(map(str, size or ())) for size in (found.usual.crop, found.usual.fit))
        resized = f", of images resized to fit {fit}" if fit else ""
        console.print(f"usual crop in training: {crop}{resized}", highlight=False)
    if found.class_names:
        _classes(found).print(console)
    for split in found.splits:
        lines = split.problems[:PROBLEMS_SHOWN]
        if left := len(split.problems) - len(lines):
            lines.append(f"and {left} more in {split.split}")
        for line in lines:
            console.print(f"{split.split}: {line}", highlight=False, soft_wrap=True, markup=False)
        for note in split.notes:
            console.print(f"{split.split}: {note}", highlight=False, soft_wrap=True, markup=False)
    for line in found.content.problems:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for line in found.content.warnings:
        console.print(f"warning: {line}", highlight=False, soft_wrap=True, markup=False)
    if found.passed_over:
        console.print(_passed_over(found), highlight=False, soft_wrap=True, markup=False)
    console.print(_total(found), highlight=False)


def _total(found: DataCheck) -> str:
    parts = [count(len(found.problems), "problem") if found.problems else "no problems"]
    if found.content.warnings:
        parts.append(count(len(found.content.warnings), "warning"))
    return ", ".join(parts)


def _counts(found: DataCheck) -> Grid:
    rows = [
        [
            one.split,
            str(one.images),
            MISSING if one.published is None else str(one.published),
            _sizes(one),
            MISSING if one.images_per_second is None else f"{one.images_per_second:.1f}",
            str(len(one.problems)),
        ]
        for one in found.splits
    ]
    header = ["split", "images", "published", "sizes (HxW: images)", "decoded/s", "problems"]
    return Grid(found.name, header, rows, words=["sizes (HxW: images)"])


def _passed_over(found: DataCheck) -> str:
    """Return how many files are not used, and which kinds of them there are most."""
    places = found.passed_over.most_common(PLACES_SHOWN)
    named = "; ".join(f"{place} {count:,}" for place, count in places)
    left = len(found.passed_over) - len(places)
    more = f"; {left} other kinds" if left else ""
    splits = " and ".join(one.split for one in found.splits)
    return f"{found.passed_over.total():,} files passed over by {splits}: {named}{more}"


def _sizes(one: SplitCheck) -> str:
    common = one.sizes.most_common(SIZES_SHOWN)
    shown = ", ".join(f"{height}x{width}: {count}" for (height, width), count in common)
    left = len(one.sizes) - len(common)
    return shown + (f", {left} other sizes" if left else "") or MISSING


def _classes(found: DataCheck) -> Grid:
    read = [
        (one.split, one.pixels, one.present)
        for one in found.splits
        if one.pixels is not None and one.present is not None
    ]
    header = ["class"]
    for split, _, _ in read:
        header += [f"{split} pixels %", "images"]
    rows = []
    for index, name in enumerate([*found.class_names, "void"]):
        row = [name]
        for _, pixels, present in read:
            share = 100 * pixels[index] / max(1, pixels.sum())
            row += [f"{share:.2f}", str(present[index])]
        rows.append(row)
    return Grid("share of all pixels, and images that show the class", header, rows)


def _fractions(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = colour
    return red / 255, green / 255, blue / 255


def contact_sheet(found: DataCheck, path: Path) -> None:
    """Write a PNG of some images of every split, each next to a copy under its label's colours."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = [(split.split, *shown) for split in found.splits for shown in split.shown]
    rows = -(-len(pairs) // (COLUMNS // 2))
    first = pairs[0][2]
    cell = WIDTH_INCHES / COLUMNS
    legend = len(found.class_names) <= LEGEND_CLASSES
    height = rows * cell * first.shape[0] / first.shape[1] + 0.3 * rows + (1.2 if legend else 0.3)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(found.palette)] = found.palette
    colours[255] = VOID_COLOUR
    for number, (split, index, image, label) in enumerate(pairs):
        over = (1 - OPACITY) * image + OPACITY * colours[label]
        axes[2 * number].imshow(image)
        axes[2 * number + 1].imshow(over.astype(np.uint8))
        axes[2 * number].set_title(f"{split} {index}", fontsize=8, loc="left")
    if legend:
        named = [*zip(found.class_names, found.palette, strict=True), ("void", VOID_COLOUR)]
        handles = [Patch(color=_fractions(c), label=name) for name, c in named]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomic(path, file.getvalue())
