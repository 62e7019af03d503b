"""Lists of a split's images, as Pascal VOC has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kdprof.errors import Problems, UserError, nearest
from kdprof.store import read_text

_TWO_PATHS = re.compile(r"(.+?\.(?:jpe?g|png))\s+(\S.*\.png)", re.IGNORECASE)
"""An image and its label, as ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``."""
_FLAGGED = re.compile(r"(.*\S)\s+-?[01]")
"""A name and whether the image shows a class, as ``2007_000032 -1``."""
COMPARED = 1000
"""With more images than this a missing one is reported without the nearest name."""
_KNOWN_ENDING = re.compile(r"\.(jpe?g|png)$", re.IGNORECASE)


class Listed(NamedTuple):
    """The images of a split.

    Attributes:
        file: the list.
        names: of the images without ending, each once, in the order of the list.
        repeated: lines that name an image again.
    """

    file: Path
    names: list[str]
    repeated: int


def read_list(
    folder: Path, lists: Iterable[str], images: Mapping[str, Path], image_folder: str
) -> Listed:
    """Return the images that the first of some lists names.

    A line holds a name, with or without an ending; an image and its label; or a name and a flag.
    Of endings only .jpg, .jpeg and .png are taken off.

    Args:
        lists: names of lists without ``.txt``; the first that exists is read.
        images: the files that may be listed, by name.
        image_folder: the name of their folder, which may stand before a name.

    Raises:
        UserError: there is no such list, or it is empty, no text, names an image that is not there,
            or has a line that may mean two images. It names every problem.
    """
    path = next((folder / f"{n}.txt" for n in lists if (folder / f"{n}.txt").exists()), None)
    if path is None:
        wanted = " or ".join(f"{name}.txt" for name in lists)
        raise UserError(f"no list {wanted} in {folder}; it comes with the data set")
    lines = [line.strip() for line in lines_of(path) if line.strip()]
    if not lines:
        raise UserError(f"{path} lists nothing; download it again")
    problems, found = Problems(), []
    for line in lines:
        problems += filter(None, [_other_label(path, line)])
        readings = _readings(line, image_folder)
        there = list(dict.fromkeys(name for name in readings if name in images))
        if len(there) > 1:
            both = " or ".join(f"'{name}'" for name in there)
            problems.append(f"{path}: '{line}' may mean {both}; rename one of these images")
        elif not there:
            problems.append(_missing(path, readings[-1], images))
        found += there
    problems.refuse()
    names = list(dict.fromkeys(found))
    return Listed(path, names, len(found) - len(names))


def _readings(line: str, image_folder: str) -> Sequence[str]:
    """Return what a line may mean, as names of images; the likeliest last."""
    if (two := _TWO_PATHS.fullmatch(line)) is not None:
        return [_name(two[1], image_folder)]
    # The name itself may end in .png, which then is not an ending: run.png.jpg.
    found = [line.lstrip("/"), _name(line, image_folder)]
    if (flagged := _FLAGGED.fullmatch(line)) is not None:
        found.append(_name(flagged[1], image_folder))
    return found


def _name(text: str, image_folder: str) -> str:
    """Return a path below the folder of images, without a known ending."""
    bare = _KNOWN_ENDING.sub("", text)
    return f"/{bare}".rpartition(f"/{image_folder}/")[2].lstrip("/")


def _missing(path: Path, name: str, images: Collection[str]) -> str:
    close = f"; {nearest(name, images)}" if len(images) <= COMPARED else ""
    return f"no image '{name}', which is listed; get it, or remove it from {path}{close}"


def _other_label(path: Path, line: str) -> str | None:
    """Return what is wrong with a line that names an image and the label of another."""
    two = _TWO_PATHS.fullmatch(line)
    if two is None or Path(two[1]).stem == Path(two[2]).stem:
        return None
    return f"{path}: '{line}' pairs different names; a label has the name of its image"


def lines_of(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, with or without a byte order mark.

    Raises:
        UserError: it is no regular file, is too large, cannot be read, or is no such text.
    """
    return read_text(path).splitlines()
