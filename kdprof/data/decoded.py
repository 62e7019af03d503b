"""Decoding a whole data set once, with all cores; into memory, where it stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from kdprof.data.base import SegmentationData
from kdprof.data.threads import in_threads
from kdprof.errors import UserError
from kdprof.progress import Progress

Made = TypeVar("Made")


class Decoded(SegmentationData):
    """A data set in memory. Its images and labels are decoded by the constructor.

    Args:
        most: decode at most so many, spread over the data set, which stand for all of them: enough
            to measure what loading costs.

    Raises:
        UserError: a file cannot be used. It names all such files.
    """

    def __init__(self, data: SegmentationData, progress: Progress, most: int | None = None):
        super().__init__(data.name, data.split, data.classes)
        self._length = len(data)
        step = 1 if most is None else max(1, self._length // most)
        indices = range(0, self._length, step)[:most]
        self._samples = decode_all(data, lambda index, sample: sample, progress, indices)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._samples[index % len(self._samples)]

    def label(self, index: int) -> Tensor:
        """Return the label of an image."""
        return self[index][1]


def decode_all(
    data: SegmentationData,
    use: Callable[[int, tuple[Tensor, Tensor]], Made],
    progress: Progress,
    indices: Sequence[int] | None = None,
) -> list[Made]:
    """Decode images in threads and return the results of ``use``, which the threads call.

    Args:
        indices: of the images; all if not given.

    Raises:
        UserError: a file cannot be used. It names all such files.
    """

    def make(index: int) -> Made | UserError:
        try:
            return use(index, data[index])
        except UserError as error:
            return error

    indices = range(len(data)) if indices is None else indices
    with progress.task(f"decoding {data.name} {data.split}", len(indices)) as advance:
        made = in_threads(make, indices, lambda: advance(1))
    wrong = [problem for m in made if isinstance(m, UserError) for problem in m.problems]
    if wrong:
        raise UserError(*wrong)
    return [m for m in made if not isinstance(m, UserError)]
