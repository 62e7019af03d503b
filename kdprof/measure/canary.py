"""A fixed kernel timed between the blocks: it tells what the machine itself did meanwhile."""

from __future__ import annotations

import itertools

import torch

from kdprof.measure.clock import Clock

REPEATS = 5
"""Kernels per reading."""


class Canary:
    """A matrix product that no study changes.

    Long enough to feel a clock or a neighbour (about 2 ms), short enough not to matter.
    """

    def __init__(self, device: torch.device, clock: Clock):
        size = 4096 if device.type == "cuda" else 512
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn(size, size, generator=generator).to(device)
        self._clock = clock

    def warm_up(self) -> None:
        """Run until its own caches are warm."""
        self.seconds()
        self.seconds()

    def seconds(self) -> list[float]:
        """Return the seconds of each of a few products, now. Waits for the device."""
        stamps = [self._clock.stamp()]
        for _ in range(REPEATS):
            torch.mm(self._matrix, self._matrix)
            stamps.append(self._clock.stamp())
        self._clock.synchronize()
        pairs = itertools.pairwise(stamps)
        return [self._clock.between(before, after) for before, after in pairs]
