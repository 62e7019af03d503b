"""How fast each part of the input pipeline is here, and whether the loader keeps up with a step."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdprof.data import ENDLESS, PREFETCHED, Batches, DataOnDisk, Feeder, require_files
from kdprof.data.cache import Cached, open_cache, using
from kdprof.errors import UserError
from kdprof.hardware.device import synchronize
from kdprof.measure.clock import clock_of
from kdprof.measure.latency import Stopwatch
from kdprof.measure.study_step import StudySubject
from kdprof.progress import Progress
from kdprof.records import REFERENCE
from kdprof.resolve import ResolvedStudy
from kdprof.step_feed import StepFeed
from kdprof.study import load_study

TIMED_S = 1.0
"""How long each part is repeated."""
SAMPLE = 32
"""Images that the trial cache is made of."""
TIMED_STEPS = 5
ENOUGH = 1.1
"""A loader that is this many times as fast as the step keeps up with it despite short delays."""
WORTH_CACHING = 1.5
"""A cache is recommended if reading from it is this many times as fast as decoding."""


@dataclass(frozen=True)
class Feeding:
    """Images per second of every part of the input pipeline, and of the step that uses them."""

    decoding: float
    """Decoding files, on one core."""
    reading: float
    """Reading a cache from its disk and verifying it, with all cores."""
    lookup: float
    """One loader process, with this study's cache setting."""
    lookup_cached: float
    """The same, with a cache that is in memory already."""
    augmentation: float
    """On the step's device."""
    loader: float
    """The whole pipeline, as in training."""
    step: float
    """The reference's step, which needs the most images per second of all methods."""
    cache: str
    workers: int
    """Loader processes; this and ``cache`` are the study's settings."""
    cores: int
    on_cpu: bool
    """True if augmentation shares the processor with the step instead of overlapping with it."""

    @property
    def times_the_step(self) -> float:
        """Images that the loader delivers for each image that the step uses."""
        return self.loader / self.step

    def verdict(self) -> str:
        """Return whether the loader keeps up, and what to set if it does not."""
        text = f"the loader delivers {self.times_the_step:.2g} x what the step uses"
        if self.on_cpu:
            share = self.step / self.augmentation
            text += f"; on a CPU augmentation adds {share:.0%} to the step"
        return text if self.times_the_step >= ENOUGH else f"{text}; {self._fix()}"

    def _fix(self) -> str:
        needed = ENOUGH * self.step
        caching = self.cache == "none" and self.lookup_cached > WORTH_CACHING * self.lookup
        workers = max(1, math.ceil(needed / (self.lookup_cached if caching else self.lookup)))
        found = ['data_settings.cache = "disk"'] if caching else []
        if workers > self.workers:
            found.append(f"data_settings.workers = {min(workers, self.cores)}")
        if not found:
            return f"augmentation alone makes {self.augmentation:.4g} images/s; no setting helps"
        less = f", which are all {self.cores} cores and still too few"
        return "set " + " and ".join(found) + (less if workers > self.cores else "")


def measure_study_feeding(
    source: str | None, overrides: Mapping[str, Any], progress: Progress
) -> Feeding:
    """Measure the input pipeline of a study, given as a preset or file with ``overrides``.

    Raises:
        UserError: the study is not valid, or see :func:`measure_feeding`.
    """
    study = load_study(source, overrides, say=progress.say)
    return measure_feeding(ResolvedStudy(study, progress=progress), progress)


