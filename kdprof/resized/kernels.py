"""Triton kernels on bilinearly resized logits that keep the resized logits in registers.

A *cell* is the output pixels between four neighbouring positions of the input, its corners. Cell
(a, b) has the corners in rows a and a + 1 and in columns b and b + 1; at the last row or column
both are the same. All logits of a cell are weighted sums of the same four vectors. Pixels are found
with integers (:class:`kdprof.resized.bilinear.Axis`), so all kernels agree on the cell of each.

Nothing is added atomically: each output belongs to one program, which adds in a fixed order.

Only :mod:`kdprof.resized.tiles` imports this module, because Triton is not everywhere. With
``TRITON_INTERPRET=1`` the kernels run on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdprof.method import IGNORE
from kdprof.resized.bilinear import Axis

MOST_CLASSES, MOST_PIXELS = 8, 128
"""Sides of a tile. Each thread has two pixels and all classes of the tile in registers: more of
them would spill, and 19 classes in a tile of 32 would leave 13 of its rows unused."""
CELLS = 8
"""Neighbouring cells of a row that a program walks along. The gradient of a column of corners has
parts of the cells on both sides, so a program computes one cell more than it has corners."""


@triton.jit
def _first(cell, low, high, slope, offset, unit):
    """Return the first output position of a cell, or the length after the last cell."""
    place = (tl.maximum(unit * cell - offset, 0) + slope - 1) // slope
    place = tl.minimum(place, high)
    return tl.where(cell <= 0, 0, tl.where(cell >= low, high, place))


@triton.jit
def _fraction(output, cell, low, slope, offset, unit, REAL: tl.constexpr):
    """Return how far output positions lie from the cell's first corner to its second, 0 to 1."""
    position = tl.minimum(tl.maximum(output * slope + offset, 0), unit * (low - 1))
    return (position - cell * unit).to(REAL) * (tl.full((), 1.0, REAL) / unit)


@triton.jit
def _corner(image, place, inside, REAL: tl.constexpr):
    """Return the logits of some classes at one input position, as a column."""
    return tl.load(image + place, mask=inside, other=0.0).to(REAL)[:, None]


@triton.jit
def _between(upper_left, upper_right, lower_left, lower_right, down, right):
    """Return the resized logits (classes, pixels) at fractions between four corners."""
    top = upper_left + (upper_right - upper_left) * right[None, :]
    bottom = lower_left + (lower_right - lower_left) * right[None, :]
    return top + (bottom - top) * down[None, :]


@triton.jit
def _resized(
    image, c, classes, a, b, height, width, step_c, step_h, step_w, down, right, REAL: tl.constexpr
):
    """Return the logits of classes c at pixels of cell (a, b), and -inf for no class."""
    inside, place = c < classes, c * step_c
    upper, lower = image + a * step_h, image + tl.minimum(a + 1, height - 1) * step_h
    first, second = b * step_w, tl.minimum(b + 1, width - 1) * step_w
    z = _between(
        _corner(upper + first, place, inside, REAL), _corner(upper + second, place, inside, REAL),
        _corner(lower + first, place, inside, REAL), _corner(lower + second, place, inside, REAL),
        down, right,
    )  # fmt: skip
    return tl.where(inside[:, None], z, float("-inf"))


