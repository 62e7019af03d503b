"""A check of every file of a data set: what is there, what is wrong, and what it looks like."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kdprof.data.base import DataOnDisk
from kdprof.data.dataset import open_data
from kdprof.data.degenerate import Findings, examine_files, examine_labels
from kdprof.data.files import BITS, Header, PairedImages
from kdprof.data.layouts import PUBLISHED_DATA_SETS, PublishedDataSet
from kdprof.data.threads import in_threads
from kdprof.data.tree import passed_over
from kdprof.errors import UserError
from kdprof.method import IGNORE
from kdprof.progress import Progress
from kdprof.study import DataSettings

SHOWN = 8
"""Images of a split on the contact sheet."""

_Shown = tuple[int, np.ndarray, np.ndarray]
_Seen = tuple[tuple[int, int], np.ndarray, np.ndarray, _Shown | None]
"""Size of an image, its pixels by class, its label values, and the image itself if it is shown."""


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
        values: the label values of every image, (images, 256) booleans, of those that can be used.
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
    values: np.ndarray | None = None


@dataclass
class DataCheck:
    """The result of :func:`check_data`.

    Attributes:
        class_names, palette: empty if no split could be opened.
        usual: facts about the published data set; None if the data set is not a published one.
        passed_over: number of files below ROOT that no checked split uses, by place and ending.
        content: what is wrong with the labels and images of the splits together.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    splits: list[SplitCheck]
    usual: PublishedDataSet | None = None
    passed_over: Counter[str] = field(default_factory=Counter)
    content: Findings = field(default_factory=Findings)

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong."""
        of_files = [problem for split in self.splits for problem in split.problems]
        return of_files + self.content.problems


def check_data(
    spec: str, splits: tuple[str, ...], progress: Progress, labels: DataSettings | None = None
) -> DataCheck:
    """Read every image and label of some splits.

    A file that cannot be used becomes a problem of its split, and the other files are still read.

    Args:
        spec: ``NAME:ROOT``.
        labels: settings that say what label files mean; None = the usual ones.
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
            data = open_data(
                spec, split, synthetic_size=(120, 160), synthetic_count=80, labels=labels
            )
        except UserError as error:
            made.problems += error.problems
            continue
        class_names, palette = data.class_names, data.palette
        _read(data, made, progress)
        if isinstance(data, PairedImages):
            opened.append(data)
            made.notes += [*data.notes, *_conversions(data)]
    content = _content(class_names, found, opened)
    return DataCheck(name, class_names, palette, found, usual, _passed_over(opened), content)


def _content(
    class_names: Sequence[str], splits: Sequence[SplitCheck], opened: Sequence[PairedImages]
) -> Findings:
    """Return what is degenerate in the splits of which files can be used."""
    values = {s.split: s.values for s in splits if s.values is not None and len(s.values)}
    found = examine_labels(class_names, values)
    found.warnings += examine_files(opened)
    return found


def _passed_over(opened: Sequence[PairedImages]) -> Counter[str]:
    """Return the number of files below the root of some splits that none of them uses."""
    if not opened:
        return Counter()
    return passed_over(opened[0].root, [path for data in opened for path in data.used()])


def _conversions(data: PairedImages) -> list[str]:
    """Return which images are not 8-bit RGB as they are stored, in sentences."""
    headers = [data.header(index) for index in range(len(data))]
    modes = Counter(map(_kind, headers))
    del modes["RGB"]
    turned = sum(header.orientation != 1 for header in headers)
    found = [f"{_images(count)} {mode}, converted to RGB" for mode, count in modes.items()]
    found += [f"{_images(turned)} turned as EXIF says"] if turned else []
    return found


def _kind(header: Header) -> str:
    return header.mode if header.bits <= BITS else f"{header.mode} of {header.bits} bits"


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count:,} images are"


def _read(data: DataOnDisk, made: SplitCheck, progress: Progress) -> None:
    made.images, count = len(data), data.num_classes
    wanted = set(np.linspace(0, len(data) - 1, min(SHOWN, len(data)), dtype=int).tolist())

    def look(index: int) -> _Seen | UserError:
        try:
            image, label = data[index]
        except UserError as error:
            return error
        values = label.numpy()
        counts = np.bincount(values.ravel(), minlength=IGNORE + 1)
        shows = counts > 0
        counts = np.append(counts[:count], counts[IGNORE])
        shown = (index, image.permute(1, 2, 0).numpy(), values) if index in wanted else None
        height, width = label.shape
        return (height, width), counts, shows, shown

    began = time.perf_counter()
    with progress.task(f"{data.name} {data.split}", len(data)) as advance:
        seen = in_threads(look, range(len(data)), lambda: advance(1))
    made.images_per_second = len(data) / (time.perf_counter() - began)
    made.pixels = np.zeros(count + 1, dtype=np.int64)
    made.present = np.zeros(count + 1, dtype=np.int64)
    values: list[np.ndarray] = []
    for one in seen:
        if isinstance(one, UserError):
            made.problems += one.problems
            continue
        size, counts, shows, shown = one
        values.append(shows)
        made.sizes[size] += 1
        made.pixels += counts
        made.present += counts > 0
        made.shown += [shown] if shown is not None else []
    made.values = np.array(values).reshape(-1, IGNORE + 1)
