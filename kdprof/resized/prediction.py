"""The predicted class of each pixel."""

from __future__ import annotations

from torch import Tensor

from kdprof.resized.bands import banded_argmax
from kdprof.resized.choice import form_of
from kdprof.resized.cross_entropy import at_least_single, plain_resize
from kdprof.resized.tiles import tiled_argmax


def plain_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return what :func:`resized_argmax` does, from the resized logits' whole map."""
    return plain_resize(logits, size, align_corners).argmax(1)


def resized_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Return the class of the largest logit after a bilinear resize, (N, H, W) int64.

    Args:
        logits: (N, C, h, w).
        size: height and width of the prediction.
    """
    form = form_of(logits, size)
    if form == "bands":
        return banded_argmax(at_least_single(logits), size, align_corners)
    return (tiled_argmax if form == "tiles" else plain_argmax)(logits, size, align_corners)
