"""The blocks of blocked computations: their size by device, and what a count for a device sees."""

import pytest
import torch
from small_study import small_study

from kdprof.hardware.blocks import (
    CPU_BLOCK_BYTES,
    DEVICE_BLOCK_BYTES,
    block_elements,
    counted_for,
    device_type,
)
from kdprof.measure.counting import count_study
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy

CPU = torch.empty(0)
GPU = torch.empty(0, device="meta")
"""Any tensor that is not a CPU's."""


def test_a_block_follows_the_device():
    assert block_elements(CPU) == CPU_BLOCK_BYTES / 4
    assert block_elements(GPU) == DEVICE_BLOCK_BYTES / 4 > block_elements(CPU)


def test_work_can_be_counted_for_another_device():
    with counted_for("cuda"):
        assert (device_type(CPU), block_elements(CPU)) == ("cuda", DEVICE_BLOCK_BYTES / 4)
        with counted_for("cpu"):
            assert device_type(GPU) == "cpu"
        assert device_type(CPU) == "cuda"
    with pytest.raises(ZeroDivisionError), counted_for("cuda"):
        _ = 1 / 0
    assert device_type(CPU) == "cpu"


def test_a_study_is_counted_for_a_gpu_on_any_machine():
    """Its task loss is that of a GPU's kernels, which need not be there."""
    study = ResolvedStudy(small_study(step__crop=(256, 256)))
    (cost,) = count_study.count_costs(study, ["kd"], Progress(None)).costs
    (counted,) = dict(count_study.counts(study, ["kd"], Progress(None), "cpu")).values()
    names = [{o.name for o in found.operations} for found in (cost, counted)]
    tiled, banded = "kdprof.tiled_cross_entropy", "kdprof.banded_cross_entropy"
    assert [(tiled in found, banded in found) for found in names] == [(True, False), (False, True)]
