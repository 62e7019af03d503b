"""The process of one job, and how its launcher starts, follows and stops it.

A worker stops and saves on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kdprof.distributed.ranks import LostContact, Place, Ranks
from kdprof.errors import UserError
from kdprof.launch import Job
from kdprof.launch.group import in_group, leave, run_group
from kdprof.processes import Child, debugging, explain, read_request, request_folder, send
from kdprof.progress import Progress
from kdprof.store import Store
from kdprof.study import load_study
from kdprof.train.loop import Interrupted
from kdprof.workflow import Workflow


@dataclass(frozen=True)
class WorkRequest:
    """The work of a worker; JSON-able."""

    out: str
    """The folder of results, which holds the study."""
    device: str
    job: Job | None
    """None: measure missing Costs and train the teacher, for the jobs that follow."""
    concurrent_runs: int | None
    """Runs that other workers train on this machine at the same time; None = not known."""
    names: tuple[str, ...] = ()
    """Methods to measure, if ``job`` is None."""
    measuring: Mapping[str, Any] = field(default_factory=dict)
    """How long to measure them, see :class:`~kdprof.workflow.Workflow`."""

    def label(self) -> str:
        """Return its name in messages."""
        return self.job.label() if self.job else "preparation"

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> WorkRequest:
        """Return the request with these fields."""
        values = dict(values)
        job, names = values.pop("job"), tuple(values.pop("names"))
        if job is not None:
            job = Job(job["method"], job["seed"], tuple(job["budgets"]))
        return WorkRequest(job=job, names=names, **values)


@dataclass
class Outcome:
    """How a worker ended."""

    failures: list[str] = field(default_factory=list)
    stopped: bool = False
    """True if it was asked to stop; its work is saved."""


class Worker:
    """A running worker process.

    Args:
        environment: environment variables that are set for it.
    """

    def __init__(self, request: WorkRequest, environment: Mapping[str, str]):
        self._label, self._stopping, self._running = request.label(), False, ExitStack()
        folder = self._running.enter_context(request_folder(asdict(request)))
        # Detached: Ctrl-C reaches it through the launcher only. The launcher also handles SIGUSR2,
        # with which a cluster announces the end of a job.
        child = Child("kdprof.launch.worker", folder, environment=environment, detached=True)
        self._child = self._running.enter_context(child)

    def stop(self) -> None:
        """Ask it to save and end; returns at once."""
        self._stopping = True
        self._child.stop()

    def wait(self) -> None:
        """Wait until it has ended. Its messages are too few to fill the pipe and block it."""
        self._child.wait()

    def follow(self, say: Callable[[str], None]) -> Outcome:
        """Pass on its messages until it ends, and return its outcome."""
        with self._running:
            for _, text in self._child.messages():
                say(text)
            status, result = self._child.wait(), self._child.result()
            if result is not None:
                return Outcome(**result)
            if self._stopping and status == -signal.SIGTERM:  # before it had anything to save
                return Outcome(stopped=True)
            if not status:
                return Outcome()
            failure = f"{self._label}: {self._child.last_words()}"
        say(f"failed: {failure}")
        return Outcome([failure])


class _SentProgress(Progress):
    """Progress whose messages are sent to the launcher."""

    def __init__(self) -> None:
        super().__init__(None)

    def say(self, text: str) -> None:
        send("say", text)


def _do(request: WorkRequest, workflow: Workflow, ranks: Ranks | None) -> Outcome:
    """Carry out a request, alone or as rank 0."""
    job = request.job
    if job is None:
        workflow.prepare_jobs(list(request.names), ranks)
        return Outcome()
    summary = workflow.train_job(
        job.method, job.budgets, job.seed, ranks=ranks, concurrent_runs=request.concurrent_runs
    )
    return Outcome(summary.failures)


def _workflow(request: WorkRequest) -> Workflow:
    store = Store(Path(request.out))
    study = load_study(str(store.study), {"device": request.device})
    # The request names its methods; the launcher added the controls to them.
    return Workflow(study, store, _SentProgress(), control=False, measuring=request.measuring)


def main() -> None:
    """Run a worker: alone, as torchrun's agent of a group, or as one process of the group."""
    asked = read_request()
    request = WorkRequest.from_json(asked.content)
    try:
        workflow = _workflow(request)
        study = workflow.study
        if study.step.gpus > 1 and Place.from_environment() is None:
            arguments = ["-P", "-m", "kdprof.launch.worker", *sys.argv[1:]]
            sys.exit(run_group(arguments, study.step.gpus))
        outcome = in_group(study, lambda ranks: _do(request, workflow, ranks))
    except Interrupted as stop:
        send("say", str(stop))
        asked.write_result(asdict(Outcome(stopped=True)))
        leave(stop.exit_code)
    except LostContact as error:
        leave(error.exit_code)
    except Exception as error:
        if debugging():
            raise
        problems = error.problems if isinstance(error, UserError) else [explain(error)]
        outcome = Outcome([f"{request.label()}: {problem}" for problem in problems])
        for failure in outcome.failures:
            send("say", f"failed: {failure}")
    if outcome is not None:
        asked.write_result(asdict(outcome))
    leave(1 if outcome and outcome.failures else 0)


if __name__ == "__main__":
    main()
