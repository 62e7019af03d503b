"""Recipes: how to make the result of an operator on fake tensors that was called before.

torch's fake kernels take up to milliseconds, because many are written in Python, and the keys of
torch's own cache take a tenth of one. A step of a network calls the same operators on the same
shapes many times; the results of fakes depend on nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from kdprof.measure.counting.flop_formulas import GROUPS, tensors_in

_PLAIN = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
"""Types of arguments that say everything by their value."""
_KEEP_MORE = {"lift", "lift_fresh", "as_strided", "set_data"}
"""Operators that keep a value, place a view by its storage, or change an argument's storage."""

Args = Sequence[object]
Kwargs = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Output:
    """How to make one tensor of a result.

    Attributes:
        argument: number of the tensor argument that it is, or is a view of; None for new memory.
        layout: data type, shape and stride; None if it is the argument itself.
        offset: where a view begins, in elements from the beginning of the argument.
    """

    argument: int | None
    layout: tuple[torch.dtype, torch.Size, tuple[int, ...]] | None
    offset: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How to make the result of a call.

    Attributes:
        container: tuple or list; None if the result is one tensor, or nothing.
        reads: whether an output is an argument or a view of one.
    """

    container: type | None
    outputs: tuple[_Output | None, ...]
    reads: bool


class Recipes:
    """The recipes of calls on the fakes of one mode."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._recipes: dict[Hashable, _Recipe] = {}

    def key(self, func: Any, args: Args, kwargs: Kwargs) -> Hashable | None:
        """Return everything that the result of a call depends on; None if that is not known."""
        if not _follows_from_shapes(func):
            return None
        found: list[Any] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        if self._describe(args, found) and self._describe(kwargs.values(), found):
            return (*found, *kwargs)
        return None

    def _describe(self, values: Iterable[Any], found: list[Any]) -> bool:
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                found += [kind, value]
            elif isinstance(value, GROUPS):
                found += [kind, len(value)]
                if not self._describe(value, found):
                    return False
            elif isinstance(value, FakeTensor) and self._is_simple(value):
                found += [*_layout(value), value.fake_device]
            else:
                return False
        return True

    def _is_simple(self, fake: FakeTensor) -> bool:
        """Return whether a fake is described by its data type, shape, stride and device."""
        return (
            fake.fake_mode is self._mode
            and fake.constant is None
            and fake.layout is torch.strided
            and not fake.is_neg()
            and not fake.is_conj()
        )

    def knows(self, key: Hashable) -> bool:
        """Return whether a call with this key was learnt."""
        return key in self._recipes

    def make(self, key: Hashable, args: Args, kwargs: Kwargs) -> Any:
        """Return the result of a call whose key is known."""
        recipe = self._recipes[key]
        given = tensors_in([*args, *kwargs.values()]) if recipe.reads else []
        made = [o if o is None else self._output(o, given) for o in recipe.outputs]
        return made[0] if recipe.container is None else recipe.container(made)

    def _output(self, output: _Output, given: Sequence[Tensor]) -> Tensor:
        base = None if output.argument is None else given[output.argument]
        if output.layout is None:
            assert base is not None
            return base
        dtype, shape, stride = output.layout
        plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if base is not None:
            offset = base.storage_offset() + output.offset
            plain.set_(base.untyped_storage(), offset, shape, stride)
        return FakeTensor(self._mode, plain, output.device)

    def learn(self, key: Hashable, args: Args, kwargs: Kwargs, out: object) -> None:
        """Remember how to make a result, if it can be made."""
        container = list if isinstance(out, list) else tuple if isinstance(out, tuple) else None
        results = list(out) if isinstance(out, GROUPS) else [out]
        given = tensors_in([*args, *kwargs.values()])
        outputs: list[_Output | None] = []
        for result in results:
            output = None
            if result is not None:
                if not isinstance(result, FakeTensor) or not self._is_simple(result):
                    return
                if (output := _output(result, given)) is None:
                    return
            outputs.append(output)
        reads = any(output is not None and output.argument is not None for output in outputs)
        self._recipes[key] = _Recipe(container, tuple(outputs), reads)
        again = self.make(key, args, kwargs)
        if not _alike(results, again if container else [again]):
            del self._recipes[key]


@functools.cache
def _follows_from_shapes(func: Any) -> bool:
    """Return whether the result of an operator follows from the shapes of its arguments, if it has
    one: where it follows from their values, fakes raise an exception."""
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return False
    return torch.Tag.inplace_view not in func.tags and func._opname not in _KEEP_MORE


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _output(result: FakeTensor, given: Sequence[Tensor]) -> _Output | None:
    """Return how to make a result; None where that would be a guess, because two arguments share
    the memory that it is in."""
    same = [number for number, tensor in enumerate(given) if tensor is result]
    if same:
        return _Output(same[0], None, 0, result.fake_device) if len(same) == 1 else None
    offset, storage = int(result.storage_offset()), _storage(result)
    bases = [number for number, tensor in enumerate(given) if _storage(tensor) == storage]
    if not bases:
        return _Output(None, _layout(result), offset, result.fake_device)
    base = given[bases[0]]
    if len(bases) > 1 or base.dtype.itemsize != result.dtype.itemsize:
        return None
    from_base = offset - int(base.storage_offset())
    return _Output(bases[0], _layout(result), from_base, result.fake_device)


def _alike(results: Sequence[Any], again: Sequence[Any]) -> bool:
    """Return whether two results of a call cannot be told apart."""
    pairs = [(one, other) for one, other in zip(results, again, strict=True) if one is not other]
    memories = [len({_storage(tensor) for tensor in side}) for side in zip(*pairs, strict=True)]
    return len({*memories}) < 2 and all(_same(one, other) for one, other in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        _layout(one) == _layout(other)
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        and torch._C._dispatch_key_set(one) == torch._C._dispatch_key_set(other)
        and one.requires_grad == other.requires_grad
    )
