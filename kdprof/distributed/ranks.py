"""The group of processes that make one step together: where they meet, and rank 0's orders.

Rank 0 leads. It alone keeps the clock, the records and the decisions, and orders what the others
do next; they follow (:mod:`kdprof.resolve.follow`).
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from kdprof.errors import KdprofError, UserError

PATIENCE = timedelta(days=30)
"""How long a rank waits for an order: as long as the leader evaluates, measures or saves. A leader
that died is noticed at once, by its closed connection."""
_BROKEN = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|TCPStore", re.IGNORECASE
)


class LostContact(KdprofError):
    """Another rank ended; the group is started again from the last checkpoint."""

    exit_code = 75


def lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone."""
    told = isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
    return isinstance(error, dist.DistError) or told


@dataclass(frozen=True)
class Place:
    """A process's place in its group.

    Attributes:
        rendezvous: where the group meets, as ``torch.distributed`` wants it told.
    """

    rank: int
    size: int
    rendezvous: str = "env://"

    @classmethod
    def from_environment(cls) -> Place | None:
        """Return the place that torchrun gave this process; None where it did not start it.

        Raises:
            UserError: the group spans several machines.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        rank, size, local = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        )
        if local != size:
            raise UserError(
                f"{size} processes on several machines, {local} here: a run's GPUs are all in one "
                "machine; use one node"
            )
        return cls(rank, size)


class StepOrder(NamedTuple):
    """The next step of the leader's."""

    step: int
    """Number of the TrainStep, in the order they were made."""
    iteration: int
    position: float
    """In the learning-rate schedule."""
    from_loader: bool
    """Whether its batch is the loader's next one; else it is the resident one."""


Order = StepOrder | dict[str, Any]


class Ranks:
    """The group of processes that make one step together.

    Args:
        device: ``cuda`` or ``cpu``; gradients go over NCCL or gloo, orders over gloo.
    """

    def __init__(self, place: Place, device: str):
        self.rank, self.size = place.rank, place.size
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        """Times that torchrun has started the group again."""
        store, *_ = next(rendezvous(place.rendezvous, place.rank, place.size))
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            # Apart: torchrun keeps the store, with the addresses of those that are dead.
            store=dist.PrefixStore(f"attempt-{self.restarts}", store),
            rank=place.rank,
            world_size=place.size,
        )
        self._orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        # Of its own: backward's collectives and DistributedDataParallel's have no common order.
        self.norms = dist.new_group() if device == "cpu" else dist.group.WORLD
        self.pids = self._all_pids()
        self._steps = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def _all_pids(self) -> frozenset[int]:
        pids = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(pids, torch.tensor([os.getpid()]), group=self._orders)
        return frozenset(int(pid) for pid in pids)

    def number(self) -> int:
        """Return the number of a step that is being made: the same one on every rank."""
        self._steps += 1
        return self._steps

    # Orders

    def send(self, order: Order) -> None:
        """Order what the other ranks do next; called on rank 0."""
        if isinstance(order, StepOrder):
            self._send(torch.tensor([0, *order], dtype=torch.float64))
            return
        text = json.dumps(order).encode()
        self._send(torch.tensor([len(text), 0, 0, 0, 0], dtype=torch.float64))
        self._send(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def receive(self) -> Order:
        """Wait for rank 0's next order."""
        length, step, iteration, position, from_loader = self._received(5, torch.float64).tolist()
        if not length:
            return StepOrder(int(step), int(iteration), position, bool(from_loader))
        return json.loads(self._received(int(length), torch.uint8).numpy().tobytes())

    def share(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return rank 0's state on every rank, on the CPU. Runs no code from what is sent."""
        if self.leads:
            assert state is not None, "rank 0 gives the state"
            buffer = io.BytesIO()
            torch.save(state, buffer)
            content = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
            self._send(torch.tensor([len(content)], dtype=torch.float64))
            self._send(content)
            return dict(state)
        length = int(self._received(1, torch.float64))
        received = io.BytesIO(self._received(length, torch.uint8).numpy().tobytes())
        return torch.load(received, map_location="cpu", weights_only=True)

    def _send(self, values: Tensor) -> None:
        dist.broadcast(values, 0, group=self._orders)

    def _received(self, length: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(length, dtype=dtype)
        dist.broadcast(values, 0, group=self._orders)
        return values

    # A step's own

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks; detached."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def end(self) -> None:
        """Tell the other ranks that there is nothing more to do, and leave; rank 0's."""
        self.send({"do": "end"})
        self.leave()

    def leave(self) -> None:
        """Leave the group: threads that serve it must not meet the end of Python."""
        dist.destroy_process_group()


class Lead:
    """What rank 0 tells the others of one step; nothing where there are none, or on those.

    Attributes:
        number: of the step within the group.
    """

    def __init__(self, ranks: Ranks | None):
        self.number = ranks.number() if ranks else 0
        self._ranks = ranks if ranks and ranks.leads else None

    def step(self, iteration: int, position: float, *, from_loader: bool) -> None:
        """Announce a step; before its batch is fetched, so that all fetch theirs at once."""
        if self._ranks:
            self._ranks.send(StepOrder(self.number, iteration, position, from_loader))

    def feed(self, start: int, stop: int) -> None:
        """Announce that the step's batches ``start`` to ``stop`` - 1 come next."""
        if self._ranks:
            self._ranks.send({"do": "feed", "step": self.number, "start": start, "stop": stop})

    def give_up(self, error: Exception) -> None:
        """Have the group start again after an error within a step: nobody knows how far the
        others came in it.

        Raises:
            LostContact: where there are others.
        """
        if self._ranks:
            told = " ".join(str(error).split()) or type(error).__name__
            raise LostContact(f"{told}; all {self._ranks.size} processes start again") from error

    def load(self, state: Mapping[str, Any]) -> None:
        """Give the others the state that this step was set to."""
        if self._ranks:
            self._ranks.send({"do": "load", "step": self.number})
            self._ranks.share(state)
