"""Concurrent runs on this machine: one per GPU, or each with a share of the CPU's threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from kdprof.errors import KdprofError, UserError
from kdprof.hardware.device import find_device
from kdprof.launch import Job, jobs_of
from kdprof.launch.worker import Outcome, Worker, WorkRequest
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.train.loop import Interrupted, StopSignal
from kdprof.train.prepare import Prepared
from kdprof.train.runs import Summary
from kdprof.train.teacher import trained_teacher
from kdprof.workflow import Workflow

CPU_SLOTS = 2
"""Concurrent runs on a CPU by default."""
POLL_S = 0.2
Slot = Mapping[str, str]
"""The environment variables that give a worker its part of the machine."""


def divide(device: str, count: int | None, each: int = 1) -> list[Slot]:
    """Divide this machine into slots, each for one run.

    On a CPU this process, too, gets only the threads of one slot, so that its measurements hold for
    a slot.

    Args:
        device: the study's device.
        count: number of slots; None = as many as the GPUs allow, :data:`CPU_SLOTS` on a CPU.
        each: GPUs per slot, or processes that share a slot of the CPU.

    Raises:
        UserError: there are too few GPUs for the slots, or ``device`` names one GPU.
    """
    if find_device(device).type == "cpu":
        return _cpu_slots(count or CPU_SLOTS, each)
    if ":" in device:
        raise UserError(
            f"--launcher local uses all GPUs, not {device}; use --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose"
        )
    return _gpu_slots(count, each)


def _cpu_slots(count: int, each: int) -> list[Slot]:
    cores = len(os.sched_getaffinity(0))
    threads = max(1, min(torch.get_num_threads(), cores // (count * each)))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that measure, too
    return [{}] * count


def _gpu_slots(count: int | None, each: int) -> list[Slot]:
    found = torch.cuda.device_count()
    most = found // each
    if (count or 1) > most:
        raise UserError(
            f"{count or 1} slots of {each} GPUs each: this machine has {found}; lower --slots"
            + (" or --gpus" if each > 1 else "")
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(found)]
    shares = [names[slot * each : (slot + 1) * each] for slot in range(count or most)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def train_locally(workflow: Workflow, slots: int | None) -> Summary:
    """Train the teacher in this process, then the runs of the study concurrently.

    If a run fails or its process dies, the other runs are still trained.

    Args:
        slots: concurrent runs; None = as :func:`divide` chooses.

    Raises:
        Interrupted: a signal arrived; every run is saved.
    """
    # First, because a Cost depends on the number of threads in a slot.
    divided = divide(workflow.study.device, slots, workflow.study.step.gpus)
    study = workflow.resolved()
    prepared = workflow.prepare(study)
    return _train(study, workflow, divided, prepared)


def _train(
    study: ResolvedStudy, workflow: Workflow, slots: Sequence[Slot], prepared: Prepared
) -> Summary:
    store, progress = workflow.store, workflow.progress
    names = study.method_names(control=workflow.control)
    names = [name for name in names if name in prepared.costs]
    jobs = jobs_of(study, store, names)
    cells = len(names) * len(study.budgets) * study.seeds
    left = sum(len(job.budgets) for job in jobs)
    summary = Summary(skipped=cells - left, failures=list(prepared.failures))
    if jobs and study.needs_teacher({job.method for job in jobs}):
        _train_teacher(study, store, progress, slots[0])
    pool = _Pool(store, study.device.type, slots, progress)
    with progress.task("runs", left) as advance:
        for job, outcome in pool.train(jobs):
            _add(job, outcome, store, summary)
            advance(len(job.budgets))
    return summary


def _train_teacher(study: ResolvedStudy, store: Store, progress: Progress, slot: Slot) -> None:
    """Train the teacher in this process, or in a slot if it needs several processes.

    Raises:
        KdprofError: its training failed.
    """
    if study.step.gpus == 1:
        trained_teacher(study, store, progress)
        torch.cuda.empty_cache()  # the first slot's worker is on this GPU as well
        return
    names = tuple(study.method_names(control=True))
    request = WorkRequest(str(store.root), study.device.type, None, 0, names)
    outcome = Worker(request, slot).follow(progress.say)
    if outcome.failures:
        raise KdprofError("\n".join(outcome.failures))


def _add(job: Job, outcome: Outcome, store: Store, summary: Summary) -> None:
    """Add the outcome of a job to the summary."""
    runs = [folder.read_run() for folder in job.folders(store)]
    summary.finished += [run for run in runs if run is not None and run.finished]
    summary.failures += outcome.failures
    if not outcome.failures:
        pairs = zip(job.labels(), runs, strict=True)
        summary.elsewhere += [label for label, run in pairs if run is None or not run.finished]


class _Pool:
    """Workers, one per slot."""

    def __init__(self, store: Store, device: str, slots: Sequence[Slot], progress: Progress):
        self._store, self._device, self._progress = store, device, progress
        self._count = len(slots)
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._lock = threading.Lock()
        self._workers: set[Worker] = set()
        self._stopping = False

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Train all jobs and yield each with its outcome.

        Raises:
            Interrupted: a signal arrived and every worker has saved.
        """
        signals = StopSignal()
        others = min(self._count, len(jobs)) - 1
        with signals.watching(), ThreadPoolExecutor(self._count) as threads:
            jobs_by_future = {threads.submit(self._train, job, others): job for job in jobs}
            waiting: set[Future] = set(jobs_by_future)
            try:
                while waiting:
                    done, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
                    if signals.raised:
                        self._stop()
                    yield from ((jobs_by_future[future], future.result()) for future in done)
            finally:
                self._stop()
        if signals.raised:
            raise Interrupted(
                f"stopped and saved in {self._store.root}; run the same command again to continue"
            )

    def _stop(self) -> None:
        with self._lock:
            if not self._stopping:
                for worker in self._workers:
                    worker.stop()
            self._stopping = True

    def _train(self, job: Job, others: int) -> Outcome:
        slot = self._free.get()
        request = WorkRequest(str(self._store.root), self._device, job, others)
        try:
            with self._running(request, slot) as worker:
                return worker.follow(self._progress.say) if worker else Outcome(stopped=True)
        finally:
            self._free.put(slot)

    @contextmanager
    def _running(self, request: WorkRequest, slot: Slot) -> Iterator[Worker | None]:
        """Start a worker, unless the pool is stopping."""
        with self._lock:
            worker = None if self._stopping else Worker(request, slot)
            if worker is not None:
                self._workers.add(worker)
        try:
            yield worker
        finally:
            with self._lock:
                if worker is not None:
                    self._workers.discard(worker)
