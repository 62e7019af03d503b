"""The steps from a study to its results, shared by commands and jobs: open, prepare, run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdprof.processes import Processes
from kdprof.progress import Progress
from kdprof.store import Store
from kdprof.study import Study, claim_folder, join_study, load_study, with_measuring

if TYPE_CHECKING:
    from kdprof.distributed.ranks import Ranks
    from kdprof.measure import Files, Measured
    from kdprof.records import Cost, CountedCost
    from kdprof.resolve import ResolvedStudy
    from kdprof.train.plan import Forecast
    from kdprof.train.prepare import Prepared
    from kdprof.train.runs import Summary

# Modules that need torch are imported where they are used: wrong options are reported at once.


@dataclass(frozen=True)
class Workflow:
    """A study, its folder of results, and the display of progress.

    Attributes:
        control: True to compare the controls, too.
        measuring: study keys that say how long to measure; they hold for this call and are not
            stored in the folder's study.
    """

    study: Study
    store: Store
    progress: Progress
    control: bool = True
    measuring: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: str | None,
        overrides: Mapping[str, Any],
        out: Path,
        progress: Progress,
        *,
        control: bool = True,
        measuring: Mapping[str, Any] | None = None,
    ) -> Workflow:
        """Read a study and join it with what its folder of results already compares.

        Args:
            source: preset or file; None = the study in the folder, or the defaults.

        Raises:
            UserError: settings are invalid, or the folder holds another study or is not writable.
        """
        store = Store(out)
        store.check_writable()
        if not store.has_locks():
            progress.say(
                f"{out}: this file system has no locks; a run is known to be in training by its "
                "lease alone"
            )
        source = source or (str(store.study) if store.study.is_file() else None)
        study = load_study(source, overrides, say=progress.say)
        join_study(store.study, study)
        return cls(study, store, progress, control, measuring or {})

    def resolved(
        self, *, weights: bool = True, ranks: Ranks | None = None, runs: bool = True
    ) -> ResolvedStudy:
        """Return the study with the device, data, networks and methods that it names.

        Args:
            runs: False if its steps are only counted.

        Raises:
            UserError: the study has problems; reports all of them at once.
        """
        from kdprof.resolve import ResolvedStudy

        study = self._measured_study()
        return ResolvedStudy(
            study,
            progress=self.progress,
            weights=weights,
            ranks=ranks,
            runs=runs,
            control=self.control,
        )

    def _measured_study(self) -> Study:
        return with_measuring(self.study, self.measuring)

    def measure(self, files: Files, on_stored: Callable[[Path], object]) -> Measured[Cost]:
        """Measure the study's methods, and first the reference if its Cost is not stored yet.

        Args:
            on_stored: called with the file of each Cost as soon as it is stored.
        """
        study = self._measured_study()
        with ExitStack() as running:
            processes = None
            if not study.measure.in_process:
                # Now: they import torch at the same time as this process does.
                processes = running.enter_context(Processes("kdprof.measure", study.step.gpus))
            return self._measure(files, on_stored, processes)

    def _measure(
        self, files: Files, on_stored: Callable[[Path], object], processes: Processes | None
    ) -> Measured[Cost]:
        from kdprof.measure import measure
        from kdprof.measure.profiles import check_files
        from kdprof.records import REFERENCE
        from kdprof.resolve.identity import cost_key

        resolved = self.resolved(weights=False)
        check_files(files, resolved.device)
        names = resolved.method_names(control=False)
        if self.store.read_cost(REFERENCE, cost_key(resolved, REFERENCE)) is None:
            names = list(dict.fromkeys([REFERENCE, *names]))

        def store(cost: Cost) -> None:
            # At once: the measurement of a later method may be interrupted.
            claim_folder(self.store.study, self.study)
            on_stored(self.store.write_cost(cost))

        return measure(resolved, names, self.progress, files, store, processes=processes)

    def count(self, *, modules: bool) -> Measured[CountedCost]:
        """Count the steps of the study's methods and of the reference; run and store nothing."""
        from kdprof.measure.counting.count_study import count_costs
        from kdprof.records import REFERENCE

        resolved = self.resolved(weights=False, runs=False)
        names = list(dict.fromkeys([REFERENCE, *resolved.method_names(control=False)]))
        return count_costs(resolved, names, self.progress, modules=modules)

    def plan(self) -> tuple[list[Forecast], Prepared]:
        """Forecast the training of the study, after measuring the Costs that are missing."""
        from kdprof.train.plan import forecast
        from kdprof.train.prepare import prepare

        resolved = self.resolved(weights=False)
        names = resolved.method_names(control=self.control)
        prepared = prepare(resolved, self.store, names, self.progress)
        costed = [name for name in names if name in prepared.costs]
        found = forecast(resolved, self.store, costed, prepared.costs)
        claim_folder(self.store.study, self.study.model_copy(update={"budgets": [], "seeds": 1}))
        return found, prepared

    def prepare(self, resolved: ResolvedStudy) -> Prepared:
        """Measure the Costs that are missing, then write the study into the folder. A step that
        does not fit into memory is refused before anything is written."""
        from kdprof.train.prepare import prepare

        names = resolved.method_names(control=self.control)
        prepared = prepare(resolved, self.store, names, self.progress)
        claim_folder(self.store.study, self.study)
        return prepared

    def train(self, ranks: Ranks | None = None) -> Summary:
        """Train every run of the study in this process, alone or as rank 0 of a group."""
        from kdprof.train.runs import train

        resolved = self.resolved(ranks=ranks)
        prepared = self.prepare(resolved)
        return train(resolved, self.store, self.progress, control=self.control, prepared=prepared)

    def prepare_jobs(self, names: Sequence[str], ranks: Ranks | None) -> None:
        """Do the work that the jobs of a launcher share: measure Costs and train the teacher. A
        method that cannot be measured fails in its jobs."""
        from kdprof.train.prepare import prepare
        from kdprof.train.teacher import trained_teacher

        resolved = self.resolved(ranks=ranks)
        prepared = prepare(resolved, self.store, list(names), self.progress)
        for failure in prepared.failures:
            self.progress.say(failure)
        if resolved.needs_teacher(prepared.costs.keys() & set(names)):
            trained_teacher(resolved, self.store, self.progress)

    def train_job(
        self,
        method: str,
        budgets: Collection[str],
        seed: int,
        *,
        ranks: Ranks | None,
        concurrent_runs: int | None,
    ) -> Summary:
        """Train some runs of one method, whose Costs and teacher exist already."""
        from kdprof.train.runs import train_named

        return train_named(
            self.resolved(ranks=ranks),
            self.store,
            self.progress,
            method,
            budgets,
            seed,
            concurrent_runs=concurrent_runs,
        )
