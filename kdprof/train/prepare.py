"""What training needs before it starts: Costs, and a folder with runs under the same conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kdprof.budget import parse_budget
from kdprof.errors import KdprofError, Problems, UserError, refuse_uncounted
from kdprof.measure import TRAINING_SHARE, TrainingPlan, measure
from kdprof.optimizer import group_lines
from kdprof.progress import Progress
from kdprof.records import REFERENCE, Cost, Run, RunKind
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key, differences, of_all_methods
from kdprof.store import RunFolder, Store
from kdprof.train.cells import check_warmup, identity_of
from kdprof.train.loggers import check_loggers

MORE_TIME = 4
"""A Cost is measured again if it would get this many times as much time as it had, which makes its
interval half as wide."""
SHOWN = 5
"""How many differences between a run and the study a message names."""


class Prepared(NamedTuple):
    """What training needs to know before it starts."""

    costs: dict[str, Cost]
    failures: list[str]
    """Methods that could not be measured, with the reason."""


def prepare(study: ResolvedStudy, store: Store, names: list[str], progress: Progress) -> Prepared:
    """Return the Costs of the named methods, of those that budgets name and of the reference.

    Only missing Costs are measured, and those that a much shorter training had left less time.

    Raises:
        UserError: the teacher's training is all warm-up, a step cannot fit into the device's
            memory, a logger is not installed, nothing can be learned from the data or scored on
            them, the folder has runs that were trained under other conditions than this study's,
            or the study needs FLOP that cannot be counted.
        KdprofError: the reference or a method that a budget names could not be measured.
    """
    check_loggers(study.training.loggers)
    check_runs(study, store, names)
    _check_teacher_warmup(study, store, names)
    check_content(study, progress)
    lines = [line for n in study.trained_shapes() for line in group_lines(n, study.step)]
    for line in dict.fromkeys(lines):
        progress.detail(line)
    named = study.budget_methods()
    wanted = list(dict.fromkeys([REFERENCE, *names, *named]))
    costs, missing = _read_costs(study, store, wanted)
    _say_earlier(study, store, progress)
    plan = training_plan(study, names)
    missing += _rough(study, costs, plan)
    if not missing:
        _check_flop(study, costs)
        return Prepared(costs, [])
    progress.say(f"measuring {', '.join(missing)}")
    measured = measure(study, missing, progress, keep=store.write_cost, plan=plan)
    if measured.costs:
        progress.say(_precision_of(measured.costs))
    if lost := [name for name in (REFERENCE, *named) if name in measured.failures]:
        raise KdprofError(
            f"no budget can be converted without {', '.join(lost)}\n{measured.summary()}"
        )
    costs |= {cost.method: cost for cost in measured.costs}
    costs = {name: costs[name] for name in wanted if name in costs}
    _check_flop(study, costs)
    return Prepared(costs, measured.summary().splitlines())


def _say_earlier(study: ResolvedStudy, store: Store, progress: Progress) -> None:
    """Say which runs were planned with Costs of other workers or of another cache than now."""
    costs = {(cost.method, cost.key): cost for cost in store.costs()}
    now = _loading(study.data_settings.model_dump(mode="json"))
    planned = {run.method: costs.get((run.method, run.cost_key or "")) for run in store.runs()}
    earlier = [
        name
        for name, cost in sorted(planned.items())
        if cost and _loading(cost.settings.get("data_settings", {})) not in ((None, None), now)
    ]
    if earlier:
        progress.say(
            f"earlier runs of {', '.join(earlier)} were planned with other data_settings.workers "
            "or cache: equal wall-clock is that of the loading each was measured with"
        )


def _loading(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    return settings.get("workers"), settings.get("cache")


def _check_flop(study: ResolvedStudy, costs: Mapping[str, Cost]) -> None:
    """Refuse a study that needs FLOP of a step with matrix work that is not counted."""
    if study.needs_flop:
        totals = {name: cost.flop_per_iteration() for name, cost in costs.items()}
        missed = {n: costs[n].why_no_flop() for n, total in totals.items() if total is None}
        refuse_uncounted(study.needs_flop, missed)


def _check_teacher_warmup(study: ResolvedStudy, store: Store, names: Sequence[str]) -> None:
    begun = store.teacher_folder().read_run() is not None
    if study.teacher_weights is None and study.needs_teacher(names) and not begun:
        check_warmup(study, study.teacher_training.iterations, "teacher_training.iterations")


def check_content(study: ResolvedStudy, progress: Progress) -> None:
    """Say what is degenerate in a study's data, see :mod:`kdprof.data.degenerate`.

    Raises:
        UserError: nothing can be learned or scored, or files cannot be used. It names every
            problem.
    """
    with progress.task("reading labels", 1) as advance:
        found = study.data.examine()
        advance(1)
    Problems(found.problems).refuse()
    for warning in dict.fromkeys(found.warnings):
        progress.say(f"warning: {warning}")


def training_plan(study: ResolvedStudy, names: Sequence[str]) -> TrainingPlan | None:
    """Return the training that a study's budgets mean; None if there are none, or if one is an
    amount of FLOP or energy."""
    images, seconds = len(study.data.files["train"]), 0.0
    iterations: dict[str, float] = dict.fromkeys(names, 0.0)
    for budget in map(parse_budget, study.budgets):
        if budget.unit == "s":
            seconds += budget.amount * len(names)
            continue
        images_of = {"iterations": study.step.batch, "samples": 1, "epochs": images}
        if budget.unit not in images_of:
            return None
        for name in names:  # a run under "40k@cwd" costs what cwd does
            like = budget.method or name
            count = budget.amount * images_of[budget.unit] / study.step.batch
            iterations[like] = iterations.get(like, 0.0) + count
    if not study.budgets:
        return None
    trained = study.teacher_weights is None and study.needs_teacher(names)
    teacher = study.teacher_training.iterations if trained else 0
    runs = {name: study.seeds * count for name, count in iterations.items()}
    return TrainingPlan(study.seeds * seconds, runs, teacher)


def _rough(study: ResolvedStudy, costs: dict[str, Cost], plan: TrainingPlan | None) -> list[str]:
    """Return the methods whose Costs are not precise, because they were measured for a training so
    short that they would get several times as much time now."""
    settings, share_s = study.measure, study.measure.max_time_s
    if plan is not None and REFERENCE in costs:
        ratios = {name: cost.ratio_per_iteration().median for name, cost in costs.items()}
        iteration_s = costs[REFERENCE].seconds_per_iteration().median
        planned_s = plan.in_reference_iterations(ratios).lasts_s(iteration_s)
        share_s = min(share_s, TRAINING_SHARE * planned_s / len(costs))
    return [
        name
        for name, cost in costs.items()
        if cost.timing.get("most_s") is not None
        and cost.timing["total_time_s"] is None
        and cost.timing["ratio_width"] > settings.precision_target
        and MORE_TIME * cost.timing["taken_s"] < share_s
    ]


def _precision_of(costs: Sequence[Cost]) -> str:
    """Return how long measuring took and how precise it is, in one line."""
    spent_s = sum(seconds for cost in costs for seconds in cost.timing["stages_s"].values())
    widths = {c.method: c.timing["ratio_width"] / 2 for c in costs if c.method != REFERENCE}
    if not widths:
        return f"measured in {spent_s:.3g} s"
    worst = max(widths, key=lambda name: widths[name])
    return f"measured in {spent_s:.3g} s: ratios within {widths[worst]:.2%} ({worst}) or better"


def _read_costs(
    study: ResolvedStudy, store: Store, names: Iterable[str]
) -> tuple[dict[str, Cost], list[str]]:
    """Return the stored Costs of methods, and the methods that have none."""
    found = {name: store.read_cost(name, cost_key(study, name)) for name in names}
    costs = {name: cost for name, cost in found.items() if cost is not None}
    if study.needs_energy:
        costs = {name: cost for name, cost in costs.items() if not _lacks_energy(cost)}
    return costs, [name for name in found if name not in costs]


def _lacks_energy(cost: Cost) -> bool:
    """Return True if a window of its own could tell the energy of a step, or tell it better."""
    if cost.energy is not None:
        return cost.energy.around_blocks
    return "--detail" in cost.unavailable.get("energy_j", "")


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


def check_runs(study: ResolvedStudy, store: Store, names: Sequence[str]) -> None:
    """Refuse a folder with runs that this study would not train in the same way.

    Raises:
        UserError: something that a run of the named methods or the teacher depends on has changed
            since, or that all runs of a folder have in common. It names every such run with what
            differs.
    """
    problems = []
    here: dict[tuple[RunKind, str], dict[str, str]] = {}
    for folder in _begun(study, store, names):
        run = folder.read_run()
        if run is None:
            continue
        named = run.kind == "teacher" or run.method in names
        kind = (run.kind, run.method if named else names[0])
        if kind not in here:
            here[kind] = identity_of(study, *kind)
        if changed := _changed(study, run, here[kind], named=named):
            problems.append(
                f"{folder.path}: {changed}; use another --out, or delete it to train it again"
            )
    if problems:
        raise UserError(*problems)


def _begun(study: ResolvedStudy, store: Store, names: Sequence[str]) -> list[RunFolder]:
    """Return the folders of all runs and trunks, and of the teacher if it is needed."""
    teacher = [store.teacher_folder()] if study.needs_teacher(names) else []
    return [*store.run_folders(), *store.trunk_folders(), *teacher]


def _changed(study: ResolvedStudy, run: Run, here: Mapping[str, str], *, named: bool) -> str:
    """Return in words what has changed since a run was begun; empty if nothing has.

    Args:
        here: what the run would depend on now; what another method's would, if it is not named.
    """
    if run.identity is not None:
        there: Mapping[str, str] = run.identity
        if not named:
            there, here = of_all_methods(there), of_all_methods(here)
        return _some(differences(there, here))
    if not named or run.cost_key is None or run.cost_key == cost_key(study, run.method):
        return ""
    return "it was trained with other settings, code, data, versions or on another device"


def _some(changes: Sequence[str]) -> str:
    """Return the first changes in one line, and how many more there are."""
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return "; ".join(changes[:SHOWN]) + more
