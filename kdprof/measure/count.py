"""FLOP and activation memory of a step, counted under FakeTensorMode: no GPU, no memory needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kdprof.records import Flop
from kdprof.step import TrainStep


@dataclass(frozen=True)
class Count:
    """What a step does, whatever the device: matrix FLOP, and bytes it must hold at its peak."""

    flop: Flop
    least_memory_bytes: int
    """A lower bound: parameters, gradients, momentum, teacher, and what backward has saved."""


def convolution_flop(
    x_shape: Any, w_shape: Any, out_shape: Any, groups: int, transposed: bool
) -> int:
    """Return the FLOP of a convolution: 2 per multiply-add.

    ``w_shape`` is (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed: the
    weight already holds the division by groups.
    """
    positions = math.prod(x_shape[2:] if transposed else out_shape[2:])
    return 2 * x_shape[0] * positions * math.prod(w_shape)


def _forward_flop(
    x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return convolution_flop(x, w, out_shape, groups, transposed)


def _backward_flop(
    grad: Any, x: Any, w: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Any,
    *rest: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Each gradient asked for (input, weight) costs as much as the forward.

    torch's own formula leaves ``groups`` out of the weight gradient: a depthwise convolution then
    counts as many times too much as it has channels.
    """
    return convolution_flop(x, w, grad, groups, transposed) * sum(map(bool, output_mask[:2]))


_FORMULAS = {
    torch.ops.aten.convolution: _forward_flop,
    torch.ops.aten._convolution: _forward_flop,
    torch.ops.aten.convolution_backward: _backward_flop,
}


def count_step(make_step: Callable[[], TrainStep], batch: int, crop: tuple[int, int]) -> Count:
    """Count one step of the given batch and crop.

    ``make_step`` builds the step on the CPU; its tensors are replaced by fakes before it runs.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    step = make_step()
    for module in (step.student, step.teacher, step.method):
        if module is not None:
            _make_fake(module, mode)
    step = _rebuilt(step)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    phases: Counter[str] = Counter()
    saved: dict[int, int] = {}

    def mark(phase: str) -> None:
        phases[phase] = counter.get_total_flops() - phases.total()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mode, counter, hooks:
        images = torch.zeros(batch, 3, *crop, dtype=torch.uint8)
        labels = torch.zeros(batch, *crop, dtype=torch.uint8)
        step(images, labels, 0, mark)
    backward = phases["objective_backward"] + phases["student_backward"]
    forward = {p: phases[f"{p}_forward"] for p in ("teacher", "student")}
    flop = Flop(
        **forward,
        objective=phases["objective"],
        backward=backward,
        auxiliary=phases["auxiliary"],
        total=phases.total(),
    )
    return Count(flop, sum(saved.values()) + _fixed_bytes(step))


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = nn.Parameter(mode.from_tensor(value.detach()), value.requires_grad)
                part._parameters[name] = fake
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = mode.from_tensor(value)


def _rebuilt(step: TrainStep) -> TrainStep:
    """Make the step again around its (now fake) parameters, so that the optimiser holds them."""
    return TrainStep(
        student=step.student,
        teacher=step.teacher,
        method=step.method,
        settings=step.settings,
        iterations=step.iterations,
        seed=step.seed,
        device=step.device,
    )


def _fixed_bytes(step: TrainStep) -> int:
    trained = [*step.student.parameters(), *step.method.parameters()]
    kept = list(step.teacher.parameters()) if step.teacher is not None else []
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    return 3 * size(trained) + size(kept)
