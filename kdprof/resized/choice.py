"""Which form runs: by device and size, as measured with ``benchmarks/task_loss.py``."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from kdprof.hardware.blocks import device_type
from kdprof.resized.tiles import by_kernels

Form = Literal["plain", "bands", "tiles"]

LEAST_ELEMENTS = 2**18
"""Resized logits below which a CPU keeps their whole map, 1 MiB. Ratios of seconds, bands / plain,
forward and backward, on two cores of a Sapphire Rapids Xeon with one and with two threads:

    (N, C, H, W)         elements   1 thread   2 threads
    (4, 3, 16, 20)          4e3       5.0         4.9
    (2, 12, 64, 64)         1e5       0.7         1.2
    (8, 12, 64, 64)         4e5       0.4         0.7
    (1, 5, 512, 1024)       3e6       0.3         0.4
    (1, 19, 512, 1024)      1e7       0.13        0.15     stride 8; 0.4 to 0.5 at stride 2
    (1, 150, 512, 1024)     8e7       0.08        0.1

So neither the number of classes nor that of threads decides, but the fixed cost of each operator.
"""


def form_of(logits: Tensor, size: tuple[int, int]) -> Form:
    """Return the form for (N, C, h, w) logits that are resized to ``size``.

    Logits that have the size already are their own map, so nothing is saved. A CPU reduces a map in
    the plain form too, because the result is smaller than what it is made from.
    """
    device, small = device_type(logits), logits.shape[-2:]
    if small == size:
        return "plain"
    if device == "cuda":
        return "tiles" if by_kernels(logits) else "plain"
    elements = logits.shape[:2].numel() * math.prod(size)
    enlarges = math.prod(size) > small.numel()
    return "bands" if device == "cpu" and enlarges and elements >= LEAST_ELEMENTS else "plain"
