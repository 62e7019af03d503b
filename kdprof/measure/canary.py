"""A fixed kernel timed between the blocks: it shows changes of the machine's own speed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdprof.measure.clock import Clock
from kdprof.pauses import unpaused

REPEATS = 5
"""Kernels per reading."""


class CanaryKernel:
    """A matrix product that is the same in every study.

    On a GPU it runs in half precision, because a study's precision sets the TF32 switches. It takes
    about 2 ms: long enough to show a change of clock or load, short enough not to disturb.
    """

    def __init__(self, device: torch.device, clock: Clock):
        self._device, self._clock = device, clock

    @contextmanager
    def ready(self) -> Iterator[Callable[[], float]]:
        """Warm up and yield the function that times a few products now and returns their median
        seconds; it waits for the device.

        The matrix, 128 MiB on a GPU, is in memory in the body only: it is not a step's.
        """
        on_gpu = self._device.type == "cuda"
        size, dtype = (8192, torch.float16) if on_gpu else (512, torch.float32)
        matrix = torch.full((size, size), 1e-3, dtype=dtype, device=self._device)

        def seconds() -> float:
            return unpaused(lambda: self._seconds(matrix))

        seconds()
        seconds()  # the caches are warm for this kernel now
        yield seconds

    def _seconds(self, matrix: Tensor) -> float:
        stamps = [self._clock.stamp()]
        for _ in range(REPEATS):
            torch.mm(matrix, matrix)
            stamps.append(self._clock.stamp())
        self._clock.synchronize()
        pairs = itertools.pairwise(stamps)
        return statistics.median(self._clock.between(*pair) for pair in pairs)
