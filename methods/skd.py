"""Structured knowledge distillation (SKD), the whole method and its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.hardware.blocks import block_elements
from kdprof.method import Recipe, Taps
from kdprof.methods._common import GroupedMethod, check_settings, match_grid
from kdprof.methods._discriminator import AdversarialMethod
from kdprof.methods._divergences import REDUCTIONS, SUMS, pixel_kl
from kdprof.methods._recipes import SKDS_RERUN, cirkd, cirkd_segformer, mmseg, skd
from kdprof.methods._relations import LEAST_ROWS

EPS = 1e-8
"""Added to a node's length in the original form. A node of this length or less has no direction."""
GRAM_GAIN = 8
"""Channel products are used if they need so many times fewer multiply-adds. They are float64, which
has the speed of float32 on data-centre GPUs, but TF32 is up to 8 times as fast."""
POOLINGS = ("max", "average")


# The mean squared difference of two similarity maps that are never whole in memory.


class _SimilarityGap(torch.autograd.Function):
    """The autograd Function of :func:`similarity_gap`, before the division.

    The same pass computes the gradient. This is possible because the gradient is linear in the one
    number that backward receives, and it uses the differences that forward has computed.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros(())
        gradient = student.new_zeros(student.shape) if ctx.needs_input_grad[0] else None
        add = _add_channel_products if _channels_are_cheaper(student, teacher) else _add_blocks
        add(student, teacher, total, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None


def _channels_are_cheaper(student: Tensor, teacher: Tensor) -> bool:
    """Return whether products of channels are at least GRAM_GAIN times cheaper than of nodes."""
    ours, nodes = student.shape[1:]
    both = ours + teacher.shape[1]
    return GRAM_GAIN * both * (both + ours) <= nodes * (both / 2 + ours)


def _add_blocks(student: Tensor, teacher: Tensor, total: Tensor, gradient: Tensor | None) -> None:
    """Add sum D^2 to ``total`` and S D to ``gradient``, with D = S^T S - T^T T in blocks of rows.

    D is symmetric, so the part on the right of a block's own square also counts for the mirrored
    part.
    """
    images, _, nodes = student.shape
    rows = max(LEAST_ROWS, block_elements(student) // (images * nodes))
    for first in range(0, nodes, rows):
        here, rest, after = (
            slice(first, first + rows),
            slice(first, None),
            slice(first + rows, None),
        )
        # Two separate products of the same kind, so that equal maps differ by exactly 0.
        gap = student[:, :, here].mT @ student[:, :, rest]
        gap -= teacher[:, :, here].mT @ teacher[:, :, rest]
        total += 2 * gap.square().sum() - gap[:, :, :rows].square().sum()
        if gradient is not None:
            gradient[:, :, here] += student[:, :, rest] @ gap.mT
            gradient[:, :, after] += student[:, :, here] @ gap[:, :, rows:]


def _add_channel_products(
    student: Tensor, teacher: Tensor, total: Tensor, gradient: Tensor | None
) -> None:
    """Add the same as :func:`_add_blocks`, from products of channels.

    They are ||S S^T||^2 - 2 ||S T^T||^2 + ||T T^T||^2 and (S S^T) S - (S T^T) T, in float64: the
    difference of three large sums would keep few digits in float32 and none in TF32.
    """
    images, ours, nodes = student.shape
    both = ours + teacher.shape[1]
    width = max(LEAST_ROWS, block_elements(student) // (images * both))
    pieces = [slice(first, first + width) for first in range(0, nodes, width)]

    def stacked(piece: slice) -> Tensor:
        return torch.cat((student[:, :, piece], teacher[:, :, piece]), 1).double()

    products = student.new_zeros(images, both, both, dtype=torch.float64)
    for piece in pieces:
        nodes_here = stacked(piece)
        products += nodes_here @ nodes_here.mT
    own, cross, theirs = (
        products[:, :ours, :ours],
        products[:, :ours, ours:],
        products[:, ours:, ours:],
    )
    squares = own.square().sum() - 2 * cross.square().sum() + theirs.square().sum()
    total += squares.clamp(min=0)
    if gradient is not None:
        signed = torch.cat((own, -cross), 2)
        for piece in pieces:
            gradient[:, :, piece] += signed @ stacked(piece)


def similarity_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over N, M, M of ( S^T S - T^T T )^2.

    Args:
        student, teacher: M node vectors, (N, C, M) float32; the C may differ. The teacher gets no
            gradient.

    No M x M map is in memory as a whole: it is computed in blocks, or replaced by products of
    channels if these are much cheaper. Backward costs almost nothing, because forward has computed
    the gradient. It cannot be differentiated again.
    """
    with torch.autocast(student.device.type, enabled=False):
        total = _SimilarityGap.apply(student, teacher)
    return total / (student.shape[0] * student.shape[2] ** 2)


