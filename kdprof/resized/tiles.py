"""The form of a GPU: Triton kernels that compute the resized logits again where they are needed,
and whether Triton works here at all.

They are operators of torch, so that a step is counted on fake tensors without a GPU.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kdprof.hardware.blocks import device_type


def _kernels() -> Any:
    """Return the module of kernels, which imports Triton."""
    return import_module("kdprof.resized.kernels")


_NOT_TRIED = "not tried yet"
_why_not: str | None = _NOT_TRIED
"""A variable, which is a constant for torch.compile; into a cached function it would look."""


def why_no_triton() -> str | None:
    """Return why this machine's GPU cannot run kdprof's kernels; None if it can.

    One tiny run, at the first call in a process, is the test, because Triton needs more than its
    package: a C compiler, Python's headers, a GPU that is not too old. What is to be compiled
    should not make the first call: the compiler cannot trace it.
    """
    global _why_not
    if _why_not == _NOT_TRIED:
        _why_not = _try_triton()
    return _why_not


def _try_triton() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    # Neither a trace nor a count sees this run.
    with _disable_current_modes():
        try:
            logits = torch.zeros(1, 1, 1, 1, device="cuda")
            _kernels().cross_entropy(logits, torch.zeros(1, 1, 1, device="cuda").long(), False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def by_kernels(tensor: Tensor) -> bool:
    """Return whether the work of a tensor is done, or is counted, with kdprof's kernels for GPUs.

    A count assumes a GPU that can run them; no GPU is asked.
    """
    on_a_gpu = tensor.device.type == "cuda"
    return device_type(tensor) == "cuda" and not (on_a_gpu and why_no_triton())


@torch.library.custom_op(
    "kdprof::tiled_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, bool align_corners) -> (Tensor, Tensor)",
)
def tiled_cross_entropy(
    logits: Tensor, labels: Tensor, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over valid pixels, and the log-sum-exp of each pixel.

    Args:
        logits: (N, C, h, w) of any floating type and memory layout.
        labels: (N, H, W) integers.

    Returns:
        A scalar and an (N, H, W) map, float32, or float64 for float64 logits.
    """
    total, norm = _kernels().cross_entropy(logits, labels, align_corners)
    return total, norm


@tiled_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    real = _real_of(logits)
    return logits.new_empty((), dtype=real), logits.new_empty(labels.shape, dtype=real)


@torch.library.custom_op(
    "kdprof::tiled_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, Tensor norm, bool align_corners) -> Tensor",
)
def tiled_cross_entropy_backward(
    logits: Tensor, labels: Tensor, norm: Tensor, align_corners: bool
) -> Tensor:
    """Return the gradient of the summed loss to the logits, in their memory layout.

    Args:
        norm: the log-sum-exp map of :func:`tiled_cross_entropy`.
    """
    gradient: Tensor = _kernels().cross_entropy_backward(logits, labels, norm, align_corners)
    return gradient


@tiled_cross_entropy_backward.register_fake
def _(logits: Tensor, labels: Tensor, norm: Tensor, align_corners: bool) -> Tensor:
    return torch.empty_like(logits, dtype=_real_of(logits))


def tiled_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return the class of the largest resized logit, (N, H, W) int64; of equal ones the first."""
    found: Tensor = _kernels().argmax(logits, size, align_corners)
    return found


def _real_of(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
