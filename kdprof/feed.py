"""StepFeed: a training step with the batches that it is fed; nothing else pairs the two."""

from __future__ import annotations

from torch import Tensor

from kdprof.data import Batches, Feeder
from kdprof.data.batches import Batch
from kdprof.step import Mark, TrainStep, ignore_phase


class StepFeed:
    """A step that advances on the loader's batches, or again and again on one resident batch.

    Where several ranks make the step, a step must be announced before its batch is fetched, so that
    all ranks fetch theirs at once.

    Args:
        batches: the loader that feeds the step in training.
        resident: the batch to repeat, on the step's device; batch 0 if not given.
    """

    def __init__(self, step: TrainStep, batches: Batches, resident: Batch | None = None):
        self.step, self.batches = step, batches
        self._feeder: Feeder | None = None
        self._resident = resident

    def begin(self, start: int, stop: int) -> None:
        """Start the loader at batches ``start`` to ``stop`` - 1, in place of a running one."""
        self.close()
        self.step.lead.feed(start, stop)
        self._feeder = Feeder(self.batches, self.step.device, start, stop)

    def advance(self, iteration: int, *, position: float | None = None) -> dict[str, Tensor]:
        """Take one step on the loader's next batch and return its loss terms.

        Args:
            position: in the learning-rate schedule; that of the iteration if not given.
        """
        assert self._feeder is not None, "begin() starts the loader"
        self.step.lead.step(iteration, _position(iteration, position), from_loader=True)
        images, labels = next(self._feeder)
        return self.step(images, labels, iteration, position=position)

    def repeat(
        self, iteration: int, mark: Mark = ignore_phase, *, position: float | None = None
    ) -> dict[str, Tensor]:
        """Take one step on the resident batch."""
        self.step.lead.step(iteration, _position(iteration, position), from_loader=False)
        self._resident = self._resident or self.batches.batch(0, self.step.device)
        return self.step(*self._resident, iteration, mark, position=position)

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for their batches since :meth:`forget_waits`."""
        return self._feeder.waited_s if self._feeder else 0.0

    def forget_waits(self) -> None:
        """Count ``waited_s`` from here."""
        if self._feeder:
            self._feeder.forget_waits()

    def close(self) -> None:
        """End the loader processes."""
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None


def _position(iteration: int, position: float | None) -> float:
    return iteration if position is None else position
