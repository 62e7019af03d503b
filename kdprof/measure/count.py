"""What a step does and must hold, counted under FakeTensorMode: no GPU, no memory needed."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from kdprof.errors import KdprofError
from kdprof.measure.cost import flop_of
from kdprof.measure.operators import operator_of
from kdprof.measure.trace import StepTrace, Synchronisation, location_of, storage_key
from kdprof.records import Flop, Operation, TermCost
from kdprof.step import TrainStep

REFUSED_BY_FAKES = ("FakeTensor", "tensor subclasses")
"""Words of torch where code reaches for a tensor's memory: ``.numpy()``, ``.data_ptr()``."""


class Uncountable(KdprofError):
    """A step that fake tensors cannot take; it can be run, and counted then."""


@dataclass(frozen=True)
class Count:
    """What a step does, whatever the device."""

    operations: list[Operation]
    """Without seconds: nothing ran."""
    terms: dict[str, TermCost]
    synchronisations: list[Synchronisation]
    least_memory_bytes: int
    """A lower bound: parameters, momentum, teacher, and what backward keeps or the gradients."""

    @property
    def flop(self) -> Flop:
        """The matrix FLOP by part."""
        return flop_of(self.operations)


class _Held:
    """A saved tensor, for as long as the graph keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedForBackward:
    """Adds up what the graphs of a step keep for their backward, parameters left out."""

    def __init__(self, step: TrainStep):
        parts = (step.student, step.method)
        self._parameters = {storage_key(p) for part in parts for p in part.parameters()}
        self._holders: Counter[int] = Counter()
        self._now_bytes = 0
        self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> _Held:
        """Note a tensor that is being saved; views of one storage count once."""
        held, key = _Held(tensor), storage_key(tensor)
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


@functools.cache
def _is_fused_optimizer(func: Any) -> bool:
    fused = isinstance(func, OpOverload) and func._opname.startswith("_fused_")
    return fused and not func._schema.returns


class _Fakes(FakeTensorMode):
    """Fake tensors whose fused optimisers cost nothing, too.

    torch has no fake kernel for those, and falls back to running the real one on zeros of the
    parameters' full size: memory, and seconds. They return nothing that could be missed.
    """

    def dispatch(
        self, func: Any, types: Any, args: Sequence[object] = (), kwargs: Any = None
    ) -> object:
        """Answer an operator with fakes."""
        if _is_fused_optimizer(func):
            return None
        return super().dispatch(func, types, args, kwargs or {})


def fake_tensors() -> FakeTensorMode:
    """Return a mode to count under. Steps counted under one mode may share a teacher."""
    return _Fakes(allow_non_fake_inputs=True)


def count_step(step: TrainStep, mode: FakeTensorMode) -> Count:
    """Count one step of the study's batch and crop.

    ``step`` lies on the CPU; its tensors are replaced by fakes, so it cannot run afterwards.
    Networks built under ``mode`` are fakes already, which spares their initialisation.

    Raises:
        Uncountable: the method asks for a value or a shape that only real tensors have.
    """
    for module in (step.student, step.teacher, step.method):
        if module is not None:
            _make_fake(module, mode)
    step = step.rebuilt()  # so that the optimiser holds the fakes
    saved, trace = SavedForBackward(step), StepTrace(step)
    batch, (height, width) = step.settings.share, step.settings.crop
    with mode:
        images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
        labels = torch.zeros(batch, height, width, dtype=torch.uint8)
        step.make_auxiliary_state()
    with mode, trace, torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        _run(step, images, labels, trace)
    return Count(
        operations=trace.operations(),
        terms=trace.terms(step.method.weights),
        synchronisations=trace.synchronisations(),
        least_memory_bytes=_least_bytes(step, saved.peak_bytes),
    )


def _run(step: TrainStep, images: Tensor, labels: Tensor, trace: StepTrace) -> None:
    try:
        step(images, labels, 0, trace.mark)
    except Exception as error:
        asked, where = _asked_of_fakes(error), location_of(error)
        if asked is None:
            raise
        # A boolean index fails deep within torch; the trace saw the operator that the line calls.
        asked = next((s.operator for s in trace.synchronisations() if s.where == where), asked)
        raise Uncountable(
            f"method '{step.method.name}' cannot be counted without running it: {asked} at "
            f"{where} needs real values; it is counted when it runs"
        ) from error


def _asked_of_fakes(error: Exception) -> str | None:
    """Return what the step asked of a fake tensor that only a real one has; None where the error
    is another one, which a real step would raise too."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return operator_of(error.func).name
    if isinstance(error, UnsupportedOperatorException):
        return str(error.func)
    words = str(error)
    if isinstance(error, RuntimeError) and any(part in words for part in REFUSED_BY_FAKES):
        return words.splitlines()[0].rstrip(".")
    return None


def _make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value, FakeTensor):
                fake = nn.Parameter(mode.from_tensor(value.detach()), value.requires_grad)
                part._parameters[name] = fake
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, FakeTensor):
                part._buffers[name] = mode.from_tensor(value)


def _least_bytes(step: TrainStep, saved_bytes: int) -> int:
    """Return what a step holds at least: gradients come as what backward kept goes."""
    trained = [*step.student.parameters(), *step.method.parameters()]
    kept = list(step.teacher.parameters()) if step.teacher is not None else []
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    return 2 * size(trained) + size(kept) + max(saved_bytes, size(trained))
