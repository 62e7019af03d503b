"""The command line: each file holds a group of commands that parse, call and print.

No logic lives here, and no command imports torch before it needs it: ``--help`` is instant.
"""

from __future__ import annotations

import os
import sys

import click

from kdprof import __version__
from kdprof.cli.budget import convert
from kdprof.cli.claims import claim, decide, verify
from kdprof.cli.data import data
from kdprof.cli.machine import demo, doctor
from kdprof.cli.measure import compare, measure
from kdprof.cli.methods import methods
from kdprof.cli.networks import evaluate, export
from kdprof.cli.report import plot, status
from kdprof.cli.train import plan, train
from kdprof.errors import KdprofError

COMMANDS = (
    measure, compare, convert, plan, train, status, plot, claim, verify, decide, evaluate, export,
    methods, data, demo, doctor,
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Measure what knowledge distillation for semantic segmentation costs, and what it gains.

    Commands measure training steps, convert schedules to equal compute, train at matched budgets
    and plot accuracy against compute.
    """


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; every failure is one line unless ``--debug`` asks for more."""
    if "--debug" in sys.argv:
        os.environ["KDPROF_DEBUG"] = "1"  # for child processes, too
        _leave(cli(standalone_mode=False))
    try:
        code = cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("kdprof: interrupted; all written files are complete", err=True)
        code = 130
    except click.ClickException as error:
        click.echo(f"kdprof: {_usage_message(error)}", err=True)
        code = 2
    except KdprofError as error:
        for line in str(error).splitlines():
            click.echo(f"kdprof: {line}", err=True)
        code = error.exit_code
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        click.echo(
            f"kdprof: {type(error).__name__}: {message}; run 'kdprof --debug ...' for details",
            err=True,
        )
        code = 1
    _leave(code)


def _leave(code: int | None) -> None:
    """Exit with a code; in a process of a group, in the way that torchrun's agent expects."""
    if "RANK" in os.environ:
        from kdprof.launch.group import leave

        leave(code or 0)
    sys.exit(code)


def _usage_message(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message} See '{error.ctx.command_path} --help'."
    return message
