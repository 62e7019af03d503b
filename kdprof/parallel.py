"""One run on many GPUs: a process per GPU, each making the same step on its share of the batch.

Rank 0 leads. It alone keeps the clock, the records and the decisions, and tells the others what
comes next; they follow (:mod:`kdprof.follow`). Gradients are averaged by torch's
DistributedDataParallel.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

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
    fed: bool
    """Whether its batch is the loader's next one; else it is the one that lies ready."""


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

    def tell(self, order: Order) -> None:
        """Tell the other ranks what comes next; rank 0's."""
        if isinstance(order, StepOrder):
            self._send(torch.tensor([0, *order], dtype=torch.float64))
            return
        text = json.dumps(order).encode()
        self._send(torch.tensor([len(text), 0, 0, 0, 0], dtype=torch.float64))
        self._send(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def hear(self) -> Order:
        """Wait for rank 0's next order."""
        length, step, iteration, position, fed = self._received(5, torch.float64).tolist()
        if not length:
            return StepOrder(int(step), int(iteration), position, bool(fed))
        return json.loads(self._received(int(length), torch.uint8).numpy().tobytes())

    def share(self, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return rank 0's state on every rank, on the CPU. Runs no code from what is sent."""
        if self.leads:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            content = torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)
            self._send(torch.tensor([len(content)], dtype=torch.float64))
            self._send(content)
            return dict(state)
        length = int(self._received(1, torch.float64))
        content = self._received(length, torch.uint8).numpy().tobytes()
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

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
        self.tell({"do": "end"})
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

    def step(self, iteration: int, position: float, *, fed: bool) -> None:
        """Announce a step; before its batch is fetched, so that all fetch theirs at once."""
        if self._ranks:
            self._ranks.tell(StepOrder(self.number, iteration, position, fed))

    def feed(self, start: int, stop: int) -> None:
        """Announce that the step's batches ``start`` to ``stop`` - 1 come next."""
        if self._ranks:
            self._ranks.tell({"do": "feed", "step": self.number, "start": start, "stop": stop})

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
            self._ranks.tell({"do": "load", "step": self.number})
            self._ranks.share(state)


# What is wrapped


class Call(nn.Module):
    """A module, or one of its methods, as a module: what can be made data-parallel."""

    def __init__(self, module: nn.Module, name: str = "__call__"):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *inputs: Any) -> Any:
        """Make the call."""
        return getattr(self.module, self.name)(*inputs)


def data_parallel(call: nn.Module, parameters: Iterable[nn.Parameter]) -> nn.Module:
    """Return a module whose backward averages the gradients of these of its parameters over the
    ranks; the module itself where it has none of them.

    A parameter that backward does not reach is an error at the next forward. Buffers stay each
    rank's own: a broadcast would hide that a method's state differs.
    """
    mine = {id(p) for p in parameters if p.requires_grad}
    others = [key for key, p in call.named_parameters() if id(p) not in mine]
    if len(others) == len(list(call.parameters())):
        return call
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, others)
    return DistributedDataParallel(call, broadcast_buffers=False)


def leaves_of(outputs: Iterable[Tensor]) -> set[nn.Parameter]:
    """Return the leaves that tensors were computed from and that need a gradient."""
    found, seen = set(), set()
    waiting = []
    for output in outputs:
        if output.grad_fn is not None:
            waiting.append(output.grad_fn)
        elif output.requires_grad:
            found.add(output)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [earlier for earlier, _ in node.next_functions]
    return found


def synchronize_norms(module: nn.Module, ranks: Ranks, skip: Collection[nn.Module] = ()) -> None:
    """Let the batch norms inside a module normalise over the batches of all ranks.

    Raises:
        UserError: a batch norm with an activation of its own, which this would lose.
    """
    for name, child in module.named_children():
        if child in skip:
            continue
        if not isinstance(child, _BatchNorm):
            synchronize_norms(child, ranks, skip)
        elif type(child) is nn.BatchNorm2d:
            setattr(module, name, _synchronized(child, ranks))
        else:
            raise UserError(
                f"step.sync_batchnorm: {type(child).__name__} cannot be synchronised; set "
                "step.sync_batchnorm = false"
            )


def _synchronized(norm: nn.BatchNorm2d, ranks: Ranks) -> nn.Module:
    if norm.weight is not None and norm.weight.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm, ranks.norms)
    made = _SyncBatchNormOnCpu(norm.num_features, norm.eps, norm.momentum, norm.affine)
    # The same parameters, or what else holds them would train others.
    made.weight, made.bias, made.ranks = norm.weight, norm.bias, ranks
    made.load_state_dict(norm.state_dict())
    return made.train(norm.training)


class _SyncBatchNormOnCpu(nn.BatchNorm2d):
    """torch's SyncBatchNorm, which runs on GPUs only, written out for batches of equal shares."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        if not self.training:
            return super().forward(x)
        mean = self._over_ranks(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = self._over_ranks(centred.square().mean((0, 2, 3)))
        count = x.numel() // x.shape[1] * self.ranks.size
        self._follow(mean.detach(), variance.detach() * count / max(1, count - 1))
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return _Mean.apply(values, self.ranks)


class _Mean(torch.autograd.Function):
    """The mean over the ranks, which every rank's loss depends on."""

    @staticmethod
    def forward(context: Any, values: Tensor, ranks: Ranks) -> Tensor:
        context.ranks = ranks
        return _averaged(values, ranks)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _averaged(gradient, context.ranks), None


def _averaged(values: Tensor, ranks: Ranks) -> Tensor:
    total = values.clone()
    dist.all_reduce(total, group=ranks.norms)
    return total / ranks.size
