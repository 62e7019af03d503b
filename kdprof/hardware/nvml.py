"""An NVIDIA GPU seen through NVML: clocks, throttling, other processes, memory, energy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdprof.hardware.base import EnergyMeter, Reading, State, state_of

GPU_CLOCK_SPREAD = 0.05
"""The limit for changes of a GPU's clock. It normally varies by one or two bins of 15 MHz (1 %);
with 5 %, samples have different speeds."""
GPU_CLOCK_DROP = 0.03
"""A relative drop of the clock that explains one slow block: more than two bins."""

# Constants of nvml.h.
_SM_CLOCK, _MEMORY_CLOCK, _CORE_TEMPERATURE = 1, 2, 0
_CLOCK_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
}
HARMLESS_CLOCK_REASONS = frozenset({"idle", "application clocks", "display clocks"})
"""Reasons that a user has set, or that end when work begins; all others slow a step down."""


class NoNvml:
    """The null object for missing NVML: every query has the same result."""

    def __init__(self, reason: str):
        self.reason = reason

    def ask(self, function: str, *arguments: Any) -> Reading:
        """Return None and the reason."""
        return None, self.reason


class Nvml:
    """NVML for one GPU.

    Args:
        library: the module ``pynvml``, initialised.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, library: Any, handle: Any):
        self._library, self._handle = library, handle

    def ask(self, function: str, *arguments: Any) -> Reading:
        """Call a function of NVML by its name; ``nvmlDevice...`` ones are given the GPU first.

        Returns:
            Its value, or None and NVML's reason.
        """
        call = getattr(self._library, function, None)
        if call is None:
            return None, f"this nvidia-ml-py has no {function}"
        device = (self._handle,) if function.startswith("nvmlDevice") else ()
        try:
            return call(*device, *arguments), None
        except self._library.NVMLError as error:
            return None, f"NVML: {error}"


def open_nvml(library: Any, uuid: str) -> Nvml | NoNvml:
    """Return NVML for the GPU with this UUID, or the null object with the reason.

    Args:
        library: the module ``pynvml``, or one with the same interface.
        uuid: ``GPU-...``; NVML does not find the UUID of a MIG slice among the GPUs.
    """
    try:
        library.nvmlInit()
    except library.NVMLError as error:
        return NoNvml(f"NVML does not start: {error}")
    try:
        return Nvml(library, library.nvmlDeviceGetHandleByUUID(uuid))
    except library.NVMLError as error:
        return NoNvml(f"NVML does not know {uuid} ({error}); a MIG slice has no state of its own")


class NvmlMeter:
    """The GPU's total energy counter, in millijoules since the driver was loaded."""

    period_s = 0.1
    """The slowest that was seen; most GPUs update it every 20 ms."""

    def __init__(self, nvml: Nvml | NoNvml):
        modes, _ = nvml.ask("nvmlDeviceGetMigMode")
        shared = modes is not None and modes[0]
        self._nvml = NoNvml("MIG is on: the counter is the whole GPU's") if shared else nvml
        self.source = "NVML total energy counter (the whole board)"
        self.reason: str | None = None
        self.read_j()

    def read_j(self) -> float | None:
        """Return the joules since the driver was loaded, or None."""
        millijoules, self.reason = self._nvml.ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def power_w(self) -> float | None:
        """Return the board's power or None; since Ampere it is averaged over the last second."""
        milliwatts, _ = self._nvml.ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3


