"""One fuzzed case: what it may use, and what must never happen while it runs.

A case either is accepted or refused. All else is a finding: an exception that a user would see as
one (``tracebacks``), no end (``hangs``), something that ran (``code run``), a result or a setting
that is gone or changed without a word (``lost``), and any other broken promise (``wrong``).
"""

from __future__ import annotations

import contextlib
import io
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

from kdprof.cli import main
from kdprof.errors import KdprofError
from kdprof.visible import printable

ACCEPTED, REFUSED = "accepted", "refused"
TRACEBACKS, HANGS, CODE_RUN, LOST, WRONG = FINDINGS = (
    "tracebacks", "hangs", "code run", "lost", "wrong",
)  # fmt: skip
CODES = {0, 1, 2, 3}
"""Exit codes of commands that were not interrupted (README)."""
UNEXPECTED = "run 'kdprof --debug ...' for details"
"""What the command line says of an error that nobody foresaw."""
MOST_BYTES = 2 * 2**30
"""Address space that a case may use beyond what the process has at its start."""
STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen"}
"""Audited events of a process that is started: no fuzzed command has a reason to."""
LONGEST_STORY = 2000
LARGEST = 2**26
"""Bytes of a file whose content is compared; larger ones are huge on purpose."""


class Wrong(Exception):
    """A finding: one of :data:`FINDINGS`, and what happened."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind = kind


class _TimeUp(BaseException):
    """Not an Exception, so that no handler of kdprof's takes it for one."""


@dataclass
class Case:
    """What a case has.

    Attributes:
        random: its generator, seeded with its name.
        folder: its own folder, empty at first.
        canary: a path that only code from a hostile file would create.
        told: what was done, one line each, for who replays it.
    """

    random: Random
    folder: Path
    canary: Path
    told: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        """Note what is done."""
        self.told.append(text)

    def story(self) -> str:
        """Return what was done, in visible characters."""
        return "\n".join(printable(line)[:LONGEST_STORY] for line in self.told)


Work = Callable[[Case], str]
"""Runs a case and returns :data:`ACCEPTED` or :data:`REFUSED`; a KdprofError is a refusal."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: accepted, refused or one of :data:`FINDINGS`, and why."""

    kind: str
    why: str = ""


def judged(work: Work, case: Case, limit_s: float) -> Outcome:
    """Run a case and return how it ended."""
    _started.clear()
    try:
        # In its own folder: an output may be a hostile name.
        with _in_time(limit_s), _in_memory(MOST_BYTES), _watched(), chdir(case.folder):
            found = Outcome(work(case))
    except _TimeUp:
        found = Outcome(HANGS, f"no end after {limit_s:g} s")
    except Wrong as finding:
        found = Outcome(finding.kind, str(finding))
    except KdprofError as error:
        found = Outcome(REFUSED, str(error))
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of Rust libraries are no Exceptions
        found = Outcome(TRACEBACKS, traceback.format_exc())
    if case.canary.exists() or _started:
        why = f"started: {_started}" if _started else f"{case.canary.name} was made"
        found = Outcome(CODE_RUN, why)
    return found


@contextlib.contextmanager
def _in_time(limit_s: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TimeUp

    handler = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, limit_s)  # of a test's own limit
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left_s:
            signal.setitimer(signal.ITIMER_REAL, max(left_s - time.monotonic() + began, 0.01))


@contextlib.contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """Limit a resource of this process (``resource.RLIMIT_...``) for a while."""
    soft, hard = resource.getrlimit(what)
    known = [limit for limit in (most, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(what, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def _in_memory(most: int) -> contextlib.AbstractContextManager[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return limited(resource.RLIMIT_AS, pages * resource.getpagesize() + most)


_started: list[str] = []
_watching = False


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event in STARTS:
        _started.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_audit)


def bytes_read() -> int:
    """Return the bytes that this process has read so far."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


# Commands


@dataclass(frozen=True)
class Printed:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def outcome(self) -> str:
        """Whether the input was accepted."""
        return REFUSED if self.code == 2 else ACCEPTED


def run(case: Case, *arguments: object) -> Printed:
    """Run a command as its user does, but in this process.

    Raises:
        Wrong: it did or printed what no command may.
    """
    texts = [str(argument) for argument in arguments]
    case.tell(f"kdprof {' '.join(map(repr, texts))}")
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        mock.patch.object(sys, "argv", ["kdprof", *texts]),
        contextlib.suppress(SystemExit),
    ):
        code: object = None
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return _checked(Printed(code or 0, out, err))  # type: ignore[arg-type]


def _checked(done: Printed) -> Printed:
    if UNEXPECTED in done.err:
        raise Wrong(TRACEBACKS, done.err)
    if done.code not in CODES:
        raise Wrong(WRONG, f"exit code {done.code!r}")
    for text in (done.out, done.err):
        if any(printable(line) != line for line in text.split("\n")):
            raise Wrong(WRONG, f"printed control characters: {text!r}")
    lines = [line for line in done.err.splitlines() if line.startswith("kdprof: ")]
    if done.code == 2 and not any(line.removeprefix("kdprof: ").strip() for line in lines):
        raise Wrong(WRONG, f"exit code 2 without a reason: {done.err!r}")
    return done


# Files


def contents(folder: Path) -> dict[str, object]:
    """Return what lies in a folder: the bytes of its files, and what else there is."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file() and path.stat().st_size < LARGEST:
            found[name] = path.read_bytes()
        elif not path.is_dir():
            found[name] = path.lstat().st_mode
    return found


def check_kept(before: dict[str, object], folder: Path, replaced: tuple[str, ...] = ()) -> None:
    """Check that all files are as they were, and that no half-written one was added.

    Args:
        replaced: folders of files that the command is there to write.

    Raises:
        Wrong: a file is gone or another.
    """
    after = contents(folder)
    for name, content in before.items():
        if not name.startswith(replaced) and after.get(name) != content:
            raise Wrong(LOST, f"{name} is {'gone' if name not in after else 'another'}")
    if left := [name for name in after.keys() - before.keys() if name.endswith(".tmp")]:
        raise Wrong(LOST, f"half-written: {left}")
