"""``convert``: a budget in iterations of every measured method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdprof.cli.options import FolderCommand, out_option
from kdprof.cli.output import name_files, print_rows, stdout
from kdprof.cli.report import FigureOptions, figure_options
from kdprof.errors import UserError

if TYPE_CHECKING:
    from kdprof.published import ConvertedSchedule
    from kdprof.store import Store


@click.command(cls=FolderCommand)
@click.argument("budget", required=False)
@click.option("--published", is_flag=True, help="Convert the published schedules instead.")
@click.option("--dataset", metavar="NAME", help="With --published: only this data set.")
@click.option("--figure", is_flag=True, help="With --published: also draw them.")
@figure_options
@out_option()
@click.option("--json", "as_json", is_flag=True, help="Print only the conversions, as JSON.")
def convert(
    budget: str | None,
    published: bool,
    dataset: str | None,
    figure: bool,
    figure_files: FigureOptions,
    out: Path,
    as_json: bool,
) -> None:
    """Convert BUDGET to iterations of every measured method.

    BUDGET is 40k@cwd, 40k, 2h, 30min, 90s, 5e17flop, 800kJ or 1.5kWh. With --published: print what
    the schedules of the papers cost on this device, and how many iterations of kd take as long.
    """
    from kdprof.store import Store

    if published == (budget is not None):
        raise UserError("give either a budget, such as 40k@cwd, or --published")
    if dataset and not published:
        raise UserError("--dataset selects published schedules; add --published")
    if figure and not published:
        raise UserError("--figure draws published schedules; add --published")
    if figure_files.given() and not figure:
        raise UserError("--format and --width are of the figure; add --figure")
    store = Store(out)
    if budget is None:
        found = _convert_published(store, dataset, as_json)
        if figure:
            _draw_published(store, found, figure_files, as_json)
    else:
        _convert_budget(budget, store, as_json)


def _convert_budget(budget: str, store: Store, as_json: bool) -> None:
    from kdprof.budget import convert as run
    from kdprof.budget import parse_budget
    from kdprof.reports.conversion import conversion_table

    parsed = parse_budget(budget)
    store.require()
    conversions = run(parsed, store.latest_costs())
    if as_json:
        print_rows(conversions)
    else:
        conversion_table(budget, conversions, stdout())


def _convert_published(store: Store, dataset: str | None, as_json: bool) -> list[ConvertedSchedule]:
    from kdprof.published import classes_of, converted_schedules
    from kdprof.reports.published import published_table
    from kdprof.study import load_study

    store.require()
    costs = store.latest_costs()
    classes = classes_of(costs, load_study(str(store.study), {}).methods)
    found = converted_schedules(costs, classes, dataset)
    if as_json:
        print_rows(found)
    else:
        published_table(found, list(costs.values()), stdout())
    return found


def _draw_published(
    store: Store, found: list[ConvertedSchedule], figure_files: FigureOptions, as_json: bool
) -> None:
    from kdprof.reports.figures.files import render_schedules

    paths = render_schedules(store, found, **figure_files.given())
    if not as_json:
        name_files(paths)
