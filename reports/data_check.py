"""What `kdprof data check` prints, and its contact sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from kdprof.store import write_atomic

from .text import MISSING, Grid

if TYPE_CHECKING:
    from kdprof.data.check import DataCheck, SplitCheck

SIZES_SHOWN = 3
PROBLEMS_SHOWN = 20
OPACITY = 0.55
"""Of a label's colours over its image."""
COLUMNS = 4
WIDTH_INCHES = 12
VOID_COLOUR = (0, 0, 0)
LEGEND_CLASSES = 30
"""More classes than these have no legend."""


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
    said = f"{len(found.problems)} problems" if found.problems else "no problems"
    console.print(said, highlight=False)


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


def _sizes(one: SplitCheck) -> str:
    common = one.sizes.most_common(SIZES_SHOWN)
    told = ", ".join(f"{height}x{width}: {count}" for (height, width), count in common)
    left = len(one.sizes) - len(common)
    return told + (f", {left} other sizes" if left else "") or MISSING


def _classes(found: DataCheck) -> Grid:
    read = [split for split in found.splits if split.pixels is not None]
    header = ["class"]
    for split in read:
        header += [f"{split.split} pixels %", "images"]
    rows = []
    for index, name in enumerate([*found.class_names, "void"]):
        row = [name]
        for split in read:
            share = 100 * split.pixels[index] / max(1, split.pixels.sum())
            row += [f"{share:.2f}", str(split.present[index])]
        rows.append(row)
    return Grid("share of all pixels, and images that show the class", header, rows)


def contact_sheet(found: DataCheck, path: Path) -> None:
    """Write a PNG of some images of every split, each beside itself under its label's colours."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = [(split.split, *shown) for split in found.splits for shown in split.shown]
    rows = -(-len(pairs) // (COLUMNS // 2))
    image = pairs[0][2]
    cell = WIDTH_INCHES / COLUMNS
    legend = len(found.class_names) <= LEGEND_CLASSES
    height = rows * cell * image.shape[0] / image.shape[1] + 0.3 * rows + (1.2 if legend else 0.3)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(found.palette)] = found.palette
    colours[255] = VOID_COLOUR
    for number, (split, index, picture, label) in enumerate(pairs):
        over = (1 - OPACITY) * picture + OPACITY * colours[label]
        axes[2 * number].imshow(picture)
        axes[2 * number + 1].imshow(over.astype(np.uint8))
        axes[2 * number].set_title(f"{split} {index}", fontsize=8, loc="left")
    if legend:
        named = [*zip(found.class_names, found.palette, strict=True), ("void", VOID_COLOUR)]
        handles = [Patch(color=np.array(c) / 255, label=name) for name, c in named]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomic(path, file.getvalue())
