"""The kind of torch's operators, and their arithmetic outside matrix products.

Everything follows from shapes, so fake tensors give the same counts as real ones. docs/measuring.md
prints the table of this module. 1 multiply-add = 2 FLOP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from kdprof.records import OperationKind

GROUPS = (list, tuple)
"""Types of arguments that may hold tensors."""


class OperatorCall(NamedTuple):
    """One call of an operator, as a formula sees it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    def first(self) -> Tensor:
        """Return the first tensor argument."""
        return tensors_in(self.args)[0]

    def made(self) -> int:
        """Return the elements of the outputs, or of the first argument if there is no output."""
        made = tensors_in(self.out) or tensors_in(self.args[:1])
        return sum(t.numel() for t in made)


Formula = Callable[[OperatorCall], float]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of an operator's argument or result: a tensor, or lists of them."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, GROUPS):
        for item in value:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, GROUPS):
                found += tensors_in(item)
    return found


def nothing(call: OperatorCall) -> float:
    """Return 0: the operator does no arithmetic."""
    return 0


def _per_output(multiple: float) -> Formula:
    return lambda call: multiple * call.made()


def _per_input(multiple: float) -> Formula:
    return lambda call: multiple * call.first().numel()


def _per_row_of_products(multiple: float) -> Formula:
    """Return the formula of ``multiple`` per output element and component of its vectors."""
    return lambda call: multiple * call.made() * call.first().shape[-1]


def _per_window(call: OperatorCall) -> float:
    """Return one FLOP per element of the pooling window of each output."""
    outputs = tensors_in(call.out)[0].numel()
    kernel = call.args[1]
    dims = call.args[0].dim() - 2
    return outputs * math.prod(kernel if len(kernel) == dims else [kernel[0]] * dims)


def _per_window_backward(call: OperatorCall) -> float:
    kernel, dims = call.args[2], call.args[1].dim() - 2
    return call.first().numel() * math.prod(kernel if len(kernel) == dims else [kernel[0]] * dims)


def per_source(call: OperatorCall) -> float:
    """Return the elements of the largest tensor that goes into the target."""
    return max((t.numel() for t in tensors_in(call.args[1:])), default=0)


def _per_accumulated(call: OperatorCall) -> float:
    """Return one FLOP per accumulated element; assigning is no arithmetic."""
    accumulates = any(call.args[3:4]) or call.kwargs.get("accumulate", False)
    return per_source(call) if accumulates else 0


def per_target(call: OperatorCall) -> float:
    """Return the number of labels (of the negative log-likelihood)."""
    return call.args[1].numel()


def _normalise(training: float, inference: float, always: bool | None = None) -> Formula:
    """Return the formula of ``training`` or ``inference`` FLOP per input element.

    The operator's own flag selects one of them, unless ``always`` does.
    """

    def formula(call: OperatorCall) -> float:
        flags = [a for a in call.args if isinstance(a, bool)]
        trains = always if always is not None else flags[0]
        return (training if trains else inference) * call.first().numel()

    return formula


def _sgd(call: OperatorCall) -> float:
    """Return the FLOP of one multiply-add for the step, and for momentum and decay if not zero."""
    extras = sum(call.kwargs.get(key, 0) != 0 for key in ("momentum", "weight_decay"))
    return 2 * (1 + extras) * sum(t.numel() for t in tensors_in(call.args[0]))


def _adam(per_decay: float) -> Formula:
    """Return the formula of Adam: 13 per value, and ``per_decay`` for weight decay if not zero."""

    def formula(call: OperatorCall) -> float:
        decay = per_decay if call.kwargs.get("weight_decay", 0) else 0
        return (13 + decay) * sum(t.numel() for t in tensors_in(call.args[0]))

    return formula


def _per_resized_logit(multiple: float, per_label: float) -> Formula:
    """Return the formula of ``multiple`` per class of each label, and of ``per_label``.

    It is the arithmetic of the resize, the softmax and the negative log-likelihood, each done once.
    """
    return lambda call: (multiple * call.args[0].shape[1] + per_label) * call.args[1].numel()


def per_parameter(multiple: float) -> Formula:
    """Return the formula of ``multiple`` per element of an optimiser's parameters."""
    return lambda call: multiple * sum(t.numel() for t in tensors_in(call.args[0]))


BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE = 6, 2
BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE = 9, 5
SOFTMAX_FORWARD, SOFTMAX_BACKWARD = 5, 4
BILINEAR_FORWARD, BILINEAR_BACKWARD = 7, 8
RESIZED_FORWARD = BILINEAR_FORWARD + SOFTMAX_FORWARD
RESIZED_BACKWARD = BILINEAR_BACKWARD + SOFTMAX_BACKWARD

ELEMENTWISE = _per_output(1)
_FORWARD_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE)
_ALWAYS_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE, always=True)
_NEVER_NORM = _normalise(BATCH_NORM_FORWARD, BATCH_NORM_FORWARD_INFERENCE, always=False)
_BACKWARD_NORM = _normalise(BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE)
_ALWAYS_BACKWARD = _normalise(BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_INFERENCE, always=True)

