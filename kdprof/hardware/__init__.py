"""Devices: how to find one, torch's settings for it, its state and its energy counter.

Nothing here knows a study, a method or how steps are timed.
"""

from __future__ import annotations

import os

import torch

from kdprof.hardware.base import EnergyMeter, Hardware, State
from kdprof.hardware.cpu import CpuHardware
from kdprof.hardware.nvml import CudaHardware, nvml_of
from kdprof.hardware.several_gpus import SeveralGpus

__all__ = ["EnergyMeter", "Hardware", "State", "hardware_of"]


def hardware_of(
    device: torch.device,
    own_pids: frozenset[int] | None = None,
    count: int = 1,
    users: int | None = None,
) -> Hardware:
    """Return the hardware behind a torch device, or behind several of its kind.

    Args:
        own_pids: ids of kdprof's processes, which do not count as others; this one if not given.
        count: number of GPUs, from the first; or of processes that share the CPU.
        users: how many of kdprof's processes use the first GPU; if not given, all of them but one
            for each further GPU. Each further GPU has one.

    Raises:
        UserError: the GPUs are of different types.
    """
    if device.type != "cuda":
        return CpuHardware(own_pids, processes=count)
    own_pids = own_pids or frozenset({os.getpid()})
    first = users or max(1, len(own_pids) - (count - 1))
    if count == 1:
        return _gpu(device, own_pids, first)
    return SeveralGpus(
        [
            _gpu(torch.device("cuda", index), own_pids, 1 if index else first)
            for index in range(count)
        ]
    )


def _gpu(device: torch.device, own_pids: frozenset[int], users: int) -> CudaHardware:
    return CudaHardware(torch.cuda.get_device_name(device), nvml_of(device), own_pids, users)
