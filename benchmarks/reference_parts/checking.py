"""The first part: what the device has, and whether its numbers are right and repeat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kdprof.store import write_atomic

from .base import Part
from .plan import in_order
from .state import PieceRecord

PASSED = "passed"


class Checks(Part):
    """A piece for each check."""

    name = "checks"

    def _open(self) -> list[str]:
        done = self.call.state.is_done
        return [name for name in self.call.size.check_s if not done(f"check {name}")]

    def forecast_s(self) -> float:
        return sum(self.call.size.check_s[name] for name in self._open())

    def do(self, ends_s: float) -> None:
        for name in self._open():
            if self._fits(f"check {name}", self.call.size.check_s[name], ends_s):
                arguments = {"name": name, "device": self.call.device, **self._arguments(name)}
                self.call.run(f"check {name}", "check", arguments, self._left_s(ends_s))
                self._write()

    def failures(self) -> Iterator[str]:
        for name in self.call.size.check_s:
            found = self.call.state.result(f"check {name}")
            if found and found["outcome"] != PASSED:
                yield f"check {name}: {found['outcome']}: {'; '.join(found['lines'])}"

    def _arguments(self, name: str) -> dict[str, Any]:
        size = self.call.size
        precision, methods = size.precisions[0], in_order(size.methods or self.call.methods)
        return {
            "synchronisation": {"methods": methods, "precision": precision},
            "resume": {"kills": 1},
        }.get(name, {})

    def _write(self) -> None:
        lines = ["# Checks of this device", ""]
        for name in self.call.size.check_s:
            piece = self.call.state.record.pieces.get(f"check {name}")
            lines += [f"## {name}: {_outcome(piece)}", "", *_listed(piece), ""]
        write_atomic(self.call.folder / "checks.md", "\n".join(lines))


def _outcome(piece: PieceRecord | None) -> str:
    if piece is None:
        return "not reached"
    return piece.result["outcome"] if piece.state == "done" else piece.state


def _listed(piece: PieceRecord | None) -> list[str]:
    if piece is None:
        return []
    return [f"- {line}" for line in (piece.result["lines"] if piece.result else [piece.reason])]
