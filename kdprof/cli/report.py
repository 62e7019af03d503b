"""``status`` and ``plot``: show the results in a folder."""

from __future__ import annotations

from pathlib import Path

import click

from kdprof.cli.options import FolderCommand, json_option, out_option
from kdprof.cli.output import name_files, print_records, say, stdout


@click.command(cls=FolderCommand)
@out_option()
@json_option
def status(out: Path, as_json: bool) -> None:
    """Print the progress of the runs, also while another process trains them."""
    from kdprof.reports.status import status_table
    from kdprof.store import Store

    store = Store(out)
    store.require()
    if as_json:
        print_records(store.runs())
    else:
        status_table(store, stdout())


@click.command(cls=FolderCommand)
@out_option()
@click.option(
    "--x",
    type=click.Choice(["seconds", "gpu-hours", "flop", "iterations"]),
    default="seconds",
    show_default=True,
    help="Compute axis.",
)
def plot(out: Path, x: str) -> None:
    """Plot accuracy against compute and write the tables."""
    from kdprof.reports import costs, curves, table
    from kdprof.store import Store

    store = Store(out)
    store.require()
    made = costs.render(store)
    if made and not store.runs():
        say("no run is trained yet; plotting the costs only")
    else:
        made = [*curves.render(store, x=x), *table.render(store), *made]
    name_files(made)
