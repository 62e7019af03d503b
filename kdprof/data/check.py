"""A check of every file of a data set: what is there, what is wrong, and what it looks like."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kdprof.data.base import DataOnDisk
from kdprof.data.dataset import open_data
from kdprof.data.decoded import in_threads
from kdprof.data.files import PairedImages
from kdprof.data.layouts import PUBLISHED_DATA_SETS, PublishedDataSet
from kdprof.data.tree import passed_over
from kdprof.errors import UserError
from kdprof.method import IGNORE
from kdprof.progress import Progress

SHOWN = 8
"""Images of a split on the contact sheet."""

_Shown = tuple[int, np.ndarray, np.ndarray]
_Seen = tuple[tuple[int, int], np.ndarray, _Shown | None]
"""Size of an image, its pixels by class, and the image itself if it is shown."""


@dataclass
class SplitCheck:
    """The content of a split.

    Attributes:
        images: number of images.
        published: number of images in the published data set; None if that is not known.
        sizes: number of images by (height, width), pixels.
        pixels: number of pixels of each class, void last.
        present: number of images that show each class, void last.
        problems: what is wrong, one line each.
        images_per_second: speed of decoding with all cores.
        shown: index, image (H, W, 3) and label (H, W) of some images, evenly spread.
        notes: what was passed over or converted, one sentence each.
    """

    split: str
    images: int = 0
    published: int | None = None
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray | None = None
    present: np.ndarray | None = None
    problems: list[str] = field(default_factory=list)
    images_per_second: float | None = None
    shown: list[_Shown] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class DataCheck:
    """The result of :func:`check_data`.

    Attributes:
        class_names, palette: empty if no split could be opened.
        usual: facts about the published data set; None if the data set is not a published one.
        passed_over: number of files below ROOT that no checked split uses, by place and ending.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: list[SplitCheck]
    usual: PublishedDataSet | None = None
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        return [problem for split in self.splits for problem in split.problems]


def check_data(spec: str, splits: tuple[str, ...], progress: Progress) -> DataCheck:
    """Read every image and label of some splits.

    A file that cannot be used becomes a problem of its split, and the other files are still read.

    Args:
        spec: ``NAME:ROOT``.
    """
    name = spec.partition(":")[0]
    usual = PUBLISHED_DATA_SETS.get(name)
    found: list[SplitCheck] = []
    opened: list[PairedImages] = []
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    for split in splits:
        made = SplitCheck(split, published=usual.counts.get(split) if usual else None)
        found.append(made)
        try:
            data = open_data(spec, split, synthetic_size=(120, 160), synthetic_count=80)
        except UserError as error:
            made.problems += error.problems
            continue
        class_names, palette = data.class_names, data.palette
        _read(data, made, progress)
        if isinstance(data, PairedImages):
            opened.append(data)
            made.notes += [*data.notes, *_conversions(data)]
    return DataCheck(name, class_names, palette, found, usual, _passed_over(opened))


def _passed_over(opened: Sequence[PairedImages]) -> Counter[str]:
    """Return the number of files below the root of some splits that none of them uses."""
    if not opened:
        return Counter()
    return passed_over(opened[0].root, [path for data in opened for path in data.used()])


def _conversions(data: PairedImages) -> list[str]:
    """Return which images are not 8-bit RGB as they are stored, in sentences."""
    headers = [data.header(index) for index in range(len(data))]
    modes = Counter(header.mode for header in headers if header.mode != "RGB")
    turned = sum(header.orientation != 1 for header in headers)
    found = [f"{_images(count)} {mode}, converted to RGB" for mode, count in modes.items()]
    found += [f"{_images(turned)} turned as EXIF says"] if turned else []
    return found


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count:,} images are"


def _read(data: DataOnDisk, made: SplitCheck, progress: Progress) -> None:
    made.images = len(data)
    wanted = set(np.linspace(0, len(data) - 1, min(SHOWN, len(data)), dtype=int).tolist())

    def look(index: int) -> _Seen | UserError:
        try:
            image, label = data[index]
        except UserError as error:
            return error
        values = label.numpy()
        counts = np.bincount(values.ravel(), minlength=IGNORE + 1)
        counts = np.append(counts[: data.num_classes], counts[IGNORE])
        shown = (index, image.permute(1, 2, 0).numpy(), values) if index in wanted else None
        height, width = label.shape
        return (height, width), counts, shown

    began = time.perf_counter()
    with progress.task(f"{data.name} {data.split}", len(data)) as advance:
        seen = in_threads(look, range(len(data)), lambda: advance(1))
    made.images_per_second = len(data) / (time.perf_counter() - began)
    made.pixels = np.zeros(data.num_classes + 1, dtype=np.int64)
    made.present = np.zeros(data.num_classes + 1, dtype=np.int64)
    for one in seen:
        if isinstance(one, UserError):
            made.problems += one.problems
            continue
        size, counts, shown = one
        made.sizes[size] += 1
        made.pixels += counts
        made.present += counts > 0
        made.shown += [shown] if shown is not None else []
