"""Pairs of image files and label files: the common part of all data sets on a disk."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdprof.data.base import Classes, DataOnDisk
from kdprof.errors import UserError, nearest
from kdprof.method import IGNORE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LABEL_SUFFIXES = (".png",)
LABEL_MODES = ("L", "P")
"""Pillow's modes of 8-bit grey and palette images, whose values are class indices."""
DEEP_MODES = ("I", "F")
"""The first letters of Pillow's modes of 16 bits and more. Pillow clips such images to white in a
conversion to RGB."""
REFUSED = 254
"""Marks a value that no label may have in a table of label values."""

Pair = tuple[Path, Path]
"""An image and its label."""


@cache
def classes_of(data: str) -> Classes:
    """Return the classes of a data set that kdprof knows: ``classes/<data>.txt``."""
    text = (files("kdprof.data") / "classes" / f"{data}.txt").read_text()
    lines = [line.split("\t") for line in text.splitlines()]
    colours = (colour_of(colour.split()) for _, colour in lines)
    return Classes(tuple(name for name, _ in lines), tuple(colours))


def colour_of(numbers: Iterable[str]) -> tuple[int, int, int]:
    """Return the RGB colour that three numbers in text describe."""
    red, green, blue = map(int, numbers)
    return red, green, blue


@dataclass(frozen=True)
class LabelValues:
    """The meaning of the values in a label file.

    Attributes:
        table: class of each value 0-255; :data:`IGNORE` for void, :data:`REFUSED` for a value that
            is not allowed.
        allowed: the allowed values, in words.
    """

    table: np.ndarray
    allowed: str

    @classmethod
    def of(cls, meaning: dict[int, int], allowed: str) -> LabelValues:
        """Return the values whose classes ``meaning`` gives; no other value is allowed."""
        table = np.full(256, REFUSED, dtype=np.uint8)
        for value, index in meaning.items():
            table[value] = index
        return cls(table, allowed)

    @classmethod
    def indices(cls, classes: int) -> LabelValues:
        """Return the values of class indices, with 255 for void."""
        meaning = {index: index for index in range(classes)} | {IGNORE: IGNORE}
        return cls.of(meaning, f"0-{classes - 1} or 255 (void)")

    @classmethod
    def from_one(cls, classes: int) -> LabelValues:
        """Return the values of class indices that begin with 1, with 0 for void."""
        meaning = {index + 1: index for index in range(classes)} | {0: IGNORE, IGNORE: IGNORE}
        return cls.of(meaning, f"1-{classes} or 0 (void)")


