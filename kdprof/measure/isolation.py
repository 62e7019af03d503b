"""One process per method: a crash, a leak or a full memory costs one method, not the others.

The parent writes a request, starts ``python -m kdprof.measure``, follows its progress and reads its
result; what the request holds is all that crosses.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kdprof.errors import KdprofError, UserError
from kdprof.measure.latency import Report
from kdprof.records import Cost

DEBUG = "KDPROF_DEBUG"
"""Environment variable that asks for tracebacks, here and in the children."""
PROGRESS = "@kdprof "
"""Begins a line of the child's output that is meant for the parent."""
TOLD_OF_STDERR = 300
"""Characters of a dead child's last words that are passed on."""


class Failure(KdprofError):
    """A step that could not be measured, with the reason, and the Costs of those that could."""

    def __init__(self, message: str, costs: dict[str, Cost] | None = None):
        super().__init__(message)
        self.costs = costs or {}


@dataclass(frozen=True)
class Request:
    """What a child is asked to measure."""

    kind: str
    """``method`` of a study, or ``step`` that a file makes."""
    arguments: dict[str, Any]
    """Of measure_method or measure_file, JSON-able."""
    ranks: int = 1
    """Processes that make the step together."""


def run_isolated(request: Request, report: Report) -> Cost:
    """Measure in a process of its own.

    Raises:
        Failure: the step raised, is no step, or its process died.
        UserError: what every method of the study would fail of, such as a damaged image.
    """
    with tempfile.TemporaryDirectory(prefix="kdprof-") as folder:
        asked, result, errors = (Path(folder) / n for n in ("request", "result", "errors"))
        asked.write_text(json.dumps(vars(request)))
        with errors.open("wb") as file:
            stderr = None if debugging() else file  # None: where ours goes
            status = _follow([str(asked), str(result)], request.ranks, stderr, report)
        if not result.exists():
            raise Failure(last_words(status, errors.read_text(errors="replace")))
        found = json.loads(result.read_text())
    if "refused" in found:
        raise UserError(*found["refused"])
    if "failure" in found:
        raise Failure(found["failure"])
    return Cost.model_validate(found["cost"])


def _follow(arguments: list[str], ranks: int, stderr: Any, report: Report) -> int:
    """Run the child to its end, with those that make its step with it, and return its exit status;
    none outlives the parent's call."""
    # -P: a user's queue.py in this folder is not the library's.
    command = [sys.executable, "-P", "-m", "kdprof.measure", *arguments]
    children = [
        subprocess.Popen(
            [*command, str(rank)],
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
        )
        for rank in range(ranks)
    ]
    child = children[0]
    for other in children[1:]:
        threading.Thread(target=_end_with, args=(other, child), daemon=True).start()
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for line in child.stdout or ():
            if line.startswith(PROGRESS):
                report(*json.loads(line.removeprefix(PROGRESS)))
            else:
                sys.stderr.write(line)  # what a user's own step prints
        return child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            child.kill()
            child.wait()


def _end_with(other: subprocess.Popen, child: subprocess.Popen) -> None:
    """End the child when another of its ranks dies: it would wait for that one for long."""
    if other.wait():
        child.terminate()


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave as on Ctrl-C, so that the child is not left behind on the device."""
    raise KeyboardInterrupt


def last_words(status: int, stderr: str) -> str:
    """Return why a process died, from its exit status and what it wrote to stderr."""
    if status == -9:
        return (
            "its process was killed, most often by the system for lack of memory; "
            "lower --batch or --crop"
        )
    last = stderr.strip().splitlines()[-1:] or ["no message"]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"its process died with {how}: {last[0][:TOLD_OF_STDERR]}"


def explain(error: BaseException) -> str:
    """Return why a step could not be measured, in one line with the mend."""
    if isinstance(error, KdprofError):
        return str(error)
    told = " ".join(str(error).split())[:TOLD_OF_STDERR] or "no message"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in told:
        return (
            f"it ran out of memory ({told}); lower --batch or --crop: kdprof never does by itself"
        )
    return f"the step raised {type(error).__name__}: {told} ({_origin(error)})"


def _origin(error: BaseException) -> str:
    """Return where an error came from: the innermost frame that is not torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no origin"


def debugging() -> bool:
    """Say whether tracebacks were asked for."""
    return bool(os.environ.get(DEBUG))


def guarded(measure: Callable[[], Cost]) -> Cost:
    """Measure here and turn whatever goes wrong with the step into a Failure.

    Raises:
        Failure: the step raised or is no step.
        UserError: what every method of the study would fail of, such as a damaged image.
    """
    try:
        return measure()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if debugging():
            traceback.print_exc()
        raise Failure(explain(error)) from error
