"""The holistic discriminator of structured KD (arXiv 1903.04197), as SKD, IFVD and CIRKD use it.

:class:`AdversarialMethod` is the base class of all methods that train one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import match_grid

EPS = 1e-12
"""Least length that a singular vector is divided by, as in torch's ``normalize``."""
SMALLEST_GRID = 64
"""The published network has no output for logits with a smaller side."""


class SpectralConv(nn.Module):
    """A convolution whose weight is divided by its largest singular value.

    Every forward takes one step of power iteration, in evaluation mode too. The gradient flows
    through the weight only, not through the singular vectors.
    """

    u: Tensor
    v: Tensor

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
        with torch.no_grad():
            matrix = self.weight.flatten(1)
            v = F.normalize(matrix.t() @ self.u, dim=0)
            image = matrix @ v
            sigma = torch.linalg.vector_norm(image)
            u = image / sigma.clamp(min=EPS)
        # New tensors instead of in-place writes: the backward of an earlier forward still needs
        # the old ones.
        self.u, self.v = u, v
        weight = _Spectral.apply(self.weight, sigma, u, v)
        return F.conv2d(x, weight, self.bias, self.stride, self.pad)


class _Spectral(torch.autograd.Function):
    """W / s with s = u^T W v, which must be given: four operators of backward instead of ten."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Tensor:
        divided = weight / sigma
        ctx.save_for_backward(divided, sigma, u, v)
        return divided

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Return ( G - <G, W / s> u v^T ) / s."""
        divided, sigma, u, v = ctx.saved_tensors
        slope = slope.contiguous()
        along = torch.dot(slope.flatten(), divided.flatten())
        rest = torch.addr(slope.flatten(1), u * along, v, alpha=-1)
        return rest.div_(sigma).view_as(slope), None, None, None


class SelfAttention(nn.Module):
    """Self-attention over positions with a learned gate that starts closed (SAGAN)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Parameter(torch.zeros(1))

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, (N, P, P), a row for each query position, and the values, (N, C, P).

        One convolution makes queries, keys and values: the gradient penalty needs many small
        operators for each one.
        """
        layers = self.query, self.key, self.value
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
        widths = [len(layer.weight) for layer in layers]
        query, key, value = F.conv2d(x, weight, bias).flatten(2).split(widths, 1)
        return (query.mT @ key).softmax(-1), value

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated sum with the input, (N, C, h, w)."""
        weights, value = self.attention(x)
        return torch.addcmul(x, self.gate, (value @ weights.mT).view_as(x))


class Discriminator(nn.Module):
    """A classifier of teacher logits and student logits: raw logits in, (N, 1, h', w') scores out.

    Its layers are batch norm; four spectral 4x4 convolutions of stride 2 (64, 128, 256, 512
    channels) with leaky ReLU 0.1; self-attention after the last two of them; a 4x4 convolution
    without padding. The last layer needs logits of at least 64 x 64 positions. Smaller ones are
    padded with zeros after the norm; this is kdprof's extension, the published network cannot take
    them.

    It always runs in float32: its loss is not scaled, and the penalty differentiates it twice.
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
        bottom, right = max(0, SMALLEST_GRID - height), max(0, SMALLEST_GRID - width)
        with torch.autocast(logits.device.type, enabled=False):
            normed = self.norm(logits.float())
            if right or bottom:
                normed = F.pad(normed, (0, right, 0, bottom))
            return self.body(normed)


def discriminator_loss(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss that trains the discriminator on both networks' scores; the teacher is real.

    ``wgan-gp``: mean(d_S) - mean(d_T). ``hinge``: mean relu(1 - d_T) + mean relu(1 + d_S).
    """
    if kind == "wgan-gp":
        return student.mean() - teacher.mean()
    return F.relu(1 - teacher).mean() + F.relu(1 + student).mean()


def generator_loss(student: Tensor) -> Tensor:
    """Return - mean(d_S), the student's loss for both kinds."""
    return -student.mean()


def gradient_penalty(
    discriminator: nn.Module, student: Tensor, teacher: Tensor, mix: Tensor
) -> Tensor:
    """Return mean_n ( || d sum(D(x)) / dx ||_2 - 1 )^2 at x = mix t + (1 - mix) s.

    Args:
        mix: (N, 1, 1, 1), uniform in 0 to 1, one for each image.
    """
    between = torch.lerp(student.float(), teacher.float(), mix).detach().requires_grad_()
    # The input is a view, because torch's FLOP counter hooks a module's inputs and fails on a leaf.
    scores = discriminator(between.view_as(between))
    (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Adversary(nn.Module):
    """A discriminator together with the losses of one kind; a part of a method.

    Args:
        kind: ``hinge`` (CIRKD) or ``wgan-gp`` (the SKD and IFVD repositories).
    """

    def __init__(self, num_classes: int, kind: str):
        super().__init__()
        self.discriminator, self.kind = Discriminator(num_classes), kind

    def generator_loss(self, student: Tensor, teacher: Tensor, notes: list[str]) -> Tensor:
        """Return the student's term, which gives the discriminator's parameters no gradient.

        Of the teacher's logits only the grid is used: the discriminator is trained on that grid.
        """
        student = match_grid(student, teacher)
        _note_padding(student, notes)
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return generator_loss(functional_call(self.discriminator, fixed, (student,)))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the discriminator's own term, for the logits of both networks."""
        student = match_grid(student, teacher)
        scores = self.discriminator(student), self.discriminator(teacher)
        return discriminator_loss(self.kind, *scores)

    def penalty(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the gradient penalty at random mixtures of both networks' logits."""
        student = match_grid(student, teacher)
        mix = torch.rand(student.shape[0], 1, 1, 1, device=student.device)
        return gradient_penalty(self.discriminator, student, teacher, mix)


def _note_padding(logits: Tensor, notes: list[str]) -> None:
    height, width = logits.shape[-2:]
    note = (
        f"the discriminator pads logits of {height}x{width} to {SMALLEST_GRID}, because the "
        "published one cannot take them: its cost is that of larger logits"
    )
    if min(height, width) < SMALLEST_GRID and note not in notes:
        notes.append(note)


class AdversarialMethod(Method):
    """A method that trains its own discriminator of logits.

    It must be the first base class. The subclass declares the tap ``logits``, adds
    :meth:`adversarial_term` to the terms of its ``forward``, and has the weights of
    ``discriminator`` and, for wgan-gp, ``gradient_penalty`` in ``auxiliary_weights``.
    """

    adversarial: ClassVar[str] = "hinge"
    """The kind of the losses, see :class:`Adversary`."""

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the discriminator, after the extras of the other base classes."""
        super().build(student, teacher)
        self.adversary = Adversary(student.num_classes, self.adversarial)

    def auxiliary(self) -> nn.Module:
        """Return the discriminator."""
        return self.adversary

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the discriminator's Adam, as in the IFVD and CIRKD repositories."""
        return torch.optim.Adam(parameters, lr=4e-4, betas=(0.9, 0.99), fused=True)

    def adversarial_term(self, student: Taps, teacher: Taps) -> Tensor:
        """Return the student's term against the discriminator."""
        return self.adversary.generator_loss(student.logits, teacher.logits, self.notes)

    def auxiliary_forward(
        self, student: Taps, teacher: Taps, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return ``discriminator`` and, for wgan-gp, ``gradient_penalty``."""
        terms = {"discriminator": self.adversary(student.logits, teacher.logits)}
        if self.adversarial == "wgan-gp":
            terms["gradient_penalty"] = self.adversary.penalty(student.logits, teacher.logits)
        return terms
