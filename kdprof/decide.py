"""Train seeds until claims are decided: the loop of ``kdprof decide``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdprof.claims import Claim
from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.records import Decision
from kdprof.reports.decisions import looks, outcome
from kdprof.reports.results import Results, collect
from kdprof.study import Study
from kdprof.workflow import Workflow

FIRST_SEEDS = 2
"""One difference has no spread, so nothing is decided before the second seed."""


@dataclass(frozen=True)
class Plan:
    """What is to be decided, and how long to go on."""

    claims: Sequence[Claim]
    confidence: float
    max_seeds: int


def decide(
    workflow: Workflow, plan: Plan, train: Callable[[Workflow], Sequence[str]]
) -> tuple[list[Decision], list[str]]:
    """Train one seed more of the methods of all undecided claims until none is undecided.

    Every method of a claim gets the same seeds; claims share runs. Each decision is stored when it
    falls, and the undecided ones at the limit.

    Args:
        workflow: its study's budgets are those of claims about a gain.
        train: trains every run of a workflow's study and returns the failures.

    Returns:
        The decisions, and the failures that ended the training early.

    Raises:
        UserError: a claim about a gain has fewer than two budgets, or the study has problems.
    """
    _check(workflow.study, plan)
    decided: dict[str, Decision] = {}
    failures: Sequence[str] = []
    for seeds in range(FIRST_SEEDS, plan.max_seeds + 1):
        left = [claim for claim in plan.claims if claim.text() not in decided]
        if not left:
            break
        failures = train(replace(workflow, study=_study(workflow.study, left, seeds)))
        if failures:
            break
        results = collect(workflow.store)
        for claim in left:
            made = _decision(claim, plan, results)
            if made.outcome != "undecided" or seeds == plan.max_seeds:
                decided[claim.text()] = made
                workflow.store.write_decision(made)
                workflow.progress.say(f"{made.outcome} after {made.seeds} seeds: {made.statement}")
    return list(decided.values()), list(failures)


def _check(study: Study, plan: Plan) -> None:
    problems = [
        f"claim '{claim.text()}' is about a curve: give two budgets or more, such as "
        "--budget 10k@kd --budget 40k@kd"
        for claim in plan.claims
        if claim.is_gain and len(study.budgets) < 2
    ]
    if not 0.5 < plan.confidence < 1:
        problems.append(f"--confidence {plan.confidence:g} must lie between 0.5 and 1")
    if plan.max_seeds < FIRST_SEEDS:
        problems.append(f"--max-seeds {plan.max_seeds}: at least {FIRST_SEEDS} are needed")
    if problems:
        raise UserError(*problems)


def _study(study: Study, claims: Sequence[Claim], seeds: int) -> Study:
    """Return the study of the runs that undecided claims need."""
    names = dict.fromkeys(name for claim in claims for name in (claim.first, claim.second))
    files = {find_method(spec).cls.name: spec for spec in study.methods}
    budgets = dict.fromkeys(claim.budget for claim in claims if claim.budget is not None)
    if any(claim.is_gain for claim in claims):
        budgets |= dict.fromkeys(study.budgets)
    methods = [files.get(name, name) for name in names]
    update = {"methods": methods, "budgets": list(budgets), "seeds": seeds}
    return study.model_copy(update=update)


def _decision(claim: Claim, plan: Plan, results: Results) -> Decision:
    found = looks(claim, results, plan.confidence)
    own = [
        run
        for run in results.finished
        if run.method in (claim.first, claim.second) and claim.budget in (None, run.budget)
    ]
    cells = {(run.method, run.budget) for run in own}
    saved = max(0, len(cells) * plan.max_seeds - len(own))
    mean_s = sum(run.train_s.actual for run in own) / len(own)
    return Decision(
        statement=claim.text(),
        confidence=plan.confidence,
        max_seeds=plan.max_seeds,
        outcome=outcome(claim, found[-1]) if found else "undecided",
        looks=found,
        saved_runs=saved,
        saved_s=saved * mean_s,
    )
