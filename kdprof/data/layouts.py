"""Data sets in the layouts in which they are published.

A data set is recognised by its folders, wherever it was unpacked. Labels become class indices, with
255 for void, when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdprof.data.camvid import CamVid
from kdprof.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    Pair,
    PairedImages,
    classes_of,
    mirrored,
    paired,
    root_of,
)
from kdprof.data.labels import LabelValues
from kdprof.data.lists import Listed, read_list
from kdprof.data.own import open_folder
from kdprof.data.tree import UNREAD, by_name, folders
from kdprof.errors import UserError, unknown
from kdprof.method import IGNORE


@dataclass(frozen=True)
class PublishedDataSet:
    """Facts about a published data set.

    Attributes:
        title: its name in papers.
        counts: number of images of each split.
        crop: height and width of the usual training crop (mmsegmentation's).
        fit: size that images are usually resized to fit into before the crop, see
            :func:`kdprof.data.augment.fitting`; None = they are not resized.
        size: height and width of a usual image.
    """

    title: str
    counts: Mapping[str, int]
    crop: tuple[int, int]
    fit: tuple[int, int] | None
    size: tuple[int, int]


PUBLISHED_DATA_SETS: Mapping[str, PublishedDataSet] = {
    "camvid": PublishedDataSet(
        "CamVid", {"train": 367, "val": 101, "test": 233}, (360, 360), None, (360, 480)
    ),
    "cityscapes": PublishedDataSet(
        "Cityscapes", {"train": 2975, "val": 500}, (512, 1024), None, (1024, 2048)
    ),
    "cityscapes-coarse": PublishedDataSet(
        "Cityscapes", {"train": 22973, "val": 500}, (512, 1024), None, (1024, 2048)
    ),
    "ade20k": PublishedDataSet(
        "ADE20K", {"train": 20210, "val": 2000}, (512, 512), (512, 2048), (512, 683)
    ),
    "voc": PublishedDataSet(
        "Pascal VOC", {"train": 1464, "val": 1449}, (512, 512), (512, 2048), (375, 500)
    ),
    "voc-aug": PublishedDataSet(
        "Pascal VOC", {"train": 10582, "val": 1449}, (512, 512), (512, 2048), (375, 500)
    ),
    "coco-stuff": PublishedDataSet(
        "COCO-Stuff", {"train": 118287, "val": 5000}, (512, 512), (512, 2048), (480, 640)
    ),
    "pascal-context": PublishedDataSet(
        "Pascal Context", {"train": 4996, "val": 5104}, (480, 480), (520, 520), (375, 500)
    ),
}
"""mmsegmentation's counts and pipelines (its dataset documentation and configs/_base_/datasets)."""

CITYSCAPES_TRAINED = (
    7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33,
)  # fmt: skip
"""The ids of the 19 classes, in the order of their train ids (cityscapesScripts, labels.py)."""
CITYSCAPES_IMAGES = tuple(f"_leftImg8bit{suffix}" for suffix in IMAGE_SUFFIXES)
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Ids of 0-181 that belong to none of the 171 classes (COCO's removed categories)."""


def class_table(name: str) -> str:
    """Return the name of a data set's table of classes, which its variants share."""
    return name.removesuffix("-coarse").removesuffix("-aug")


# Cityscapes


def _cityscapes(root: Path, split: str) -> PairedImages:
    return _cityscapes_of(root, split, "cityscapes", coarse=False)


def _cityscapes_coarse(root: Path, split: str) -> PairedImages:
    """Return Cityscapes, in training with the coarsely labelled images too."""
    return _cityscapes_of(root, split, "cityscapes-coarse", coarse=split == "train")


def _cityscapes_of(root: Path, split: str, name: str, *, coarse: bool) -> PairedImages:
    layout = "ROOT holds leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY"
    root = root_of(root, name, layout, ["cityscapes", "Cityscapes"], "leftImg8bit")
    _known_split(name, split, {"train", "val", "test"})
    parts = [(split, "gtFine")] + ([("train_extra", "gtCoarse")] if coarse else [])
    images: dict[str, Path] = {}
    found: dict[str, dict[str, Path]] = {"labelTrainIds": {}, "labelIds": {}}
    for part, kind in parts:
        folder = root / "leftImg8bit" / part
        images |= by_name(folder, CITYSCAPES_IMAGES, f"{part}/", refused=UNREAD)
        for suffix, labels in found.items():
            ending = f"_{kind}_{suffix}.png"
            labels |= by_name(root / kind / part, (ending,), f"{part}/", empty=True)
    # Train ids are used if every image has them; ids are converted to the same labels.
    trained = len(images.keys() & found["labelTrainIds"].keys()) == len(images)
    kind = "labelTrainIds" if trained else "labelIds"

    def label_of(name: str) -> Path:
        part, _, rest = name.partition("/")
        annotation = dict(parts)[part]
        return root / annotation / part / f"{rest}_{annotation}_{kind}.png"

    ids = dict.fromkeys(range(34), IGNORE) | {IGNORE: IGNORE}
    ids |= {value: index for index, value in enumerate(CITYSCAPES_TRAINED)}
    values = LabelValues.indices(19) if trained else LabelValues.of(ids, "ids 0-33 or 255 (void)")
    pairs = paired(images, found[kind], label_of, values)
    return PairedImages(name, split, classes_of("cityscapes"), values, pairs, root=root)


# ADE20K


def _ade20k(root: Path, split: str) -> PairedImages:
    layout = "ROOT holds images/training and annotations/training, as ADEChallengeData2016"
    candidates = ["ADEChallengeData2016", "ade/ADEChallengeData2016", "ade20k"]
    root = root_of(root, "ade20k", layout, candidates, "annotations")
    part = _known_split("ade20k", split, {"train": "training", "val": "validation"})
    values = LabelValues.from_one(150)
    pairs = mirrored(root / "images" / part, root / "annotations" / part, values)
    return PairedImages("ade20k", split, classes_of("ade20k"), values, pairs, root=root)


# Pascal


def _voc(root: Path, split: str) -> PairedImages:
    return _pascal_voc(root, split, "voc", ("SegmentationClass",), ("train",))


def _voc_aug(root: Path, split: str) -> PairedImages:
    """Return Pascal VOC, in training with the labels of Hariharan et al. (SBD): 10 582 images."""
    folders = ("SegmentationClassAug", "SegmentationClass_aug", "SegmentationClass")
    lists = ("trainaug", "train_aug", "aug")
    return _pascal_voc(root, split, "voc-aug", folders if split == "train" else folders[-1:], lists)


def _pascal_voc(
    root: Path, split: str, name: str, label_folders: Iterable[str], train_lists: Iterable[str]
) -> PairedImages:
    layout = "ROOT holds JPEGImages, SegmentationClass and ImageSets/Segmentation, as VOC2012"
    root = root_of(root, name, layout, ["VOC2012", "VOCdevkit/VOC2012"], "JPEGImages")
    _known_split(name, split, {"train", "val"})
    folder = next((root / f for f in label_folders if (root / f).is_dir()), None)
    if folder is None:
        wanted = " or ".join(label_folders)
        raise UserError(f"{root} holds no {wanted} ({layout}); in it: {', '.join(folders(root))}")
    lists = train_lists if split == "train" else ("val",)
    values = LabelValues.indices(21)
    listed, pairs = _listed(root, lists, "Segmentation", folder, values)
    return PairedImages(
        name,
        split,
        classes_of("voc"),
        values,
        pairs,
        root=root,
        lists=[listed.file],
        notes=_repeats(listed),
    )


def _pascal_context(root: Path, split: str) -> PairedImages:
    """Return Pascal Context with 59 classes; label 0 is background, which is void."""
    layout = "ROOT holds JPEGImages and SegmentationClassContext, as mmsegmentation's VOC2010"
    candidates = ["VOC2010", "VOCdevkit/VOC2010"]
    root = root_of(root, "pascal-context", layout, candidates, "SegmentationClassContext")
    _known_split("pascal-context", split, {"train", "val"})
    labels = root / "SegmentationClassContext"
    values = LabelValues.from_one(59)
    listed, pairs = _listed(root, (split,), "SegmentationContext", labels, values)
    return PairedImages(
        "pascal-context",
        split,
        classes_of("pascal-context"),
        values,
        pairs,
        root=root,
        lists=[listed.file],
        notes=_repeats(listed),
    )


# COCO-Stuff


def _coco_stuff(root: Path, split: str) -> PairedImages:
    layout = "ROOT holds images/train2017 and annotations/train2017, as COCO-Stuff 164k"
    root = root_of(root, "coco-stuff", layout, ["coco_stuff164k", "coco"], "images")
    part = _known_split("coco-stuff", split, {"train": "train2017", "val": "val2017"})
    places = [root / "annotations" / part, root / "stuffthingmaps_trainvaltest2017" / part]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(f"no folder {places[0]} or {places[1]} ({layout})")
    images = by_name(root / "images" / part, IMAGE_SUFFIXES, refused=UNREAD)
    labels = by_name(folder, ("_labelTrainIds.png",), empty=True)
    values, ending = LabelValues.indices(171), "_labelTrainIds.png"
    if images.keys() - labels.keys():
        used = [value for value in range(182) if value not in COCO_UNUSED]
        meaning = {value: index for index, value in enumerate(used)} | {IGNORE: IGNORE}
        values = LabelValues.of(meaning, "0-181 without COCO's removed ids, or 255 (void)")
        labels, ending = by_name(folder, LABEL_SUFFIXES), ".png"
    pairs = paired(images, labels, lambda name: folder / f"{name}{ending}", values)
    classes = classes_of("coco-stuff")
    return PairedImages("coco-stuff", split, classes, values, pairs, root=root)


LAYOUTS: Mapping[str, Callable[[Path, str], PairedImages]] = {
    "camvid": CamVid,
    "cityscapes": _cityscapes,
    "cityscapes-coarse": _cityscapes_coarse,
    "ade20k": _ade20k,
    "voc": _voc,
    "voc-aug": _voc_aug,
    "coco-stuff": _coco_stuff,
    "pascal-context": _pascal_context,
    "folder": open_folder,
}
"""Functions that open a split of a data set in a folder. Their UserError names every problem of its
files."""


# Shared parts


def _known_split(name: str, split: str, splits: Iterable[str]) -> str:
    """Return the data set's own name of a split.

    Raises:
        UserError: the data set has no such split.
    """
    if split not in splits:
        raise UserError(f"{name}: {unknown('split', split, list(splits))}")
    return splits[split] if isinstance(splits, Mapping) else split


def _listed(
    root: Path, lists: Iterable[str], list_folder: str, label_folder: Path, values: LabelValues
) -> tuple[Listed, list[Pair]]:
    """Return a list below ``root/ImageSets`` and its images of ``JPEGImages`` with their labels."""
    folder = root / "JPEGImages"
    images = by_name(folder, IMAGE_SUFFIXES)
    labels = by_name(label_folder, LABEL_SUFFIXES)
    listed = read_list(root / "ImageSets" / list_folder, lists, images, folder.name)
    chosen = {name: images[name] for name in listed.names}
    return listed, paired(chosen, labels, lambda name: label_folder / f"{name}.png", values)


def _repeats(listed: Listed) -> list[str]:
    """Return what is passed over in a list."""
    if not listed.repeated:
        return []
    return [f"{listed.repeated} lines of {listed.file} repeat an image, which is used once"]
