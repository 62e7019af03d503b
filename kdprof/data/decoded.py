"""Decoding a whole data set once, with all cores; into memory, where it stays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from kdprof.data.base import SegmentationData
from kdprof.errors import UserError
from kdprof.progress import Progress

Item = TypeVar("Item")
Made = TypeVar("Made")


class Decoded(SegmentationData):
    """A data set in memory. Every image and label of ``data`` is decoded by the constructor.

    Raises:
        UserError: a file cannot be used. It names all such files.
    """

    def __init__(self, data: SegmentationData, progress: Progress):
        super().__init__(data.name, data.split, data.classes)
        self._samples = decode_all(data, lambda index, sample: sample, progress)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._samples[index]

    def label(self, index: int) -> Tensor:
        """Return the label of an image."""
        return self._samples[index][1]


def decode_all(
    data: SegmentationData,
    use: Callable[[int, tuple[Tensor, Tensor]], Made],
    progress: Progress,
) -> list[Made]:
    """Decode every image in threads and return the results of ``use``, which the threads call.

    Raises:
        UserError: a file cannot be used. It names all such files.
    """

    def make(index: int) -> Made | UserError:
        try:
            return use(index, data[index])
        except UserError as error:
            return error

    with progress.task(f"decoding {data.name} {data.split}", len(data)) as advance:
        made = in_threads(make, range(len(data)), lambda: advance(1))
    wrong = [problem for m in made if isinstance(m, UserError) for problem in m.problems]
    if wrong:
        raise UserError(*wrong)
    return [m for m in made if not isinstance(m, UserError)]


def in_threads(
    work: Callable[[Item], Made],
    items: Iterable[Item],
    advance: Callable[[], None] = lambda: None,
) -> list[Made]:
    """Return ``work`` of each item, in order, with one thread per core.

    ``advance`` is called in the calling thread after each item. The first exception is raised, and
    work that had not begun by then is dropped.
    """
    made = []
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for result in pool.map(work, items):
            made.append(result)
            advance()
    finally:
        pool.shutdown(cancel_futures=True)
    return made
