"""Measuring: from a resolved study to Costs, which say what each method's step costs here.

Steps are timed, traced and counted here; nothing here trains, converts budgets or writes a results
folder.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from kdprof.measure.count_study import Measured, too_large
from kdprof.measure.isolation import Failure, MeasureRequest, guarded, run_isolated
from kdprof.measure.latency import OnRound
from kdprof.measure.profiles import Files
from kdprof.measure.study_step import measure_here
from kdprof.progress import Progress
from kdprof.records import Cost
from kdprof.resolve import ResolvedStudy

__all__ = ["Files", "Measured", "measure"]


def measure(
    study: ResolvedStudy,
    names: Sequence[str],
    progress: Progress,
    files: Files | None = None,
    keep: Callable[[Cost], object] | None = None,
) -> Measured[Cost]:
    """Measure the step of each named method in a separate process, interleaved with the reference.

    A method whose step fails or cannot fit into memory is listed among the failures; the others
    are still measured.

    Args:
        keep: called with each Cost as soon as it is measured.

    Raises:
        UserError: no step fits into the device's memory, or an image is damaged.
    """
    measured = Measured[Cost](failures=too_large(study, names, progress))
    if study.data_settings.cache == "disk":
        study.data.decoded("train")  # here, with a progress bar; the child processes find it
    for name in (name for name in names if name not in measured.failures):
        own = files.of(name) if files and len(names) > 1 else files or Files()
        try:
            with _bar(study, name, progress) as on_round:
                cost = _measure_one(study, name, own, on_round)
        except Failure as failure:
            measured.failures[name] = str(failure)
            progress.say(f"{name}: failed: {failure}")
            continue
        measured.costs.append(cost)
        if keep is not None:
            keep(cost)
        progress.detail(f"{name}: {cost.timing['rounds']} rounds; {cost.timing['stopped']}")
    return measured


def _measure_one(study: ResolvedStudy, name: str, files: Files, on_round: OnRound) -> Cost:
    if study.measure.in_process:
        with redirect_stdout(sys.stderr):
            return guarded(lambda: measure_here(study, name, files, on_round))
    arguments = {
        "study": study.plain.model_dump(mode="json"),
        "name": name,
        "files": files.to_json(),
        "parent": os.getpid(),
    }
    return run_isolated(MeasureRequest("method", arguments, study.step.gpus), on_round)


@contextmanager
def _bar(study: ResolvedStudy, name: str, progress: Progress) -> Iterator[OnRound]:
    """Show how many of its allowed seconds a method's rounds have taken."""
    limit = round(study.measure.max_time_s)
    with progress.task(f"{name} (seconds at most)", limit) as advance:
        began, shown = None, 0

        def on_round(done: int, width: float | None) -> None:
            nonlocal began, shown
            began = began or time.monotonic()
            passed = min(limit, round(time.monotonic() - began))
            advance(passed - shown)
            shown = passed

        yield on_round
