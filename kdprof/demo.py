"""The demo: measure, convert, train and plot on generated data, without any download."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kdprof.budget import convert, parse_budget
from kdprof.progress import Progress
from kdprof.reports import table
from kdprof.reports.conversion import conversion_table
from kdprof.reports.costs import measure_table
from kdprof.reports.plot import write_all
from kdprof.reports.verdict_text import print_sentences
from kdprof.train.runs import train
from kdprof.workflow import Workflow


def run(out: Path, progress: Progress, console: Console) -> None:
    """Measure, convert, train and plot the ``quickstart`` study into a folder."""
    workflow = Workflow.open("quickstart", {}, out, progress)
    resolved, store = workflow.resolved(), workflow.store
    prepared = workflow.prepare(resolved)
    measure_table(list(prepared.costs.values()), console)
    for budget in workflow.study.budgets:
        conversion_table(budget, convert(parse_budget(budget), prepared.costs), console)
    train(resolved, store, progress, prepared=prepared)
    made = write_all(store)
    table.print_table(store, console)
    for path in [store.study, *made.files]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if made.verdict is not None:
        print_sentences(made.verdict, console)
