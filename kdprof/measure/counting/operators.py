"""What one call of a torch operator does: its kind, FLOP, the bytes it moves, whether it waits.

Everything follows from shapes, so fake tensors give the same results as real ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdprof.measure.counting.flop_formulas import (
    ELEMENTWISE,
    TABLE,
    Formula,
    OperatorCall,
    nothing,
    per_parameter,
    per_source,
    per_target,
    tensors_in,
)
from kdprof.measure.counting.matrix_flop import (
    OPAQUE,
    MatrixFlop,
    matrix_formula,
    name_of,
    why_uncounted,
)
from kdprof.records import OperationKind

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def stored_elements(tensor: Tensor) -> int:
    """Return how many elements a tensor has in memory: an expanded dimension (stride 0) is stored
    once, and overlapping windows have no more elements than their storage."""
    elements = tensor.numel()
    plain = tensor.layout == torch.strided and not tensor.is_nested
    if elements == 0 or not plain or tensor.is_contiguous():
        return elements
    steps = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    distinct = math.prod(n for n, stride in steps if stride)
    return min(distinct, 1 + sum((n - 1) * stride for n, stride in steps))


def stored_bytes(value: Any) -> int:
    """Return the bytes of memory behind the tensors of an argument or result."""
    return sum(stored_elements(t) * t.dtype.itemsize for t in tensors_in(value))


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FREE = _names(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided _unsafe_view "
    "_reshape_alias record_stream is_pinned is_same_size sym_size sym_numel sym_stride "
    "sym_storage_offset set_data _efficientzerotensor _has_compatible_shallow_copy_type "
    "_assert_async _assert_tensor_metadata is_contiguous size stride numel dim"
)
"""Operators that launch no kernel and move no bytes; views are recognised by their schema."""

_OVERWRITTEN = _names(
    "copy_ fill_ zero_ bernoulli_ uniform_ normal_ random_ exponential_ geometric_ log_normal_ "
    "cauchy_ _foreach_copy_ _foreach_zero_"
)
"""In-place operators that do not read the values that they replace."""

_FIRST_FOR_SHAPE = _names(
    "zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full"
)
_SECOND_FOR_SHAPE = _names(
    "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward "
    "_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward nll_loss_backward "
    "nll_loss2d_backward"
)
"""Operators whose first or second argument only gives a shape: its values are not read."""

_SELECTS_OF_SOURCE = _names("index _unsafe_index index_select gather take embedding masked_select")
_UPDATES_IN_PLACE = _names(
    "scatter_ scatter_add_ scatter_reduce_ index_add_ index_copy_ index_fill_ index_put_ "
    "_index_put_impl_ put_"
)
_LABELLED = {"nll_loss_forward", "nll_loss2d_forward"}


def _touched(name: str) -> Formula | None:
    """Return the formula of how many elements of its first argument an operator touches; None for
    an operator that does not select elements."""
    if name in _SELECTS_OF_SOURCE:
        return OperatorCall.made
    if name in _UPDATES_IN_PLACE:
        return per_source
    return per_target if name in _LABELLED else None


_DYNAMIC = _names(
    "_local_scalar_dense equal nonzero masked_select _unique _unique2 unique_dim "
    "unique_consecutive unique_dim_consecutive bincount _linalg_check_errors"
)
_MASKED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_TRANSFERS = {"_to_copy", "copy_"}


def _on_device(value: Any) -> bool:
    return any(t.device.type not in ("cpu", "meta") for t in tensors_in(value))


def _mask_waits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether indexing waits: a boolean mask becomes a list of positions, whose length the
    host must know. Assigning one host scalar under one mask is a masked fill, which does not."""
    given = [index for index in args[1] if index is not None]
    masks = [index for index in given if index.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return False
    accumulates = any(args[3:4]) or kwargs.get("accumulate", False)
    fills = len(args) > 2 and len(given) == 1 and not accumulates
    return not (fills and args[2].numel() == 1 and not _on_device(args[2]))


def _transfer_waits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call is a blocking copy between host and device."""
    if kwargs.get("non_blocking") or any(args[2:3]):
        return False
    if len(args) > 1:
        return _on_device(args[0]) != _on_device(args[1])
    target = kwargs.get("device")
    return target is not None and (torch.device(target).type != "cpu") != _on_device(args[0])


def _waits(func: Any, name: str) -> Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None:
    """Return the function that decides whether a call makes the host wait for a CUDA device; None
    if no call does."""
    if name in _MASKED:
        return _mask_waits
    if name in _TRANSFERS:
        return _transfer_waits
    if name == "repeat_interleave":
        return lambda args, kwargs: kwargs.get("output_size") is None
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if name in _DYNAMIC or tags & set(func.tags):
        return lambda args, kwargs: True
    return None


class Work(NamedTuple):
    """The FLOP and bytes of one call. FLOP are None if there is no formula for them, with the
    reason where they are of matrix work."""

    matrix_flop: float | None
    uncounted: str | None
    other_flop: float | None
    bytes_read: float
    bytes_written: float


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """What is known of an operator before it is called."""

    name: str
    """``aten.convolution``."""
    kind: OperationKind | None
    """None for a view, an allocation or a query of metadata, which are no operations."""
    composite: bool = False
    """True if it consists of other operators, which are traced in its place."""
    matrix: MatrixFlop | None = None
    """None if it does no matrix work."""
    other: Formula | None = None
    unread: frozenset[int | str] = frozenset()
    written: frozenset[int | str] = frozenset()
    """Arguments that are not read, or are written, by position or keyword."""
    makes: bool = True
    """True if the result is new memory and not one of the arguments."""
    mask: int | None = None
    """Position of the argument that selects the results; fake tensors give all of them."""
    touched: Formula | None = None
    waits: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None
    transfers: bool = False
    """True if it copies, possibly from one device to another."""

    def work(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work:
        """Return the work of a call with these arguments and this result."""
        call = OperatorCall(args, kwargs, out)
        read, written = self._bytes(call)
        matrix = 0 if self.matrix is None else self.matrix(args, kwargs, out)
        other = None if self.other is None else self.other(call)
        if isinstance(matrix, str):
            return Work(None, matrix, None, read, written)
        return Work(matrix, None, other, read, written)

    def _bytes(self, call: OperatorCall) -> tuple[int, int]:
        read, written = 0, stored_bytes(self._new(call)) if self.makes else 0
        for place, value in (*enumerate(call.args), *call.kwargs.items()):
            size = stored_bytes(value)
            if not size:
                continue
            if place == 0 and self.touched is not None:
                size = min(size, self.touched(call) * call.args[0].dtype.itemsize)
            if place not in self.unread:
                read += size
            if place in self.written and not (place == 1 and self._leaves_gradients(call)):
                written += size
        return read, written

    def _new(self, call: OperatorCall) -> Any:
        if self.mask is None:
            return call.out
        return [made for made, wanted in zip(call.out, call.args[self.mask], strict=True) if wanted]

    def _leaves_gradients(self, call: OperatorCall) -> bool:
        """Return whether gradients stay as they are: a fused optimiser writes them only if it
        unscales them."""
        return self.name.startswith("aten._fused_") and call.kwargs.get("grad_scale") is None


@functools.cache
def operator_of(func: Any) -> Operator:
    """Return what is known of an operator (an OpOverload or a higher-order operator)."""
    if not isinstance(func, torch._ops.OpOverload):
        matrix, kind, other = _work_of(func, name_of(func))
        return Operator(name_of(func), kind, matrix=matrix, other=other)
    name = f"{func.namespace}.{func._opname}"
    if _is_free(func):
        return Operator(name, None)
    plain = func._opname if func.namespace == "aten" else name
    matrix, kind, other = _work_of(func, plain)
    arguments = list(enumerate(func._schema.arguments))
    written = {a.name if a.kwarg_only else i for i, a in arguments if _is_written(a)}
    outs = {a.name for _, a in arguments if a.is_out}
    ignored = {0} if plain in _OVERWRITTEN | _FIRST_FOR_SHAPE else set()
    ignored |= {1} if plain in _SECOND_FOR_SHAPE else set()
    return Operator(
        name=name,
        kind=kind,
        composite=_is_composite(func),
        matrix=matrix,
        other=other,
        unread=frozenset(outs | ignored),
        written=frozenset(written),
        makes=all(r.alias_info is None for r in func._schema.returns),
        mask=next((i for i, a in arguments if a.name == "output_mask"), None),
        touched=_touched(plain),
        waits=_waits(func, plain),
        transfers=plain in _TRANSFERS,
    )


def _is_free(func: Any) -> bool:
    if func.namespace in ("prim", "profiler"):
        return True
    if func.is_view or torch.Tag.inplace_view in func.tags:
        return not _is_composite(func)
    return func.namespace == "aten" and func._opname in _FREE


def _is_composite(func: Any) -> bool:
    """Return whether torch's own kernel calls other operators.

    Except in inference mode, it has usually called them before a dispatch mode sees any operator.
    (``func.decompose`` would also use decompositions for compilers, which no eager step runs.)
    """
    implicit = "CompositeImplicitAutograd"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), implicit)
    return has_kernel and name_of(func) not in OPAQUE


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _work_of(func: Any, name: str) -> tuple[MatrixFlop | None, OperationKind, Formula | None]:
    """Return the matrix FLOP of an operator, its kind, and its other arithmetic.

    What kdprof does not know is never taken for an operator without matrix work: that its name
    looks like it, or that it is not one of torch's, is a reason why its FLOP are not counted.
    """
    matrix, classified = matrix_formula(func), _classified(func, name)
    if classified is not None:
        return matrix, *classified
    if matrix is not None:
        return matrix, "matrix", nothing
    reason = why_uncounted(name_of(func))
    return (None if reason is None else lambda args, kwargs, out: reason), "uncounted", None


def _classified(func: Any, name: str) -> tuple[OperationKind, Formula | None] | None:
    """Return kind and arithmetic: by the table, else by torch's tags, else by the name's prefix."""
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    binary = getattr(func, "_overloadname", "") == "other"
    if base in TABLE and not (binary and base in ("max", "min")):
        return TABLE[base]
    if torch.Tag.pointwise in getattr(func, "tags", ()):
        return "elementwise", ELEMENTWISE
    if name.startswith("_foreach_"):
        return "optimizer", per_parameter(1)
    return None
