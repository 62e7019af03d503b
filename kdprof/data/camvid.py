"""CamVid, the common split of 11 classes (SegNet's).

``ROOT/train/*.png|jpg`` with ``ROOT/trainannot/*.png`` of the same stem, likewise ``val`` and
``test``. Labels are class indices 0-10; 11 is unlabelled.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdprof.errors import UserError, nearest
from kdprof.method import IGNORE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LABEL_SUFFIXES = (".png",)
LABEL_MODES = ("L", "P")
"""Pillow's names for 8-bit grey and palette images, whose values are class indices."""
DEEP_MODES = ("I", "F")
"""How Pillow's names for images of 16 bits and more begin; it cuts those to white when asked for
RGB."""
UNLABELLED = 11
CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)


class CamVid:
    """One split of CamVid. Images are (3, H, W), labels (H, W), see CLASSES.

    Raises:
        UserError: a folder, a label or an image is missing, a header cannot be read, labels are
            no class indices, or a pair differs in size; every problem at once, from the headers
            alone. What only decoding shows is raised when the image is read.
    """

    name = "camvid"
    class_names = tuple(name for name, _ in CLASSES)
    palette = tuple(colour for _, colour in CLASSES)
    num_classes = len(CLASSES)

    def __init__(self, root: Path, split: str):
        self.split = split
        self.pairs = _pairs(root, split)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = _decoded(self.pairs[index][0], "RGB")
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), self.label(index)

    def label(self, index: int) -> Tensor:
        """Return the label (H, W) of an image.

        Raises:
            UserError: its file cannot be read, or holds no class indices.
        """
        path = self.pairs[index][1]
        label = _decoded(path)
        highest = int(label.max())
        if highest > UNLABELLED:
            raise UserError(
                f"label value {highest} in {path}; expected 0-{UNLABELLED - 1} or "
                f"{UNLABELLED} (unlabelled): convert the labels to class indices"
            )
        label[label == UNLABELLED] = IGNORE
        return torch.from_numpy(label)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, pixels, from its header."""
        _, (width, height) = _header(self.pairs[index][0])
        return height, width

    def identity(self) -> list[Any]:
        """Return the files with their sizes and times of change."""
        files = [path.absolute() for pair in self.pairs for path in pair]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the (image, label) files of a split in order of name, or raise all that is wrong."""
    if not root.is_dir():
        raise UserError(_no_root(root))
    folder, label_folder = root / split, root / f"{split}annot"
    problems: list[str] = []
    images = _by_stem(folder, IMAGE_SUFFIXES, problems)
    labels = _by_stem(label_folder, LABEL_SUFFIXES, problems)
    if problems:
        raise UserError(*problems)
    for stem, path in images.items():
        if stem in labels:
            problems += _pair_problems(path, labels[stem])
        else:
            wanted = label_folder / f"{stem}.png"
            problems.append(f"{path} has no label; add {wanted} or remove the image")
    problems += [
        f"{path} has no image; add {folder / stem}.png or .jpg, or remove the label"
        for stem, path in labels.items()
        if stem not in images
    ]
    if problems:
        raise UserError(*problems)
    return [(path, labels[stem]) for stem, path in images.items()]


def _no_root(root: Path) -> str:
    """Return the message for a missing root, with the nearest folder that is there."""
    missing, parent = root, root.parent
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    close = difflib.get_close_matches(missing.name, _folders(parent), n=1, cutoff=0.5)
    mend = f"did you mean '{parent / close[0]}'?" if close else "give camvid:ROOT"
    return f"no folder {root}; {mend} (ROOT holds train, trainannot, val, valannot)"


def _folders(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if entry.is_dir()]


def _by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    """Return the files of a folder by stem, sorted; append what is wrong to ``problems``."""
    if not folder.is_dir():
        mend = nearest(folder.name, _folders(folder.parent))
        problems.append(f"no folder {folder}; in {folder.parent}: {mend}")
        return {}
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes):
        if path.stem in found:
            problems.append(f"{found[path.stem]} and {path} have one name; remove one of them")
        found[path.stem] = path
    if not found:
        problems.append(f"{folder} holds no {', '.join(suffixes)} file; put the split there")
    return found


def _pair_problems(image: Path, label: Path) -> list[str]:
    """Return what the headers of an image and its label show to be wrong."""
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
        told = [f"{height}x{width}" for width, height in (size, label_size)]
        problems.append(f"{image} is {told[0]} but {label} is {told[1]}; make them one size")
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
    """Turn any failure to read an image into one line with its path."""
    try:
        yield
    except Exception as error:  # by format: OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} cannot be read: {error}; replace or remove it") from error
