"""``train`` and ``plan``: matched-budget runs, and their forecast."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from kdprof.cli.options import (
    MeasuringOptions,
    OutputOptions,
    StudyOptions,
    TrainingOptions,
    grouped,
    measuring_options,
    output_options,
    study_options,
    training_options,
)
from kdprof.cli.output import print_records, print_rows, say, stdout
from kdprof.errors import KdprofError, UserError

if TYPE_CHECKING:
    from kdprof.store import Store
    from kdprof.train.runs import Summary
    from kdprof.workflow import Workflow


@dataclass(frozen=True)
class LauncherOptions:
    """Options for where runs are trained."""

    launcher: str | None
    slots: int | None
    slurm_options: tuple[str, ...]

    def check(self) -> None:
        """Refuse options of another launcher.

        Raises:
            UserError: an option belongs to a launcher that was not chosen.
        """
        if self.slots is not None and self.launcher != "local":
            raise UserError("--slots divides this machine among runs; add --launcher local")
        if self.slurm_options and self.launcher != "slurm":
            raise UserError("--slurm sets options of a cluster; add --launcher slurm")


launcher_options = grouped(
    "launching",
    LauncherOptions,
    click.option(
        "--launcher",
        type=click.Choice(["local", "slurm"]),
        help="local: concurrent runs on this machine, each in a process; slurm: as cluster jobs.",
    ),
    click.option(
        "--slots",
        type=click.IntRange(min=1),
        metavar="N",
        help="With --launcher local: concurrent runs (default: one per GPU; 2 on a CPU).",
    ),
    click.option(
        "--slurm",
        "slurm_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="With --launcher slurm: partition, account, qos, constraint, time, cpus, ...",
    ),
)


@click.command()
@study_options
@output_options
@training_options
@measuring_options
@launcher_options
def train(
    study: StudyOptions,
    output: OutputOptions,
    training: TrainingOptions,
    measuring: MeasuringOptions,
    launching: LauncherOptions,
) -> None:
    """Train every method at every budget; missing Costs are measured first."""
    from kdprof.data import require_files

    launching.check()
    workflow = _open(study, output, training, measuring)
    require_files(workflow.study.data)  # before anything is measured
    if launching.launcher == "slurm":
        _submit(workflow, launching.slurm_options)
        return
    if (summary := _train(workflow, launching)) is not None:
        _conclude(summary, workflow.store, output)


def _open(
    study: StudyOptions,
    output: OutputOptions,
    training: TrainingOptions,
    measuring: MeasuringOptions,
) -> Workflow:
    """Open the study.

    Raises:
        UserError: it is not valid, or has no budget: that is known before anything is measured.
    """
    from kdprof.workflow import Workflow

    workflow = Workflow.open(
        study.source,
        training.overrides() | study.overrides(),
        output.out,
        output.progress(),
        control=not training.no_control,
        measuring=measuring.overrides(),
    )
    if not workflow.study.budgets:
        raise UserError("no budget given; add --budget, such as --budget 2k@kd or --budget 10min")
    return workflow


def _submit(workflow: Workflow, options: tuple[str, ...]) -> None:
    if find_spec("submitit") is None:
        raise UserError("--launcher slurm needs submitit; pip install 'kdprof[slurm]'")
    from kdprof.launch.slurm import job_name, parse_options, submit

    made, store = submit(workflow, parse_options(options)), workflow.store
    say(
        f"submitted {made.runs} runs as {len(made.tasks)} tasks ({made.tasks[0]} ...), after "
        f"{made.preparation}, which measures and trains the teacher\n"
        f"follow: kdprof status --out {store.root}; logs: {store.slurm}; "
        f"cancel: scancel --name={job_name(store)}"
    )


def _train(workflow: Workflow, launching: LauncherOptions) -> Summary | None:
    """Train on this machine; return None in a process that follows rank 0."""
    if launching.launcher == "local":
        from kdprof.launch.local import train_locally

        return train_locally(workflow, launching.slots)
    from kdprof.launch.group import train_in_group

    done = train_in_group(workflow, ["-P", "-m", "kdprof", *sys.argv[1:]])
    if isinstance(done, int):
        raise click.exceptions.Exit(done)
    return done


def _conclude(summary: Summary, store: Store, output: OutputOptions) -> None:
    from kdprof.reports.judge import judge
    from kdprof.reports.results import collect
    from kdprof.reports.table import print_table
    from kdprof.reports.verdict_text import print_sentences

    if output.as_json:
        print_records(store.runs())
    elif not output.quiet:
        if any(run.finished and run.miou is not None for run in store.runs()):
            print_table(store, stdout())
            print_sentences(judge(collect(store)), stdout())
        say(
            f"{len(summary.finished)} runs trained, {summary.skipped} were finished before, "
            f"{len(summary.elsewhere)} are held by other processes, {len(summary.failures)} "
            f"failed; next: kdprof plot --out {store.root}"
        )
    if summary.failures:
        raise KdprofError("\n".join(summary.failures))


@click.command()
@study_options
@output_options
@training_options
@measuring_options
def plan(
    study: StudyOptions,
    output: OutputOptions,
    training: TrainingOptions,
    measuring: MeasuringOptions,
) -> None:
    """Forecast 'train' with the same options; missing Costs are measured first."""
    from kdprof.reports.plan import plan_table

    found, prepared = _open(study, output, training, measuring).plan()
    if output.as_json:
        print_rows(found)
    elif not output.quiet:
        plan_table(found, stdout())
    if prepared.failures:
        raise KdprofError("\n".join(prepared.failures))