# Pooling of features to nodes.


def pool(features: Tensor, window: tuple[int, int], pooling: str = "max") -> Tensor:
    """Return (N, C, h, w) pooled over adjacent windows; windows at the border may be smaller."""
    if pooling == "average":
        return F.avg_pool2d(features.float(), window, ceil_mode=True)
    return F.max_pool2d(features, window, ceil_mode=True)


def unit_nodes(maps: Tensor, fixed_length: bool) -> Tensor:
    """Return the positions of (N, C, h, w) as vectors of length 1, (N, C, h w) float32.

    Args:
        fixed_length: treat the length as a constant in backward, as the original does and CIRKD
            does not.

    A vector of length 0 stays 0 and has no gradient; in the published code its gradient overflows.
    """
    flat = maps.float().flatten(2)
    length = flat.norm(dim=1, keepdim=True)
    length = length.detach() + EPS if fixed_length else length
    least = 2 * EPS if fixed_length else EPS
    return (flat / length.clamp(min=EPS)).masked_fill(length <= least, 0)


def pairwise_whole(
    student: Tensor, teacher: Tensor, scale: float = 0.5, pooling: str = "max"
) -> Tensor:
    """Return the original pair-wise term of (N, C, h, w) features; the C may differ.

    Args:
        scale: height and width of a pooling window as a fraction of the map's, rounded down.
    """
    student = match_grid(student, teacher)
    height, width = (max(1, int(side * scale)) for side in teacher.shape[-2:])
    maps = (pool(f, (height, width), pooling) for f in (student, teacher))
    return similarity_gap(*(unit_nodes(m, fixed_length=True) for m in maps))


def pairwise_local(student: Tensor, teacher: Tensor, window: int = 2) -> Tensor:
    """Return CIRKD's pair-wise term: windows of fixed size, cosines with their full gradient."""
    student = match_grid(student, teacher)
    maps = (pool(f, (window, window)) for f in (student, teacher))
    return similarity_gap(*(unit_nodes(m, fixed_length=False) for m in maps))


