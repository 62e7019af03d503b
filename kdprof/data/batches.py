"""Batches: batch i of a run is a pure function of (data, seed, i), not of earlier batches."""

from __future__ import annotations

import atexit
import signal
import traceback
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdprof.data.augment import Augmentation, Gathered
from kdprof.data.base import SegmentationData
from kdprof.data.random_streams import Stream, generator
from kdprof.errors import KdprofError, UserError

Batch = tuple[Tensor, Tensor]
"""Images uint8 (N, 3, h, w) and labels uint8 (N, h, w), 255 where void."""
CPU = torch.device("cpu")
PREFETCHED = 2
"""Batches that each loader process prepares ahead."""
ENDLESS = 2**40
"""Batches of a loader that runs until it is closed."""


class Batches(Dataset):
    """The training batches of one seed.

    Samples are visited epoch by epoch, each epoch in another permutation; a batch may end one epoch
    and begin the next, or contain several epochs of a small data set. ``batch`` is its size in
    images; ``workers`` = 0 assembles batches in the calling process.

    If ``ranks`` processes share each batch, these are the batches of process ``rank``. The shares
    have equal size; joined in the order of ranks, they are the batch that a single process would
    have.
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
        """Return batch ``index`` before augmentation. This is the work of a loader process.

        Raises:
            UserError: a file cannot be used.
        """
        visits = [index * self.size + slot for slot in self._slots]
        samples = [self.data[self.sample_index(visit)] for visit in visits]
        draws = [self.augmentation.draw(self.seed, index, slot) for slot in self._slots]
        return self.augmentation.gather(samples, draws)

    def sample_index(self, visit: int) -> int:
        """Return the index of the image that is the ``visit``-th sample of the run."""
        epoch, place = divmod(visit, len(self.data))
        if self._epoch is None or self._epoch[0] != epoch:
            order = generator(Stream.ORDER, self.seed, epoch).permutation(len(self.data))
            self._epoch = (epoch, order)
        return int(self._epoch[1][place])

    def __getitem__(self, index: int) -> Gathered | UserError:
        """Return batch ``index`` before augmentation, or the error of a file as a value. If a
        loader process raised it, the message would arrive wrapped in that process's traceback."""
        try:
            return self.gathered(index)
        except UserError as error:
            return error

    def iterate(self, start: int, stop: int) -> Generator[Gathered, None, None]:
        """Yield batches ``start`` to ``stop`` - 1 before augmentation, prefetched by the loader
        processes; in pinned memory if the machine has a GPU.

        Closing the generator ends the loader processes.

        Raises:
            UserError: a file cannot be used.
            KdprofError: a loader process died.
        """
        # The loader is in a list, which is emptied at the latest when Python exits. If something,
        # such as a traceback, still held the loader then, Python would wait for its processes
        # forever.
        loader: list[Iterator[Gathered | UserError]] = [
            iter(
                DataLoader(
                    self,
                    batch_size=None,
                    sampler=range(start, stop),
                    num_workers=self.workers,
                    prefetch_factor=PREFETCHED if self.workers else None,
                    pin_memory=torch.cuda.is_available(),
                    worker_init_fn=_loader_process,
                    # Without it, starting a loader would draw from torch's global generator.
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
        # Otherwise the traceback would keep the loader and its processes alive.
        traceback.clear_frames(error.__traceback__)
        if not _says_that_a_process_died(error):
            raise
        raise KdprofError(
            "a loader process died, most often because memory or space in /dev/shm ran out; "
            "set data_settings.workers lower"
        ) from error


def _says_that_a_process_died(error: Exception) -> bool:
    """Return whether a loader process is gone. Errors of a live process have other messages."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    # The process died before its last batch was fetched from it.
    return isinstance(error, (ConnectionError, EOFError))


def _loader_process(worker: int) -> None:
    """Set up a loader process.

    It has one thread, so that it does not take the cores that the step computes on. Ctrl-C and
    Slurm signal every process of the job, but only the main process may react: it finishes its step
    and saves, and needs the loader until then.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def evaluation_batches(data: SegmentationData, batch: int) -> Iterator[Batch]:
    """Yield every image once, in order, whole and unchanged. Up to ``batch`` consecutive images of
    the same size form a batch.

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
