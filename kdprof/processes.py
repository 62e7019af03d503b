"""Child processes that measure, train and check: their protocol, and how failures are reported.

The parent writes a request into a folder and starts ``python -m MODULE FOLDER RANK``. The child
sends messages as marked lines on its standard output and writes its result into the folder. It ends
when its parent ends, because the parent holds the other end of its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdprof.errors import KdprofError
from kdprof.store import write_atomic

DEBUG = "KDPROF_DEBUG"
"""Environment variable that turns on tracebacks, in this process and in its children."""
MARK = "@kdprof "
"""Prefix of the lines of a child's output that are messages."""
NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""Words in torch's error at an operator that step.deterministic does not allow."""
WAIT_S = 0.01
"""Time between two looks for a request."""
LAST_WORDS = 300
"""Characters of an error message that are passed on."""

Message = tuple[str, Any]
"""A kind, and its JSON-able content."""


# The parent's side


@contextmanager
def request_folder(request: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder with a request, for the children that work on it.

    Args:
        request: JSON-able; if not given, the children wait for :func:`write_request`.
    """
    with tempfile.TemporaryDirectory(prefix="kdprof-") as folder:
        if request is not None:
            write_request(Path(folder), request)
        yield Path(folder)


def write_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Tell the children that were started for a folder what to do."""
    write_atomic(_request_file(folder), json.dumps(request))


class Child:
    """A running child process. As a context manager it ends the child when the body ends.

    Args:
        module: the module that it runs, such as ``kdprof.measure``.
        folder: the folder of its request.
        rank: its number among the children that work on the request together.
        environment: environment variables that are set for it.
        detached: True to start it in a new session, so that Ctrl-C does not reach it.
        quiet: True to drop its output other than messages, instead of copying it to stderr.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        rank: int = 0,
        *,
        environment: Mapping[str, str] | None = None,
        detached: bool = False,
        quiet: bool = False,
    ):
        self._result, self._quiet = _result_file(folder, rank), quiet
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: a user's queue.py in this folder must not replace the standard library's.
            [sys.executable, "-P", "-m", module, str(folder), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debugging() else self._stderr,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            start_new_session=detached,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def messages(self) -> Iterator[Message]:
        """Yield its messages until it ends; its other output goes to stderr."""
        blank = ""
        for line in self._process.stdout or ():
            if line.startswith(MARK):
                yield tuple(json.loads(line.removeprefix(MARK)))
                blank = ""
            elif not self._quiet:
                # A message begins with a newline, which ends a line that a print left open.
                sys.stderr.write(blank + line.rstrip("\n"))
                blank = "\n"
        if blank:
            sys.stderr.write(blank)

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it has ended and return its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended after ``timeout_s``.
        """
        return self._process.wait(timeout_s)

    def result(self) -> Any:
        """Return the result that it wrote; None if it ended before it wrote one."""
        return json.loads(self._result.read_text()) if self._result.exists() else None

    def last_words(self) -> str:
        """Return why it failed, from its exit status and its output on stderr."""
        status = self.wait()
        self._stderr.seek(0)
        return last_words(status, self._stderr.read())


class Processes:
    """Children that work on one request together, one for each rank, started before the request
    exists: what they import takes seconds, in which the parent can do other work.

    As a context manager it ends them and removes the folder of their request.

    Args:
        module: the module that they run.
    """

    def __init__(self, module: str, ranks: int):
        with ExitStack() as running:
            self.folder = running.enter_context(request_folder())
            self.child, *others = (
                running.enter_context(Child(module, self.folder, rank, quiet=rank > 0))
                for rank in range(ranks)
            )
            self._running = running.pop_all()
        for other in others:
            pair = (other, self.child)
            threading.Thread(target=_end_together, args=pair, daemon=True).start()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()


def _end_together(other: Child, child: Child) -> None:
    """Stop the child when another rank of its step dies: it would wait for it for a long time."""
    if other.wait():
        child.stop()


def last_words(status: int, stderr: str) -> str:
    """Return why a process failed, in one line, with the fix if it is known."""
    if status == -signal.SIGKILL:
        return (
            "its process was killed, most often by the system for lack of memory; "
            "lower --batch or --crop"
        )
    last = stderr.strip().splitlines()[-1:] or ["no message"]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"its process died with {how}: {last[0][:LAST_WORDS]}"


# The child's side


@dataclass(frozen=True)
class Request:
    """The work that this process was started for."""

    content: dict[str, Any]
    folder: Path
    rank: int

    def write_result(self, result: Any) -> None:
        """Write the result, JSON-able, for the parent."""
        write_atomic(_result_file(self.folder, self.rank), json.dumps(result))


def read_request(meanwhile: Callable[[], object] = lambda: None) -> Request:
    """Return the request that the command line names; from now on, end when the parent ends.

    Args:
        meanwhile: called if there is no request yet, before it is waited for.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    file = _request_file(folder)
    if not file.exists():
        meanwhile()
    while not file.exists():
        time.sleep(WAIT_S)
    return Request(json.loads(file.read_text()), folder, rank)


def send(kind: str, content: Any) -> None:
    """Send a message to the parent."""
    sys.stdout.write(f"\n{MARK}{json.dumps([kind, content])}\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Wait for the end of standard input, then send SIGTERM, so that code that saves on it does."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin: its lock would be held when Python exits
    os.kill(os.getpid(), signal.SIGTERM)


def _request_file(folder: Path) -> Path:
    return folder / "request.json"


def _result_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.json"


# Failures


def debugging() -> bool:
    """Return True if tracebacks were turned on."""
    return bool(os.environ.get(DEBUG))


def explain(error: BaseException) -> str:
    """Return why a step failed, in one line with the fix."""
    import torch  # not at the top: a parent starts its children first

    if isinstance(error, KdprofError):
        return str(error)
    message = " ".join(str(error).split())[:LAST_WORDS] or "no message"
    if NOT_DETERMINISTIC in message:
        return (
            f"{message.split()[0]} cannot repeat its results bit for bit ({_origin(error)}); leave "
            "step.deterministic out, or compute this in another way"
        )
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
        return (
            f"it ran out of memory ({message}); lower --batch or --crop: kdprof never changes them "
            "itself"
        )
    return f"the step raised {type(error).__name__}: {message} ({_origin(error)})"


def _origin(error: BaseException) -> str:
    """Return the origin of an error: the innermost frame outside torch."""
    import torch

    frames = traceback.extract_tb(error.__traceback__)
    torch_folder = str(Path(torch.__file__).parent)
    own = [frame for frame in frames if not frame.filename.startswith(torch_folder)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "no origin"
