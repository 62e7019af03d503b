"""One process per method: a crash, a leak or full memory affects one method, not the others."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from kdprof.errors import KdprofError, UserError
from kdprof.measure.latency import OnRound
from kdprof.processes import Child, debugging, explain, request_folder
from kdprof.records import Cost


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
    """A request to child processes to measure one step."""

    kind: str
    """``method``: one of a study; ``step``: one that a file makes."""
    arguments: dict[str, Any]
    """What to measure, JSON-serialisable."""
    ranks: int = 1
    """Processes that run the step together."""


def run_isolated(request: MeasureRequest, on_round: OnRound) -> Cost:
    """Measure in a separate process.

    Raises:
        Failure: the step raised an error, its loss is not finite, or its process died.
        UserError: a cause that every method of the study shares, such as a damaged image.
    """
    with request_folder(asdict(request)) as folder, ExitStack() as running:
        child, *others = (
            running.enter_context(Child("kdprof.measure", folder, rank, quiet=rank > 0))
            for rank in range(request.ranks)
        )
        for other in others:
            threading.Thread(target=_end_together, args=(other, child), daemon=True).start()
        with _interrupted_by_sigterm():
            for _, progress in child.messages():
                on_round(*progress)
        found = child.result()
        if found is None:
            raise Failure(child.last_words())
    if "refused" in found:
        raise UserError(*found["refused"])
    if "failure" in found:
        raise Failure(found["failure"])
    return Cost.model_validate(found["cost"])


def _end_together(other: Child, child: Child) -> None:
    """Stop the child when another rank of its step dies: it would wait for it for a long time."""
    if other.wait():
        child.stop()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that no child process stays on the device."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def guarded(measure: Callable[[], Cost]) -> Cost:
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
