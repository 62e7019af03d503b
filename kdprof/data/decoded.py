"""Decoding a whole data set once, with all cores; into memory, where it then lies."""

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
    """Every image and label of ``data``, decoded when this is made.

    Raises:
        UserError: a file cannot be used; the unusable ones all together.
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
    """Decode every image in threads and return what ``use`` makes of each, there.

    Raises:
        UserError: a file cannot be used; the unusable ones all together.
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
    return made


def in_threads(
    work: Callable[[Item], Made],
    items: Iterable[Item],
    advance: Callable[[], None] = lambda: None,
) -> list[Made]:
    """Return ``work`` of each item, in order, one thread per core; ``advance`` is called here.

    The first exception is raised, and what had not begun by then is not done.
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
