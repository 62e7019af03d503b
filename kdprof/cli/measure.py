"""``measure`` and ``compare``: what a step costs, and whether it became slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdprof.cli.options import (
    FILE,
    FolderCommand,
    MeasuringOptions,
    OutputOptions,
    StudyOptions,
    grouped,
    measuring_options,
    output_options,
    study_options,
)
from kdprof.cli.output import name_files, print_records, stdout
from kdprof.errors import KdprofError, UserError

if TYPE_CHECKING:
    from kdprof.records import Cost

FOR_STEPS = ("device", "precision")
"""The options of a study that apply to a user's step, too."""


class Slower(KdprofError):
    """The error that a measured step is slower than in the baseline."""

    exit_code = 3


@dataclass(frozen=True)
class KindOptions:
    """Options for what is measured, or counted instead."""

    count_only: bool
    modules: bool
    steps: tuple[str, ...]


@dataclass(frozen=True)
class FileOptions:
    """Options for the baseline, and for files that are written in addition."""

    baseline: Path | None
    trace: Path | None
    memory_timeline: Path | None


@click.command()
@study_options
@output_options
@measuring_options
@grouped(
    "kind",
    KindOptions,
    click.option("--count-only", is_flag=True, help="Count at full size; run and store nothing."),
    click.option("--modules", is_flag=True, help="With --count-only: FLOP by module, with fvcore."),
    click.option(
        "--step", "steps", multiple=True, metavar="FILE.py:FUNC", help="Measure a user's step."
    ),
)
@grouped(
    "files",
    FileOptions,
    click.option("--baseline", type=FILE, help="Compare with these Costs; exit 3 if slower."),
    click.option("--trace", type=FILE, help="Write a Chrome trace of two steps."),
    click.option("--memory-timeline", type=FILE, help="Write the CUDA allocator's history."),
)
def measure(
    study: StudyOptions,
    output: OutputOptions,
    measuring: MeasuringOptions,
    kind: KindOptions,
    files: FileOptions,
) -> None:
    """Measure what one training step of each method costs on this device."""
    if kind.steps:
        _measure_steps(kind, study, output, measuring, files)
    elif kind.count_only:
        _count(study, output, kind.modules)
    elif kind.modules:
        raise UserError("--modules counts without running; add --count-only")
    else:
        _measure(study, output, measuring, files)


def _measure(
    study: StudyOptions, output: OutputOptions, measuring: MeasuringOptions, files: FileOptions
) -> None:
    from kdprof.measure.profiles import Files
    from kdprof.reports.costs import render
    from kdprof.workflow import Workflow

    baseline = _read_baseline(files.baseline)
    workflow = Workflow.open(
        study.source,
        study.overrides(),
        output.out,
        output.progress(),
        measuring=measuring.overrides(),
    )
    written: list[Path] = []
    measured = workflow.measure(Files(files.trace, files.memory_timeline), written.append)
    paths = list(dict.fromkeys(written))  # a Cost that becomes more precise is written again
    _show_costs(measured.costs, output, paths)
    if paths and output.prints_tables:
        name_files(render(workflow.store))
    _conclude(baseline, measured.costs, measured.summary(), output)


def _count(study: StudyOptions, output: OutputOptions, modules: bool) -> None:
    from kdprof.reports.costs import count_table
    from kdprof.workflow import Workflow

    workflow = Workflow.open(study.source, study.overrides(), output.out, output.progress())
    measured = workflow.count(modules=modules)
    if output.as_json:
        print_records(measured.costs)
    elif not output.quiet:
        count_table(measured.costs, stdout(), detail=output.verbose)
    if measured.failures:
        raise KdprofError(measured.summary())


def _measure_steps(
    kind: KindOptions,
    study: StudyOptions,
    output: OutputOptions,
    measuring: MeasuringOptions,
    files: FileOptions,
) -> None:
    """Measure the steps that users' files make; the study's options do not apply to them."""
    from kdprof.hardware.device import find_device
    from kdprof.measure.profiles import Files, check_files
    from kdprof.measure.user_step import StepSource, measure_files
    from kdprof.reports.costs import render_steps
    from kdprof.store import Store
    from kdprof.study import load_study

    _refuse_for_steps(study, kind, measuring)
    device, wanted = study.device or "auto", Files(files.trace, files.memory_timeline)
    check_files(wanted, find_device(device))
    baseline = _read_baseline(files.baseline)
    costs, failures = measure_files(
        [StepSource.parse(spec) for spec in kind.steps],
        device=device,
        precision=study.precision,
        settings=load_study(None, measuring.overrides()).measure,
        files=wanted,
        progress=output.progress(),
    )
    store = Store(output.out)
    paths = [store.write_step_cost(cost) for cost in costs]
    _show_costs(costs, output, paths)
    if output.prints_tables:
        name_files(render_steps(store))
    summary = "\n".join(f"step '{name}': {why}" for name, why in failures.items())
    _conclude(baseline, costs, summary, output)


def _refuse_for_steps(study: StudyOptions, kind: KindOptions, measuring: MeasuringOptions) -> None:
    """Refuse options that do not apply to a user's step.

    Raises:
        UserError: such an option was given.
    """
    given = {name for name, value in vars(study).items() if value} - set(FOR_STEPS)
    # Each step has a process and a time of its own.
    given |= {name for name in ("total_time", "isolated") if getattr(measuring, name)}
    parameters = click.get_current_context().command.params
    flags = [parameter.opts[0] for parameter in parameters if parameter.name in given]
    flags += ["--count-only"] if kind.count_only or kind.modules else []
    if flags:
        raise UserError(
            f"--step measures a user's step as it is: {', '.join(flags)} cannot apply; leave it out"
        )


def _show_costs(costs: Sequence[Cost], output: OutputOptions, paths: Sequence[Path]) -> None:
    from kdprof.reports.costs import measure_table

    if output.as_json:
        print_records(costs)
    elif costs and not output.quiet:
        measure_table(costs, stdout(), detail=output.verbose)
        name_files(paths)


def _read_baseline(path: Path | None) -> list[Cost] | None:
    """Read the baseline. This comes before measuring, so that a wrong file is reported at once."""
    from kdprof.reports.comparison import read_costs

    return None if path is None else read_costs(path)


def _conclude(
    baseline: list[Cost] | None, costs: Sequence[Cost], failures: str, output: OutputOptions
) -> None:
    """Compare with the baseline, if one was given, and report failures.

    Raises:
        Slower: a method is slower than in the baseline.
        KdprofError: a method or step could not be measured.
    """
    slower = []
    if baseline is not None and costs:
        from kdprof.reports.comparison import compare as run
        from kdprof.reports.comparison_table import comparison_table

        comparison = run(baseline, costs)
        if output.prints_tables:
            comparison_table(comparison, stdout())
        slower = [
            row.method + ("" if row.reliable else " (unreliable)")
            for row in comparison.rows
            if row.verdict == "slower"
        ]
    if failures:
        raise KdprofError(failures)
    if slower:
        raise Slower(f"slower than the baseline: {', '.join(slower)}")


@click.command(cls=FolderCommand)
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
def compare(old: Path, new: Path) -> None:
    """Compare the Costs in OLD with those in NEW: record files, or folders of results."""
    from kdprof.reports.comparison import compare as run
    from kdprof.reports.comparison import read_costs
    from kdprof.reports.comparison_table import comparison_table

    comparison_table(run(read_costs(old), read_costs(new)), stdout())
