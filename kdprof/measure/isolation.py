"""Measuring in a separate process: a crash or full memory costs the step that caused it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kdprof.errors import KdprofError, UserError
from kdprof.interrupts import interrupted_by_sigterm
from kdprof.processes import Processes, debugging, explain, write_request
from kdprof.records import Cost

Result = TypeVar("Result")


class Failure(KdprofError):
    """A step could not be measured; the message is the reason.

    Attributes:
        costs: of the steps that could be measured.
    """

    def __init__(self, message: str, costs: dict[str, Cost] | None = None):
        super().__init__(message)
        self.costs = costs or {}


@dataclass(frozen=True)
class MeasureRequest:
    """A request to child processes to measure steps."""

    kind: str
    """``methods``: those of a study; ``step``: one that a file makes."""
    arguments: dict[str, Any]
    """What to measure, JSON-serialisable."""
    ranks: int = 1
    """Processes that run each step together."""


@dataclass(frozen=True)
class Outcome:
    """What a measuring process did before it ended.

    Attributes:
        costs: by method or step.
        failure: why the step after the last one in ``costs`` could not be measured.
        spoiled: why it ended although all was well: what a method left behind.
    """

    costs: dict[str, Cost]
    failure: str | None = None
    spoiled: str | None = None


OnMessage = Callable[[str, Any], None]
"""Called with ``round``: [name, rounds done, width]; ``cost``: a record, as soon as it exists."""


def run_isolated(
    request: MeasureRequest, on_message: OnMessage, processes: Processes | None = None
) -> Outcome:
    """Measure in a separate process.

    Args:
        processes: those to use, which end with it; new ones if not given.

    Raises:
        UserError: a cause that every method of the study shares, such as a damaged image.
    """
    with processes or Processes("kdprof.measure", request.ranks) as running:
        child = running.child
        write_request(running.folder, asdict(request))
        with interrupted_by_sigterm():  # so that no child process stays on the device
            for kind, content in child.messages():
                if kind == "cost":  # the record is in the result file, which is never half-written
                    content = Cost.model_validate(child.result()["costs"][content])
                on_message(kind, content)
        found = child.result() or {"costs": {}}
        died = None if found.get("ended") else child.last_words()
    if "refused" in found:
        raise UserError(*found["refused"])
    costs = {name: Cost.model_validate(cost) for name, cost in found["costs"].items()}
    return Outcome(costs, found.get("failure") or died, found.get("spoiled"))


def guarded(measure: Callable[[], Result]) -> Result:
    """Measure in this process and turn any error of the step into a Failure.

    Raises:
        Failure: the step raised an error, or its loss is not finite.
        UserError: a cause that every method of the study shares, such as a damaged image.
    """
    try:
        return measure()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if debugging():
            traceback.print_exc()
        raise Failure(explain(error)) from error
