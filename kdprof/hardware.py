"""What a device says of itself: its state around a measurement, other users, memory and energy.

A driver or counter that is absent is a null object: it answers None, with the reason.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from kdprof.errors import UserError

Reading = tuple[Any, str | None]
"""A value, or None and the reason."""
State = dict[str, Any]
"""Values by name, JSON-able. What could not be read is None; ``unavailable`` says why, by name."""

CPU_OTHERS_CORES = 0.10
"""Work of others above a tenth of a core takes time from a step that uses all cores: as much as the
differences between methods that a measurement is to tell apart."""
CPU_OTHERS_CORES_BLOCK = 0.30
"""The same for a single slow block, which must explain a visible excess."""
CPU_TICK_ERROR_S = 0.02
"""The kernel books CPU time in ticks of 10 ms; a difference of two counters is off by up to two."""
GPU_CLOCK_SPREAD = 0.05
"""A GPU's clock wanders by a bin or two of 15 MHz (1 %); 5 % and the samples are of two speeds."""
GPU_CLOCK_DROP = 0.03
"""A drop of the clock that explains one slow block: more than two bins."""

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
"""Reasons that somebody chose or that end when work begins; all others slow a step down."""


class EnergyMeter(Protocol):
    """A counter of the energy that a device has drawn."""

    source: str
    """The counter, in words."""
    reason: str | None
    """Why there is no reading, or no more since the last call; None while there is."""

    def read_j(self) -> float | None:
        """Return the joules drawn since some fixed moment, or None."""

    def power_w(self) -> float | None:
        """Return the power now by a sensor other than the counter, or None."""


class Hardware(Protocol):
    """What can be asked of a device. Nothing here raises for what the system does not tell."""

    name: str

    def state(self) -> State:
        """Return all that the device says of itself now."""

    def during(self) -> State:
        """Return the part of :meth:`state` that is cheap enough to read between timed blocks."""

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Return why a measurement is not to be trusted.

        Args:
            before, after: of :meth:`state`.
            during: of :meth:`during`, in the order they were read.
        """

    def cause(self, before: State, after: State) -> str | None:
        """Return what slowed down the block between two readings; None if nothing was seen."""

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return this process's memory on the device, or None and the reason."""

    def energy_meter(self) -> EnergyMeter:
        """Return the device's energy counter."""


class RaplMeter:
    """The energy counters of the CPU packages (RAPL); they include whatever else runs there.

    Args:
        folder: where the kernel shows its power zones.
    """

    def __init__(self, folder: Path = Path("/sys/class/powercap")):
        # Sub-zones (intel-rapl:0:0) are part of their package, and a "psys" zone contains it.
        self._zones = [
            zone
            for zone in sorted(folder.glob("intel-rapl:*"))
            if zone.name.count(":") == 1 and _is_package(zone)
        ]
        self._last_uj: list[int] = []
        self._total_uj = 0
        self.source = f"RAPL ({len(self._zones)} CPU package(s), other processes included)"
        self.reason: str | None = f"no RAPL package under {folder} (a virtual machine?)"
        self.read_j()

    def read_j(self) -> float | None:
        """Return the joules of all packages since this meter was made, or None."""
        if not self._zones:
            return None
        try:
            now_uj = [int((zone / "energy_uj").read_text()) for zone in self._zones]
            ranges_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        except (OSError, ValueError) as error:
            self.reason = _rapl_reason(error)
            return None
        for now, last, most in zip(now_uj, self._last_uj or now_uj, ranges_uj, strict=True):
            self._total_uj += now - last if now >= last else now - last + most
        self._last_uj, self.reason = now_uj, None
        return self._total_uj / 1e6

    def power_w(self) -> float | None:
        """Return None: RAPL has no sensor beside the counter."""
        return None


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _rapl_reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return (
            "RAPL is readable by root only; "
            "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj lets everybody"
        )
    return f"RAPL: {error}"


