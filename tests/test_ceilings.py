"""Ceilings measured in place, the roofline by hand, and what vendors publish."""

import pytest
import torch

from kdprof.hardware.device import tf32_products
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


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_ceilings_are_measured_in_each_precision(small, precision):
    found = measure_ceilings(CPU, precision)
    assert found.precision == precision
    assert found.matmul_flop_per_s > 0
    assert found.copy_bytes_per_s > 0
    assert (found.exact_matmul_flop_per_s is not None) == (precision == "tf32")


def test_each_ceiling_of_products_is_timed_at_its_own_precision(small, monkeypatch):
    seen = []
    timed = ceilings._matmul_flop_per_s

    def spy(*given):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return timed(*given)

    monkeypatch.setattr(ceilings, "_matmul_flop_per_s", spy)
    for precision in ("bf16", "fp32", "tf32"):
        measure_ceilings(CPU, precision)
    assert seen == [True, False, True, False]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_a_users_switch_for_tf32_stays(older, allowed):
    switches = torch.backends.cuda.matmul
    with tf32_products(False):  # restores what this test sets
        torch.set_float32_matmul_precision(older)
        with tf32_products(allowed):
            assert switches.allow_tf32 == allowed
            assert switches.fp32_precision == ("tf32" if allowed else "ieee")
        assert torch.get_float32_matmul_precision() == older
        assert switches.allow_tf32 == (older != "highest")


def test_a_users_newer_switch_for_tf32_stays():
    """torch raises an error when the older switch is read after the newer one was set alone."""
    switches = torch.backends.cuda.matmul
    with tf32_products(False):
        switches.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="mix"):
            torch.get_float32_matmul_precision()
        with tf32_products(False):
            assert not switches.allow_tf32
        assert switches.fp32_precision == "tf32"


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
    found = measure_ceilings(CPU, "fp32")
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


def test_exact_products_are_compared_with_their_own_ceiling():
    """With tf32 convolutions are ten times as fast as products here: 0.1 s and 1 s of 2 s."""
    tf32 = MADE_UP.model_copy(
        update={"matmul_flop_per_s": 1e13, "exact_matmul_flop_per_s": 1e12, "precision": "tf32"}
    )
    found = phase_bound(2e12, 0, 2.0, tf32, product_flop=1e12)
    assert found.ceiling_share == pytest.approx(1.1 / 2)
    assert found.bound == "compute"
    assert phase_bound(2e12, 0, 2.0, MADE_UP, product_flop=1e12).ceiling_share == 1


def test_the_higher_reading_of_each_ceiling_counts():
    one = MADE_UP.model_copy(update={"exact_matmul_flop_per_s": 3e11})
    other = MADE_UP.model_copy(update={"exact_matmul_flop_per_s": 2e11, "copy_bytes_per_s": 2e11})
    both = MADE_UP.model_copy(update={"exact_matmul_flop_per_s": 3e11, "copy_bytes_per_s": 2e11})
    assert ceilings.higher(one, other) == ceilings.higher(other, one) == both
    assert ceilings.higher(MADE_UP, MADE_UP) == MADE_UP


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
        ("Tesla T4", "tf32", None),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A10", "fp32", 31.2e12),
        ("NVIDIA A10G", "fp32", None),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "fp32", 90.5e12),
        ("NVIDIA L40S", "fp32", 91.6e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H200", "tf32", 494.5e12),
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
        assert set(peaks) <= {"fp32", "tf32", "bf16", "fp16"}
        assert 1e12 < peaks["fp32"] < peaks["fp16"] < 3e15
        assert peaks.get("bf16") in (None, peaks["fp16"])
        assert ("tf32" in peaks) == ("bf16" in peaks)  # both since Ampere, at half the rate
        assert peaks.get("tf32", peaks["fp16"] / 2) == pytest.approx(peaks["fp16"] / 2, rel=0.02)
