"""Channel-wise distillation and its published variants."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import adaptor, check_settings, match_grid
from kdprof.methods._discriminator import AdversarialMethod
from kdprof.methods._divergences import channel_kl, pixel_kl
from kdprof.methods._recipes import BPKD_RERUN, cirkd, cirkd_segformer, mmseg, skd

NORMS = ("channel", "spatial")
DIVERGENCES = ("kl", "mse")


def channel_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 / (N C) sum (p_S - p_T)^2, p as in :func:`channel_kl` at T = 1.

    This is TorchDistiller's ``mse``.
    """
    student = match_grid(student, teacher)
    p, q = (F.softmax(z.float().flatten(2), dim=2) for z in (student, teacher))
    return (p - q).square().sum() / p.shape[:2].numel()


class CWD(Method):
    """Channel-wise knowledge distillation (Shu et al., ICCV 2021, arXiv 2011.13256), on logits.

    For each image and channel p is a softmax over positions,
    p_{c,i} = exp(z_{c,i}/T) / sum_j exp(z_{c,j}/T);
    L = T^2 / (N C) sum_{n,c} KL( p^T_{n,c} || p^S_{n,c} ). T = 4, weight 3, without pixel-wise kd
    and without discriminator, as in the authors' TorchDistiller command. There is no label mask.

    ``norm = "spatial"`` takes the softmax over channels at each position and divides by N h w,
    which is kd. ``divergence = "mse"`` is the squared difference of the softmax maps, at T = 1.

    The authors compute log(softmax), which is -inf or NaN for peaked maps. Here it is log-softmax,
    which gives the same number wherever theirs is finite.
    """

    name = "cwd"
    title = "Channel-wise distillation (logits)"
    paper = "ICCV 2021, arXiv 2011.13256"
    family = "logit"
    taps = ("logits",)
    weights = {"cwd": 3.0}
    equation = (
        "p_c,i = exp(z_c,i / T) / sum_j exp(z_c,j / T); L = T^2 / (N C) sum_{n,c} KL( p^T_n,c || "
        "p^S_n,c )"
    )
    cost_drivers = (
        "the teacher's forward; a softmax and a KL over the positions of every class, which cost "
        "little"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        skd(
            source="TorchDistiller repository; test 73.86 (student alone from structure KD)",
            miou=75.02,
        ),
        skd(
            source="TorchDistiller repository, other weights; test 74.58 (student alone from "
            "structure KD)",
            miou=75.90,
        ),
        mmseg(
            iterations=40_000,
            batch=None,
            gpus=None,
            student_miou=71.2,
            miou=74.7,
            source="an issue of the TorchDistiller repository (weight 40; the map is not stated)",
        ),
        mmseg(teacher_miou=79.74, student_miou=74.23, miou=76.26, **BPKD_RERUN),
        mmseg(
            "PSPNet-R18",
            "ADE20K",
            teacher_miou=44.39,
            student_miou=33.30,
            miou=37.02,
            **BPKD_RERUN,
        ),
    )

    temperature: float = 4.0
    norm: str = "channel"
    divergence: str = "kl"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"norm": NORMS, "divergence": DIVERGENCES}, positive=("temperature",))
        if self.divergence == "mse" and (self.norm, self.temperature) != ("channel", 1.0):
            raise UserError(
                f"method '{self.name}': divergence 'mse' is defined only for norm 'channel' and "
                "temperature 1; set both"
            )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``cwd``."""
        if self.divergence == "mse":
            return {"cwd": channel_mse(student.logits, teacher.logits)}
        divergence = channel_kl if self.norm == "channel" else pixel_kl
        return {"cwd": divergence(student.logits, teacher.logits, self.temperature)}


class CWDMmrazor(CWD):
    """Channel-wise distillation on logits as mmrazor configures it: T = 1, weight 5.

    See ``cwd`` for the equation. On ADE20K the weight is 10 (set it in ``method_settings``).
    """

    name = "cwd:mmrazor"
    title = "Channel-wise distillation (logits, mmrazor)"
    weights = {"cwd": 5.0}
    recipes = (
        mmseg(source="mmrazor model zoo", teacher_miou=79.76, student_miou=74.87, miou=75.54),
    )

    temperature: float = 1.0


class CWDFeature(Method):
    """Channel-wise distillation of the head feature.

    L is that of ``cwd`` with the softmax p of A f_S and of f_T; A = 1x1 convolution C_S -> C_T
    without bias, batch norm, ReLU. T = 4, divided by N C_T, weight 50 (TorchDistiller; the weight
    is from memory of the paper, its example scripts use 35-40). The authors' code has a leaky ReLU
    before the ReLU, which together are the ReLU. They never decay the adaptor's learning rate; here
    it decays with the student's.
    """

    name = "cwd:feature"
    title = "Channel-wise distillation (feature)"
    paper = "ICCV 2021, arXiv 2011.13256"
    family = "feature"
    taps = ("head",)
    weights = {"cwd_feature": 50.0}
    equation = (
        "L = T^2 / (N C_T) sum_{n,c} KL( p^T_n,c || p^S_n,c ), p = softmax over positions of A "
        "f_S and f_T"
    )
    cost_drivers = (
        "the teacher's forward; a 1x1 convolution with norm; softmaxes over the teacher's head "
        "channels"
    )
    recipes = (skd(source="TorchDistiller repository"),)

    temperature: float = 4.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor."""
        channels = teacher.channels["head"]
        self.adaptor = nn.Sequential(
            nn.Conv2d(student.channels["head"], channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``cwd_feature``."""
        adapted = self.adaptor(student.head)
        return {"cwd_feature": channel_kl(adapted, teacher.head, self.temperature)}


class CWDCirkd(AdversarialMethod):
    """Channel-wise distillation as CIRKD re-implements and quotes it: feature and logits together.

    50 feature + 3 logits (both T = 4) + kd 1 + adversarial 0.001, with a hinge discriminator
    trained at weight 0.1 (Adam 4e-4, betas 0.9 and 0.99, constant). The adaptor is a 1x1
    convolution without bias or norm; it exists only if the channels differ. The feature term sums
    over C_T channels but is divided by N C_S, the channels before the adaptor: at 128 -> 512 it is
    four times the definition. SegFormer students use 5 and 0.3 instead of 50 and 3.
    """

    name = "cwd:cirkd"
    title = "Channel-wise distillation (CIRKD's bundle)"
    paper = "ICCV 2021, arXiv 2011.13256; bundle of arXiv 2204.06986"
    family = "logit + feature + adversarial"
    taps = ("head", "logits")
    weights = {"cwd_feature": 50.0, "cwd": 3.0, "kd": 1.0, "adv": 0.001}
    auxiliary_weights = {"discriminator": 0.1}
    equation = (
        "L_cwd of the logits; L_feature = T^2 / (N C_S) sum KL( p^T || p^S ) of A f_S and f_T; "
        "adv = - mean D(z_S)"
    )
    cost_drivers = (
        "the teacher's forward; softmaxes over the teacher's head channels; a discriminator, "
        "forward and backward, for student and teacher logits"
    )
    recipes = (
        cirkd("DeepLabV3-R18", miou=75.55),
        cirkd("DeepLabV3-MobileNetV2", miou=74.66),
        cirkd("PSPNet-R18", source="CIRKD repository (mIoU recalled, not re-verified)", miou=74.36),
        cirkd_segformer(weights={"cwd_feature": 5.0, "cwd": 0.3}, miou=74.80),
    )

    temperature: float = 4.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor and the discriminator."""
        self.adaptor = adaptor(student, teacher, "head")
        super().build(student, teacher)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``cwd_feature``, ``cwd``, ``kd`` and ``adv``."""
        divisor = student.head.shape[1]
        adapted = self.adaptor(student.head)
        return {
            "cwd_feature": channel_kl(adapted, teacher.head, self.temperature, divisor),
            "cwd": channel_kl(student.logits, teacher.logits, self.temperature),
            "kd": pixel_kl(student.logits, teacher.logits),
            "adv": self.adversarial_term(student, teacher),
        }
