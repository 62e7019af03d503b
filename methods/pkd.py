"""Pearson feature distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid

EPS = 1e-6
"""Added to a standard deviation, as published."""

RESIZED = ("student", "teacher")


def standardise(features: Tensor, dims: tuple[int, ...], correction: int) -> Tensor:
    """Return (f - mean) / (std + 1e-6) over ``dims`` of (N, C, h, w), in float32.

    Args:
        correction: what the count is lessened by in the variance: 1 unbiased, 0 population.

    A constant channel becomes 0, and passes no gradient: divided by 1e-6 it would overflow half
    precision.
    """
    features = features.float()
    count = features.shape[2:].numel() * (features.shape[0] if 0 in dims else 1)
    std, mean = torch.std_mean(features, dims, correction=correction * (count > 1), keepdim=True)
    # The mean is subtracted first: f * scale - mean * scale has no digit left of a channel whose
    # mean is far above its spread.
    return (features - mean) * torch.where(std > EPS, 1 / (std + EPS), 0.0)


def adaptor(student: NetworkInfo, teacher: NetworkInfo, tap: str) -> nn.Module:
    """Return a 1x1 convolution to the teacher's channels, nothing where they are equal.

    Without a bias: standardised channels do not depend on it.
    """
    before, after = student.channels[tap], teacher.channels[tap]
    return nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False)


class PKD(Method):
    """PKD: distillation via the Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039).

    g(f) = (f - mean) / (std + 1e-6) for each channel over N, h, w, std unbiased;
    L = 1/2 mean over N, C, h, w of ( g(A f_S) - g(f_T) )^2 = 1 - mean_c of Pearson's correlation,
    up to a factor of 1 - 1 / (N h w). Weight 10 (mmrazor's RetinaNet). No mask. The statistics
    depend on the images per device.

    Published for the neck levels of detectors; nothing is published for segmentation. Assumed
    here: f the head feature, A a 1x1 convolution C_S -> C_T without bias where channels differ (the
    published one needs equal channels), and the weight. Where grids differ the adapted student is
    resized bilinearly to the teacher's grid; ``resized = "teacher"`` does the reverse, as in
    mmrazor.
    """

    name = "pkd"
    title = "Pearson feature distillation"
    paper = "NeurIPS 2022, arXiv 2207.02039"
    family = "feature"
    taps = ("head",)
    weights = {"pkd": 10.0}
    equation = (
        "g(f) = ( f - mean ) / std over N, h, w; L = 1/2 mean over N, C, h, w of ( g(A f_S) - "
        "g(f_T) )^2"
    )
    cost_drivers = (
        "the teacher's forward; a 1x1 convolution and two reductions over each head feature"
    )

    resized: str = "student"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"resized": RESIZED})

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor."""
        self.adaptor = adaptor(student, teacher, "head")

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``pkd``."""
        ours, theirs = self.adaptor(student.head), teacher.head
        if self.resized == "student":
            ours = match_grid(ours, theirs)
        else:
            theirs = match_grid(theirs, ours)
        ours, theirs = (standardise(f, (0, 2, 3), correction=1) for f in (ours, theirs))
        return {"pkd": 0.5 * F.mse_loss(ours, theirs)}
