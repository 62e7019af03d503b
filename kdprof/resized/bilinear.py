"""The bilinear resize as two matrix products, one per side, for any block of its output.

It is torch's resize (``F.interpolate(mode="bilinear")``): with ``align_corners`` the centres of the
corner pixels coincide, otherwise their outer corners do and the border is repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Span = slice
"""A slice with a start and a stop, step 1."""

BAND_ROWS = 128
"""Rows of a block of output. A product with the rows' weights costs 2 FLOP per input row that the
block reads, so a block must not be high."""


class Axis(NamedTuple):
    """One side of a resize. Output position o lies at p(o) / unit in the input, with
    p(o) = slope o + offset, limited to 0 .. unit (low - 1). These are integers, so every device
    reads the same pixels."""

    low: int
    high: int
    slope: int
    offset: int
    unit: int

    @classmethod
    def of(cls, low: int, high: int, align_corners: bool) -> Axis:
        """Return the side of a resize from ``low`` to ``high`` positions."""
        if align_corners:
            return cls(low, high, max(low - 1, 1), 0, max(high - 1, 1))
        return cls(low, high, 2 * low, low - high, 2 * high)

    def weights(self, like: Tensor) -> Tensor:
        """Return the (high, low) matrix of the resize, with the dtype and device of ``like``."""
        outputs = torch.arange(self.high, device=like.device)
        position = (self.slope * outputs + self.offset).clamp(0, self.unit * (self.low - 1))
        inputs = torch.arange(self.low, device=like.device)
        distance = (position.double() / self.unit)[:, None] - inputs
        return (1 - distance.abs()).clamp_(min=0).to(like.dtype)

    def read_by(self, outputs: Span) -> Span:
        """Return the input positions that a span of output positions is computed from."""
        first, last = self._cell(outputs.start), self._cell(outputs.stop - 1)
        return slice(first, min(last + 2, self.low))

    def _cell(self, output: int) -> int:
        return min(max(self.slope * output + self.offset, 0) // self.unit, self.low - 1)


class Resize:
    """The resize of contiguous (N, C, h, w) maps to ``size``, block by block, and its transpose.

    A block is all channels of some images, rows and columns of the output.
    """

    def __init__(self, maps: Tensor, size: tuple[int, int], align_corners: bool):
        height, width = maps.shape[-2:]
        self._rows = Axis.of(height, size[0], align_corners)
        self._columns = Axis.of(width, size[1], align_corners)
        self._row_weights = self._rows.weights(maps)
        self._column_weights = self._columns.weights(maps)

    def block(self, maps: Tensor, rows: Span, columns: Span, out: Tensor) -> Tensor:
        """Write the block of all images of ``maps`` into ``out``, (N, C, rows, columns)."""
        low_rows, low_columns = self._rows.read_by(rows), self._columns.read_by(columns)
        wide = maps[..., low_rows, low_columns] @ self._column_weights[columns, low_columns].mT
        weights = self._row_weights[rows, low_rows].expand(len(maps) * maps.shape[1], -1, -1)
        torch.bmm(weights, wide.flatten(0, 1), out=out.view(-1, *out.shape[-2:]))
        return out

    def add_transposed(self, block: Tensor, rows: Span, columns: Span, to: Tensor) -> None:
        """Add to ``to``, (N, C, h, w), the gradient that a block's gradient gives to the maps."""
        low_rows, low_columns = self._rows.read_by(rows), self._columns.read_by(columns)
        weights = self._row_weights[rows, low_rows].mT
        flat = block.reshape(-1, *block.shape[-2:])
        short = torch.bmm(weights.expand(len(flat), -1, -1), flat)
        small = short @ self._column_weights[columns, low_columns]
        to[..., low_rows, low_columns] += small.view(*block.shape[:2], *small.shape[-2:])


@torch.library.custom_op(
    "kdprof::resize_bilinear_backward",
    mutates_args=(),
    schema="(Tensor gradient, int height, int width, bool align_corners) -> Tensor",
)
def _resize_backward(gradient: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    made = gradient.new_zeros(*gradient.shape[:2], height, width)
    with torch.autocast(gradient.device.type, enabled=False):
        resize = Resize(made, (gradient.shape[-2], gradient.shape[-1]), align_corners)
        for top in range(0, gradient.shape[-2], BAND_ROWS):
            rows = slice(top, min(top + BAND_ROWS, gradient.shape[-2]))
            resize.add_transposed(gradient[..., rows, :], rows, slice(0, gradient.shape[-1]), made)
    return made


@_resize_backward.register_fake
def _(gradient: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return gradient.new_empty(*gradient.shape[:2], height, width)


def resize_backward(gradient: Tensor, size: torch.Size, align_corners: bool = False) -> Tensor:
    """Return the gradient of maps of ``size``, given that of their bilinearly resized form.

    Args:
        gradient: (N, C, H, W), float32 or float64.
        size: height and width of the maps.

    It is deterministic on every device, because each element is a sum in a fixed order; torch's own
    operator adds atomically on a GPU. Its matrix products run in TF32 there if torch may use it.
    Autograd does not see it, so it cannot be differentiated.
    """
    return _resize_backward(gradient, *size, align_corners)