class SKDPlain(GroupedMethod):
    """SKD without its discriminator: the pixel-wise and the pair-wise term (row +Pi +Pa).

    See ``skd`` for both equations. Weights 10 kd + 0.5 pairwise.
    """

    name = "skd:plain"
    title = "Structured knowledge distillation, no discriminator"
    paper = "CVPR 2019, arXiv 1903.04197"
    family = "logit + relational"
    taps = ("head", "logits")
    weights = {"kd": 10.0, "pairwise": 0.5}
    equation = (
        "L_pi = - 1 / (h w) sum p^T log p^S; L_pa = mean over N, i, j of ( a^S_ij - a^T_ij )^2, "
        "a_ij = v_i . v_j of pooled nodes"
    )
    cost_drivers = (
        "the teacher's forward; a soft cross-entropy of logits and the similarities of a few "
        "pooled nodes, which cost little"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        skd(source="structure-KD repository, row +Pi +Pa", teacher_miou=78.56, miou=71.78),
    )

    scale: float = 0.5
    pooling: str = "max"
    kd_reduction: str = "soft_cross_entropy"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"pooling": POOLINGS, "kd_reduction": REDUCTIONS}, positive=("scale",))
        if self.scale > 1:
            raise UserError(f"method '{self.name}': scale must be at most 1, not {self.scale!r}")
        if self.images_per_group and self.kd_reduction not in SUMS:
            raise UserError(
                f"method '{self.name}': images_per_group does nothing with kd_reduction = "
                f"{self.kd_reduction!r}, which couples no images; leave it out"
            )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``kd`` and ``pairwise``."""
        return {
            "kd": pixel_kl(
                student.logits,
                teacher.logits,
                reduction=self.kd_reduction,
                group=self.group_size(len(student.logits)),
            ),
            "pairwise": pairwise_whole(student.head, teacher.head, self.scale, self.pooling),
        }


class SKD(AdversarialMethod, SKDPlain):
    """Structured knowledge distillation (Liu et al., CVPR 2019, arXiv 1903.04197).

    The form is that of the authors' code. Pixel-wise: L_pi = - 1 / (h w) sum_{n,p,c} p^T log p^S of
    the class probabilities p, T = 1; it is not divided by N, which is the 8 images of one GPU
    (``images_per_group = n`` adds up n images at a time). Pair-wise: head features f are
    max-pooled to a few nodes, with window = stride = half the map rounded down; windows at the
    border may be smaller (3 x 3 nodes from 65 x 65, 2 x 2 from 64 x 128);
    v_i = f_i / (|f_i| + 1e-8) with |f_i| a constant in backward; a_ij = v_i . v_j;
    L_pa = mean over N, i, j of ( a^S_ij - a^T_ij )^2. Holistic: adv = - mean D(z_S) with a
    discriminator D of logits.

    Weights 10 kd + 0.5 pairwise + 0.1 adv, as in the authors' run script. D is trained after the
    student's step at weight 0.1: WGAN with gradient penalty 10 (0.1 x 10 = 1), SGD 4e-4, momentum
    0.9, decay 5e-4; its learning rate decays with the student's.

    The paper's text has average pooling and weight 10 for L_pa (``pooling = "average"``, weights
    ``pairwise = 10``); its authors recommend the values of the code. ``scale`` is the window as a
    fraction of the map; its default does not give the granularities of the paper's ablation. If the
    grids differ, the student's maps are resized bilinearly to the teacher's (kdprof's rule).
    """

    name = "skd"
    title = "Structured knowledge distillation"
    family = "logit + relational + adversarial"
    weights = {"kd": 10.0, "pairwise": 0.5, "adv": 0.1}
    auxiliary_weights = {"discriminator": 0.1, "gradient_penalty": 1.0}
    auxiliary_decays = True
    equation = (
        "L_pi = - 1 / (h w) sum p^T log p^S; L_pa = mean over N, i, j of ( a^S_ij - a^T_ij )^2, "
        "a_ij = v_i . v_j of pooled nodes; adv = - mean D(z_S)"
    )
    cost_drivers = (
        "the teacher's forward; a discriminator forward and backward with a gradient penalty "
        "(differentiated twice), which is many small kernels rather than many FLOP"
    )
    recipes = (
        skd(source="structure-KD repository, row +Pi +Pa +Ho", teacher_miou=78.56, miou=74.08),
        skd(
            source="structure-KD repository, released weights; test 73.05",
            teacher_miou=78.32,
            miou=75.3,
        ),
        mmseg(teacher_miou=79.74, student_miou=74.23, miou=76.13, **SKDS_RERUN),
        mmseg(
            "PSPNet-R18",
            "ADE20K",
            teacher_miou=44.39,
            student_miou=33.30,
            miou=34.49,
            **SKDS_RERUN,
        ),
        skd(
            "ESPNet",
            dataset="CamVid",
            teacher=None,
            iterations=None,
            batch=None,
            crop=None,
            gpus=None,
            optimizer="not stated",
            schedule="not stated",
            student_miou=57.8,
            miou=61.4,
        ),
    )

    adversarial: ClassVar[str] = "wgan-gp"

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the discriminator's SGD; the IFVD and CIRKD repositories use Adam."""
        return torch.optim.SGD(parameters, lr=4e-4, momentum=0.9, weight_decay=5e-4, fused=True)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``kd``, ``pairwise`` and ``adv``."""
        terms = super().forward(student, teacher, labels)
        return {**terms, "adv": self.adversarial_term(student, teacher)}


class SKDCirkd(AdversarialMethod):
    """SKD as CIRKD re-implements it; most tables quote this form.

    1 kd (KL per pixel) + 10 pairwise + 0.001 adv. The pair-wise term max-pools head features by
    2 x 2 only, to 2048 nodes at 512 x 1024, and compares their cosines: mean over N, i, j of
    ( cos^S_ij - cos^T_ij )^2, with the gradient through the lengths. The discriminator is trained
    with a hinge loss at weight 0.1 and no gradient penalty, by Adam 4e-4 (0.9, 0.99) at a constant
    learning rate. If the grids differ, the student's maps are resized bilinearly (kdprof's rule).
    """

    name = "skd:cirkd"
    title = "Structured knowledge distillation (CIRKD's bundle)"
    paper = "CVPR 2019, arXiv 1903.04197; bundle of arXiv 2204.06986"
    family = "logit + relational + adversarial"
    taps = ("head", "logits")
    weights = {"kd": 1.0, "pairwise": 10.0, "adv": 0.001}
    auxiliary_weights = {"discriminator": 0.1}
    equation = (
        "L_kd per pixel; L_pa = mean over N, i, j of ( cos^S_ij - cos^T_ij )^2 of 2 x 2 pooled "
        "nodes; adv = - mean D(z_S)"
    )
    cost_drivers = (
        "the teacher's forward; similarities of 2048 x 2048 nodes (512 x 1024 crop), in blocks; a "
        "discriminator, forward and backward"
    )
    recipes = (
        cirkd("DeepLabV3-R18", miou=75.42),
        cirkd("DeepLabV3-MobileNetV2", miou=73.82),
        cirkd("PSPNet-R18", source="CIRKD repository (mIoU recalled, not re-verified)", miou=73.29),
        cirkd_segformer(miou=76.43),
    )

    window: int = 2
    temperature: float = 1.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("window", "temperature"))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``kd``, ``pairwise`` and ``adv``."""
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            "pairwise": pairwise_local(student.head, teacher.head, self.window),
            "adv": self.adversarial_term(student, teacher),
        }
