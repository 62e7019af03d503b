"""Random scale, crop, flip and colour of one image. Every draw is a function of a counter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from kdprof.method import IGNORE

FILL = 0.5
"""Where a crop reaches beyond its image: mid-grey, labelled void."""


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

    The ranges of the distortion are mmsegmentation's: brightness +-32/255, contrast and saturation
    0.5 to 1.5, hue +-18 degrees in 180, each applied with probability 1/2, contrast first or last.
    """

    crop: tuple[int, int]
    """Height x width, pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True

    def draw(self, seed: int, batch: int, slot: int) -> Draw:
        """Return the choices for one place in one batch: a pure function of its arguments."""
        rng = np.random.default_rng([seed, batch, slot])
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

        Scale, crop and flip are one interpolation over the crop alone: bilinear for the image,
        nearest for the label.
        """
        grid = self._grid(image.shape[-2:], draw)
        # Shifted by the fill, so that what grid_sample pads with zeros becomes the fill.
        pixels = image[None].float() / 255 - FILL
        pixels = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)[0] + FILL
        classes = label[None, None].float() - IGNORE
        classes = F.grid_sample(classes, grid, mode="nearest", align_corners=False)[0, 0] + IGNORE
        pixels = _distort(pixels.clamp_(0, 1), draw)
        return pixels.mul_(255).round_().byte(), classes.round_().byte()

    def _grid(self, size: tuple[int, int], draw: Draw) -> Tensor:
        """Return the (1, h, w, 2) sampling positions in grid_sample's coordinates, -1 to 1.

        The resized image is ``scale`` times the source, rounded to whole pixels; the crop starts
        at a whole pixel of it, so that scale 1 copies pixels exactly.
        """
        axes = []
        for length, crop, place in zip(size, self.crop, (draw.top, draw.left), strict=True):
            resized = max(1, round(length * draw.scale))
            start = round((resized - crop) * place)
            positions = torch.arange(start, start + crop, dtype=torch.float64) + 0.5
            axes.append(2 * positions / resized - 1)
        rows, columns = axes
        if draw.flip:
            columns = columns.flip(0)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        return grid.float()[None]


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
