"""Masked distillation with receptive tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kdprof.method import IGNORE, Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._recipes import cirkd
from kdprof.resized import resized_cross_entropy


def masked_distance(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Return 1/2 mean over n, t, c of [ sum_p m_tp^2 (s_cp - t_cp)^2 / (sum_p m_tp + 1e-5) ].

    Args:
        student, teacher: (N, C, h, w) logits of one grid.
        masks: (N, T, h, w), 0 to 1.

    No factor depends on both channel and mask, so the sums over channels and over masks are
    separate, and no tensor of N x T x C x h x w is created.
    """
    error = (student.float() - teacher.float()).square().mean(1)
    weight = (masks.square() / (masks.sum((2, 3), keepdim=True) + 1e-5)).mean(1)
    return 0.5 * (weight * error).sum((1, 2)).mean()


def overlap(masks: Tensor) -> Tensor:
    """Return the mean Dice coefficient of two different masks of an image; 0 for a single mask.

    2 <m_a, m_b> / (||m_a||^2 + ||m_b||^2 + 2e-12), over images and ordered pairs a != b.
    """
    flat = masks.flatten(2)
    with torch.autocast(masks.device.type, enabled=False):
        inner = flat @ flat.mT
    square = flat.square().sum(2)
    dice = 2 * inner / (square[:, :, None] + square[:, None] + 2e-12)
    others = 1 - torch.eye(masks.shape[1], device=masks.device)
    return (dice * others).sum() / (len(masks) * max(1, masks.shape[1] * (masks.shape[1] - 1)))


def masked_logits(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the sum over masks of the masked logits, (N, C, h, w)."""
    return logits.float() * masks.sum(1, keepdim=True)


class ReceptiveTokens(nn.Module):
    """T vectors of C dimensions, N(0, 0.01^2). The product of each with the logits is a mask."""

    def __init__(self, tokens: int, channels: int):
        super().__init__()
        self.tokens = nn.Parameter(0.01 * torch.randn(tokens, channels))

    def forward(self, logits: Tensor) -> Tensor:
        """Return sigmoid(token . logits), (N, T, h, w), of (N, C, h, w)."""
        images, _, height, width = logits.shape
        with torch.autocast(logits.device.type, enabled=False):
            product = self.tokens.float() @ logits.float().flatten(2)
        return product.sigmoid().view(images, -1, height, width)


class MasKD(Method):
    """Masked distillation with receptive tokens (Huang et al., ICLR 2023, arXiv 2205.14589).

    T = 8 tokens v_t mask the teacher's logits, m_t = sigmoid(v_t . z_T) at each position;
    L = 1/2 mean over n, t, c of [ sum_p m_tp^2 (z_S - z_T)^2_cp / (sum_p m_tp + 1e-5) ]. The weight
    is 1 on the main logits and 0.4 on the auxiliary logits, with the masks of the main ones. Only
    the numerator squares the mask, as in the authors' segmentation code. (The paper's detection
    form masks features.) There is no label mask.

    The tokens are learnt from the teacher and the labels alone: cross-entropy of z_T sum_t m_t plus
    the mean Dice coefficient of two masks, weight 1 each, SGD 0.1, momentum 0.9, decay 1e-3. The
    authors do this first, for 10 000 steps of 16 images with batch statistics in the teacher, and
    then fix the tokens. A kdprof run has one stage. Here a second optimiser takes such a step after
    each step of the student, on the same batch and with the teacher's running statistics; its
    learning rate follows the student's schedule. This is assumed. The cost of learning the masks is
    measured separately, as the auxiliary phase of the step. The masks start at about 1/2
    everywhere, so the loss starts as a plain squared error. The authors' 0.4 cross-entropy of
    auxiliary logits does not change the tokens and is left out.

    If the grids differ, the student's logits and the auxiliary logits are resized bilinearly to the
    grid of the teacher's main logits (kdprof's rule).
    """

    name = "maskd"
    title = "Masked distillation with receptive tokens"
    paper = "ICLR 2023, arXiv 2205.14589"
    family = "logit"
    taps = ("logits", "aux", "labels")
    weights = {"maskd": 1.0, "maskd_aux": 0.4}
    auxiliary_weights = {"masked_task": 1.0, "overlap": 1.0}
    auxiliary_decays = True
    equation = (
        "L = 1/2 mean over n, t, c of [ sum_p m_tp^2 ( z_S - z_T )^2_cp / ( sum_p m_tp + 1e-5 ) "
        "], m_t = sigmoid( v_t . z_T )"
    )
    cost_drivers = (
        "the teacher's forward with its auxiliary head; masked differences of logits, which cost "
        "little; in every step an auxiliary phase of a second optimiser, which learns the tokens"
    )
    recipes = (
        cirkd(
            "PSPNet-R18",
            optimizer="SGD 0.02, momentum 0.9, wd 5e-4",
            schedule="poly 0.9, floor 1e-4",
            gpus=None,
            source="MasKD repository, after 10k steps for the tokens (student alone from CIRKD, "
            "at wd 1e-4; test 74.61)",
            miou=75.34,
        ),
        cirkd(
            "DeepLabV3-R18",
            optimizer="SGD 0.02, momentum 0.9, wd 5e-4",
            schedule="poly 0.9, floor 1e-4",
            gpus=None,
            source="MasKD repository, after 10k steps for the tokens (student alone from CIRKD, "
            "at wd 1e-4; test 75.59)",
            miou=77.00,
        ),
        cirkd(
            "DeepLabV3-R18",
            optimizer="SGD 0.02, momentum 0.9, wd 5e-4",
            schedule="poly 0.9, floor 1e-4",
            gpus=None,
            student_miou=None,
            source="MasKD repository, student from random weights",
            miou=73.95,
        ),
        cirkd(
            "DeepLabV3-MobileNetV2",
            optimizer="SGD 0.02, momentum 0.9, wd 2e-4",
            schedule="poly 0.9, floor 1e-4",
            gpus=None,
            source="MasKD repository, after 10k steps for the tokens (student alone from CIRKD, "
            "at wd 1e-4)",
            miou=75.26,
        ),
    )

    tokens: int = 8

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("tokens",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the tokens."""
        self.masks = ReceptiveTokens(self.tokens, teacher.num_classes)
        self.notes.append(
            "maskd learns its tokens together with the student, in the auxiliary phase; the "
            "separate stage that was published (10 000 steps of 16 images before it) is not run"
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``maskd`` and ``maskd_aux``."""
        with torch.no_grad():  # the tokens learn from their own terms only
            masks = self.masks(teacher.logits)
        teacher_aux = match_grid(teacher.aux, teacher.logits)
        ours, ours_aux = (match_grid(z, teacher.logits) for z in (student.logits, student.aux))
        return {
            "maskd": masked_distance(ours, teacher.logits, masks),
            "maskd_aux": masked_distance(ours_aux, teacher_aux, masks),
        }

    def auxiliary(self) -> nn.Module:
        """Return the tokens."""
        return self.masks

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the published optimiser of the tokens."""
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)

    def auxiliary_forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``masked_task`` and ``overlap``, which train the tokens."""
        masks = self.masks(teacher.logits)
        # Resized with aligned corners, as in the authors' code.
        total = resized_cross_entropy(masked_logits(teacher.logits, masks), labels, True)
        task = total / (labels != IGNORE).sum().clamp(min=1)
        return {"masked_task": task, "overlap": overlap(masks)}
