"""Data from which little or nothing can be learned or scored: missing classes, void, repeats.

Every finding is a sentence. Problems are refused before training, warnings are said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdprof.data.content import digest
from kdprof.data.files import PairedImages
from kdprof.errors import UserError

NAMED = 5
"""A sentence names at most this many classes or files, and counts the others."""
WORDS = {"train": "training", "val": "validation"}


@dataclass
class Findings:
    """What is wrong with the content of a data set, one sentence each.

    Attributes:
        problems: nothing can be learned or scored.
        warnings: something can, but it is not what it seems.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine_labels(
    class_names: Sequence[str],
    shown: Mapping[str, np.ndarray],
    taught: Collection[str] | None = None,
) -> Findings:
    """Return what is degenerate in the labels of some splits.

    Args:
        shown: for each split the label values of every image, (images, 256) booleans.
        taught: the classes that training labels have on purpose; None = all.
    """
    found, count = Findings(), len(class_names)
    taught = class_names if taught is None else taught
    if count == 1:
        found.problems.append(
            f"'{class_names[0]}' is the only class: its cross-entropy is 0 and its IoU 1 whatever "
            "a network does; add a class for the other pixels, such as background"
        )
    present = {split: _any(labels[:, :count], 0) for split, labels in shown.items()}
    for split, labels in shown.items():
        wanted = taught if split == "train" else class_names
        _examine_split(found, split, class_names, labels[:, :count], wanted)
    if {"train", "val"} <= present.keys() and present["train"].any():
        absent = np.array([name not in taught for name in class_names])
        seen = np.logical_or(present["train"], absent)
        found.warnings += _unlearned(class_names, seen, present["val"])
    return found


def _unlearned(class_names: Sequence[str], seen: np.ndarray, scored: np.ndarray) -> list[str]:
    """Return which classes are scored, but never seen in training."""
    names = [class_names[index] for index in np.flatnonzero(scored & ~seen).tolist()]
    if not names:
        return []
    return [
        f"validation images show {_listed(names)}, which no training image shows: that cannot be "
        "learned, and is scored"
    ]


def _examine_split(
    found: Findings,
    split: str,
    class_names: Sequence[str],
    labels: np.ndarray,
    wanted: Collection[str],
) -> None:
    """Add what is degenerate in one split.

    Args:
        labels: which classes each image shows, (images, classes) booleans.
        wanted: the classes that some image should show.
    """
    present, word = _any(labels, 0), WORDS.get(split, split)
    if not present.any():
        use = "learned from" if split == "train" else "scored on"
        found.problems.append(
            f"every pixel of the {word} labels is void, so nothing can be {use} them; check the "
            "label values"
        )
        return
    if void := int((~_any(labels, 1)).sum()):
        found.warnings.append(f"{void} of {len(labels)} {word} images have only void pixels")
    absent = [class_names[index] for index in np.flatnonzero(~present).tolist()]
    absent = [name for name in absent if name in wanted]
    if absent:
        mean = f": mIoU is the mean over {present.sum()} of {len(present)} classes"
        ending = mean if split != "train" else ""
        found.warnings.append(f"no {word} image shows {_listed(absent)}{ending}")
    if present.sum() == 1 and len(class_names) > 1:
        only = class_names[int(present.argmax())]
        always = "nothing else can be learned"
        if split != "train":
            always = f"a network that always says {only} has an mIoU of 100 %"
        found.warnings.append(f"all labelled pixels of the {word} images are {only}: {always}")
    elif len(labels) > 1 and (labels.sum(1) <= 1).all():
        found.warnings.append(
            f"each of the {len(labels)} {word} images has one class throughout; are these labels "
            "of whole images instead of pixels?"
        )


def _any(values: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(values.any(axis))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


# Images that are in a data set twice


def examine_files(splits: Iterable[PairedImages]) -> list[str]:
    """Return which images are in several splits, or twice in one, by the content of their files."""
    opened = list(splits)
    places = _same_content([(data.split, image) for data in opened for image, _ in data.pairs])
    found = []
    for number, data in enumerate(opened):
        found += _repeats(data.split, len(data.pairs), places)
        for other in opened[:number]:
            found += _shared(data, other, places)
    return found


_Place = tuple[str, Path]
"""A split and one of its images."""


def _same_content(images: Sequence[_Place]) -> list[list[_Place]]:
    """Return the groups of images whose files are equal. Only files of equal size are read."""
    sizes: dict[int, list[_Place]] = defaultdict(list)
    for place in images:
        sizes[_size_of(place[1])].append(place)
    equal: dict[str, list[_Place]] = defaultdict(list)
    for group in sizes.values():
        for place in group if len(group) > 1 else ():
            equal[digest(place[1])].append(place)
    return [group for group in equal.values() if len(group) > 1]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; replace it") from None


def _repeats(split: str, images: int, groups: Sequence[Sequence[_Place]]) -> list[str]:
    """Return how many images of a split repeat another one of it."""
    own = [[path for where, path in group if where == split] for group in groups]
    repeated = [paths for paths in own if len(paths) > 1]
    count = sum(len(paths) - 1 for paths in repeated)
    if not count:
        return []
    first, second, *_ = repeated[0]
    word = WORDS.get(split, split)
    return [f"{count} of {images} {word} images repeat others, such as {second} {first}"]


def _shared(
    data: PairedImages, other: PairedImages, groups: Sequence[Sequence[_Place]]
) -> list[str]:
    """Return how many images of a split are in another split, too."""
    both = [group for group in groups if {data.split, other.split} <= {split for split, _ in group}]
    count = sum(split == data.split for group in both for split, _ in group)
    if not count:
        return []
    example = next(path for split, path in both[0] if split == data.split)
    ours, theirs = (WORDS.get(split, split) for split in (data.split, other.split))
    return [
        f"{count} of {len(data.pairs)} {ours} images are {theirs} images, too, such as {example}: "
        "scores on them say nothing about new images"
    ]
