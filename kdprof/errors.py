"""Errors a user sees: one line with the cause and the mend, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdprofError(Exception):
    """Work that failed for a reason worth one line instead of a traceback. Exit code 1."""

    exit_code = 1


class UserError(KdprofError):
    """Bad input. The message names the cause and the mend. Exit code 2."""

    exit_code = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for a close valid name, else the list of valid names."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(names)}" if names else "there are none"


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return the one-line message for a name that is not among ``valid``."""
    return f"unknown {kind} '{name}'; {nearest(name, valid)}"
