"""Images and labels of a split, decoded once into a file that later processes map into memory.

A cache belongs to the files that it was made from (paths, sizes, times of modification): other
files get another cache. Old caches are not removed; the folder can be deleted at any time.

Every image has a CRC-32 in the index, and opening a cache checks all of them. This runs at about
2 GiB/s per core, which is faster than reading the file, and it brings the file into the page cache.
A damaged cache is made again.

The file::

    header    magic, number of images, CRC-32 of the index
    index     one INDEX entry per image
    pixels    red, green, blue and label plane of each image, uint8
"""

from __future__ import annotations

import hashlib
import inspect
import json
import mmap
import os
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor

from kdprof.data.base import DataOnDisk, SegmentationData
from kdprof.data.decoded import Decoded, decode_all
from kdprof.data.threads import in_threads
from kdprof.errors import KdprofError, UserError
from kdprof.progress import Progress
from kdprof.store import LEASE_S, Held, Lock, Lost, expanded, replace_durably

HEADER = struct.Struct("<8sQI")
MAGIC = b"kdprof 1"
"""Ends with the version of the layout."""
INDEX = np.dtype(
    [
        ("offset", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("crc", "<u4"),
        ("shown", "u1", 32),  # one bit for each label value
    ]
)
PLANES = 4
ELSEWHERE = (
    'set data_settings.cache_folder to another folder, or data_settings.cache to "none" or "memory"'
)
"""What to do if a cache cannot be written."""
LOOK_S = 0.2
"""How often a process that waits for a cache looks whether it is made."""


class Damaged(KdprofError):
    """The content of a cache file is not what was written."""


def decoded(
    data: DataOnDisk,
    cache: Literal["none", "memory", "disk"],
    folder: str | None,
    progress: Progress,
) -> SegmentationData:
    """Return a data set that is decoded as ``data_settings.cache`` says.

    Args:
        folder: of caches; None = the usual one.

    Raises:
        UserError: a file cannot be used (it names all such files), or the cache cannot be written.
    """
    if cache == "memory":
        return Decoded(data, progress)
    return open_cache(data, cache_folder(folder), progress) if cache == "disk" else data


def cache_folder(given: str | None) -> Path:
    """Return the folder of caches: the given one, or ``kdprof`` in the user's cache folder.

    Raises:
        UserError: there is none: neither XDG_CACHE_HOME nor HOME is set, and the account has no
            home folder.
    """
    return expanded(given) if given else _default_folder()


def _default_folder() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path is invalid and must be ignored.
    if given.is_absolute():
        return given / "kdprof"
    try:
        return Path.home() / ".cache" / "kdprof"
    except RuntimeError:
        raise UserError(f"the cache has no folder: HOME is not set; {ELSEWHERE}") from None


def open_cache(data: DataOnDisk, folder: Path, progress: Progress) -> Cached:
    """Return ``data`` from its cache in ``folder``, which is made if it is missing or damaged.

    If several processes ask at the same time, one makes the cache and the others wait for it.

    Raises:
        UserError: a file of ``data`` cannot be used (it names all such files), or the cache cannot
            be written.
        Damaged: the new cache cannot be read back as it was written.
    """
    path = folder / f"{data.name}-{data.split}-{_key(data)}.cache"
    found = _intact(data, path, progress)
    if found is not None:
        return found
    with using(path, "written"), _lock(path, progress) as lock:
        # Another process may have made it while this one waited.
        found = _intact(data, path, Progress(None))
        if found is not None:
            return found
        _make(data, path, progress, lock)
    return Cached(data, path)


def _intact(data: SegmentationData, path: Path, progress: Progress) -> Cached | None:
    try:
        with using(path, "read"):
            return Cached(data, path) if path.exists() else None
    except Damaged as damage:
        progress.say(f"{damage}; making it again")
        return None


class Cached(SegmentationData):
    """A data set that is read from its cache file.

    Images (3, H, W) and labels (H, W) are views of a read-only mapping, which loader processes
    share. Writing to them ends the process.

    Raises:
        Damaged: the file is not what was written.
    """

    def __init__(self, data: SegmentationData, path: Path):
        super().__init__(data.name, data.split, data.classes)
        self.path = path
        self._pixels = _mapped(path)
        self._index = _read_index(path, self._pixels)
        if not all(in_threads(self._is_intact, range(len(self)))):
            raise Damaged(f"the cache {path} is damaged")

    @cached_property
    def labels_shown(self) -> np.ndarray:
        """The label values that each image shows, (images, 256) booleans, from the index."""
        return np.unpackbits(self._index["shown"], axis=1).astype(bool)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        planes = self._planes(index)
        return planes[:3], planes[3]

    def label(self, index: int) -> Tensor:
        """Return the label of an image."""
        return self._planes(index)[3]

    def _planes(self, index: int) -> Tensor:
        entry = self._index[index]
        size = (PLANES, int(entry["height"]), int(entry["width"]))
        begin = int(entry["offset"])
        return self._pixels[begin : begin + size[0] * size[1] * size[2]].view(size)

    def _is_intact(self, index: int) -> bool:
        return zlib.crc32(self._planes(index).numpy().data) == self._index[index]["crc"]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the pixels. Unpickling maps them again."""
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pixels=_mapped(state["path"]))


def _mapped(path: Path) -> Tensor:
    """Return the bytes of a file; they are read when they are used."""
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # of an empty file
            raise Damaged(f"the cache {path} is empty") from None
    with warnings.catch_warnings():
        # torch warns about read-only memory. A writable mapping would cause no warning, but the
        # system may refuse one that is larger than its memory.
        warnings.simplefilter("ignore")
        return torch.frombuffer(content, dtype=torch.uint8)


def _read_index(path: Path, content: Tensor) -> np.ndarray:
    """Return the entries of all images.

    Raises:
        Damaged: the file is truncated, or its index is not what was written.
    """
    damaged = Damaged(f"the cache {path} is damaged")
    if len(content) < HEADER.size:
        raise damaged
    raw = content.numpy()
    magic, count, crc = HEADER.unpack(raw[: HEADER.size].tobytes())
    end = HEADER.size + count * INDEX.itemsize
    if magic != MAGIC or end > len(raw):
        raise damaged
    index = raw[HEADER.size : end].tobytes()
    if zlib.crc32(index) != crc:
        raise damaged
    found = np.frombuffer(index, INDEX)
    if _end(found) != len(raw):
        raise damaged
    return found


def _end(index: np.ndarray) -> int:
    """Return the size of a cache file, bytes."""
    last = index[-1]
    return int(last["offset"]) + PLANES * int(last["height"]) * int(last["width"])


# Making a cache


def _key(data: DataOnDisk) -> str:
    """Return a hash of everything that the decoded content depends on."""
    code = Path(inspect.getfile(type(data))).read_bytes()
    content = [
        MAGIC.decode(),
        hashlib.sha256(code).hexdigest(),
        PIL.__version__,
        data.identity(),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@contextmanager
def using(path: Path, done: Literal["written", "read"]) -> Iterator[None]:
    """Turn a failure to write or read a cache into a one-line error with the fix.

    Raises:
        UserError: the body raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {path} cannot be {done}: {error.strerror or error}; {ELSEWHERE}"
        ) from error


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[Lock]:
    """Hold the lock of a cache, so that one process makes it; wait for a process that does."""
    lock = Lock(path.with_suffix(".lock"), f"the cache {path}", "made", "wait for it")
    told = False
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock.hold())
                break
            except Held:
                if not told:
                    progress.say(f"waiting for another process that makes the cache {path}")
                told = True
                time.sleep(LOOK_S)
        yield lock


