"""Random scale, crop, flip and colour of a batch. Every draw is a function of a counter.

Whoever reads images (a loader process) only looks up what is needed: the part of each image that
its crop touches, where in it every pixel of the crop lies, and the draws. All arithmetic on pixels
is done for the whole batch on the step's device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdprof.data.streams import Stream, generator
from kdprof.errors import UserError
from kdprof.method import IGNORE

FILL = 128
"""Brightness, of 255, where a crop reaches beyond its image; such pixels are labelled void."""
RETRIES = 10
"""How often a crop that shows too little else than one class is drawn again; mmsegmentation's."""
OUTSIDE = -1
"""The nearest source pixel of such a pixel."""
Sample = tuple[Tensor, Tensor]
"""An image, uint8 (3, H, W), and its label, uint8 (H, W)."""


@dataclass(frozen=True)
class Draw:
    """The random choices for one image. Colour factors are None where they are not applied."""

    scale: float
    top: float
    left: float
    """Where the crop lies in what the resized image leaves over, as a fraction."""
    flip: bool
    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    contrast_last: bool
    retries: tuple[tuple[float, float], ...] = ()
    """Other ``top`` and ``left``, one after the other where a crop shows too much of one class."""


class Gathered(NamedTuple):
    """What the crops of N images are made from, before any arithmetic on pixels.

    Only the touched part of an image is in it, which is never more than the image: with scales of
    0.5 to 2 about as many bytes as the finished crops on average, and 1 / scale^2 times as many for
    one image.
    """

    planes: Tensor
    """(4, P) uint8: red, green, blue and label of every image's part, row by row, one image after
    the other."""
    places: Tensor
    """(N, 3, h + w) int32: the lower, the upper and the nearest source row of each row of the crop,
    as the offset in ``planes`` at which it begins, then likewise the columns. Nearest is
    :data:`OUTSIDE` beyond the image."""
    weights: Tensor
    """(N, h + w) float32: of the upper neighbour."""
    colours: Tensor
    """(4, N) float32: added brightness, contrast, saturation, contrast after the other two."""
    hues: Tensor
    """(K,) float32: turns of the hue circle."""
    hued: Tensor
    """(K,) int64: the images whose hue turns."""

    def to(self, device: torch.device) -> Gathered:
        """Return this on a device; from pinned memory without waiting."""
        return Gathered(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class Augmentation:
    """Random resize within ``scale``, crop, horizontal flip and photometric distortion.

    The distortion is mmsegmentation's PhotoMetricDistortion: brightness +-32/255, contrast and
    saturation 0.5 to 1.5, hue +-18 of 180, each applied with probability 1/2, contrast before or
    after the other two; saturation multiplies the S of HSV. mmsegmentation rounds to whole values
    after each, this only at the end.
    """

    crop: tuple[int, int]
    """Height x width, pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    scale_step: float = 0.0
    """Scales are ``scale[0]`` and every such step above it; 0 = any."""
    fit: tuple[int, int] | None = None
    """What images are resized to fit before anything else, see :func:`fitting`."""
    max_class_share: float = 1.0
    """A crop is drawn again, at most :data:`RETRIES` times, while one class has this share of its
    pixels that are not void, or all of them. 1 = never."""

    def draw(self, seed: int, batch: int, slot: int) -> Draw:
        """Return the choices for one place in one batch: a pure function of its arguments."""
        rng = generator(Stream.AUGMENTATION, seed, batch, slot)
        scale, top, left, flip = rng.random(4)
        factors: list[float | None] = [
            float(value) if on < 0.5 and self.photometric else None
            for on, value in zip(
                rng.random(4),
                rng.uniform([-32 / 255, 0.5, 0.5, -0.1], [32 / 255, 1.5, 1.5, 0.1]),
                strict=True,
            )
        ]
        late, retries = rng.random() < 0.5, ()
        if self.max_class_share < 1:
            retries = tuple(map(tuple, rng.random((RETRIES, 2))))
        scale = self._scale(scale)
        return Draw(scale, top, left, flip < self.flip, *factors, late, retries)

    def _scale(self, place: float) -> float:
        low, high = self.scale
        if not self.scale_step:
            return low + (high - low) * place
        count = math.floor((high - low) / self.scale_step + 1e-9) + 1
        return low + self.scale_step * math.floor(place * count)

    def gather(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Gathered:
        """Look up what the crops of N images, whatever their sizes, are made from.

        Raises:
            UserError: more pixels than the indices can count.
        """
        windows = [
            self._window(label, draw) for (_, label), draw in zip(samples, draws, strict=True)
        ]
        rows, columns = [row for row, _ in windows], [column for _, column in windows]
        columns = [c.flipped() if d.flip else c for c, d in zip(columns, draws, strict=True)]
        hued = [number for number, draw in enumerate(draws) if draw.hue is not None]
        places = torch.from_numpy(_places(rows, columns))
        return Gathered(
            _planes(samples, rows, columns),
            places,
            torch.from_numpy(_weights(rows, columns)),
            torch.tensor([_factors(draw) for draw in draws]).T.contiguous(),
            torch.tensor([draws[number].hue for number in hued], dtype=torch.float32),
            torch.tensor(hued, dtype=torch.int64),
        )

    def _window(self, label: Tensor, draw: Draw) -> tuple[_Axis, _Axis]:
        """Return the rows and columns of a crop: the first that is no one class, or the last."""
        size, scale = label.shape, draw.scale * fitting(label.shape, self.fit)
        for top, left in ((draw.top, draw.left), *draw.retries):
            row = _axis(size[0], self.crop[0], scale, top)
            column = _axis(size[1], self.crop[1], scale, left)
            if not draw.retries or _class_share(label, row, column) < self.max_class_share:
                break
        return row, column

    def apply(self, batch: Gathered) -> tuple[Tensor, Tensor]:
        """Return the crops on the device that ``batch`` is on, without synchronising: images uint8
        (N, 3, h, w) and labels uint8 (N, h, w), :data:`IGNORE` where void.

        Scale, crop and flip are one interpolation that computes the crop alone: bilinear for the
        image, nearest for the label.
        """
        rows, columns = batch.places.split(self.crop, dim=2)
        outside = (rows[:, 2] < 0)[:, :, None] | (columns[:, 2] < 0)[:, None]
        # Of pixels beyond the image some pixel is read, and overwritten.
        nearest = _index(rows[:, 2].clamp(min=0), columns[:, 2].clamp(min=0))
        labels = batch.planes[3].index_select(0, nearest.view(-1)).view(nearest.shape)
        images = _interpolated(batch, rows, columns)
        if self.photometric:
            images.div_(255)
            _distort(images, batch)
            images.mul_(255)
        images = images.round_().to(torch.uint8, memory_format=torch.contiguous_format)
        return images.masked_fill_(outside[:, None], FILL), labels.masked_fill_(outside, IGNORE)


def fitting(size: Sequence[int], fit: tuple[int, int] | None) -> float:
    """Return the factor that makes an image as large as fits: its longer side into the longer of
    ``fit``, its shorter into the shorter; 1 where ``fit`` is None.

    mmsegmentation's resize with ``keep_ratio``.
    """
    if fit is None:
        return 1.0
    return min(max(fit) / max(size), min(fit) / min(size))


def fitted_size(
    size: Sequence[int], fit: tuple[int, int] | None, scale: float = 1.0
) -> tuple[int, int]:
    """Return the height and width of an image that is resized to fit and then scaled."""
    factor = scale * fitting(size, fit)
    height, width = (max(1, round(factor * length)) for length in size)
    return height, width


# Looking up, on the CPU, per image


@dataclass(frozen=True)
class _Axis:
    """Where the pixels of a crop lie along one axis of their image."""

    low: np.ndarray
    high: np.ndarray
    nearest: np.ndarray
    """Source pixels, OUTSIDE beyond the image."""
    weight: np.ndarray
    """Of ``high``."""
    start: int
    stop: int
    """The pixels that are read."""

    def flipped(self) -> _Axis:
        turned = (a[::-1] for a in (self.low, self.high, self.nearest, self.weight))
        return _Axis(*turned, self.start, self.stop)


def _axis(length: int, crop: int, scale: float, place: float) -> _Axis:
    """Return where a crop lies along an axis of ``length`` pixels.

    The resized image is ``scale`` times the source, rounded to whole pixels; the crop starts at a
    whole pixel of it, so that scale 1 copies pixels. Positions are float64, pixel 0 at 0; the edge
    pixel continues outwards.
    """
    resized = max(1, round(length * scale))
    start = round((resized - crop) * place)
    positions = (np.arange(start, start + crop) + 0.5) * (length / resized) - 0.5
    lower = np.floor(positions).astype(np.int64)
    low, high = lower.clip(0, length - 1), (lower + 1).clip(0, length - 1)
    nearest = np.floor(positions + 0.5).astype(np.int64)
    nearest[(nearest < 0) | (nearest >= length)] = OUTSIDE
    weight = (positions - lower).astype(np.float32)
    return _Axis(low, high, nearest, weight, int(low[0]), int(high[-1]) + 1)


def _class_share(label: Tensor, row: _Axis, column: _Axis) -> float:
    """Return the share of the class that a crop shows most, of its pixels that are not void; of a
    crop without any, 1."""
    rows, columns = (axis.nearest[axis.nearest != OUTSIDE] for axis in (row, column))
    crop = torch.from_numpy(label.numpy()[rows].take(columns, 1))
    counts = torch.bincount(crop.view(-1), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def _planes(samples: Sequence[Sample], rows: Sequence[_Axis], columns: Sequence[_Axis]) -> Tensor:
    parts = [
        (slice(r.start, r.stop), slice(c.start, c.stop)) for r, c in zip(rows, columns, strict=True)
    ]
    areas = [(r.stop - r.start) * (c.stop - c.start) for r, c in parts]
    planes = torch.empty((4, sum(areas)), dtype=torch.uint8)
    for (image, label), part, out in zip(samples, parts, planes.split(areas, 1), strict=True):
        source = label[part]
        out = out.unflatten(1, source.shape)
        out[:3] = image[:, part[0], part[1]]
        out[3] = source
    return planes


def _places(rows: Sequence[_Axis], columns: Sequence[_Axis]) -> np.ndarray:
    """Return the offsets of source rows and columns, (N, 3, h + w) int32."""
    found, begin = [], 0
    for row, column in zip(rows, columns, strict=True):
        width = column.stop - column.start
        offsets = [begin + width * (y - row.start) for y in (row.low, row.high, row.nearest)]
        across = [x - column.start for x in (column.low, column.high, column.nearest)]
        offsets[2][row.nearest == OUTSIDE] = across[2][column.nearest == OUTSIDE] = OUTSIDE
        found.append(np.concatenate([np.stack(offsets), np.stack(across)], 1))
        begin += width * (row.stop - row.start)
    if begin > np.iinfo(np.int32).max:
        raise UserError(f"a batch reads {begin:.1e} pixels, over 2^31; lower step.batch")
    return np.stack(found).astype(np.int32)


def _weights(rows: Sequence[_Axis], columns: Sequence[_Axis]) -> np.ndarray:
    return np.stack(
        [np.concatenate([r.weight, c.weight]) for r, c in zip(rows, columns, strict=True)]
    )


def _factors(draw: Draw) -> list[float]:
    """Return brightness, contrast, saturation and late contrast; what is not applied changes no
    bit: + 0, x 1."""
    contrast = 1.0 if draw.contrast is None else draw.contrast
    return [
        draw.brightness or 0.0,
        1.0 if draw.contrast_last else contrast,
        1.0 if draw.saturation is None else draw.saturation,
        contrast if draw.contrast_last else 1.0,
    ]


# Arithmetic, on the device, for all images of a batch at once. In place where it can be: fresh
# memory costs as much as the arithmetic.


def _index(rows: Tensor, columns: Tensor) -> Tensor:
    """Return where the pixels at rows (N, h) and columns (N, w) are in a plane: (N, h, w)."""
    return rows[:, :, None] + columns[:, None]


def _interpolated(batch: Gathered, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the bilinear crops in 0 to 255, (N, 3, h, w) float32.

    Against grid_sample: positions are float64, and a copy (scale 1) is exact by construction.
    """
    down, across = batch.weights.split([rows.shape[2], columns.shape[2]], dim=1)
    down, across = down[:, :, None], across[:, None]
    row_step = (rows[:, 1] - rows[:, 0])[:, :, None]
    column_step = (columns[:, 1] - columns[:, 0])[:, None]
    planes, index = batch.planes[:3].float(), _index(rows[:, 0], columns[:, 0])
    left, right, below = (planes.new_empty(3, *index.shape) for _ in range(3))

    def read(pixels: Tensor) -> Tensor:
        for plane, out in zip(planes, pixels, strict=True):
            torch.index_select(plane, 0, index.view(-1), out=out.view(-1))
        return pixels

    read(left)
    index += row_step
    left.lerp_(read(below), down)
    index += column_step
    read(below)
    index -= row_step
    return left.lerp_(read(right).lerp_(below, down), across).transpose(0, 1)


def _distort(images: Tensor, batch: Gathered) -> None:
    """Apply the colour factors to images in 0 to 1."""
    brightness, contrast, saturation, late_contrast = batch.colours[..., None, None, None]
    images.add_(brightness).clamp_(0, 1).mul_(contrast).clamp_(0, 1)
    _saturate(images, saturation)
    hued = images[batch.hued]
    _turn(hued, batch.hues[:, None, None])
    images[batch.hued] = hued
    images.mul_(late_contrast).clamp_(0, 1)


def _saturate(images: Tensor, factor: Tensor) -> None:
    """Multiply the S of HSV, at most to 1; hue and value stay.

    A channel lies below the value V by its share of the chroma C = V S, and shares stay: it moves
    to V - f (V - x), with f at most V / C.
    """
    value, chroma = _value_and_chroma(images)
    factor = torch.minimum(factor, value / chroma)
    images.lerp_(value, 1 - factor)


def _value_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the V of HSV and V S, (N, 1, h, w); of greys a chroma that can be divided by."""
    value = images.amax(1, keepdim=True)
    return value, (value - images.amin(1, keepdim=True)).clamp_(min=1e-9)


def _turn(images: Tensor, turns: Tensor) -> None:
    """Turn the H of HSV of images in 0 to 1 by turns (N, 1, 1) of the circle; S and V stay."""
    value, chroma = _value_and_chroma(images)
    largest = images == value
    (red, green, blue), chroma, value = images.unbind(1), chroma[:, 0], value[:, 0]
    sixths = (red - green).div_(chroma).add_(4)
    sixths = torch.where(largest[:, 1], (blue - red).div_(chroma).add_(2), sixths)
    sixths = torch.where(largest[:, 0], (green - blue).div_(chroma), sixths).add_(turns, alpha=6)
    for channel, offset in enumerate((5, 3, 1)):
        # The usual way back: V - C max(0, min(k, 4 - k, 1)) with k = (offset + sixths) mod 6.
        place = sixths + offset
        place.sub_(place.div(6).floor_(), alpha=6)
        lacking = torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma)
        torch.sub(value, lacking, out=images[:, channel])
