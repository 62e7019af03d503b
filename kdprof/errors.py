"""Errors shown to the user: one line with the cause and the fix, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")
Default = TypeVar("Default")


class KdprofError(Exception):
    """An expected failure, shown as one line instead of a traceback. Exit code 1."""

    exit_code = 1


class UserError(KdprofError):
    """Bad input. The message names the cause and the fix. Exit code 2."""

    exit_code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems(list[str]):
    """Collects problems, so that all of them are reported at once."""

    def attempt(self, work: Callable[[], Value], default: Default) -> Value | Default:
        """Return the result of ``work``; if it raises UserError, collect its problems and return
        ``default``."""
        try:
            return work()
        except UserError as error:
            self.extend(error.problems)
            return default

    def refuse(self) -> None:
        """Raise UserError with each problem once, if there are any."""
        if self:
            raise UserError(*dict.fromkeys(self))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for a close valid name, else the list of valid names."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else "there are none"


def some(names: Iterable[str], shown: int = 3) -> str:
    """Return the first few names, each as :func:`shortened`, and how many more there are."""
    found = sorted(names)
    more = f" and {len(found) - shown} more" if len(found) > shown else ""
    return ", ".join(map(shortened, found[:shown])) + more


def shortened(name: str) -> str:
    """Return a name as a part of one line: cut, and without line ends."""
    line = name if name.isprintable() else repr(name)[1:-1]
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


LONGEST = 120
"""Characters of a name in a list of names; the rest of a longer one helps nobody."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return the one-line message for a name that is not among ``valid``."""
    return f"unknown {kind} '{name}'; {nearest(name, valid)}"


def no_flop(setting: str, method: str, reason: str) -> str:
    """Return why a setting that needs all FLOP of a method's step cannot be used."""
    return (
        f"{setting}: the step of '{method}' has no total of FLOP ({reason}); use seconds or "
        "iterations, or give the operator a formula with "
        "torch.utils.flop_counter.register_flop_formula"
    )


def refuse_uncounted(setting: str, reasons: Mapping[str, str | None]) -> None:
    """Refuse a setting that needs all FLOP of every method's step.

    Args:
        reasons: why a method's step has no total of FLOP; None if it has one.

    Raises:
        UserError: some step has none; names every such method.
    """
    problems = [no_flop(setting, name, reason) for name, reason in reasons.items() if reason]
    if problems:
        raise UserError(*problems)
