"""The comparison of two similarity maps on a GPU: each map is read twice and written once.

torch's operators read or write the maps twenty times. The kernels themselves are in
``_pair_triton.py``; here they are operators of torch, which it can trace, compile and count.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from kdprof.hardware.blocks import device_type

TILE = 64
"""Rows and columns of a map that one program of a kernel processes."""


def usable(tensor: Tensor) -> bool:
    """Return whether the work of a tensor is done by these kernels."""
    if device_type(tensor) != "cuda":
        return False
    return tensor.device.type != "cuda" or find_spec("triton") is not None


def compare_maps(student: Tensor, teacher: Tensor, both: bool) -> Tensor:
    """Do the same as :func:`kdprof.methods._pairs.compare_maps`; the teacher's map is kept."""
    sums = tile_sums(student, teacher).sum(3)
    write_slope(student, teacher, sums, both)
    return sums


@torch.library.custom_op("kdprof::pair_tile_sums", mutates_args=(), device_types="cuda")
def tile_sums(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sums over the rows and columns of each tile of two (pairs, P, P) maps.

    The result is (2, 3, pairs, tiles of a side, P); its sum over the tiles is that of the maps.
    """
    from kdprof.methods import _pair_triton

    sums = _sums_of_tiles(student, teacher)
    _pair_triton.tile_sums(student, teacher, sums, TILE)
    return sums


@tile_sums.register_fake
def _sums_of_tiles(student: Tensor, teacher: Tensor) -> Tensor:
    pairs, positions, _ = student.shape
    return student.new_empty(2, 3, pairs, -(-positions // TILE), positions)


@torch.library.custom_op("kdprof::pair_slope_", mutates_args=("student",), device_types="cuda")
def write_slope(student: Tensor, teacher: Tensor, sums: Tensor, both: bool) -> None:
    """Write the slope of the KL over the student's map, given the sums of both maps."""
    from kdprof.methods import _pair_triton

    _pair_triton.write_slope(student, teacher, sums, both, TILE)


@write_slope.register_fake
def _no_slope(student: Tensor, teacher: Tensor, sums: Tensor, both: bool) -> None:
    return None