class CpuHardware:
    """A CPU and the system around it.

    Args:
        own_pids: processes that are not strangers; this one if not given. Children started by
            multiprocessing, such as loader workers, never are.
        proc, cpu, powercap: where the kernel shows processes, processors and power zones.
        processes: that make a step together.
    """

    def __init__(
        self,
        own_pids: frozenset[int] | None = None,
        proc: Path = Path("/proc"),
        cpu: Path = Path("/sys/devices/system/cpu"),
        powercap: Path = Path("/sys/class/powercap"),
        processes: int = 1,
    ):
        self._own_pids = own_pids or frozenset({os.getpid()})
        self._proc, self._cpu, self._powercap = proc, cpu, powercap
        together = f"{processes} x " if processes > 1 else ""
        self.name = f"{together}{_cpu_model(proc)} ({torch.get_num_threads()} threads)"

    def state(self) -> State:
        """Return load, threads, CPU seconds of all and of ours, clocks and free memory."""
        return {
            "threads": torch.get_num_threads(),
            **_state(
                {
                    **self._cheap(),
                    "load_average_1min": _read(lambda: os.getloadavg()[0]),
                    "scaling_governor": _read(
                        (self._cpu / "cpu0" / "cpufreq" / "scaling_governor").read_text
                    ),
                    "cpu_mhz": _read(self._mhz),
                    "memory_available_bytes": _read(self._memory_available_bytes),
                }
            ),
        }

    def during(self) -> State:
        """Return the time and the CPU seconds of all and of ours."""
        return _state(self._cheap())

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Name the work of others on this machine."""
        readings = [r for r in (before, *during, after) if _others_s(r) is not None]
        if not readings:
            return []
        elapsed_s, others_s = _others_between(readings)
        if others_s <= CPU_OTHERS_CORES * elapsed_s + CPU_TICK_ERROR_S:
            return []
        return [f"other processes used {others_s / elapsed_s:.2f} cores on average"]

    def cause(self, before: State, after: State) -> str | None:
        """Return ``another process`` where others worked between two readings."""
        if _others_s(before) is None or _others_s(after) is None:
            return None
        elapsed_s, others_s = _others_between([before, after])
        seen = others_s > CPU_OTHERS_CORES_BLOCK * elapsed_s + CPU_TICK_ERROR_S
        return "another process" if seen else None

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Leave it to the system's peak resident set."""
        return None, "not a GPU"

    def energy_meter(self) -> EnergyMeter:
        """Return the packages' counters."""
        return RaplMeter(self._powercap)

    def _cheap(self) -> dict[str, Reading]:
        return {
            "time_s": (time.monotonic(), None),
            "cpu_busy_s": _read(self._busy_s),
            "own_cpu_s": _read(self._own_s),
        }

    def _busy_s(self) -> float:
        """Return the seconds all CPUs have worked since the system started."""
        with (self._proc / "stat").open() as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def _own_s(self) -> float:
        """Return the CPU seconds of this process and all below it, the living ones too."""
        living = self._descendants(os.getpid()) | self._own_pids
        ticks = sum(self._ticks(pid) for pid in living - {os.getpid()})
        return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")

    def _descendants(self, pid: int) -> set[int]:
        """Return the living processes that a process started, and those that they started: loader
        and compiler processes."""
        found: set[int] = set()
        for task in (self._proc / str(pid) / "task").glob("*/children"):
            try:
                found |= {int(child) for child in task.read_text().split()}
            except OSError:
                continue
        return found.union(*(self._descendants(child) for child in found))

    def _ticks(self, pid: int) -> int:
        """Return the ticks of one process and the children it has waited for; 0 once it is gone."""
        try:
            text = (self._proc / str(pid) / "stat").read_text()
        except OSError:
            return 0
        # The command's name, in parentheses, may contain anything, spaces too.
        return sum(int(field) for field in text.rpartition(")")[2].split()[11:15])

    def _mhz(self) -> float:
        """Return the mean clock over all processors."""
        folders = self._cpu.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        clocks = [int(file.read_text()) / 1e3 for file in folders]
        if not clocks:
            clocks = [float(value) for value in _fields(self._proc / "cpuinfo", "cpu MHz")]
        return statistics.fmean(clocks)

    def _memory_available_bytes(self) -> int:
        return int(_fields(self._proc / "meminfo", "MemAvailable")[0].split()[0]) * 1024


def _others_s(reading: Mapping[str, Any]) -> float | None:
    """Return the CPU seconds of all processes but ours, since some fixed moment."""
    busy_s, own_s = reading.get("cpu_busy_s"), reading.get("own_cpu_s")
    return None if busy_s is None or own_s is None else busy_s - own_s


