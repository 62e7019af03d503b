"""What training needs before it starts: Costs, and a folder with runs under the same conditions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kdprof.errors import KdprofError, UserError
from kdprof.measure import measure
from kdprof.progress import Progress
from kdprof.records import REFERENCE, Cost
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.cost_key import cost_key
from kdprof.store import Store
from kdprof.train.loggers import check_loggers


class Prepared(NamedTuple):
    """What training needs to know before it starts."""

    costs: dict[str, Cost]
    failures: list[str]
    """Methods that could not be measured, with the reason."""


def prepare(study: ResolvedStudy, store: Store, names: list[str], progress: Progress) -> Prepared:
    """Return the Costs of the named methods, of those that budgets name and of the reference.

    Only missing Costs are measured.

    Raises:
        UserError: a step cannot fit into the device's memory, a logger is not installed, or the
            folder has runs that were trained under other conditions than this study's.
        KdprofError: the reference or a method that a budget names could not be measured.
    """
    check_loggers(study.training.loggers)
    check_runs(study, store, names)
    named = study.budget_methods()
    wanted = list(dict.fromkeys([REFERENCE, *names, *named]))
    costs, missing = _read_costs(study, store, wanted)
    if not missing:
        return Prepared(costs, [])
    progress.say(f"measuring {', '.join(missing)}")
    measured = measure(study, missing, progress, keep=store.write_cost)
    if lost := [name for name in (REFERENCE, *named) if name in measured.failures]:
        raise KdprofError(
            f"no budget can be converted without {', '.join(lost)}\n{measured.summary()}"
        )
    costs |= {cost.method: cost for cost in measured.costs}
    costs = {name: costs[name] for name in wanted if name in costs}
    return Prepared(costs, measured.summary().splitlines())


def _read_costs(
    study: ResolvedStudy, store: Store, names: Iterable[str]
) -> tuple[dict[str, Cost], list[str]]:
    """Return the stored Costs of methods, and the methods that have none."""
    found = {name: store.read_cost(name, cost_key(study, name)) for name in names}
    costs = {name: cost for name, cost in found.items() if cost is not None}
    return costs, [name for name in found if name not in costs]


def stored_costs(study: ResolvedStudy, store: Store, names: Sequence[str]) -> dict[str, Cost]:
    """Return the Costs that :func:`prepare` would return, without measuring any.

    Raises:
        UserError: a Cost is missing, or was measured on another device.
    """
    wanted = dict.fromkeys([REFERENCE, *names, *study.budget_methods()])
    costs, missing = _read_costs(study, store, wanted)
    here = study.hardware.name
    elsewhere = {cost.method: cost.device for cost in store.costs() if cost.device != here}
    problems = [
        f"'{name}' has no cost under this study on {here}"
        + (f", but on {elsewhere[name]}: train there" if name in elsewhere else "; measure it here")
        for name in missing
    ]
    if problems:
        raise UserError(*problems)
    return costs


def check_runs(study: ResolvedStudy, store: Store, names: list[str]) -> None:
    """Refuse a folder whose runs were trained under other conditions than this study's.

    Raises:
        UserError: runs of the named methods had other settings, another device or other versions.
    """
    problems = [
        f"{folder.path} was trained with other method settings or code, on another device or "
        "with other versions; use another --out, or delete it to train it again"
        for folder in store.run_folders()
        if (run := folder.read_run()) is not None
        and run.method in names
        and run.cost_key != cost_key(study, run.method)
    ]
    if problems:
        raise UserError(*problems)
