"""Placeholder images stand for a data set's files when a step is measured without them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdprof.data.base import DataOnDisk
from kdprof.data.files import classes_of
from kdprof.data.layouts import PUBLISHED_DATA_SETS, class_table
from kdprof.method import IGNORE

DIFFERENT = 16
"""Number of different images, which are repeated."""
BLOCK = 32
"""Side of a patch of one class, pixels."""


class PlaceholderImages(DataOnDisk):
    """Random images in the number, usual size and classes of a split of a published data set.

    Nothing is read or decoded, so the loader's time is not that of the real files.
    """

    def __init__(self, name: str, split: str):
        super().__init__(name, split, classes_of(class_table(name)))
        self._known = PUBLISHED_DATA_SETS[name]

    def __len__(self) -> int:
        return self._known.counts[self.split]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._image(index % DIFFERENT)

    def label(self, index: int) -> Tensor:
        """Return the label (H, W) of an image."""
        return self[index][1]

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels."""
        return self._known.size

    def identity(self) -> list[Any]:
        """Return what the images depend on."""
        return [self.name, self.split, *self._known.size]

    @lru_cache(maxsize=DIFFERENT)  # noqa: B019 - lives as long as the study
    def _image(self, number: int) -> tuple[Tensor, Tensor]:
        height, width = self._known.size
        draw = np.random.default_rng(number)
        shape = (-(-height // BLOCK), -(-width // BLOCK))
        patches = draw.integers(0, self.num_classes + 1, shape)
        patches[patches == self.num_classes] = IGNORE
        label = np.kron(patches, np.ones((BLOCK, BLOCK), dtype=np.int64))[:height, :width]
        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[: self.num_classes] = self.palette
        noise = draw.integers(0, 64, (height, width, 3), dtype=np.uint8)
        image = colours[label] // 2 + noise
        images = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return images, torch.from_numpy(label.astype(np.uint8))
