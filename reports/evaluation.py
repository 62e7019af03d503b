"""What `kdprof evaluate` prints: the IoU of every class, the means, and the published score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from .text import MISSING, Grid

if TYPE_CHECKING:
    from kdprof.evaluate import Evaluation


def print_evaluation(found: Evaluation, console: Console) -> None:
    """Print an evaluation of one file."""
    scores = found.scores
    pairs = zip(found.class_names, scores.per_class, strict=True)
    grid = Grid(
        f"{found.network} on {found.data} {found.split} ({found.images} images)",
        ["class", "IoU %"],
        [[name, MISSING if iou is None else f"{100 * iou:.2f}"] for name, iou in pairs],
    )
    grid.print(console)
    console.print(
        f"mIoU {100 * scores.miou:.2f} %{_over(found)}, mAcc {100 * scores.macc:.2f} %, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %; "
        f"{found.images_per_second:.2f} images/s",
        highlight=False,
    )
    console.print(found.loaded, highlight=False, soft_wrap=True)
    rows = [["not in the file", key] for key in found.missing]
    rows += [["left out", key] for key in found.left]
    if rows:
        Grid("entries that were not loaded", ["what", "entry"], rows, ["entry"]).print(console)
    if (published := found.reported) is not None:
        flipped = published.flipped
        several = "" if flipped is None else f", {flipped:.2f} % at several scales + flip"
        console.print(
            f"published: {published.file}, mIoU {published.miou:.2f} %{several} "
            f"({published.source})",
            highlight=False,
            soft_wrap=True,
        )


def _over(found: Evaluation) -> str:
    """Return which classes the mIoU is the mean over, if not over all or not as usual."""
    ious = found.scores.per_class
    scored = sum(iou is not None for iou in ious)
    over = f" over {scored} of {len(ious)} classes" if scored < len(ious) else ""
    zero = ", absent classes that are predicted as 0" if found.absent_classes == "zero" else ""
    return over + zero


def to_json(found: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain values."""
    return {
        **vars(found),
        "scores": vars(found.scores),
        "reported": None if found.reported is None else vars(found.reported),
    }
