"""Relations of the images of a batch to each other, computed once for each pair of images.

The similarities of image i with image j are those of j with i, transposed. So one map gives both:
along its rows the positions of i are compared with those of j, along its columns those of j with
those of i. That is half of the maps and of the matrix products that
:func:`kdprof.methods._relations.relation_kl` needs, which goes through rows only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdprof.hardware.blocks import block_elements
from kdprof.methods import _pair_kernels
from kdprof.resized.tiles import by_kernels

LEAST_TEMPERATURE = 1 / 60
"""Similarities of unit vectors are within +-1 / T. From this T on, their exponentials and the sums
of these are far from the limits of float32, so that no maximum has to be subtracted first."""


def fits_pairs(vectors: Tensor, temperature: float) -> bool:
    """Return whether :func:`pair_kl` takes (N, P, C) vectors: a pair's map must fit in a block."""
    return temperature >= LEAST_TEMPERATURE and vectors.shape[1] ** 2 <= block_elements(vectors)


def pair_kl(student: Tensor, teacher: Tensor, temperature: float, group: int) -> Tensor:
    """Return sum_ij sum_r KL( softmax(t_ir . T_j / T) || softmax(s_ir . S_j / T) ).

    The sums are over the ordered pairs of images i, j of a group, i = j included, over all groups,
    and over the positions r of image i.

    Args:
        student, teacher: vectors of length 1 or 0, (N, P, C) float32; the C may differ. The teacher
            gets no gradient.
        temperature: at least :data:`LEAST_TEMPERATURE`.
        group: the images of a group; it divides N.

    The P x P maps of a few pairs are in memory at a time. Backward costs almost nothing, because
    forward has computed the gradient. It cannot be differentiated again.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _PairKL.apply(student, teacher, temperature, group)


class _PairKL(torch.autograd.Function):
    """The autograd Function of :func:`pair_kl`."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, group: int
    ) -> Tensor:
        scale = temperature**-0.5  # of both sides of every product
        ours, theirs = ((v * scale).unflatten(0, (-1, group)) for v in (student, teacher))
        gradient, sums = torch.zeros_like(ours), []
        for apart in range(group):
            sides = slice(group - apart), slice(apart, None)
            s, t = ([v[:, side].flatten(0, 1) for side in sides] for v in (ours, theirs))
            found, slopes = _compare(s, t, both=apart > 0)
            # An image is compared with itself once, with each other one in both directions.
            sums += [direction for part in found for direction in (part if apart else part[:1])]
            for side, slope in zip(sides, slopes, strict=True):
                gradient[:, side].add_(slope.unflatten(0, (len(gradient), -1)))
        ctx.save_for_backward(gradient.mul_(scale).flatten(0, 1))
        return _divergence(torch.cat(sums, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def _compare(
    ours: list[Tensor], theirs: list[Tensor], both: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Compare the images of two lists, the first with the first and so on.

    Args:
        ours, theirs: scaled vectors of student and teacher on the two sides of the pairs,
            (pairs, P, C).
        both: also compare along the columns; False for an image with itself.

    Returns:
        The sums of :func:`compare_maps` of all pairs, block by block, and the gradients of the
        student's two sides.
    """
    pairs, positions = ours[0].shape[:2]
    at_once = min(pairs, max(1, block_elements(ours[0]) // positions**2))
    maps = ours[0].new_empty(2, at_once, positions, positions)
    compare = _pair_kernels.compare_maps if by_kernels(ours[0]) else compare_maps
    slopes, sums = [torch.empty_like(v) for v in ours], []
    for begin in range(0, pairs, at_once):
        here = slice(begin, begin + at_once)
        (first, second), (t_first, t_second) = ([v[here] for v in side] for side in (ours, theirs))
        student, teacher = maps[:, : len(first)]
        torch.bmm(first, second.mT, out=student)
        torch.bmm(t_first, t_second.mT, out=teacher)
        sums.append(compare(student, teacher, both))
        torch.bmm(student, second, out=slopes[0][here])
        torch.bmm(student.mT, first, out=slopes[1][here])
    return sums, slopes


def compare_maps(student: Tensor, teacher: Tensor, both: bool) -> Tensor:
    """Return the sums of a comparison of maps; the student's map becomes the slope of its KL.

    Args:
        student, teacher: similarities b and a, (pairs, P, P). The teacher's map is lost.
        both: False: the slope is that of the rows only.

    Returns:
        The sums over rows and over columns of exp a, exp b and (a - b) exp a, (2, 3, pairs, P).

    The slope is exp(b) / sum exp(b) - exp(a) / sum exp(a), of the rows, plus the same of the
    columns. This is the form for a CPU, and the oracle of the kernels for a GPU.
    """
    gap = teacher - student
    teacher.exp_()
    student.exp_()
    gap.mul_(teacher)
    sums = torch.stack([m.sum(dim) for dim in (2, 1) for m in (teacher, student, gap)])
    sums = sums.unflatten(0, (2, 3))
    for which, exponentials in enumerate((teacher, student)):
        share = sums[:, which].reciprocal()
        of_rows = share[0, :, :, None]
        exponentials.mul_(torch.add(of_rows, share[1, :, None], out=gap) if both else of_rows)
    student.sub_(teacher)
    return sums


def _divergence(sums: Tensor) -> Tensor:
    """Return the sum of the KL of all rows and columns, given their sums, (3, pairs, P)."""
    teacher, student, gap = sums
    return (gap / teacher + (student / teacher).log()).sum()
