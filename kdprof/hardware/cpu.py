"""A CPU, as Linux describes it: load, CPU time of other processes, clocks, memory, RAPL energy."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdprof.hardware.base import EnergyMeter, Reading, State, state_of

CPU_OTHERS_CORES = 0.10
"""The limit for the work of other processes. Above it they take time from a step that uses all
cores: as much as the differences between methods that a measurement must resolve."""
CPU_OTHERS_CORES_BLOCK = 0.30
"""The limit for a single slow block, where other processes must explain a visible excess."""
CPU_TICK_ERROR_S = 0.02
"""The kernel counts CPU time in ticks of 10 ms; a difference of counters is off by up to two."""


class RaplMeter:
    """The energy counters of the CPU packages (RAPL); they include other processes.

    Args:
        folder: where the kernel shows its power zones.
    """

    period_s = 0.001
    """Intel documents updates about every millisecond."""

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
        """Return None: RAPL has no sensor other than the counter."""
        return None


def _is_package(zone: Path) -> bool:
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _rapl_reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return (
            "RAPL is readable by root only; allow all users with "
            "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        )
    return f"RAPL: {error}"


class CpuHardware:
    """A CPU and the system around it.

    Args:
        own_pids: ids of kdprof's own processes; this process if not given. Processes that this one
            started, such as loader workers, always count as kdprof's own.
        proc, cpu, powercap: where the kernel shows processes, processors and power zones.
        processes: number of processes that run a step together.
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
        """Return load, threads, CPU seconds (all and kdprof's own), clocks and free memory."""
        return {
            "threads": torch.get_num_threads(),
            **state_of(
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
        """Return the time and the CPU seconds, those of all processes and kdprof's own."""
        return state_of(self._cheap())

    def problems(self, before: State, during: Sequence[State], after: State) -> list[str]:
        """Report the work of other processes on this machine."""
        work = _others_between([before, *during, after])
        if work is None:
            return []
        elapsed_s, others_s = work
        if others_s <= CPU_OTHERS_CORES * elapsed_s + CPU_TICK_ERROR_S:
            return []
        return [f"other processes used {others_s / elapsed_s:.2f} cores on average"]

    def cause(self, before: State, after: State) -> str | None:
        """Return ``another process`` if other processes worked between two readings."""
        work = _others_between([before, after])
        if work is None:
            return None
        elapsed_s, others_s = work
        seen = others_s > CPU_OTHERS_CORES_BLOCK * elapsed_s + CPU_TICK_ERROR_S
        return "another process" if seen else None

    def process_memory_bytes(self) -> tuple[int | None, str | None]:
        """Return None: on a CPU the peak resident set of the process is used instead."""
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
        """Return the seconds that all CPUs have worked since the system started."""
        with (self._proc / "stat").open() as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    def _own_s(self) -> float:
        """Return the CPU seconds of kdprof's processes, ended and living."""
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
    """Return the CPU seconds of all processes except kdprof's own, since some fixed moment."""
    busy_s, own_s = reading.get("cpu_busy_s"), reading.get("own_cpu_s")
    return None if busy_s is None or own_s is None else busy_s - own_s


def _others_between(readings: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the seconds between the first and the last reading, and the CPU seconds of other
    processes in that time. Readings without CPU times are left out; None if no reading has them.
    """
    known = [(r["time_s"], others_s) for r in readings if (others_s := _others_s(r)) is not None]
    if not known:
        return None
    (begin_s, before_s), (end_s, after_s) = (choose(known, key=_time) for choose in (min, max))
    return end_s - begin_s, after_s - before_s


def _time(reading: tuple[float, float]) -> float:
    return reading[0]


def _fields(file: Path, name: str) -> list[str]:
    """Return the text after ``name :`` in each such line of a kernel file."""
    lines = (line.partition(":") for line in file.read_text().splitlines())
    return [value.strip() for key, _, value in lines if key.strip() == name]


def _cpu_model(proc: Path) -> str:
    try:
        names = _fields(proc / "cpuinfo", "model name")
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _read(function: Callable[[], Any]) -> Reading:
    """Call a function that reads a system file; return its value, or None and the reason."""
    try:
        value = function()
    except OSError as error:
        return None, f"{error.filename or 'the system'}: {error.strerror or error}"
    except (ValueError, IndexError, AttributeError) as error:
        return None, f"not reported by this system ({error})"
    return value.strip() if isinstance(value, str) else value, None
