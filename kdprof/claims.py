"""Claims about methods, as they are written on the command line.

``A > B @ BUDGET``, ``A < B @ BUDGET``, ``A ~ B within POINTS @ BUDGET``, ``gain(A, B) > FACTOR``
and ``gain(A, B) < FACTOR``, the last two also with ``on AXIS``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from kdprof.budget import parse_budget
from kdprof.errors import UserError

EXAMPLES = "'fitnet > kd @ 40k@cwd', 'fitnet ~ kd within 0.3 @ 40k@cwd' or 'gain(cwd, kd) > 1.2'"
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_DIFFERENCE = re.compile(rf"(\S+)\s*([<>~])\s*(\S+?)(?:\s+within\s+{_NUMBER})?\s+@\s+(.+)")
_GAIN = re.compile(
    rf"gain\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)\s*([<>])\s*{_NUMBER}(?:\s+on\s+(\S+))?"
)


@dataclass(frozen=True)
class Claim:
    """A statement about two methods, true or false."""

    first: str
    second: str
    relation: Literal[">", "<", "~"]
    """Of ``first`` to ``second``, or of the gain to ``threshold``."""
    budget: str | None
    """None for a claim about a gain, which is about all budgets."""
    threshold: float
    """Percentage points for a difference (0 for > and <), a factor for a gain."""
    axis: str = "seconds"
    """Of a gain."""

    @property
    def is_gain(self) -> bool:
        """True if the claim is about the compute-equivalent gain."""
        return self.budget is None

    def text(self) -> str:
        """Return the claim as :func:`parse_claim` reads it."""
        if self.budget is None:
            on = f" on {self.axis}" if self.axis != "seconds" else ""
            return (
                f"gain({self.first}, {self.second}) {self.relation} {_digits(self.threshold)}{on}"
            )
        within = f" within {_digits(self.threshold)}" if self.relation == "~" else ""
        return f"{self.first} {self.relation} {self.second}{within} @ {self.budget}"


def _digits(value: float) -> str:
    """Return a number with all its digits: another number would be another claim."""
    return repr(value).removesuffix(".0")


def parse_claim(text: str) -> Claim:
    """Read a claim.

    Raises:
        UserError: the text is malformed, compares a method with itself, or its budget is malformed.
    """
    text = " ".join(text.split())
    if match := _GAIN.fullmatch(text):
        first, second, relation, factor, axis = match.groups()
        claim = Claim(first, second, relation, None, float(factor), axis or "seconds")  # type: ignore[arg-type]
        if not 0 < claim.threshold < math.inf:
            raise UserError(f"claim '{text}': a gain is a finite factor above 0")
    elif match := _DIFFERENCE.fullmatch(text):
        first, relation, second, points, budget = match.groups()
        if (relation == "~") != (points is not None):
            raise UserError(
                f"claim '{text}': '~' needs 'within POINTS' and '>' and '<' have none; "
                f"write {EXAMPLES}"
            )
        parse_budget(budget)
        claim = Claim(first, second, relation, budget, float(points or 0))  # type: ignore[arg-type]
    else:
        raise UserError(f"claim '{text}' is malformed; write {EXAMPLES}")
    if claim.first == claim.second:
        raise UserError(f"claim '{text}' compares {claim.first} with itself")
    if claim.relation == "~" and not 0 < claim.threshold <= 100:
        raise UserError(f"claim '{text}': the margin must be above 0, and at most 100, points")
    return claim
