"""StepFeed: a training step together with its batches; only this class combines the two."""

from __future__ import annotations

from torch import Tensor

from kdprof.data import Batches, Feeder
from kdprof.data.batches import Batch
from kdprof.step import Mark, TrainStep, ignore_phase


class StepFeed:
    """A training step that takes the loader's batches, or repeats one resident batch.

    If several ranks run the step, rank 0 must announce it before its batch is fetched, so that all
    ranks fetch their shares at the same time.

    Args:
        batches: the loader's batches.
        resident: the batch to repeat, on the step's device; batch 0 if not given.
    """

    def __init__(self, step: TrainStep, batches: Batches, resident: Batch | None = None):
        self.step, self.batches = step, batches
        self._feeder: Feeder | None = None
        self._resident = resident

    def begin(self, start: int, stop: int) -> None:
        """Start the loader for batches ``start`` to ``stop`` - 1; a running loader is stopped."""
        self.close()
        self.step.lead.feed(start, stop)
        self._feeder = Feeder(self.batches, self.step.device, start, stop)

    def take_over(self, other: StepFeed) -> None:
        """Go on with another step's running loader, instead of that step."""
        self.close()
        self.step.lead.take_over(other.step.lead.number)
        self._feeder, other._feeder = other._feeder, None

    def advance(self, iteration: int, *, position: float | None = None) -> dict[str, Tensor]:
        """Take one step on the loader's next batch and return its loss terms.

        Args:
            position: position in the learning-rate schedule; the iteration if not given.
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
        """Reset ``waited_s`` to 0."""
        if self._feeder:
            self._feeder.forget_waits()

    def close(self) -> None:
        """Stop the loader processes."""
        if self._feeder is not None:
            self._feeder.close()
            self._feeder = None


def _position(iteration: int, position: float | None) -> float:
    return iteration if position is None else position
