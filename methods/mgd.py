"""Masked generative distillation."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import channel_kl
from kdprof.methods._recipes import mgd


class Generator(nn.Module):
    """The layers that rebuild the teacher's feature: A, mask, conv3x3, ReLU, conv3x3.

    Args:
        before, after: channels of the student and of the teacher. The 1x1 convolution A (with a
            bias) exists only if they differ.
    """

    def __init__(self, before: int, after: int):
        super().__init__()
        self.align = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.rebuild = nn.Sequential(
            nn.Conv2d(after, after, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )

    def error(self, student: Tensor, teacher: Tensor, uniform: Tensor, ratio: float) -> Tensor:
        """Return the summed squared error of the rebuilt feature, divided by the images.

        Args:
            student, teacher: (N, C_S, h, w) and (N, C_T, h', w').
            uniform: random draws, (N, 1, h', w'); a position is masked if its draw is above
                1 - ratio.
        """
        aligned = match_grid(self.align(student), teacher)
        # Unlike dropout, it does not divide by the fraction that is kept.
        rebuilt = self.rebuild(aligned * (uniform <= 1 - ratio).to(aligned.dtype))
        return F.mse_loss(rebuilt.float(), teacher.float(), reduction="sum") / len(teacher)


class MGDFeature(Method):
    """Masked generative distillation without its logit term, as in the repository's README figures.

    See ``mgd`` for the equation.
    """

    name = "mgd:feature"
    title = "Masked generative distillation (feature only)"
    paper = "ECCV 2022, arXiv 2205.01529"
    family = "feature"
    taps: ClassVar[tuple[str, ...]] = ("c5",)
    weights = {"mgd": 2e-5}
    equation = (
        "L = 1 / N sum over N, C_T, h, w of ( G( m * A f_S ) - f_T )^2, m a random mask of "
        "positions"
    )
    cost_drivers = (
        "the teacher's forward; two 3x3 convolutions at the width of the teacher's c5, which from "
        "R18 to R101 cost more than teacher and student together"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        mgd("PSPNet-R18", miou=73.63),
        mgd("PSPNet-R18", source="an issue of the MGD repository (a third party)", miou=73.46),
    )

    mask_ratio: float = 0.75

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self)
        if not 0 <= self.mask_ratio <= 1:
            raise UserError(
                f"method '{self.name}': mask_ratio must be from 0 to 1, not {self.mask_ratio!r}"
            )

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the generator."""
        self.generator = Generator(student.channels["c5"], teacher.channels["c5"])

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``mgd``."""
        images, _, height, width = teacher.c5.shape
        uniform = torch.rand(images, 1, height, width, device=teacher.c5.device)
        return {"mgd": self.generator.error(student.c5, teacher.c5, uniform, self.mask_ratio)}


class MGD(MGDFeature):
    """Masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529), with logits.

    L = 1 / N sum over N, C_T, h, w of ( G( m * A f_S ) - f_T )^2, with f the last backbone stage
    (c5), A a 1x1 convolution C_S -> C_T with bias (none if C_S = C_T), and G conv3x3 - ReLU -
    conv3x3 with biases. m in {0, 1} is drawn again at every step, for each position, the same for
    all channels, and is 0 with probability ``mask_ratio`` = 0.75. The weight 2e-5 belongs to a sum,
    not to a mean. A and G are trained with the student.

    The released segmentation configurations add ``cwd`` on logits, T = 4, weight 3, and so does
    this method; tables rarely say which form they mean. ``mgd:feature`` is the form without it.
    From R18 to R101 the extras have 77 M parameters and cost 627 GMAC forward for a 512 x 1024
    image, more than the teacher. There is no label mask. If the grids differ, the adapted student
    is resized bilinearly (kdprof's rule).

    The paper's "512x1024" crop and "80k" teacher are typos according to its authors.
    """

    name = "mgd"
    title = "Masked generative distillation"
    family = "feature + logit"
    taps = ("c5", "logits")
    weights = {"mgd": 2e-5, "cwd": 3.0}
    recipes = (
        mgd("PSPNet-R18", source="the MGD paper, with logits", miou=74.10),
        mgd("PSPNet-R18", source="an issue of the MGD repository (a third party)", miou=74.95),
        mgd(
            "DeepLabV3-R18",
            source="MGD repository (its configuration has the logit term)",
            miou=76.31,
        ),
    )

    temperature: float = 4.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature",))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``mgd`` and ``cwd``."""
        terms = super().forward(student, teacher, labels)
        return {**terms, "cwd": channel_kl(student.logits, teacher.logits, self.temperature)}
