"""Canonical feature distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import pixel_kl
from kdprof.methods._recipes import cirkd


class FitNet(Method):
    """FitNets: hints for thin deep nets (Romero et al., ICLR 2015, arXiv 1412.6550).

    L = mean over N, C_T, h, w of ( A f_S - f_T )^2, with f the head feature (input of the last 1x1
    classifier) and A a 1x1 convolution C_S -> C_T without bias or norm, which is always present and
    is trained with the student. The weight is 10, plus pixel-wise kd with weight 1 (CIRKD's code).

    The original is a two-stage hint at a middle layer; in segmentation it is used in one stage at
    the last feature. If the grids differ, the adapted feature is resized bilinearly to the
    teacher's (kdprof's rule).
    """

    name = "fitnet"
    title = "FitNet hint"
    paper = "ICLR 2015, arXiv 1412.6550"
    family = "feature"
    taps = ("head", "logits")
    weights = {"fitnet": 10.0, "kd": 1.0}
    equation = "L = mean over N, C_T, h, w of ( A f_S - f_T )^2"
    cost_drivers = (
        "the teacher's forward; a 1x1 convolution on the head feature (0.5 GMAC forward for 512 x "
        "1024 at 128 -> 512 channels)"
    )
    recipes = (
        cirkd("DeepLabV3-R18"),
        cirkd("PSPNet-R18"),
    )

    temperature: float = 1.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor."""
        self.adaptor = nn.Conv2d(student.channels["head"], teacher.channels["head"], 1, bias=False)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``fitnet`` and ``kd``."""
        adapted = match_grid(self.adaptor(student.head), teacher.head)
        return {
            "fitnet": F.mse_loss(adapted.float(), teacher.head.float()),
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
        }
