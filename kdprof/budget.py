"""Budgets: amounts of compute, how they are written, and the iterations they convert to.

``40k@cwd`` (what 40 000 iterations of cwd cost), ``2h``, ``30min``, ``90s``, ``5e17flop``,
``1.5kWh``, ``800kJ``, ``40k`` (iterations), ``20epoch``, ``320ksample``; and sums in one unit,
``1h+30min``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from typing import Literal

from kdprof.errors import UserError, no_flop
from kdprof.records import METHOD_NAME, REFERENCE, Cost, Interval
from kdprof.stats.intervals import Numbers, median_interval, product_of, ratio_of

Unit = Literal["iterations", "samples", "epochs", "s", "flop", "J"]
Matched = Literal["wall-clock", "FLOP", "energy", "iterations", "samples", "epochs"]
_MATCHED: dict[Unit, Matched] = {
    "iterations": "iterations",
    "samples": "samples",
    "epochs": "epochs",
    "s": "wall-clock",
    "flop": "FLOP",
    "J": "energy",
}

_PREFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_UNITS: dict[str, tuple[Unit, int]] = {
    "": ("iterations", 1),
    "k": ("iterations", 10**3),
    "M": ("iterations", 10**6),
    "sample": ("samples", 1),
    "ksample": ("samples", 10**3),
    "Msample": ("samples", 10**6),
    "epoch": ("epochs", 1),
    "s": ("s", 1),
    "min": ("s", 60),
    "h": ("s", 3600),
    "d": ("s", 86400),
    "flop": ("flop", 1),
    **{f"{prefix}flop": ("flop", factor) for prefix, factor in _PREFIXES.items()},
    "J": ("J", 1),
    "kJ": ("J", 10**3),
    "MJ": ("J", 10**6),
    "Wh": ("J", 3600),
    "kWh": ("J", 3_600_000),
}
_MOST: dict[Unit, float] = {
    "iterations": 1e9,
    "samples": 1e12,
    "epochs": 1e6,
    "s": 3.2e9,
    "flop": 1e27,
    "J": 1e15,
}
"""The largest budgets: a hundred years, a billion iterations, more than any training has used."""
LONGEST_TEXT = 100
"""Characters of a budget, which is also the name of a folder."""
_PLAIN: dict[Unit, str] = {
    "samples": "sample",
    "epochs": "epoch",
    "s": "s",
    "flop": "flop",
    "J": "J",
}
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_FORM = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)(?:@(.+))?")
_NEXT = rf"\+\s*{_NUMBER}\s*[A-Za-z]*@"
_TERM = re.compile(rf"\s*({_NUMBER}\s*[A-Za-z]*(?:@.+?(?=\s*(?:{_NEXT}|\Z)))?)\s*(\+|\Z)")
"""A term of a sum, and the plus sign behind it. Exponents have plus signs, too (5e+17), and so may
names of methods (kd+cwd): one is followed by another term only if that is of a method itself."""
EXAMPLES = "40k@cwd, 40k, 20epoch, 320ksample, 2h, 30min, 90s, 5e17flop, 800kJ or 1.5kWh"


@dataclass(frozen=True)
class Budget:
    """An amount of compute in one unit.

    Attributes:
        method: the method whose iterations are meant, as in 40k@cwd; else None.
    """

    text: str
    amount: float
    unit: Unit
    method: str | None = None

    @property
    def matches(self) -> Matched:
        """The quantity that is equal for all methods trained with this budget."""
        return "wall-clock" if self.method else _MATCHED[self.unit]

    @property
    def is_compute(self) -> bool:
        """True if this is an amount of compute; False if it is a number of iterations, samples or
        epochs, for which the methods use different compute."""
        return self.matches in ("wall-clock", "FLOP", "energy")

    def half(self) -> str:
        """Return about half of this budget, as it is written on the command line."""
        amount = self.amount / 2
        if self.unit == "iterations":
            of = f"@{self.method}" if self.method else ""
            return f"{max(1, round(amount))}{of}"
        return f"{amount:g}{_PLAIN[self.unit]}"

    def __add__(self, other: Budget) -> Budget:
        """Return the sum of two budgets.

        Raises:
            UserError: the budgets have different units or methods.
        """
        if (self.unit, self.method) != (other.unit, other.method):
            raise UserError(
                f"'{self.text}' and '{other.text}' cannot be added: one is in {_of(self)}, the "
                f"other in {_of(other)}; give them as two budgets"
            )
        amount, text = self.amount + other.amount, f"{self.text}+{other.text}"
        return Budget(text, amount, self.unit, self.method)


def _of(budget: Budget) -> str:
    names = {"s": "seconds", "J": "joules", "flop": "FLOP"}
    unit = names.get(budget.unit, budget.unit)
    return f"{unit} of {budget.method}" if budget.method else unit


@dataclass(frozen=True)
class Conversion:
    """The iterations of one method that a budget converts to."""

    method: str
    iterations: int
    low: int
    high: int
    """Ends of the 95 % interval, which follows from that of the measurement."""
    seconds: float
    """Forecast wall-clock seconds of these iterations."""
    iterations_equal_flop: int | None
    """Iterations that match the budget's matrix FLOP instead; None if it has no FLOP equivalent."""
    unreliable: tuple[str, ...] = ()
    """Methods with unreliable Costs that the conversion uses."""


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        UserError: the text is malformed, is less than one iteration, or adds different units.
    """
    if len(text) > LONGEST_TEXT:
        raise UserError(
            f"budget '{text[:20]}...' has {len(text):,} characters; give at most {LONGEST_TEXT}"
        )
    terms = [_parse_term(part) for part in _split(text)]
    total = sum(terms[1:], start=terms[0])
    if not total.amount <= _MOST[total.unit]:
        raise UserError(
            f"budget '{text}' is more than {_MOST[total.unit]:g} {_of(total)}; give less"
        )
    return total


def _split(text: str) -> list[str]:
    """Return the terms of a sum, as they are written."""
    parts, place, more = [], 0, "+"
    while more:
        match = _TERM.match(text.rstrip(), place)
        if not match:
            raise UserError(f"budget '{text}' is malformed; write {EXAMPLES}")
        part, more = match.groups()
        parts.append(part)
        place = match.end()
    return parts


def _parse_term(text: str) -> Budget:
    match = _FORM.fullmatch(text)
    if not match:
        raise UserError(f"budget '{text}' is malformed; write {EXAMPLES}")
    number, unit, method = match.groups()
    if unit not in _UNITS:
        raise UserError(f"budget '{text}': unknown unit '{unit}'; write {EXAMPLES}")
    kind, factor = _UNITS[unit]
    amount = _product(number, factor)
    if method and kind != "iterations":
        raise UserError(
            f"budget '{text}': only iterations can be those of a method; write {number}k@{method} "
            f"or {number}{unit}"
        )
    if kind == "iterations" and amount.is_finite() and amount != amount.to_integral_value():
        raise UserError(f"budget '{text}' is not a whole number of iterations; round it")
    if method and (tail := _amount_behind(method)):
        raise UserError(
            f"budget '{text}': '+{tail}' is no iterations of a method, so it cannot be added; "
            f"write iterations, such as +5k@METHOD, or give two budgets"
        )
    if method and not METHOD_NAME.fullmatch(method):
        raise UserError(f"budget '{text}': {method!r} is no name of a method; write {EXAMPLES}")
    if amount <= 0 or (kind == "iterations" and amount < 1):
        raise UserError(f"budget '{text}' is smaller than one iteration; give more")
    return Budget(text, float(amount), kind, method)


def _amount_behind(method: str) -> str:
    """Return the amount behind the last plus sign of what should be a method's name, or nothing."""
    _, _, tail = method.rpartition("+")
    match = _FORM.fullmatch(tail.strip())
    return tail.strip() if match and tail != method and match[2] in _UNITS else ""


