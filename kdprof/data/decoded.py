"""A data set that was decoded once and lies in memory."""

from __future__ import annotations

from torch import Tensor

from kdprof.data.dataset import SegmentationData
from kdprof.errors import UserError


class Decoded:
    """Every image and label of ``data``, decoded when this is made.

    Raises:
        UserError: a file cannot be used; the unusable ones all together.
    """

    def __init__(self, data: SegmentationData):
        self.name, self.split, self.num_classes = data.name, data.split, data.num_classes
        self.class_names, self.palette = data.class_names, data.palette
        self._samples = _all_samples(data)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._samples[index]


def _all_samples(data: SegmentationData) -> list[tuple[Tensor, Tensor]]:
    samples, problems = [], []
    for index in range(len(data)):
        try:
            samples.append(data[index])
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return samples
