"""What several methods share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def match_grid(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's (N, C, h, w) map on the teacher's grid, bilinear where they differ.

    kdprof's rule for networks of different output stride; the originals all use equal grids.
    """
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
