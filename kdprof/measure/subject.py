"""The interface of what is timed: a step that can be repeated, with or without a loader."""

from __future__ import annotations

from typing import Any, Protocol

from kdprof.errors import KdprofError
from kdprof.step import Mark, TrainStep
from kdprof.step_feed import StepFeed


class BadStep(KdprofError):
    """A step runs, but its loss is not finite, so that it cannot train."""


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

    @property
    def feed(self) -> StepFeed | None:
        """The step with its loader; None if nothing is loaded, or if it loads its data itself."""

    def run(self, mark: Mark) -> Any:
        """Queue one step; ``mark`` is called at the end of each phase."""

    def check(self, result: Any) -> None:
        """Refuse a result of :meth:`run` that is not finite; wait for the device.

        Raises:
            BadStep: the result is not finite.
        """
