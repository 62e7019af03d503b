"""What one call of a torch operator does: its kind, FLOP, the bytes it moves, whether it waits.

Everything follows from shapes, so that fake tensors tell as much as real ones. The tables here are
the ones that docs/measuring.md prints. 1 multiply-add = 2 FLOP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from kdprof.records import OperationKind

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def convolution_flop(
    x_shape: Any, w_shape: Any, out_shape: Any, groups: int, transposed: bool
) -> int:
    """Return the FLOP of a convolution: 2 per multiply-add.

    ``w_shape`` is (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed: the
    weight already holds the division by groups.
    """
    positions = math.prod(x_shape[2:] if transposed else out_shape[2:])
    return 2 * x_shape[0] * positions * math.prod(w_shape)


def _forward_flop(
    x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return convolution_flop(x, w, out_shape, groups, transposed)


def _backward_flop(
    grad: Any, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Any,
    *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Each gradient asked for (input, weight) costs as much as the forward.

    torch's own formula leaves ``groups`` out of the weight gradient: a depthwise convolution then
    counts as many times too much as it has channels.
    """
    return convolution_flop(x, w, grad, groups, transposed) * sum(map(bool, output_mask[:2]))


CONVOLUTION_FORMULAS = {
    aten.convolution: _forward_flop,
    aten._convolution: _forward_flop,
    aten.convolution_backward: _backward_flop,
}
"""Over shapes, as FlopCounterMode's ``custom_mapping`` takes them."""
_CONVOLUTIONS = {packet: shape_wrapper(formula) for packet, formula in CONVOLUTION_FORMULAS.items()}


class Call(NamedTuple):
    """One call of an operator, as a formula sees it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def first(self) -> Tensor:
        """Return the first tensor argument."""
        return next(tensors_in(self.args))

    def made(self) -> int:
        """Return the elements of the outputs, or of the first argument where there is none."""
        made = list(tensors_in(self.out)) or tensors_in(self.args[:1])
        return sum(t.numel() for t in made)


Formula = Callable[[Call], float]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an operator's argument or result: a tensor, or lists of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def stored_elements(tensor: Tensor) -> int:
    """Return the elements of memory that a tensor stands for: an expanded dimension (stride 0) is
    stored once, and overlapping windows no more often than their storage has elements."""
    elements = tensor.numel()
    if elements == 0 or tensor.layout != torch.strided or tensor.is_contiguous():
        return elements
    steps = [(n, stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    distinct = math.prod(n for n, stride in steps if stride)
    return min(distinct, 1 + sum((n - 1) * stride for n, stride in steps))


def stored_bytes(value: Any) -> int:
    """Return the bytes of memory behind the tensors of an argument or result."""
    return sum(stored_elements(t) * t.dtype.itemsize for t in tensors_in(value))


def _nothing(call: Call) -> float:
    return 0


def _per_output(multiple: float) -> Formula:
    return lambda call: multiple * call.made()


def _per_input(multiple: float) -> Formula:
    return lambda call: multiple * call.first().numel()


def _per_row_of_products(multiple: float) -> Formula:
    """``multiple`` per output element and per component of the vectors compared for it."""
    return lambda call: multiple * call.made() * call.first().shape[-1]


def _per_window(call: Call) -> float:
    """One per element of the pooling window of each output (or output gradient)."""
    outputs = next(tensors_in(call.out)).numel()
    kernel = call.args[1]
    dims = call.args[0].dim() - 2
    return outputs * math.prod(kernel if len(kernel) == dims else [kernel[0]] * dims)


def _per_window_backward(call: Call) -> float:
    kernel, dims = call.args[2], call.args[1].dim() - 2
    return call.first().numel() * math.prod(kernel if len(kernel) == dims else [kernel[0]] * dims)


def _per_source(call: Call) -> float:
    """One per element of the largest tensor that goes into the target."""
    return max((t.numel() for t in tensors_in(call.args[1:])), default=0)


def _per_accumulated(call: Call) -> float:
    """Assigning is no arithmetic, adding up is."""
    accumulates = any(call.args[3:4]) or call.kwargs.get("accumulate", False)
    return _per_source(call) if accumulates else 0


def _per_target(call: Call) -> float:
    """One per label (the negative log-likelihood's)."""
    return call.args[1].numel()


def _normalise(training: float, inference: float, always: bool | None = None) -> Formula:
    """Multiples per input element; the operator's own flag says which, unless ``always`` does."""

    def formula(call: Call) -> float:
        flags = [a for a in call.args if isinstance(a, bool)]
        trains = always if always is not None else flags[0]
        return (training if trains else inference) * call.first().numel()

    return formula


def _sgd(call: Call) -> float:
    """Step; momentum's and weight decay's multiply-add where they are not zero."""
    extras = sum(call.kwargs.get(key, 0) != 0 for key in ("momentum", "weight_decay"))
    return 2 * (1 + extras) * sum(t.numel() for t in tensors_in(call.args[0]))


def _per_parameter(multiple: float) -> Formula:
    return lambda call: multiple * sum(t.numel() for t in tensors_in(call.args[0]))


BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE = 6, 2
BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE = 9, 5
SOFTMAX_FORWARD, SOFTMAX_BACKWARD = 5, 4
BILINEAR_FORWARD, BILINEAR_BACKWARD = 7, 8

_ELEMENTWISE = _per_output(1)
_FORWARD_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE)
_ALWAYS_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE, always=True)
_NEVER_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE, always=False)
_BACKWARD_NORM = _normalise(BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE)
_ALWAYS_BACKWARD = _normalise(BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE, always=True)

