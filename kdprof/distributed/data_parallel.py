"""Data-parallel modules: averaged gradients (DistributedDataParallel), synchronised batch norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdprof.distributed.ranks import Ranks
from kdprof.errors import UserError


class CallableModule(nn.Module):
    """A module, or one of its methods, wrapped as a module that can be made data-parallel."""

    def __init__(self, module: nn.Module, name: str = "__call__"):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *inputs: Any) -> Any:
        """Make the call."""
        return getattr(self.module, self.name)(*inputs)


def data_parallel(call: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
    """Return a module whose backward averages the gradients of ``parameters`` over the ranks; the
    module itself if it has none of them.

    If backward does not reach one of them, the next forward raises an error. Buffers are not
    broadcast: a broadcast would hide that a method's state differs between ranks.
    """
    mine = {id(p) for p in parameters if p.requires_grad}
    others = [key for key, p in call.named_parameters() if id(p) not in mine]
    if len(others) == len(list(call.parameters())):
        return call
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, others)
    return DistributedDataParallel(call, broadcast_buffers=False)


def leaves_of(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Return the leaves that tensors were computed from and that need a gradient."""
    found: set[Tensor] = set()
    seen: set[Node] = set()
    waiting: list[Node | None] = []
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
    """Make the batch norms inside a module normalise over the batches of all ranks.

    Raises:
        UserError: a batch norm contains an activation, which would be lost.
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
    # The same parameter objects, because other code, such as an optimiser, may hold them.
    made.weight, made.bias, made.ranks = norm.weight, norm.bias, ranks
    made.load_state_dict(norm.state_dict())
    return made.train(norm.training)


class _SyncBatchNormOnCpu(nn.BatchNorm2d):
    """Synchronised batch norm for equal shares of a batch; torch's SyncBatchNorm needs GPUs."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``, (N, C, H, W)."""
        if not self.training:
            return super().forward(x)
        mean = self._over_ranks(x.mean((0, 2, 3)))
        centred = x - mean[:, None, None]
        variance = self._over_ranks(centred.square().mean((0, 2, 3)))
        count = x.numel() // x.shape[1] * self.ranks.size
        self._update_statistics(mean.detach(), variance.detach() * count / max(1, count - 1))
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor) -> None:
        # They exist, because this module was made with running statistics.
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # as in torch: the mean over all batches
            momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return _Mean.apply(values, self.ranks)


class _Mean(torch.autograd.Function):
    """The mean over the ranks; backward averages the gradients, as every rank's loss uses it."""

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
