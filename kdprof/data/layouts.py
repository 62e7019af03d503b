"""Data sets in the layouts in which they are published.

A data set is recognised by its folders, wherever it was unpacked. Labels become class indices, with
255 for void, when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kdprof.data.base import Classes
from kdprof.data.camvid import CamVid
from kdprof.data.files import (
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    LabelValues,
    Pair,
    PairedImages,
    classes_of,
    colour_of,
    folders,
    paired,
    root_of,
)
from kdprof.errors import UserError, nearest, unknown
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
        ending = "_leftImg8bit.png"
        images |= _by_name(folder, ending, f"{part}/")
        for suffix, labels in found.items():
            labels |= _by_name(root / kind / part, f"_{kind}_{suffix}.png", f"{part}/", empty=True)
    if not images:
        raise UserError(
            f"{root / 'leftImg8bit' / split} holds no *_leftImg8bit.png in city folders"
        )
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
    pairs = paired(images, found[kind], label_of)
    return PairedImages(name, split, classes_of("cityscapes"), values, pairs)


# ADE20K


def _ade20k(root: Path, split: str) -> PairedImages:
    layout = "ROOT holds images/training and annotations/training, as ADEChallengeData2016"
    candidates = ["ADEChallengeData2016", "ade/ADEChallengeData2016", "ade20k"]
    root = root_of(root, "ade20k", layout, candidates, "annotations")
    part = _known_split("ade20k", split, {"train": "training", "val": "validation"})
    pairs = _mirrored(root / "images" / part, root / "annotations" / part)
    classes = classes_of("ade20k")
    return PairedImages("ade20k", split, classes, LabelValues.from_one(150), pairs)


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
    names = _listed(root / "ImageSets" / "Segmentation", lists)
    pairs = _named(names, root / "JPEGImages", folder)
    return PairedImages(name, split, classes_of("voc"), LabelValues.indices(21), pairs)


def _pascal_context(root: Path, split: str) -> PairedImages:
    """Return Pascal Context with 59 classes; label 0 is background, which is void."""
    layout = "ROOT holds JPEGImages and SegmentationClassContext, as mmsegmentation's VOC2010"
    candidates = ["VOC2010", "VOCdevkit/VOC2010"]
    root = root_of(root, "pascal-context", layout, candidates, "SegmentationClassContext")
    _known_split("pascal-context", split, {"train", "val"})
    names = _listed(root / "ImageSets" / "SegmentationContext", (split,))
    pairs = _named(names, root / "JPEGImages", root / "SegmentationClassContext")
    classes = classes_of("pascal-context")
    return PairedImages("pascal-context", split, classes, LabelValues.from_one(59), pairs)


# COCO-Stuff


def _coco_stuff(root: Path, split: str) -> PairedImages:
    layout = "ROOT holds images/train2017 and annotations/train2017, as COCO-Stuff 164k"
    root = root_of(root, "coco-stuff", layout, ["coco_stuff164k", "coco"], "images")
    part = _known_split("coco-stuff", split, {"train": "train2017", "val": "val2017"})
    places = [root / "annotations" / part, root / "stuffthingmaps_trainvaltest2017" / part]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise UserError(f"no folder {places[0]} or {places[1]} ({layout})")
    images = _by_name(root / "images" / part, ".jpg")
    labels = _by_name(folder, "_labelTrainIds.png", empty=True)
    values, ending = LabelValues.indices(171), "_labelTrainIds.png"
    if images.keys() - labels.keys():
        used = [value for value in range(182) if value not in COCO_UNUSED]
        meaning = {value: index for index, value in enumerate(used)} | {IGNORE: IGNORE}
        values = LabelValues.of(meaning, "0-181 without COCO's removed ids, or 255 (void)")
        labels, ending = _by_name(folder, ".png"), ".png"
    pairs = paired(images, labels, lambda name: folder / f"{name}{ending}")
    return PairedImages("coco-stuff", split, classes_of("coco-stuff"), values, pairs)


# The user's own data set


def _folder(root: Path, split: str) -> PairedImages:
    """Return a data set of ``images/SPLIT`` and ``masks/SPLIT``, whose files have the same stems.

    ``classes.txt`` has a class per line, in order of the masks' values, and optionally a colour
    (``R G B``) after a tab.
    """
    layout = "ROOT holds images/SPLIT, masks/SPLIT and classes.txt"
    root = root_of(root, "folder", layout, [], "images")
    if not (root / "images" / split).is_dir():
        there = nearest(split, folders(root / "images"))
        raise UserError(f"no folder {root / 'images' / split}; in {root / 'images'}: {there}")
    classes = _own_classes(root / "classes.txt")
    pairs = _mirrored(root / "images" / split, root / "masks" / split)
    name = f"folder:{root.name}"
    return PairedImages(name, split, classes, LabelValues.indices(len(classes.names)), pairs)


def _own_classes(path: Path) -> Classes:
    if not path.is_file():
        raise UserError(f"no file {path}; write a class per line, in order of the masks' values")
    lines = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    names = [name.strip() for name, *_ in lines]
    if len(names) != len(set(names)) or not 1 <= len(names) < IGNORE:
        raise UserError(f"{path} must hold 1 to 254 classes of different names, has {len(names)}")
    spread = classes_of("ade20k").palette
    colours = []
    for index, (_, *colour) in enumerate(lines):
        numbers = colour[0].split() if colour else []
        if numbers and (
            len(numbers) != 3 or not all(n.isdigit() and int(n) < 256 for n in numbers)
        ):
            raise UserError(f"{path}, line {index + 1}: write a colour as R G B, each 0-255")
        colours.append(colour_of(numbers) if numbers else spread[index % len(spread)])
    return Classes(tuple(names), tuple(colours))


LAYOUTS: Mapping[str, Callable[[Path, str], PairedImages]] = {
    "camvid": CamVid,
    "cityscapes": _cityscapes,
    "cityscapes-coarse": _cityscapes_coarse,
    "ade20k": _ade20k,
    "voc": _voc,
    "voc-aug": _voc_aug,
    "coco-stuff": _coco_stuff,
    "pascal-context": _pascal_context,
    "folder": _folder,
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


def _by_name(
    folder: Path, ending: str, prefix: str = "", *, empty: bool = False
) -> dict[str, Path]:
    """Return the files below a folder that have an ending, by their path without the ending.

    Args:
        empty: whether the folder may be missing or have no such file.
    """
    if not folder.is_dir() and not empty:
        parent = folder.parent
        there = nearest(folder.name, folders(parent)) if parent.is_dir() else f"no folder {parent}"
        raise UserError(f"no folder {folder}; in {parent}: {there}")
    paths = sorted(folder.rglob(f"*{ending}"))
    found = {
        f"{prefix}{path.relative_to(folder).as_posix().removesuffix(ending)}": path
        for path in paths
    }
    if not found and not empty:
        raise UserError(f"{folder} holds no *{ending}; put the split there")
    return found


def _mirrored(image_folder: Path, label_folder: Path) -> list[Pair]:
    """Return the pairs of two folders whose files have the same names except for the suffix."""
    images, labels = (
        {
            key: path
            for ending in endings
            for key, path in _by_name(folder, ending, empty=True).items()
        }
        for folder, endings in ((image_folder, IMAGE_SUFFIXES), (label_folder, LABEL_SUFFIXES))
    )
    problems = [
        f"{folder} holds no {', '.join(endings)} file; put the split there"
        for folder, found, endings in (
            (image_folder, images, IMAGE_SUFFIXES), (label_folder, labels, LABEL_SUFFIXES)
        )
        if not found
    ]  # fmt: skip
    if problems:
        raise UserError(*problems)
    images = dict(sorted(images.items()))
    return paired(
        images,
        labels,
        lambda name: label_folder / f"{name}.png",
        lambda name: image_folder / f"{name}.png",
    )


def _listed(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names in the first of these lists that exists."""
    path = next((folder / f"{n}.txt" for n in names if (folder / f"{n}.txt").is_file()), None)
    if path is None:
        wanted = " or ".join(f"{name}.txt" for name in names)
        raise UserError(f"no list {wanted} in {folder}; it comes with the data set")
    # Some lists name two files per line, as /JPEGImages/x.jpg /SegmentationClassAug/x.png.
    found = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path} lists nothing; download it again")
    return found


def _named(names: Iterable[str], image_folder: Path, label_folder: Path) -> list[Pair]:
    """Return the pairs of the listed names."""
    images = {name: image_folder / f"{name}.jpg" for name in names}
    labels = {name: label_folder / f"{name}.png" for name in names}
    problems = [
        f"no file {path}, which is listed; get it, or remove {name} from the list"
        for files in (images, labels)
        for name, path in files.items()
        if not path.is_file()
    ]
    if problems:
        raise UserError(*problems)
    return paired(images, labels, labels.__getitem__)
