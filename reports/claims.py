"""Claims: a statement about two methods, judged from the records, that others can check."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprof.budget import parse_budget
from kdprof.claims import Claim, parse_claim
from kdprof.errors import UserError, unknown
from kdprof.records import ClaimRecord, Decision, Effect, Outcome
from kdprof.store import Store, claim_slug, read_record, record_json, write_together
from kdprof.visible import printable

from .axes import AXES, axis
from .judge import CONFIDENCE, Evidence, evidence, gain, pair, ratio_of_costs
from .results import Results, classes_notes, collect, count, decision_note, device_text, drifted
from .text import MISSING, Grid, factor, markdown_text

NOT_COUNTED = (
    "the teacher's training",
    "the search for settings",
    "evaluation and checkpoints",
)
LONGEST_FILE_NAME = 200
_FILE_NAME = re.compile(rf"(?!\.)[\w.+@-]{{1,{LONGEST_FILE_NAME}}}")
RELATIVE_TOLERANCE = 1e-6
"""Numbers that differ less are the same: libraries round differently."""


def make_claim(store: Store, statement: str, *, confidence: float = CONFIDENCE) -> ClaimRecord:
    """Judge a claim from the records of a folder.

    Raises:
        UserError: the claim is malformed, or names a method, budget or axis that the folder lacks.
    """
    claim = parse_claim(statement)
    if not 0.5 < confidence < 1:
        raise UserError(f"confidence {confidence:g} must lie between 0.5 and 1, such as 0.95")
    results = collect(store)
    _check_names(claim, results)
    found = evidence(results)
    effect, seeds, no_interval = _effect(claim, found, confidence)
    outcome, reason = _outcome(claim, effect, found, confidence, no_interval)
    ratio = ratio_of_costs(results, claim.first, claim.second)
    why = "the runs were not planned with stored Costs that have a ratio"
    if len(results.devices()) > 1:
        why = "runs are from different devices"
    methods = {claim.first, claim.second}
    own = [decision for decision in results.decisions if methods & _methods_of(decision)]
    notes = _notes(claim, found) + list(map(decision_note, own))
    return ClaimRecord(
        statement=claim.text(),
        confidence=confidence,
        outcome=outcome,
        reason=reason,
        effect=effect,
        seeds=seeds,
        cost_ratio=ratio,
        devices=results.devices(),
        versions=_versions(results),
        study=results.study,
        not_counted=list(NOT_COUNTED),
        notes=notes,
        unavailable={} if ratio else {"cost_ratio": why},
        files=store.hashes(),
    )


def _check_names(claim: Claim, results: Results) -> None:
    methods = results.methods()
    problems = [
        unknown("trained method", name, methods)
        for name in (claim.first, claim.second)
        if name not in methods
    ]
    if claim.budget is not None and claim.budget not in results.budgets():
        problems.append(unknown("trained budget", claim.budget, results.budgets()))
    elif claim.budget is not None and not problems:
        problems += [
            f"{name} has no finished run at {claim.budget}"
            for name in (claim.first, claim.second)
            if not results.group(name, claim.budget)
        ]
    if claim.axis not in AXES:
        problems.append(unknown("axis", claim.axis, AXES))
    if problems:
        raise UserError(*problems)


def _effect(claim: Claim, found: Evidence, confidence: float) -> tuple[Effect, dict[str, int], str]:
    """Return the effect, the seeds that it is based on, and why it has no interval, or nothing."""
    names = (claim.first, claim.second)
    if claim.budget is None:
        made = gain(found, *names, axis(found.results, claim.axis), confidence=confidence)
        if made.value is None:
            raise UserError(f"no gain of {claim.first} over {claim.second}: {made.reason}")
        effect = Effect(
            unit="factor",
            value=made.value,
            bound=made.bound,
            low=made.low,
            high=made.high,
            probability=made.probability,
        )
        return effect, made.seeds_of, "" if made.has_interval else made.reason
    gap = pair(found, claim.budget, *names, confidence=confidence)
    effect = Effect(
        unit="points",
        value=gap.difference,
        low=gap.low,
        high=gap.high,
        probability=gap.probability,
    )
    return effect, {name: found.seeds(name, budget=claim.budget) for name in names}, gap.reason


def _outcome(
    claim: Claim, effect: Effect, found: Evidence, confidence: float, no_interval: str
) -> tuple[Outcome, str]:
    if no_interval:
        return "undecided", no_interval
    if claim.relation == "~":
        return _equivalence(claim, effect, found, confidence)
    low = -math.inf if effect.low is None else effect.low
    high = math.inf if effect.high is None else effect.high
    if claim.relation == "<":
        low, high, threshold = -high, -low, -claim.threshold
    else:
        threshold = claim.threshold
    percent = f"{100 * confidence:g} %"
    if low > threshold:
        return "supported", f"the {percent} interval lies on the claimed side"
    if high < threshold:
        return "contradicted", f"the {percent} interval lies on the other side"
    return "undecided", f"the {percent} interval contains {claim.threshold:g}"


def _equivalence(
    claim: Claim, effect: Effect, found: Evidence, confidence: float
) -> tuple[Outcome, str]:
    """Judge equivalence within a margin by two one-sided tests (Schuirmann 1987): the interval of
    confidence 2 c - 1 must lie within the margin."""
    assert claim.budget is not None
    assert effect.low is not None
    assert effect.high is not None
    inner = pair(found, claim.budget, claim.first, claim.second, confidence=2 * confidence - 1)
    assert inner.low is not None
    assert inner.high is not None
    margin = claim.threshold
    if -margin < inner.low and inner.high < margin:
        both = f"two one-sided tests at {100 * confidence:g} % keep it within the margin"
        return "supported", both
    if effect.low > margin or effect.high < -margin:
        return "contradicted", "the interval lies outside the margin"
    return "undecided", "the interval reaches beyond the margin, and into it"


def _versions(results: Results) -> dict[str, str]:
    """Return the versions that the runs were trained with; several are joined."""
    found: dict[str, dict[str, None]] = {}
    for run in results.finished:
        for name, version in run.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: " and ".join(versions) for name, versions in sorted(found.items())}


def _notes(claim: Claim, found: Evidence) -> list[str]:
    results = found.results
    own = [
        run
        for run in results.finished
        if run.method in (claim.first, claim.second) and claim.budget in (None, run.budget)
    ]
    notes = []
    if claim.budget is not None and not parse_budget(claim.budget).is_compute:
        notes.append(f"{claim.budget} is equal work, not equal compute")
    if claim.is_gain:
        left = [c for name in (claim.first, claim.second) for c in found.left_out_of_curve(name)]
        notes += [f"{' '.join(cell)} has one seed and is left out of the curve" for cell in left]
    if off := sum(map(drifted, own)):
        notes.append(f"{off} of {count(len(own), 'run')} spent over 2 % more or less than planned")
    # Only Costs that the runs name: a newer one would change the claim.
    costs = [results.cost_of(run) for run in own if run.cost_key]
    if bad := {cost.method for cost in costs if cost is not None and not cost.reliable}:
        notes.append(f"planned with an unreliable Cost of {', '.join(sorted(bad))}")
    if len(results.devices()) > 1:
        notes.append("runs are from different devices")
    return notes + [note[:1].lower() + note[1:].removesuffix(".") for note in classes_notes(own)]


def _methods_of(decision: Decision) -> set[str]:
    claim = parse_claim(decision.statement)
    return {claim.first, claim.second}


# Files


def write_claim(store: Store, record: ClaimRecord, name: str | None) -> list[Path]:
    """Write a claim as JSON, Markdown and LaTeX and return the files.

    Args:
        name: of the files; by default made from the statement.

    Raises:
        UserError: the name is no plain file name.
    """
    name = name or claim_slug(record.statement)
    if not _FILE_NAME.fullmatch(name):
        raise UserError(
            f"name '{name}' must be a file name of letters, digits and . _ + @ - of at most "
            f"{LONGEST_FILE_NAME} characters; it is also a label in LaTeX"
        )
    path = store.claims / f"{name}.json"
    texts = _texts(record, path)
    write_together({path: record_json(record), **texts})
    return [path, *texts]


def _texts(record: ClaimRecord, path: Path) -> dict[Path, str]:
    """Return what people read of a claim, by file."""
    latex = _grid(record).latex(f"claim:{path.stem}", _small(record))
    return {
        path.with_suffix(".md"): markdown(record, path.name),
        path.with_suffix(".tex"): latex + "\n",
    }


def effect_text(record: ClaimRecord) -> str:
    """Return the effect with its interval: ``+0.84 points [+0.21, +1.47]``."""
    effect = record.effect
    if effect.value is None:
        return MISSING
    written, noun = (_points, " points") if effect.unit == "points" else (factor, "x")
    ends = [MISSING if end is None else written(end) for end in (effect.low, effect.high)]
    value = f"{effect.bound}{' ' if effect.bound else ''}{written(effect.value)}{noun}"
    return value if ends == [MISSING, MISSING] else f"{value} [{ends[0]}, {ends[1]}]"


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _grid(record: ClaimRecord) -> Grid:
    ratio = record.cost_ratio
    cost = MISSING
    if ratio:
        cost = f"{factor(ratio.median)} [{factor(ratio.low)}-{factor(ratio.high)}]"
    seeds = ", ".join(f"{name} {number}" for name, number in record.seeds.items())
    interval = f"effect, {100 * record.confidence:g} % interval"
    header = ("claim", "outcome", interval, "seeds", "cost ratio")
    cells = [record.statement, record.outcome, effect_text(record), seeds, cost]
    return Grid("A claim and its evidence", header, [cells], words=("outcome",))


def _small(record: ClaimRecord) -> list[str]:
    study = record.study
    return [
        f"Outcome: {record.outcome}, because {record.reason}.",
        f"Data {str(study.get('data', '?')).partition(':')[0]}, student {study.get('student')}, "
        f"teacher {study.get('teacher')}; {device_text(record.devices)}.",
        f"Not counted: {', '.join(record.not_counted)}.",
        *(f"Note: {note}." for note in record.notes),
        *(f"No {name.replace('_', ' ')}: {why}." for name, why in record.unavailable.items()),
    ]


def markdown(record: ClaimRecord, file: str) -> str:
    """Return a claim as Markdown; ``file`` is the name of its JSON."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    files = "\n".join(f"{digest}  {printable(path)}" for path, digest in record.files.items())
    parts = [
        f"# {markdown_text(record.statement)}: {record.outcome}",
        _grid(record).markdown(),
        "\n".join(
            f"- {markdown_text(line)}" for line in (*_small(record), f"Versions: {versions}.")
        ),
        f"Check it in the folder of results: `kdprof verify claims/{file}`.",
        f"<details><summary>SHA-256 of the {len(record.files)} records that it was computed from"
        f"</summary>\n\n```\n{files}\n```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


# Verification


@dataclass(frozen=True)
class Verification:
    """What differs between a claim's file and the records beside it."""

    record: ClaimRecord
    problems: list[str]
    """Empty if the claim is confirmed."""


def verify(path: Path) -> Verification:
    """Compute a claim again from the records in the folder above its own.

    Raises:
        UserError: the file or a record cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; give the .json of a claim")
    record = read_record(path, ClaimRecord)
    store = Store(path.absolute().parent.parent)
    store.require()
    problems = _changed(record.files, store.hashes())
    problems += [
        f"{file.name} is not what {path.name} says"
        for file, text in _texts(record, path).items()
        if file.is_file() and file.read_text(errors="replace") != text
    ]
    try:
        again = make_claim(store, record.statement, confidence=record.confidence)
    except UserError as error:
        if not problems:
            raise
        # The changed file is what the reader must hear of first.
        return Verification(record, [*problems, f"cannot be computed again: {error}"])
    return Verification(record, problems + _differences(record, again))


def _changed(then: dict[str, str], now: dict[str, str]) -> list[str]:
    found = [f"{path} is missing" for path in then if path not in now]
    found += [f"{path} has changed" for path in then if path in now and then[path] != now[path]]
    return found + [f"{path} is new" for path in now if path not in then]


def _differences(then: ClaimRecord, now: ClaimRecord) -> list[str]:
    """Return every field of the claim that is another when it is computed again."""
    before, after = (_flat(r.model_dump(mode="json", exclude={"files"})) for r in (then, now))
    return [
        f"{key}: {_brief(before.get(key))} in the claim, {_brief(after.get(key))} computed"
        for key in dict.fromkeys([*before, *after])
        if not _alike(before.get(key), after.get(key))
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return nested values with dotted keys, such as ``effect.low`` and ``notes.0``."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, list):
            found |= _flat({str(place): one for place, one in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _alike(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)
    return one == other


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def summary(records: Sequence[ClaimRecord]) -> list[str]:
    """Return one line per claim: the statement, its outcome and the effect."""
    return [
        f"{record.outcome}: {record.statement} ({effect_text(record)}; {record.reason})"
        for record in records
    ]
