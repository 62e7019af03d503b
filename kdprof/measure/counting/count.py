"""A step's work and least memory, counted under FakeTensorMode: needs neither GPU nor memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from kdprof.errors import KdprofError
from kdprof.measure.cost import flop_of
from kdprof.measure.counting.counted_step import CountedStep, Parts
from kdprof.measure.counting.fakes import CountingMode
from kdprof.measure.counting.operators import operator_of
from kdprof.measure.trace import Synchronisation, location_of
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
    """A lower bound: parameters, the state of the optimisers, teacher, and the larger of the
    gradients and what is saved for backward."""

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


def fake_tensors() -> CountingMode:
    """Return a mode to count under. Steps counted under one mode may share networks."""
    return CountingMode()


def count_step(step: Parts | TrainStep, mode: CountingMode) -> Count:
    """Count one step of its settings' batch and crop, run by one process.

    The tensors of ``step`` are replaced by fakes, so it cannot run afterwards; they may be on the
    meta device. What steps counted under one mode have in common is counted once: the forward of a
    teacher, and what a student does under several methods.

    Raises:
        Uncountable: the method asks for a value or a shape that only real tensors have.
    """
    for module in (step.student, step.teacher, step.method):
        if module is not None:
            mode.replace_tensors(module)
    batch, (height, width) = step.settings.share, step.settings.crop
    with mode:
        counted = CountedStep(step, mode)
        images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
        labels = torch.zeros(batch, height, width, dtype=torch.uint8)
        _run(counted, counted.make_state)
    trace = counted.trace
    with mode, trace, counted.saved.hooks():
        _run(counted, lambda: counted(images, labels, 0, trace.mark))
    return Count(
        operations=trace.operations(),
        terms=trace.terms(counted.method.weights),
        synchronisations=trace.synchronisations(),
        least_memory_bytes=_least_bytes(counted, counted.saved.peak_bytes),
    )


def _run(step: CountedStep, work: Callable[[], object]) -> None:
    """Run a part of a step on fake tensors.

    Raises:
        Uncountable: it needs real ones.
    """
    try:
        work()
    except Exception as error:
        refused, where = _refused_by_fakes(error), location_of(error)
        if refused is None:
            raise
        # A boolean index fails deep within torch; the trace saw the operator that the line calls.
        seen = step.trace.synchronisations()
        refused = next((s.operator for s in seen if s.where == where), refused)
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


def _least_bytes(step: CountedStep, saved_bytes: int) -> int:
    """Return the least memory of a step: what is saved for backward is freed as gradients appear,
    so only the larger of the two counts."""
    trained = [*step.student.parameters(), *step.method.parameters()]
    kept = list(step.teacher.parameters()) if step.teacher is not None else []
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    held = size(trained) + size(kept) + step.optimizer_bytes
    return held + max(saved_bytes, size(trained))
