"""Random scale, crop, flip and colour of one image. Every draw is a function of a counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from kdprof.data.streams import Stream, generator
from kdprof.method import IGNORE

FILL = 0.5
"""Brightness, of 1, where a crop reaches beyond its image; such pixels are labelled void."""


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


@dataclass(frozen=True)
class Augmentation:
    """Random resize within ``scale``, crop, horizontal flip and photometric distortion.

    The distortion has the ranges and the order of mmsegmentation's PhotoMetricDistortion:
    brightness +-32/255, contrast and saturation 0.5 to 1.5, hue +-18 of 180, each applied with
    probability 1/2, contrast before or after the other two. Its one difference: saturation blends
    with the grey image, where mmsegmentation multiplies the S of HSV.
    """

    crop: tuple[int, int]
    """Height x width, pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True

    def draw(self, seed: int, batch: int, slot: int) -> Draw:
        """Return the choices for one place in one batch: a pure function of its arguments."""
        rng = generator(Stream.AUGMENTATION, seed, batch, slot)
        scale, top, left, flip = rng.random(4)
        low, high = self.scale
        factors: list[float | None] = [
            float(value) if on < 0.5 and self.photometric else None
            for on, value in zip(
                rng.random(4),
                rng.uniform([-32 / 255, 0.5, 0.5, -0.1], [32 / 255, 1.5, 1.5, 0.1]),
                strict=True,
            )
        ]
        return Draw(
            low + (high - low) * scale, top, left, flip < self.flip, *factors, rng.random() < 0.5
        )

    def apply(self, image: Tensor, label: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the augmented (image, label), uint8, of the crop's size.

        Args:
            image: (3, H, W) uint8.
            label: (H, W) uint8.

        Scale, crop and flip are one interpolation that computes the crop alone: bilinear for the
        image, nearest for the label.
        """
        height, width = label.shape
        rows = _positions(height, self.crop[0], draw.scale, draw.top)
        columns = _positions(width, self.crop[1], draw.scale, draw.left)
        if draw.flip:
            columns = columns.flip(0)
        outside = ~(_inside(rows, height)[:, None] & _inside(columns, width))
        classes = label[_nearest(rows, height)][:, _nearest(columns, width)]
        classes = classes.masked_fill(outside, IGNORE)
        pixels = _interpolated(_interpolated(image, 1, rows), 2, columns)
        pixels = _distort(pixels.div_(255), draw).masked_fill_(outside, FILL)
        return pixels.mul_(255).round_().byte(), classes


# Resizing along an axis is independent of the other axis, so two passes of lerp over gathered rows
# and columns are the whole interpolation. Against grid_sample: source pixels outside the crop are
# never touched, positions are float64, and a copy (scale 1) is exact by construction.


def _positions(length: int, crop: int, scale: float, place: float) -> Tensor:
    """Return where the crop's pixels lie along one axis of the source: float64, pixel 0 at 0.

    The resized image is ``scale`` times the source, rounded to whole pixels; the crop starts at a
    whole pixel of it, so that scale 1 copies pixels.
    """
    resized = max(1, round(length * scale))
    start = round((resized - crop) * place)
    pixels = torch.arange(start, start + crop, dtype=torch.float64)
    return (pixels + 0.5) * (length / resized) - 0.5


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions > -0.5) & (positions < length - 0.5)


def _nearest(positions: Tensor, length: int) -> Tensor:
    return (positions + 0.5).floor_().long().clamp_(0, length - 1)


def _interpolated(values: Tensor, axis: int, positions: Tensor) -> Tensor:
    """Return float32 values at ``positions`` along an axis; the edge pixel continues outwards."""
    last = values.shape[axis] - 1
    lower = positions.floor().long()
    weight = (positions - lower).float().unflatten(0, (-1,) + (1,) * (2 - axis))
    low = values.index_select(axis, lower.clamp(0, last)).float()
    high = values.index_select(axis, (lower + 1).clamp_(0, last)).float()
    return low.lerp_(high, weight)


def _distort(image: Tensor, draw: Draw) -> Tensor:
    """Apply the colour factors to a (3, h, w) image in 0 to 1."""
    if draw.brightness is not None:
        image = (image + draw.brightness).clamp_(0, 1)
    if draw.contrast is not None and not draw.contrast_last:
        image = (image * draw.contrast).clamp_(0, 1)
    if draw.saturation is not None:
        image = colour.adjust_saturation(image, draw.saturation)
    if draw.hue is not None:
        image = colour.adjust_hue(image, draw.hue)
    if draw.contrast is not None and draw.contrast_last:
        image = (image * draw.contrast).clamp_(0, 1)
    return image
