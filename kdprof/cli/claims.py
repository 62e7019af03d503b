"""``claim``, ``verify`` and ``decide``: statements about methods, and what the runs say of them."""

from __future__ import annotations

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
    json_option,
    measuring_options,
    out_option,
    output_options,
    study_options,
)
from kdprof.cli.output import name_files, print_records, say
from kdprof.cli.train import LauncherOptions, launcher_options
from kdprof.errors import KdprofError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kdprof.records import Decision
    from kdprof.workflow import Workflow

confidence_option = click.option(
    "--confidence", type=float, default=0.95, show_default=True, help="Of intervals and outcomes."
)


@click.command(cls=FolderCommand)
@click.argument("statements", nargs=-1, required=True, metavar="STATEMENT...")
@out_option()
@confidence_option
@click.option("--name", help="Name of the claim's files; default: made from the statement.")
@json_option
def claim(
    statements: tuple[str, ...], out: Path, confidence: float, name: str | None, as_json: bool
) -> None:
    """Judge statements about trained methods and write them as claims that others can check.

    'fitnet > kd @ 40k@cwd', 'fitnet ~ kd within 0.3 @ 40k@cwd', 'gain(cwd, kd) > 1.2', the last
    also with 'on iterations' (flop, joules).
    """
    from kdprof.reports.claims import make_claim, summary, write_claim
    from kdprof.store import Store

    if name and len(statements) > 1:
        raise UserError("--name is the name of one claim; give one statement")
    store = Store(out)
    store.require()
    made = [make_claim(store, text, confidence=confidence) for text in statements]
    paths = [path for record in made for path in write_claim(store, record, name)]
    if as_json:
        print_records(made)
        return
    for line in summary(made):
        say(line)
    name_files(paths)


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
def verify(files: tuple[Path, ...]) -> None:
    """Compute claims again from the records in the folders that they lie in.

    Exit code 0: the same; 1: a claim or a record differs; 2: a file cannot be read.
    """
    from kdprof.reports.claims import verify as check

    unreadable = different = False
    for path in files:
        try:
            found = check(path)
        except UserError as error:
            say(f"kdprof: {error}", err=True)
            unreadable = True
            continue
        state = "DIFFERENT" if found.problems else "confirmed"
        say(f"{path}: {state}: {found.record.outcome}: {found.record.statement}")
        for problem in found.problems:
            say(f"  {problem}")
        different |= bool(found.problems)
    if unreadable or different:
        raise click.exceptions.Exit(2 if unreadable else 1)


@dataclass(frozen=True)
class DecideOptions:
    """Options for how long seeds are added."""

    confidence: float
    max_seeds: int
    budgets: tuple[str, ...]


@click.command()
@click.argument("statements", nargs=-1, required=True, metavar="STATEMENT...")
@study_options
@output_options
@grouped(
    "deciding",
    DecideOptions,
    confidence_option,
    click.option(
        "--max-seeds", type=int, default=12, show_default=True, help="Stop undecided after these."
    ),
    click.option(
        "--budget", "budgets", multiple=True, help="For claims about a gain: two or more budgets."
    ),
)
@measuring_options
@launcher_options
def decide(
    statements: tuple[str, ...],
    study: StudyOptions,
    output: OutputOptions,
    deciding: DecideOptions,
    measuring: MeasuringOptions,
    launching: LauncherOptions,
) -> None:
    """Train seeds until the statements are decided, looking after every seed.

    'fitnet > kd @ 10k@cwd', see 'kdprof claim --help'. The intervals are valid however often one
    looks. --method is only needed for methods in files.
    """
    from kdprof.claims import parse_claim
    from kdprof.data import require_files
    from kdprof.decide import Plan
    from kdprof.decide import decide as run
    from kdprof.workflow import Workflow

    launching.check()
    claims = [parse_claim(text) for text in statements]
    workflow = Workflow.open(
        study.source,
        study.overrides(),
        output.out,
        output.progress(),
        control=False,
        measuring=measuring.overrides(),
    )
    require_files(workflow.study.data)
    plan = Plan(claims, deciding.budgets, deciding.confidence, deciding.max_seeds)
    decisions, failures = run(workflow, plan, _trainer(workflow, launching))
    _report(decisions, output)
    if failures:
        raise KdprofError("\n".join(failures))


def _trainer(workflow: Workflow, launching: LauncherOptions) -> Callable[[Workflow], Sequence[str]]:
    """Return what trains every run of a study and returns the failures."""
    if launching.launcher == "slurm":
        from kdprof.launch.slurm import parse_options, train_on_cluster

        options = parse_options(launching.slurm_options)
        return lambda made: train_on_cluster(made, options)
    if launching.launcher == "local":
        from kdprof.launch.local import train_locally

        return lambda made: train_locally(made, launching.slots).failures
    if workflow.study.step.gpus > 1:
        raise UserError("decide with several GPUs per run needs --launcher local or slurm")
    return lambda made: made.train().failures


def _report(decisions: Sequence[Decision], output: OutputOptions) -> None:
    from kdprof.reports.decisions import decision_line

    if output.as_json:
        print_records(decisions)
    elif not output.quiet:
        for decision in decisions:
            say(decision_line(decision))
