"""The interface of what is timed: a step that can be repeated, with or without a loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from kdprof.errors import KdprofError
from kdprof.step import Mark, TrainStep


class BadStep(KdprofError):
    """A step runs, but its loss is not finite, so that it cannot train."""


@dataclass(frozen=True)
class EndToEnd:
    """Timing of end-to-end iterations."""

    seconds: float
    """Per iteration."""
    waited_s: float
    """Part of it spent waiting for batches."""


class Subject(Protocol):
    """A step that can be repeated."""

    @property
    def name(self) -> str:
        """What records call it."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that it marks while it runs; empty if it marks none."""

    @property
    def traced(self) -> TrainStep | None:
        """The step whose phases and terms a trace can separate; None if it is a single phase."""

    def run(self, mark: Mark) -> Any:
        """Queue one step; ``mark`` is called at the end of each phase."""

    def check(self, result: Any) -> None:
        """Refuse a result of :meth:`run` that is not finite; wait for the device.

        Raises:
            BadStep: the result is not finite.
        """

    def run_end_to_end(self, count: int, first: int) -> EndToEnd | None:
        """Run about ``count`` end-to-end iterations; return None if there is no loader."""
