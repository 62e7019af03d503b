"""Attention maps: the energy of a feature at every position of an image.

Attention transfer (``at``) and double similarity distillation (``dsd``) compare them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.hardware.blocks import device_type

BLOCK_ELEMENTS = 2**20
"""Squared features that are in memory at a time on a CPU: 4 MiB, which fits into its caches."""


class _SquareSum(torch.autograd.Function):
    """The sum_c f^2 of (N, C, h, w), (N, 1, h, w) float32, computed without a map of all squares.

    On a CPU the channels are processed in blocks, because its norm over channels takes several
    times as long.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        if device_type(features) != "cpu":
            made = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)
            return made.square_()
        total = torch.zeros_like(features[:, :1], dtype=torch.float32)
        for block in _channel_blocks(features):
            total += block.float().square().sum(1, keepdim=True)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """Return 2 f times the slope, in the data type of f."""
        (features,) = ctx.saved_tensors
        return (2 * slope * features).to(features.dtype)


def _channel_blocks(features: Tensor) -> Iterator[Tensor]:
    channels = max(1, BLOCK_ELEMENTS // max(1, features[:, :1].numel()))
    yield from features.split(channels, dim=1)


def energy(features: Tensor, power: int = 2) -> Tensor:
    """Return sum_c f^power, (N, 1, h, w) float32, divided by its largest entry in each image.

    The division does not change the direction of the map, and the losses use nothing else. Without
    it, the square of a large energy overflows. An image of zeros stays 0.
    """
    if power == 2:
        total = _SquareSum.apply(features)
    else:
        total = features.float().pow(power).sum(1, keepdim=True)
    largest = total.detach().abs().amax((1, 2, 3), keepdim=True)
    return total / torch.where(largest > 0, largest, 1.0)


def unit_maps(maps: Tensor) -> Tensor:
    """Return (N, 1, h, w) maps as vectors of length 1, (N, h w). A map of zeros stays 0."""
    return F.normalize(maps.flatten(1), dim=1)
