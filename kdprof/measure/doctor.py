"""What this machine has, and the consequence of each thing that is missing."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdprof.hardware import Hardware, hardware_of
from kdprof.hardware.device import find_device, installed_version, versions
from kdprof.hardware.nvml import HARMLESS_CLOCK_REASONS
from kdprof.measure.clock import clock_of
from kdprof.measure.memory import available_bytes
from kdprof.resized.tiles import why_no_triton
from kdprof.step import missing_compiler
from kdprof.store import has_locks

PACKAGES = ("torchvision", "fvcore", "nvidia-ml-py", "numpy", "scipy", "matplotlib")
LEAST_SHARED_BYTES = 512 * 2**20
"""Eight batches of 16 images of 512 x 1024 with labels are 256 MiB; containers often get 64 MiB."""
LEAST_OPEN_FILES = 1024
"""Loader processes pass each tensor through an open file."""
FIELD_COSTS = {
    "sm_clock_mhz": "changes of the clock are not noticed",
    "throttle_reasons": "throttling is not noticed: a throttled measurement counts as reliable",
    "other_processes": "other processes on the GPU are not noticed",
    "power_w": "the energy of a step has no cross-check",
    "cpu_busy_s": "other processes' work is not noticed",
    "own_cpu_s": "other processes' work is not noticed",
}
"""What is lost without a reading. Readings that are not listed here are only recorded."""
RECORDED_ONLY = "missing from the record"
NOT_SHOWN = {"time_s", "other_process_count", "memory_available_bytes", "unavailable"}
COUNTERS = {"cpu_busy_s", "own_cpu_s"}
"""Not shown: the time, and what another row shows; counters are shown only if missing."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for. ``costs`` is the consequence if it is missing, else empty."""

    what: str
    found: str
    costs: str = ""


def findings(device: torch.device, hardware: Hardware) -> list[Finding]:
    """Return what this machine has and lacks.

    Args:
        device: the one that ``--device auto`` selects.
        hardware: the hardware of that device.
    """
    packages = {**versions(), **{name: installed_version(name) for name in PACKAGES}}
    return [
        *(Finding(name, version) for name, version in packages.items()),
        Finding("device", f"{device}: {hardware.name}"),
        _gpu(device),
        *_readings(hardware.state()),
        _energy(hardware),
        Finding("clock", clock_of(device).name),
        _allocator(device),
        _process_peak(),
        _free_memory(device),
        Finding("CPU cores", str(os.cpu_count())),
        _shared_memory(Path("/dev/shm")),
        *_surroundings(Path.cwd()),
        _open_files(),
        _resume(device),
        _compiler(device),
        *_kernels(device),
    ]


def _gpu(device: torch.device) -> Finding:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        count = torch.cuda.device_count()
        return Finding("GPU", f"compute capability {major}.{minor}, {count} in this machine")
    reason = "torch is built without CUDA" if torch.version.cuda is None else "no driver or no GPU"
    cost = "times are a CPU's; methods may rank differently on a GPU"
    return Finding("GPU", f"none: {reason}", cost)


def _readings(state: dict[str, Any]) -> list[Finding]:
    """Return one row for each reading, or a single row if no reading is available."""
    reasons = state.get("unavailable", {})
    shown = [
        name
        for name, value in state.items()
        if name not in NOT_SHOWN and (value is None or name not in COUNTERS)
    ]
    if all(name in reasons for name in shown):
        cost = "throttling, clocks, other processes and energy are not noticed"
        return [Finding("state of the device", f"none: {reasons[shown[0]]}", cost)]
    return [
        Finding(name, f"none: {reasons[name]}", FIELD_COSTS.get(name, RECORDED_ONLY))
        if name in reasons
        else Finding(name, _text(name, state[name]))
        for name in shown
    ]


def _text(name: str, value: Any) -> str:
    if name == "throttle_reasons":
        harmful = [reason for reason in value if reason not in HARMLESS_CLOCK_REASONS]
        return ", ".join(value) + (" (it is slowed down now)" if harmful else "") or "none"
    if name == "other_processes":
        held = sum(process["memory_bytes"] or 0 for process in value)
        return f"{len(value)}, {held / 2**30:.1f} GiB" if value else "none"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _energy(hardware: Hardware) -> Finding:
    meter = hardware.energy_meter()
    if meter.reason is None:
        return Finding("energy", meter.source)
    return Finding("energy", f"none: {meter.reason}", "no energy per step, no budgets in joules")


