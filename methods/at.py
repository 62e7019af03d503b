"""Attention transfer."""

from __future__ import annotations

from torch import Tensor

from kdprof.method import Method, Taps
from kdprof.methods._attention import energy, unit_maps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import pixel_kl
from kdprof.methods._recipes import cirkd


def attention_gap(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    """Return the mean over N, h, w of ( a(f_S) - a(f_T) )^2, a = the unit energy map of an image.

    Args:
        student, teacher: features, (N, C, h, w); the C may differ.
        power: exponent of the feature in its energy.
    """
    # The energies are resized instead of the features, which is 1 / C of the work.
    ours, theirs = energy(student, power), energy(teacher, power)
    return (unit_maps(match_grid(ours, theirs)) - unit_maps(theirs)).square().mean()


class AT(Method):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928).

    a(f) = q / ||q||_2 with the energy q_p = mean_c f_{c,p}^2 of every position p; the norm is over
    the positions of an image. L = mean over N, h, w of ( a(f_S) - a(f_T) )^2. f is the head feature
    (input of the last 1x1 classifier). The channels may differ, so there is no adaptor. There is no
    mask. The weight is 10000, plus pixel-wise kd with weight 1 (CIRKD's code). Two unit vectors
    without a negative entry are at most sqrt(2) apart, so L is at most 2 / (h w); the large weight
    compensates for that mean.

    The paper sums |f|^2 and the squared distance over several layers. Its authors' code, CIRKD and
    mmrazor take both means, as here. If the grids differ, the student's energy is resized
    bilinearly to the teacher's grid (kdprof's rule).
    """

    name = "at"
    title = "Attention transfer"
    paper = "ICLR 2017, arXiv 1612.03928"
    family = "attention"
    taps = ("head", "logits")
    weights = {"at": 10_000.0, "kd": 1.0}
    equation = (
        "a(f) = q / ||q||, q_p = mean_c f_cp^2; L = mean over N, h, w of ( a(f_S) - a(f_T) )^2"
    )
    cost_drivers = "the teacher's forward; one pass over each head feature, which costs little"
    recipes = (
        cirkd("DeepLabV3-R18"),
        cirkd("PSPNet-R18"),
    )

    power: int = 2
    temperature: float = 1.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("power", "temperature"))

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``at`` and ``kd``."""
        return {
            "at": attention_gap(student.head, teacher.head, self.power),
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
        }
