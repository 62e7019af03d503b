"""A GPU's autocast, for steps that are counted on fakes of a CPU.

torch lists for each kind of device what autocast runs in half precision and what in float32. A
CPU's list leaves softmax, norms and resizes in the type that they are given; a GPU's runs them in
float32, which takes more operators and bytes. Fakes of a CPU follow the CPU's list, so a count for
a GPU puts the GPU's in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import OpOverload
from torch.library import Library, fallthrough_kernel

from kdprof.errors import KdprofError

Arguments = Mapping[str, Any]
"""The arguments of a call by name."""
Rule = Callable[[OpOverload, Arguments], Any]


def autocast_off() -> AbstractContextManager[None]:
    """Return a context in which a CPU's autocast changes no call."""
    return torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCPU))


def _changes(value: Any) -> bool:
    """Return whether autocast may change the type of an argument."""
    if not isinstance(value, Tensor) or not value.is_cpu:
        return False
    return value.is_floating_point() and value.dtype != torch.float64


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(part, dtype) for part in value]
    return value.to(dtype) if _changes(value) else value


def _run_in(dtype: torch.dtype, operator: OpOverload, given: Arguments) -> Any:
    return operator(**{name: _cast(value, dtype) for name, value in given.items()})


def _in_half(operator: OpOverload, given: Arguments) -> Any:
    # torch keeps the copy of a parameter for its next use; here it is made again. The operators of
    # layers, which have parameters, do not come here: they are on the CPU's list, too.
    return _run_in(torch.get_autocast_dtype("cpu"), operator, given)


def _in_float32(operator: OpOverload, given: Arguments) -> Any:
    return _run_in(torch.float32, operator, given)


def _in_widest(operator: OpOverload, given: Arguments) -> Any:
    """Run it in float32 if one of its tensors is float32, else in half precision."""
    listed = [part for v in given.values() for part in (v if isinstance(v, list) else [v])]
    wide = any(_changes(part) and part.dtype == torch.float32 for part in listed)
    return (_in_float32 if wide else _in_half)(operator, given)


def _to_float32(operator: OpOverload, given: Arguments) -> Any:
    """Run it on what it is given and let it return float32, unless its caller asks for a type."""
    if given["dtype"] is None and _changes(given["self"]):
        return operator(**{**given, "dtype": torch.float32})
    return operator(**given)


def _softmax_to_float32(operator: OpOverload, given: Arguments) -> Any:
    """Do the same for a softmax, whose kernel for float16 returns float32 without a copy before."""
    fused = operator._overloadname == "int" and given["dtype"] in (None, torch.float32)
    if not fused or given["self"].dtype != torch.float16:
        return _to_float32(operator, given)
    return getattr(torch.ops.aten, f"_{operator._opname}")(given["self"], given["dim"], True)


_TYPED_NORMS = {
    "Scalar": "ScalarOpt_dtype",
    "ScalarOpt_dim": "ScalarOpt_dim_dtype",
    "names_ScalarOpt_dim": "names_ScalarOpt_dim_dtype",
}
"""The overloads of a norm that return the type that they are asked for, by those that do not."""


def _norm_to_float32(operator: OpOverload, given: Arguments) -> Any:
    typed = getattr(torch.ops.aten.norm, _TYPED_NORMS[operator._overloadname])
    source = given["self"]
    return typed(**given, dtype=torch.float32 if _changes(source) else source.dtype)


def _refused(operator: OpOverload, given: Arguments) -> Any:
    raise RuntimeError(
        f"torch refuses {operator._opname} under autocast on a GPU; use "
        f"{operator._opname}_with_logits, or compute it with autocast off"
    )


def _unknown(operator: OpOverload, given: Arguments) -> Any:
    raise KdprofError(
        f"kdprof does not know in which type autocast of torch {torch.__version__} runs "
        f"{operator} on a GPU, so it cannot be counted; measure it on the GPU"
    )


_NAMES: dict[Rule, str] = {
    _in_half: (
        "_convolution _cudnn_rnn _scaled_dot_product_flash_attention _thnn_fused_gru_cell "
        "_thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d "
        "conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution "
        "cudnn_convolution cudnn_convolution_transpose einsum gru_cell linalg_multi_dot "
        "linalg_vecdot linear lstm_cell matmul mm mv prelu rnn_relu_cell rnn_tanh_cell "
        "scaled_dot_product_attention"
    ),
    _in_float32: (
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d acos asin "
        "binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss cosine_similarity dist "
        "erfinv exp expm1 frobenius_norm group_norm hinge_embedding_loss huber_loss kl_div l1_loss "
        "layer_norm log log10 log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss "
        "multilabel_margin_loss native_layer_norm nll_loss nll_loss2d nuclear_norm pdist "
        "poisson_nll_loss pow reciprocal renorm rms_norm rsqrt sinh smooth_l1_loss "
        "soft_margin_loss softplus tan triplet_margin_loss upsample_bicubic2d upsample_bilinear2d "
        "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_trilinear3d"
    ),
    _to_float32: "cumprod cumsum linalg_matrix_norm linalg_vector_norm prod sum",
    _softmax_to_float32: "log_softmax softmax",
    _norm_to_float32: "norm",
    _in_widest: (
        "addcdiv addcmul atan2 bilinear cat cross dot grid_sampler index_put scatter_add stack "
        "tensordot vdot"
    ),
    _refused: "binary_cross_entropy",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""How a GPU's autocast runs an operator, by its name in ``aten``, in any version of torch. Which
operators autocast runs so in the installed version, torch says."""

_LEFT_ALONE = {"mkldnn_rnn_layer"}
"""On a CPU's list and right for a GPU, too: there cuDNN's layer, which a CPU lacks, runs in half
precision."""


def listed(key: DispatchKey) -> set[str]:
    """Return the operators that autocast of one kind of device changes, as ``name.overload``."""
    found = torch._C._dispatch_get_registrations_for_dispatch_key(key.name)
    return {name.removeprefix("aten::") for name in found if name.startswith("aten::")}


@contextmanager
def autocast_of(device_type: str) -> Iterator[None]:
    """Let a CPU's autocast do in the body what that of another kind of device does.

    It holds for all threads of the process, so no real step may run in the body.

    Args:
        device_type: ``cpu``, which changes nothing, or ``cuda``.
    """
    if device_type == "cpu":
        yield
        return
    gpu, cpu = listed(DispatchKey.AutocastCUDA), listed(DispatchKey.AutocastCPU)
    rules = Library("aten", "IMPL", "AutocastCPU")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that operators are on the list already
            for name in gpu:
                rule = RULES.get(name.partition(".")[0], _unknown)
                # torch casts the parameters of these itself, once for all their uses.
                if rule is not _in_half or name not in cpu:
                    rules.impl(name, _kernel(name, rule))
            for name in cpu - gpu - _LEFT_ALONE:
                rules.impl(name, fallthrough_kernel)
        yield
    finally:
        rules._destroy()


def _kernel(name: str, rule: Rule) -> Callable[..., Any]:
    """Return what autocast does with the calls of an operator."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    arguments = operator._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        with autocast_off():
            return rule(operator, given)

    return run
