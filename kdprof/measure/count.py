"""A step's work and least memory, counted under FakeTensorMode: needs neither GPU nor memory."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
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
"""Words in torch's errors about code that needs real memory: ``.numpy()``, ``.data_ptr()``."""


class Uncountable(KdprofError):
    """A step cannot run on fake tensors; it is counted when it runs on real ones."""


@dataclass(frozen=True)
class Count:
    """The work of a step, which does not depend on the device."""

    operations: list[Operation]
    """Without seconds: nothing ran."""
    terms: dict[str, TermCost]
    synchronisations: list[Synchronisation]
    least_memory_bytes: int
    """A lower bound: parameters, momentum, teacher, and the larger of the gradients and what is
    saved for backward."""

    @property
    def flop(self) -> Flop:
        """The matrix FLOP by part."""
        return flop_of(self.operations)

    def to_json(self) -> dict[str, Any]:
        """Return it JSON-serialisable."""
        return _COUNT.dump_python(self, mode="json")


_COUNT = TypeAdapter(Count)


def count_from_json(content: Mapping[str, Any]) -> Count:
    """Return the Count that :meth:`Count.to_json` describes."""
    return _COUNT.validate_python(content)


class _Held:
    """A saved tensor, which lives as long as the graph keeps it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedForBackward:
    """The bytes that the graphs of a step save for backward, without parameters."""

    def __init__(self, step: TrainStep):
        parts = (step.student, step.method)
        self._parameters = {storage_key(p) for part in parts for p in part.parameters()}
        self._holders: Counter[int] = Counter()
        self._now_bytes = 0
        self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> _Held:
        """Count a tensor that is being saved; views of one storage count once."""
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
        """Return a saved tensor to the graph."""
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
    """A fake-tensor mode that does not run fused optimisers.

    torch has no fake kernel for them and would run the real one on zeros of the parameters' full
    size, which takes memory and seconds. They return nothing, so no result is missing.
    """

    def dispatch(
        self, func: Any, types: Any, args: Sequence[object] = (), kwargs: Any = None
    ) -> object:
        """Run one operator on fakes."""
        if _is_fused_optimizer(func):
            return None
        return super().dispatch(func, types, args, kwargs or {})


def fake_tensors() -> FakeTensorMode:
    """Return a mode to count under. Steps counted under one mode may share a teacher."""
    return _Fakes(allow_non_fake_inputs=True)


def count_step(step: TrainStep, mode: FakeTensorMode) -> Count:
    """Count one step of the study's batch and crop.

    ``step`` is on the CPU; its tensors are replaced by fakes, so it cannot run afterwards.
    Networks built under ``mode`` consist of fakes already, which saves their initialisation.

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
        refused, where = _refused_by_fakes(error), location_of(error)
        if refused is None:
            raise
        # A boolean index fails deep within torch; the trace saw the operator that the line calls.
        refused = next((s.operator for s in trace.synchronisations() if s.where == where), refused)
        raise Uncountable(
            f"method '{step.method.name}' cannot be counted without running it: {refused} at "
            f"{where} needs real values; it is counted when it runs"
        ) from error


def _refused_by_fakes(error: Exception) -> str | None:
    """Return which operation of the step needs a real tensor; None for any other error, which a
    real step would raise too."""
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
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                part._buffers[name] = mode.from_tensor(buffer)


def _least_bytes(step: TrainStep, saved_bytes: int) -> int:
    """Return the least memory of a step: what is saved for backward is freed as gradients appear,
    so only the larger of the two counts."""
    trained = [*step.student.parameters(), *step.method.parameters()]
    kept = list(step.teacher.parameters()) if step.teacher is not None else []
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    return 2 * size(trained) + size(kept) + max(saved_bytes, size(trained))
