"""The Triton kernels of ``_pair_kernels.py``. Importing this needs Triton.

A program has one tile of a map of one pair. It adds in a fixed order and shares no sum with another
program, so the results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def _tile_sums(student, teacher, sums, pairs, positions, SIDE: tl.constexpr):
    """Store sums of exp a, exp b and (a - b) exp a over the rows and the columns of a tile."""
    column_tile, row_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(0)
    rows = row_tile * SIDE + tl.arange(0, SIDE)
    columns = column_tile * SIDE + tl.arange(0, SIDE)
    there = (rows < positions)[:, None] & (columns < positions)[None, :]
    at = (pair * positions + rows[:, None]) * positions + columns[None, :]
    a = tl.load(teacher + at, mask=there, other=0.0)
    b = tl.load(student + at, mask=there, other=0.0)
    x, y = tl.where(there, tl.exp(a), 0.0), tl.where(there, tl.exp(b), 0.0)
    gap = (a - b) * x

    # sums: direction, value, pair, tile across the direction, position
    step = pairs * tiles * positions
    of_rows = sums + (pair * tiles + column_tile) * positions + rows
    tl.store(of_rows, tl.sum(x, 1), mask=rows < positions)
    tl.store(of_rows + step, tl.sum(y, 1), mask=rows < positions)
    tl.store(of_rows + 2 * step, tl.sum(gap, 1), mask=rows < positions)
    of_columns = sums + 3 * step + (pair * tiles + row_tile) * positions + columns
    tl.store(of_columns, tl.sum(x, 0), mask=columns < positions)
    tl.store(of_columns + step, tl.sum(y, 0), mask=columns < positions)
    tl.store(of_columns + 2 * step, tl.sum(gap, 0), mask=columns < positions)


@triton.jit
def _write_slope(
    student,
    teacher,
    sums,
    pairs,
    positions,
    BOTH: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Overwrite a tile of b with exp(b) / sum exp(b) - exp(a) / sum exp(a), of rows + columns."""
    column_tile, row_tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row_tile * SIDE + tl.arange(0, SIDE)
    columns = column_tile * SIDE + tl.arange(0, SIDE)
    there = (rows < positions)[:, None] & (columns < positions)[None, :]
    at = (pair * positions + rows[:, None]) * positions + columns[None, :]
    x = tl.exp(tl.load(teacher + at, mask=there, other=0.0))
    y = tl.exp(tl.load(student + at, mask=there, other=0.0))

    # sums: direction, value, pair, position
    step = pairs * positions
    of_rows = sums + pair * positions + rows
    share_x = 1 / tl.load(of_rows, mask=rows < positions, other=1.0)[:, None]
    share_y = 1 / tl.load(of_rows + step, mask=rows < positions, other=1.0)[:, None]
    if BOTH:
        of_columns = sums + 3 * step + pair * positions + columns
        share_x += 1 / tl.load(of_columns, mask=columns < positions, other=1.0)[None, :]
        share_y += 1 / tl.load(of_columns + step, mask=columns < positions, other=1.0)[None, :]
    tl.store(student + at, y * share_y - x * share_x, mask=there)


def tile_sums(student: Tensor, teacher: Tensor, sums: Tensor, side: int) -> None:
    """Fill ``sums``, (2, 3, pairs, tiles of a side, P), from two contiguous (pairs, P, P) maps."""
    pairs, positions, _ = student.shape
    _tile_sums[_grid(student, side)](
        student, teacher, sums, pairs, positions, SIDE=side, num_warps=WARPS
    )


def write_slope(student: Tensor, teacher: Tensor, sums: Tensor, both: bool, side: int) -> None:
    """Overwrite the student's map; ``sums`` are the contiguous (2, 3, pairs, P) of the maps."""
    pairs, positions, _ = student.shape
    _write_slope[_grid(student, side)](
        student, teacher, sums, pairs, positions, BOTH=both, SIDE=side, num_warps=WARPS
    )


def _grid(maps: Tensor, side: int) -> tuple[int, int, int]:
    pairs, positions, _ = maps.shape
    tiles = triton.cdiv(positions, side)
    return tiles, tiles, pairs
