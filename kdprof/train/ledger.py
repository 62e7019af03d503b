"""What a run's compute was used for: useful work, overheads that do not count, and lost work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from kdprof.records import LedgerEntry
from kdprof.store import append_line, read_lines, write_atomic

USEFUL = ("train", "trunk")
"""Kinds of entries that count as the run's cost."""


class Ledger:
    """The entries of a run, in a file that grows as compute is spent.

    Attributes:
        spent_s: seconds by kind of entry.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries = read_lines(path, LedgerEntry)
        self._add_up()

    def _add_up(self) -> None:
        self.spent_s: dict[str, float] = defaultdict(float)
        for entry in self._entries:
            self.spent_s[entry.kind] += entry.seconds

    def book(
        self, kind: str, iteration: int, seconds: float, energy_j: float | None = None
    ) -> None:
        """Append an entry, durably."""
        entry = LedgerEntry(kind=kind, iteration=iteration, seconds=seconds, energy_j=energy_j)
        append_line(self.path, entry)
        self._entries.append(entry)
        self.spent_s[kind] += seconds

    def useful_s(self) -> float:
        """Return the seconds that count as the run's cost so far."""
        return sum(self.spent_s[kind] for kind in USEFUL)

    def energy_j(self) -> float | None:
        """Return the joules of the training; None if a part of it was not metered."""
        useful = [entry.energy_j for entry in self._entries if entry.kind in USEFUL]
        metered = [joules for joules in useful if joules is not None]
        return sum(metered) if metered and len(metered) == len(useful) else None

    def rewind(self, iteration: int, evaluated: Collection[int]) -> None:
        """Turn what was spent after a checkpoint into lost work, because it is done again.

        Args:
            iteration: of the checkpoint; 0 if there is no checkpoint.
            evaluated: iterations whose evaluation the checkpoint contains.
        """
        if not self.path.exists():
            return
        kept = []
        for entry in self._entries:
            again = entry.kind == "eval" and entry.iteration not in evaluated
            lost = (entry.iteration > iteration or again) and entry.kind != "paused"
            kept.append(entry.model_copy(update={"kind": "lost"}) if lost else entry)
        self._entries = kept
        # In any case: the next entry must not follow a line that a crash left incomplete.
        lines = [entry.model_dump_json(by_alias=True) + "\n" for entry in kept]
        write_atomic(self.path, "".join(lines))
        self._add_up()
