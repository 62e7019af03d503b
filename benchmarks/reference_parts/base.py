"""What the parts of a reference share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprof.reports.atlas_check import without_paths

from .plan import Size
from .runner import Runner
from .state import PieceRecord, State

WORK = "work"
"""Folder in a device's folder for what is no part of the reference: Costs with all samples."""


@dataclass(frozen=True)
class Call:
    """What all parts of one call share.

    Attributes:
        folder: of the device.
        device: as torch names it, such as cuda:0.
        data: ``camvid:camvid`` (a link in the working folder), or None for synthetic scenes.
        methods: all built-in ones.
    """

    folder: Path
    device: str
    data: str | None
    methods: list[str]
    versions: dict[str, str]
    size: Size
    state: State
    runner: Runner

    @property
    def work(self) -> Path:
        return self.folder / WORK

    def run(
        self,
        name: str,
        kind: str,
        arguments: dict[str, Any],
        limit_s: float,
    ) -> PieceRecord:
        """Run a piece, store how it ended, and list it if it is not done."""
        piece = self.runner.run(name, kind, arguments, limit_s)
        self.state.note(name, piece)
        if piece.state != "done":
            self.leave(name, f"{piece.state}: {piece.reason}")
        return piece

    def leave(self, name: str, why: str) -> None:
        """Store that something was not done."""
        self.state.record.not_done[name] = without_paths(why)
        self.state.save()


class Part:
    """One part. ``forecast_s`` is 0 if nothing is left to do."""

    name: str

    def __init__(self, call: Call):
        self.call = call

    def forecast_s(self) -> float:
        """Return about how long what is left takes."""
        raise NotImplementedError

    def failures(self) -> Iterator[str]:
        """Yield what was carried out and did not succeed, in this call or in an earlier one."""
        yield from ()

    def do(self, ends_s: float) -> None:
        """Do what is left.

        Args:
            ends_s: how much of the whole's time must be left after it.
        """
        raise NotImplementedError

    def _left_s(self, ends_s: float) -> float:
        return self.call.runner.left_s() - ends_s

    def _fits(self, name: str, needs_s: float, ends_s: float) -> bool:
        """Return whether a piece is begun; note what it needs if not."""
        if self._left_s(ends_s) >= max(needs_s, self.call.size.least_s):
            return True
        self.call.leave(name, f"needs about {needs_s:.0f} s")
        return False
