"""From the loader to the step's device: copied and augmented while the step before still runs."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator

import torch

from kdprof.data.batches import Batch, Batches


class Feeder(Iterator[Batch]):
    """The batches ``start`` to ``stop`` - 1 of a loader, augmented, on the device.

    On a GPU the next batch is copied from pinned memory and augmented in a stream of its own, so
    that the step on this one hides both. On a CPU there is nothing to hide behind, and nothing is
    done ahead. No call waits for the device.

    Args:
        device: where the batches go; a GPU must be the current one.

    Raises:
        UserError: a file cannot be used; when the batch is asked for, on a GPU the one before it.
        KdprofError: a loader process died.
    """

    def __init__(self, batches: Batches, device: torch.device, start: int, stop: int):
        self._source = batches.iterate(start, stop)
        self._augment, self._device = batches.augmentation.apply, device
        self._batches = self._one_ahead() if device.type == "cuda" else self._at_once()
        self._waits = _waits_on(device)

    def __next__(self) -> Batch:
        """Return the next batch; what is queued after this call finds it ready."""
        self._waits.begin()
        batch = next(self._batches, None)
        self._waits.end()
        if batch is None:
            raise StopIteration
        return batch

    def _at_once(self) -> Iterator[Batch]:
        for gathered in self._source:
            yield self._augment(gathered)

    def _one_ahead(self) -> Iterator[Batch]:
        stream = _side_stream(self._device)
        following = self._queued(stream)
        while (batch := following) is not None:
            # Before the next one is queued: the step must not wait for that.
            ready = stream.record_event()
            following = self._queued(stream)
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready)
            for tensor in batch:
                # Or its memory would go to a later batch while the step still reads it.
                tensor.record_stream(current)
            yield batch

    def _queued(self, stream: torch.cuda.Stream) -> Batch | None:
        gathered = next(self._source, None)
        if gathered is None:
            return None
        with torch.cuda.stream(stream):
            return self._augment(gathered.to(self._device))

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for their batches so far.

        On a GPU those that the device idled between two steps, up to the last that it has come to;
        on a CPU those spent in the loader and in augmentation.
        """
        return self._waits.total_s()

    def forget_waits(self) -> None:
        """Count ``waited_s`` from here."""
        self._waits = _waits_on(self._device)

    def close(self) -> None:
        """End the loader processes."""
        self._batches.close()
        self._source.close()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of every feeder of a GPU: memory that one stream has given back is of no
    use to another, and a measurement makes a feeder in every round."""
    return torch.cuda.Stream(device)


class _CpuWaits:
    """Waits by the host's clock."""

    def __init__(self) -> None:
        self._total_s = self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self._total_s += time.perf_counter() - self._began

    def total_s(self) -> float:
        return self._total_s


class _GpuWaits:
    """Waits between events in the step's stream: from where the device has done all that came
    before, or the host asks, whichever is later, to where the batch is there."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began: torch.cuda.Event | None = None

    def begin(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def end(self) -> None:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._pending.append((self._began, ended))
        # Read what has happened, or a run that never asks would keep its every event.
        self.total_s()

    def total_s(self) -> float:
        while self._pending and self._pending[0][1].query():
            began, ended = self._pending.popleft()
            self._total_s += began.elapsed_time(ended) / 1e3
        return self._total_s


def _waits_on(device: torch.device) -> _GpuWaits | _CpuWaits:
    return _GpuWaits() if device.type == "cuda" else _CpuWaits()