def _product(number: str, factor: int) -> Decimal:
    """Return a written number times a factor, exactly: 16.1 x 1000 is 16100, but not in floats.

    What no float can hold becomes infinite or 0, before its digits could fill the memory.
    """
    as_float = float(number)
    if as_float == 0 or math.isinf(as_float):
        return Decimal(as_float)
    with localcontext(prec=LONGEST_TEXT + 20):
        return Decimal(number) * factor


def convert(
    budget: Budget, costs: Mapping[str, Cost], *, epoch_images: int | None = None
) -> list[Conversion]:
    """Convert a budget to iterations of every method in ``costs``.

    Args:
        epoch_images: number of training images of the study; needed only for epochs.

    Raises:
        UserError: the budget's method has no Cost, a Cost lacks what the unit needs, or some
            method gets less than one iteration; reports all problems at once.
    """
    if budget.method and budget.method not in costs:
        raise UserError(
            f"budget '{budget.text}': the cost of '{budget.method}' is not measured yet; run "
            f"'kdprof measure --method {budget.method}' first"
        )
    if budget.unit == "epochs":
        if epoch_images is None:
            raise UserError(
                f"budget '{budget.text}': the length of an epoch depends on the data, which this "
                "command does not open; give samples, such as 320ksample"
            )
        budget = replace(budget, unit="samples", amount=budget.amount * epoch_images)
    problems: list[str] = []
    found = []
    for method, cost in costs.items():
        try:
            found.append(_convert_one(budget, method, cost, costs))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def _convert_one(budget: Budget, method: str, cost: Cost, costs: Mapping[str, Cost]) -> Conversion:
    exact, low, high = _iterations(budget, cost, costs)
    iterations = round(exact)
    seconds, *_ = seconds_per_iteration(cost, costs)
    if iterations < 1:
        raise UserError(
            f"budget '{budget.text}' is smaller than one iteration of '{method}' "
            f"({seconds:.3g} s); give more"
        )
    return Conversion(
        method,
        iterations,
        round(low),
        round(high),
        iterations * seconds,
        _equal_flop(budget, cost, costs),
        _unreliable(budget, cost, costs),
    )


