"""Double similarity distillation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, Recipe, Taps
from kdprof.methods._attention import energy, unit_maps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._recipes import cirkd, cirkd_segformer

NOISE = 1e-6
"""A difference of unit vectors of this length or less is a rounding error and has no direction."""


def residuals(energies: Sequence[Tensor]) -> Tensor:
    """Return r_mn = unit( a_n - a_m ) for every pair m < n of (N, 1, h, w), (pairs, N, h w)."""
    attention = [unit_maps(e) for e in energies]
    gap = torch.stack([later - earlier for earlier, later in combinations(attention, 2)])
    length = gap.norm(dim=2, keepdim=True)
    return torch.where(length > NOISE, gap / length.clamp(min=NOISE), 0.0)


def residual_gap(student: Sequence[Tensor], teacher: Sequence[Tensor], power: int = 2) -> Tensor:
    """Return the mean over pairs of maps, N, h, w of ( r^S - r^T )^2.

    Args:
        student, teacher: features, (N, C, h, w) each; the C may differ.
        power: exponent of the feature in its energy.

    All energies are resized to the grid of the teacher's last map if their grids differ.
    """
    # The energies are resized instead of the features, which is 1 / C of the work.
    energies = [[energy(f, power) for f in maps] for maps in (student, teacher)]
    grid = energies[1][-1]
    ours, theirs = (residuals([match_grid(e, grid) for e in maps]) for maps in energies)
    return (ours - theirs).square().mean()


def class_similarity(logits: Tensor, temperature: float, window: int = 2) -> Tensor:
    """Return G_kl = p_k . p_l, (N, K, K), p_k = softmax over positions of class k's pooled logits.

    The pooling is an average. At the border a window averages only the positions inside the map.
    """
    pooled = F.avg_pool2d(logits.float(), window, ceil_mode=True)
    p = F.softmax(pooled.flatten(2) / temperature, dim=2)
    with torch.autocast(logits.device.type, enabled=False):
        return p @ p.mT


def class_gap(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, window: int = 2
) -> Tensor:
    """Return the mean over N, K, K of ( G^S - G^T )^2 of (N, K, h, w) logits."""
    student = match_grid(student, teacher)
    ours, theirs = (class_similarity(z, temperature, window) for z in (student, teacher))
    return F.mse_loss(ours, theirs)


class DSD(Method):
    """Double similarity distillation (Feng et al., TIP 2021, arXiv 2107.08591), as CIRKD codes it.

    psd (pixels): a_m = unit energy map of tap m, q_p = mean_c f_{c,p}^2 divided by its norm over
    the positions, for the auxiliary logits, the head feature and the logits; r_mn = unit( a_n -
    a_m ) for the three pairs; psd = mean over pairs, N, h, w of ( r^S_mn - r^T_mn )^2.
    csd (categories): logits average-pooled 2 x 2, p_k = softmax over positions of class k at T = 4,
    G_kl = p_k . p_l; csd = mean over N, K, K of ( G^S - G^T )^2.

    Weights 1000 psd + 10 csd, without pixel-wise kd. An entry of p is about 1 / (pooled h w), so
    csd is 1e-8 to 2e-7 on a 64 x 128 grid: as published, it has practically no effect.

    The authors' own code was not found; CIRKD's is the default here. If the grids differ, energies
    and student logits are resized bilinearly to the teacher's grid (kdprof's rule). Two equal
    attention maps have a residual of 0 without gradient.
    """

    name = "dsd"
    title = "Double similarity distillation"
    paper = "TIP 2021, arXiv 2107.08591"
    family = "attention + relational"
    taps: ClassVar[tuple[str, ...]] = ("aux", "head", "logits")
    weights = {"psd": 1000.0, "csd": 10.0}
    equation = (
        "r_mn = unit( a_n - a_m ) of attention maps, L_psd = mean ( r^S_mn - r^T_mn )^2; G_kl = "
        "p_k . p_l of classes, L_csd = mean ( G^S - G^T )^2"
    )
    cost_drivers = (
        "the teacher's forward with its auxiliary head; attention maps and a similarity of the "
        "classes, which cost little"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (cirkd("DeepLabV3-R18", miou=74.81),)

    compared: ClassVar[tuple[str, ...]] = ("aux", "head", "logits")
    """The taps whose pairs the pixel term compares."""
    temperature: float = 4.0
    power: int = 2

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature", "power"))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``psd`` and ``csd``."""
        ours, theirs = ([getattr(taps, t) for t in self.compared] for taps in (student, teacher))
        return {
            "psd": residual_gap(ours, theirs, self.power),
            "csd": class_gap(student.logits, teacher.logits, self.temperature),
        }


class DSDNoAux(DSD):
    """Double similarity distillation of networks without an auxiliary head, as in CIRKD's code.

    The logits replace the auxiliary logits. One of the three pairs then compares the logits with
    themselves, which is 0, and the other two are the negative of each other. psd is therefore 2/3
    of that of the pair of head feature and logits. See ``dsd`` for the equation.
    """

    name = "dsd:no_aux"
    title = "Double similarity distillation, no auxiliary head"
    taps = ("head", "logits")
    cost_drivers = (
        "the teacher's forward; attention maps and a similarity of the classes, which cost little"
    )
    recipes = (
        cirkd("DeepLabV3-MobileNetV2", miou=74.11),
        cirkd_segformer(miou=76.62),
    )

    compared: ClassVar[tuple[str, ...]] = ("logits", "head", "logits")
