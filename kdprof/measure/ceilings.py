"""Ceilings of the device, measured here: the best rates a phase could reach, and what bounds it.

Also the vendor's published peaks: by convention, model FLOP utilisation is relative to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import torch

from kdprof.hardware.device import DTYPES, free_unused, tf32_products
from kdprof.measure.clock import Clock, clock_of
from kdprof.records import Ceilings, PhaseBound

REPEATS = 20
ENOUGH_S = 0.3
"""Repeats stop after this time, but at least three are made."""
OVERHEAD_SHARE = 1 / 3
"""If the roofline explains less than this share of a phase's time, neither ceiling bounds the
phase: launches, small kernels or waiting do."""

_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
"""Larger than any cache: a smaller copy would measure the cache."""

PUBLISHED_PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA V100 datasheet (2020). Neither TF32 nor bf16 before Ampere.
    r"V100-SXM2": {"fp32": 15.7e12, "fp16": 125e12},
    r"V100-PCIE": {"fp32": 14e12, "fp16": 112e12},
    r"V100S-PCIE": {"fp32": 16.4e12, "fp16": 130e12},
    # NVIDIA T4 datasheet (2019).
    r"Tesla T4": {"fp32": 8.1e12, "fp16": 65e12},
    # NVIDIA A100 datasheet (2021): SXM and PCIe alike.
    r"A100": {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12, "fp16": 312e12},
    # NVIDIA A30 and A10 datasheets (2021).
    r"A30": {"fp32": 10.3e12, "tf32": 82e12, "bf16": 165e12, "fp16": 165e12},
    r"A10": {"fp32": 31.2e12, "tf32": 62.5e12, "bf16": 125e12, "fp16": 125e12},
    # NVIDIA A40 datasheet (2021).
    r"A40": {"fp32": 37.4e12, "tf32": 74.8e12, "bf16": 149.7e12, "fp16": 149.7e12},
    # NVIDIA Ampere GA102 whitepaper, appendix tables. GeForce halves the rate of tensor cores that
    # accumulate in fp32, as torch's do.
    r"RTX A6000": {"fp32": 38.7e12, "tf32": 77.4e12, "bf16": 154.8e12, "fp16": 154.8e12},
    r"RTX 3090$": {"fp32": 35.6e12, "tf32": 35.6e12, "bf16": 71e12, "fp16": 71e12},
    # NVIDIA Ada GPU Architecture whitepaper, appendix tables; accumulating in fp32.
    r"RTX 4090$": {"fp32": 82.6e12, "tf32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12},
    # NVIDIA L4, L40 and L40S datasheets (2023); L4's halved from the figures with sparsity.
    r"L4": {"fp32": 30.3e12, "tf32": 60e12, "bf16": 121e12, "fp16": 121e12},
    r"L40": {"fp32": 90.5e12, "tf32": 90.5e12, "bf16": 181.05e12, "fp16": 181.05e12},
    r"L40S": {"fp32": 91.6e12, "tf32": 183e12, "bf16": 362.05e12, "fp16": 362.05e12},
    # NVIDIA H100 Tensor Core GPU Architecture whitepaper (2023): SXM5's name has its memory type.
    r"H100 80GB HBM3": {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12},
    r"H100 PCIe": {"fp32": 51.2e12, "tf32": 378e12, "bf16": 756e12, "fp16": 756e12},
    # NVIDIA H200 datasheet (2024), the SXM one; halved from the figures with sparsity (989, 1979).
    r"H200$": {"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12, "fp16": 989.5e12},
}
"""Dense FLOP/s by a pattern of whole words in CUDA's device name and by precision: fp32 without
tensor cores, the others with them. The peak of any other device is not known."""


def published_peak(device_name: str, precision: str) -> float | None:
    """Return the vendor's dense peak in FLOP/s; None if it is not known.

    It is not known for a MIG slice: its share of the GPU is not in the table.
    """
    if "MIG" in device_name:
        return None
    for pattern, peaks in PUBLISHED_PEAKS.items():
        if re.search(rf"\b{pattern}(?!\w)", device_name):
            return peaks.get(precision)
    return None


def measure_ceilings(device: torch.device, precision: str) -> Ceilings:
    """Time a large matrix product and a large copy on the device.

    A ceiling is a maximum, so the best repeat counts: any disturbance only adds time. It takes a
    second and 2 GiB of a GPU's memory, which is freed afterwards.

    Args:
        precision: fp32 (without TF32), tf32, bf16 or fp16.
    """
    clock, exact = clock_of(device), None
    with tf32_products(precision != "fp32"):
        flop_per_s = _matmul_flop_per_s(device, clock, DTYPES[precision])
    if precision == "tf32":
        with tf32_products(False):
            exact = _matmul_flop_per_s(device, clock, torch.float32)
    bytes_per_s = _copy_bytes_per_s(device, clock)
    free_unused(device)  # it is not a step's
    return Ceilings(
        matmul_flop_per_s=flop_per_s,
        exact_matmul_flop_per_s=exact,
        copy_bytes_per_s=bytes_per_s,
        precision=precision,
    )


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """Return the higher of two readings of each ceiling: a disturbance that slows one reading down
    is no limit of the device."""
    exact = [c.exact_matmul_flop_per_s for c in (one, other) if c.exact_matmul_flop_per_s]
    return Ceilings(
        matmul_flop_per_s=max(one.matmul_flop_per_s, other.matmul_flop_per_s),
        exact_matmul_flop_per_s=max(exact, default=None),
        copy_bytes_per_s=max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        precision=one.precision,
    )


def _matmul_flop_per_s(device: torch.device, clock: Clock, dtype: torch.dtype) -> float:
    size = _MATMUL_SIZE[device.type]
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / _best_s(clock, lambda: torch.mm(left, right, out=product))


def _copy_bytes_per_s(device: torch.device, clock: Clock) -> float:
    # Ones, not empty: pages that were never written all map to one page.
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.numel() / _best_s(clock, lambda: target.copy_(source))


def _best_s(clock: Clock, work: Callable[[], object]) -> float:
    """Return the shortest of several timed runs of ``work``, after one untimed run."""
    work()
    clock.synchronize()
    began = clock.now()
    times: list[float] = []
    while len(times) < 3 or (len(times) < REPEATS and clock.now() - began < ENOUGH_S):
        before = clock.stamp()
        work()
        after = clock.stamp()
        clock.synchronize()
        times.append(clock.between(before, after))
    return min(times)


def phase_bound(
    matrix_flop: float,
    bytes_moved: float,
    seconds: float,
    ceilings: Ceilings,
    *,
    product_flop: float = 0.0,
) -> PhaseBound:
    """Return what bounds a phase with this work and these measured seconds, by the roofline.

    Args:
        product_flop: the part of ``matrix_flop`` that is no convolution's; with tf32 it is
            compared with the ceiling of exact float32.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if seconds <= 0:
        raise ValueError(f"a phase of {seconds} s has no bound")
    exact = product_flop if ceilings.exact_matmul_flop_per_s else 0.0
    compute_s = (matrix_flop - exact) / ceilings.matmul_flop_per_s
    compute_s += exact / (ceilings.exact_matmul_flop_per_s or ceilings.matmul_flop_per_s)
    memory_s = bytes_moved / ceilings.copy_bytes_per_s
    share = max(compute_s, memory_s) / seconds
    return PhaseBound(
        matrix_flop=matrix_flop,
        bytes_moved=bytes_moved,
        intensity=matrix_flop / bytes_moved if bytes_moved else None,
        ceiling_share=share,
        bound=_bound(compute_s, memory_s, share),
    )


def _bound(
    compute_s: float, memory_s: float, share: float
) -> Literal["compute", "memory", "overhead"]:
    if share < OVERHEAD_SHARE:
        return "overhead"
    return "compute" if compute_s >= memory_s else "memory"
