"""The demo: measure, convert, train and plot on generated data, without any download."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kdprof.budget import convert, parse_budget
from kdprof.progress import Progress
from kdprof.reports import costs as cost_report
from kdprof.reports import page, table, verdict_text
from kdprof.reports.conversion import conversion_table
from kdprof.reports.costs import measure_table
from kdprof.reports.figures.files import render
from kdprof.reports.judge import judge
from kdprof.reports.results import collect
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
    results = collect(store)
    verdict = judge(results)
    paths = [*render(store, verdict), *table.render(store), *cost_report.render(store)]
    paths += [*verdict_text.render(store, results, verdict), page.render(store, verdict)]
    table.print_table(store, console)
    for path in [store.study, *paths]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    verdict_text.print_sentences(verdict, console)
