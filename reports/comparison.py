"""Compare two sets of Costs: whether a step became slower or faster, and by how much.

A change counts only if the whole 95 % interval of new / old lies beyond a noise threshold, as in
criterion.rs: the interval shows what is certain, the threshold what is large enough to report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from kdprof.errors import UserError
from kdprof.records import Cost
from kdprof.stats.intervals import Numbers, ratio_of, unpaired_ratio
from kdprof.store import Store, read_text

NOISE_THRESHOLD = 0.01
"""Changes smaller than this fraction are noise, however narrow their interval."""
LEAST_ROUNDS = 2
"""An interval needs at least this many rounds."""

Verdict = Literal["slower", "faster", "within noise"]


@dataclass(frozen=True)
class Change:
    """The change of one method's cost; ratios are new / old."""

    method: str
    old_s: float | None
    new_s: float | None
    """Step latencies, medians."""
    latency: Numbers | None
    """With a 95 % interval; the two sessions are independent."""
    threshold: float
    """Relative change up to which the latency is within noise."""
    verdict: Verdict | None
    reference: str | None
    relative: Numbers | None
    """Change of the ratio to ``reference``, in which the speed of the machine itself cancels."""
    flop: float | None
    memory: float | None
    """Ratio of the peaks: the allocator's, or the process's if the allocator's is not known."""
    energy: float | None
    reliable: bool
    """True if both Costs are reliable."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a field is None."""


@dataclass(frozen=True)
class Comparison:
    """The methods that are in both sets, with notes for the reader."""

    rows: list[Change]
    notes: list[str]
    unreliable: list[str]
    """Unreliable Costs, each with its side (old or new) and the reasons."""


def read_costs(path: Path) -> list[Cost]:
    """Read a JSON file of one Cost or of a list, or the newest Costs of a results folder.

    Raises:
        UserError: ``path`` holds no Costs, or Costs that this version cannot read.
    """
    if path.is_dir():
        return list(Store(path).latest_costs().values())
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file of costs ({error})") from None
    items = content if isinstance(content, list) else [content]
    if not items:
        raise UserError(f"{path} holds no costs")
    problems = [
        problem for place, item in enumerate(items, 1) for problem in _problems(place, item)
    ]
    if problems:
        raise UserError(f"{path} holds no costs that this version reads: {'; '.join(problems)}")
    return [Cost.model_validate(item) for item in items]


def _problems(place: int, item: Any) -> list[str]:
    """Return what is wrong with one record of a file."""
    if not isinstance(item, dict) or "method" not in item:
        return [f"record {place} is not a cost"]
    name = f"record {place} ({item['method']})"
    try:
        Cost.model_validate(item)
    except ValidationError as error:
        schema = Cost.model_fields["schema_version"].default
        if item.get("schema") != schema:
            # One problem, not one for each field that the other schema has or lacks.
            return [f"{name} has schema {item.get('schema')}, not {schema}; measure again"]
        return [f"{name}: {_place(one['loc'])}: {one['msg']}" for one in error.errors()]
    return []


def _place(location: Iterable[Any]) -> str:
    return ".".join(str(part) for part in location)


def compare(
    old: Sequence[Cost], new: Sequence[Cost], noise_threshold: float = NOISE_THRESHOLD
) -> Comparison:
    """Compare the Costs of every method that is in both sets; the last Cost of a method counts.

    Different devices, settings or versions are noted, not refused.

    Raises:
        UserError: no method is in both sets.
    """
    before, after = ({cost.method: cost for cost in costs} for costs in (old, new))
    pairs = [(before[method], cost) for method, cost in after.items() if method in before]
    if not pairs:
        raise UserError(
            f"no method in common: old has {_listed(before)}, new has {_listed(after)}; "
            "measure the same methods"
        )
    rows = [_change(one, other, noise_threshold) for one, other in pairs]
    return Comparison(rows, _notes(before, after, pairs, noise_threshold), _unreliable(pairs))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _change(old: Cost, new: Cost, noise_threshold: float) -> Change:
    missing: dict[str, str] = {}
    latency = _latency(old, new, missing)
    threshold = noise_threshold + abs(machine_change(old, new) or 0.0)
    return Change(
        method=new.method,
        old_s=old.latency_s.median if old.latency_s else None,
        new_s=new.latency_s.median if new.latency_s else None,
        latency=latency,
        threshold=threshold,
        verdict=_verdict(latency, threshold) if latency else None,
        reference=new.ratio.to if new.ratio else None,
        relative=_relative(old, new, missing),
        flop=_quotient("flop", old, new, _flop, missing),
        memory=_memory(old, new, missing),
        energy=_quotient("energy_j", old, new, lambda cost: cost.energy_j, missing),
        reliable=old.reliable and new.reliable,
        missing=missing,
    )


def machine_change(old: Cost, new: Cost) -> float | None:
    """Return the relative slowdown of the machine itself, by the canary; None if it is unknown."""
    if old.device != new.device or old.canary is None or new.canary is None:
        return None
    return new.canary.median_s / old.canary.median_s - 1


def _latency(old: Cost, new: Cost, missing: dict[str, str]) -> Numbers | None:
    short = [cost for cost in (old, new) if len(cost.samples_s) < LEAST_ROUNDS]
    if short:
        missing["latency"] = short[0].unavailable.get("latency_s", "fewer than two rounds")
        return None
    return unpaired_ratio(new.samples_s, old.samples_s)


