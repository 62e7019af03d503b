"""Pairs of image files and label files: the common part of all data sets on a disk."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from kdprof.data.base import Classes, DataOnDisk
from kdprof.data.labels import REFUSED, LabelPixels
from kdprof.data.tree import UNREAD, by_name, folders
from kdprof.errors import Problems, UserError, nearest

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LABEL_SUFFIXES = (".png",)
UNREAD_LABELS = (".jpg", ".jpeg")
"""Endings of images that cannot be labels: a JPEG changes their values."""
DEEP_MODES = ("I", "F")
"""The first letters of Pillow's modes of 16 bits and more. Pillow clips such images to white in a
conversion to RGB."""
READ_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
"""Pillow's names of the formats that a file may have, whatever its ending. They are not all that
Pillow knows: for PostScript it starts Ghostscript, which runs what the file says."""
BITS = 8
"""Bits of a value in most files, and in an array."""
LOSSY_FORMATS = ("JPEG", "MPO")
"""Pillow's names of formats that change label values. A file's content says which it is."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned for each EXIF orientation other than 1."""
SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations that exchange height and width."""
EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Where Pillow puts metadata that may have an orientation."""

Pair = tuple[Path, Path]
"""An image and its label."""


class Header(NamedTuple):
    """What the header of an image says.

    Attributes:
        mode: Pillow's name of the kind of pixels.
        size: height and width as a viewer shows it, pixels.
        orientation: that of EXIF, 1 to 8; 1 = as stored.
        format: Pillow's name of the file format.
        bits: of each value in the file; Pillow's modes do not tell 16 from 8 in colours.
    """

    mode: str
    size: tuple[int, int]
    orientation: int
    format: str
    bits: int


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


class PairedImages(DataOnDisk):
    """One split of a data set. Images are (3, H, W), labels (H, W), both as viewers show them.

    Args:
        pixels: what the pixels of the labels mean.
        pairs: files that exist, checked by :func:`paired`.
        root: the folder that holds the data set.
        lists: other files that were read, such as lists.
        notes: what was passed over in them, one sentence each.
    """

    def __init__(
        self,
        name: str,
        split: str,
        classes: Classes,
        pixels: LabelPixels,
        pairs: Sequence[Pair],
        *,
        root: Path,
        lists: Sequence[Path] = (),
        notes: Sequence[str] = (),
    ):
        super().__init__(name, split, classes)
        self.pairs, self.pixels = list(pairs), pixels
        self.root, self.lists, self.notes = root, tuple(lists), tuple(notes)

    def used(self) -> list[Path]:
        """Return every file that the split reads."""
        return [*(path for pair in self.pairs for path in pair), *self.lists]

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
        values = _decoded(path, self.pixels.read_as)
        label = self.pixels.classes_of(values)
        if (refused := label == REFUSED).any():
            raise UserError(self.pixels.refusal(path, values, refused))
        return torch.from_numpy(label)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, from its header."""
        return self.header(index).size

    def header(self, index: int) -> Header:
        """Return what the header of an image says.

        Raises:
            UserError: it cannot be read.
        """
        return _header(self.pairs[index][0])

    def identity(self) -> list[Any]:
        """Return the files with their sizes and times, and what labels mean."""
        paths = [path.absolute() for pair in self.pairs for path in pair]
        stats = [path.stat() for path in paths]
        files = [
            [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            for path, status in zip(paths, stats, strict=True)
        ]
        return [*files, self.pixels.identity()]


def paired(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    label_of: Callable[[str], Path],
    pixels: LabelPixels,
    image_of: Callable[[str], Path] | None = None,
) -> list[Pair]:
    """Return image and label of each name, in order of the images, after a check of their headers.

    Args:
        label_of: returns the path where the label of a name should be.
        pixels: what the pixels of the labels mean.
        image_of: the same for images; None = a label may have no image.

    Raises:
        UserError: a label or an image is missing, a header cannot be read, an image is not 8-bit,
            a label has another kind of pixels, or the sizes of a pair differ. It names every
            problem. What only decoding shows is raised when an image is read.
    """
    problems = []
    for name, path in images.items():
        if name in labels:
            problems += _pair_problems(path, labels[name], pixels)
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


def mirrored(image_folder: Path, label_folder: Path, pixels: LabelPixels) -> list[Pair]:
    """Return the pairs of two folders whose files have the same names except for the suffix.

    Raises:
        UserError: as :func:`paired` and :func:`kdprof.data.tree.by_name`.
    """
    problems = Problems()
    images = problems.attempt(lambda: by_name(image_folder, IMAGE_SUFFIXES, refused=UNREAD), {})
    refused = (*UNREAD, *UNREAD_LABELS)
    labels = problems.attempt(lambda: by_name(label_folder, LABEL_SUFFIXES, refused=refused), {})
    problems.refuse()
    return paired(
        images,
        labels,
        lambda name: label_folder / f"{name}.png",
        pixels,
        lambda name: image_folder / f"{name}.png",
    )


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


def _pair_problems(image: Path, label: Path, pixels: LabelPixels) -> list[str]:
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
    ours, theirs = headers
    if ours.mode.startswith(DEEP_MODES):
        problems.append(f"{image} is {ours.mode}, not 8 bits per channel; convert it to 8-bit RGB")
    if theirs.mode not in pixels.modes:
        problems.append(f"{label} {pixels.wrong_mode(theirs.mode)}")
    if theirs.mode in pixels.modes and theirs.bits > BITS:
        problems.append(f"{label} has {theirs.bits} bits per value; save labels with {BITS}")
    if theirs.format in LOSSY_FORMATS:
        problems.append(f"{label} is a JPEG, which changes label values; save labels as PNG")
    if ours.size != theirs.size:
        problems.append(_unequal(image, ours, label, theirs))
    return problems


def _unequal(image: Path, ours: Header, label: Path, theirs: Header) -> str:
    sizes = ["{}x{}".format(*header.size) for header in (ours, theirs)]
    sizes = [
        f"{size} (EXIF orientation {header.orientation})" if header.orientation != 1 else size
        for size, header in zip(sizes, (ours, theirs), strict=True)
    ]
    fix = "make their sizes equal"
    if ours.orientation != theirs.orientation:
        fix = "turn the label as viewers show the image, or store both without an orientation"
    return f"{image} is {sizes[0]} but {label} is {sizes[1]}; {fix}"


def _header(path: Path) -> Header:
    """Return what an image's header says, without decoding it."""
    with _reading(path), Image.open(path, formats=READ_FORMATS) as image:
        orientation, (width, height) = _orientation(image), image.size
        size = (width, height) if orientation in SIDEWAYS else (height, width)
        return Header(image.mode, size, orientation, image.format or "", _bits(image))


