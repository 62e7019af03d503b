"""Many runs: the jobs of a study, each trained in a separate process; each launcher is a file.

Here processes are started, followed and stopped, locally or by Slurm; nothing here trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdprof.records import run_label
from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder, Store
from kdprof.train.trunk import shares_trunks


@dataclass(frozen=True)
class Job:
    """The cells (method, budget, seed) that one process trains, one after the other."""

    method: str
    seed: int
    budgets: tuple[str, ...]
    """One budget, or all that share a trunk (wsd)."""

    def labels(self) -> list[str]:
        """Return the names of its cells in messages."""
        return [run_label("run", self.method, budget, self.seed) for budget in self.budgets]

    def label(self) -> str:
        """Return its name in messages."""
        return ", ".join(self.labels())

    def folders(self, store: Store) -> list[RunFolder]:
        """Return the folders of its cells."""
        return [store.run_folder(self.method, budget, self.seed) for budget in self.budgets]


def jobs_of(study: ResolvedStudy, store: Store, names: Sequence[str]) -> list[Job]:
    """Return the unfinished jobs of the named methods, budget by budget, seed by seed."""
    groups: list[tuple[str, ...]] = [(text,) for text in study.budgets]
    if shares_trunks(study.plain):
        groups = [tuple(study.budgets)]
    every = [
        Job(name, seed, group) for group in groups for seed in range(study.seeds) for name in names
    ]
    left = [_unfinished(job, store) for job in every]
    return [job for job in left if job.budgets]


def _unfinished(job: Job, store: Store) -> Job:
    """Return the job without its finished cells."""
    runs = [folder.read_run() for folder in job.folders(store)]
    pairs = zip(job.budgets, runs, strict=True)
    left = [budget for budget, run in pairs if run is None or not run.finished]
    return Job(job.method, job.seed, tuple(left))
