"""Every file of a data set, looked at: what is there, what is wrong, and what it looks like."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from kdprof.data.base import DataOnDisk
from kdprof.data.dataset import open_data
from kdprof.data.decoded import in_threads
from kdprof.data.layouts import PUBLISHED_DATA_SETS, PublishedDataSet
from kdprof.errors import UserError
from kdprof.method import IGNORE
from kdprof.progress import Progress

SHOWN = 8
"""Images of a split on the contact sheet."""


@dataclass
class SplitCheck:
    """What a split holds.

    Attributes:
        published: images it has in the published data set; None where that is not known.
        sizes: images by (height, width), pixels.
        pixels: by class, void last.
        present: images that show each class, void last.
        problems: what is wrong, one line each.
        images_per_second: decoded with every core.
        shown: number, image (H, W, 3) and label (H, W) of some, evenly spread.
    """

    split: str
    images: int = 0
    published: int | None = None
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    pixels: np.ndarray | None = None
    present: np.ndarray | None = None
    problems: list[str] = field(default_factory=list)
    images_per_second: float | None = None
    shown: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)


@dataclass
class DataCheck:
    """What :func:`check_data` found.

    Attributes:
        class_names, palette: empty where no split could be opened.
        usual: what is known of the published data set; None of one's own.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: list[SplitCheck]
    usual: PublishedDataSet | None = None

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        return [problem for split in self.splits for problem in split.problems]


def check_data(spec: str, splits: tuple[str, ...], progress: Progress) -> DataCheck:
    """Read every image and label of some splits.

    A file that cannot be used is among the problems and does not keep the others from being read.

    Args:
        spec: ``NAME:ROOT``.
    """
    name = spec.partition(":")[0]
    usual = PUBLISHED_DATA_SETS.get(name)
    found, classes = [], ((), ())
    for split in splits:
        made = SplitCheck(split, published=usual.counts.get(split) if usual else None)
        found.append(made)
        try:
            data = open_data(spec, split, synthetic_size=(120, 160), synthetic_count=80)
        except UserError as error:
            made.problems += error.problems
            continue
        classes = (data.class_names, data.palette)
        _read(data, made, progress)
    return DataCheck(name, *classes, found, usual)


def _read(data: DataOnDisk, made: SplitCheck, progress: Progress) -> None:
    made.images = len(data)
    wanted = set(np.linspace(0, len(data) - 1, min(SHOWN, len(data)), dtype=int).tolist())

    def look(index: int) -> tuple | UserError:
        try:
            image, label = data[index]
        except UserError as error:
            return error
        values = label.numpy()
        counts = np.bincount(values.ravel(), minlength=IGNORE + 1)
        counts = np.append(counts[: data.num_classes], counts[IGNORE])
        shown = (index, image.permute(1, 2, 0).numpy(), values) if index in wanted else None
        return tuple(label.shape), counts, shown

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
