"""The holistic discriminator of structured KD (arXiv 1903.04197), as SKD, IFVD and CIRKD use it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import match_grid

SMALLEST_GRID = 64
"""Logits smaller than this have no output in the published network."""


class SpectralConv(nn.Module):
    """A convolution whose weight is divided by its largest singular value.

    One step of power iteration at every forward, in evaluation mode too; the gradient flows
    through the weight only, not through the singular vectors.
    """

    def __init__(self, channels: int, width: int, kernel: int = 4, stride: int = 2, pad: int = 1):
        super().__init__()
        made = nn.Conv2d(channels, width, kernel, stride, pad)
        self.stride, self.pad = stride, pad
        self.weight, self.bias = made.weight, made.bias
        rest = self.weight[0].numel()
        self.register_buffer("u", F.normalize(torch.randn(width), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(rest), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, h, w)."""
        return F.conv2d(x, self.weight / self._sigma(), self.bias, self.stride, self.pad)

    def _sigma(self) -> Tensor:
        """Take one step of power iteration and return the singular value."""
        matrix = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        # New tensors, not written in place: an earlier forward's backward still needs the old.
        self.u, self.v = u, v
        return torch.dot(u, matrix @ v)


class SelfAttention(nn.Module):
    """Self-attention over positions with a learned gate that starts closed (SAGAN)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Parameter(torch.zeros(1))

    def attention(self, x: Tensor) -> Tensor:
        """Return the (N, P, P) weights, row = the position that looks."""
        return (self.query(x).flatten(2).mT @ self.key(x).flatten(2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated sum with the input, (N, C, h, w)."""
        seen = self.value(x).flatten(2) @ self.attention(x).mT
        return self.gate * seen.view_as(x) + x


class Discriminator(nn.Module):
    """Tells teacher logits from student logits: raw logits in, (N, 1, h', w') scores out.

    Batch norm; four spectral 4x4 convolutions of stride 2 (64, 128, 256, 512) with leaky ReLU 0.1;
    self-attention after the last two; a 4x4 convolution without padding. The last one needs a grid
    of at least 64 x 64 logits: smaller ones are padded with zeros after the norm (kdprof's
    extension; the published network refuses them).

    Always float32: its loss is not scaled, and the penalty differentiates it twice.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        widths = (num_classes, 64, 128, 256, 512)
        stages = [
            nn.Sequential(SpectralConv(before, after), nn.LeakyReLU(0.1))
            for before, after in pairwise(widths)
        ]
        self.norm = nn.BatchNorm2d(num_classes)
        self.body = nn.Sequential(
            *stages[:3], SelfAttention(256), stages[3], SelfAttention(512), nn.Conv2d(512, 1, 4)
        )

    def forward(self, logits: Tensor) -> Tensor:
        """Score (N, C, h, w) logits."""
        height, width = logits.shape[-2:]
        below, beside = max(0, SMALLEST_GRID - height), max(0, SMALLEST_GRID - width)
        with torch.autocast(logits.device.type, enabled=False):
            return self.body(F.pad(self.norm(logits.float()), (0, beside, 0, below)))


def discriminator_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss that trains the discriminator on scores of both; the teacher is real.

    ``wgan-gp``: mean(d_S) - mean(d_T). ``hinge``: mean relu(1 - d_T) + mean relu(1 + d_S).
    """
    if kind == "wgan-gp":
        return student.mean() - teacher.mean()
    return F.relu(1 - teacher).mean() + F.relu(1 + student).mean()


def generator_loss(student: Tensor) -> Tensor:
    """Return - mean(d_S), for both kinds."""
    return -student.mean()


def gradient_penalty(
    discriminator: nn.Module, student: Tensor, teacher: Tensor, mix: Tensor
) -> Tensor:
    """Return mean_n ( || d sum(D(x)) / dx ||_2 - 1 )^2 at x = mix t + (1 - mix) s.

    Args:
        mix: (N, 1, 1, 1), uniform in 0 to 1, one for each image.
    """
    between = (mix * teacher.float() + (1 - mix) * student.float()).detach().requires_grad_()
    # Handed over as a view: torch's FLOP counter hooks a module's inputs and fails on a leaf here.
    scores = discriminator(between.view_as(between))
    (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Adversary(nn.Module):
    """A discriminator with the losses of one kind, for a method to own.

    Args:
        kind: ``hinge`` (CIRKD) or ``wgan-gp`` (the SKD and IFVD repositories).
    """

    def __init__(self, num_classes: int, kind: str):
        super().__init__()
        self.discriminator, self.kind = Discriminator(num_classes), kind

    def generator_loss(self, student: Tensor, teacher: Tensor, notes: list[str]) -> Tensor:
        """Return the student's term; the discriminator's parameters get no gradient from it.

        The teacher's logits give the grid only: the one the discriminator is trained on.
        """
        student = match_grid(student, teacher)
        _note_padding(student, notes)
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return generator_loss(functional_call(self.discriminator, fixed, (student,)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the discriminator's own term for logits of both."""
        student = match_grid(student, teacher)
        scores = self.discriminator(student), self.discriminator(teacher)
        return discriminator_loss(self.kind, *scores)

    def penalty(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the gradient penalty at random mixtures of the logits of both."""
        student = match_grid(student, teacher)
        mix = torch.rand(student.shape[0], 1, 1, 1, device=student.device)
        return gradient_penalty(self.discriminator, student, teacher, mix)


def _note_padding(logits: Tensor, notes: list[str]) -> None:
    height, width = logits.shape[-2:]
    note = (
        f"logits of {height}x{width} are padded to {SMALLEST_GRID} for the discriminator, which "
        "the published one does not take: its cost here is that of larger logits"
    )
    if min(height, width) < SMALLEST_GRID and note not in notes:
        notes.append(note)


class AdversarialMethod(Method):
    """A method with an adversary of its own, which judges the logits.

    Stands first among the bases. The subclass reads ``logits``, adds :meth:`adversarial_term` to
    what its ``forward`` returns, and weighs ``discriminator`` and, for wgan-gp,
    ``gradient_penalty`` in ``auxiliary_weights``.
    """

    adversarial: ClassVar[str] = "hinge"
    """The kind of game, see :class:`Adversary`."""

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the discriminator, after the extras of the other bases."""
        super().build(student, teacher)
        self.adversary = Adversary(student.num_classes, self.adversarial)

    def auxiliary(self) -> nn.Module:
        """Return the discriminator."""
        return self.adversary

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the discriminator's Adam (the IFVD and CIRKD repositories)."""
        return torch.optim.Adam(parameters, lr=4e-4, betas=(0.9, 0.99))

    def adversarial_term(self, student: Taps, teacher: Taps) -> Tensor:
        """Return the student's side of the game."""
        return self.adversary.generator_loss(student.logits, teacher.logits, self.notes)

    def auxiliary_forward(
        self, student: Taps, teacher: Taps, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return ``discriminator`` and, for wgan-gp, ``gradient_penalty``."""
        terms = {"discriminator": self.adversary(student.logits, teacher.logits)}
        if self.adversarial == "wgan-gp":
            terms["gradient_penalty"] = self.adversary.penalty(student.logits, teacher.logits)
        return terms
