"""What `kdprof methods --check` prints: the verdicts on one method, or one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from .text import narrow_table

if TYPE_CHECKING:
    from kdprof.method_checks import Verdict

_STYLES = {"ok": "green", "failed": "red", "skipped": "dim"}
NAME_WIDTH = 18


def verdict_table(name: str, verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the verdicts on one method."""
    table = narrow_table()
    for column in ("check", "verdict", "message"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        message = Text("\n".join(_items(verdict)), "dim" if verdict.outcome == "skipped" else "")
        outcome = Text(verdict.outcome, _STYLES[verdict.outcome])
        table.add_row(Text(verdict.name), outcome, message)
    console.print(Text(name, "bold"), table, sep="\n")
    console.print(Text(summary(verdicts)))


def _items(verdict: Verdict) -> list[str]:
    """Return the lines of the message, with list marks if there are several."""
    lines = verdict.message.splitlines()
    return [f"- {line}" for line in lines] if len(lines) > 1 else lines


def verdict_line(name: str, verdicts: Sequence[Verdict], console: Console) -> None:
    """Print one method's outcome in one line."""
    failed = any(v.outcome == "failed" for v in verdicts)
    outcome = Text("failed" if failed else "ok", _STYLES["failed" if failed else "ok"])
    line = Text.assemble(name.ljust(NAME_WIDTH), " ", outcome, " " * (not failed) * 4, "  ")
    console.print(line + Text(summary(verdicts)), soft_wrap=True)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return how many checks passed, and the names of those that failed."""
    names = {o: [v.name for v in verdicts if v.outcome == o] for o in _STYLES}
    parts = [f"{len(names['ok'])} ok"]
    if names["skipped"]:
        parts.append(f"{len(names['skipped'])} skipped")
    if names["failed"]:
        parts.append(f"failed: {', '.join(names['failed'])}")
    return ", ".join(parts)
