"""Random streams addressed by counters: no state of a generator is kept between draws."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purpose of a draw. It is the first number of every address, because numpy pads addresses
    with zeros: without it ``[seed, epoch]`` and ``[seed, batch, 0]`` would be the same stream."""

    ORDER = 1
    AUGMENTATION = 2
    SCENE = 3


def generator(stream: Stream, *address: int) -> np.random.Generator:
    """Return the generator of a stream at an address of non-negative integers, a pure function."""
    return np.random.default_rng([stream, *address])
