"""A fixed kernel timed between the blocks: it shows changes of the machine's own speed."""

from __future__ import annotations

import itertools
import statistics

import torch

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
        size, dtype = (8192, torch.float16) if device.type == "cuda" else (512, torch.float32)
        self._matrix = torch.full((size, size), 1e-3, dtype=dtype, device=device)
        self._clock = clock

    def warm_up(self) -> None:
        """Run until the caches are warm for this kernel."""
        self.seconds()
        self.seconds()

    def seconds(self) -> float:
        """Time a few products now and return their median seconds; wait for the device."""
        return unpaused(self._seconds)

    def _seconds(self) -> float:
        stamps = [self._clock.stamp()]
        for _ in range(REPEATS):
            torch.mm(self._matrix, self._matrix)
            stamps.append(self._clock.stamp())
        self._clock.synchronize()
        pairs = itertools.pairwise(stamps)
        return statistics.median(self._clock.between(*pair) for pair in pairs)
