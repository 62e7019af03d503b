"""Batches: batch i of a run is a pure function of (data, seed, i), whatever came before it."""

from __future__ import annotations

import atexit
import signal
import traceback
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdprof.data.augment import Augmentation, Gathered
from kdprof.data.base import SegmentationData
from kdprof.data.streams import Stream, generator
from kdprof.errors import KdprofError, UserError

Batch = tuple[Tensor, Tensor]
"""Images uint8 (N, 3, h, w) and labels uint8 (N, h, w), 255 where void."""
CPU = torch.device("cpu")
PREFETCHED = 2
"""Batches that each loader process holds ready."""


class Batches(Dataset):
    """The training batches of one seed.

    Samples are visited epoch by epoch, each epoch a permutation of its own; a batch may end one
    epoch and begin the next, or hold several of a small data set. ``batch`` is its size in images;
    ``workers`` = 0 assembles batches in the calling process.

    Of ``ranks`` ranks that share each batch, this one, ``rank``, has its share of equal size: their
    shares one after the other are the batch that one process alone would have.
    """

    def __init__(
        self,
        data: SegmentationData,
        *,
        seed: int,
        batch: int,
        augmentation: Augmentation,
        workers: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.data, self.seed, self.size = data, seed, batch
        share = batch // ranks
        self._slots = range(rank * share, (rank + 1) * share)
        self.augmentation, self.workers = augmentation, workers
        self._epoch: tuple[int, np.ndarray] | None = None

    def batch(self, index: int, device: torch.device = CPU) -> Batch:
        """Return batch ``index``, augmented on ``device``."""
        return self.augmentation.apply(self.gathered(index).to(device))

    def gathered(self, index: int) -> Gathered:
        """Return what batch ``index`` is made from: the work of a loader process.

        Raises:
            UserError: a file cannot be used.
        """
        visits = [index * self.size + slot for slot in self._slots]
        samples = [self.data[self.sample_index(visit)] for visit in visits]
        draws = [self.augmentation.draw(self.seed, index, slot) for slot in self._slots]
        return self.augmentation.gather(samples, draws)

    def sample_index(self, visit: int) -> int:
        """Return which image the ``visit``-th sample of the run is."""
        epoch, place = divmod(visit, len(self.data))
        if self._epoch is None or self._epoch[0] != epoch:
            order = generator(Stream.ORDER, self.seed, epoch).permutation(len(self.data))
            self._epoch = (epoch, order)
        return int(self._epoch[1][place])

    def __getitem__(self, index: int) -> Gathered | UserError:
        """Return batch ``index``, or what is wrong with a file as a value: raised in a loader
        process, the message would come back wrapped in that process's traceback."""
        try:
            return self.gathered(index)
        except UserError as error:
            return error

    def iterate(self, start: int, stop: int) -> Iterator[Gathered]:
        """Yield batches ``start`` to ``stop`` - 1 before augmentation, prefetched by the loader
        processes; in pinned memory where there is a GPU.

        Closing the iterator ends them.

        Raises:
            UserError: a file cannot be used.
            KdprofError: a loader process died.
        """
        # In a list that is emptied at the latest when Python exits: a loader that something still
        # holds then, a traceback for one, would leave processes that Python waits for in vain.
        loader = [
            iter(
                DataLoader(
                    self,
                    batch_size=None,
                    sampler=range(start, stop),
                    num_workers=self.workers,
                    prefetch_factor=PREFETCHED if self.workers else None,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=_loader_process,
                    # Its own, or starting a loader would draw from torch's global generator.
                    generator=torch.Generator(),
                )
            )
        ]
        atexit.register(loader.clear)
        try:
            while (batch := _next(loader)) is not None:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            loader.clear()
            atexit.unregister(loader.clear)


def _next(loader: list[Iterator[Gathered | UserError]]) -> Gathered | UserError | None:
    """Return the next item, None after the last one."""
    try:
        return next(loader[0], None)
    except Exception as error:
        # Or the loader would live, with its processes, as long as the traceback.
        traceback.clear_frames(error.__traceback__)
        if not _tells_of_death(error):
            raise
        raise KdprofError(
            "a loader process died, most often for lack of memory or of space in /dev/shm; "
            "set data_settings.workers lower"
        ) from error


def _tells_of_death(error: Exception) -> bool:
    """Whether a loader process is gone; what a live one raised has another wording."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    # It went before the last batch it made was fetched from it.
    return isinstance(error, (ConnectionError, EOFError))


def _loader_process(worker: int) -> None:
    """Set up a loader process.

    One thread, so that it does not take the cores that the step computes on. Ctrl-C and Slurm
    signal every process of the job: only the main one may react, or it would find its loader dead
    in the middle of the step after which it means to save.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def evaluation_batches(data: SegmentationData, batch: int) -> Iterator[Batch]:
    """Yield every image once, in order, whole and unchanged, up to ``batch`` neighbours of one
    size together.

    Raises:
        UserError: a file cannot be used.
    """
    waiting: list[Batch] = []
    for index in range(len(data)):
        image, label = data[index]
        if waiting and (len(waiting) == batch or waiting[0][0].shape != image.shape):
            yield _stacked(waiting)
            waiting = []
        waiting.append((image, label))
    if waiting:
        yield _stacked(waiting)


def _stacked(samples: list[Batch]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)
