"""CamVid, the common split of 11 classes (SegNet's).

``ROOT/train/*.png|jpg`` with ``ROOT/trainannot/*.png`` of the same stem, likewise ``val`` and
``test``. Labels are class indices 0-10; 11 is unlabelled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdprof.errors import UserError, nearest
from kdprof.method import IGNORE

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
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
    """One split of CamVid.

    Raises:
        UserError: the folder, a label or an image is missing, or a pair differs in size; every
            problem at once, before anything is decoded.
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
        image_path, label_path = self.pairs[index]
        image = np.array(_decoded(image_path).convert("RGB"))
        label = np.array(_decoded(label_path))
        wrong = np.setdiff1d(label, np.arange(UNLABELLED + 1))
        if wrong.size:
            raise UserError(
                f"{label_path} has label value {wrong[0]}; expected 0 to {UNLABELLED - 1}, or "
                f"{UNLABELLED} for unlabelled: convert the labels to class indices"
            )
        label = np.where(label == UNLABELLED, IGNORE, label).astype(np.uint8)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    folder, label_folder = root / split, root / f"{split}annot"
    _require_folder(folder)
    _require_folder(label_folder)
    images = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    labels = {p.stem: p for p in sorted(label_folder.glob("*.png"))}
    if not images:
        raise UserError(f"{folder} holds no {', '.join(IMAGE_SUFFIXES)} files; is it the right one?")
    problems = [
        f"{path} has no label; put {label_folder / (stem + '.png')} there or remove the image"
        for stem, path in images.items()
        if stem not in labels
    ]
    problems += [
        f"{path} has no image; put {folder / stem}.png there or remove the label"
        for stem, path in labels.items()
        if stem not in images
    ]
    pairs = [(images[stem], labels[stem]) for stem in images if stem in labels]
    for image, label in pairs:
        problems += _pair_problems(image, label)
    if problems:
        raise UserError(*problems)
    return pairs


def _require_folder(folder: Path) -> None:
    """Name the nearest thing that is there instead of a missing folder."""
    if folder.is_dir():
        return
    root = folder
    while not root.is_dir():
        folder, root = root, root.parent
    there = [entry.name for entry in root.iterdir() if entry.is_dir()]
    raise UserError(f"no folder {folder}; in {root} {nearest(folder.name, there)}")


def _pair_problems(image: Path, label: Path) -> list[str]:
    """Compare sizes by the files' headers alone: nothing is decoded."""
    try:
        image_size, label_size = _opened(image).size, _opened(label).size
    except UserError as error:
        return list(error.problems)
    if image_size == label_size:
        return []
    sizes = [f"{width}x{height}" for width, height in (image_size, label_size)]
    return [f"{image} is {sizes[0]} but its label is {sizes[1]}; make them the same size"]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); replace or remove it") from None


def _decoded(path: Path) -> Image.Image:
    image = _opened(path)
    try:
        image.load()
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read ({error}); replace or remove it") from None
    return image
