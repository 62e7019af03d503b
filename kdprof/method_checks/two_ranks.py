"""Methods in two processes, wrapped as data-parallel training wraps them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdprof.discovery import MethodEntry
from kdprof.processes import Child, request_folder

WORLD = 2
LIMIT_S = 600
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

RankReport = dict[str, Any]
"""The report of one method in one process: terms, digests of gradients and state; or an error."""


def in_two_processes(methods: Iterable[MethodEntry]) -> dict[str, dict[str, RankReport]]:
    """Run methods in two processes and return each report, by method and rank ("0", "1")."""
    methods = list(methods)
    if not dist.is_available():
        unable = {"unable": "this torch has no torch.distributed"}
        return {found.cls.name: {str(rank): unable for rank in range(WORLD)} for found in methods}
    environment = {**_loopback(), "OMP_NUM_THREADS": "1"}
    with (
        request_folder({"specs": [_spec(found) for found in methods]}) as folder,
        ExitStack() as running,
        ThreadPoolExecutor(WORLD) as threads,
    ):
        children = [
            running.enter_context(
                Child("kdprof.method_checks", folder, rank, environment=environment, quiet=True)
            )
            for rank in range(WORLD)
        ]
        read = [threads.submit(_sent_reports, child) for child in children]
        _end_in_time(children)
        reports = [
            _all_reports(child, sent.result(), len(methods))
            for child, sent in zip(children, read, strict=True)
        ]
    return {
        found.cls.name: {str(rank): reports[rank][number] for rank in range(WORLD)}
        for number, found in enumerate(methods)
    }


def _loopback() -> dict[str, str]:
    """Return the setting that keeps gloo on this machine, unless the user chose another."""
    if GLOO_INTERFACE in os.environ:
        return {}
    try:
        names = {name for _, name in socket.if_nameindex()}
    except OSError:
        return {}
    name = next((name for name in ("lo", "lo0") if name in names), None)
    return {} if name is None else {GLOO_INTERFACE: name}


def _end_in_time(children: Sequence[Child]) -> None:
    deadline = time.monotonic() + LIMIT_S
    try:
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            child.kill()


def _sent_reports(child: Child) -> list[RankReport]:
    return [report for _, report in child.messages()]


def _all_reports(child: Child, sent: list[RankReport], count: int) -> list[RankReport]:
    """Return a report for each method: an error where the process ended before it sent one."""
    missing = {"error": child.last_words()}
    return sent + [missing] * (count - len(sent))


def _spec(found: MethodEntry) -> str:
    """Return the name by which another process finds a method."""
    if found.origin.endswith(".py"):
        return f"{Path(found.origin).resolve()}:{found.cls.__name__}"
    return found.cls.name
