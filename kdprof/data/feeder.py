"""From the loader to the step's device: the next batch is copied and augmented during a step."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator, Iterator

import torch

from kdprof.data.batches import Batch, Batches
from kdprof.pauses import running_s, stopped_s


class Feeder(Iterator[Batch]):
    """The batches ``start`` to ``stop`` - 1 of a loader, augmented, on the device.

    On a GPU the next batch is copied from pinned memory and augmented in a separate stream, at the
    same time as the step on the current batch. On a CPU nothing can run at the same time, and
    nothing is done ahead. No call waits for the device.

    Args:
        device: where the batches go; a GPU must be the current one.

    Raises:
        UserError: a file cannot be used. It is raised when that batch is requested, on a GPU when
            the batch before it is requested.
        KdprofError: a loader process died.
    """

    def __init__(self, batches: Batches, device: torch.device, start: int, stop: int):
        self._source = batches.iterate(start, stop)
        self._augment, self._device = batches.augmentation.apply, device
        self._batches = self._one_ahead() if device.type == "cuda" else self._on_demand()
        self._waits = _waits_on(device)

    def __next__(self) -> Batch:
        """Return the next batch. It is ready for all work that is queued after this call."""
        self._waits.begin()
        batch = next(self._batches, None)
        self._waits.end()
        if batch is None:
            raise StopIteration
        return batch

    def _on_demand(self) -> Generator[Batch, None, None]:
        for gathered in self._source:
            yield self._augment(gathered)

    def _one_ahead(self) -> Generator[Batch, None, None]:
        stream = _side_stream(self._device)
        following = self._queued(stream)
        while (batch := following) is not None:
            # Recorded before the next batch is queued, because the step must not wait for that.
            ready = stream.record_event()
            following = self._queued(stream)
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready)
            for tensor in batch:
                # Otherwise a later batch would get its memory while the step still reads it.
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

        On a GPU this is the time that the device was idle between two steps, up to the last step
        that it has reached; on a CPU it is the time spent in the loader and in augmentation.
        """
        return self._waits.total_s()

    def forget_waits(self) -> None:
        """Set ``waited_s`` to 0."""
        self._waits = _waits_on(self._device)

    def close(self) -> None:
        """End the loader processes."""
        self._batches.close()
        self._source.close()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that all feeders of a GPU use. Memory that one stream has freed cannot
    be used by another, and a measurement makes a feeder in every round."""
    return torch.cuda.Stream(device)


class _CpuWaits:
    """Waits measured by the host's clock."""

    def __init__(self) -> None:
        self._total_s = self._began = 0.0

    def begin(self) -> None:
        self._began = running_s()

    def end(self) -> None:
        self._total_s += running_s() - self._began

    def total_s(self) -> float:
        return self._total_s


class _GpuWaits:
    """Waits measured between events in the step's stream.

    A wait begins when the device has finished all earlier work or when the host requests the batch,
    whichever is later. It ends when the batch is ready. Time in which this process was stopped does
    not count; if the device had work meanwhile, the wait is too short by that time.
    """

    def __init__(self) -> None:
        self._total_s = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, float]] = deque()
        self._began: torch.cuda.Event | None = None
        self._stopped_before_s = 0.0

    def begin(self) -> None:
        self._stopped_before_s = stopped_s()
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def end(self) -> None:
        assert self._began is not None, "a wait that never began has ended"
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._pending.append((self._began, ended, stopped_s() - self._stopped_before_s))
        # Add up finished waits now, because a run that never reads the sum would keep all events.
        self.total_s()

    def total_s(self) -> float:
        while self._pending and self._pending[0][1].query():
            began, ended, stopped = self._pending.popleft()
            self._total_s += max(0.0, began.elapsed_time(ended) / 1e3 - stopped)
        return self._total_s


def _waits_on(device: torch.device) -> _GpuWaits | _CpuWaits:
    return _GpuWaits() if device.type == "cuda" else _CpuWaits()
