"""Pearson feature distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdprof.method import NetworkInfo, Taps
from kdprof.methods._common import (
    GroupedMethod,
    adaptor,
    check_settings,
    grouped,
    match_grid,
)
from kdprof.methods._standardise import standardise

RESIZED = ("student", "teacher")


class PKD(GroupedMethod):
    """PKD: distillation via the Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039).

    g(f) = (f - mean) / (std + 1e-6) for each channel over N, h, w, std unbiased;
    L = 1/2 mean over N, C, h, w of ( g(A f_S) - g(f_T) )^2 = 1 - mean_c of Pearson's correlation,
    up to a factor of 1 - 1 / (N h w). Weight 10 (mmrazor's RetinaNet). There is no mask. The
    statistics are those of all images of a device; ``images_per_group = n`` takes n at a time.

    The method was published for the neck levels of detectors; nothing is published for
    segmentation. Assumed here: f is the head feature; A is a 1x1 convolution C_S -> C_T without
    bias if the channels differ (the published method needs equal channels); the weight. If the
    grids differ, the adapted student is resized bilinearly to the teacher's grid;
    ``resized = "teacher"`` does the reverse, as in mmrazor.
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
        group = self.group_size(len(ours))
        ours, theirs = (
            standardise(grouped(f, group), (1, 3, 4), correction=1) for f in (ours, theirs)
        )
        return {"pkd": 0.5 * F.mse_loss(ours, theirs)}
