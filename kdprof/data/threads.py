"""Work on many items with one thread per core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


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
