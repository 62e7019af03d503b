"""The content of a data set on disk, as hashes of its files, which are kept between calls.

A file is read again if its size, its time of modification or its time of change is another, or if
it had been changed so shortly before that its times might not show the next change.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from kdprof.data.files import PairedImages
from kdprof.data.threads import in_threads
from kdprof.errors import KdprofError, Problems, UserError
from kdprof.progress import Progress
from kdprof.store import file_sha256, read_file, short_hash, write_atomic

CLOCK_NS = 2_000_000_000
"""The coarsest step in which a file system writes times."""

Stamp = tuple[int, int, int]
"""Size in bytes, times of modification and of change in nanoseconds."""


def content_of(data: PairedImages, folder: Path | None, progress: Progress) -> dict[str, str]:
    """Return the hash of the images of a split and that of its labels, each in order.

    They are equal where all files have the same content in the same order, wherever they lie and
    whatever they are called.

    Args:
        folder: where the hashes of files are kept; without one, or if nothing can be written
            there, all files are read each time.

    Raises:
        UserError: files cannot be read. It names all of them.
    """
    kept = folder and folder / f"{data.name}-{data.split}-{_place(data)}.hashes.json"
    hashes = _hashes_of([path for pair in data.pairs for path in pair], kept, progress)
    return {
        f"{data.split} images": short_hash("\n".join(hashes[::2])),
        f"{data.split} labels": short_hash("\n".join(hashes[1::2])),
    }


def file_sizes(data: PairedImages) -> str:
    """Return a hash of the sizes of all files of a split, in order.

    Raises:
        UserError: files cannot be read. It names all of them.
    """
    stamps = _stamps([path for pair in data.pairs for path in pair])
    return short_hash(" ".join(str(size) for size, _, _ in stamps))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error) from None


def _hashes_of(paths: Sequence[Path], kept: Path | None, progress: Progress) -> list[str]:
    names, stamps = [str(path.absolute()) for path in paths], _stamps(paths)
    known = _read(kept)
    hashes = [
        known[name][1] if name in known and known[name][0] == stamp else None
        for name, stamp in zip(names, stamps, strict=True)
    ]
    missing = [path for path, known_hash in zip(paths, hashes, strict=True) if known_hash is None]
    if not missing:
        return [one for one in hashes if one is not None]
    now_ns = time.time_ns()
    with progress.task("reading the data", len(missing)) as advance:
        read = iter(in_threads(digest, missing, lambda: advance(1)))
    made = [one if one is not None else next(read) for one in hashes]
    settled = {
        name: (stamp, one)
        for name, stamp, one in zip(names, stamps, made, strict=True)
        if max(stamp[1:]) < now_ns - CLOCK_NS
    }
    if kept is not None:
        with contextlib.suppress(OSError, KdprofError):  # without them, files are read again
            write_atomic(kept, json.dumps(settled))
    return made


def _stamps(paths: Sequence[Path]) -> list[Stamp]:
    found, problems = [], Problems()
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            problems += _unreadable(path, error).problems
            continue
        found.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    problems.refuse()
    return found


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read: {error.strerror}; replace it")


def _place(data: PairedImages) -> str:
    """Return a name for the folder of a data set."""
    return short_hash(str(data.root.absolute())).removeprefix("sha256:")


def _read(kept: Path | None) -> dict[str, tuple[Stamp, str]]:
    """Return the stamps and hashes that were kept, by path; none if there is no such file or it is
    damaged."""
    if kept is None:
        return {}
    try:
        found = json.loads(read_file(kept))
        return {name: (_stamp(stamp), str(known)) for name, (stamp, known) in found.items()}
    except (UserError, OSError, ValueError, TypeError, AttributeError):
        return {}


def _stamp(numbers: Sequence[int]) -> Stamp:
    size, modified_ns, changed_ns = numbers
    return size, modified_ns, changed_ns
