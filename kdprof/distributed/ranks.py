"""The group of processes that run one step together: how it starts, and rank 0's orders.

Rank 0 leads. It alone measures time, writes records and decides, and it orders what the others do
next; they follow (:mod:`kdprof.resolve.follow`).
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
"""How long a rank waits for an order while rank 0 evaluates, measures or saves. If rank 0 dies, the
closed connection shows it at once."""
_BROKEN = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|TCPStore", re.IGNORECASE
)


class LostContact(KdprofError):
    """The error that another rank ended; the group is restarted from the last checkpoint."""

    exit_code = 75


def lost_contact(error: BaseException) -> bool:
    """Return True if an error means that another rank has ended."""
    broken = isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
    return isinstance(error, dist.DistError) or broken


@dataclass(frozen=True)
class Place:
    """The place of a process in its group.

    Attributes:
        rendezvous: the URL at which the group meets, in the form of ``torch.distributed``.
    """

    rank: int
    size: int
    rendezvous: str = "env://"

    @classmethod
    def from_environment(cls) -> Place | None:
        """Return the place that torchrun gave this process; None if torchrun did not start it.

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
                f"{size} processes on several machines, {local} here: a run's GPUs must be in one "
                "machine; use one node"
            )
        return cls(rank, size)


class StepOrder(NamedTuple):
    """The order to run the next step."""

    step: int
    """Number of the TrainStep, in the order they were made."""
    iteration: int
    position: float
    """Position in the learning-rate schedule."""
    from_loader: bool
    """True if the step takes the loader's next batch, False if it takes the resident one."""


Order = StepOrder | dict[str, Any]


class Ranks:
    """The group of processes that run one step together.

    Args:
        device: ``cuda`` or ``cpu``; gradients go over NCCL or gloo, orders over gloo.
    """

    def __init__(self, place: Place, device: str):
        self.rank, self.size = place.rank, place.size
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        """How often torchrun has restarted the group."""
        store, *_ = next(rendezvous(place.rendezvous, place.rank, place.size))
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            # One prefix per attempt: torchrun keeps the store, with addresses of dead processes.
            store=dist.PrefixStore(f"attempt-{self.restarts}", store),
            rank=place.rank,
            world_size=place.size,
        )
        self._orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        # A separate group: its collectives have no common order with DistributedDataParallel's.
        self.norms = dist.new_group() if device == "cpu" else dist.group.WORLD
        self.pids = self._all_pids()
        self._steps = 0

    @property
    def leads(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def _all_pids(self) -> frozenset[int]:
        pids = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(pids, torch.tensor([os.getpid()]), group=self._orders)
        return frozenset(int(pid) for pid in pids)

    def number(self) -> int:
        """Return the number of a new step: the same on every rank."""
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
        """Return rank 0's state on every rank, on the CPU. Received data cannot run code."""
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

    # Within a step, and the end

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks; detached."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def end(self) -> None:
        """Order the other ranks to end, and leave the group; called on rank 0."""
        self.send({"do": "end"})
        self.leave()

    def leave(self) -> None:
        """Leave the group: its threads must end before Python does."""
        dist.destroy_process_group()


class Lead:
    """Rank 0's announcements of one step to the other ranks.

    It does nothing on the other ranks, or if there are none.

    Attributes:
        number: number of the step within the group.
    """

    def __init__(self, ranks: Ranks | None):
        self.number = ranks.number() if ranks else 0
        self._ranks = ranks if ranks and ranks.leads else None

    def step(self, iteration: int, position: float, *, from_loader: bool) -> None:
        """Announce a step before its batch is fetched, so that all ranks fetch at the same time."""
        if self._ranks:
            self._ranks.send(StepOrder(self.number, iteration, position, from_loader))

    def feed(self, start: int, stop: int) -> None:
        """Announce that the step's batches ``start`` to ``stop`` - 1 come next."""
        if self._ranks:
            self._ranks.send({"do": "feed", "step": self.number, "start": start, "stop": stop})

    def take_over(self, other: int) -> None:
        """Announce that the step goes on with the running loader of the step numbered ``other``."""
        if self._ranks:
            self._ranks.send({"do": "take_over", "step": self.number, "other": other})

    def give_up(self, error: Exception) -> None:
        """Make the group restart after an error within a step, because it is not known how far the
        other ranks have come in it.

        Raises:
            LostContact: the group has other ranks.
        """
        if self._ranks:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise LostContact(f"{cause}; all {self._ranks.size} processes start again") from error

    def load(self, state: Mapping[str, Any]) -> None:
        """Send the state that this step has loaded to the other ranks."""
        if self._ranks:
            self._ranks.send({"do": "load", "step": self.number})
            self._ranks.share(state)
