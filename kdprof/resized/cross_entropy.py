"""Cross-entropy of bilinearly resized logits: which of its three forms runs, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import IGNORE
from kdprof.resized.bands import banded_cross_entropy
from kdprof.resized.choice import form_of
from kdprof.resized.tiles import tiled_cross_entropy, tiled_cross_entropy_backward

TWICE = (
    "the cross-entropy of resized logits can be differentiated only once: its gradient is computed "
    "in the forward. Call backward without create_graph, or use F.interpolate and F.cross_entropy"
)


def at_least_single(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def plain_resize(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return the resized logits, in float32 or float64."""
    logits = at_least_single(logits)
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def plain_cross_entropy(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """Return what :func:`resized_cross_entropy` does, from the resized logits' whole map."""
    resized = plain_resize(logits, (labels.shape[-2], labels.shape[-1]), align_corners)
    # Summed here: torch's own sum over pixels is not deterministic on a GPU.
    pixels = F.cross_entropy(resized, labels.long(), ignore_index=IGNORE, reduction="none")
    return pixels.sum()


class _CrossEntropy(torch.autograd.Function):
    """The autograd Function of the forms that never have the whole map.

    The gradient is linear in the one number that backward receives and has the size of the logits
    before their resize, so forward computes it and nothing else is saved.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, align_corners: bool, tiles: bool
    ) -> Tensor:
        ctx.dtype = logits.dtype
        if tiles:
            total, norm = tiled_cross_entropy(logits, labels, align_corners)
            gradient = tiled_cross_entropy_backward(logits, labels, norm, align_corners)
        else:
            total, gradient = banded_cross_entropy(at_least_single(logits), labels, align_corners)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        # ``once_differentiable`` would return a gradient that looks like a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        (gradient,) = ctx.saved_tensors
        return (slope * gradient).to(ctx.dtype), None, None, None


def resized_cross_entropy(logits: Tensor, labels: Tensor, align_corners: bool = False) -> Tensor:
    """Return the cross-entropy of bilinearly resized logits, summed over valid pixels.

    Args:
        logits: (N, C, h, w) of any floating type and memory layout. The loss is computed in
            float32, or in float64 if they are.
        labels: (N, H, W) integers, :data:`IGNORE` where void. H and W may be larger or smaller.
        align_corners: how the resize aligns.

    Logits must be finite: one that is not makes the loss NaN. It is 0 if every pixel is void. On a
    GPU, which cannot raise an error without waiting, a label
    that is neither a class nor void makes the loss NaN.

    Raises:
        ValueError: the shapes or the devices do not belong together.
        RuntimeError: on a CPU, a label is neither a class nor void; or from backward, it was asked
            for a gradient that can be differentiated again.
    """
    if logits.dim() != 4 or labels.dim() != 3 or len(logits) != len(labels):
        raise ValueError(
            f"logits must be (N, C, h, w) and labels (N, H, W) of as many images, not "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.device != labels.device:
        raise ValueError(
            f"logits are on {logits.device}, labels on {labels.device}: move the labels"
        )
    form = form_of(logits, (labels.shape[-2], labels.shape[-1]))
    if form == "plain":
        return plain_cross_entropy(logits, labels, align_corners)
    found: Tensor = _CrossEntropy.apply(logits, labels, align_corners, form == "tiles")
    return found