class CudaHardware:
    """An NVIDIA GPU seen through NVML.

    Args:
        name: the GPU's name in CUDA.
        nvml: the source of its state.
        own_pids: ids of kdprof's own processes.
        users: how many of them use this GPU.
    """

    def __init__(self, name: str, nvml: Nvml | NoNvml, own_pids: frozenset[int], users: int):
        self.name, self._nvml = name, nvml
        self._own_pids, self._users = own_pids, users

    def state(self) -> State:
        """Return clocks, throttle reasons, temperature, power, modes and other processes."""
        return state_of(
            {
                **self._cheap(),
                "driver_version": self._nvml.ask("nvmlSystemGetDriverVersion"),
                "max_sm_clock_mhz": self._nvml.ask("nvmlDeviceGetMaxClockInfo", _SM_CLOCK),
                "memory_clock_mhz": self._nvml.ask("nvmlDeviceGetClockInfo", _MEMORY_CLOCK),
                "power_limit_w": self._watts("nvmlDeviceGetEnforcedPowerLimit"),
                "default_power_limit_w": self._watts("nvmlDeviceGetPowerManagementDefaultLimit"),
                "ecc_enabled": self._asked(lambda modes: bool(modes[0]), "nvmlDeviceGetEccMode"),
                "mig_enabled": self._asked(lambda modes: bool(modes[0]), "nvmlDeviceGetMigMode"),
                "persistence": self._asked(bool, "nvmlDeviceGetPersistenceMode"),
                "other_processes": self._others(),
                "utilization_percent": self._asked(
                    lambda rates: rates.gpu, "nvmlDeviceGetUtilizationRates"
                ),
            }
        )

    def during(self) -> State:
        """Return clock, throttle reasons, temperature, power and the number of other processes."""
        return state_of(self._cheap())

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Report throttling, other processes, an unstable clock and a driver that stopped."""
        readings = [before, *during, after]
        throttled = dict.fromkeys(reason for r in readings for reason in _harmful(r))
        spread = _clock_spread(during)
        if not spread:
            # A loaded GPU may run at its power cap all the time; it is steady there unless its
            # clock varies.
            throttled.pop("power cap", None)
        return [
            *(f"the GPU was throttled ({reason})" for reason in throttled),
            *_other_processes(readings),
            *spread,
            *_vanished(readings),
        ]

    def cause(self, before: State, after: State) -> str | None:
        """Return ``throttling: ...``, ``clock drop`` or ``another process``."""
        if harmful := _harmful(after):
            return f"throttling: {', '.join(harmful)}"
        early, late = before["sm_clock_mhz"], after["sm_clock_mhz"]
        if early and late and _works(after) and late < (1 - GPU_CLOCK_DROP) * early:
            return "clock drop"
        if (after["other_process_count"] or 0) > (before["other_process_count"] or 0):
            return "another process"
        return None

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return the memory that NVML reports for this process."""
        processes, reason = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses")
        if processes is None:
            return None, reason
        mine = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        if not mine:
            return None, "NVML does not list this process (it may run in a container)"
        return mine[0], None if mine[0] is not None else "NVML does not report a process's memory"

    def energy_meter(self) -> EnergyMeter:
        """Return the GPU's total energy counter."""
        return NvmlMeter(self._nvml)

    def _cheap(self) -> dict[str, Reading]:
        others, reason = self._others()
        return {
            "time_s": (time.monotonic(), None),
            "sm_clock_mhz": self._nvml.ask("nvmlDeviceGetClockInfo", _SM_CLOCK),
            "throttle_reasons": self._throttle_reasons(),
            "temperature_c": self._nvml.ask("nvmlDeviceGetTemperature", _CORE_TEMPERATURE),
            "power_w": self._watts("nvmlDeviceGetPowerUsage"),
            "other_process_count": (None if others is None else len(others), reason),
        }

    def _asked(self, convert: Callable[[Any], Any], function: str) -> Reading:
        value, reason = self._nvml.ask(function)
        return (None, reason) if value is None else (convert(value), None)

    def _watts(self, function: str) -> Reading:
        return self._asked(lambda milliwatts: milliwatts / 1e3, function)

    def _throttle_reasons(self) -> Reading:
        """Return the names of all reasons for lower clocks, including harmless ones."""
        mask, reason = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:  # its name before driver 535
            mask, reason = self._nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if mask is None:
            return None, reason
        names = [name for bit, name in _CLOCK_REASONS.items() if mask & bit]
        unknown = mask & ~sum(_CLOCK_REASONS)
        return names + ([f"reason {unknown:#x}"] if unknown else []), None

    def _others(self) -> Reading:
        """Return the compute processes on the GPU that are not kdprof's own.

        In a container NVML shows the host's process ids, in which kdprof's own cannot be found.
        Then the processes with the most memory, as many as kdprof has on this GPU, count as its
        own: the rest is a lower bound of what other processes hold.
        """
        listed, reason = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses")
        if listed is None:
            return None, reason
        others = [process for process in listed if process.pid not in self._own_pids]
        if len(others) == len(listed):
            others.sort(key=lambda process: process.usedGpuMemory or 0)
            others = others[: max(0, len(others) - self._users)]
        return [{"pid": p.pid, "memory_bytes": p.usedGpuMemory} for p in others], None


def _harmful(reading: State) -> list[str]:
    names = reading["throttle_reasons"] or ()
    return [name for name in names if name not in HARMLESS_CLOCK_REASONS]


def _works(reading: State) -> bool:
    """Return True if the GPU was working when its clock was read: an idle GPU lowers it."""
    return "idle" not in (reading["throttle_reasons"] or ())


def _other_processes(readings: Sequence[State]) -> list[str]:
    most = max(reading["other_process_count"] or 0 for reading in readings)
    if not most:
        return []
    memory_bytes = max(
        sum(process["memory_bytes"] or 0 for process in reading.get("other_processes") or ())
        for reading in readings
    )
    held = f"at least {memory_bytes / 2**30:.1f} GiB" if memory_bytes else "memory unknown"
    return [f"{most} other process(es) used the GPU ({held})"]


def _clock_spread(during: Sequence[State]) -> list[str]:
    clocks = [reading["sm_clock_mhz"] for reading in during if _works(reading)]
    clocks = [clock for clock in clocks if clock is not None]
    if not clocks or min(clocks) >= (1 - GPU_CLOCK_SPREAD) * max(clocks):
        return []
    return [f"the SM clock went from {max(clocks)} to {min(clocks)} MHz during the measurement"]


def _vanished(readings: Sequence[State]) -> list[str]:
    """Return why a value that NVML reported at first could not be read later."""
    first, *later = readings
    lost = [
        reason
        for reading in later
        for name, reason in reading.get("unavailable", {}).items()
        if first.get(name) is not None
    ]
    return [f"NVML stopped answering: {lost[0].removeprefix('NVML: ')}"] if lost else []


def nvml_of(device: torch.device) -> Nvml | NoNvml:
    """Return NVML for a torch device, or the null object with the reason."""
    try:
        import pynvml
    except ImportError as error:
        return NoNvml(f"nvidia-ml-py cannot be imported ({error}); pip install nvidia-ml-py")
    return open_nvml(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
