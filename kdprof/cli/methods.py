"""``methods``: list, print and check methods."""

from __future__ import annotations

import click

from kdprof.cli.output import say, stdout
from kdprof.errors import UserError


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the page of all methods, docs/methods.md.")
@click.option("--check", is_flag=True, help="Check NAME, or every built-in, on small networks.")
def methods(name: str | None, markdown: bool, check: bool) -> None:
    """List the methods, or print one: terms, weights, taps, recipes, paper.

    NAME is a method, or FILE.py:ClassName for your own. With --check: run the method checks
    (gradients, resume, determinism, bf16, ...); the exit code is 1 if one fails.
    """
    from kdprof.discovery import builtin_methods, find_method
    from kdprof.reports.methods import print_method, print_methods

    if check and markdown:
        raise UserError("--check and --markdown do not go together; give one of them")
    if check:
        _check(name)
    elif markdown:
        from kdprof.reports import methods_page

        if name:
            raise UserError("--markdown prints all built-in methods; leave the name out")
        say(methods_page.markdown(builtin_methods()), nl=False)
    elif name is None:
        print_methods(builtin_methods(), stdout())
    else:
        print_method(find_method(name), stdout())


def _check(name: str | None) -> None:
    from kdprof.discovery import builtin_methods, find_method
    from kdprof.method_checks import check_method, check_methods
    from kdprof.reports.method_checks import verdict_line, verdict_table

    if name is not None:
        found = find_method(name)
        results = [check_method(found)]
        verdict_table(found.cls.name, results[0], stdout())
    else:
        results = []
        for found, verdicts in check_methods(builtin_methods().values()):
            verdict_line(found.cls.name, verdicts, stdout())
            results.append(verdicts)
    if any(verdict.outcome == "failed" for verdicts in results for verdict in verdicts):
        raise click.exceptions.Exit(1)
