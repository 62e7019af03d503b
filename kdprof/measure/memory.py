"""Peak memory of a step, phase by phase: the CUDA allocator's, or the process's resident set on a
CPU. It is read while only this step is resident."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kdprof.hardware import Hardware
from kdprof.hardware.device import free_unused
from kdprof.measure.clock import Clock
from kdprof.measure.latency import BLOCK_S
from kdprof.measure.subject import Subject
from kdprof.records import Memory
from kdprof.step import Mark, ignore_phase

NO_ALLOCATOR = "the CPU has no caching allocator; see memory_bytes.process"
REPLAYED = (
    "the replay of a CUDA graph allocates nothing, so the allocator's peaks lack what it uses; see "
    "memory_bytes.peak_reserved"
)
NO_RESET = "this system cannot reset a process's peak memory"
SETTLING_STEPS = 2
"""Steps before the peaks are read: cuDNN's search for kernels and the optimiser's first allocation
are not part of a step."""
LEAK_STEPS = 6
SLOW_LEAK_STEPS = 4
"""The number of steps that show a leak, and of steps that each take longer than BLOCK_S."""
LEAST_LEAK_BYTES = {"cuda": 1, "cpu": 2**18}
"""Least growth per step that is a leak: the CUDA allocator is exact, a resident set is not."""


@dataclass(frozen=True)
class MemoryReading:
    """The memory that one step needs, and whether it frees it."""

    memory: Memory
    unavailable: dict[str, str]
    leaked_bytes: int
    """Kept by every further step, on average; 0 if the step frees its memory."""
    step_s: list[float]
    """Seconds of the steps that ran, one after the other."""


class _Peaks(NamedTuple):
    """Bytes by phase, and the bytes that every step kept."""

    phases: dict[str, int]
    reserved: dict[str, int]
    leaked_bytes: int
    step_s: list[float]


class _CudaPeaks:
    """The allocator's peaks. They are counters on the host: reading them does not synchronise."""

    def __init__(self, device: torch.device):
        self._device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def held_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)


class _ResidentPeaks:
    """The process's resident set, as the Linux kernel reports it."""

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        return _status_bytes("VmHWM")

    def reserved_bytes(self) -> int:
        return 0  # a CPU has no caching allocator that could reserve

    def held_bytes(self) -> int:
        return _status_bytes("VmRSS")


def empty_allocators(device: torch.device) -> None:
    """Give memory that nothing uses back to the system, so that it is not counted as a step's."""
    gc.collect()
    free_unused(device)
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes(device: torch.device) -> int:
    """Return the memory that is allocated now: on a GPU, or by this process."""
    with contextlib.suppress(OSError):
        return (_CudaPeaks(device) if device.type == "cuda" else _ResidentPeaks()).held_bytes()
    return 0


def read_memory(
    subject: Subject, device: torch.device, hardware: Hardware, clock: Clock
) -> MemoryReading:
    """Run a few steps and return their peaks, with the reason for each that is not available.

    Raises:
        BadStep: a loss is not finite.
    """
    step_s = [_timed(subject, clock, ignore_phase) for _ in range(SETTLING_STEPS)]
    steps = SLOW_LEAK_STEPS if step_s[-1] > BLOCK_S else LEAK_STEPS
    if device.type == "cuda":
        return _cuda_reading(subject, device, hardware, clock, steps, step_s)
    unavailable = dict.fromkeys(
        (f"memory_bytes.{n}" for n in ("peak_allocated", "peak_reserved", "phases_reserved")),
        NO_ALLOCATOR,
    )
    if not _can_reset():
        missing = dict.fromkeys(("memory_bytes.process", "memory_bytes.phases"), NO_RESET)
        memory = Memory(**dict.fromkeys(Memory.model_fields))
        return MemoryReading(memory, unavailable | missing, 0, step_s)
    peaks = _peaks_by_phase(subject, clock, _ResidentPeaks(), LEAST_LEAK_BYTES["cpu"], steps)
    memory = Memory(
        peak_allocated=None,
        peak_reserved=None,
        process=max(peaks.phases.values()),
        phases=peaks.phases,
        phases_reserved=None,
    )
    return MemoryReading(memory, unavailable, peaks.leaked_bytes, step_s + peaks.step_s)


def _timed(subject: Subject, clock: Clock, mark: Mark) -> float:
    """Run one step, check it, and return its seconds."""
    began = clock.stamp()
    result = subject.run(mark)
    ended = clock.stamp()
    clock.synchronize()
    subject.check(result)
    return clock.between(began, ended)


def _cuda_reading(
    subject: Subject,
    device: torch.device,
    hardware: Hardware,
    clock: Clock,
    steps: int,
    settling_s: list[float],
) -> MemoryReading:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # workspaces left from cuDNN's search
    torch.cuda.reset_peak_memory_stats(device)
    peaks = _peaks_by_phase(subject, clock, _CudaPeaks(device), LEAST_LEAK_BYTES["cuda"], steps)
    torch.cuda.synchronize(device)
    process, reason = hardware.process_memory_bytes()
    replayed = _is_replayed(subject)
    memory = Memory(
        peak_allocated=None if replayed else max(peaks.phases.values()),
        peak_reserved=max(peaks.reserved.values()),
        process=process,
        phases=None if replayed else peaks.phases,
        phases_reserved=peaks.reserved,
    )
    unavailable = {} if reason is None else {"memory_bytes.process": reason}
    if replayed:
        names = ("memory_bytes.peak_allocated", "memory_bytes.phases")
        unavailable |= dict.fromkeys(names, REPLAYED)
    return MemoryReading(memory, unavailable, peaks.leaked_bytes, settling_s + peaks.step_s)


def _is_replayed(subject: Subject) -> bool:
    """Return whether a step replays CUDA graphs, whose memory the allocator set aside before."""
    step = subject.traced
    return step is not None and step.settings.compile == "cuda-graphs"


def _peaks_by_phase(
    subject: Subject,
    clock: Clock,
    peaks: _CudaPeaks | _ResidentPeaks,
    least_leak: int,
    steps: int,
) -> _Peaks:
    """Return the highest peak of each phase over a few steps, and the bytes leaked per step."""
    found: dict[str, int] = {}
    reserved: dict[str, int] = {}
    held: list[int] = []
    step_s: list[float] = []

    def mark(phase: str) -> None:
        found[phase] = max(found.get(phase, 0), peaks.peak_bytes())
        reserved[phase] = max(reserved.get(phase, 0), peaks.reserved_bytes())
        peaks.reset()

    for _ in range(steps):
        peaks.reset()
        step_s.append(_timed(subject, clock, mark))
        if not subject.phases:
            mark("step")
        gc.collect()  # reference cycles are freed late, but are no leak
        held.append(peaks.held_bytes())
    grown = [after - before for before, after in itertools.pairwise(held)]
    leaks = min(grown) >= least_leak
    return _Peaks(found, reserved, sum(grown) // len(grown) if leaks else 0, step_s)


def _can_reset() -> bool:
    try:
        _ResidentPeaks().reset()
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory a step can still take on the device; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _page_cache_bytes()
    except (ValueError, OSError):
        return None


def _page_cache_bytes() -> int:
    """Return the bytes that the kernel could free from its page cache."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) * 1024
    return 0
