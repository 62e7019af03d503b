"""Random scale, crop, flip and colour of a batch. Every draw is a function of a counter.

The process that reads the images (a loader process) only collects what is needed: the part of each
image that its crop touches, the position of every crop pixel in it, and the draws. All arithmetic
on pixels is done for the whole batch on the step's device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdprof.data.random_streams import Stream, generator
from kdprof.errors import UserError
from kdprof.method import IGNORE

FILL = 128
"""Brightness (0 to 255) of crop pixels that lie outside the image; they are labelled void."""
RETRIES = 10
"""The most times that a crop is drawn again because one class fills it; mmsegmentation's value."""
OUTSIDE = -1
"""Stands for the nearest source pixel of a crop pixel outside the image."""
Sample = tuple[Tensor, Tensor]
"""An image, uint8 (3, H, W), and its label, uint8 (H, W)."""


@dataclass(frozen=True)
class Draw:
    """The random choices for one image. Colour factors are None where they are not applied."""

    scale: float
    top: float
    left: float
    """Position of the crop: the fraction of the remaining pixels that lie above and left of it."""
    flip: bool
    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue: float | None
    contrast_last: bool
    retries: tuple[tuple[float, float], ...] = ()
    """Further ``top`` and ``left``, tried in order while one class fills too much of the crop."""


