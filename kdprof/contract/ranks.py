"""Methods in two processes, wrapped as data-parallel training wraps them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdprof.method import Found

WORLD = 2
LIMIT_S = 600

Report = dict[str, Any]
"""Of one method in one process: terms, digests of gradients and state, or an error."""


def in_two_processes(methods: Iterable[Found]) -> dict[str, dict[str, Report]]:
    """Run methods in two processes; return by method and rank ("0", "1") what each found."""
    methods = list(methods)
    if not dist.is_available():
        unable = {"unable": "this torch has no torch.distributed"}
        return {found.cls.name: {str(rank): unable for rank in range(WORLD)} for found in methods}
    specs = [_spec(found) for found in methods]
    with tempfile.TemporaryDirectory(prefix="kdprof-") as folder:
        environment = {**_loopback(), **os.environ, "OMP_NUM_THREADS": "1"}
        # -P: a user's queue.py in this folder is not the library's.
        command = [sys.executable, "-P", "-m", "kdprof.contract"]
        errors = [(Path(folder) / f"errors-{rank}").open("wb") for rank in range(WORLD)]
        workers = [
            subprocess.Popen(
                [*command, str(rank), folder, *specs],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors[rank],
            )
            for rank in range(WORLD)
        ]
        _wait(workers)
        for file in errors:
            file.close()
        reports = [_read(Path(folder), rank) for rank in range(WORLD)]
    return {
        found.cls.name: {str(rank): reports[rank][number] for rank in range(WORLD)}
        for number, found in enumerate(methods)
    }


def _loopback() -> dict[str, str]:
    """Return the setting that keeps gloo on this machine, where the name of the way is known."""
    try:
        names = {name for _, name in socket.if_nameindex()}
    except OSError:
        return {}
    name = next((name for name in ("lo", "lo0") if name in names), None)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name}


def _wait(workers: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + LIMIT_S
    try:
        for worker in workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


class _Missing(dict):
    """The reports of a process that ended before it wrote them."""

    def __missing__(self, number: int) -> Report:
        return {"error": f"the process ended early: {self['why']}"}


def _read(folder: Path, rank: int) -> Mapping[int, Report]:
    lines = folder / f"reports-{rank}"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    words = (folder / f"errors-{rank}").read_text(errors="replace").split("\n")
    why = next((line for line in reversed(words) if line.strip()), "no message")
    return _Missing(enumerate(found), why=why)


def _spec(found: Found) -> str:
    """Return what names a method in another process."""
    if found.origin.endswith(".py"):
        return f"{Path(found.origin).resolve()}:{found.cls.__name__}"
    return found.cls.name
