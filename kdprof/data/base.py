"""What every data set gives: images, a label for every pixel, and the classes of the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from kdprof.errors import Problems


@dataclass(frozen=True)
class Classes:
    """What a data set tells apart.

    Attributes:
        palette: an RGB colour for each class.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


class SegmentationData(ABC):
    """Images of one split with a label for every pixel."""

    def __init__(self, name: str, split: str, classes: Classes):
        self.name, self.split, self.classes = name, split, classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the label values."""
        return self.classes.names

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """An RGB colour for each class."""
        return self.classes.palette

    @property
    def num_classes(self) -> int:
        """How many classes the labels have."""
        return len(self.classes.names)

    @abstractmethod
    def __len__(self) -> int:
        """How many images the split has."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (image, label): uint8 RGB (3, H, W) and uint8 (H, W), 255 where void.

        Raises:
            UserError: the files of this index cannot be used.
        """

    @abstractmethod
    def label(self, index: int) -> Tensor:
        """Return the label (H, W) alone, without decoding the image.

        Raises:
            UserError: its file cannot be used.
        """

    @cached_property
    def labels_shown(self) -> np.ndarray:
        """Which label values each image shows, (images, 256) booleans; reads every label once.

        Raises:
            UserError: files that cannot be used; all of them.
        """
        shown, problems = np.zeros((len(self), 256), bool), Problems()
        for index in range(len(self)):
            label = problems.attempt(lambda index=index: self.label(index), None)
            if label is not None:
                shown[index, np.unique(label.numpy())] = True
        problems.refuse()
        return shown


class DataOnDisk(SegmentationData):
    """A data set that can be cached."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, without decoding it.

        Raises:
            UserError: its file cannot be used.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return what the content depends on, as JSON: the files with sizes and times of change."""
