"""The device: how to find it, torch's settings for it, and versions of software."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import nn

from kdprof import __version__
from kdprof.errors import UserError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


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


def configure_backends(device: torch.device, precision: str) -> None:
    """Set torch's global settings for every measured and trained step.

    fp32 means float32: torch lets cuDNN use TF32 by default. cuDNN may search for the fastest
    kernels, because shapes do not change during a run.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams belong to the current device
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The data type of each precision."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which forwards run with a precision; without effect for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks on this machine; None if it lacks nothing."""
    if device.type == "cuda":
        return None if find_spec("triton") else "the package triton"
    names = [os.environ.get("CXX", "g++"), "clang++"]
    return None if any(map(shutil.which, names)) else "a C++ compiler, such as g++"


def installed_version(package: str) -> str:
    """Return a package's version without importing it; ``none`` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@contextmanager
def backends_kept() -> Iterator[None]:
    """Restore torch's global settings after the body."""
    found = (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = found[0]
        torch.backends.cudnn.allow_tf32 = found[1]
        torch.backends.cuda.matmul.allow_tf32 = found[2]


def versions() -> dict[str, str]:
    """Return the versions of the software that measured numbers depend on."""
    return {
        "kdprof": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": installed_version("timm"),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()) if torch.cuda.is_available() else "none",
    }