_ROWS: tuple[tuple[OperationKind, Formula, str], ...] = (
    ("copy", nothing,
     "_to_copy copy clone cat stack constant_pad_nd repeat roll flip rot90 tril triu diag_embed "
     "fill zero zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full "
     "scalar_tensor arange linspace eye complex im2col col2im pixel_shuffle pixel_unshuffle "
     "channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
     "_local_scalar_dense slice_backward select_backward slice_scatter select_scatter "
     "as_strided_scatter unfold_backward lift lift_fresh_copy view_copy expand_copy permute_copy "
     "_pin_memory repeat_interleave"),
    ("elementwise", ELEMENTWISE,
     "bernoulli uniform normal random exponential rand rand_like randn randn_like randint "
     "randint_like randperm native_dropout masked_fill leaky_relu_backward elu_backward "
     "hardtanh_backward hardsigmoid_backward hardswish hardswish_backward softplus_backward "
     "log_sigmoid_forward log_sigmoid_backward silu_backward mish_backward gelu_backward "
     "sigmoid_backward tanh_backward threshold_backward hardshrink_backward "
     "softshrink_backward _prelu_kernel _prelu_kernel_backward glu glu_backward rrelu_with_noise "
     "floor_divide logical_and logical_or logical_xor isin bucketize"),
    # Torch before 2.12 does not tag these as pointwise.
    ("elementwise", ELEMENTWISE,
     "celu elu hardsigmoid hardtanh leaky_relu selu ldexp _conj_physical"),
    ("elementwise", _per_output(3),
     "mse_loss_backward smooth_l1_loss_backward huber_loss_backward soft_margin_loss_backward "
     "binary_cross_entropy_backward"),
    ("reduction", _per_input(1),
     "sum mean prod all any amax amin max min argmax argmin nansum count_nonzero cumsum cumprod "
     "cummax cummin trace mode"),
    ("reduction", _per_input(2),
     "linalg_vector_norm norm aminmax l1_loss"),
    ("reduction", _per_input(3), "logsumexp logcumsumexp mse_loss smooth_l1_loss huber_loss "
     "soft_margin_loss"),
    ("reduction", _per_input(4), "var std var_mean std_mean binary_cross_entropy"),
    ("reduction", _per_row_of_products(3), "_cdist_forward _pdist_forward"),
    ("softmax", _per_output(SOFTMAX_FORWARD), "_softmax _log_softmax _safe_softmax"),
    ("softmax", _per_output(SOFTMAX_BACKWARD),
     "_softmax_backward_data _log_softmax_backward_data"),
    ("softmax", _per_resized_logit(RESIZED_FORWARD, 1), "kdprof.tiled_cross_entropy"),
    ("softmax", _per_resized_logit(RESIZED_BACKWARD, 1), "kdprof.tiled_cross_entropy_backward"),
    ("softmax", _per_resized_logit(RESIZED_FORWARD + RESIZED_BACKWARD, 2),
     "kdprof.banded_cross_entropy"),
    ("normalisation", _FORWARD_NORM,
     "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit"),
    ("normalisation", _NEVER_NORM, "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    ("normalisation", _ALWAYS_NORM,
     "_batch_norm_with_update native_layer_norm native_group_norm _fused_rms_norm"),
    ("normalisation", _BACKWARD_NORM, "native_batch_norm_backward batch_norm_backward"),
    ("normalisation", _ALWAYS_BACKWARD,
     "cudnn_batch_norm_backward miopen_batch_norm_backward native_layer_norm_backward "
     "native_group_norm_backward _fused_rms_norm_backward"),
    ("resize", nothing,
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
    ("resize", _per_input(BILINEAR_BACKWARD), "kdprof.resize_bilinear_backward"),
    ("pooling", _per_window,
     "max_pool2d_with_indices avg_pool2d max_pool3d_with_indices avg_pool3d"),
    ("pooling", _per_input(1),
     "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
     "max_pool2d_with_indices_backward max_pool3d_with_indices_backward "
     "adaptive_max_pool2d_backward"),
    ("pooling", _per_output(1),
     "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward"),
    ("pooling", _per_window_backward, "avg_pool2d_backward avg_pool3d_backward"),
    ("gather", nothing,
     "index _unsafe_index index_select gather take embedding masked_select nonzero nonzero_static "
     "_unique _unique2 unique_dim unique_consecutive scatter index_copy index_fill masked_scatter"),
    ("gather", per_source, "scatter_add index_add scatter_reduce index_reduce"),
    ("gather", _per_accumulated, "index_put _unsafe_index_put _index_put_impl put"),
    ("gather", _per_input(1), "embedding_dense_backward bincount histc"),
    ("gather", per_target, "nll_loss_forward nll_loss2d_forward"),
    ("gather", lambda call: call.args[2].numel(), "nll_loss_backward nll_loss2d_backward"),
    ("optimizer", _sgd, "_fused_sgd"),
    ("optimizer", _adam(2), "_fused_adam"),
    ("optimizer", _adam(1), "_fused_adamw"),
    ("optimizer", per_parameter(6), "_fused_adagrad"),
    ("optimizer", per_parameter(2), "_foreach_norm _amp_foreach_non_finite_check_and_unscale"),
    ("optimizer", nothing, "_foreach_copy _foreach_zero _amp_update_scale"),
    ("reduction", _per_input(10), "kdprof.pair_tile_sums"),
    ("elementwise", _per_input(8), "kdprof.pair_slope"),
    ("communication", lambda call: sum(t.numel() for t in tensors_in(call.args[:1])),
     "c10d.allreduce"),
    ("communication", nothing, "c10d.broadcast c10d.allgather"),
)  # fmt: skip
"""Kind and arithmetic by operator; a trailing underscore (in place) changes neither."""

TABLE: dict[str, tuple[OperationKind, Formula]] = {
    name: (kind, formula) for kind, formula, names in _ROWS for name in names.split()
}
