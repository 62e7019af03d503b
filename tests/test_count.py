"""Matrix FLOP against formulas written by hand. 1 multiply-add = 2 FLOP."""

import copy

import pytest
import torch
from builders import Alone, Mimic, tiny_step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdprof.measure import count
from kdprof.measure.count import count_step, fake_tensors


def flop_of(module: nn.Module, shape: tuple[int, ...], *, first: bool) -> tuple[int, int]:
    """Forward, and forward + backward; ``first``: the input itself needs no gradient."""
    counter = FlopCounterMode(display=False, custom_mapping=count._FORMULAS)
    x = torch.randn(shape, requires_grad=not first)
    with counter:
        out = module(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "multiply_adds"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 10), 2 * 8 * 10 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 4 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (1, 4, 8, 8), 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 1, bias=True), (1, 4, 5, 7), 5 * 7 * 6 * 4),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), (1, 8, 6, 6), 6 * 6 * 12 * 2 * 9),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 25),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 5, 5), 5 * 5 * 4 * 3 * 4),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
    ],
)
def test_one_layer(module, shape, multiply_adds):
    assert flop_of(module, shape, first=False) == (2 * multiply_adds, 6 * multiply_adds)
    assert flop_of(copy.deepcopy(module), shape, first=True) == (
        2 * multiply_adds,
        4 * multiply_adds,
    )


def tiny_forward(width: int, positions: int) -> dict[str, int]:
    """Multiply-adds of TinyNet's layers per image."""
    return {
        "stem": positions * width * 3 * 9,
        "body": positions * 2 * width * width * 9,
        "classifier": positions * 3 * 2 * width,
        "auxiliary": positions * 3 * width,
    }


def test_whole_step_by_hand():
    """Student: every layer forward, twice backward, but the first layer's input needs no
    gradient. Teacher: forward only, without its auxiliary head. Adaptor: 12 -> 20 channels."""
    found = count_step(tiny_step(Mimic), fake_tensors()).flop
    positions = 4 * 4 * 5
    student, teacher = tiny_forward(6, positions), tiny_forward(10, positions)
    adapt = positions * 12 * 20
    assert found.student == 2 * sum(student.values())
    assert found.teacher == 2 * (sum(teacher.values()))
    assert found.objective == 2 * adapt
    assert found.backward == 2 * (2 * sum(student.values()) - student["stem"] + 2 * adapt)
    assert found.auxiliary == 0
    assert found.total == found.student + found.teacher + found.objective + found.backward


def test_student_alone_pays_no_teacher():
    found = count_step(tiny_step(Alone), fake_tensors()).flop
    assert (found.teacher, found.objective) == (0, 0)


def test_counting_neither_runs_nor_allocates():
    """A crop that would need terabytes is counted all the same, in proportion."""
    small = count_step(tiny_step(Alone, batch=2, crop=(64, 64)), fake_tensors())
    large = count_step(tiny_step(Alone, batch=2, crop=(65536, 65536)), fake_tensors())
    assert large.flop.total == pytest.approx(small.flop.total * 2**20)
    assert large.least_memory_bytes > 2**38


def test_step_and_fvcore_agree_on_the_forward():
    """Two counters that share no code: fvcore's convolution multiply-adds, doubled, are torch's."""
    from fvcore.nn import FlopCountAnalysis

    class Logits(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            taps = self.network(images, ["logits", "aux"])
            return taps.logits, taps.aux

    step = tiny_step(Alone)
    analysis = FlopCountAnalysis(Logits(step.student.eval()), torch.zeros(4, 3, 16, 20))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counted = count_step(tiny_step(Alone), fake_tensors()).flop.student
    assert 2 * analysis.by_operator()["conv"] == counted