def _unreliable(budget: Budget, cost: Cost, costs: Mapping[str, Cost]) -> tuple[str, ...]:
    if budget.unit in ("iterations", "samples") and not budget.method:
        return ()  # plain iterations use no Cost
    used = [cost, *(c for m in (budget.method, REFERENCE) if m and (c := costs.get(m)))]
    return tuple(dict.fromkeys(c.method for c in used if not c.reliable))


def _iterations(budget: Budget, cost: Cost, costs: Mapping[str, Cost]) -> Numbers:
    amount = budget.amount
    if budget.method:
        ratio, low, high = cost_ratio(costs[budget.method], cost)
        return amount * ratio, amount * low, amount * high
    if budget.unit == "iterations":
        return amount, amount, amount
    if budget.unit == "samples":
        exact = budget.amount / cost.settings["step"]["batch"]
        return exact, exact, exact
    if budget.unit == "s":
        per, low, high = seconds_per_iteration(cost, costs)
        return amount / per, amount / high, amount / low
    if budget.unit == "flop":
        each = cost.flop_per_iteration()
        if each is None:
            raise UserError(no_flop(f"budget '{budget.text}'", cost.method, cost.why_no_flop()))
        exact = amount / each
        return exact, exact, exact
    if cost.energy_j is None:
        reason = cost.unavailable.get("energy_j", "not measured")
        raise UserError(
            f"budget '{budget.text}': the cost of '{cost.method}' has no energy_j ({reason}); "
            "use a budget in seconds or iterations"
        )
    exact = amount / cost.energy_j
    return exact, exact, exact


def seconds_per_iteration(cost: Cost, costs: Mapping[str, Cost]) -> Numbers:
    """Return (seconds, low, high) of one iteration of a run.

    This is the method's ratio to the reference, times the seconds of the reference, which are
    pooled over the rounds of all sessions. Each method was interleaved with the reference in a
    separate session, so only ratios are comparable; and thanks to the pooling one disturbed session
    does not set the scale for all methods.
    """
    ratio = cost.ratio_per_iteration()
    alike = [other for other in costs.values() if other.ratio and other.ratio.to == ratio.to]
    end_to_end = cost.end_to_end_ratio is not None
    rounds = [r for other in alike for r in other.reference_rounds(end_to_end=end_to_end)]
    if len(rounds) < 2:
        return _numbers(cost.seconds_per_iteration())
    return product_of(median_interval(rounds), _numbers(ratio))


def _numbers(interval: Interval) -> Numbers:
    return interval.median, interval.low, interval.high


def cost_ratio(above: Cost, below: Cost) -> Numbers:
    """Return the seconds per iteration of ``above`` divided by those of ``below``, with the
    interval. It is the quotient of their ratios to the reference, each paired round by round."""
    if above is below:
        return 1.0, 1.0, 1.0
    return ratio_of(_numbers(above.ratio_per_iteration()), _numbers(below.ratio_per_iteration()))


def _equal_flop(budget: Budget, cost: Cost, costs: Mapping[str, Cost]) -> int | None:
    each = cost.flop_per_iteration()
    if each is None or budget.unit == "samples":
        return None
    if budget.unit == "flop":
        return round(budget.amount / each)
    reference = costs[budget.method].flop_per_iteration() if budget.method else None
    return round(budget.amount * reference / each) if reference else None
