"""How large the blocks of a blocked computation are, by the kind of device it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

CPU_BLOCK_BYTES = 16 * 2**20
"""Bytes of one tensor of a block on a CPU: it fits into the caches of large processors."""
DEVICE_BLOCK_BYTES = 512 * 2**20
"""The same on a GPU, which needs few, large operators. A computation has two to four such tensors
in memory at a time, 1 to 2 GiB. The number is fixed and not a share of the memory that is free, so
that a step computes the same sums in the same order whatever else is on the device."""

_counted_for: str | None = None


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """Let everything in the body run as on another kind of device, without having one.

    It is for counting a step on tensors without content: their device is always the CPU.

    Args:
        device_type: ``cpu`` or ``cuda``.
    """
    global _counted_for
    before, _counted_for = _counted_for, device_type
    try:
        yield
    finally:
        _counted_for = before


def device_type(tensor: Tensor) -> str:
    """Return the kind of device that a tensor is on, or that its work is counted for."""
    return _counted_for or tensor.device.type


def block_elements(tensor: Tensor) -> int:
    """Return the most float32 numbers of one tensor of a block, on the device of ``tensor``."""
    return (CPU_BLOCK_BYTES if device_type(tensor) == "cpu" else DEVICE_BLOCK_BYTES) // 4
