"""Method checks: whether a method, built-in or a user's, keeps what the Method class promises.

Nothing here needs a study, a data set or a GPU, and nothing here checks what only a GPU shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from kdprof.discovery import MethodEntry
from kdprof.errors import UserError, unknown
from kdprof.method_checks.bench import Bench
from kdprof.method_checks.checks import CHECKS, NotApplicable, left_alone, reason
from kdprof.method_checks.two_ranks import in_two_processes

__all__ = ["CHECKS", "Verdict", "check_method", "check_methods"]


@dataclass(frozen=True)
class Verdict:
    """The result of one check of a method."""

    name: str
    """The check's name."""
    outcome: Literal["ok", "failed", "skipped"]
    message: str = ""
    """The problems, one per line with cause and fix; or why the check was skipped."""


def check_method(found: MethodEntry, names: Iterable[str] | None = None) -> list[Verdict]:
    """Check one method, see :func:`check_methods`."""
    ((_, verdicts),) = check_methods([found], names)
    return verdicts


def check_methods(
    methods: Iterable[MethodEntry], names: Iterable[str] | None = None
) -> Iterator[tuple[MethodEntry, list[Verdict]]]:
    """Check methods and yield the verdicts of each, in the order of :data:`CHECKS`.

    A check runs the objective on random maps of small networks, on the CPU. What only a GPU shows
    (copies between host and device, operators without a deterministic kernel) is not checked.

    Global state (random generators, threads, deterministic mode) is restored, but the cache of
    torch.compile is emptied. The two processes of the check ``ddp`` are started once for all
    methods, before the first is yielded.

    Args:
        names: of checks; None = all.

    Raises:
        UserError: ``names`` contains an unknown check.
    """
    methods, wanted = list(methods), set(CHECKS if names is None else names)
    problems = [unknown("check", name, CHECKS) for name in sorted(wanted - CHECKS.keys())]
    if problems:
        raise UserError(*problems)
    chosen = [name for name in CHECKS if name in wanted]
    ranks = in_two_processes(methods) if "ddp" in chosen else {}
    for found in methods:
        yield found, _verdicts(Bench(found, ranks.get(found.cls.name)), chosen)


def _verdicts(bench: Bench, names: Iterable[str]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for name in names:
        broken = any(v.outcome == "failed" for v in verdicts)
        verdicts.append(_verdict(bench, name, broken))
    return verdicts


def _verdict(bench: Bench, name: str, broken: bool) -> Verdict:
    """Run one check. A check that cannot run has failed, unless an earlier check failed
    (``broken``), which then has the cause."""
    try:
        with left_alone():
            problems = CHECKS[name](bench)
    except NotApplicable as why:
        return Verdict(name, "skipped", f"not applicable: {why}")
    except Exception as error:  # whatever a method raises is a finding
        if broken:
            return Verdict(name, "skipped", f"fix what failed above first: {reason(error)}")
        return Verdict(name, "failed", reason(error))
    return Verdict(name, "failed" if problems else "ok", "\n".join(problems))