class PairedImages(DataOnDisk):
    """One split of a data set. Images are (3, H, W), labels (H, W).

    Args:
        pairs: files that exist, checked by :func:`paired`.
    """

    def __init__(
        self, name: str, split: str, classes: Classes, values: LabelValues, pairs: Sequence[Pair]
    ):
        super().__init__(name, split, classes)
        self.pairs, self._values = list(pairs), values

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = _decoded(self.pairs[index][0], "RGB")
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), self.label(index)

    def label(self, index: int) -> Tensor:
        """Return the label (H, W) of an image.

        Raises:
            UserError: the label's file cannot be read, or a value in it is not allowed.
        """
        path = self.pairs[index][1]
        values = _decoded(path)
        label = self._values.table[values]
        if (label == REFUSED).any():
            wrong = int(values[label == REFUSED].max())
            raise UserError(
                f"label value {wrong} in {path}; expected {self._values.allowed}: convert the "
                "labels to class indices"
            )
        return torch.from_numpy(label)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, from its header."""
        _, (width, height) = _header(self.pairs[index][0])
        return height, width

    def identity(self) -> list[Any]:
        """Return the files with their sizes and times of modification."""
        paths = [path.absolute() for pair in self.pairs for path in pair]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def paired(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    label_of: Callable[[str], Path],
    image_of: Callable[[str], Path] | None = None,
) -> list[Pair]:
    """Return image and label of each name, in order of the images, after a check of their headers.

    Args:
        label_of: returns the path where the label of a name should be.
        image_of: the same for images; None = a label may have no image.

    Raises:
        UserError: a label or an image is missing, a header cannot be read, an image is not 8-bit,
            a label is not an 8-bit image of indices, or the sizes of a pair differ. It names every
            problem. What only decoding shows is raised when an image is read.
    """
    problems = []
    for name, path in images.items():
        if name in labels:
            problems += _pair_problems(path, labels[name])
        else:
            problems.append(f"{path} has no label; add {label_of(name)} or remove the image")
    problems += [
        f"{path} has no image; add {image_of(name)} or .jpg, or remove the label"
        for name, path in labels.items()
        if image_of is not None and name not in images
    ]
    if problems:
        raise UserError(*problems)
    return [(path, labels[name]) for name, path in images.items()]


def root_of(root: Path, name: str, layout: str, candidates: Sequence[str], needed: str) -> Path:
    """Return the folder that holds a data set: the given one, or one that it is unpacked into.

    Args:
        layout: the content of the folder in words, for the message.
        candidates: folders below the given one that may hold the data set instead.
        needed: a folder that the data set has.

    Raises:
        UserError: none of these folders has ``needed``. It names the nearest folder that exists.
    """
    if not root.is_dir():
        raise UserError(no_root(root, name, layout))
    for place in (root, *(root / candidate for candidate in candidates)):
        if (place / needed).is_dir():
            return place
    there = nearest(needed.partition("/")[0], folders(root))
    raise UserError(f"{root} holds no {needed} ({layout}); in it: {there}")


def no_root(root: Path, name: str, layout: str) -> str:
    """Return the message for a missing root, with the nearest folder that exists."""
    missing, parent = root, root.parent
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    close = difflib.get_close_matches(missing.name, folders(parent), n=1, cutoff=0.5)
    fix = f"did you mean '{parent / close[0]}'?" if close else f"give {name}:ROOT"
    return f"no folder {root}; {fix} ({layout})"


def folders(root: Path) -> list[str]:
    """Return the names of the folders in ``root``, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Return the files of a folder by stem, sorted; append what is wrong to ``problems``."""
    if not folder.is_dir():
        there = nearest(folder.name, folders(folder.parent))
        problems.append(f"no folder {folder}; in {folder.parent}: {there}")
        return {}
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes):
        if path.stem in found:
            problems.append(f"{found[path.stem]} and {path} have the same name; remove one of them")
        found[path.stem] = path
    if not found:
        problems.append(f"{folder} holds no {', '.join(suffixes)} file; put the split there")
    return found


def _pair_problems(image: Path, label: Path) -> list[str]:
    """Return the problems that the headers of an image and its label show."""
    problems: list[str] = []
    headers = []
    for path in (image, label):
        try:
            headers.append(_header(path))
        except UserError as error:
            problems += error.problems
    if problems:
        return problems
    (image_mode, size), (mode, label_size) = headers
    if image_mode.startswith(DEEP_MODES):
        problems.append(f"{image} is {image_mode}, not 8 bits per channel; convert it to 8-bit RGB")
    if mode not in LABEL_MODES:
        problems.append(
            f"{label} is {mode}, not 8-bit class indices; convert colours to class indices"
        )
    if size != label_size:
        ours, theirs = (f"{height}x{width}" for width, height in (size, label_size))
        problems.append(f"{image} is {ours} but {label} is {theirs}; make their sizes equal")
    return problems


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    """Return the mode and (width, height) of an image without decoding it."""
    with _reading(path), Image.open(path) as image:
        return image.mode, image.size


def _decoded(path: Path, mode: str | None = None) -> np.ndarray:
    with _reading(path), Image.open(path) as image:
        return np.array(image.convert(mode) if mode else image)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any failure to read an image into a one-line error with its path."""
    try:
        yield
    except (
        Exception
    ) as error:  # by file format: OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} cannot be read: {error}; replace or remove it") from error