def _make(data: DataOnDisk, path: Path, progress: Progress, lock: Lock) -> None:
    # All processes use the same name, so that the file of a killed process does not stay.
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    index = _planned(data)
    _check_space(path.parent, _end(index))
    try:
        with unfinished.open("wb") as file:
            _write(data, file.fileno(), index, progress, lock)
            os.fsync(file.fileno())
        replace_durably(unfinished, path)
    except Lost:
        raise  # the file is that of the process that makes the cache now
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _planned(data: DataOnDisk) -> np.ndarray:
    """Return the index with the sizes and offsets of the images, which their headers give."""
    index = np.zeros(len(data), INDEX)
    sizes = np.array([data.size(number) for number in range(len(data))], np.int64)
    index["height"], index["width"] = sizes.T
    sizes_bytes = PLANES * sizes.prod(1)
    index["offset"] = HEADER.size + index.nbytes + np.cumsum(sizes_bytes) - sizes_bytes
    return index


def _check_space(folder: Path, size_bytes: int) -> None:
    """Check that a cache fits on the disk, before anything is written.

    Raises:
        UserError: it does not fit. The message says how much is needed and how much is free.
    """
    system = os.statvfs(folder)
    free_bytes = system.f_bavail * system.f_frsize
    if size_bytes > free_bytes:
        raise UserError(
            f"the cache in {folder} needs {size_bytes / 2**30:.1f} GiB, "
            f"{free_bytes / 2**30:.1f} GiB are free; make room, {ELSEWHERE}"
        )


def _write(data: DataOnDisk, file: int, index: np.ndarray, progress: Progress, lock: Lock) -> None:
    renewed = time.monotonic()

    # Not through a mapping: there a full disk would be a signal that kills the process, not an
    # error.
    def put(number: int, sample: tuple[Tensor, Tensor]) -> None:
        nonlocal renewed
        if time.monotonic() - renewed > LEASE_S / 10:
            lock.renew()
            renewed = time.monotonic()
        image, label = sample
        entry = index[number]
        if tuple(label.shape) != (entry["height"], entry["width"]):
            raise UserError(
                f"image {number} of {data.name} {data.split} changed while it was read; try again"
            )
        planes = torch.cat([image, label[None]]).numpy()
        entry["crc"] = zlib.crc32(planes.data)
        entry["shown"] = np.packbits(np.bincount(label.numpy().ravel(), minlength=256) > 0)
        _write_at(file, planes.reshape(-1).data, int(entry["offset"]))

    decode_all(data, put, progress)
    entries = index.tobytes()
    header = HEADER.pack(MAGIC, len(index), zlib.crc32(entries))
    _write_at(file, memoryview(header + entries), 0)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
