"""What was done so far, in a file: a second call goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kdprof.errors import UserError
from kdprof.records import Amount, Record
from kdprof.reports.atlas_check import without_paths
from kdprof.store import read_record, write_record


class PieceRecord(Record):
    """How one piece of work ended."""

    state: Literal["done", "failed", "stopped"]
    """stopped: its time was up; it goes on in the next call."""
    seconds: Amount
    reason: str = ""
    result: Any = None


class StudyRecord(Record):
    """What the study trains; each is fixed once, so that all its seeds are alike."""

    teacher_iterations: int
    budgets: list[str] = []
    """Empty before the teacher is trained, whose evaluation shows how long those of runs take."""


class StateRecord(Record):
    """The file reference.json."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    identity: dict[str, str]
    """What must be equal in every call that goes on with it."""
    pieces: dict[str, PieceRecord] = {}
    study: StudyRecord | None = None
    not_done: dict[str, str] = {}
    """What the last call left undone, and why or what it needs."""


class State:
    """The state of a reference, written at every change."""

    def __init__(self, folder: Path, identity: dict[str, str]):
        self._path = folder / "reference.json"
        self.record = self._read(identity)

    def _read(self, identity: dict[str, str]) -> StateRecord:
        """Return what is stored there.

        Raises:
            UserError: it was made with other settings, on another device or by other code.
        """
        if not self._path.exists():
            return StateRecord(identity=identity)
        found = read_record(self._path, StateRecord)
        differing = [
            f"{name} was {found.identity.get(name, 'not known')}, now {value}"
            for name, value in identity.items()
            if found.identity.get(name) != value
        ]
        if differing:
            raise UserError(
                f"{self._path.parent} holds a reference that was begun otherwise "
                f"({'; '.join(differing)}); use another --out"
            )
        return found

    def save(self) -> None:
        write_record(self._path, self.record)

    def note(self, name: str, piece: PieceRecord) -> None:
        """Store how a piece ended; its reason names no place of this machine."""
        reason = without_paths(piece.reason)
        self.record.pieces[name] = piece.model_copy(update={"reason": reason})
        self.save()

    def is_done(self, name: str) -> bool:
        piece = self.record.pieces.get(name)
        return piece is not None and piece.state == "done"

    def result(self, name: str) -> Any:
        """Return the result of a piece that is done; None if it is not."""
        return self.record.pieces[name].result if self.is_done(name) else None
