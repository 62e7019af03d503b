"""A fixed kernel timed between the blocks: it tells what the machine itself did meanwhile."""

from __future__ import annotations

import itertools
import statistics

import torch

from kdprof.measure.clock import Clock

REPEATS = 5
"""Kernels per reading."""


class CanaryKernel:
    """A matrix product that no study changes: on a GPU in half precision, because switches for TF32
    come with a study's precision.

    Long enough to feel a clock or a neighbour (about 2 ms), short enough not to matter.
    """

    def __init__(self, device: torch.device, clock: Clock):
        size, dtype = (8192, torch.float16) if device.type == "cuda" else (512, torch.float32)
        self._matrix = torch.full((size, size), 1e-3, dtype=dtype, device=device)
        self._clock = clock

    def warm_up(self) -> None:
        """Run until its own caches are warm."""
        self.seconds()
        self.seconds()

    def seconds(self) -> float:
        """Return the median seconds of a few products, now. Waits for the device."""
        stamps = [self._clock.stamp()]
        for _ in range(REPEATS):
            torch.mm(self._matrix, self._matrix)
            stamps.append(self._clock.stamp())
        self._clock.synchronize()
        pairs = itertools.pairwise(stamps)
        return statistics.median(self._clock.between(*pair) for pair in pairs)
