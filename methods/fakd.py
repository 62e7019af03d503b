"""Feature augmented distillation, in kdprof's own form: the published one is not known."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid

BLOCK_ELEMENTS = 2**24
"""The most elements of a block of positions x classes x classes: 64 MiB in float32."""


def _of_all_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks; with one rank, the values."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


class ClassStatistics(torch.nn.Module):
    """Mean and covariance of the logits of each class's pixels, over all batches so far.

    The update is that of ISDA (arXiv 1909.12220): all pixels of a class have equal weight, however
    old they are.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(num_classes))
        self.register_buffer("mean", torch.zeros(num_classes, num_classes))
        self.register_buffer("covariance", torch.zeros(num_classes, num_classes, num_classes))

    @torch.no_grad()
    def update(self, rows: Tensor, members: Tensor) -> None:
        """Add (P, C) logits whose one-hot classes are (P, K); a void pixel has a row of 0.

        If there are several ranks, the logits of all are added, so that all statistics stay equal.
        """
        count = _of_all_ranks(members.sum(0))
        mean = _of_all_ranks(members.mT @ rows) / count.clamp(min=1)[:, None]
        covariance = _of_all_ranks(self._scatter(rows - members @ mean, members))
        covariance = covariance / count.clamp(min=1)[:, None, None]
        share = count / (count + self.count).clamp(min=1)
        gap, share = mean - self.mean, share[:, None, None]
        between = gap[:, :, None] * gap[:, None, :]
        covariance = self.covariance.lerp(covariance, share) + share * (1 - share) * between
        self.count.add_(count)
        self.mean.add_(share[:, 0] * gap)
        self.covariance.copy_(covariance)

    def _scatter(self, rows: Tensor, members: Tensor) -> Tensor:
        """Return sum_p members_pk rows_p rows_p^T, (K, C, C), in blocks of positions."""
        size = max(1, BLOCK_ELEMENTS // rows.shape[1] ** 2)
        total = torch.zeros_like(self.covariance).flatten(1)
        for r, m in zip(rows.split(size), members.split(size), strict=True):
            total += m.mT @ (r[:, :, None] * r[:, None, :]).flatten(1)
        return total.view_as(self.covariance)

    def spread(self) -> Tensor:
        """Return var_y(z_j - z_c), (K, C, C): entry [y, c, j], at least 0."""
        variance = self.covariance.diagonal(dim1=1, dim2=2)
        gap = variance[:, :, None] + variance[:, None, :] - 2 * self.covariance
        return gap.clamp(min=0)


class AugmentedKL(torch.autograd.Function):
    """The sum_p sum_c q_pc [ log q_pc - z_pc + log sum_j exp(z_pj + shift[y_p, c, j]) ].

    Positions x classes x classes are processed in blocks. The same pass computes the gradient,
    which has the size of z. shift[y, c, c] is 0: nothing is added to the class itself.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_q: Tensor, shift: Tensor, which: Tensor) -> Tensor:
        """Return the sum over (P, C) logits; ``which`` (P,) is the index into ``shift``."""
        size = max(1, BLOCK_ELEMENTS // z.shape[1] ** 2)
        total, gradients = z.new_zeros(()), []
        for ours, log_p, y in zip(z.split(size), log_q.split(size), which.split(size), strict=True):
            value, gradient = _augmented_kl(ours, log_p, shift.index_select(0, y))
            total += value
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def _augmented_kl(z: Tensor, log_q: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over a block and its gradient; ``shift`` is (P, C, C) with diagonals of 0."""
    log_share = (z[:, None, :] + shift).log_softmax(2)
    q = log_q.exp()
    value = (q * (log_q - log_share.diagonal(dim1=1, dim2=2))).sum()
    return value, (q[:, None, :] @ log_share.exp_())[:, 0] - q


class FAKDIsda(Method):
    """UNOFFICIAL stand-in for feature augmented distillation (Yuan et al., WACV 2024, 2208.14143).

    Only an abstract and a README are published: the student's features are augmented infinitely
    along semantic directions, through an upper bound of the expected distillation loss. The
    equation, weights, schedules and results were not found, so no result of this method may be
    quoted as FAKD's.

    The form here is that of ISDA (arXiv 1909.12220) with the teacher's q = softmax(z_T) instead of
    the label. For a pixel of class y the feature f ~ N(f, lambda Sigma_y), and
    L = mean over pixels of sum_c q_c log( q_c sum_j exp( z_j - z_c + lambda / 2 V^y_cj ) ),
    V^y_cj = (w_j - w_c)^T Sigma_y (w_j - w_c), with w the rows of the classifier. L is Jensen's
    bound of E KL( q || softmax(W f + b) ). At lambda = 0 it is ``kd``. lambda is ``strength`` times
    the step over ``ramp_iterations``, and at most ``strength``.

    All of it is assumed, in particular weight 1, strength 0.5 and ramp 40 000. V^y_cj is the
    variance of z_j - z_c over the pixels of class y. The running covariance is therefore that of
    the logits (K x K x K numbers), which a method can see, and not that of features. No gradient
    flows through it. Void pixels have lambda = 0. Labels are resized by nearest; if the grids
    differ, the student's logits are resized bilinearly (kdprof's rule).
    """

    name = "fakd:isda"
    title = "Feature augmented distillation (unofficial, ISDA form)"
    paper = "unofficial; after WACV 2024, arXiv 2208.14143"
    family = "logit"
    taps = ("logits", "labels")
    weights = {"fakd": 1.0}
    equation = (
        "L = mean over pixels of sum_c q_c log( q_c sum_j exp( z_j - z_c + lambda / 2 V^y_cj ) )"
    )
    cost_drivers = (
        "the teacher's forward; positions x K x K shifts, in blocks; running covariances of K x K "
        "x K numbers, K classes"
    )

    step: Tensor
    strength: float = 0.5
    ramp_iterations: int = 40_000

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("strength", "ramp_iterations"))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the running statistics."""
        self.num_classes = student.num_classes
        self.statistics = ClassStatistics(self.num_classes)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.notes.append(
            "fakd:isda is kdprof's guess at an unpublished method: do not quote it as FAKD"
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Add the batch to the statistics and return ``fakd``."""
        ours = _rows(match_grid(student.logits, teacher.logits))
        theirs = _rows(teacher.logits)
        nearest = F.interpolate(labels[:, None].float(), teacher.logits.shape[-2:], mode="nearest")
        which = nearest.flatten().long().clamp(max=self.num_classes)
        classes = torch.arange(self.num_classes, device=labels.device)
        with torch.autocast(labels.device.type, enabled=False):
            self.statistics.update(ours.detach(), (which[:, None] == classes).float())
            shift = F.pad(self._strength() / 2 * self.statistics.spread(), (0, 0, 0, 0, 0, 1))
            total = AugmentedKL.apply(ours, theirs.log_softmax(1), shift, which)
        return {"fakd": total / len(ours)}

    def _strength(self) -> Tensor:
        """Count the step and return lambda."""
        self.step += 1
        return self.strength * (self.step / self.ramp_iterations).clamp(max=1)


def _rows(maps: Tensor) -> Tensor:
    """Return (N, C, h, w) maps as float32 rows, (N h w, C)."""
    return maps.float().permute(0, 2, 3, 1).flatten(0, 2)
