"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

from kdprof.data.base import DataOnDisk
from kdprof.data.labels import published_pixels
from kdprof.data.layouts import LAYOUTS, PUBLISHED_DATA_SETS
from kdprof.data.own import open_folder
from kdprof.data.placeholder import PlaceholderImages
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError, unknown
from kdprof.store import expanded
from kdprof.study import DataSettings

DATA_SETS = ("synthetic", *LAYOUTS)
SPLITS = ("train", "val", "test")


def require_files(spec: str) -> None:
    """Check that a data set on disk is named with its folder.

    Raises:
        UserError: ``spec`` names a data set on disk, but no folder.
    """
    name, _, root = spec.partition(":")
    if name in LAYOUTS and not root:
        raise UserError(f"data '{name}' needs its folder; give {name}:ROOT")


def uses_placeholders(spec: str) -> bool:
    """Return whether placeholder images stand for the files of a data set."""
    return ":" not in spec and spec in PUBLISHED_DATA_SETS


def title_of(name: str) -> str:
    """Return the title of a data set in papers; its own name if it is not a published one."""
    return PUBLISHED_DATA_SETS[name].title if name in PUBLISHED_DATA_SETS else name


def fit_of(resize: str | tuple[int, int], name: str) -> tuple[int, int] | None:
    """Return the size that images are resized to fit into; None = they keep their size.

    Args:
        resize: ``none``, ``usual`` for the data set, or a height and width.
        name: the name of the data set.
    """
    if not isinstance(resize, str):
        return resize
    published = PUBLISHED_DATA_SETS.get(name) if resize == "usual" else None
    return published.fit if published is not None else None


def open_data(
    spec: str,
    split: str,
    *,
    synthetic_size: tuple[int, int],
    synthetic_count: int,
    placeholders: bool = False,
    labels: DataSettings | None = None,
) -> DataOnDisk:
    """Open the split of the data set that ``spec`` names: ``synthetic`` or ``NAME:ROOT``.

    Args:
        placeholders: whether ``NAME`` without its folder means placeholder images.
        split: train, val or test.
        synthetic_size: height x width of the synthetic scenes, pixels.
        synthetic_count: number of synthetic scenes in the split.
        labels: settings that say what label files mean; None = the usual ones.

    Raises:
        UserError: the data set or split does not exist, or its folder is not usable. It names every
            problem.
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
        return _opened(name, expanded(root), split, labels or DataSettings())
    raise UserError(unknown("data set", name, DATA_SETS))


def _opened(name: str, root: Path, split: str, settings: DataSettings) -> DataOnDisk:
    if name == "folder":
        return open_folder(root, split, settings)
    data = LAYOUTS[name](root, split)
    data.pixels = published_pixels(name, settings, data.classes) or data.pixels
    return data
