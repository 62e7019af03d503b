"""Normalised feature distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import adaptor, check_settings, match_grid
from kdprof.methods._standardise import standardise

FORMS = ("mean_square", "norm")


class NFD(Method):
    """Normalised feature distillation (Liu, Yang & Chen 2022, arXiv 2207.05256).

    g(f) = (f - mean) / std for each image and channel over h, w. The loss is an L2 distance of
    g(A f_S) and g(f_T). There is no mask. The authors announced code, but none was found: the
    layer, the power, the reduction, the weight and the schedule are not known.

    Assumed here: f is the head feature (input of the last 1x1 classifier); A is a 1x1 convolution
    C_S -> C_T if the channels differ, without the bias that other versions have, because g removes
    it; std is that of the population plus 1e-6; L = mean over N, C, h, w of the squared difference,
    which is 2 (1 - mean of Pearson's correlation); with weight 5 it equals ``pkd`` with its weight
    of 10 and the statistics of each image. ``form = "norm"`` is the form of two third-party
    versions, || g(A f_S) - g(f_T) || / (h w), not squared, with the norm over the whole batch. If
    the grids differ, the adapted student is resized bilinearly to the teacher's grid (kdprof's
    rule).
    """

    name = "nfd"
    title = "Normalised feature distillation"
    paper = "arXiv 2207.05256 (2022)"
    family = "feature"
    taps = ("head",)
    weights = {"nfd": 5.0}
    equation = (
        "g(f) = ( f - mean_hw f ) / std_hw f; L = mean over N, C, h, w of ( g(A f_S) - g(f_T) )^2"
    )
    cost_drivers = (
        "the teacher's forward; a 1x1 convolution and two reductions over each head feature"
    )

    form: str = "mean_square"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"form": FORMS})

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor."""
        self.adaptor = adaptor(student, teacher, "head")

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``nfd``."""
        adapted = match_grid(self.adaptor(student.head), teacher.head)
        ours, theirs = (standardise(f, (2, 3), correction=0) for f in (adapted, teacher.head))
        if self.form == "mean_square":
            return {"nfd": F.mse_loss(ours, theirs)}
        distance = torch.linalg.vector_norm(ours - theirs)
        return {"nfd": distance / teacher.head.shape[-2:].numel()}
