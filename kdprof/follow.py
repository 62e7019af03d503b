"""What every rank but the first does: as rank 0 says, on its own share of each batch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdprof.data import Batches, Feeder
from kdprof.data.batches import Batch
from kdprof.models import SegmentationNetwork
from kdprof.parallel import Ranks, StepOrder
from kdprof.resolve import ResolvedStudy
from kdprof.step import TrainStep


@dataclass
class _Made:
    """A step with what it is fed."""

    step: TrainStep
    batches: Batches
    resident: Batch | None = None
    feeder: Feeder | None = None


def follow(ranks: Ranks, resolve: Callable[[], ResolvedStudy]) -> None:
    """Do what rank 0 tells, until it says that this is the end.

    Signals are left to rank 0: it saves, and ends the group.

    Args:
        resolve: makes the study with these ranks; called when rank 0 makes its first step, so that
            until then nothing of this process lies on the GPU.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    follower: _Follower | None = None
    while (order := ranks.hear()) != {"do": "end"}:
        follower = follower or _Follower(resolve(), ranks)
        follower.obey(order)
    if follower is not None:
        follower.forget()
    ranks.leave()


class _Follower:
    def __init__(self, study: ResolvedStudy, ranks: Ranks):
        self._study, self._ranks = study, ranks
        self._teacher: SegmentationNetwork | None = None
        self._made: dict[int, _Made] = {}

    def obey(self, order: StepOrder | dict[str, Any]) -> None:
        """Do what an order says."""
        if isinstance(order, StepOrder):
            self._step(order)
            return
        arguments = {key: value for key, value in order.items() if key != "do"}
        {
            "make": self._make,
            "teacher": self._receive_teacher,
            "load": self._load,
            "feed": self._feed,
            "forget": self.forget,
        }[order["do"]](**arguments)

    def _make(
        self, name: str | None, seed: int = 0, iterations: int = 0, teacher: bool = False
    ) -> None:
        """Make the step of a method, or (None) the one that trains the teacher."""
        if name is None:
            made = _Made(self._study.teacher_step(), self._study.teacher_batches())
        else:
            given = self._teacher if teacher else None
            step = self._study.step(name, given, seed=seed, iterations=iterations)
            made = _Made(step, self._study.batches(seed))
        self._made[made.step.lead.number] = made

    def _receive_teacher(self) -> None:
        network = self._study.placed_teacher()
        network.load_state_dict(self._ranks.share())
        self._teacher = self._study.frozen(network)

    def _load(self, step: int) -> None:
        self._made[step].step.load_state_dict(self._ranks.share())

    def _feed(self, step: int, start: int, stop: int) -> None:
        made = self._made[step]
        if made.feeder is not None:
            made.feeder.close()
        made.feeder = Feeder(made.batches, made.step.device, start, stop)

    def _step(self, order: StepOrder) -> None:
        made = self._made[order.step]
        if order.fed:
            batch = next(made.feeder)
        else:
            made.resident = made.resident or made.batches.batch(0, made.step.device)
            batch = made.resident
        made.step(*batch, order.iteration, position=order.position)

    def forget(self) -> None:
        """Drop every step, and what feeds it."""
        for made in self._made.values():
            if made.feeder is not None:
                made.feeder.close()
        self._made.clear()
