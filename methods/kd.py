"""Pixel-wise logit distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, Recipe, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._recipes import attnfd, cirkd, skd

REDUCTIONS = ("pixel", "element", "image", "sum", "soft_cross_entropy")


def pixel_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: str = "pixel",
    upsample: int = 1,
) -> Tensor:
    """Return KL(softmax(t/T) || softmax(s/T)) over classes, summed and divided.

    Args:
        student, teacher: logits, (N, C, h, w).
        reduction: the divisor. ``pixel``: N h w, times T^2 (CIRKD). ``element``: N C h w, no T^2
            (the IFVD and TorchDistiller repositories). ``image``: N, times T^2 (mmrazor's
            batchmean on a map). ``sum``: 1, times T^2. ``soft_cross_entropy``: see
            :func:`pixel_cross_entropy`.
        upsample: enlarge both maps this much first, bilinear with aligned corners (a switch of
            the IFVD repository, off by default; 8 is 64 times the work).
    """
    student = match_grid(student, teacher)
    if upsample > 1:
        student, teacher = (
            F.interpolate(z.float(), scale_factor=upsample, mode="bilinear", align_corners=True)
            for z in (student, teacher)
        )
    if reduction == "soft_cross_entropy":
        return pixel_cross_entropy(student, teacher, temperature)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    total = F.kl_div(log_p, target, reduction="sum", log_target=True)
    if reduction == "element":
        return total / student.numel()
    images, _, height, width = student.shape
    divisor = {"pixel": images * height * width, "image": images, "sum": 1}[reduction]
    return temperature**2 * total / divisor


def pixel_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the soft cross-entropy summed over everything, divided by h w but not by N.

    The original SKD's form, at T = 1, weight 10; there its gradient is N times that of
    :func:`pixel_kl`. No T^2.
    """
    student = match_grid(student, teacher)
    target = F.softmax(teacher.float() / temperature, dim=1)
    total = -(target * F.log_softmax(student.float() / temperature, dim=1)).sum()
    return total / student.shape[-2:].numel()


class KD(Method):
    """Canonical logit distillation (Hinton et al. 2015, arXiv 1503.02531), applied per pixel.

    L = T^2 / (N h w) sum_{n,p} KL( softmax(z_T / T) || softmax(z_S / T) ) over classes, on logits
    before any resize, T = 1, weight 1 (CIRKD's code, which adds the same term to at, fitnet, skd,
    ifvd and cwd). No ignore mask: void pixels are distilled too. Only the main logits.

    ``reduction`` selects the divisor of other published codes, see :func:`pixel_kl`; weights mean
    nothing without it.
    """

    name = "kd"
    title = "Pixel-wise knowledge distillation"
    paper = "arXiv 1503.02531 (2015)"
    family = "logit"
    taps = ("logits",)
    weights = {"kd": 1.0}
    equation = "L = T^2 / (N h w) sum_{n,p} KL( softmax(z_T / T) || softmax(z_S / T) )"
    cost_drivers = (
        "the teacher's forward; a softmax and a KL over the classes at every position: little"
    )
    recipes = (
        skd(
            source="structure-KD repository, row +Pi (soft_cross_entropy)",
            weights={"kd": 10.0},
            teacher_miou=78.56,
            miou=70.51,
        ),
        cirkd("PSPNet-R18"),
        cirkd("DeepLabV3-R18"),
        cirkd("DeepLabV3-R18", "ADE20K", miou=34.88),
        cirkd("DeepLabV3-R18", "COCO-Stuff", miou=32.88),
        cirkd(
            "DeepLabV3-R18",
            iterations=80_000,
            batch=8,
            crop=None,
            gpus=None,
            source="an issue of the CIRKD repository (a third party, lr 0.02; crop not stated)",
            baseline_miou=76.21,
            miou=76.61,
        ),
        Recipe(
            "Cityscapes",
            "PSPNet-R101",
            "PSPNet-R18",
            None,
            None,
            None,
            "not stated",
            "extended training, length not stated",
            "abstract of arXiv 2604.25530 (which of logit and feature KD is not stated)",
            teacher_miou=79.8,
            miou=79.0,
        ),
        attnfd("Cityscapes", miou=65.21),
        attnfd("Pascal VOC", miou=69.13),
    )

    temperature: float = 1.0
    reduction: str = "pixel"
    upsample: int = 1

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"reduction": REDUCTIONS}, positive=("temperature", "upsample"))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``kd``."""
        loss = pixel_kl(
            student.logits, teacher.logits, self.temperature, self.reduction, self.upsample
        )
        return {"kd": loss}
