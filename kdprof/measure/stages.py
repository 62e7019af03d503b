"""Where a measurement's own time goes, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kdprof.pauses import running_s


class Stages:
    """Adds up the seconds of the stages of a measurement, in the order in which they began."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the body to a stage."""
        began = running_s()
        try:
            yield
        finally:
            self.add(name, running_s() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def taken(self) -> dict[str, float]:
        """Return the seconds since the last call by stage, and begin again."""
        found, self._seconds = self._seconds, {}
        return found
