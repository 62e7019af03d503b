"""Pixel-wise logit distillation."""

from __future__ import annotations

from torch import Tensor

from kdprof.method import Method, Recipe, Taps
from kdprof.methods._common import check_settings
from kdprof.methods._divergences import REDUCTIONS, pixel_kl
from kdprof.methods._recipes import attnfd, cirkd, skd


class KD(Method):
    """Canonical logit distillation (Hinton et al. 2015, arXiv 1503.02531), applied per pixel.

    L = T^2 / (N h w) sum_{n,p} KL( softmax(z_T / T) || softmax(z_S / T) ) over classes, on logits
    before any resize, T = 1, weight 1 (CIRKD's code, which adds the same term to at, fitnet, skd,
    ifvd and cwd). There is no ignore mask: void pixels are distilled too. Only the main logits are
    used.

    ``reduction`` selects the divisor of other published codes, see :func:`pixel_kl`. A weight has a
    meaning only together with the reduction.
    """

    name = "kd"
    title = "Pixel-wise knowledge distillation"
    paper = "arXiv 1503.02531 (2015)"
    family = "logit"
    taps = ("logits",)
    weights = {"kd": 1.0}
    equation = "L = T^2 / (N h w) sum_{n,p} KL( softmax(z_T / T) || softmax(z_S / T) )"
    cost_drivers = (
        "the teacher's forward; a softmax and a KL over the classes at every position, which cost "
        "little"
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
            student_miou=76.21,
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
            "abstract of arXiv 2604.25530 (it does not state whether by logits or features)",
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