class Gathered(NamedTuple):
    """The source pixels and draws of N crops, before any arithmetic on pixels.

    Of each image it holds only the part that the crop touches. With scales of 0.5 to 2 this is on
    average about as many bytes as the finished crops, and 1 / scale^2 times as many for one image.
    """

    planes: Tensor
    """(4, P) uint8: red, green, blue and label of every image's part, row by row, one image after
    the other."""
    places: Tensor
    """(N, 3, h + w) int32: for each row of the crop the lower, the upper and the nearest source
    row, as the offset in ``planes`` at which that row begins; then the same for the columns.
    Nearest is :data:`OUTSIDE` outside the image."""
    weights: Tensor
    """(N, h + w) float32: weight of the upper neighbour."""
    colours: Tensor
    """(4, N) float32: added brightness, contrast, saturation, and the contrast that is applied
    after the other two."""
    hues: Tensor
    """(K,) float32: shift of the hue, in turns of the hue circle."""
    hued: Tensor
    """(K,) int64: the images whose hue is shifted."""

    def to(self, device: torch.device) -> Gathered:
        """Return the same tensors on a device. A copy from pinned memory does not block."""
        return Gathered(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class Augmentation:
    """Random resize within ``scale``, crop, horizontal flip and photometric distortion.

    The distortion is mmsegmentation's PhotoMetricDistortion: brightness +-32/255, contrast and
    saturation 0.5 to 1.5, hue +-18 of 180, each applied with probability 1/2, contrast before or
    after the other two; saturation multiplies the S of HSV. mmsegmentation rounds to whole values
    after each change, kdprof only once at the end.
    """

    crop: tuple[int, int]
    """Height x width, pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    scale_step: float = 0.0
    """Distance between the possible scales, which begin at ``scale[0]``; 0 = every scale."""
    fit: tuple[int, int] | None = None
    """Size that images are resized to fit into before anything else, see :func:`fitting`."""
    max_class_share: float = 1.0
    """A crop is drawn again, at most :data:`RETRIES` times, while one class has at least this share
    of its pixels that are not void, or while all of them are void. 1 = never."""

    def draw(self, seed: int, batch: int, slot: int) -> Draw:
        """Return the choices for one place in one batch: a pure function of its arguments."""
        rng = generator(Stream.AUGMENTATION, seed, batch, slot)
        scale, top, left, flip = rng.random(4)
        brightness, contrast, saturation, hue = (
            float(value) if on < 0.5 and self.photometric else None
            for on, value in zip(
                rng.random(4),
                rng.uniform([-32 / 255, 0.5, 0.5, -0.1], [32 / 255, 1.5, 1.5, 0.1]),
                strict=True,
            )
        )
        contrast_last = rng.random() < 0.5
        retries = rng.random((RETRIES, 2)) if self.max_class_share < 1 else ()
        return Draw(
            scale=self._scale(scale),
            top=top,
            left=left,
            flip=flip < self.flip,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            contrast_last=contrast_last,
            retries=tuple((above, before) for above, before in retries),
        )

    def _scale(self, place: float) -> float:
        low, high = self.scale
        if not self.scale_step:
            return low + (high - low) * place
        count = math.floor((high - low) / self.scale_step + 1e-9) + 1
        return low + self.scale_step * math.floor(place * count)

    def gather(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Gathered:
        """Collect the source pixels and draws of the crops of N images, which may differ in size.

        Raises:
            UserError: the batch has more pixels than the indices can count.
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
        """Return the rows and columns of the first crop that no class fills, or of the last."""
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

        Scale, crop and flip are one interpolation that computes only the crop: bilinear for the
        image, nearest for the label.
        """
        rows, columns = batch.places.split(self.crop, dim=2)
        outside = (rows[:, 2] < 0)[:, :, None] | (columns[:, 2] < 0)[:, None]
        # For a pixel outside the image any pixel is read; the result is overwritten below.
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
    """Return the largest factor at which an image fits: its longer side into the longer of ``fit``,
    its shorter side into the shorter; 1 if ``fit`` is None.

    This is mmsegmentation's resize with ``keep_ratio``.
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


# Source positions of the crop pixels: on the CPU, image by image


@dataclass(frozen=True)
class _Axis:
    """The source pixels of a crop's pixels along one axis of the image."""

    low: np.ndarray
    high: np.ndarray
    nearest: np.ndarray
    """OUTSIDE for a pixel outside the image."""
    weight: np.ndarray
    """Weight of ``high``."""
    start: int
    stop: int
    """The source pixels ``start`` to ``stop`` - 1 are read."""

    def flipped(self) -> _Axis:
        return replace(
            self,
            low=self.low[::-1],
            high=self.high[::-1],
            nearest=self.nearest[::-1],
            weight=self.weight[::-1],
        )


def _axis(length: int, crop: int, scale: float, place: float) -> _Axis:
    """Return the source pixels of a crop along an axis of ``length`` pixels.

    The resized image is ``scale`` times the source, rounded to whole pixels; the crop starts at a
    whole pixel of it, so that scale 1 copies pixels. Positions are float64, and pixel 0 is at 0.
    Outside the image the pixel at the edge is repeated.
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
    """Return the share of the most frequent class among a crop's pixels that are not void; 1 if all
    are void."""
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
    """Return brightness, contrast, saturation and late contrast. A factor that is not applied is
    + 0 or x 1, which changes no bit."""
    contrast = 1.0 if draw.contrast is None else draw.contrast
    return [
        draw.brightness or 0.0,
        1.0 if draw.contrast_last else contrast,
        1.0 if draw.saturation is None else draw.saturation,
        contrast if draw.contrast_last else 1.0,
    ]


# Arithmetic: on the device, for all images of a batch at once. It is in place where possible,
# because new memory costs as much as the arithmetic.


def _index(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the positions (N, h, w) in a plane of the pixels at rows (N, h) and columns (N, w)."""
    return rows[:, :, None] + columns[:, None]


def _interpolated(batch: Gathered, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the bilinear crops in 0 to 255, (N, 3, h, w) float32.

    Unlike in grid_sample, positions are float64 and a copy (scale 1) is exact by construction.
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
    """Multiply the S of HSV by a factor, up to S = 1. Hue and value do not change.

    With the value V and the chroma C = V S, a channel x becomes V - f (V - x), f at most V / C.
    """
    value, chroma = _value_and_chroma(images)
    factor = torch.minimum(factor, value / chroma)
    images.lerp_(value, 1 - factor)


def _value_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the V of HSV and the chroma V S, (N, 1, h, w). The chroma is never 0, as a divisor."""
    value = images.amax(1, keepdim=True)
    return value, (value - images.amin(1, keepdim=True)).clamp_(min=1e-9)


def _turn(images: Tensor, turns: Tensor) -> None:
    """Shift the H of HSV of images in 0 to 1 by ``turns`` (N, 1, 1) of the circle, not S and V."""
    value, chroma = _value_and_chroma(images)
    largest = images == value
    (red, green, blue), chroma, value = images.unbind(1), chroma[:, 0], value[:, 0]
    sixths = (red - green).div_(chroma).add_(4)
    sixths = torch.where(largest[:, 1], (blue - red).div_(chroma).add_(2), sixths)
    sixths = torch.where(largest[:, 0], (green - blue).div_(chroma), sixths).add_(turns, alpha=6)
    for channel, offset in enumerate((5, 3, 1)):
        # Each channel is V - C max(0, min(k, 4 - k, 1)) with k = (offset + sixths) mod 6.
        place = sixths + offset
        place.sub_(place.div(6).floor_(), alpha=6)
        lacking = torch.minimum(place, 4 - place).clamp_(0, 1).mul_(chroma)
        torch.sub(value, lacking, out=images[:, channel])
