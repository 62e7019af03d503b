"""Train seeds until claims are decided: the loop of ``kdprof decide``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from kdprof.claims import Claim
from kdprof.discovery import find_method
from kdprof.errors import Problems, UserError, unknown
from kdprof.records import Decision, Run
from kdprof.reports.axes import AXES
from kdprof.reports.decisions import looks, outcome, why_no_gain
from kdprof.reports.results import Results, collect
from kdprof.stats.sequential import fewest_seeds
from kdprof.store import Store, write_atomic
from kdprof.study import Study, load_study
from kdprof.workflow import Workflow


@dataclass(frozen=True)
class Plan:
    """What is to be decided, and how long to go on."""

    claims: Sequence[Claim]
    budgets: Sequence[str]
    """Of claims about a gain."""
    confidence: float
    max_seeds: int


def decide(
    workflow: Workflow, plan: Plan, train: Callable[[Workflow], Sequence[str]]
) -> tuple[list[Decision], list[str]]:
    """Train one seed more of the methods of all undecided claims until none is undecided.

    The first round trains as many seeds as any decision needs. Claims share runs. A decision is
    stored before the first run and after every round: a comparison that was looked at while it grew
    is never hidden, even if it is interrupted.

    Args:
        train: trains the runs of a workflow's study that are not finished, and returns the
            failures.

    Returns:
        The decisions, and the failures that ended the training early.

    Raises:
        UserError: claims cannot be decided as they are, or the study has problems.
    """
    _check(workflow.study, plan)
    found = {claim.text(): _decision(claim, plan, None) for claim in plan.claims}
    failures: list[str] = []
    with _taken_back_if_refused(workflow.store), _kept_seeds(workflow):
        _write(workflow.store, found.values())
        for seeds in range(fewest_seeds(plan.confidence), plan.max_seeds + 1):
            left = [claim for claim in plan.claims if _is_open(found[claim.text()])]
            for claim in left:
                study = _study(workflow.study, claim, plan, seeds)
                failures += train(replace(workflow, study=study))
            if failures or not left:
                break
            results = collect(workflow.store)
            found |= {claim.text(): _decision(claim, plan, results) for claim in left}
            _write(workflow.store, [found[claim.text()] for claim in left])
    if not failures:
        # At the end: a run that another claim needed, too, was not saved.
        results = collect(workflow.store)
        for claim in plan.claims:
            found[claim.text()] = _with_savings(found[claim.text()], claim, plan, results)
        _write(workflow.store, found.values())
    return list(found.values()), failures


def _is_open(decision: Decision) -> bool:
    return decision.outcome == "undecided" and not decision.reason


def _write(store: Store, decisions: Iterable[Decision]) -> None:
    for decision in decisions:
        store.write_decision(decision)


@contextmanager
def _taken_back_if_refused(store: Store) -> Iterator[None]:
    """Remove the decisions that were added, if the study is refused before any run began: there was
    no comparison to look at."""
    before, begun = set(store.decision_files()), _progress(store)
    try:
        yield
    except UserError:
        if _progress(store) == begun:
            for path in set(store.decision_files()) - before:
                path.unlink()
                with suppress(OSError):  # folders that hold something else
                    path.parent.rmdir()
                    store.root.rmdir()
        raise


def _progress(store: Store) -> list[tuple[str, int]]:
    return [(run.label(), run.iterations_done) for run in store.runs()]


@contextmanager
def _kept_seeds(workflow: Workflow) -> Iterator[None]:
    """Keep the number of seeds in the folder's study: a later ``train`` of all its methods must not
    train as many seeds of each as this comparison needed."""
    file = workflow.store.study
    before = load_study(str(file), {}).seeds if file.is_file() else workflow.study.seeds
    try:
        yield
    finally:
        if file.is_file():
            study = load_study(str(file), {}).model_copy(update={"seeds": before})
            write_atomic(file, study.to_toml())


def _check(study: Study, plan: Plan) -> None:
    problems = Problems()
    files = {find_method(spec).cls.name: spec for spec in study.methods}
    for claim in plan.claims:
        if claim.is_gain and len(plan.budgets) < 2:
            problems.append(
                f"claim '{claim.text()}' is about a curve: give two budgets or more, such as "
                "--budget 10k@kd --budget 40k@kd"
            )
        if claim.axis not in AXES:
            problems.append(f"claim '{claim.text()}': {unknown('axis', claim.axis, AXES)}")
        for name in (claim.first, claim.second):
            entry = problems.attempt(partial(find_method, files.get(name, name)), None)
            if entry is not None and entry.cls.name != name:
                problems.append(
                    f"claim '{claim.text()}': the method of {name} is called "
                    f"'{entry.cls.name}'; claim that, and give the file with --method"
                )
    if not 0.5 < plan.confidence < 1:
        problems.append(f"--confidence {plan.confidence:g} must lie between 0.5 and 1")
    elif plan.max_seeds < (least := fewest_seeds(plan.confidence)):
        problems.append(
            f"--max-seeds {plan.max_seeds}: at confidence {plan.confidence:g} nothing can be "
            f"decided with fewer than {least} seeds"
        )
    problems.refuse()


def _study(study: Study, claim: Claim, plan: Plan, seeds: int) -> Study:
    """Return the study of the runs that a claim needs."""
    files = {find_method(spec).cls.name: spec for spec in study.methods}
    methods = [files.get(name, name) for name in (claim.first, claim.second)]
    update = {"methods": methods, "budgets": _budgets(claim, plan), "seeds": seeds}
    return study.model_copy(update=update)


def _budgets(claim: Claim, plan: Plan) -> list[str]:
    return list(plan.budgets) if claim.budget is None else [claim.budget]


def _own_runs(claim: Claim, plan: Plan, results: Results) -> list[Run]:
    budgets = _budgets(claim, plan)
    return [
        run
        for run in results.finished
        if run.method in (claim.first, claim.second) and run.budget in budgets
    ]


def _decision(claim: Claim, plan: Plan, results: Results | None) -> Decision:
    """Return what is known of a claim; before any run, ``results`` is None."""
    made = Decision(
        statement=claim.text(),
        confidence=plan.confidence,
        max_seeds=plan.max_seeds,
        outcome="undecided",
        looks=[],
        saved_runs=0,
        saved_s=0.0,
    )
    if results is None:
        return made
    own = replace(results, finished=_own_runs(claim, plan, results))
    try:
        found = looks(claim, own, plan.confidence, plan.max_seeds)
        why, finally_ = why_no_gain(claim, own, plan.confidence)
    except UserError as error:
        return made.model_copy(update={"reason": str(error)})
    if finally_:
        return made.model_copy(update={"reason": why, "looks": found})
    if not found:
        return made
    decided = "undecided" if why else outcome(claim, found[-1])
    return made.model_copy(update={"looks": found, "outcome": decided})


def _with_savings(decision: Decision, claim: Claim, plan: Plan, results: Results) -> Decision:
    own = _own_runs(claim, plan, results)
    if not own:
        return decision
    saved = max(0, 2 * len(_budgets(claim, plan)) * plan.max_seeds - len(own))
    mean_s = sum(run.train_s.actual for run in own) / len(own)
    update: dict[str, Any] = {"saved_runs": saved, "saved_s": saved * mean_s}
    if decision.outcome == "undecided" and not decision.reason:
        # Before, a reason would have ended it.
        own_results = replace(results, finished=own)
        update["reason"], _ = why_no_gain(claim, own_results, plan.confidence)
    return decision.model_copy(update=update)
