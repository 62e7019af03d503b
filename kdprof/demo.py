"""The main job, end to end, on data that needs no download."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kdprof.budget import convert, parse_budget
from kdprof.progress import Progress
from kdprof.reports import costs as cost_report
from kdprof.reports import curves, table
from kdprof.reports.conversion import conversion_table
from kdprof.reports.costs import measure_table
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.study import claim_folder, join_study, load_study
from kdprof.train import prepare, train


def run(out: Path, progress: Progress, console: Console) -> None:
    """Measure, convert, train and plot the ``quickstart`` study into a folder."""
    study = load_study("quickstart", {})
    resolved, store = ResolvedStudy(study, progress=progress), Store(out)
    join_study(store.study, study)
    prepared = prepare(resolved, store, resolved.method_names(control=True), progress)
    costs = prepared.costs
    claim_folder(store.study, study)
    measure_table(list(costs.values()), console)
    for budget in study.budgets:
        conversion_table(budget, convert(parse_budget(budget), costs), console)
    train(resolved, store, progress, prepared=prepared)
    paths = [*curves.render(store), *table.render(store), *cost_report.render(store)]
    table.print_table(store, console)
    for path in [store.study, *paths]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
