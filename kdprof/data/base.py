"""The base classes of data sets: images, a label for every pixel, and the classes of the labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from kdprof.data.threads import in_threads
from kdprof.errors import Problems, UserError


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of the label values.

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
        """The number of classes of the labels."""
        return len(self.classes.names)

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images of the split."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (image, label): uint8 RGB (3, H, W) and uint8 (H, W), 255 where void.

        Raises:
            UserError: the image's or the label's file cannot be used.
        """

    @abstractmethod
    def label(self, index: int) -> Tensor:
        """Return the label (H, W) alone, without decoding the image.

        Raises:
            UserError: the label's file cannot be used.
        """

    @cached_property
    def labels_shown(self) -> np.ndarray:
        """The label values that each image shows, (images, 256) booleans; reads every label once.

        Raises:
            UserError: a file cannot be used. It names all such files.
        """

        def look(index: int) -> np.ndarray | UserError:
            try:
                values = self.label(index).numpy().ravel()
            except UserError as error:
                return error
            return np.bincount(values, minlength=256) > 0

        seen = in_threads(look, range(len(self)))
        Problems(p for one in seen if isinstance(one, UserError) for p in one.problems).refuse()
        return np.array(seen, dtype=bool).reshape(len(self), 256)


class DataOnDisk(SegmentationData):
    """A data set that can be cached."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, without decoding it.

        Raises:
            UserError: the image's file cannot be used.
        """

    @abstractmethod
    def identity(self) -> list[Any]:
        """Return what the content depends on, in types of JSON, such as the files with their sizes
        and times."""
