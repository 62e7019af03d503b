"""Steps that several ranks run together: rank 0 announces what it does, the others follow."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdprof.distributed.ranks import Ranks, StepOrder
from kdprof.method import Network
from kdprof.models import AnyNetwork
from kdprof.resolve.factory import MEASURED_ITERATIONS, Factory
from kdprof.step import TrainStep
from kdprof.step_feed import StepFeed

if TYPE_CHECKING:
    from kdprof.resolve.study import ResolvedStudy


class LeadingFactory(Factory):
    """Rank 0's factory: it orders the other ranks to create the same objects."""

    def __init__(self, study: ResolvedStudy, *, weights: bool, ranks: Ranks):
        super().__init__(study, weights=weights, ranks=ranks)
        self._group = ranks

    def frozen(self, teacher: AnyNetwork) -> AnyNetwork:
        """Return a teacher as steps use it, with the same weights on every rank."""
        self._order(do="teacher")
        self._group.share(teacher.state_dict())
        return super().frozen(teacher)

    def step(
        self,
        name: str,
        teacher: AnyNetwork | None,
        *,
        seed: int = 0,
        iterations: int = MEASURED_ITERATIONS,
        student: Network | None = None,
    ) -> TrainStep:
        """Return the step of a method, created on every rank."""
        made = {"name": name, "seed": seed, "iterations": iterations}
        self._order(do="make", **made, teacher=teacher is not None)
        return super().step(name, teacher, seed=seed, iterations=iterations, student=student)

    def teacher_step(self) -> TrainStep:
        """Return the step that trains the teacher, created on every rank."""
        self._order(do="make", name=None)
        return super().teacher_step()

    def forget_steps(self) -> None:
        """Order the other ranks to free the steps created so far."""
        self._order(do="forget")

    def _order(self, **order: Any) -> None:
        self._group.send(order)


def follow(ranks: Ranks, resolve: Callable[[], ResolvedStudy]) -> None:
    """Carry out rank 0's orders, until it orders the end.

    Signals are left to rank 0, which saves and ends the group.

    Args:
        resolve: returns the study with these ranks. It is called at rank 0's first order, so that
            this process uses no GPU memory before.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    follower: _Follower | None = None
    while (order := ranks.receive()) != {"do": "end"}:
        follower = follower or _Follower(resolve(), ranks)
        follower.obey(order)
    if follower is not None:
        follower.forget()
    ranks.leave()


class _Follower:
    def __init__(self, study: ResolvedStudy, ranks: Ranks):
        self._study, self._ranks = study, ranks
        self._teacher: AnyNetwork | None = None
        self._feeds: dict[int, StepFeed] = {}

    def obey(self, order: StepOrder | dict[str, Any]) -> None:
        """Carry out an order."""
        if isinstance(order, StepOrder):
            self._step(order)
            return
        arguments = {key: value for key, value in order.items() if key != "do"}
        actions: dict[str, Callable[..., None]] = {
            "make": self._make,
            "teacher": self._receive_teacher,
            "load": self._load,
            "feed": self._feed,
            "take_over": self._take_over,
            "forget": self.forget,
        }
        actions[order["do"]](**arguments)

    def _make(
        self, name: str | None, seed: int = 0, iterations: int = 0, teacher: bool = False
    ) -> None:
        """Create the step of a method, or (``name`` None) the one that trains the teacher."""
        factory = self._study.factory
        if name is None:
            feed = StepFeed(factory.teacher_step(), factory.batches(0, "teacher"))
        else:
            given = self._teacher if teacher else None
            step = factory.step(name, given, seed=seed, iterations=iterations)
            feed = StepFeed(step, factory.batches(seed))
        self._feeds[feed.step.lead.number] = feed

    def _receive_teacher(self) -> None:
        network = self._study.factory.placed_teacher()
        network.load_state_dict(self._ranks.share())
        self._teacher = self._study.factory.frozen(network)

    def _load(self, step: int) -> None:
        self._feeds[step].step.load_state_dict(self._ranks.share())

    def _feed(self, step: int, start: int, stop: int) -> None:
        self._feeds[step].begin(start, stop)

    def _take_over(self, step: int, other: int) -> None:
        self._feeds[step].take_over(self._feeds[other])

    def _step(self, order: StepOrder) -> None:
        feed = self._feeds[order.step]
        advance = feed.advance if order.from_loader else feed.repeat
        advance(order.iteration, position=order.position)

    def forget(self) -> None:
        """Free every step and its loader."""
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()
