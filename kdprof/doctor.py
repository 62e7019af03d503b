"""What this machine has, and what each missing thing costs the user."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from kdprof.device import find_device, hardware_of, versions
from kdprof.measure.memory import available_bytes


@dataclass(frozen=True)
class Finding:
    """One thing looked for. ``costs`` says what its absence takes away; empty where it is there."""

    what: str
    found: str
    costs: str = ""


def findings() -> list[Finding]:
    """Look at this machine."""
    device = find_device("auto")
    hardware = hardware_of(device)
    memory = available_bytes(device)
    found = [Finding(name, value) for name, value in versions().items()]
    found += [
        Finding("device", f"{device}: {hardware.name}"),
        Finding("CPU cores", str(os.cpu_count())),
        Finding("free memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB"),
        _gpu(),
    ]
    found += [
        Finding(key, str(value) if value is not None else "not readable")
        for key, value in hardware.state().items()
    ]
    found.append(Finding("energy", "not measured", hardware.energy_unavailable()))
    return found


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("GPU", torch.cuda.get_device_name(0))
    reason = "torch has no CUDA" if torch.version.cuda is None else "no driver or no GPU"
    return Finding("GPU", f"none ({reason})", "times are a CPU's: ranks may differ on a GPU")


def print_findings(console: Console) -> None:
    """Print the findings as a table."""
    table = Table("what", "found", "what that costs you")
    for finding in findings():
        table.add_row(finding.what, finding.found, finding.costs)
    console.print(table)
