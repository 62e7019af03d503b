"""What is timed: a step that can be repeated, with or without a loader behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from kdprof.errors import KdprofError
from kdprof.step import Mark, TrainStep


class BadStep(KdprofError):
    """A step that runs but cannot be trained with: its loss is not finite."""


@dataclass(frozen=True)
class EndToEnd:
    """Iterations with the real loader."""

    seconds: float
    """Per iteration."""
    waited_s: float
    """Part of it spent waiting for batches."""


class Subject(Protocol):
    """A step that can be repeated."""

    name: str
    phases: tuple[str, ...]
    """What it marks while it runs; empty where it marks nothing."""
    traced: TrainStep | None
    """The step whose phases and terms a trace can tell apart; None where it is one phase."""

    def run(self, mark: Mark) -> Any:
        """Queue one step; ``mark`` is called at the end of each phase."""

    def check(self, result: Any) -> None:
        """Refuse what :meth:`run` returned where it is no result; waits for the device."""

    def run_end_to_end(self, count: int, first: int) -> EndToEnd | None:
        """Run about ``count`` iterations with the loader; None where there is none."""