_ROWS: tuple[tuple[OperationKind, Formula, str], ...] = (
    ("copy", _nothing,
     "_to_copy copy clone cat stack constant_pad_nd repeat roll flip rot90 tril triu diag_embed "
     "fill zero zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full "
     "scalar_tensor arange linspace eye complex im2col col2im pixel_shuffle pixel_unshuffle "
     "channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
     "_local_scalar_dense slice_backward select_backward slice_scatter select_scatter "
     "as_strided_scatter unfold_backward lift lift_fresh_copy view_copy expand_copy permute_copy "
     "_pin_memory repeat_interleave"),
    ("elementwise", _ELEMENTWISE,
     "bernoulli uniform normal random exponential rand rand_like randn randn_like randint "
     "randint_like randperm native_dropout masked_fill leaky_relu_backward elu_backward "
     "hardtanh_backward hardsigmoid_backward hardswish hardswish_backward softplus_backward "
     "log_sigmoid_forward log_sigmoid_backward silu_backward mish_backward gelu_backward "
     "sigmoid_backward tanh_backward threshold_backward hardshrink_backward "
     "softshrink_backward _prelu_kernel _prelu_kernel_backward glu glu_backward rrelu_with_noise "
     "floor_divide logical_and logical_or logical_xor addr isin bucketize"),
    ("elementwise", _per_output(3),
     "mse_loss_backward smooth_l1_loss_backward huber_loss_backward soft_margin_loss_backward "
     "binary_cross_entropy_backward"),
    ("reduction", _per_input(1),
     "sum mean prod all any amax amin max min argmax argmin nansum count_nonzero cumsum cumprod "
     "cummax cummin trace mode"),
    ("reduction", _per_input(2),
     "linalg_vector_norm norm dot vdot aminmax l1_loss"),
    ("reduction", lambda call: 2 * max(t.numel() for t in tensors_in(call.args[:2])), "mv"),
    ("reduction", lambda call: 2 * call.args[1].numel(), "addmv"),
    ("reduction", _per_input(3), "logsumexp logcumsumexp mse_loss smooth_l1_loss huber_loss "
     "soft_margin_loss _euclidean_dist"),
    ("reduction", _per_input(4), "var std var_mean std_mean binary_cross_entropy"),
    ("reduction", _per_row_of_products(3), "_cdist_forward _pdist_forward"),
    ("softmax", _per_output(SOFTMAX_FORWARD), "_softmax _log_softmax _safe_softmax"),
    ("softmax", _per_output(SOFTMAX_BACKWARD),
     "_softmax_backward_data _log_softmax_backward_data"),
    ("normalisation", _FORWARD_NORM,
     "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit"),
    ("normalisation", _NEVER_NORM, "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    ("normalisation", _ALWAYS_NORM,
     "_batch_norm_with_update native_layer_norm native_group_norm _fused_rms_norm"),
    ("normalisation", _BACKWARD_NORM, "native_batch_norm_backward batch_norm_backward"),
    ("normalisation", _ALWAYS_BACKWARD,
     "cudnn_batch_norm_backward miopen_batch_norm_backward native_layer_norm_backward "
     "native_group_norm_backward _fused_rms_norm_backward"),
    ("resize", _nothing,
     "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
     "_upsample_nearest_exact2d"),
    ("resize", _per_input(1),
     "upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward "
     "_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward"),
    ("resize", _per_output(3), "upsample_linear1d"),
    ("resize", _per_input(4), "upsample_linear1d_backward"),
    ("resize", _per_output(BILINEAR_FORWARD), "upsample_bilinear2d grid_sampler_2d"),
    ("resize", _per_input(BILINEAR_BACKWARD), "upsample_bilinear2d_backward"),
    ("resize", _per_output(15), "upsample_trilinear3d"),
    ("resize", _per_input(16), "upsample_trilinear3d_backward"),
    ("resize", _per_output(31), "upsample_bicubic2d"),
    ("resize", _per_input(32), "upsample_bicubic2d_backward"),
    ("pooling", _per_window,
     "max_pool2d_with_indices avg_pool2d max_pool3d_with_indices avg_pool3d"),
    ("pooling", _per_input(1),
     "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
     "max_pool2d_with_indices_backward max_pool3d_with_indices_backward "
     "adaptive_max_pool2d_backward"),
    ("pooling", _per_output(1),
     "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"),
    ("pooling", _per_window_backward, "avg_pool2d_backward avg_pool3d_backward"),
    ("gather", _nothing,
     "index _unsafe_index index_select gather take embedding masked_select nonzero nonzero_static "
     "_unique _unique2 unique_dim unique_consecutive scatter index_copy index_fill masked_scatter"),
    ("gather", _per_source, "scatter_add index_add scatter_reduce index_reduce"),
    ("gather", _per_accumulated, "index_put _unsafe_index_put _index_put_impl put"),
    ("gather", _per_input(1), "embedding_dense_backward bincount histc"),
    ("gather", _per_target, "nll_loss_forward nll_loss2d_forward"),
    ("gather", lambda call: call.args[2].numel(), "nll_loss_backward nll_loss2d_backward"),
    ("optimizer", _sgd, "_fused_sgd"),
    ("optimizer", _per_parameter(13), "_fused_adam _fused_adamw"),
    ("optimizer", _per_parameter(6), "_fused_adagrad"),
    ("optimizer", _per_parameter(2), "_foreach_norm _amp_foreach_non_finite_check_and_unscale"),
    ("optimizer", _nothing, "_foreach_copy _foreach_zero _amp_update_scale"),
    ("communication", lambda call: sum(t.numel() for t in tensors_in(call.args[:1])),
     "c10d.allreduce"),
    ("communication", _nothing, "c10d.broadcast c10d.allgather"),
)  # fmt: skip
"""Kind and arithmetic by operator; a trailing underscore (in place) changes neither."""

