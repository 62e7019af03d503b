"""Intra-class feature variation distillation."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._discriminator import AdversarialMethod
from kdprof.methods.kd import REDUCTIONS, pixel_kl

EPS = 1e-8
"""Smallest length that has a direction, as in torch's cosine similarity."""


def intra_class_variation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Return the mean over N, h, w of ( cos_S - cos_T )^2; void adds 0 but stays in the divisor.

    Args:
        student, teacher: features, (N, C, h, w); the C may differ.
        labels: (N, H, W), resized to the grid by nearest; values of ``num_classes`` and above are
            void.
    """
    student = match_grid(student, teacher)
    members = membership(labels, teacher.shape[-2:], num_classes)
    gap = class_similarity(student, members) - class_similarity(teacher, members)
    return gap.square().mean()


def membership(labels: Tensor, grid: torch.Size, num_classes: int) -> Tensor:
    """Return one-hot labels on the grid, (N, h w, K) float32; a void position has a row of 0."""
    nearest = F.interpolate(labels[:, None].float(), grid, mode="nearest").flatten(1)
    return (nearest[:, :, None] == torch.arange(num_classes, device=labels.device)).float()


def class_similarity(features: Tensor, members: Tensor) -> Tensor:
    """Return the cosine of every position with the mean feature of its class in its image.

    Args:
        features: (N, C, h, w).
        members: (N, h w, K) of :func:`membership`.

    Returns:
        (N, h w), 0 where void.

    Two batched matrix products with the one-hot labels: the similarities with all prototypes are
    (N, h w, K), smaller than the features, and nothing of the size of the features is made. The
    published loop over classes writes a map of the features' size several times for each class.
    """
    flat = features.float().flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        prototypes = flat @ members / (members.sum(1, keepdim=True) + 1e-6)
        length = prototypes.norm(dim=1, keepdim=True)
        directions = torch.where(length > EPS, prototypes / length.clamp(min=EPS), 0.0)
        similar = flat.mT @ directions
    # Multiplied and summed, not gathered: the backward of a gather is not deterministic on a GPU.
    similar = (similar * members).sum(2)
    length = flat.norm(dim=1)
    # A dead position has no direction; divided by EPS its gradient would overflow half precision.
    return torch.where(length > EPS, similar / length.clamp(min=EPS), 0.0)


class IFVDPlain(Method):
    """IFVD without its discriminator: the two terms that read pixels (not published as such).

    For each image and class k, prototype m_k = sum_{p: y_p = k} f_p / (count + 1e-6);
    c_p = cos(f_p, m_{y_p}); L_ifv = mean_p ( c^S_p - c^T_p )^2 on head features f. Weights 200,
    plus kd 10 in the element-mean form: those of the authors' script.

    The authors compare a void pixel with itself, which is 0 unless its feature is; here it is 0
    always, and a feature of length 0 passes no gradient.
    """

    name = "ifvd:plain"
    title = "Intra-class feature variation, no discriminator"
    paper = "ECCV 2020"
    family = "relational + logit"
    taps = ("head", "logits", "labels")
    weights = {"ifv": 200.0, "kd": 10.0}

    kd_reduction: str = "element"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"kd_reduction": REDUCTIONS})

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Remember the number of classes."""
        self.num_classes = student.num_classes

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``ifv`` and ``kd``."""
        ifv = intra_class_variation(student.head, teacher.head, labels, self.num_classes)
        kd = pixel_kl(student.logits, teacher.logits, reduction=self.kd_reduction)
        return {"ifv": ifv, "kd": kd}


class IFVD(AdversarialMethod, IFVDPlain):
    """Intra-class feature variation distillation (Wang et al., ECCV 2020), the authors' script.

    For each image and class k, prototype m_k = sum_{p: y_p = k} f_p / (count + 1e-6), of head
    features f, labels y resized by nearest; c_p = cos(f_p, m_{y_p});
    L_ifv = mean over N, h, w of ( c^S_p - c^T_p )^2. Void pixels contribute 0 but stay in the
    divisor. Gradient flows through the student's prototypes.

    Weights 200 ifv + 10 kd (element mean, T = 1) + 0.001 adv, where adv = - mean D(z_S). The
    discriminator is trained after the student's step at weight 0.1: WGAN with gradient penalty 10
    (0.1 x 10 = 1), Adam 4e-4 (0.9, 0.99) with the student's decay. The paper's text has ifv 50; 200
    is the authors' code. Reproductions range from 63.7 to 73.6.
    """

    name = "ifvd"
    title = "Intra-class feature variation distillation"
    paper = "ECCV 2020"
    family = "relational + logit + adversarial"
    weights = {"ifv": 200.0, "kd": 10.0, "adv": 0.001}
    auxiliary_weights = {"discriminator": 0.1, "gradient_penalty": 1.0}
    auxiliary_decays = True
    recipes = (
        Recipe(
            "Cityscapes", "PSPNet-R101", "PSPNet-R18", 40_000, 8, (512, 512),
            "SGD 0.01, momentum 0.9, wd 5e-4", "poly 0.9", "IFVD repository", gpus="1",
            baseline_miou=69.10, miou=74.54,
        ),
        Recipe(
            "Cityscapes", "PSPNet-R101", "PSPNet-R18", 80_000, 8, (512, 1024),
            "SGD 0.01, momentum 0.9, wd 5e-4", "poly 0.9, floor 1e-4",
            "BPKD's table, its authors' rerun", gpus="4", baseline_miou=74.23, miou=76.24,
        ),
    )  # fmt: skip

    adversarial: ClassVar[str] = "wgan-gp"

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``ifv``, ``kd`` and ``adv``."""
        terms = super().forward(student, teacher, labels)
        return {**terms, "adv": self.adversarial_term(student, teacher)}


class IFVDCirkd(IFVD):
    """IFVD as CIRKD re-implements and quotes it: 20 ifv + 1 kd (per pixel) + 0.001 adv.

    The discriminator is trained with a hinge loss at weight 0.1 and no gradient penalty, at a
    constant learning rate. See ``ifvd`` for the equation.
    """

    name = "ifvd:cirkd"
    title = "Intra-class feature variation distillation (CIRKD's bundle)"
    paper = "ECCV 2020; bundle of arXiv 2204.06986"
    weights = {"ifv": 20.0, "kd": 1.0, "adv": 0.001}
    auxiliary_weights = {"discriminator": 0.1}
    auxiliary_decays = False
    recipes = (
        Recipe(
            "Cityscapes", "DeepLabV3-R101", "DeepLabV3-R18", 40_000, 16, (512, 1024),
            "SGD 0.02, momentum 0.9, wd 1e-4", "poly 0.9", "CIRKD repository", gpus="8 x 2",
            baseline_miou=74.21, miou=75.59,
        ),
        Recipe(
            "Cityscapes", "DeepLabV3-R101", "PSPNet-R18", 40_000, 16, (512, 1024),
            "SGD 0.02, momentum 0.9, wd 1e-4", "poly 0.9",
            "CIRKD repository (mIoU recalled, not re-verified)", gpus="8 x 2",
            baseline_miou=72.55, miou=73.71,
        ),
    )  # fmt: skip

    kd_reduction: str = "pixel"
    adversarial: ClassVar[str] = "hinge"
