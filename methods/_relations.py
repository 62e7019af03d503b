"""Relations between unit vectors: the KL of two similarity maps that are never whole in memory.

CIRKD uses them for positions and stored vectors, CIRKDv2 for channels too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.hardware.blocks import block_elements
from kdprof.methods._common import match_grid
from kdprof.methods._pairs import fits_pairs, pair_kl

EPS = 1e-12
"""A vector of this length or less has no direction and counts as 0, as in torch's ``normalize``."""
LEAST_ROWS = 128
"""The fewest rows of a block, so that a matrix product does not become one of a few vectors."""
SMALL = 8
"""A map of all pairs that is so many times smaller than a block takes less time as one map, with a
few operators, than pair by pair."""


def unit(values: Tensor, dim: int) -> Tensor:
    """Return float32 vectors of length 1 along ``dim``. A vector of length 0 stays 0.

    The gradient of such a vector is 0 too. The published code divides it by 1e-12 and overflows.
    """
    values = values.float()
    length = values.norm(dim=dim, keepdim=True)
    return (values / length.clamp(min=EPS)).masked_fill(length <= EPS, 0)


def unit_positions(features: Tensor) -> Tensor:
    """Return the unit vectors of all positions of (N, C, h, w), image by image: (N h w, C)."""
    return unit(features.permute(0, 2, 3, 1).flatten(0, 2), 1)


class _RelationKL(torch.autograd.Function):
    """The autograd Function of :func:`relation_kl`.

    Rows are processed in blocks, so memory grows with rows + columns and not with their product.
    The same pass computes the gradient. This is possible because the gradient is linear in the one
    number that backward receives, and a second pass would repeat the matrix products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        keys: Tensor | None,
        parts: int,
        temperature: float,
        weights: Tensor | None,
    ) -> Tensor:
        assert keys is not None or weights is None, "a row's weight does not hold for its column"
        ours, theirs = (student, teacher) if keys is None else (keys, keys)
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        rows = max(LEAST_ROWS, block_elements(student) // len(ours))
        for first in range(0, len(student), rows):
            block = slice(first, first + rows)
            log_p = _log_similarity(teacher[block], theirs, parts, temperature)
            log_q = _log_similarity(student[block], ours, parts, temperature)
            divergence, slope = _compare_rows(log_p, log_q)
            here = gradient[block]
            torch.addmm(here, slope, ours, out=here)
            if keys is None:  # each row is also a column that the others are compared with
                torch.addmm(gradient, slope.T, student[block], out=gradient)
            if weights is not None:
                here *= weights[block, None]
                divergence *= weights[block]
            total += divergence.sum()
            del log_p, log_q, slope  # before the next block takes as much memory
        ctx.save_for_backward(gradient.div_(temperature))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None


def _log_similarity(rows: Tensor, columns: Tensor, parts: int, temperature: float) -> Tensor:
    """Return the log-softmax of rows . columns / T over each part of the columns.

    Its shape is (rows, parts, columns of a part).
    """
    similar = (rows / temperature) @ columns.T
    return similar.view(len(rows), parts, -1).log_softmax(2)


def _compare_rows(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's KL and the slope q - p, (rows, columns), in the memory of the arguments."""
    p = log_p.exp()
    divergence = log_p.sub_(log_q).mul_(p).sum((1, 2))
    return divergence, log_q.exp_().sub_(p).flatten(1)


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    keys: Tensor | None = None,
    parts: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """Return sum_r w_r sum_parts KL( softmax(t_r . K / T) || softmax(s_r . K / T) ).

    Args:
        student, teacher: one vector for each row r, (R, C). The C may differ if keys is None.
        keys: the vectors that both are compared with, (M, C); they get no gradient. None: each
            network's rows are compared with its own rows, and the student's gradient includes
            their part as columns.
        parts: number of groups of equal size that the columns form; each has its own softmax.
        weights: (R,), only together with keys; None: all 1.

    Forward and backward never keep more than three blocks of the R x M maps in memory. Backward
    costs almost nothing, because forward has computed the gradient. It cannot be differentiated
    again.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _RelationKL.apply(student, teacher, keys, parts, temperature, weights)


def batch_relation(
    student: Tensor, teacher: Tensor, temperature: float, group: int | None = None
) -> Tensor:
    """Return the divergence of the relations within and across images.

    Args:
        student, teacher: (N, P, C), P vectors of length 1 or 0 for each of N images.
        group: images whose vectors are compared with each other, a divisor of N; None: all.

    Returns:
        The KL of the softmax over the P columns of a similarity map, mean over the ordered pairs
        of images of a group, i = j included, over the groups, and over the P rows of each map.
    """
    images, rows = student.shape[:2]
    group = group or images
    small = (group * rows) ** 2 <= block_elements(student) // SMALL
    if not small and fits_pairs(student, temperature):
        total = pair_kl(student, teacher, temperature, group)
    else:
        totals = [
            relation_kl(s.flatten(0, 1), t.flatten(0, 1), temperature, parts=group)
            for s, t in zip(student.split(group), teacher.split(group), strict=True)
        ]
        total = torch.stack(totals).sum() if len(totals) > 1 else totals[0]
    return total / (images * group * rows)


def mini_batch_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    pooling: int = 0,
    group: int | None = None,
) -> Tensor:
    """Return the mini-batch pixel-to-pixel term of (N, C, h, w) features; the C may differ.

    Args:
        pooling: see the class :class:`CIRKDMiniBatch` of ``cirkd.py``.
        group: see :func:`batch_relation`.
    """
    student = match_grid(student, teacher)
    window = pooling or (4 if min(teacher.shape[-2:]) >= 256 else 1)
    if window > 1:
        student, teacher = (F.avg_pool2d(f, window, ceil_mode=True) for f in (student, teacher))
    images = len(student)
    ours, theirs = (unit_positions(f).unflatten(0, (images, -1)) for f in (student, teacher))
    return batch_relation(ours, theirs, temperature, group)