@triton.jit
def _loss_kernel(
    logits, step_n, step_c, step_h, step_w, classes, height, width, high, wide,
    down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
    labels, label_n, label_h, label_w, norm, losses,
    VOID: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Write the logarithm of the softmax's denominator of each pixel, and the loss of some cells.

    Program (s, a, n) has the cells s CELLS to (s + 1) CELLS - 1 of row a of image n.
    """
    strip, a, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    logits += n * step_n
    labels += n * label_n
    norm += n * high * wide
    top = _first(a, height, high, down_slope, down_offset, down_unit)
    bottom = _first(a + 1, height, high, down_slope, down_offset, down_unit)
    pixel = tl.arange(0, ROWS * COLUMNS)
    loss = tl.zeros([ROWS * COLUMNS], REAL)
    for b in range(strip * CELLS, tl.minimum(strip * CELLS + CELLS, width)):
        left = _first(b, width, wide, right_slope, right_offset, right_unit)
        end = _first(b + 1, width, wide, right_slope, right_offset, right_unit)
        for y0 in range(top, bottom, ROWS):
            for x0 in range(left, end, COLUMNS):
                y, x = y0 + pixel // COLUMNS, x0 + pixel % COLUMNS
                inside = (y < bottom) & (x < end)
                down = _fraction(y, a, height, down_slope, down_offset, down_unit, REAL)
                right = _fraction(x, b, width, right_slope, right_offset, right_unit, REAL)
                label = tl.load(labels + y * label_h + x * label_w, mask=inside, other=VOID)
                label = label.to(tl.int32)
                largest = tl.full([ROWS * COLUMNS], float("-inf"), REAL)
                total = tl.zeros([ROWS * COLUMNS], REAL)
                chosen = tl.zeros([ROWS * COLUMNS], REAL)
                for begin in range(0, classes, CLASSES):
                    c = begin + tl.arange(0, CLASSES)
                    z = _resized(
                        logits, c, classes, a, b, height, width, step_c, step_h, step_w,
                        down, right, REAL,
                    )  # fmt: skip
                    larger = tl.maximum(largest, tl.max(z, 0))
                    total *= tl.exp(largest - larger)
                    total += tl.sum(tl.exp(z - larger[None, :]), 0)
                    chosen += tl.sum(tl.where(c[:, None] == label[None, :], z, 0.0), 0)
                    largest = larger
                log_norm = largest + tl.log(total)
                tl.store(norm + y * wide + x, log_norm, mask=inside)
                # No program can raise an error without the host waiting for it.
                is_class = (label >= 0) & (label < classes)
                found = tl.where(is_class, log_norm - chosen, float("nan"))
                loss += tl.where(label == VOID, 0.0, found)
    program = (n * tl.num_programs(1) + a) * tl.num_programs(0) + strip
    tl.store(losses + program, tl.sum(loss, 0))


@triton.jit
def _add_cell(
    own, carried, upper_left, upper_right, lower_left, lower_right, c,
    labels, label_h, label_w, norm, wide, a, b, top, bottom, left, end, height, width,
    down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
    BELOW: tl.constexpr, VOID: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """Add what a cell gives to its left corner (own) and to its right one (carried), both in its
    upper row, or in its lower row if the cell is not BELOW them; summed over pixels later."""
    pixel = tl.arange(0, ROWS * COLUMNS)
    for y0 in range(top, bottom, ROWS):
        for x0 in range(left, end, COLUMNS):
            y, x = y0 + pixel // COLUMNS, x0 + pixel % COLUMNS
            inside = (y < bottom) & (x < end)
            down = _fraction(y, a, height, down_slope, down_offset, down_unit, REAL)
            right = _fraction(x, b, width, right_slope, right_offset, right_unit, REAL)
            label = tl.load(labels + y * label_h + x * label_w, mask=inside, other=VOID)
            label = label.to(tl.int32)
            log_norm = tl.load(norm + y * wide + x, mask=inside, other=float("inf"))
            z = _between(upper_left, upper_right, lower_left, lower_right, down, right)
            slope = tl.exp(z - log_norm[None, :]) - (c[:, None] == label[None, :]).to(REAL)
            share = tl.where(label == VOID, 0.0, 1 - down if BELOW else down)
            own += slope * (share * (1 - right))[None, :]
            carried += slope * (share * right)[None, :]
    return own, carried


@triton.jit
def _gradient_kernel(
    logits, step_n, step_c, step_h, step_w, classes, height, width, high, wide,
    down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
    labels, label_n, label_h, label_w, norm, gradient, to_n, to_c, to_h, to_w,
    VOID: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the loss to the logits at some input positions.

    Program (s, i, g) has the positions s CELLS to (s + 1) CELLS - 1 of row i, for the classes of
    group g of an image. It walks along the cells to the right of each position, in the rows of
    cells above and below it. What a cell gives to the position at its right is carried to the next.
    """
    strip, i, groups = tl.program_id(0), tl.program_id(1), tl.cdiv(classes, CLASSES)
    n = (tl.program_id(2) // groups).to(tl.int64)
    c = tl.program_id(2) % groups * CLASSES + tl.arange(0, CLASSES)
    known = c < classes
    logits += n * step_n
    labels += n * label_n
    norm += n * high * wide
    gradient += n * to_n + i * to_h
    above = logits + tl.maximum(i - 1, 0) * step_h
    here = logits + i * step_h
    below = logits + tl.minimum(i + 1, height - 1) * step_h
    top = _first(i - 1, height, high, down_slope, down_offset, down_unit)
    middle = _first(i, height, high, down_slope, down_offset, down_unit)
    bottom = _first(i + 1, height, high, down_slope, down_offset, down_unit)
    place = tl.maximum(strip * CELLS - 1, 0) * step_w + c * step_c
    above_left = _corner(above, place, known, REAL)
    here_left = _corner(here, place, known, REAL)
    below_left = _corner(below, place, known, REAL)
    carried = tl.zeros([CLASSES, ROWS * COLUMNS], REAL)
    for b in range(strip * CELLS - 1, tl.minimum(strip * CELLS + CELLS, width)):
        left = _first(b, width, wide, right_slope, right_offset, right_unit)
        end = _first(b + 1, width, wide, right_slope, right_offset, right_unit)
        place = tl.minimum(b + 1, width - 1) * step_w + c * step_c
        above_right = _corner(above, place, known, REAL)
        here_right = _corner(here, place, known, REAL)
        below_right = _corner(below, place, known, REAL)
        own = carried
        carried = tl.zeros([CLASSES, ROWS * COLUMNS], REAL)
        own, carried = _add_cell(
            own, carried, above_left, above_right, here_left, here_right, c,
            labels, label_h, label_w, norm, wide, i - 1, b, top, middle, left, end, height, width,
            down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
            False, VOID, ROWS, COLUMNS, REAL,
        )  # fmt: skip
        own, carried = _add_cell(
            own, carried, here_left, here_right, below_left, below_right, c,
            labels, label_h, label_w, norm, wide, i, b, middle, bottom, left, end, height, width,
            down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
            True, VOID, ROWS, COLUMNS, REAL,
        )  # fmt: skip
        if b >= strip * CELLS:
            tl.store(gradient + c * to_c + b * to_w, tl.sum(own, 1), mask=known)
        above_left, here_left, below_left = above_right, here_right, below_right


@triton.jit
def _argmax_kernel(
    logits, step_n, step_c, step_h, step_w, classes, height, width, high, wide,
    down_slope, down_offset, down_unit, right_slope, right_offset, right_unit,
    found,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    REAL: tl.constexpr,
):  # fmt: skip
    """Write the class of the largest logit of each pixel, of equal ones the first."""
    strip, a, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    logits += n * step_n
    found += n * high * wide
    top = _first(a, height, high, down_slope, down_offset, down_unit)
    bottom = _first(a + 1, height, high, down_slope, down_offset, down_unit)
    pixel = tl.arange(0, ROWS * COLUMNS)
    for b in range(strip * CELLS, tl.minimum(strip * CELLS + CELLS, width)):
        left = _first(b, width, wide, right_slope, right_offset, right_unit)
        end = _first(b + 1, width, wide, right_slope, right_offset, right_unit)
        for y0 in range(top, bottom, ROWS):
            for x0 in range(left, end, COLUMNS):
                y, x = y0 + pixel // COLUMNS, x0 + pixel % COLUMNS
                down = _fraction(y, a, height, down_slope, down_offset, down_unit, REAL)
                right = _fraction(x, b, width, right_slope, right_offset, right_unit, REAL)
                largest = tl.full([ROWS * COLUMNS], float("-inf"), REAL)
                best = tl.zeros([ROWS * COLUMNS], tl.int32)
                for begin in range(0, classes, CLASSES):
                    c = begin + tl.arange(0, CLASSES)
                    z = _resized(
                        logits, c, classes, a, b, height, width, step_c, step_h, step_w,
                        down, right, REAL,
                    )  # fmt: skip
                    larger = tl.max(z, 0)
                    first = tl.min(tl.where(z == larger[None, :], c[:, None], classes), 0)
                    best = tl.where(larger > largest, first, best)
                    largest = tl.maximum(largest, larger)
                tl.store(found + y * wide + x, best, mask=(y < bottom) & (x < end))


def cross_entropy(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the log-sum-exp of each pixel, (N, H, W)."""
    real, grid = real_of(logits), _grid(logits, len(logits))
    norm = torch.empty(labels.shape, dtype=real, device=logits.device)
    losses = torch.empty(grid, dtype=real, device=logits.device)
    pixels = labels, *labels.stride(), norm, losses
    _launch(_loss_kernel, grid, logits, _size(labels), align_corners, *pixels, VOID=IGNORE)
    return losses.sum(), norm


def cross_entropy_backward(
    logits: Tensor, labels: Tensor, norm: Tensor, align_corners: bool
) -> Tensor:
    """Return the gradient of the summed loss to the logits, in their memory layout.

    Args:
        norm: the log-sum-exp of each pixel.
    """
    gradient = torch.empty_like(logits, dtype=real_of(logits))
    grid = _grid(logits, triton.cdiv(logits.shape[1], _classes(logits)) * len(logits))
    pixels = labels, *labels.stride(), norm, gradient, *gradient.stride()
    _launch(_gradient_kernel, grid, logits, _size(labels), align_corners, *pixels, VOID=IGNORE)
    return gradient


def argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return the class of each pixel's largest logit, (N, H, W) int64."""
    found = torch.empty(len(logits), *size, dtype=torch.int64, device=logits.device)
    _launch(_argmax_kernel, _grid(logits, len(logits)), logits, size, align_corners, found)
    return found


def real_of(logits: Tensor) -> torch.dtype:
    """Return the type that the kernels compute in: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _size(labels: Tensor) -> tuple[int, int]:
    return labels.shape[-2], labels.shape[-1]


def _classes(logits: Tensor) -> int:
    return min(triton.next_power_of_2(logits.shape[1]), MOST_CLASSES)


def _grid(logits: Tensor, last: int) -> tuple[int, int, int]:
    return triton.cdiv(logits.shape[3], CELLS), logits.shape[2], last


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    logits: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    *rest: Any,
    **constants: Any,
) -> None:
    """Launch a kernel with tiles of a cell's usual size, or of a part of a large cell."""
    sides = list(zip(logits.shape[-2:], size, strict=True))
    axes = [n for low, high in sides for n in Axis.of(low, high, align_corners)[2:]]
    rows, columns = (triton.next_power_of_2(-(-high // low)) for low, high in sides)
    columns = min(columns, MOST_PIXELS)
    rows = min(rows, MOST_PIXELS // columns)
    with torch.cuda.device_of(logits):
        kernel[grid](
            logits, *logits.stride(), *logits.shape[1:], *size, *axes, *rest,
            CELLS=CELLS, CLASSES=_classes(logits), ROWS=rows, COLUMNS=columns,
            REAL=tl.float64 if logits.dtype == torch.float64 else tl.float32,
            num_warps=max(1, rows * columns // 64), **constants,
        )  # fmt: skip
