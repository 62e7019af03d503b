"""Ceilings measured in place, the roofline by hand, and what vendors publish."""

import time

import pytest
import torch

from kdprof.hardware.device import backends_kept
from kdprof.measure import ceilings
from kdprof.measure.ceilings import (
    PUBLISHED_PEAKS,
    measure_ceilings,
    phase_bound,
    published_peak,
)
from kdprof.records import Ceilings

CPU = torch.device("cpu")
MADE_UP = Ceilings(matmul_flop_per_s=1e12, copy_bytes_per_s=1e11, precision="fp32")
"""A ridge at 10 FLOP per byte."""


@pytest.fixture
def small(monkeypatch):
    """Sizes that take no time: what is tested is not this machine's speed."""
    monkeypatch.setitem(ceilings._MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(ceilings, "ENOUGH_S", 0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ceilings_are_measured_in_each_precision(small, precision):
    found = measure_ceilings(CPU, precision)
    assert found.precision == precision
    assert found.matmul_flop_per_s > 0
    assert found.copy_bytes_per_s > 0


def test_fp32_is_not_tf32_and_other_peoples_switches_stay(small, monkeypatch):
    seen = []
    timed = ceilings._matmul_flop_per_s

    def spy(*given):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return timed(*given)

    monkeypatch.setattr(ceilings, "_matmul_flop_per_s", spy)
    with backends_kept():
        for switch in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = switch
            measure_ceilings(CPU, "bf16")
            measure_ceilings(CPU, "fp32")
            assert torch.backends.cuda.matmul.allow_tf32 == switch
    assert seen == [True, False] * 2


class Scripted:
    """A clock under which the works take these seconds, one after the other."""

    def __init__(self, *seconds):
        self.seconds, self.waited = list(seconds), 0

    def stamp(self):
        return None

    def between(self, before, after):
        return self.seconds.pop(0)

    def synchronize(self):
        self.waited += 1

    def now(self):
        return 0.0


def test_the_best_of_the_repeats_counts(monkeypatch):
    monkeypatch.setattr(ceilings, "REPEATS", 3)
    calls = []
    assert ceilings._best_s(Scripted(0.5, 0.2, 0.4), lambda: calls.append(1)) == 0.2
    assert len(calls) == 4  # one of them untimed


def test_flop_and_bytes_by_hand(monkeypatch, small):
    monkeypatch.setattr(ceilings, "REPEATS", 3)
    flop_per_s = ceilings._matmul_flop_per_s(CPU, Scripted(1.0, 0.5, 1.0), torch.float32)
    assert flop_per_s == 2 * 64**3 / 0.5
    assert ceilings._copy_bytes_per_s(CPU, Scripted(1.0, 1.0, 0.25)) == 2 * 2**16 / 0.25


def test_the_real_sizes_give_plausible_ceilings():
    """The real sizes, once: results that some machine could have."""
    began = time.perf_counter()
    found = measure_ceilings(CPU, "fp32")
    assert time.perf_counter() - began < 30
    assert 1e8 < found.matmul_flop_per_s < 1e15
    assert 1e8 < found.copy_bytes_per_s < 1e13


@pytest.mark.parametrize(
    ("flop", "moved", "seconds", "intensity", "share", "bound"),
    [
        (1e12, 1e9, 2.0, 1000.0, 0.5, "compute"),  # 1 s of matrix products, 0.01 s of memory
        (1e9, 1e11, 1.25, 0.01, 0.8, "memory"),  # 0.001 s, 1 s
        (1e10, 1e9, 0.02, 10.0, 0.5, "compute"),  # at the ridge: 0.01 s of each
        (1e9, 1e8, 1.0, 10.0, 0.001, "overhead"),
        (1e12, 0.0, 1.0, None, 1.0, "compute"),
        (0.0, 1e11, 1.0, 0.0, 1.0, "memory"),
        (0.0, 0.0, 1.0, None, 0.0, "overhead"),
        (0.0, 2e11, 1.0, 0.0, 2.0, "memory"),  # caches: above what a copy from memory reaches
    ],
)
def test_what_bounds_a_phase(flop, moved, seconds, intensity, share, bound):
    found = phase_bound(flop, moved, seconds, MADE_UP)
    assert (found.matrix_flop, found.bytes_moved) == (flop, moved)
    assert found.intensity == intensity
    assert found.ceiling_share == pytest.approx(share)
    assert found.bound == bound


def test_a_third_of_the_time_is_the_border():
    assert phase_bound(0.99e12, 0, 3.0, MADE_UP).bound == "overhead"
    assert phase_bound(1.01e12, 0, 3.0, MADE_UP).bound == "compute"


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_phase_without_time_has_no_bound(seconds):
    with pytest.raises(ValueError, match="no bound"):
        phase_bound(1.0, 1.0, seconds, MADE_UP)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp32", 14e12),
        ("Tesla V100S-PCIE-32GB", "fp32", 16.4e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp32", 8.1e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A10", "fp32", 31.2e12),
        ("NVIDIA A10G", "fp32", None),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "fp32", 90.5e12),
        ("NVIDIA L40S", "fp32", 91.6e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", None),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA H200 NVL", "fp32", None),
        ("NVIDIA GH200 480GB", "fp32", None),
        ("NVIDIA RTX A6000", "fp16", 154.8e12),
        ("NVIDIA GeForce RTX 3090", "fp16", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", "fp16", None),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "fp32", None),
        ("Intel(R) Xeon(R) Processor (2 threads)", "fp32", None),
    ],
)
def test_published_peaks(name, precision, peak):
    assert published_peak(name, precision) == peak


def test_no_device_name_has_two_peaks_and_all_are_plausible():
    for peaks in PUBLISHED_PEAKS.values():
        assert set(peaks) <= {"fp32", "bf16", "fp16"}
        assert 1e12 < peaks["fp32"] < peaks["fp16"] < 3e15
        assert peaks.get("bf16") in (None, peaks["fp16"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_gpu_is_faster_than_its_vendor_says():
    device = torch.device("cuda", 0)
    peak = published_peak(torch.cuda.get_device_name(device), "bf16")
    found = measure_ceilings(device, "bf16").matmul_flop_per_s
    assert peak is None or 0.3 * peak < found < 1.02 * peak
