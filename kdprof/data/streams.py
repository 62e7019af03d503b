"""Random streams addressed by a counter: no generator state is carried from draw to draw."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a draw is for. Leads every address, because numpy pads addresses with zeros: without
    it ``[seed, epoch]`` and ``[seed, batch, 0]`` would be one stream."""

    ORDER = 1
    AUGMENTATION = 2
    SCENE = 3


def generator(stream: Stream, *address: int) -> np.random.Generator:
    """Return the generator at an address of non-negative integers: a pure function of both."""
    return np.random.default_rng([stream, *address])