def _verdict(latency: Numbers, threshold: float) -> Verdict:
    _, low, high = latency
    if low > 1 + threshold:
        return "slower"
    return "faster" if high < 1 - threshold else "within noise"


def _relative(old: Cost, new: Cost, missing: dict[str, str]) -> Numbers | None:
    """Return the change of the ratio to the reference; both ratios must have the same reference."""
    before, after = old.ratio, new.ratio
    if before is None or after is None:
        absent = old if before is None else new
        missing["relative"] = absent.unavailable.get("ratio", "no ratio to a reference")
    elif before.to != after.to:
        missing["relative"] = f"old is relative to {before.to}, new to {after.to}"
    elif after.to == new.method:
        missing["relative"] = "the reference itself"
    else:
        return ratio_of(*((ratio.median, ratio.low, ratio.high) for ratio in (after, before)))
    return None


def _flop(cost: Cost) -> float | None:
    return None if cost.flop is None else cost.flop.total


def _why_missing(cost: Cost, name: str) -> str:
    return cost.why_no_flop() if name == "flop" else cost.unavailable.get(name, "not measured")


def _quotient(
    name: str,
    old: Cost,
    new: Cost,
    value: Callable[[Cost], float | None],
    missing: dict[str, str],
) -> float | None:
    before, after = value(old), value(new)
    if before is None or after is None:
        absent = old if before is None else new
        missing[name.removesuffix("_j")] = _why_missing(absent, name)
        return None
    return after / before if before else None


def _memory(old: Cost, new: Cost, missing: dict[str, str]) -> float | None:
    for kind in ("peak_allocated", "process"):
        ends = [getattr(cost.memory_bytes, kind) for cost in (old, new)]
        if None not in ends:
            return ends[1] / ends[0]
    missing["memory"] = "no peak of the same kind in both"
    return None


# Notes

Pairs = Sequence[tuple[Cost, Cost]]


def _notes(
    before: Mapping[str, Cost], after: Mapping[str, Cost], pairs: Pairs, noise_threshold: float
) -> list[str]:
    return [
        "new / old is the ratio of the step latencies with its 95 % interval; the sessions are "
        "independent. Slower or faster: the whole interval is beyond the threshold, which is "
        f"{100 * noise_threshold:g} % plus the change of the machine itself (canary).",
        *_device_note(pairs),
        *_difference_notes("settings", pairs),
        *_difference_notes("versions", pairs),
        *_machine_notes(pairs, noise_threshold),
        *_same_notes(pairs),
        *(f"Only in {name}: {_listed(alone)}." for name, alone in _alone(before, after) if alone),
    ]


def _alone(before: Mapping[str, Cost], after: Mapping[str, Cost]) -> list[tuple[str, list[str]]]:
    return [
        ("old", [method for method in before if method not in after]),
        ("new", [method for method in after if method not in before]),
    ]


def _device_note(pairs: Pairs) -> list[str]:
    old, new = ([cost.device for cost in side] for side in zip(*pairs, strict=True))
    if old == new:
        return []
    return [
        f"Different devices: old {_listed(dict.fromkeys(old))}; new {_listed(dict.fromkeys(new))}. "
        "The latencies also compare the machines; the ratio to the reference does so less."
    ]


def _difference_notes(what: Literal["settings", "versions"], pairs: Pairs) -> list[str]:
    methods_of: dict[str, list[str]] = {}
    for old, new in pairs:
        one, other = _flat(getattr(old, what)), _flat(getattr(new, what))
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                text = f"{key} {one.get(key, 'absent')} -> {other.get(key, 'absent')}"
                methods_of.setdefault(text, []).append(new.method)
    if not methods_of:
        return []
    listed = "; ".join(
        f"{text} ({_methods_text(names, pairs)})" for text, names in methods_of.items()
    )
    return [f"Different {what}: {listed}."]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        found |= inner or {f"{prefix}{key}": value}
    return found


def _methods_text(methods: Sequence[str], pairs: Pairs) -> str:
    return "all methods" if len(methods) == len(pairs) > 1 else ", ".join(methods)


def _machine_notes(pairs: Pairs, noise_threshold: float) -> list[str]:
    """Return how much the machine itself changed speed, and for which methods that is unknown."""
    changes = {new.method: machine_change(old, new) for old, new in pairs}
    shifted = [
        f"{method} ({100 * abs(change):.1f} % {'slower' if change > 0 else 'faster'})"
        for method, change in changes.items()
        if change is not None and abs(change) > noise_threshold
    ]
    found = []
    if shifted:
        found.append(
            "The machine itself changed speed between old and new, by the canary: "
            f"{', '.join(shifted)}. The threshold is wider by that much."
        )
    unknown = [
        new.method
        for old, new in pairs
        if old.device == new.device and changes[new.method] is None and old.samples_s
    ]
    if unknown:
        found.append(
            f"No canary on both sides ({_methods_text(unknown, pairs)}): a change of the machine's "
            "own speed would not be noticed."
        )
    return found


def _unreliable(pairs: Pairs) -> list[str]:
    return [
        f"{cost.method} ({side}) is UNRELIABLE: {'; '.join(cost.warnings) or 'no reason'}."
        for pair in pairs
        for side, cost in zip(("old", "new"), pair, strict=True)
        if not cost.reliable
    ]


def _same_notes(pairs: Pairs) -> list[str]:
    same = [new.method for old, new in pairs if new.session and old.session == new.session]
    return [f"Old and new are the same measurement ({_methods_text(same, pairs)})."] if same else []
