"""Peak memory of a step: the CUDA allocator's, or the process's resident set on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from kdprof.device import Hardware
from kdprof.records import Memory

NO_ALLOCATOR = "the CPU has no caching allocator to ask; see memory_bytes.process"


def peak_memory(
    steps: Callable[[], None], device: torch.device, hardware: Hardware
) -> tuple[Memory, dict[str, str]]:
    """Run ``steps`` and return the peaks, with the reason for each that is not available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        steps()
        torch.cuda.synchronize(device)
        process, reason = hardware.process_memory_bytes()
        memory = Memory(
            peak_allocated=torch.cuda.max_memory_allocated(device),
            peak_reserved=torch.cuda.max_memory_reserved(device),
            process=process,
        )
        return memory, {} if reason is None else {"memory_bytes.process": reason}
    reset = _reset_peak_rss()
    steps()
    process = _peak_rss_bytes() if reset else None
    missing = dict.fromkeys(("memory_bytes.peak_allocated", "memory_bytes.peak_reserved"))
    unavailable = dict.fromkeys(missing, NO_ALLOCATOR)
    if process is None:
        unavailable["memory_bytes.process"] = "this system cannot reset a process's peak memory"
    return Memory(peak_allocated=None, peak_reserved=None, process=process), unavailable


def _reset_peak_rss() -> bool:
    """Make the kernel forget the process's peak so far (Linux), so that a step has its own."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss_bytes() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory a step can still take on the device; None where nobody can say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _page_cache_bytes()
    except (ValueError, OSError):
        return None


def _page_cache_bytes() -> int:
    """Return what the kernel would give back from its page cache."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Cached:"):
            return int(line.split()[1]) * 1024
    return 0
