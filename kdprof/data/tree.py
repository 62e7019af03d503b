"""The files of a folder: through links, with endings in any case, and none left out unseen."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from kdprof.errors import Problems, UserError, nearest

ARCHIVE_FOLDER = "__MACOSX"
"""The folder that macOS adds to archives; it holds no images, only files named like them."""
UNREAD = (
    ".avif", ".bmp", ".gif", ".heic", ".jp2", ".npy", ".pgm", ".ppm", ".tga", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
"""Endings of image files that are not read."""
_Identity = tuple[int, int]
"""Device and inode."""


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is passed over: its name begins with a dot, as editors' and
    macOS's own files do, or it is :data:`ARCHIVE_FOLDER`."""
    return name.startswith(".") or name == ARCHIVE_FOLDER


def folders(root: Path) -> list[str]:
    """Return the names of the folders in ``root``, sorted."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted; hidden ones are passed over. Links are followed.

    Raises:
        UserError: links form a loop, a link leads nowhere, or something is neither a file nor a
            folder. It names every problem.
    """
    problems = Problems()
    found = sorted(_files(folder, (), problems, hidden=False))
    problems.refuse()
    return found


def _files(
    folder: Path, above: tuple[_Identity, ...], problems: Problems, *, hidden: bool
) -> Iterator[Path]:
    """Yield the files below a folder, and append what is wrong to ``problems``.

    Args:
        above: the folders that hold it.
        hidden: whether hidden files are included.
    """
    try:
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"{folder} cannot be read: {error.strerror}; change that or remove it")
        return
    if identity in above:
        problems.append(f"{folder} links to a folder that holds it, a loop; remove the link")
        return
    for entry in entries:
        path, kind = folder / entry.name, _kind(entry)
        if is_hidden(entry.name) and not hidden:
            continue
        if kind == "folder":
            yield from _files(path, (*above, identity), problems, hidden=hidden)
        elif kind == "file":
            yield path
        else:
            problems.append(f"{path} is {kind}; repair or remove it")


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # of a link to itself
        return "a link that leads nowhere"
    return "a link that leads nowhere" if entry.is_symlink() else "no regular file"


def by_name(
    folder: Path,
    endings: Sequence[str],
    prefix: str = "",
    *,
    empty: bool = False,
    refused: Collection[str] = (),
) -> dict[str, Path]:
    """Return the files below a folder that have one of the endings, in upper or lower case, sorted
    by their path without the ending.

    Args:
        prefix: is put before each of these paths.
        empty: whether the folder may be missing or have no such file.
        refused: other endings that no file below the folder may have.

    Raises:
        UserError: two files differ only in their endings, a file has a refused ending, or a link is
            wrong (see :func:`files_below`). It names every problem.
    """
    if not folder.is_dir() and empty:
        return {}
    if not folder.is_dir():
        parent = folder.parent
        there = nearest(folder.name, folders(parent)) if parent.is_dir() else f"no folder {parent}"
        raise UserError(f"no folder {folder}; in {parent}: {there}")
    found: dict[str, Path] = {}
    unread: list[Path] = []
    problems = Problems()
    for path in files_below(folder):
        relative = path.relative_to(folder).as_posix()
        ending = _ending_of(relative, endings)
        if ending is None:
            unread += [path] if _ending_of(relative, refused) else []
            continue
        key = f"{prefix}{relative.removesuffix(ending)}"
        if key in found:
            problems.append(f"{found[key]} and {path} have the same name; remove one of them")
        found[key] = path
    problems += _unread(folder, unread, endings)
    if not found and not empty:
        wanted = ", ".join(endings)
        problems.append(f"{folder} holds no {wanted} file; put the split there")
    problems.refuse()
    return dict(sorted(found.items()))


def _ending_of(path: str, endings: Collection[str]) -> str | None:
    """Return the end of a path that is one of the endings except for case."""
    folded = path.lower()
    return next((path[-len(e) :] for e in endings if folded.endswith(e.lower())), None)


def _unread(folder: Path, paths: Sequence[Path], endings: Sequence[str]) -> list[str]:
    """Return one line about files in formats that are not read; a format may be that of them
    all."""
    if not paths:
        return []
    many = f"{len(paths)} files, such as {paths[0]}, are" if len(paths) > 1 else f"{paths[0]} is"
    return [f"{folder}: {many} not read; convert to {endings[0]} or remove"]


def passed_over(root: Path, used: Collection[Path]) -> Counter[str]:
    """Return how many files below a folder are not among ``used``, by place and ending.

    Hidden files are counted as well. A place is a path of at most two folders: ``gtFine/val``.
    """
    known, problems = set(used), Problems()
    every = _files(root, (), problems, hidden=True)
    found = Counter(_described(path.relative_to(root)) for path in every if path not in known)
    if problems:
        found["links to nothing, loops and folders that cannot be read"] = len(problems)
    return found


def _described(path: Path) -> str:
    if any(map(is_hidden, path.parts)):
        return "hidden"
    place = "/".join(path.parts[:-1][:2])
    kind = path.suffix.lower() or "without ending"
    return f"{place}: {kind}" if place else kind
