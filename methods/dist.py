"""Knowledge distillation from a stronger teacher (DIST): correlations instead of values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Taps
from kdprof.methods._common import GroupedMethod, check_settings, grouped, match_grid
from kdprof.methods._recipes import cirkd

EPS = 1e-8
"""Added to the product of the lengths in a correlation, as published."""


def relations(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    intra_over: str = "pixels",
    group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the unweighted (inter, intra) terms of two maps of logits, (N, C, h, w).

    Args:
        temperature: divides the logits; both terms are multiplied by its square.
        intra_over: what a class is correlated over, ``pixels`` or ``images``; see :class:`DIST`.
        group: images over which a class is correlated, a divisor of N; None: all.
    """
    student = match_grid(student, teacher)
    p, q = (F.softmax(z.float() / temperature, dim=1) for z in (student, teacher))
    inter = 1 - pearson(p, q, (1,)).mean()
    p, q = (grouped(values, group or len(values)) for values in (p, q))
    intra = 1 - pearson(p, q, (1, 3, 4) if intra_over == "pixels" else (1,)).mean()
    return temperature**2 * inter, temperature**2 * intra


def pearson(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the correlation of a and b over ``dims``; 0 where one of them is constant."""
    a, b = (x - x.mean(dims, keepdim=True) for x in (a, b))
    lengths = (torch.linalg.vector_norm(x, dim=dims) for x in (a, b))
    return (a * b).sum(dims) / (next(lengths) * next(lengths) + EPS)


class DIST(GroupedMethod):
    """DIST: KD from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    With p = softmax(z) over classes at each of the M = N h w positions of the device's batch:
    L_inter = 1 - mean_m r( p^S_{m,:}, p^T_{m,:} ), r over the classes at a position;
    L_intra = 1 - mean_c r( p^S_{:,c}, p^T_{:,c} ), r over all M positions for a class. r is
    Pearson's correlation:
    r(a, b) = <a - mean a, b - mean b> / ( ||a - mean a|| ||b - mean b|| + 1e-8 ).

    The loss is beta L_inter + gamma L_intra on the logits, beta = gamma = 1: the weights ``inter``
    and ``intra``. The same is added on the auxiliary logits at 0.4, so the teacher's auxiliary head
    is needed too. There is no temperature, no ignore mask and no kd. The intra term correlates over
    the images of a device, 2 of them in the published runs: ``images_per_group = 2``.

    ``temperature`` divides the logits and multiplies the terms by its square (as in mmrazor).
    ``intra_over = "images"`` correlates over the batch axis only, at each class and position; this
    is what mmrazor's class computes on maps. Where p is constant, r is 0 and not 1, even if teacher
    = student: for a uniform p at a position, or a class whose p is below about 1e-6 everywhere. If
    the grids differ, the student's logits are resized bilinearly to the teacher's (kdprof's rule).
    """

    name = "dist"
    title = "Knowledge distillation from a stronger teacher"
    paper = "NeurIPS 2022, arXiv 2205.10536"
    family = "logit + relational"
    taps = ("logits", "aux")
    weights = {"inter": 1.0, "intra": 1.0, "aux_inter": 0.4, "aux_intra": 0.4}
    equation = (
        "L_inter = 1 - mean_m r( p^S_m:, p^T_m: ); L_intra = 1 - mean_c r( p^S_:c, p^T_:c ), r "
        "Pearson's"
    )
    cost_drivers = (
        "the teacher's forward with its auxiliary head; softmax and reductions over N C h w, which "
        "cost little"
    )
    recipes = (
        cirkd(
            "DeepLabV3-R18",
            optimizer="SGD 0.02, momentum 0.9, wd 5e-4",
            schedule="poly 0.9, floor 1e-4",
            gpu="V100",
            source="DIST repository (student alone from CIRKD, at wd 1e-4; reproduced 77.24 to "
            "77.54)",
            miou=77.10,
        ),
        cirkd(
            "PSPNet-R18",
            optimizer="SGD 0.02, momentum 0.9, wd 5e-4",
            schedule="poly 0.9, floor 1e-4",
            gpu="V100",
            source="DIST repository (student alone from CIRKD, at wd 1e-4; reproduced 75.37 to "
            "75.53)",
            miou=76.31,
        ),
    )

    temperature: float = 1.0
    intra_over: str = "pixels"

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"intra_over": ("pixels", "images")}, positive=("temperature",))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``inter``, ``intra``, ``aux_inter`` and ``aux_intra``."""
        how = self.temperature, self.intra_over, self.group_size(len(student.logits))
        inter, intra = relations(student.logits, teacher.logits, *how)
        aux_inter, aux_intra = relations(student.aux, teacher.aux, *how)
        return {"inter": inter, "intra": intra, "aux_inter": aux_inter, "aux_intra": aux_intra}
