"""Whether the loader keeps up with the step: how fast each part of the input is on this machine."""

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

from kdprof.data import PREFETCHED, Batches, DataOnDisk, Feeder, require_files
from kdprof.data.cache import Cached, open_cache, writing
from kdprof.errors import UserError
from kdprof.feed import StepFeed
from kdprof.hardware.device import synchronize
from kdprof.measure.clock import clock_of
from kdprof.measure.latency import Stopwatch
from kdprof.measure.study_step import StudySubject
from kdprof.progress import Progress
from kdprof.records import REFERENCE
from kdprof.resolve import ResolvedStudy
from kdprof.study import load_study

TIMED_S = 1.0
"""How long each part is repeated."""
SAMPLE = 32
"""Images that the trial cache is made of."""
TIMED_STEPS = 5
ENOUGH = 1.1
"""A loader that is this many times as fast as the step keeps up with it in spite of hiccups."""
WORTH_CACHING = 1.5
"""How much faster reading from a cache must be than decoding to be recommended."""
ENDLESS = 1 << 40
"""More batches than are asked for."""


@dataclass(frozen=True)
class Feeding:
    """Images per second of every part of the input, and of the step that it feeds."""

    decoding: float
    """Of one core."""
    reading: float
    """A cache from its disk, checked, with all cores."""
    lookup: float
    """What one loader process makes with this study's cache setting."""
    lookup_cached: float
    """The same with a cache that is in memory already."""
    augmentation: float
    """On the step's device."""
    loader: float
    """All of it together, as in training."""
    step: float
    """Of the reference method, the one that is hardest to feed."""
    cache: str
    workers: int
    """The study's settings."""
    cores: int
    on_cpu: bool
    """Whether augmentation shares the processor with the step, instead of hiding behind it."""

    @property
    def times_the_step(self) -> float:
        """How many times the images that the step takes are delivered."""
        return self.loader / self.step

    def verdict(self) -> str:
        """Return whether the loader keeps up, and what to set where it does not."""
        told = f"the loader feeds {self.times_the_step:.2g} x the step"
        if self.on_cpu:
            told += f"; on a CPU augmentation adds {self.step / self.augmentation:.0%} to it"
        return told if self.times_the_step >= ENOUGH else f"{told}; {self._mend()}"

    def _mend(self) -> str:
        needed = ENOUGH * self.step
        caching = self.cache == "none" and self.lookup_cached > WORTH_CACHING * self.lookup
        workers = max(1, math.ceil(needed / (self.lookup_cached if caching else self.lookup)))
        found = ['data_settings.cache = "disk"'] if caching else []
        if workers > self.workers:
            found.append(f"data_settings.workers = {min(workers, self.cores)}")
        if not found:
            return f"augmentation alone makes {self.augmentation:.4g} images/s; nothing to set"
        less = f", which is all of {self.cores} cores and less than needed"
        return "set " + " and ".join(found) + (less if workers > self.cores else "")


def measure_study_feeding(
    source: str | None, overrides: Mapping[str, Any], progress: Progress
) -> Feeding:
    """Measure the input of a study that a preset or file, with ``overrides``, describes.

    Raises:
        UserError: what is wrong with the study, or see :func:`measure_feeding`.
    """
    return measure_feeding(
        ResolvedStudy(load_study(source, overrides), progress=progress), progress
    )


def measure_feeding(study: ResolvedStudy, progress: Progress) -> Feeding:
    """Measure a study's input on this machine; takes some seconds, and twice a cache of 32 images.

    Raises:
        UserError: files that cannot be used, a cache folder that cannot be written, or a step that
            several GPUs share.
    """
    require_files(study.plain.data)
    step = study.step
    if step.gpus > 1:
        raise UserError(
            f"the input is measured with one GPU, this step is shared by {step.gpus}; add --set "
            f"step.gpus=1 --set step.batch={step.share} for the share of one"
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
    """Return how often ``work`` of 0, 1, ... is done per second, after one untimed turn."""
    work(0)
    wait()
    began, turns = time.perf_counter(), 0
    while time.perf_counter() - began < TIMED_S:
        turns += 1
        work(turns)
        wait()
    return turns / (time.perf_counter() - began)


class _Sample(DataOnDisk):
    """A few images of a data set, from all over it."""

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
    """Return the images per second of a cache's file, and of lookups in what was read."""
    with writing(study.data.cache_folder()):
        study.data.cache_folder().mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=study.data.cache_folder())
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
    """Have the system read a file from its disk again, where it can."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _augmentation(study: ResolvedStudy, batches: Batches) -> float:
    gathered = batches.gathered(0).to(study.device)
    per_second = _per_second(
        lambda turn: batches.augmentation.apply(gathered), lambda: synchronize(study.device)
    )
    return batches.size * per_second


def _loader(study: ResolvedStudy, batches: Batches) -> float:
    """Return the images per second of the training's feeder, with nothing to feed.

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
    watch = Stopwatch(StudySubject(feed), clock_of(study.device), study.hardware)
    watch.warm_up()
    watch.time_block(TIMED_STEPS)
    return batches.size / statistics.median(watch.samples.rounds[0])
