"""Where data sets are looked up by name."""

from __future__ import annotations

from pathlib import Path

from kdprof.data.base import DataOnDisk
from kdprof.data.layouts import LAYOUTS, PUBLISHED_DATA_SETS
from kdprof.data.placeholder import PlaceholderImages
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError, unknown

DATA_SETS = ("synthetic", *LAYOUTS)
SPLITS = ("train", "val", "test")


def require_files(spec: str) -> None:
    """Refuse a data set that is named without its folder.

    Raises:
        UserError: `spec` names a data set of files and no folder.
    """
    name, _, root = spec.partition(":")
    if name in LAYOUTS and not root:
        raise UserError(f"data '{name}' needs its folder; give {name}:ROOT")


def uses_placeholders(spec: str) -> bool:
    """Return whether random images stand for the files of a data set."""
    return ":" not in spec and spec in PUBLISHED_DATA_SETS


def title_of(name: str) -> str:
    """Return what papers call a data set; its own name where it is no published one."""
    return PUBLISHED_DATA_SETS[name].title if name in PUBLISHED_DATA_SETS else name


def fit_of(resize: str | tuple[int, int], name: str) -> tuple[int, int] | None:
    """Return what images are resized to fit; None = they keep their size.

    Args:
        resize: ``none``, ``usual`` for the data set, or a height and width.
        name: of the data set.
    """
    if resize == "usual":
        return PUBLISHED_DATA_SETS[name].fit if name in PUBLISHED_DATA_SETS else None
    return None if resize == "none" else resize


def open_data(
    spec: str,
    split: str,
    *,
    synthetic_size: tuple[int, int],
    synthetic_count: int,
    placeholders: bool = False,
) -> DataOnDisk:
    """Open the split of the data set that ``spec`` names: ``synthetic`` or ``NAME:ROOT``.

    Args:
        placeholders: whether ``NAME`` without its folder stands for placeholder images.
        split: train, val or test.
        synthetic_size: height x width of the synthetic scenes, pixels.
        synthetic_count: how many synthetic scenes the split has.

    Raises:
        UserError: no such data set or split, or its folder is not usable; every problem at once.
    """
    if split not in SPLITS:
        raise UserError(unknown("split", split, SPLITS))
    name, colon, root = spec.partition(":")
    if name == "synthetic":
        if colon:
            raise UserError("data 'synthetic' takes no folder; give synthetic")
        return SyntheticScenes(split, synthetic_size, synthetic_count)
    if name in LAYOUTS:
        if placeholders and not colon and name in PUBLISHED_DATA_SETS:
            return PlaceholderImages(name, split)
        require_files(spec)
        return LAYOUTS[name](Path(root).expanduser(), split)
    raise UserError(unknown("data set", name, DATA_SETS))
