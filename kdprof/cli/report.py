"""``status`` and ``plot``: show the results in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kdprof.cli.options import FolderCommand, grouped, json_option, out_option
from kdprof.cli.output import name_files, print_records, say, stdout


@dataclass(frozen=True)
class FigureOptions:
    """Options for the files of figures; None or empty if they were not given."""

    formats: tuple[str, ...]
    width: float | None

    def given(self) -> dict[str, Any]:
        """Return the arguments ``formats`` and ``width_mm`` that the options set."""
        found = {"formats": self.formats or None, "width_mm": self.width}
        return {name: value for name, value in found.items() if value is not None}


figure_options = grouped(
    "figure_files",
    FigureOptions,
    click.option(
        "--format",
        "formats",
        multiple=True,
        type=click.Choice(["png", "svg", "pdf"]),
        help="Of the figures; repeatable; all three by default.",
    ),
    click.option(
        "--width",
        type=float,
        metavar="MM",
        help="Of the figures: 84 is one column of a paper, 174 (the default) two.",
    ),
)


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
    type=click.Choice(["seconds", "gpu-hours", "flop", "joules", "samples", "iterations"]),
    default="seconds",
    show_default=True,
    help="Compute axis.",
)
@click.option(
    "--method", "methods", multiple=True, help="Draw only these methods in figures; repeatable."
)
@click.option(
    "--versus",
    multiple=True,
    help="Control of the compute-equivalent gain; repeatable; kd and none by default.",
)
@figure_options
def plot(
    out: Path,
    x: str,
    methods: tuple[str, ...],
    versus: tuple[str, ...],
    figure_files: FigureOptions,
) -> None:
    """Say what each method buys; write figures, tables, the verdict and a page."""
    from kdprof.reports.plot import write_all
    from kdprof.reports.verdict_text import print_sentences
    from kdprof.store import Store

    store = Store(out)
    store.require()
    made = write_all(store, x=x, versus=versus, methods=methods, **figure_files.given())
    if made.verdict is None:
        say("no run is trained yet; plotting the costs only")
    name_files(made.files)
    if made.others:
        names = ", ".join(path.name for path in made.others)
        say(f"not written by this call, so it may show an earlier state: {names}")
    for note in made.notes:
        say(note)
    if made.verdict is not None:
        print_sentences(made.verdict, stdout())
