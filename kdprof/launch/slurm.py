"""The runs of a study as jobs of a Slurm cluster, submitted through submitit.

Two submissions: a job that measures what is missing and trains the teacher, and, once that has
succeeded, an array with a task for every job of the study. A task runs a worker; before its time
limit, or when it is preempted, the worker saves and the task is queued again.

submitit keeps each task as a pickle of its own making in ``slurm/`` of the results folder, and
reads only those.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from submitit.helpers import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor

from kdprof.errors import KdprofError, UserError, unknown
from kdprof.launch import jobs_of
from kdprof.launch.worker import Worker, WorkRequest
from kdprof.store import Store
from kdprof.study import Study, claim_folder
from kdprof.workflow import Workflow

OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "time",
    "cpus": "cpus_per_task",
    "memory": "mem",
    "gpus": "gpus_per_node",
    "parallel": "array_parallelism",
    "signal_delay_s": "signal_delay_s",
}
"""What can be asked of the cluster, and submitit's names for it."""
WHOLE = ("cpus", "gpus", "parallel", "signal_delay_s")
DEFAULTS = {"time": 240, "cpus_per_task": 4, "signal_delay_s": 120}
"""Minutes, cores, seconds between the announcement of a job's end and its end."""
REQUEUED_AT_MOST = 1000
"""Times that one task may reach its time limit."""


def parse_options(texts: Sequence[str]) -> dict[str, str | int]:
    """Read ``KEY=VALUE`` texts into submitit's parameters; time is minutes or HH:MM:SS.

    Raises:
        UserError: everything that is wrong with them.
    """
    found: dict[str, str | int] = dict(DEFAULTS)
    problems = []
    for text in texts:
        key, _, value = text.partition("=")
        if key not in OPTIONS:
            problems.append(f"--slurm {text}: {unknown('option', key, OPTIONS)}")
        elif not value:
            problems.append(f"--slurm {text}: write {key}=VALUE")
        else:
            try:
                found[OPTIONS[key]] = _value(key, value)
            except ValueError as error:
                problems.append(f"--slurm {text}: {error}")
    if problems:
        raise UserError(*problems)
    return found


def _value(key: str, text: str) -> str | int:
    if key == "time":
        return _minutes(text)
    if key not in WHOLE:
        return text
    if not text.isdigit():
        raise ValueError(f"{key} must be a whole number")
    return int(text)


def _minutes(text: str) -> int:
    parts = text.split(":")
    if not all(part.isdigit() for part in parts) or len(parts) not in (1, 3):
        raise ValueError("time must be minutes, or HH:MM:SS")
    if len(parts) == 1:
        return max(1, int(text))
    hours, minutes, seconds = map(int, parts)
    return max(1, 60 * hours + minutes + (seconds > 0))


@dataclass(frozen=True)
class Submitted:
    """What was handed to the cluster."""

    preparation: str
    """Id of the job that measures and trains the teacher."""
    tasks: list[str]
    """Ids of the array's tasks."""
    runs: int


def submit(workflow: Workflow, options: Mapping[str, Any]) -> Submitted:
    """Submit what is left of a study and return at once.

    Args:
        options: as :func:`parse_options` returns them.

    Raises:
        UserError: the study is wrong, its jobs are in the queue already, nothing is left to train,
            or the cluster refuses the submission.
    """
    study, store = workflow.study, workflow.store
    resolved = replace(workflow, study=_as_seen_from_here(study)).resolved()
    names = resolved.method_names(control=workflow.control)
    jobs = jobs_of(resolved, store, names)
    if not jobs:
        raise UserError(f"every run of {store.root} is finished; next: kdprof plot")
    _refuse_twice(store)
    claim_folder(store.study, study)
    root = str(store.root.resolve())
    tasks = [Task(WorkRequest(root, study.device, job, None)) for job in jobs]
    prepare = WorkRequest(root, study.device, None, None, tuple(names), workflow.measuring)
    first = Task(prepare)
    executor = _executor(store, study, options)
    try:
        preparation = executor.submit(first).job_id
        executor.update_parameters(dependency=f"afterok:{preparation}")
        with executor.batch():
            array = [executor.submit(task) for task in tasks]
    except subprocess.CalledProcessError as error:
        raise UserError(f"the cluster refuses the job: {_last_line(error)}") from error
    ids = [job.job_id for job in array]
    return Submitted(preparation, ids, sum(len(job.budgets) for job in jobs))


def _as_seen_from_here(study: Study) -> Study:
    """Return the study without what only the device of a node can tell is right."""
    step = study.step.model_copy(update={"compile": "none"})
    return study.model_copy(update={"device": "cpu", "step": step})


def job_name(store: Store) -> str:
    """Return what the cluster calls every job of a results folder."""
    return f"kdprof:{store.root.resolve()}"


def _refuse_twice(store: Store) -> None:
    """Refuse to submit while jobs of the same folder are in the queue.

    Raises:
        UserError: some are, or the cluster does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--name={job_name(store)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError("no squeue here; submit from a machine of a Slurm cluster") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"the cluster does not answer: {_last_line(error)}") from error
    if ids := done.stdout.split():
        raise UserError(
            f"jobs of {store.root} are in the queue already: {', '.join(ids)}; wait for them, or "
            f"'scancel --name={job_name(store)}' first"
        )


def _last_line(error: subprocess.CalledProcessError) -> str:
    lines = (error.stderr or error.stdout or b"").strip()
    text = lines if isinstance(lines, str) else lines.decode(errors="replace")
    return text.splitlines()[-1] if text else f"exit code {error.returncode}"


def _executor(store: Store, study: Study, options: Mapping[str, Any]) -> SlurmExecutor:
    executor = SlurmExecutor(store.slurm, max_num_timeout=REQUEUED_AT_MOST)
    gpus = {} if study.device == "cpu" else {"gpus_per_node": study.step.gpus}
    executor.update_parameters(
        job_name=job_name(store),
        stderr_to_stdout=True,
        # A failed preparation must not leave its array in the queue for ever.
        additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes"},
        **{**gpus, **options},
    )
    return executor


class Task:
    """What one job of the cluster does: run a worker, and have it save before the job ends."""

    def __init__(self, request: WorkRequest):
        self.request = request
        self._worker: Worker | None = None

    def __call__(self) -> None:
        """Train until the worker is through.

        Raises:
            KdprofError: something failed, or the job was cancelled; what was trained is saved.
        """
        with _held_back(signal.SIGUSR2):
            # Its end is announced to every process of a job. Only this one may act on it.
            self._worker = worker = Worker(self.request, {})
        outcome = worker.follow(lambda text: print(text, flush=True))
        if outcome.failures:
            raise KdprofError("\n".join(outcome.failures))
        if outcome.stopped:
            raise KdprofError(f"{self.request.label()}: stopped and saved; submit again to go on")

    def checkpoint(self) -> DelayedSubmission:
        """Have the worker save, and return what to run when the job is next.

        submitit calls this from the handler of the signal that announces the end.
        """
        if self._worker is not None:
            self._worker.stop()
            self._worker.wait()
        return DelayedSubmission(Task(self.request))


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back from this thread, and for good from processes started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
