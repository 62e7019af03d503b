"""Fake tensors: networks, methods and steps that have shapes and types but no values."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kdprof.measure.counting.gpu_autocast import autocast_off
from kdprof.measure.counting.recipes import Recipes

CPU = torch.device("cpu")
DEVICE = torch.ops.prim.device.default
"""The query for a tensor's device, which torch makes several times per operator on fakes."""


@functools.cache
def _is_fused_optimizer(func: Any) -> bool:
    fused = isinstance(func, OpOverload) and func._opname.startswith("_fused_")
    return fused and not func._schema.returns


class CountingMode(FakeTensorMode):
    """The mode under which steps are counted. Steps counted under one mode may share networks; what
    they have in common is then counted once.

    It does not run fused optimisers: torch has no fake kernel for them and would run the real one
    on zeros of the parameters' full size, which takes memory and seconds. They return nothing, so
    no result is missing.

    Attributes:
        known: what the steps before have done, by all that it depends on.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.known: dict[Hashable, Any] = {}
        self.cache_enabled = False  # the recipes take its place
        self._recipes = Recipes(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and each guard against it takes microseconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator on fakes."""
        kwargs = kwargs or {}
        if func is DEVICE:
            return args[0].fake_device
        if _is_fused_optimizer(func):
            return None
        key = self._recipes.key(func, args, kwargs)
        if key is not None and self._recipes.knows(key):
            return self._recipes.make(key, args, kwargs)
        # Autocast has done its part. A fake kernel may call operators that it would cast again.
        with autocast_off():
            out = self.dispatch(func, types, args, kwargs)
        # Where the key has changed, the operator has changed the shape of an argument.
        if key is not None and key == self._recipes.key(func, args, kwargs):
            self._recipes.learn(key, args, kwargs, out)
        return out

    def replace_tensors(self, module: nn.Module) -> None:
        """Replace the parameters and buffers of a module by fakes on the CPU."""
        fakes: dict[int, Tensor] = {}
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = part._parameters, part._buffers
            for values in tables:
                for name, value in values.items():
                    if value is None or isinstance(value, FakeTensor):
                        continue
                    if id(value) not in fakes:  # one that is shared stays so
                        fakes[id(value)] = self._like(value)
                    values[name] = fakes[id(value)]

    def _like(self, value: Tensor) -> Tensor:
        plain = value.detach()
        fake = FakeTensor(self, plain, CPU) if plain.is_meta else self.from_tensor(plain)
        return nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
