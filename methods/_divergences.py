"""Softmax divergences: over the classes at each position, and over the positions of each channel.

They are the terms of ``kd`` and ``cwd``. Many other methods add them to terms of their own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdprof.methods._common import match_grid

SUMS = ("sum", "soft_cross_entropy")
"""Reductions that add up images."""
REDUCTIONS = ("pixel", "element", "image", *SUMS)


def pixel_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: str = "pixel",
    upsample: int = 1,
    group: int | None = None,
) -> Tensor:
    """Return KL(softmax(t/T) || softmax(s/T)) over classes, summed over positions and divided.

    Args:
        student, teacher: logits, (N, C, h, w).
        reduction: the divisor. ``pixel``: N h w, times T^2 (CIRKD). ``element``: N C h w, no T^2
            (the IFVD and TorchDistiller repositories). ``image``: N, times T^2 (mmrazor's
            batchmean on a map). ``sum``: 1, times T^2. ``soft_cross_entropy``: see
            :func:`pixel_cross_entropy`.
        upsample: factor by which both maps are enlarged first, bilinearly with aligned corners (an
            option of the IFVD repository, off by default; 8 is 64 times the work).
        group: images that ``sum`` and ``soft_cross_entropy`` add up, a divisor of N; the result is
            the mean over the groups. None: all images are one group.
    """
    student = match_grid(student, teacher)
    if upsample > 1:
        student, teacher = (
            F.interpolate(z.float(), scale_factor=upsample, mode="bilinear", align_corners=True)
            for z in (student, teacher)
        )
    if reduction == "soft_cross_entropy":
        return pixel_cross_entropy(student, teacher, temperature, group)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    total = F.kl_div(log_p, target, reduction="sum", log_target=True)
    if reduction == "element":
        return total / student.numel()
    images, _, height, width = student.shape
    groups = images // (group or images)
    divisor = {"pixel": images * height * width, "image": images, "sum": groups}[reduction]
    return temperature**2 * total / divisor


def pixel_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, group: int | None = None
) -> Tensor:
    """Return the soft cross-entropy, summed over everything and divided by h w but not by N.

    With a ``group`` it is summed over so many images at a time, and averaged over the groups. It
    has no factor T^2. This is the form of the original SKD, with T = 1 and weight 10; at T = 1 its
    gradient is N (or ``group``) times that of :func:`pixel_kl`.
    """
    student = match_grid(student, teacher)
    target = F.softmax(teacher.float() / temperature, dim=1)
    total = -(target * F.log_softmax(student.float() / temperature, dim=1)).sum()
    groups = len(student) // (group or len(student))
    return total / (groups * student.shape[-2:].numel())


def channel_kl(
    student: Tensor, teacher: Tensor, temperature: float, divisor_channels: int | None = None
) -> Tensor:
    """Return T^2 / (N C) sum_{n,c} KL( p_T || p_S ), p the softmax of a channel over positions.

    Args:
        student, teacher: maps of equal channels, (N, C, h, w).
        divisor_channels: C of the divisor, if it is not the number of the maps' channels.
    """
    student = match_grid(student, teacher)
    channels = divisor_channels or student.shape[1]
    target = F.log_softmax(teacher.float().flatten(2) / temperature, dim=2)
    log_p = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    total = F.kl_div(log_p, target, reduction="sum", log_target=True)
    return temperature**2 * total / (student.shape[0] * channels)
