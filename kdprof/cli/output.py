"""Output of commands: tables on a console, records as JSON, the names of written files.

Everything that a command prints goes through :func:`say` or a console of this file. Both spell out
characters that control a terminal, wherever they come from, and replace what the terminal's
encoding does not have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

    from kdprof.records import Record

LONGEST_LINE = 1000
"""Characters of a message; the rest of a longer one helps nobody."""


_records: TextIO | None = None
"""Where records go while standard output is shared with users' code; None: standard output."""


@contextmanager
def kept_for_records() -> Iterator[None]:
    """Keep standard output for what kdprof prints: what users' code prints goes to stderr."""
    global _records
    _records, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout, _records = _records, None


def replace_unknown_characters() -> None:
    """Make the standard streams replace characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # not a stream that a test put there
            reconfigure(errors="replace")


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print plain text."""
    click.echo(_visible(text), file=None if err else _records, err=err, nl=nl)


def complain(message: str) -> None:
    """Print an error message: every line of it on stderr, as kdprof's own."""
    for line in message.splitlines() or [""]:
        more = len(line) - LONGEST_LINE
        cut = f"{line[:LONGEST_LINE]}... ({more:,} more characters)" if more > 0 else line
        say(f"kdprof: {cut}", err=True)


def _visible(text: str) -> str:
    from kdprof.visible import printable

    return "\n".join(printable(line) for line in text.split("\n"))


def console(*, stderr: bool = False) -> Console:
    """Return a console that reads no markup and prints no control characters but its own."""
    from rich.console import Console

    made = Console(file=None if stderr else _records, stderr=stderr, markup=False, emoji=False)
    made.push_render_hook(_visible_hook())
    return made


def _visible_hook() -> Any:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderHook
    from rich.segment import Segment

    class Visible:
        def __init__(self, content: Any):
            self.content = content

        def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Any:
            for text, style, control in console.render(self.content, options):
                yield Segment(text if control else _visible(text), style, control)

    class VisibleHook(RenderHook):
        def process_renderables(self, renderables: list[Any]) -> list[Any]:
            return [Visible(content) for content in renderables]

    return VisibleHook()


def stdout() -> Console:
    """Return the console that tables go to."""
    return console()


def print_records(records: Sequence[Record]) -> None:
    """Print records as a JSON array."""
    from kdprof.store import to_json

    say(to_json(records))


def print_rows(rows: Iterable[Any]) -> None:
    """Print the fields of plain objects as a JSON array."""
    say(json.dumps([vars(row) for row in rows], indent=2))


def name_files(paths: Iterable[Path]) -> None:
    """Print the names of files that were written."""
    for path in paths:
        say(f"wrote {path}")
