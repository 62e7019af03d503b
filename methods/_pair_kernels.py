"""The comparison of two similarity maps on a GPU: each map is read twice, and one is written once.

torch's own operators read or write a map twenty times. The kernels are in ``_pair_triton.py``; here
they are operators of torch, which it can trace, compile and count.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64
"""Rows and columns of a map that one program of a kernel processes."""


def compare_maps(student: Tensor, teacher: Tensor, both: bool) -> Tensor:
    """Do the same as :func:`kdprof.methods._pairs.compare_maps`, but keep the teacher's map."""
    sums = torch.ops.kdprof.pair_tile_sums(student, teacher).sum(3)
    torch.ops.kdprof.pair_slope_(student, teacher, sums, both)
    return sums


@torch.library.custom_op("kdprof::pair_tile_sums", mutates_args=(), device_types="cuda")
def tile_sums(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sums over the rows and the columns of each tile of two (pairs, P, P) maps.

    The result is (2, 3, pairs, tiles of a side, P); its sum over the tiles is that of the maps.
    """
    from kdprof.methods import _pair_triton

    sums = _empty_sums(student, teacher)
    _pair_triton.tile_sums(student, teacher, sums, TILE)
    return sums


@tile_sums.register_fake
def _empty_sums(student: Tensor, teacher: Tensor) -> Tensor:
    pairs, positions, _ = student.shape
    return student.new_empty(2, 3, pairs, -(-positions // TILE), positions)


@torch.library.custom_op("kdprof::pair_slope_", mutates_args=("student",), device_types="cuda")
def write_slope(student: Tensor, teacher: Tensor, sums: Tensor, both: bool) -> None:
    """Write the slope of the KL over the student's map, given the sums of both maps."""
    from kdprof.methods import _pair_triton

    _pair_triton.write_slope(student, teacher, sums, both, TILE)


@write_slope.register_fake
def _write_nothing(student: Tensor, teacher: Tensor, sums: Tensor, both: bool) -> None:
    return None
