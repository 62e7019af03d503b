"""One clock for every device: stamps at phase boundaries, read after the step.

Stamping never synchronises: on a GPU it records an event in the stream, on the CPU it reads the
monotonic clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from kdprof.device import synchronize
from kdprof.step import PHASES


class StepClock:
    """Times one step: ``start()``, hand ``mark`` to the step, then ``seconds()``."""

    def __init__(self, device: torch.device):
        self.device = device
        self.name = "CUDA events" if device.type == "cuda" else "perf_counter"
        self._stamps: list[tuple[str, Any]] = []

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a step."""
        self._stamps = [("", self._stamp())]

    def mark(self, phase: str) -> None:
        """End a phase."""
        self._stamps.append((phase, self._stamp()))

    def seconds(self) -> tuple[float, dict[str, float]]:
        """Return the step's seconds and those of each phase. Waits for the device."""
        synchronize(self.device)
        stamps = [stamp for _, stamp in self._stamps]
        phases = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in zip(self._stamps, self._stamps[1:], strict=False):
            phases[phase] = self._between(before, after)
        return self._between(stamps[0], stamps[-1]), phases

    def _between(self, before: Any, after: Any) -> float:
        if self.device.type == "cuda":
            return float(before.elapsed_time(after)) / 1e3
        return float(after - before)