def _others_between(readings: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the seconds from the first reading to the last and the CPU seconds of others in them.

    All the differences between successive readings add up to that of the outermost two.
    """
    first, last = (choose(readings, key=lambda r: r["time_s"]) for choose in (min, max))
    return last["time_s"] - first["time_s"], _others_s(last) - _others_s(first)


def _fields(file: Path, name: str) -> list[str]:
    """Return what follows ``name :`` in each line of a file of the kernel's."""
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return [value.strip() for key, _, value in lines if key.strip() == name]


def _cpu_model(proc: Path) -> str:
    try:
        names = _fields(proc / "cpuinfo", "model name")
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _read(function: Callable[[], Any]) -> Reading:
    """Call what reads a file of the system's."""
    try:
        value = function()
    except OSError as error:
        return None, f"{error.filename or 'the system'}: {error.strerror or error}"
    except (ValueError, IndexError, AttributeError) as error:
        return None, f"not told by this system ({error})"
    return value.strip() if isinstance(value, str) else value, None


def _state(readings: Mapping[str, Reading]) -> State:
    state = {name: value for name, (value, _) in readings.items()}
    missing = {name: reason for name, (value, reason) in readings.items() if value is None}
    return {**state, "unavailable": missing} if missing else state


class NoNvml:
    """Stands for NVML where it is absent: every question has the same answer."""

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
            Its value, or None and NVML's own reason.
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
    """Return NVML for the GPU with this UUID, or what stands for it and knows the reason.

    Args:
        library: the module ``pynvml`` or one that answers like it.
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
        """Return the board's power, or None: averaged over the last second since Ampere."""
        milliwatts, _ = self._nvml.ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3


class CudaHardware:
    """An NVIDIA GPU seen through NVML.

    Args:
        name: the GPU's, as CUDA gives it.
        nvml: where its state is read.
        own_pids: processes that are not strangers; this one if not given.
    """

    def __init__(self, name: str, nvml: Nvml | NoNvml, own_pids: frozenset[int] | None = None):
        self.name, self._nvml = name, nvml
        self._own_pids = own_pids or frozenset({os.getpid()})

    def state(self) -> State:
        """Return clocks, what holds them down, temperature, power, modes and other processes."""
        return _state(
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
        """Return the clock, what holds it down, temperature, power and the number of others."""
        return _state(self._cheap())

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Name throttling, strangers, a wandering clock and a driver that went away."""
        readings = [before, *during, after]
        throttled = dict.fromkeys(reason for r in readings for reason in _harmful(r))
        spread = _clock_spread(during)
        if not spread:
            # A loaded GPU may sit at its power cap for good; it is steady there unless its clock
            # says otherwise.
            throttled.pop("power cap", None)
        return [
            *(f"the GPU was throttled ({reason})" for reason in throttled),
            *_strangers(readings),
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
        """Return what NVML books to this process."""
        processes, reason = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses")
        if processes is None:
            return None, reason
        mine = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        if not mine:
            return None, "NVML does not list this process (it may run in a container)"
        return mine[0], None if mine[0] is not None else "NVML does not tell a process's memory"

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
        """Return the names of all that holds the clocks down, harmless reasons too."""
        mask, reason = self._nvml.ask("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:  # its name before driver 535
            mask, reason = self._nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        if mask is None:
            return None, reason
        names = [name for bit, name in _CLOCK_REASONS.items() if mask & bit]
        unknown = mask & ~sum(_CLOCK_REASONS)
        return names + ([f"reason {unknown:#x}"] if unknown else []), None

    def _others(self) -> Reading:
        """Return the compute processes on the GPU that are not ours.

        In a container NVML shows the host's pids, ours among them under numbers that we cannot
        know. Then as many as we are count as ours, those with the most memory: what is left is the
        least that strangers hold.
        """
        listed, reason = self._nvml.ask("nvmlDeviceGetComputeRunningProcesses")
        if listed is None:
            return None, reason
        others = [process for process in listed if process.pid not in self._own_pids]
        if len(others) == len(listed):
            others.sort(key=lambda process: process.usedGpuMemory or 0)
            others = others[: max(0, len(others) - len(self._own_pids))]
        return [{"pid": p.pid, "memory_bytes": p.usedGpuMemory} for p in others], None


def _harmful(reading: State) -> list[str]:
    names = reading["throttle_reasons"] or ()
    return [name for name in names if name not in HARMLESS_CLOCK_REASONS]


def _works(reading: State) -> bool:
    """Tell whether the clock is that of a GPU at work: an idle one lowers it."""
    return "idle" not in (reading["throttle_reasons"] or ())


def _strangers(readings: Sequence[State]) -> list[str]:
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
    """Return why something that NVML told at first could not be read later."""
    first, *later = readings
    lost = [
        reason
        for reading in later
        for name, reason in reading.get("unavailable", {}).items()
        if first.get(name) is not None
    ]
    return [f"NVML stopped answering: {lost[0].removeprefix('NVML: ')}"] if lost else []


def _nvml_of(device: torch.device) -> Nvml | NoNvml:
    try:
        import pynvml
    except ImportError as error:
        return NoNvml(f"nvidia-ml-py cannot be imported ({error}); pip install nvidia-ml-py")
    return open_nvml(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")


class SummedMeter:
    """The energy counters of several devices, read one after the other."""

    def __init__(self, meters: Sequence[EnergyMeter]):
        self._meters = meters
        self.source = f"{meters[0].source}, {len(meters)} of them"

    @property
    def reason(self) -> str | None:
        """Why one of them has no reading; None while all have."""
        return next((meter.reason for meter in self._meters if meter.reason), None)

    def read_j(self) -> float | None:
        """Return the sum of the joules drawn, None where one does not tell."""
        return _sum(meter.read_j() for meter in self._meters)

    def power_w(self) -> float | None:
        """Return the sum of the powers, None where one does not tell."""
        return _sum(meter.power_w() for meter in self._meters)


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else sum(found)


class SeveralGpus:
    """GPUs of one type that make a step together; the slowest of them sets its pace.

    A state is the first GPU's, with those of the others under ``other_gpus``.

    Raises:
        UserError: they are of different types.
    """

    def __init__(self, gpus: Sequence[CudaHardware]):
        names = list(dict.fromkeys(gpu.name for gpu in gpus))
        if len(names) > 1:
            raise UserError(
                f"step.gpus = {len(gpus)} would mix {' and '.join(names)}; choose GPUs of one type "
                "with CUDA_VISIBLE_DEVICES"
            )
        self._gpus = gpus
        self.name = f"{len(gpus)} x {names[0]}"

    def state(self) -> State:
        """Return all that the GPUs say of themselves now."""
        return _together([gpu.state() for gpu in self._gpus])

    def during(self) -> State:
        """Return the cheap part of :meth:`state`."""
        return _together([gpu.during() for gpu in self._gpus])

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Return why a measurement is not to be trusted, and because of which GPU."""
        first, last, between = _apart(before), _apart(after), [_apart(state) for state in during]
        return [
            f"cuda:{index}: {problem}"
            for index, gpu in enumerate(self._gpus)
            for problem in gpu.problems(first[index], [s[index] for s in between], last[index])
        ]

    def cause(self, before: State, after: State) -> str | None:
        """Return what slowed down the block between two readings, on whichever GPU."""
        pairs = zip(self._gpus, _apart(before), _apart(after), strict=True)
        causes = (gpu.cause(early, late) for gpu, early, late in pairs)
        return next((cause for cause in causes if cause), None)

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return what NVML books to this process on the first GPU, its own."""
        return self._gpus[0].process_memory_bytes()

    def energy_meter(self) -> EnergyMeter:
        """Return the sum of the GPUs' counters."""
        return SummedMeter([gpu.energy_meter() for gpu in self._gpus])


def _together(states: Sequence[State]) -> State:
    return {**states[0], "other_gpus": list(states[1:])}


def _apart(state: State) -> list[State]:
    return [state, *state["other_gpus"]]


def hardware_of(
    device: torch.device, own_pids: frozenset[int] | None = None, count: int = 1
) -> Hardware:
    """Return the hardware behind a torch device, or behind several of its kind.

    Args:
        own_pids: processes that are not strangers; this one if not given.
        count: GPUs, from the first; or processes that share the CPU.

    Raises:
        UserError: several GPUs of different types.
    """
    if device.type != "cuda":
        return CpuHardware(own_pids, processes=count)
    if count == 1:
        return _gpu(device, own_pids)
    return SeveralGpus([_gpu(torch.device("cuda", index), own_pids) for index in range(count)])


def _gpu(device: torch.device, own_pids: frozenset[int] | None) -> CudaHardware:
    return CudaHardware(torch.cuda.get_device_name(device), _nvml_of(device), own_pids)
