"""``data check``: check the files of a data set, and whether the loader keeps up."""

from __future__ import annotations

from pathlib import Path

import click

from kdprof.cli.options import FILE, LABELS_HELP, label_settings, progress
from kdprof.cli.output import name_files, stdout


@click.group()
def data() -> None:
    """Check a data set."""


@data.command()
@click.argument("spec", metavar="NAME:ROOT")
@click.option("--split", "splits", multiple=True, help="Repeatable; train and val if not given.")
@click.option("--sheet", type=FILE, help="Contact sheet [default: NAME-check.png].")
@click.option(
    "--study", "source", metavar="FILE|PRESET", help="Compare loading with this study's step."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help=LABELS_HELP)
def check(
    spec: str,
    splits: tuple[str, ...],
    sheet: Path | None,
    source: str | None,
    assignments: tuple[str, ...],
) -> None:
    """Read every file of a data set: counts, sizes, label values, classes, and a contact sheet.

    The exit code is 1 if a problem is found.
    """
    from kdprof.data.check import check_data
    from kdprof.reports.data_check import contact_sheet, print_check

    labels, settings = label_settings(source, assignments)
    found = check_data(spec, splits or ("train", "val"), progress(), labels)
    print_check(found, stdout())
    if any(split.shown for split in found.splits):
        sheet = sheet or Path(f"{found.name}-check.png")
        contact_sheet(found, sheet)
        name_files([sheet])
    if found.problems:
        raise click.exceptions.Exit(1)
    if source is not None:
        from kdprof.measure.feeding import measure_study_feeding
        from kdprof.reports.feeding import print_feeding

        print_feeding(
            measure_study_feeding(source, {**settings, "data": spec}, progress()), stdout()
        )
