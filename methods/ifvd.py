"""Intra-class feature variation distillation."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import check_settings, match_grid, membership
from kdprof.methods._discriminator import AdversarialMethod
from kdprof.methods._divergences import REDUCTIONS, pixel_kl
from kdprof.methods._recipes import BPKD_RERUN, cirkd, cirkd_segformer, mmseg, skd

EPS = 1e-8
"""Vectors of this length or less have no direction, as in torch's cosine similarity."""


def intra_class_variation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Return the mean over N, h, w of ( cos_S - cos_T )^2; void adds 0 but counts in the divisor.

    Args:
        student, teacher: features, (N, C, h, w); the C may differ.
        labels: (N, H, W), resized to the grid by nearest; values of ``num_classes`` and above are
            void.
    """
    student = match_grid(student, teacher)
    members = membership(labels, teacher.shape[-2:], num_classes)
    return F.mse_loss(class_similarity(student, members), class_similarity(teacher, members))


def class_similarity(features: Tensor, members: Tensor) -> Tensor:
    """Return the cosine of every position with the mean feature of its class in its image.

    Args:
        features: (N, C, h, w).
        members: (N, h w, K) of :func:`membership`.

    Returns:
        (N, h w), 0 where void.

    It takes two batched matrix products with the one-hot labels. The similarities with all
    prototypes are (N, h w, K), smaller than the features, and no tensor of the features' size is
    created. The published loop over classes writes a map of that size several times for each class.
    """
    flat = features.float().flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        prototypes = flat @ members / (members.sum(1, keepdim=True) + 1e-6)
        length = prototypes.norm(dim=1, keepdim=True)
        directions = (prototypes / length.clamp(min=EPS)).masked_fill(length <= EPS, 0)
        similar = flat.mT @ directions
    # A product and a sum, because the backward of a gather is not deterministic on a GPU.
    similar = (similar * members).sum(2)
    length = flat.norm(dim=1)
    # A position of length 0 has no direction; divided by EPS, its gradient would overflow half
    # precision.
    return (similar / length.clamp(min=EPS)).masked_fill(length <= EPS, 0)


class IFVDPlain(Method):
    """IFVD without its discriminator: the two terms of pixels (not published as such).

    For each image and class k, prototype m_k = sum_{p: y_p = k} f_p / (count + 1e-6);
    c_p = cos(f_p, m_{y_p}); L_ifv = mean_p ( c^S_p - c^T_p )^2 on head features f. The weights are
    those of the authors' script: 200, plus kd 10 in the element-mean form.

    The authors compare a void pixel with itself, so its term is 0 unless its feature is 0. Here it
    is always 0, and a feature of length 0 has no gradient.
    """

    name = "ifvd:plain"
    title = "Intra-class feature variation, no discriminator"
    paper = "ECCV 2020"
    family = "relational + logit"
    taps = ("head", "logits", "labels")
    weights = {"ifv": 200.0, "kd": 10.0}
    equation = (
        "m_k = mean of f over the pixels of class k in an image; c_p = cos( f_p, m_{y_p} ); L_ifv "
        "= mean over N, h, w of ( c^S_p - c^T_p )^2"
    )
    cost_drivers = (
        "the teacher's forward; class means and cosines as products with the one-hot labels, of "
        "positions x classes x channels"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        skd(
            source="an issue of the IFVD repository, ifv alone (schedule not stated)",
            gpus=None,
            iterations=None,
            batch=None,
            crop=None,
            optimizer="not stated",
            schedule="not stated",
            weights={"kd": 0.0},
            student_miou=None,
            miou=58.89,
        ),
    )

    kd_reduction: str = "element"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"kd_reduction": REDUCTIONS})

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Store the number of classes."""
        self.num_classes = student.num_classes

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``ifv`` and ``kd``."""
        ifv = intra_class_variation(student.head, teacher.head, labels, self.num_classes)
        kd = pixel_kl(student.logits, teacher.logits, reduction=self.kd_reduction)
        return {"ifv": ifv, "kd": kd}


class IFVD(AdversarialMethod, IFVDPlain):
    """Intra-class feature variation distillation (Wang et al., ECCV 2020), the authors' script.

    For each image and class k, prototype m_k = sum_{p: y_p = k} f_p / (count + 1e-6), with head
    features f and labels y that are resized by nearest; c_p = cos(f_p, m_{y_p});
    L_ifv = mean over N, h, w of ( c^S_p - c^T_p )^2. Void pixels add 0 but count in the divisor.
    The gradient flows through the student's prototypes.

    Weights 200 ifv + 10 kd (element mean, T = 1) + 0.001 adv, where adv = - mean D(z_S). The
    discriminator is trained after the student's step at weight 0.1: WGAN with gradient penalty 10
    (0.1 x 10 = 1), Adam 4e-4 (0.9, 0.99); its learning rate decays with the student's. The paper's
    text has ifv 50; 200 is from the authors' code. Reproductions range from 63.7 to 73.6.
    """

    name = "ifvd"
    title = "Intra-class feature variation distillation"
    paper = "ECCV 2020"
    family = "relational + logit + adversarial"
    weights = {"ifv": 200.0, "kd": 10.0, "adv": 0.001}
    auxiliary_weights = {"discriminator": 0.1, "gradient_penalty": 1.0}
    auxiliary_decays = True
    equation = (
        "m_k = mean of f over the pixels of class k in an image; c_p = cos( f_p, m_{y_p} ); L_ifv "
        "= mean over N, h, w of ( c^S_p - c^T_p )^2; adv = - mean D(z_S)"
    )
    cost_drivers = (
        "the teacher's forward; products with the one-hot labels; a discriminator forward and "
        "backward with a gradient penalty (differentiated twice)"
    )
    recipes = (
        skd(source="the IFVD paper", gpu="TITAN Xp", teacher_miou=78.56, miou=74.54),
        skd(
            source="IFVD repository, released weights (reproductions range from 63.7 to 73.6)",
            gpu="TITAN Xp",
            teacher_miou=78.32,
            miou=74.18,
        ),
        mmseg(teacher_miou=79.74, student_miou=74.23, miou=76.24, **BPKD_RERUN),
        mmseg(
            "PSPNet-R18",
            "ADE20K",
            teacher_miou=44.39,
            student_miou=33.30,
            miou=34.54,
            **BPKD_RERUN,
        ),
    )

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
    cost_drivers = (
        "the teacher's forward; products with the one-hot labels; a discriminator, forward and "
        "backward"
    )
    recipes = (
        cirkd("DeepLabV3-R18", miou=75.59),
        cirkd("DeepLabV3-MobileNetV2", miou=73.50),
        cirkd("PSPNet-R18", source="CIRKD repository (mIoU recalled, not re-verified)", miou=73.71),
        cirkd_segformer(miou=76.30),
    )

    kd_reduction: str = "pixel"
    adversarial: ClassVar[str] = "hinge"
