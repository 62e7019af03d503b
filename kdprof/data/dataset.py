"""What every data set gives, and how one is found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kdprof.data.drawn import DrawnImages
from kdprof.data.layouts import LAYOUTS, PUBLISHED, open_layout
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError, unknown

DATA_SETS = ("synthetic", *LAYOUTS)
SPLITS = ("train", "val", "test")


class SegmentationData(Protocol):
    """Images with a label for every pixel."""

    name: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """An RGB colour for each class."""

    @property
    def num_classes(self) -> int:
        """How many classes the labels have."""

    def __len__(self) -> int:
        """How many images the split has."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return (image, label): uint8 RGB (3, H, W) and uint8 (H, W), 255 where void.

        Raises:
            UserError: the files of this index cannot be used.
        """

    def label(self, index: int) -> Tensor:
        """Return the label alone, without decoding the image.

        Raises:
            UserError: its file cannot be used.
        """


class DataOnDisk(SegmentationData, Protocol):
    """A data set that can be cached."""

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, without decoding it.

        Raises:
            UserError: its file cannot be used.
        """

    def identity(self) -> list[Any]:
        """Return what the content depends on, as JSON: the files with sizes and times of change."""


def require_files(spec: str) -> None:
    """Refuse a data set that is named without its folder.

    Raises:
        UserError: it is.
    """
    name, _, root = spec.partition(":")
    if name in LAYOUTS and not root:
        raise UserError(f"data '{name}' needs its folder; give {name}:ROOT")


def is_drawn(spec: str) -> bool:
    """Return whether a data set's images are drawn in place of its files."""
    return ":" not in spec and spec in PUBLISHED


def fit_of(resize: str | tuple[int, int], name: str) -> tuple[int, int] | None:
    """Return what images are resized to fit; None = they keep their size.

    Args:
        resize: ``none``, ``usual`` for the data set, or a height and width.
        name: of the data set.
    """
    if resize == "usual":
        return PUBLISHED[name].fit if name in PUBLISHED else None
    return None if resize == "none" else resize


def open_data(
    spec: str,
    split: str,
    *,
    synthetic_size: tuple[int, int],
    synthetic_count: int,
    drawn: bool = False,
) -> DataOnDisk:
    """Open the split of the data set that ``spec`` names: ``synthetic`` or ``NAME:ROOT``.

    Args:
        drawn: whether ``NAME`` without its folder stands for drawn images.
        split: train, val or test.
        synthetic_size: height x width of the synthetic scenes, pixels.
        synthetic_count: how many synthetic scenes the split has.

    Raises:
        UserError: no such data set or split, or its folder is not usable; every problem at once.
    """
    if split not in SPLITS:
        raise UserError(unknown("split", split, SPLITS))
    name, colon, root = spec.partition(":")
    if name == "synthetic":
        if colon:
            raise UserError("data 'synthetic' takes no folder; give synthetic")
        return SyntheticScenes(split, synthetic_size, synthetic_count)
    if name in LAYOUTS:
        if drawn and not colon and name in PUBLISHED:
            return DrawnImages(name, split)
        require_files(spec)
        return open_layout(name, Path(root).expanduser(), split)
    raise UserError(unknown("data set", name, DATA_SETS))