def measure_feeding(study: ResolvedStudy, progress: Progress) -> Feeding:
    """Measure a study's input pipeline on this machine.

    It takes some seconds, and the space of a cache of 32 images on disk and in memory.

    Raises:
        UserError: the data set's files cannot be used, the cache folder cannot be written, or
            several GPUs share the step.
    """
    require_files(study.plain.data)
    step = study.step
    if step.gpus > 1:
        raise UserError(
            f"the input is measured with one GPU, but {step.gpus} share this step; add --set "
            f"step.gpus=1 --set step.batch={step.share} to measure the share of one"
        )
    raw, settings = study.data.files["train"], study.data_settings
    batches = study.factory.batches(seed=0)
    with progress.task("measuring the input", 5) as advance:
        sample = _Sample(raw)
        decoding = _per_second(lambda turn: raw[turn % len(raw)])
        advance(1)
        reading, lookup_cached = _trial_cache(sample, study, batches)
        advance(1)
        lookup = batches.size * _per_second(batches.gathered)
        augmentation = _augmentation(study, batches)
        advance(1)
        loader = _loader(study, batches)
        advance(1)
        taken = _step(study, batches)
        advance(1)
    return Feeding(
        decoding=decoding,
        reading=reading,
        lookup=lookup,
        lookup_cached=lookup_cached,
        augmentation=augmentation,
        loader=loader,
        step=taken,
        cache=settings.cache,
        workers=settings.workers,
        cores=len(os.sched_getaffinity(0)),
        on_cpu=study.device.type == "cpu",
    )


def _per_second(work: Callable[[int], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Return how many calls of ``work`` with 0, 1, ... finish per second, after an untimed one."""
    work(0)
    wait()
    began, turns = time.perf_counter(), 0
    while time.perf_counter() - began < TIMED_S:
        turns += 1
        work(turns)
        wait()
    return turns / (time.perf_counter() - began)


class _Sample(DataOnDisk):
    """A few images of a data set, evenly spaced over it."""

    def __init__(self, data: DataOnDisk):
        super().__init__(data.name, data.split, data.classes)
        count = min(SAMPLE, len(data))
        self._data, self._indices = data, [n * len(data) // count for n in range(count)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._data[self._indices[index]]

    def label(self, index: int) -> Tensor:
        return self._data.label(self._indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self._data.size(self._indices[index])

    def identity(self) -> list[Any]:
        return [*self._data.identity(), self._indices]


def _trial_cache(sample: _Sample, study: ResolvedStudy, batches: Batches) -> tuple[float, float]:
    """Return the images per second of reading a cache file, and of lookups in what was read."""
    caches = study.data.cache_folder()
    with using(caches, "written"):
        caches.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=caches)
    with temporary as folder:
        path = open_cache(sample, Path(folder), Progress(None)).path
        _forget(path)
        began = time.perf_counter()
        cached = Cached(sample, path)
        reading = len(sample) / (time.perf_counter() - began)
        trial = Batches(
            cached, seed=0, batch=batches.size, augmentation=batches.augmentation, workers=0
        )
        return reading, batches.size * _per_second(trial.gathered)


def _forget(path: Path) -> None:
    """Drop a file from the page cache, if the system can, so that it is read from disk again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _augmentation(study: ResolvedStudy, batches: Batches) -> float:
    gathered = batches.gathered(0).to(study.device)
    per_second = _per_second(
        lambda turn: batches.augmentation.apply(gathered), lambda: synchronize(study.device)
    )
    return batches.size * per_second


def _loader(study: ResolvedStudy, batches: Batches) -> float:
    """Return the images per second of training's feeder alone, without a step.

    Loader processes begin with a full queue, which is drained first, and deliver in bunches.
    """
    bunch = max(1, batches.workers)
    feeder = Feeder(batches, study.device, 0, ENDLESS)
    try:
        for _ in range(1 + PREFETCHED * batches.workers):
            next(feeder)

        def take(turn: int) -> None:
            for _ in range(bunch):
                next(feeder)

        per_second = _per_second(take, lambda: synchronize(study.device))
    finally:
        feeder.close()
    return batches.size * bunch * per_second


def _step(study: ResolvedStudy, batches: Batches) -> float:
    feed = StepFeed(study.factory.step(REFERENCE, None), batches)
    watch = Stopwatch(StudySubject(feed, loads=True), clock_of(study.device), study.hardware)
    watch.warm_up()
    watch.time_block(TIMED_STEPS)
    return batches.size / statistics.median(watch.samples.rounds[0])
