"""The device: finding it, torch's switches for it, and its state around a measurement.

Absent hardware is a null object.
"""

from __future__ import annotations

import os
import platform
from typing import Any, Protocol

import torch

from kdprof import __version__
from kdprof.errors import UserError


class Hardware(Protocol):
    """What can be asked of a device."""

    name: str

    def state(self) -> dict[str, Any]:
        """Return the device's state now; what cannot be read is None."""

    def problems(self, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        """Return why a measurement between two states is not to be trusted."""

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return this process's memory on the device, or None and the reason."""

    def energy_unavailable(self) -> str:
        """Return why no energy was recorded."""


class CpuHardware:
    """A CPU: load average and threads; there is no counter that belongs to the step alone."""

    def __init__(self) -> None:
        self.name = f"{_cpu_model()} ({torch.get_num_threads()} threads)"

    def state(self) -> dict[str, Any]:
        """Return load and threads."""
        return {"load_average_1min": os.getloadavg()[0], "threads": torch.get_num_threads()}

    def problems(self, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        """Other load than ours shows as a load average above the threads we use."""
        free = (os.cpu_count() or 1) + 1
        if before["load_average_1min"] > free:
            return [f"the machine was busy before (load {before['load_average_1min']:.1f})"]
        return []

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Leave it to the system's peak resident set."""
        return None, "not a GPU"

    def energy_unavailable(self) -> str:
        """Say that no counter was read."""
        return "no energy counter is read on a CPU"


class CudaHardware:
    """An NVIDIA GPU seen through NVML; each reading that fails is None."""

    def __init__(self, device: torch.device):
        self.name = torch.cuda.get_device_name(device)
        self._nvml, self._handle, self._reason = _nvml_handle(device)

    def state(self) -> dict[str, Any]:
        """Return clocks, throttle reasons, temperature, power and other processes."""
        if self._nvml is None:
            return {"unavailable": self._reason}
        nvml, handle = self._nvml, self._handle
        return {
            "sm_clock_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            "throttle_reasons": self._throttle_reasons(),
            "temperature_c": self._ask(
                nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "power_limit_w": self._watts(nvml.nvmlDeviceGetEnforcedPowerLimit),
            "power_w": self._watts(nvml.nvmlDeviceGetPowerUsage),
            "other_processes": self._other_processes(),
        }

    def problems(self, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        """Name throttling and strangers on the device."""
        found = []
        for state in (before, after):
            for reason in state.get("throttle_reasons") or []:
                found.append(f"the GPU was throttled ({reason})")
            if state.get("other_processes"):
                found.append(f"{state['other_processes']} other process(es) used the GPU")
        return list(dict.fromkeys(found))

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return what NVML books to this process."""
        if self._nvml is None:
            return None, self._reason
        for process in (
            self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle) or ()
        ):
            if process.pid == os.getpid():
                return process.usedGpuMemory, None
        return None, "NVML does not list this process (it may run in a container)"

    def energy_unavailable(self) -> str:
        """Say that the energy counter is not read yet."""
        return "this version does not read the GPU's energy counter"

    def _ask(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None

    def _watts(self, function: Any) -> float | None:
        milliwatts = self._ask(function, self._handle)
        return None if milliwatts is None else milliwatts / 1e3

    def _throttle_reasons(self) -> list[str] | None:
        nvml = self._nvml
        mask = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._handle)
        if mask is None:
            return None
        harmful = {
            "power cap": nvml.nvmlClocksThrottleReasonSwPowerCap,
            "hardware slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
            "software thermal slowdown": nvml.nvmlClocksThrottleReasonSwThermalSlowdown,
            "hardware thermal slowdown": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
            "hardware power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        }
        return [name for name, bit in harmful.items() if mask & bit]

    def _other_processes(self) -> int | None:
        processes = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        if processes is None:
            return None
        # In a container NVML sees host pids, ours among them under a number we cannot know.
        mine = any(process.pid == os.getpid() for process in processes)
        return len(processes) - 1 if mine else max(0, len(processes) - 1)


def _nvml_handle(device: torch.device) -> tuple[Any, Any, str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid), ""
    except Exception as error:
        return None, None, f"NVML is not available: {error}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - a device file, read line by line
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware_of(device: torch.device) -> Hardware:
    """Return the hardware behind a torch device."""
    return CudaHardware(device) if device.type == "cuda" else CpuHardware()


def find_device(name: str) -> torch.device:
    """Return the torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise UserError(f"device '{name}' is not known; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device '{name}': torch sees no CUDA GPU; use --device cpu")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device '{name}': this machine has cuda:0 to cuda:{last}")
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def configure_backends(device: torch.device, precision: str) -> None:
    """Set torch's global switches the way every measured and trained step has them.

    fp32 means float32: torch lets cuDNN use TF32 by default. cuDNN may search for the fastest
    kernels, because shapes do not change during a run.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams belong to the current device
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


def versions() -> dict[str, str]:
    """Return the versions that a number depends on."""
    return {
        "kdprof": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else "none",
    }
