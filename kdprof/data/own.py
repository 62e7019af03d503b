"""The user's own data set: ``images/SPLIT`` and ``masks/SPLIT``, with the same stems."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kdprof.data.base import Classes
from kdprof.data.files import PairedImages, classes_of, colour_of, mirrored, root_of
from kdprof.data.labels import VOID, label_pixels
from kdprof.data.lists import lines_of
from kdprof.data.tree import folders
from kdprof.errors import UserError, nearest
from kdprof.method import IGNORE
from kdprof.study import DataSettings
from kdprof.visible import printable

Colour = tuple[int, int, int]


class _Line(NamedTuple):
    """A line of ``classes.txt``: a name and, after a tab, its colour."""

    name: str
    colour: Colour | None


def open_folder(root: Path, split: str, settings: DataSettings | None = None) -> PairedImages:
    """Return a split of a data set of the user's own.

    ``classes.txt`` has a class per line, in order of the masks' values, and optionally a colour
    (``R G B``) after a tab. With masks of colours every line has one, and lines named ``void`` are
    those of pixels that belong to no class.

    Raises:
        UserError: files are missing or cannot be used, or settings do not fit them.
    """
    settings = settings or DataSettings()
    layout = "ROOT holds images/SPLIT, masks/SPLIT and classes.txt"
    root = root_of(root, "folder", layout, [], "images")
    if not (root / "images" / split).is_dir():
        there = nearest(split, folders(root / "images"))
        raise UserError(f"no folder {root / 'images' / split}; in {root / 'images'}: {there}")
    file = root / "classes.txt"
    lines, void = _lines(file), []
    if settings.masks == "colours":
        _require_colours(file, lines)
        void = [line.colour for line in lines if line.name == VOID and line.colour]
        lines = [line for line in lines if line.name != VOID]
    classes = _classes(file, lines)
    pixels = label_pixels(settings, classes, void)
    pairs = mirrored(root / "images" / split, root / "masks" / split, pixels)
    name = f"folder:{root.name}"
    return PairedImages(name, split, classes, pixels, pairs, root=root, lists=[file])


def _lines(path: Path) -> list[_Line]:
    if not path.exists():
        raise UserError(f"no file {path}; write a class per line, in order of the masks' values")
    found, problems = [], []
    for number, line in enumerate(filter(str.strip, lines_of(path)), 1):
        name, *rest = line.strip().split("\t")
        if printable(name) != name:
            problems.append(f"{path}, line {number}: a class is a name of visible characters")
        numbers = rest[0].split() if rest else []
        right = len(numbers) == 3 and all(n.isdecimal() and int(n) < 256 for n in numbers)
        if numbers and not right:
            problems.append(f"{path}, line {number}: write a colour as R G B, each 0-255")
        found.append(_Line(name.strip(), colour_of(numbers) if right else None))
    if problems:
        raise UserError(*problems)
    return found


def _require_colours(path: Path, lines: list[_Line]) -> None:
    without = [line.name for line in lines if line.colour is None]
    if without:
        raise UserError(
            f'{path}: data_settings.masks = "colours" needs a colour of every class, as R G B '
            f"after a tab; there is none of {', '.join(without)}"
        )


def _classes(path: Path, lines: list[_Line]) -> Classes:
    names = [line.name for line in lines]
    if len(names) != len(set(names)) or not 1 <= len(names) < IGNORE:
        raise UserError(f"{path} must hold 1 to 254 classes of different names, has {len(names)}")
    spread = classes_of("ade20k").palette
    colours = (line.colour or spread[index % len(spread)] for index, line in enumerate(lines))
    return Classes(tuple(names), tuple(colours))
