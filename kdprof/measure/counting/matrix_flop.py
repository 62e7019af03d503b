"""The matrix FLOP of torch's operators: a formula, or the reason why an operator has none.

Matrix work is what products of matrices do: matrix products, convolutions, attention, recurrent
layers, and what is solved or factored. A formula gives the FLOP of the operation, whatever a kernel
does inside: a fused operator has the FLOP of the operators that it replaces. Everything follows
from shapes, so fake tensors give the same counts as real ones. 1 multiply-add = 2 FLOP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from kdprof.measure.counting.flop_formulas import tensors_in

Counted = float | str
"""FLOP, or the reason why they are not counted."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    Attributes:
        named: every argument by the name that the operator's schema gives it, defaults included.
        out: the result.
    """

    named: Mapping[str, Any]
    out: Any

    @property
    def given(self) -> list[Any]:
        """The arguments in order."""
        return list(self.named.values())

    def any_of(self, *names: str) -> Any:
        """Return the argument that has one of these names; None if there is none."""
        return next((self.named[name] for name in names if name in self.named), None)


Formula = Callable[[Call], Counted]

COMPLEX = 4
"""Real multiply-adds of a complex one."""
UNKNOWN = "kdprof does not know what it computes"
NO_FORMULA = "kdprof has no formula for its matrix work"
FACTORS = "the FLOP depend on the algorithm that solves or factors a matrix"
TRANSFORM = "the FLOP depend on the algorithm of the Fourier transform"
SPARSE = "the FLOP depend on which elements of a sparse tensor are stored"
PACKED = "packed weights have no shape"
LENGTHS = "the FLOP depend on the lengths of the sequences, which only real tensors have"
NESTED = "the FLOP depend on the lengths in a nested tensor"


_SPARSE_LAYOUTS = (
    torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc,
)  # fmt: skip


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Matrix products


def _columns_of_result(call: Call) -> Counted:
    """Each element of the first factor meets each column of the second."""
    return 2 * call.given[0].numel() * call.out.shape[-1]


def _added_product(call: Call) -> Counted:
    return 2 * call.given[1].numel() * call.out.shape[-1]


def _vector(call: Call) -> Counted:
    """A matrix, or one row, times a vector."""
    return 2 * call.given[0].numel()


def _added_vector(call: Call) -> Counted:
    return 2 * call.given[1].numel()


def _outer(call: Call) -> Counted:
    return 2 * call.out.numel()


def _linear(call: Call) -> Counted:
    x, weight = call.given[:2]
    return 2 * _rows(x) * weight.numel()


def _linear_backward(call: Call) -> Counted:
    """As the forward, for each requested gradient of input and weight."""
    x, grad, _, mask = call.given
    return 2 * grad.numel() * x.shape[-1] * sum(mask[:2])


def _linear_backward_input(call: Call) -> Counted:
    _, grad, weight = call.given
    return 2 * _rows(grad) * weight.numel()


def _linear_backward_weight(call: Call) -> Counted:
    grad, x = call.given[:2]
    return 2 * grad.numel() * x.shape[-1]


def _matmul_backward(call: Call) -> Counted:
    grad, x, _, mask = call.given
    return 2 * grad.numel() * x.shape[-1] * sum(mask)


def _grouped(call: Call) -> Counted:
    """One product per group; rows that belong to no group are counted, too.

    The groups divide the rows of the first factor, the columns of the second, or what both share;
    only two stacks of matrices have a group each.
    """
    x, y = call.given[:2]
    stacks = x.shape[0] if (x.dim(), y.dim()) == (3, 2) else 1
    return 2 * x.numel() // stacks * y.shape[-1]


def _two_products(call: Call) -> Counted:
    a, b, c, d = call.given[:4]
    return 2 * (a.numel() * b.shape[-1] + c.numel() * d.shape[-1])


def _trilinear(call: Call) -> Counted:
    """Two products after one another, by index of the unrolled dimension."""
    named = call.named
    expanded = [set(named[f"expand{i}"]) for i in (1, 2, 3)]
    tensors = (named["i1"], named["i2"], named["i3"])
    dims = len(tensors[0].shape) + len(expanded[0])
    first, second, third = (
        _with_ones(tensor.shape, at, dims) for tensor, at in zip(tensors, expanded, strict=True)
    )
    summed = set(named["sumdim"]) - {named["unroll_dim"]}
    between = list(map(max, first, second))
    after = [1 if dim in summed & expanded[2] else size for dim, size in enumerate(between)]
    multiply_adds = math.prod(between) if summed & expanded[2] else 0
    if summed - expanded[2]:
        multiply_adds += math.prod(map(max, after, third))
    return 2 * multiply_adds


def _with_ones(shape: Sequence[int], places: set[int], dims: int) -> list[int]:
    sizes = iter(shape)
    return [1 if place in places else next(sizes) for place in range(dims)]


def _distances(call: Call) -> Counted:
    """Euclidean distances as a product: two more components take the squared lengths."""
    return 2 * call.out.numel() * (call.given[0].shape[-1] + 2)


def _cdist(call: Call) -> Counted:
    """As torch decides: a product for Euclidean distances of more than 25 vectors, if not asked
    otherwise."""
    x1, x2, p, mode = call.given
    many = max(x1.shape[-2], x2.shape[-2]) > 25
    return _distances(call) if p == 2 and (mode == 1 or (not mode and many)) else 0


def _affine_grid(call: Call) -> Counted:
    return 2 * call.out.numel() * call.named["theta"].shape[-1]


def _affine_grid_backward(call: Call) -> Counted:
    return 2 * call.named["grad"].numel() * 3


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


# Convolutions


def convolution_flop(
    x_shape: Sequence[int], w_shape: Sequence[int], out_shape: Sequence[int], transposed: bool
) -> int:
    """Return the FLOP of a convolution.

    ``w_shape`` is (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed: the
    weight's shape already includes the division by groups.
    """
    dims = len(w_shape) - 2
    seen = x_shape if transposed else out_shape
    batch = math.prod(seen[: len(seen) - dims - 1])
    return 2 * batch * math.prod(seen[len(seen) - dims :]) * math.prod(w_shape)


def _convolution(call: Call) -> Counted:
    x, weight = call.given[0], call.any_of("weight", "W")
    return convolution_flop(
        x.shape, weight.shape, call.out.shape, call.named.get("transposed", False)
    )


def _transposed_convolution(call: Call) -> Counted:
    x, weight = call.given[:2]
    return convolution_flop(x.shape, weight.shape, call.out.shape, True)


def _convolution_backward(call: Call) -> Counted:
    """As the forward, for each requested gradient of input and weight.

    torch's own formula ignores ``groups`` in the weight gradient, which overcounts a depthwise
    convolution by a factor of its channels.
    """
    x, grad = call.any_of("input", "self"), call.named["grad_output"]
    transposed = call.named.get("transposed", False)
    each = convolution_flop(x.shape, call.named["weight"].shape, grad.shape, transposed)
    return each * sum(map(bool, call.named["output_mask"][:2]))


def _transposed_convolution_backward(call: Call) -> Counted:
    x, grad, weight = call.given[:3]
    each = convolution_flop(x.shape, weight.shape, grad.shape, True)
    return each * sum(call.named["output_mask"][:2])


def _packed_convolution(call: Call) -> Counted:
    x, packed = call.given[:2]
    weight, _ = packed.unpack()
    return convolution_flop(x.shape, weight.shape, call.out.shape, packed.transpose())


def _convolution_in_time(call: Call) -> Counted:
    return 2 * math.prod(call.out.shape[:2]) * call.given[1].numel()


def _deformable_backward(call: Call) -> Counted:
    """One product for the gradients of input and offsets, one for that of the weight."""
    grad, x, weight = call.given[:3]
    return 2 * convolution_flop(x.shape, weight.shape, grad.shape, False)


# Attention. A mask, causal or not, changes no count: the written-out form multiplies whole maps,
# too. The map that a backward of a fused kernel computes again is not counted: it is part of how
# the kernel works, and not of the operation.


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What attention multiplies.

    Attributes:
        pairs: of queries and keys, over batch and heads.
        key_size, value_size: components of a key and of a value.
    """

    pairs: int
    key_size: int
    value_size: int

    def forward(self) -> int:
        """Queries times keys, and their map times values."""
        return 2 * self.pairs * (self.key_size + self.value_size)

    def backward(
        self, query: bool = True, key: bool = True, value: bool = True, bias: bool = False
    ) -> int:
        """Return one product for each requested gradient, and one for that of the map."""
        of_map = query or key or bias
        values = self.value_size * (value + of_map)
        return 2 * self.pairs * (self.key_size * (query + key) + values)


def _dense_pairs(q: Tensor, k: Tensor, v: Tensor, keys_at: int = -2) -> _Pairs:
    """Return the pairs of (..., sequence, component), or with ``keys_at`` -3 of (..., sequence,
    head, component)."""
    return _Pairs(_rows(q) * k.shape[keys_at], q.shape[-1], v.shape[-1])


def _parts(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.named["query"], call.named["key"], call.named["value"]


def _attention(call: Call) -> Counted:
    return _dense_pairs(*_parts(call)).forward()


def _attention_backward(call: Call) -> Counted:
    wanted = call.named.get("grad_input_mask", (True, True, True, False))
    return _dense_pairs(*_parts(call)).backward(*wanted)


def _kernel_pairs(call: Call, keys_at: int) -> _Pairs | str:
    """Return the pairs of an attention kernel, whose sequences may be packed one after another."""
    q, k, v = _parts(call)
    ends_q = call.any_of("cum_seq_q", "cu_seqlens_q", "cu_seq_q")
    if ends_q is None:
        return _dense_pairs(q, k, v, keys_at)
    ends_k = call.any_of("cum_seq_k", "cu_seqlens_k", "cu_seq_k")
    if call.any_of("seqused_k", "seqlen_k", "block_table") is not None:
        return LENGTHS
    lengths = [_lengths(ends) for ends in (ends_q, ends_q if ends_k is None else ends_k)]
    if None in lengths:
        return LENGTHS
    pairs = sum(queries * keys for queries, keys in zip(*lengths, strict=True))
    return _Pairs(pairs * q.shape[-2], q.shape[-1], v.shape[-1])


def _lengths(ends: Tensor) -> list[int] | None:
    if isinstance(ends, FakeTensor) or ends.is_meta:
        return None
    return ends.diff().tolist()


def _kernel(backward: bool, keys_at: int) -> Formula:
    def formula(call: Call) -> Counted:
        pairs = _kernel_pairs(call, keys_at)
        if isinstance(pairs, str):
            return pairs
        return pairs.backward() if backward else pairs.forward()

    return formula


def _multi_head_attention(call: Call) -> Counted:
    """Three projections, the attention of all heads together, and the projection of its result."""
    q, k, v = _parts(call)
    size = call.named["embed_dim"]
    projected = q.numel() + k.numel() + v.numel() + q.numel()
    return 2 * projected * size + _dense_pairs(q, k, v).forward()


def _transformer_encoder(call: Call) -> Counted:
    x = call.named["src"]
    mixed = 2 * 4 * x.numel() * call.named["embed_dim"] + _dense_pairs(x, x, x).forward()
    return mixed + 2 * _rows(x) * sum(call.named[f"ffn_weight_{i}"].numel() for i in (1, 2))


def _attention_of_first(call: Call) -> Counted:
    return _dense_pairs(*call.given[:3]).forward()


def _backward_of_first(call: Call) -> Counted:
    return _dense_pairs(*call.given[:3]).backward()


# Recurrent layers: every weight matrix meets every step of every sequence once


def _recurrent(call: Call) -> int:
    named = call.named
    given = [value for name, value in named.items() if re.fullmatch(r"weight\d?", name)]
    weights = [weight for weight in tensors_in(given) if weight.dim() == 2]
    return 2 * _rows(named["input"]) * sum(w.numel() for w in weights)


def _recurrent_backward(call: Call) -> Counted:
    """As the forward for the gradients of the states and inputs, which are always computed, and
    once more for those of the weights."""
    mask = call.named.get("output_mask", (True,) * 4)
    return _recurrent(call) * (1 + bool(mask[3]))


# The tables

_ROWS: tuple[tuple[Formula, str], ...] = (
    (_columns_of_result,
     "mm bmm matmul _int_mm _scaled_mm _scaled_mm_v2 _weight_int4pack_mm "
     "_weight_int4pack_mm_for_cpu _weight_int4pack_mm_with_scales_and_zeros "
     "_weight_int8pack_mm _mixed_dtypes_linear _dyn_quant_matmul_4bit "
     "fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation "
     "fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation "
     "_wrapped_quantized_linear_prepacked _quantized._wrapped_quantized_linear_prepacked "
     "quantized.linear quantized.linear_relu quantized.linear_leaky_relu quantized.linear_tanh "
     "quantized.linear_dynamic quantized.linear_relu_dynamic quantized.linear_dynamic_fp16 "
     "quantized.linear_relu_dynamic_fp16 quantized.linear_dynamic_fp16_unpacked_weight "
     "quantized.linear_with_input_q_dq_qweight_dq_output_fp32 "
     "quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32 quantized.matmul "
     "quantized.int4mm_packed_weight_cpu _quantized.linear _quantized.linear_dynamic "
     "_quantized.wrapped_quantized_linear _quantized.wrapped_fbgemm_linear_fp16_weight "
     "onednn.qlinear_pointwise onednn.linear_dynamic_fp16 onednn.linear_relu_dynamic_fp16 "
     "mkldnn._linear_pointwise mkl._mkl_linear prepacked.linear_clamp_run"),
    (_added_product, "addmm _addmm_activation baddbmm addbmm"),
    (_vector, "mv dot vdot"),
    (_added_vector, "addmv"),
    (_outer, "addr"),
    (_linear, "linear mkldnn_linear"),
    (_linear_backward, "linear_backward mkldnn_linear_backward"),
    (_linear_backward_input, "mkldnn_linear_backward_input"),
    (_linear_backward_weight, "mkldnn_linear_backward_weights"),
    (_matmul_backward, "matmul_backward"),
    (_grouped, "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2"),
    (_two_products, "inductor._mm_plus_mm"),
    (_trilinear, "_trilinear"),
    (_distances, "_euclidean_dist"),
    (_cdist, "_cdist_forward"),
    (_affine_grid, "affine_grid_generator cudnn_affine_grid_generator"),
    (_affine_grid_backward, "cudnn_affine_grid_generator_backward"),
    (_convolution,
     "convolution _convolution convolution_overrideable cudnn_convolution cudnn_convolution_relu "
     "cudnn_convolution_add_relu miopen_convolution miopen_convolution_relu "
     "miopen_convolution_add_relu miopen_depthwise_convolution mkldnn_convolution "
     "_nnpack_spatial_convolution _slow_conv2d_forward slow_conv3d_forward slow_conv_dilated2d "
     "slow_conv_dilated3d _conv_depthwise2d conv_depthwise3d _mps_convolution thnn_conv2d "
     "mkldnn._convolution_pointwise torchvision.deform_conv2d"),
    (_transposed_convolution,
     "cudnn_convolution_transpose miopen_convolution_transpose slow_conv_transpose2d "
     "slow_conv_transpose3d _mps_convolution_transpose"),
    (_convolution_backward,
     "convolution_backward convolution_backward_overrideable _slow_conv2d_backward "
     "mps_convolution_backward"),
    (_transposed_convolution_backward, "mps_convolution_transpose_backward"),
    (_packed_convolution,
     "quantized.conv1d quantized.conv1d_relu quantized.conv1d_dynamic quantized.conv2d "
     "quantized.conv2d_relu quantized.conv2d_add quantized.conv2d_add_relu "
     "quantized.conv2d_dynamic quantized.conv3d quantized.conv3d_relu quantized.conv3d_dynamic "
     "quantized.conv_transpose1d quantized.conv_transpose1d_dynamic quantized.conv_transpose2d "
     "quantized.conv_transpose2d_dynamic quantized.conv_transpose3d "
     "quantized.conv_transpose3d_dynamic _quantized.conv2d _quantized.conv2d_relu "
     "_quantized.conv3d _quantized.conv3d_relu _quantized.conv_transpose1d "
     "_quantized.conv_transpose2d"),
    (_convolution_in_time, "conv_tbc"),
    (_deformable_backward, "torchvision._deform_conv2d_backward"),
    (_attention,
     "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
     "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
     "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
     "_scaled_dot_product_attention_math_for_mps"),
    (_attention_backward,
     "_scaled_dot_product_flash_attention_backward "
     "_scaled_dot_product_flash_attention_for_cpu_backward "
     "_scaled_dot_product_efficient_attention_backward "
     "_scaled_dot_product_cudnn_attention_backward "
     "_scaled_dot_product_fused_attention_overrideable_backward"),
    (_kernel(False, -3),
     "_flash_attention_forward _flash_attention_forward_no_dropout_inplace "
     "_efficient_attention_forward torch_attn._varlen_attn torch_attn._varlen_attn_out"),
    (_kernel(True, -3),
     "_flash_attention_backward _efficient_attention_backward torch_attn._varlen_attn_backward"),
    (_kernel(False, -2), "_cudnn_attention_forward"),
    (_kernel(True, -2), "_cudnn_attention_backward"),
    (_multi_head_attention, "_native_multi_head_attention _triton_multi_head_attention"),
    (_transformer_encoder, "_transformer_encoder_layer_fwd"),
    (_attention_of_first, "_triton_scaled_dot_attention higher_order.flex_attention"),
    (_backward_of_first, "higher_order.flex_attention_backward"),
    (_recurrent, "_cudnn_rnn miopen_rnn mkldnn_rnn_layer"),
    (_recurrent_backward, "_cudnn_rnn_backward miopen_rnn_backward mkldnn_rnn_layer_backward"),
)  # fmt: skip
"""Formulas by operator; a trailing underscore (in place) changes nothing."""

FORMULAS: dict[str, Formula] = {name: formula for formula, names in _ROWS for name in names.split()}

OPAQUE = _names(
    "fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight "
    "fbgemm_linear_int8_weight_fp32_activation _wrapped_quantized_linear_prepacked"
)
"""Operators that torch registers as composed of others, but whose kernels call none."""

TORCH = _names(
    "aten prims quantized _quantized onednn mkldnn mkl mkldnn_prepacked prepacked sparse inductor "
    "inductor_prims static_runtime quantization c10d _c10d_functional c10d_functional "
    "_c10d_functional_autograd symm_mem fsdp streams rngprims debugprims export _dtensor "
    "torch_attn quantized_decomposed torchvision flex_lib higher_order"
)
"""Namespaces whose operators are named as torch does: they do matrix work if their name says so.
An operator of any other namespace may do anything."""

_FACTORS = (
    r"svd|(^|_)eig|qr(?!t)|chol|solve|lstsq|(^|_)(?<!erf_)inv(_|$|erse)|(^|_)(log|slog)?det(_|$)|"
    r"(^|_)lu(_|$)|ldl|triangular|householder|ormqr|orgqr|geqrf|matrix_exp|linear_combination|pinv"
)
_LOOKS_LIKE_PRODUCTS = re.compile(
    r"mm(?![aeiy])|gemm|matmul|(^|_)mv(_|$)|addmv|dot(?![a-z])|(^|_)addr(_|$)|outer|einsum|kron|"
    r"conv(?!ert)|(?<!bi)(?<!tri)linear|(bi|tri)linear(?!\d)|attention|attn|sdp|transformer|lstm|"
    r"gru(?!a)|rnn|cdist|_dist(_|$)|affine_grid|matrix|linalg|fft|" + _FACTORS,
    re.IGNORECASE,
)
_PREPARES = re.compile(r"(?<!de)pack(?!ed)|reorder|convert|flatten_weight|compress$")
"""Names of operators that only arrange the memory of a weight."""
_REASONS = (
    (re.compile(r"fft"), TRANSFORM),
    (re.compile(r"sparse|^hspmm|^sspaddmm|^_cslt"), SPARSE),
    (re.compile(_FACTORS), FACTORS),
    (re.compile(r"^(quantized|_quantized|prepacked|mkldnn_prepacked|onednn)\."), PACKED),
)
NO_PRODUCTS = _names(
    "_cdist_backward _fused_sdp_choice _linalg_check_errors _thnn_fused_gru_cell "
    "_thnn_fused_gru_cell_backward _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl "
    "linalg__powsum linalg_cross lu_unpack fft_fftfreq fft_rfftfreq"
)
"""Operators without matrix work, though their names look like it: sums and products of single
elements, checks, choices, and lists of frequencies."""


MatrixFlop = Callable[[Sequence[Any], Mapping[str, Any], Any], Counted]
"""A function of an operator's arguments, keyword arguments and result."""


def matrix_formula(func: Any) -> MatrixFlop | None:
    """Return what gives the matrix FLOP of an operator; None if no formula is known for it.

    Args:
        func: an OpOverload or a higher-order operator.
    """
    own = FORMULAS.get(name_of(func))
    if own is not None:
        return _from_call(func, own)
    registered = flop_registry.get(getattr(func, "_overloadpacket", func))
    if registered is None:
        return None
    return lambda args, kwargs, out: registered(*args, **kwargs, out_val=out)


def name_of(func: Any) -> str:
    """Return an operator's name, without ``aten.`` and without the ``_`` of its form in place."""
    if not isinstance(func, torch._ops.OpOverload):
        return f"higher_order.{func.name()}"
    name = func._opname
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if func.namespace == "aten" else f"{func.namespace}.{name}"


def why_uncounted(name: str) -> str | None:
    """Return why an operator without a formula has matrix work that is not counted; None if it has
    none, as far as its name tells."""
    namespace, _, plain = name.rpartition(".")
    if namespace == "higher_order" or (namespace and namespace not in TORCH):
        return UNKNOWN
    prepares = name in NO_PRODUCTS or _PREPARES.search(plain)
    if prepares or not _LOOKS_LIKE_PRODUCTS.search(plain):
        return None
    return next((why for reason, why in _REASONS if reason.search(name)), NO_FORMULA)


def _from_call(func: Any, formula: Formula) -> MatrixFlop:
    """Return a formula as a function of a call's arguments, which it knows by their names."""
    schema = getattr(func, "_schema", None)  # higher-order operators have none
    defaults = {a.name: a.default_value for a in schema.arguments} if schema else {}

    def counted(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Counted:
        given = tensors_in([*args, *kwargs.values()])
        if (reason := _unreadable(given)) is not None:
            return reason
        names = defaults or map(str, range(len(args)))
        passed = dict(zip(names, args, strict=False))
        found = formula(Call({**defaults, **passed, **kwargs}, out))
        is_complex = not isinstance(found, str) and any(t.is_complex() for t in given)
        return COMPLEX * found if is_complex else found

    return counted


def _unreadable(given: Sequence[Tensor]) -> str | None:
    """Return why shapes do not tell the FLOP of a call; None if they do."""
    if any(t.layout in _SPARSE_LAYOUTS for t in given):
        return SPARSE
    return NESTED if any(t.is_nested for t in given) else None
