"""What several methods share: grids that differ, and checks of settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.nn.functional as F
from torch import Tensor

from kdprof.errors import UserError, unknown
from kdprof.method import Method


def match_grid(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's (N, C, h, w) map on the teacher's grid, bilinear where they differ.

    kdprof's rule for networks of different output stride; the originals all use equal grids.
    """
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)


def check_settings(
    method: Method,
    choices: Mapping[str, Collection[str]] | None = None,
    positive: Collection[str] = (),
) -> None:
    """Raise a UserError that names every setting outside its ``choices`` or not ``positive``."""
    problems = [
        f"method '{method.name}': {unknown(name, getattr(method, name), valid)}"
        for name, valid in (choices or {}).items()
        if getattr(method, name) not in valid
    ]
    problems += [
        f"method '{method.name}': {name} must be above 0, not {getattr(method, name)!r}"
        for name in positive
        if not getattr(method, name) > 0
    ]
    if problems:
        raise UserError(*problems)
