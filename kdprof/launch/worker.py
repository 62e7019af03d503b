"""The process of one job, and how its launcher starts, follows and stops it.

The launcher writes a request on the command line. The worker answers in lines of JSON on its
standard output, stops and saves on SIGTERM, and never outlives its launcher: it holds the other
end of the worker's standard input, which closes when the launcher ends, however it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdprof.errors import UserError
from kdprof.launch import Job
from kdprof.launch.group import in_group, leave, run_group
from kdprof.measure.isolation import debugging, explain, last_words
from kdprof.parallel import LostContact, Place, Ranks
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.study import Study, load_study
from kdprof.train import needs_teacher, prepare, train_named, trained_teacher
from kdprof.train.loop import Interrupted

TOLD = "@kdprof "
"""Begins a line of a worker's that is meant for its launcher."""


@dataclass(frozen=True)
class Request:
    """What a worker is asked to do; JSON-able."""

    out: str
    """The folder of results, which holds the study."""
    device: str
    job: Job | None
    """None: measure what is missing and train the teacher, for the jobs that follow."""
    beside: int | None
    """Runs that other workers train on this machine meanwhile; None = not known."""
    names: tuple[str, ...] = ()
    """Methods to measure, where there is no job."""

    def label(self) -> str:
        """Return what messages call it."""
        return self.job.label() if self.job else "preparation"

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        """Read what :meth:`to_json` returned."""
        values = json.loads(text)
        job, names = values.pop("job"), tuple(values.pop("names"))
        if job is not None:
            job = Job(job["method"], job["seed"], tuple(job["budgets"]))
        return Request(job=job, names=names, **values)


@dataclass
class Outcome:
    """How a worker ended."""

    failures: list[str] = field(default_factory=list)
    stopped: bool = False
    """It was asked to stop, and what it had done is saved."""


class Worker:
    """A worker that runs.

    Args:
        environment: variables that are different for it.
    """

    def __init__(self, request: Request, environment: Mapping[str, str]):
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._stopping = False
        self._name = request.label()
        # In a session of its own: Ctrl-C reaches it through the launcher only. SIGUSR2, by which a
        # cluster announces the end, is its launcher's too.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "kdprof.launch.worker", request.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debugging() else self._stderr,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""
        self._stopping = True
        self._child.terminate()

    def wait(self) -> None:
        """Wait until it has ended; it says too little to be held up by a full pipe."""
        self._child.wait()

    def follow(self, say: Callable[[str], None]) -> Outcome:
        """Pass on what it says until it ends."""
        outcome = Outcome()
        with self._child, self._stderr:
            for line in self._child.stdout:
                if not line.startswith(TOLD):
                    sys.stderr.write(line)  # what a user's own method prints
                    continue
                kind, text = json.loads(line.removeprefix(TOLD))
                outcome.stopped |= kind == "stopped"
                if kind == "failed":
                    outcome.failures.append(text)
                else:
                    say(text)
            status = self._child.wait()
            self._stderr.seek(0)
            stderr = self._stderr.read()
        if self._stopping and status == -signal.SIGTERM:  # before it had anything to save
            outcome.stopped = True
        elif status and not outcome.failures and not outcome.stopped:
            outcome.failures.append(f"{self._name}: {last_words(status, stderr)}")
            say(f"failed: {outcome.failures[-1]}")
        return outcome


class _Told(Progress):
    """Progress that goes to the launcher."""

    def __init__(self) -> None:
        super().__init__(None)

    def say(self, text: str) -> None:
        _tell("say", text)


def _tell(kind: str, text: str) -> None:
    print(f"{TOLD}{json.dumps([kind, text])}", flush=True)


def _end_with_launcher() -> None:
    """Stop and save once the launcher is gone."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not sys.stdin: its lock would be held when Python exits
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _study(request: Request) -> Study:
    return load_study(str(Store(Path(request.out)).study), {"device": request.device})


def _train(request: Request, ranks: Ranks | None) -> list[str]:
    """Train the job of a request and return what failed."""
    store, job, progress = Store(Path(request.out)), request.job, _Told()
    resolved = ResolvedStudy(_study(request), progress=progress, ranks=ranks)
    if job is None:
        _prepare(resolved, store, progress, request.names)
        return []
    summary = train_named(
        resolved, store, progress, job.method, job.budgets, job.seed, beside=request.beside
    )
    return summary.failures


def _prepare(study: ResolvedStudy, store: Store, progress: Progress, names: Sequence[str]) -> None:
    """Do what the jobs have in common. A method that cannot be measured fails in its own jobs."""
    prepared = prepare(study, store, list(names), progress)
    for failure in prepared.failures:
        progress.say(failure)
    if needs_teacher(study, prepared.costs.keys() & set(names)):
        trained_teacher(study, store, progress)


def main() -> None:
    """Be the worker, or the agent of a group of them, or one of the group."""
    _end_with_launcher()
    request = Request.from_json(sys.argv[1])
    try:
        study = _study(request)
        if study.step.gpus > 1 and Place.from_environment() is None:
            arguments = ["-P", "-m", "kdprof.launch.worker", sys.argv[1]]
            sys.exit(run_group(arguments, study.step.gpus))
        failures = in_group(study, lambda ranks: _train(request, ranks)) or []
    except Interrupted as stop:
        _tell("stopped", str(stop))
        leave(stop.exit_code)
    except LostContact as error:
        leave(error.exit_code)
    except Exception as error:
        if debugging():
            raise
        problems = error.problems if isinstance(error, UserError) else [explain(error)]
        failures = [f"{request.label()}: {problem}" for problem in problems]
        for failure in failures:
            _tell("say", f"failed: {failure}")
    for failure in failures:
        _tell("failed", failure)
    leave(1 if failures else 0)


if __name__ == "__main__":
    main()