def _allocator(device: torch.device) -> Finding:
    if device.type == "cuda":
        return Finding("allocator statistics", "torch's CUDA allocator")
    cost = "memory is the process's resident set, Python and torch included"
    return Finding("allocator statistics", "none: a CPU has no caching allocator", cost)


def _process_peak() -> Finding:
    if os.access("/proc/self/clear_refs", os.W_OK):
        return Finding("peak of the process", "can be reset for each phase")
    cost = "the memory of a step on a CPU is not measured"
    return Finding("peak of the process", "cannot be reset on this system", cost)


def _free_memory(device: torch.device) -> Finding:
    free = available_bytes(device)
    if free is None:
        return Finding("free memory", "unknown", "a step that cannot fit is not refused beforehand")
    return Finding("free memory", f"{free / 2**30:.1f} GiB on {device}")


def _shared_memory(folder: Path) -> Finding:
    """Check the shared memory through which loader processes pass their batches."""
    if not folder.exists():
        return Finding(str(folder), "not on this system", "set data_settings.workers = 0")
    free = shutil.disk_usage(folder).free
    cost = "loader processes may die; set data_settings.workers = 0 or docker run --shm-size=2g"
    found = f"{free / 2**20:.0f} MiB free"
    return Finding(str(folder), found, cost if free < LEAST_SHARED_BYTES else "")


def _surroundings(out: Path) -> list[Finding]:
    """Check what the system around kdprof has: locks, a name, an account, folders, a terminal."""
    return [_locks(out), _host_name(), _account(), _home(), _temporary(), _terminal()]


def _locks(out: Path) -> Finding:
    try:
        found = has_locks(out)
    except OSError as error:
        return Finding("locks", f"unknown: {out}: {error.strerror}", "choose another --out")
    if found:
        return Finding("locks", "work in this folder")
    cost = "leases are used, which take half a second more per run"
    return Finding("locks", "none on this file system", cost)


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return Finding("host name", f"{name} does not resolve", "nothing: 127.0.0.1 is used")
    return Finding("host name", name)


def _account() -> Finding:
    try:
        return Finding("account", pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:
        cost = "a name is made up for torch; set USER to choose it"
        return Finding("account", f"none for uid {os.getuid()}", cost)


def _home() -> Finding:
    try:
        home = Path.home()
    except RuntimeError:
        return Finding("home folder", "none", "caches need HOME or data_settings.cache_folder")
    if os.access(home, os.W_OK | os.X_OK):
        return Finding("home folder", str(home))
    cost = "caches need XDG_CACHE_HOME, TORCH_HOME and MPLCONFIGDIR in another folder"
    return Finding("home folder", f"{home} cannot be written to", cost)


def _temporary() -> Finding:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        cost = "no process can be started; set TMPDIR to a folder with space"
        return Finding("temporary folder", f"cannot be used: {error.strerror}", cost)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return Finding("temporary folder", f"{tempfile.gettempdir()}, {free / 2**30:.1f} GiB free")


def _terminal() -> Finding:
    encoding = sys.stdout.encoding or "none"
    if encoding.lower().replace("-", "") == "utf8":
        return Finding("output", encoding)
    return Finding(
        "output", encoding, "signs that it lacks are printed as ?; PYTHONIOENCODING=utf-8"
    )


def _open_files() -> Finding:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return Finding("open files", "no limit")
    cost = "loader processes may fail; raise it with ulimit -n" if most < LEAST_OPEN_FILES else ""
    return Finding("open files", f"at most {most}", cost)


def _resume(device: torch.device) -> Finding:
    if device.type == "cpu":
        return Finding("resumed training", "the same as an uninterrupted one")
    cost = "for the same numbers set step.deterministic = true (--deterministic); it is slower"
    return Finding("resumed training", "differs by rounding: CUDA adds in varying order", cost)


def _compiler(device: torch.device) -> Finding:
    missing = missing_compiler(device)
    if missing is None:
        return Finding("torch.compile", "possible")
    return Finding("torch.compile", f"none: it needs {missing}", "a compiled step fails")


def _kernels(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        return []
    reason = why_no_triton()
    if reason is None:
        return [Finding("Triton kernels", "task loss, pairs of images")]
    cost = "the task loss and cirkd's pairs of images take several times as long"
    return [Finding("Triton kernels", f"none: {reason}", cost)]


def findings_here() -> list[Finding]:
    """Return the findings for this machine and the device that ``--device auto`` selects."""
    device = find_device("auto")
    return findings(device, hardware_of(device))
