"""``doctor`` and ``demo``: check this machine, and run an example on it."""

from __future__ import annotations

from pathlib import Path

import click

from kdprof.cli.options import LoudnessOptions, loudness_options, out_option, progress
from kdprof.cli.output import stdout


@click.command()
@out_option(Path("kdprof-demo"))
@loudness_options
def demo(out: Path, loudness: LoudnessOptions) -> None:
    """Measure, convert, train and plot on synthetic data, on the CPU, in a few minutes."""
    from kdprof.demo import run

    run(out, loudness.progress(), stdout())


@click.command()
@click.option(
    "--study", "source", metavar="FILE|PRESET", help="Time the input and the step of this study."
)
@click.option("--data", metavar="NAME[:ROOT]", help="Time the input of these images.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any study key.")
def doctor(source: str | None, data: str | None, assignments: tuple[str, ...]) -> None:
    """Print what this machine has, and the effect of what is missing.

    With a study or data, also print whether the loader keeps up with the step.
    """
    from kdprof.measure.doctor import findings_here
    from kdprof.reports.doctor import print_findings
    from kdprof.reports.feeding import print_feeding
    from kdprof.study import parse_assignments

    feeding = None
    if source or data or assignments:
        # First, so that problems of the study are reported before anything is printed.
        from kdprof.measure.feeding import measure_study_feeding

        overrides = parse_assignments(assignments) | ({"data": data} if data else {})
        feeding = measure_study_feeding(source, overrides, progress())
    print_findings(findings_here(), stdout())
    if feeding is not None:
        print_feeding(feeding, stdout())
