"""A stand-in for pynvml that replays a session from tests/nvml/*.json.

A session is calls with their answers: a value, ``{"error": code}``, ``{"fields": {...}}`` for a
structure, or ``{"sequence": [...]}``, whose last answer stays. After ``lost_after`` calls every
call fails with ``lost_error``. A function that is not in the session does not exist, as in an
older nvidia-ml-py. Errors are pynvml's own classes, with their texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from kdprof.hardware.nvml import CudaHardware, open_nvml

SESSIONS = Path(__file__).parent / "nvml"


class NvmlReplay:
    NVMLError = pynvml.NVMLError

    def __init__(self, session: dict[str, Any]):
        self.device, self.uuid = session["device"], session["uuid"]
        self._answers = session["calls"]
        self._lost_after = session.get("lost_after")
        self._lost_error = session.get("lost_error")
        self._called: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not any(key.partition("(")[0] == name for key in self._answers):
            raise AttributeError(name)
        return lambda *arguments: self._answer(name, arguments)

    def _answer(self, name: str, arguments: tuple) -> Any:
        if name == "nvmlDeviceGetHandleByUUID" and arguments != (self.uuid,):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        if name.startswith("nvmlDevice") and name != "nvmlDeviceGetHandleByUUID":
            assert arguments[0] == "handle"
            arguments = arguments[1:]
        if self._lost_after is not None and sum(self._called.values()) >= self._lost_after:
            raise pynvml.NVMLError(self._lost_error)
        key = name if name in self._answers else f"{name}({', '.join(map(str, arguments))})"
        count = self._called[key] = self._called.get(key, 0) + 1
        return _value(self._answers[key], count - 1)


def _value(answer: Any, number: int) -> Any:
    if isinstance(answer, list):
        return [SimpleNamespace(**e) if isinstance(e, dict) else e for e in answer]
    if not isinstance(answer, dict):
        return answer
    if "error" in answer:
        raise pynvml.NVMLError(answer["error"])
    if "fields" in answer:
        return SimpleNamespace(**answer["fields"])
    sequence = answer["sequence"]
    return _value(sequence[min(number, len(sequence) - 1)], 0)


def session(name: str, **calls: Any) -> dict[str, Any]:
    """Return a session of tests/nvml; ``calls`` replace its answers."""
    found = json.loads((SESSIONS / f"{name}.json").read_text())
    found["calls"] |= calls
    return found


def replayed(
    name: str, own_pids: frozenset[int] = frozenset({4242}), users: int = 1, **calls: Any
) -> CudaHardware:
    """Return the GPU of a session, seen by the process 4242."""
    library = NvmlReplay(session(name, **calls))
    return CudaHardware(library.device, open_nvml(library, library.uuid), own_pids, users)
