"""The device: how to find it, torch's settings for it, and versions of software."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn

from kdprof import __version__
from kdprof.errors import UserError, unknown

AnyModule = TypeVar("AnyModule", bound=nn.Module)
AMPERE = (8, 0)
"""Compute capability of the first GPUs with TF32."""
CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""The values of that variable with which cuBLAS repeats its results, see its documentation."""


def find_device(name: str) -> torch.device:
    """Return the torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` names.

    Raises:
        UserError: the name is malformed, or this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise UserError(f"device '{name}' is not known; give auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UserError(f"device '{name}': torch sees no CUDA GPU; use --device cpu")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device '{name}': this machine has cuda:0 to cuda:{last}")
    return torch.device("cuda", index)


def placed(module: AnyModule, device: torch.device, *, channels_last: bool) -> AnyModule:
    """Move a module to a device, its weights in the wanted memory layout, and return it."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # torch's stub of Module.to lacks memory_format.
    return module.to(device, memory_format=layout)  # type: ignore[call-overload]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_unused(device: torch.device) -> None:
    """Give memory of a GPU that no tensor uses back: torch's cache, and the workspaces that cuBLAS
    keeps after a product (32 MiB on Hopper), which its next one makes again."""
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # private, so it may go away
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The data type of tensors under each precision."""


def check_precision(device: torch.device, precision: str) -> None:
    """Check that a device computes in a precision.

    Raises:
        UserError: the precision is not known, or the device has no TF32.
    """
    if precision not in DTYPES:
        raise UserError(unknown("precision", precision, DTYPES))
    if precision == "tf32" and (lacking := _lacks_tf32(device)):
        raise UserError(
            f"precision 'tf32' needs an NVIDIA GPU of the Ampere generation or later, {lacking}; "
            "use --precision fp32 (step.precision in a study)"
        )


def _lacks_tf32(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"this is a {device.type.upper()}"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return f"{torch.cuda.get_device_name(device)} is older"
    return None


def configure_backends(
    device: torch.device, precision: str, *, deterministic: bool = False
) -> None:
    """Set torch's global settings for every measured and trained step.

    If ``deterministic``, only operators that repeat their results bit for bit may run, and torch
    raises an error at any other one; :func:`require_repeatable_cublas` is then needed, too.
    Otherwise cuDNN may search for the fastest kernels, because shapes do not change during a run.
    TF32 rounds the factors of float32 products to 10 bits of mantissa and sums in float32:

    ========== ============ ===============
    precision  convolutions matrix products
    ========== ============ ===============
    fp32       float32      float32
    tf32       TF32         float32 (torch's own default)
    bf16, fp16 TF32         TF32 (of those that autocast leaves in float32)
    ========== ============ ===============
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams belong to the current device
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # The search for memory that is read before it is written would write every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)  # imports torch's compiler: seconds
    # These switches also set torch's newer ones (fp32_precision); the reverse is not true, and
    # torch then raises an error in code that reads these.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = is_autocast(precision)


def require_repeatable_cublas() -> None:
    """Set the workspaces with which cuBLAS repeats its results, for this process and for those that
    it starts.

    Raises:
        UserError: this process has used CUDA already, or its environment has other workspaces.
    """
    found = os.environ.get(CUBLAS_WORKSPACES)
    if found in REPEATABLE_WORKSPACES:
        return
    wanted = f"{CUBLAS_WORKSPACES}={REPEATABLE_WORKSPACES[0]}"
    if found is not None:
        raise UserError(
            f"step.deterministic: with {CUBLAS_WORKSPACES}={found} cuBLAS does not repeat its "
            f"results; leave the variable out, or set {wanted}"
        )
    if torch.cuda.is_initialized():  # cuBLAS reads the variable once
        raise UserError(
            "step.deterministic: this process has used CUDA already; start Python with "
            f"{wanted} in its environment"
        )
    os.environ[CUBLAS_WORKSPACES] = REPEATABLE_WORKSPACES[0]


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Within the body, matrix products of a GPU may use TF32 or may not. What was set before is
    restored, in both of torch's interfaces for it."""
    switches, older = torch.backends.cuda.matmul, None
    both: list[Any] = [switches, getattr(torch.backends.mkldnn, "matmul", None)]
    # Not before torch 2.9. The older interface sets oneDNN, too.
    newer = [(one, one.fp32_precision) for one in both if hasattr(one, "fp32_precision")]
    with suppress(RuntimeError):  # raised if only the newer one was set
        older = torch.get_float32_matmul_precision()
    switches.allow_tf32 = allowed
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for one, precision in newer:
            one.fp32_precision = precision


def is_autocast(precision: str) -> bool:
    """Return True if forwards run under autocast with a precision."""
    return DTYPES[precision] != torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which forwards run with a precision; without effect for fp32 and
    tf32."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=is_autocast(precision))


def installed_version(package: str) -> str:
    """Return a package's version without importing it; ``none`` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Return the versions of the software that measured numbers depend on."""
    return {
        "kdprof": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": installed_version("timm"),
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else "none",
    }
