"""Pieces of work in processes of their own: a crash or a time limit ends that piece alone."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprof.processes import Child, request_folder

from .state import PieceRecord

GRACE_S = 3.0
"""A process that is asked to end gets this long to save."""
BENCHMARKS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Runner:
    """Runs pieces one after the other, never beyond the end of the whole.

    Attributes:
        folder: where the processes work, which are told no other path of the results.
        ends: on the monotonic clock.
    """

    folder: Path
    ends: float
    say: Callable[[str], None]

    def left_s(self) -> float:
        """Return the seconds that are left for work."""
        return self.ends - time.monotonic()

    def run(
        self,
        name: str,
        kind: str,
        arguments: dict[str, Any],
        limit_s: float,
    ) -> PieceRecord:
        """Run one piece and return how it ended; see :mod:`reference_parts.work`.

        Args:
            limit_s: the process is stopped after this time, or at the end of the whole.
        """
        began = time.monotonic()
        limit_s = min(limit_s, self.left_s())
        if limit_s <= 0:
            return PieceRecord(state="stopped", seconds=0, reason="no time was left")
        self.say(f"{name}: at most {limit_s:.0f} s")
        request = {"kind": kind, "folder": str(self.folder), "arguments": arguments}
        found, path = None, os.pathsep.join(_search_path())
        with (
            request_folder(request) as folder,
            Child("reference_parts.work", folder, environment={"PYTHONPATH": path}) as child,
            _stopped_after(child, limit_s) as expired,
        ):
            for _ in child.messages():
                pass
            found = child.result()
            reason = "" if found else child.last_words()
        seconds = time.monotonic() - began
        if expired.is_set() and (found is None or found["state"] != "done"):
            reason = f"its {limit_s:.0f} s were up"
            piece = PieceRecord(state="stopped", seconds=seconds, reason=reason)
        elif found is None:
            piece = PieceRecord(state="failed", seconds=seconds, reason=reason)
        else:
            piece = PieceRecord(seconds=seconds, **found)
        self.say(f"{name}: {piece.state} in {seconds:.1f} s{piece.reason and f': {piece.reason}'}")
        return piece


def _search_path() -> list[str]:
    given = os.environ.get("PYTHONPATH", "")
    return [str(BENCHMARKS), *([given] if given else [])]


class _stopped_after:  # noqa: N801
    """Ask a process to end after some seconds, and end it a little later."""

    def __init__(self, child: Child, seconds: float):
        self._expired = threading.Event()
        self._timers = [
            threading.Timer(max(0.0, seconds - GRACE_S), self._stop, [child.stop]),
            threading.Timer(seconds, self._stop, [child.kill]),
        ]

    def _stop(self, end: Callable[[], None]) -> None:
        self._expired.set()
        end()

    def __enter__(self) -> threading.Event:
        for timer in self._timers:
            timer.daemon = True
            timer.start()
        return self._expired

    def __exit__(self, *error: object) -> None:
        for timer in self._timers:
            timer.cancel()