def _decoded(path: Path, mode: str | None = None) -> np.ndarray:
    """Return the pixels, turned by the EXIF orientation as a viewer shows them.

    Args:
        mode: Pillow's mode that they are converted to; None = the values that the file has.

    Raises:
        UserError: the file cannot be read, or the orientation stands behind the pixels, where a
            header does not show it.
    """
    with _reading(path), Image.open(path, formats=READ_FORMATS) as image:
        told, bits = _orientation(image), _bits(image)
        image.load()
        orientation = _orientation(image)
        if orientation != told:
            raise ValueError(f"its EXIF orientation, {orientation}, stands behind its pixels")
        turned = image.transpose(TURNS[orientation]) if orientation in TURNS else image
        if mode:
            return np.array(turned.convert(mode))
        values = np.array(turned)
        # Pillow has made 0-255 of grey with 2 or 4 bits: it has multiplied by 85 or 17.
        return values // (255 // (2**bits - 1)) if image.mode == "L" and bits < BITS else values


def _bits(image: Image.Image) -> int:
    """Return the bits of each value in a file that is open and not decoded yet.

    They stand only in the raw mode that its decoder gets: L;4 is grey with 4 bits, RGB;16B colour
    with 16.
    """
    tiles = getattr(image, "tile", [])
    given = tiles[0][3] if tiles else ""
    raw = given[0] if isinstance(given, tuple) and given else given
    found = re.fullmatch(r"(?!BGR)[A-Za-z]+;(\d+)\w*", str(raw))  # BGR;16 is 16 per pixel
    return int(found.group(1)) if found else BITS


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the part of the file that was read has none."""
    if not EXIF_KEYS & image.info.keys():
        return 1
    # Not image.getexif(): that of a PNG decodes the image.
    found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return found if found in TURNS else 1


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any failure to read an image into a one-line error with its path."""
    try:
        yield
    except (
        Exception
    ) as error:  # by file format: OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} cannot be read: {error}; replace or remove it") from error
