"""Attention transfer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._recipes import cirkd
from kdprof.methods.kd import pixel_kl

BLOCK_ELEMENTS = 2**20
"""Squares that are held at a time on a CPU: 4 MiB, which its caches hold."""


class _SquareSum(torch.autograd.Function):
    """sum_c f^2 of (N, C, h, w), (N, 1, h, w) float32; no squares of a whole map are written.

    On a CPU in blocks of channels: its norm over channels takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        if features.device.type != "cpu":
            made = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)
            return made.square_()
        total = torch.zeros_like(features[:, :1], dtype=torch.float32)
        for block in _channel_blocks(features):
            total += block.float().square().sum(1, keepdim=True)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """Return 2 f times the slope, in the type of f."""
        (features,) = ctx.saved_tensors
        return (2 * slope * features).to(features.dtype)


def _channel_blocks(features: Tensor) -> Iterator[Tensor]:
    channels = max(1, BLOCK_ELEMENTS // max(1, features[:, :1].numel()))
    yield from features.split(channels, dim=1)


def attention_gap(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    """Return the mean over N, h, w of ( a(f_S) - a(f_T) )^2, a the unit energy map of an image.

    Args:
        student, teacher: features, (N, C, h, w); the C may differ.
        power: exponent of the feature in its energy.
    """
    # The energies are resized, not the features: the same rule at 1 / C of the work.
    ours, theirs = energy(student, power), energy(teacher, power)
    return (unit(match_grid(ours, theirs)) - unit(theirs)).square().mean()


def energy(features: Tensor, power: int = 2) -> Tensor:
    """Return sum_c f^power, (N, 1, h, w) float32, divided by its largest entry in each image.

    The divisor leaves the direction, all that the loss reads, as it is; without it the square of
    a large energy overflows. An image of zeros stays 0.
    """
    if power == 2:
        total = _SquareSum.apply(features)
    else:
        total = features.float().pow(power).sum(1, keepdim=True)
    largest = total.detach().abs().amax((1, 2, 3), keepdim=True)
    return total / torch.where(largest > 0, largest, 1.0)


def unit(maps: Tensor) -> Tensor:
    """Return the maps of (N, 1, h, w) as vectors of length 1, (N, h w); zeros stay zeros."""
    return F.normalize(maps.flatten(1), dim=1)


class AT(Method):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928).

    a(f) = q / ||q||_2 with the energy q_p = mean_c f_{c,p}^2 of every position p, the norm over the
    positions of an image; L = mean over N, h, w of ( a(f_S) - a(f_T) )^2. f is the head feature
    (input of the last 1x1 classifier); channels may differ, so there is no adaptor. No mask.
    Weights 10000, plus pixel-wise kd 1 (CIRKD's code). Two unit vectors without a negative entry
    are at most sqrt(2) apart, so L is at most 2 / (h w): the weight undoes that mean.

    The paper sums |f|^2 and the squared distance over several layers; its authors' code, CIRKD and
    mmrazor take both means, as here. Where grids differ the student's energy is resized bilinearly
    to the teacher's grid (kdprof's rule).
    """

    name = "at"
    title = "Attention transfer"
    paper = "ICLR 2017, arXiv 1612.03928"
    family = "attention"
    taps = ("head", "logits")
    weights = {"at": 10_000.0, "kd": 1.0}
    equation = (
        "a(f) = q / ||q||, q_p = mean_c f_cp^2; L = mean over N, h, w of ( a(f_S) - a(f_T) )^2"
    )
    cost_drivers = "the teacher's forward; one pass over each head feature: little"
    recipes = (
        cirkd("DeepLabV3-R18"),
        cirkd("PSPNet-R18"),
    )

    power: int = 2
    temperature: float = 1.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("power", "temperature"))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``at`` and ``kd``."""
        return {
            "at": attention_gap(student.head, teacher.head, self.power),
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
        }
