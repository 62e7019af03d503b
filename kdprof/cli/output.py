"""Output of commands: tables on a console, records as JSON, the names of written files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from kdprof.records import Record


def stdout() -> Console:
    """Return the console that tables go to."""
    from rich.console import Console

    return Console()


def print_records(records: Sequence[Record]) -> None:
    """Print records as a JSON array."""
    from kdprof.store import to_json

    click.echo(to_json(records))


def print_rows(rows: Iterable[Any]) -> None:
    """Print the fields of plain objects as a JSON array."""
    click.echo(json.dumps([vars(row) for row in rows], indent=2))


def name_files(paths: Iterable[Path]) -> None:
    """Print the names of files that were written."""
    for path in paths:
        click.echo(f"wrote {path}")