TABLE: dict[str, tuple[OperationKind, Formula]] = {
    name: (kind, formula) for kind, formula, names in _ROWS for name in names.split()
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FREE = _names(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided _unsafe_view "
    "_reshape_alias record_stream is_pinned is_same_size sym_size sym_numel sym_stride "
    "sym_storage_offset set_data _efficientzerotensor _has_compatible_shallow_copy_type "
    "_assert_async _assert_tensor_metadata is_contiguous size stride numel dim"
)
"""Launch nothing and move nothing; views are recognised by their schema."""

_OVERWRITTEN = _names(
    "copy_ fill_ zero_ bernoulli_ uniform_ normal_ random_ exponential_ geometric_ log_normal_ "
    "cauchy_ _foreach_copy_ _foreach_zero_"
)
"""In-place operators that never look at what they replace."""

_FIRST_FOR_SHAPE = _names(
    "zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full"
)
_SECOND_FOR_SHAPE = _names(
    "max_pool2d_with_indices_backward max_pool3d_with_indices_backward avg_pool2d_backward "
    "_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward nll_loss_backward "
    "nll_loss2d_backward"
)
"""Operators whose first or second argument gives a shape: its values are not read."""

_SELECTS_OF_SOURCE = _names("index _unsafe_index index_select gather take embedding masked_select")
_UPDATES_IN_PLACE = _names(
    "scatter_ scatter_add_ scatter_reduce_ index_add_ index_copy_ index_fill_ index_put_ "
    "_index_put_impl_ put_"
)
_LABELLED = {"nll_loss_forward", "nll_loss2d_forward"}


def _touched(name: str) -> Formula | None:
    """Return how many elements of its first argument an operator that picks some touches."""
    if name in _SELECTS_OF_SOURCE:
        return Call.made
    if name in _UPDATES_IN_PLACE:
        return _per_source
    return _per_target if name in _LABELLED else None


_DYNAMIC = _names(
    "_local_scalar_dense equal nonzero masked_select _unique _unique2 unique_dim "
    "unique_consecutive unique_dim_consecutive bincount _linalg_check_errors"
)
_MASKED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_TRANSFERS = {"_to_copy", "copy_"}


def _on_device(value: Any) -> bool:
    return any(t.device.type not in ("cpu", "meta") for t in tensors_in(value))


def _mask_waits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A boolean mask becomes a list of positions, whose length the host must know. Only assigning
    one host scalar under one mask is a masked fill, which need not."""
    given = [index for index in args[1] if index is not None]
    masks = [index for index in given if index.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return False
    accumulates = any(args[3:4]) or kwargs.get("accumulate", False)
    fills = len(args) > 2 and len(given) == 1 and not accumulates
    return not (fills and args[2].numel() == 1 and not _on_device(args[2]))


def _transfer_waits(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A blocking copy between host and device."""
    if kwargs.get("non_blocking") or any(args[2:3]):
        return False
    if len(args) > 1:
        return _on_device(args[0]) != _on_device(args[1])
    target = kwargs.get("device")
    return target is not None and (torch.device(target).type != "cpu") != _on_device(args[0])


def _waits(func: Any, name: str) -> Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None:
    """Return what decides whether a call makes the host wait for a CUDA device; None: it never
    does."""
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
    """What one call does. FLOP and bytes; ``other_flop`` None: no formula knows."""

    matrix_flop: float
    other_flop: float | None
    bytes_read: float
    bytes_written: float


@dataclass(frozen=True, slots=True, eq=False)
class Operator:
    """All that is known of an operator before it is called."""

    name: str
    """``aten.convolution``."""
    kind: OperationKind | None
    """None: a view, an allocation or a question; no operation at all."""
    composite: bool = False
    """Made of other operators, which are what is to be watched."""
    matrix: Callable[..., int] | None = None
    other: Formula | None = None
    unread: frozenset[int | str] = frozenset()
    written: frozenset[int | str] = frozenset()
    """Arguments, by position or keyword."""
    makes: bool = True
    """Whether the result is new memory and not an argument handed back."""
    mask: int | None = None
    """Where the argument is that says which results are wanted; fakes deliver them all."""
    touched: Formula | None = None
    waits: Callable[[tuple[Any, ...], Mapping[str, Any]], bool] | None = None
    transfers: bool = False
    """Copies, perhaps from one device to another."""

    def work(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Work:
        """Return what a call with these arguments and this result did."""
        call = Call(args, kwargs, out)
        read, written = self._bytes(call)
        matrix = 0 if self.matrix is None else self.matrix(*args, **kwargs, out_val=out)
        other = None if self.other is None else self.other(call)
        return Work(matrix, other, read, written)

    def _bytes(self, call: Call) -> tuple[int, int]:
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

    def _new(self, call: Call) -> Any:
        if self.mask is None:
            return call.out
        return [made for made, wanted in zip(call.out, call.args[self.mask], strict=True) if wanted]

    def _leaves_gradients(self, call: Call) -> bool:
        """A fused optimiser writes gradients back only where it unscales them."""
        return self.name.startswith("aten._fused_") and call.kwargs.get("grad_scale") is None


@functools.cache
def operator_of(func: Any) -> Operator:
    """Return what is known of an operator (an OpOverload, or torch's higher-order ones)."""
    if not isinstance(func, torch._ops.OpOverload):
        return Operator(str(func), "uncounted")
    name = f"{func.namespace}.{func._opname}"
    if _is_free(func):
        return Operator(name, None)
    plain = func._opname if func.namespace == "aten" else name
    matrix = _CONVOLUTIONS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
    kind, other = ("matrix", _nothing) if matrix else _classified(func, plain)
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
    """Say whether torch's own kernel calls other operators. It mostly has done so before a mode
    sees anything; not in inference mode. (``func.decompose`` would also take decompositions that
    exist for compilers and that no eager step runs.)"""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _classified(func: Any, name: str) -> tuple[OperationKind, Formula | None]:
    """Return kind and arithmetic: by the table, else by torch's tags, else by family."""
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    binary = func._overloadname == "other"
    if base in TABLE and not (binary and base in ("max", "min")):
        return TABLE[base]
    if torch.Tag.pointwise in func.tags:
        return "elementwise", _ELEMENTWISE
    if name.startswith("_foreach_"):
        return "optimizer", _per_parameter(1)
    return "uncounted", None
