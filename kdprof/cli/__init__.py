"""The command line: each file holds a group of commands that parse, call and print.

No logic lives here, and no command imports torch before it needs it: ``--help`` is instant.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import nullcontext

import click

from kdprof import __version__
from kdprof.cli.budget import convert
from kdprof.cli.claims import claim, decide, verify
from kdprof.cli.data import data
from kdprof.cli.environment import explained, settle
from kdprof.cli.machine import demo, doctor
from kdprof.cli.measure import compare, measure
from kdprof.cli.methods import methods
from kdprof.cli.networks import evaluate, export
from kdprof.cli.output import complain, kept_for_records, replace_unknown_characters
from kdprof.cli.report import plot, status
from kdprof.cli.train import plan, train
from kdprof.errors import KdprofError
from kdprof.interrupts import interrupted_by_sigterm

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
    replace_unknown_characters()
    settle()
    with kept_for_records() if "--json" in sys.argv else nullcontext():
        code = _code()
    _leave(_flushed(code))


def _code() -> int | None:
    """Return the exit code of the command; every failure is one line."""
    if "--debug" in sys.argv:
        os.environ["KDPROF_DEBUG"] = "1"  # for child processes, too
        return _run()
    try:
        code = _run()
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted; all written files are complete")
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else error.format_message(), file=sys.stderr)
        code = 2
    except click.ClickException as error:
        complain(_usage_message(error))
        code = 2
    except KdprofError as error:
        complain(str(error))
        code = error.exit_code
    except OSError as error:
        complain(explained(error))
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        complain(f"{type(error).__name__}: {message}; run 'kdprof --debug ...' for details")
        code = 1
    return code


def _run() -> int | None:
    # The other processes of a group leave signals to the first one.
    alone = os.environ.get("RANK", "0") == "0"
    with interrupted_by_sigterm() if alone else nullcontext():
        return cli(standalone_mode=False)


def _flushed(code: int | None) -> int | None:
    """Write out what was printed; it is a failure if nobody can have read it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not code:
            complain(f"standard output: {explained(error)}")
        return code or 1
    return code


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
