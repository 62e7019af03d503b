"""The runs of a study as jobs of a Slurm cluster, submitted through submitit.

There are two submissions: a job that measures missing Costs and trains the teacher, and an array
with a task for every job of the study, which starts after the first has succeeded. A task runs a
worker. Before its time limit, or when it is preempted, the worker saves and the task is queued
again.

submitit stores each task as a pickle in ``slurm/`` of the results folder, and loads only pickles
that it wrote itself.
"""

from __future__ import annotations

import signal
import subprocess
import time
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
"""Options of the cluster, with submitit's names for them."""
WHOLE = ("cpus", "gpus", "parallel", "signal_delay_s")
DEFAULTS = {"time": 240, "cpus_per_task": 4, "signal_delay_s": 120}
"""Minutes; cores; seconds between the signal that announces a job's end and the end."""
POLL_S = 5.0
"""Seconds between two looks at the queue."""
TRIES = 60
"""How often in a row the cluster may not answer: five minutes."""
REQUEUED_AT_MOST = 1000
"""How often one task may reach its time limit."""


def parse_options(texts: Sequence[str]) -> dict[str, str | int]:
    """Read ``KEY=VALUE`` texts into submitit's parameters; time is minutes or HH:MM:SS.

    Raises:
        UserError: options are unknown or malformed; reports all problems at once.
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
    """The jobs that were submitted to the cluster."""

    preparation: str
    """Id of the job that measures and trains the teacher."""
    tasks: list[str]
    """Ids of the array's tasks."""
    runs: int


def submit(workflow: Workflow, options: Mapping[str, Any]) -> Submitted:
    """Submit the unfinished runs of a study and return at once.

    Args:
        options: as :func:`parse_options` returns them.

    Raises:
        UserError: the study has problems, its jobs are in the queue already, all its runs are
            finished, or the cluster refuses the submission.
    """
    study, store = workflow.study, workflow.store
    resolved = replace(workflow, study=_without_device(study)).resolved()
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


def train_on_cluster(workflow: Workflow, options: Mapping[str, Any]) -> list[str]:
    """Submit the unfinished runs of a study, wait until no job is queued, and return what failed.

    Interrupting the wait leaves the jobs in the queue; a second call must wait for them to end.

    Raises:
        UserError: as for :func:`submit`, but a study whose runs are all finished is no error.
    """
    study, store = workflow.study, workflow.store
    resolved = replace(workflow, study=_without_device(study)).resolved()
    names = resolved.method_names(control=workflow.control)
    if not jobs_of(resolved, store, names):
        return []
    made = submit(workflow, options)
    workflow.progress.say(f"waiting for {made.runs} runs on the cluster ({made.tasks[0]} ...)")
    while _still_queued(store):
        time.sleep(POLL_S)
    return [
        f"{job.label()} did not finish on the cluster; logs: {store.slurm}"
        for job in jobs_of(resolved, store, names)
    ]


def _still_queued(store: Store) -> bool:
    """Return whether jobs are queued; a cluster that does not answer is asked again for a while."""
    for _ in range(TRIES):
        try:
            return bool(_queued(store))
        except UserError as error:
            refused = error
            time.sleep(POLL_S)
    raise refused


def _without_device(study: Study) -> Study:
    """Return the study without the settings that can only be checked on a node of the cluster."""
    step = study.step.model_copy(update={"compile": "none", "precision": "fp32"})
    return study.model_copy(update={"device": "cpu", "step": step})


def job_name(store: Store) -> str:
    """Return the name of all jobs of a results folder on the cluster."""
    return f"kdprof:{store.root.resolve()}"


def _refuse_twice(store: Store) -> None:
    """Refuse to submit while jobs of the same folder are in the queue.

    Raises:
        UserError: such jobs are in the queue, or the cluster does not answer.
    """
    if ids := _queued(store):
        raise UserError(
            f"jobs of {store.root} are in the queue already: {', '.join(ids)}; wait for them, or "
            f"'scancel --name={job_name(store)}' first"
        )


def _queued(store: Store) -> list[str]:
    """Return the ids of the jobs of a folder that are waiting or running.

    Raises:
        UserError: the cluster does not answer.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--name={job_name(store)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise UserError(
            "squeue is not installed here; submit from a machine of a Slurm cluster"
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"the cluster does not answer: {_last_line(error)}") from error
    return done.stdout.split()


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
    """The work of one job of the cluster: it runs a worker, which saves before the job ends."""

    def __init__(self, request: WorkRequest):
        self.request = request
        self._worker: Worker | None = None

    def __call__(self) -> None:
        """Train until the worker ends.

        Raises:
            KdprofError: a run failed, or the job was cancelled; the training is saved.
        """
        with _blocked(signal.SIGUSR2):
            # The cluster announces a job's end to all its processes. Only this one may act on it.
            self._worker = worker = Worker(self.request, {})
        outcome = worker.follow(lambda text: print(text, flush=True))
        if outcome.failures:
            raise KdprofError("\n".join(outcome.failures))
        if outcome.stopped:
            raise KdprofError(
                f"{self.request.label()}: stopped and saved; submit again to continue"
            )

    def checkpoint(self) -> DelayedSubmission:
        """Make the worker save, and return the task that the job runs when it starts again.

        submitit calls this from the handler of the signal that announces the end.
        """
        if self._worker is not None:
            self._worker.stop()
            self._worker.wait()
        return DelayedSubmission(Task(self.request))


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread during the body; processes started in it keep it blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
