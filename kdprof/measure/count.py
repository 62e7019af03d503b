"""FLOP and activation memory of a step, counted under FakeTensorMode: no GPU, no memory needed."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kdprof.records import Flop
from kdprof.step import TrainStep


@dataclass(frozen=True)
class Count:
    """What a step does, whatever the device: matrix FLOP, and bytes it must hold at its peak."""

    flop: Flop
    least_memory_bytes: int
    """A lower bound: parameters, gradients, momentum, teacher, and what backward keeps."""


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


class _Held:
    """A saved tensor, for as long as the graph keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedForBackward:
    """Adds up what the graphs of a step keep for their backward, parameters left out."""

    def __init__(self, step: TrainStep):
        parts = (step.student, step.method)
        self._parameters = {_storage(p) for part in parts for p in part.parameters()}
        self._holders: Counter[int] = Counter()
        self._now_bytes = 0
        self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> _Held:
        """Note a tensor that is being saved; views of one storage count once."""
        held, key = _Held(tensor), _storage(tensor)
        if key in self._parameters:
            return held
        size = tensor.untyped_storage().nbytes()
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._now_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._now_bytes)
        weakref.finalize(held, self._release, key, size)
        return held

    def unpack(self, held: _Held) -> Tensor:
        """Hand a saved tensor back to the graph."""
        return held.tensor

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self._now_bytes -= size


def _storage(tensor: Tensor) -> int:
    """Return what identifies a tensor's storage while it lives; fakes have no address."""
    return tensor.untyped_storage()._cdata


def fake_tensors() -> FakeTensorMode:
    """Return a mode to count under. Steps counted under one mode may share a teacher."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def count_step(step: TrainStep, mode: FakeTensorMode) -> Count:
    """Count one step of the study's batch and crop.

    ``step`` lies on the CPU; its tensors are replaced by fakes, so it cannot run afterwards.
    """
    for module in (step.student, step.teacher, step.method):
        if module is not None:
            _make_fake(module, mode)
    step = _rebuilt(step)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    phases: Counter[str] = Counter()
    saved = SavedForBackward(step)

    def mark(phase: str) -> None:
        phases[phase] = counter.get_total_flops() - phases.total()

    with mode, counter, torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        batch, (height, width) = step.settings.batch, step.settings.crop
        images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
        labels = torch.zeros(batch, height, width, dtype=torch.uint8)
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
    return Count(flop, saved.peak_bytes + _fixed_bytes(step))


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value, FakeTensor):
                fake = nn.Parameter(mode.from_tensor(value.detach()), value.requires_grad)
                part._parameters[name] = fake
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, FakeTensor):
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
