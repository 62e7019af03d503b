"""CountedStep: a training step on fake tensors that takes over what other steps have in common
with it.

The graph of a step is cut at the student's outputs. So the teacher's forward depends on nothing of
the method but the taps that it reads; the student's forward and the task loss depend on the
student's taps, and the student's backward on which of them the gradients reach, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kdprof.measure.counting.fakes import CPU, CountingMode
from kdprof.measure.counting.saved import Saved, SavedForBackward
from kdprof.measure.trace import Part, StepTrace
from kdprof.method import Method, Network, Taps
from kdprof.optimizer import state_bytes
from kdprof.step import TrainStep
from kdprof.study import StepSettings, own_optimizer


@dataclass(frozen=True)
class _Forward:
    """What happened until the end of a phase before the objective.

    Attributes:
        result: what the phase returned.
        saved: what is saved for backward at its end.
    """

    part: Part
    result: Any
    saved: Saved


@dataclass(frozen=True)
class _Backward:
    """What happened in the backward of a student.

    Attributes:
        freed: storages that the student's graph no longer saves.
        rise_bytes: by how much the saved bytes rose above those at its beginning, as they do where
            activations are computed again.
        gradients: of the student's parameters.
    """

    part: Part
    freed: list[int]
    rise_bytes: int
    gradients: list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class _Graph:
    """A student's outputs whose backward did not run yet, and what their graph saves."""

    taps: Taps
    saved: SavedForBackward


@dataclass(frozen=True)
class Parts:
    """The parts of a step that is only counted; those of a TrainStep have the same names."""

    student: Network
    teacher: Network | None
    method: Method
    settings: StepSettings


class CountedStep(TrainStep):
    """A step whose modules consist of fakes on the CPU.

    Attributes:
        trace: the trace of its work, under which it must run.
        saved: what its graphs save for backward.
    """

    def __init__(self, parts: Parts | TrainStep, mode: CountingMode):
        super().__init__(
            student=parts.student,
            teacher=parts.teacher,
            method=parts.method,
            settings=parts.settings,
            iterations=1,
            seed=0,
            device=CPU,
        )
        self.trace, self._known = StepTrace(self), mode.known
        self.saved = SavedForBackward([*self.student.parameters(), *self.method.parameters()])
        settings = self.settings.model_dump_json()
        self._teacher_key = (self.teacher, settings, *self._teacher_taps)
        self._student_key = (self.student, settings, *self._student_taps)
        self._graph: _Graph | None = None

    def make_state(self) -> None:
        """Make now what the first step would make: the loss scale, the state of optimisers that
        are not kdprof's."""
        self._scaler.scale(torch.zeros((), device=self.device))
        if own_optimizer(self.settings.optimizer):
            _make_state(self._optimizer)
        if self._auxiliary_optimizer is not None:
            _make_state(self._auxiliary_optimizer)

    @property
    def optimizer_bytes(self) -> int:
        """The state of its optimisers."""
        return state_bytes(self._optimizer, self._auxiliary_optimizer)

    def teacher_taps(self, images: Tensor) -> Taps:
        """Return what the method reads of the teacher; it is run once for all who read the same."""
        run = super().teacher_taps
        found = self._once(("teacher_forward", *self._teacher_key), lambda: run(images))
        # Each method gets its own tensors: it may change their shapes in place.
        return found.detach()

    def _student_forward(self, images: Tensor) -> Taps:
        self._images, key = images, self._student_key
        if key not in self._known:
            self._graph = self._with_graph()
            saved = self._graph.saved.state()
            self._known[key] = _Forward(self.trace.take(), self._graph.taps, saved)
        return self._take_over(self._known[key])

    def _with_graph(self) -> _Graph:
        """Run the student's forward."""
        saved = SavedForBackward(self.student.parameters())
        with saved.hooks():
            return _Graph(super()._student_forward(self._images), saved)

    def _task(self, cut: Taps, labels: Tensor) -> dict[str, Tensor]:
        run, key = super()._task, ("task_loss", self.method.replaces_task_loss, *self._student_key)

        def losses_and_gradients() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            losses = run(cut, labels)
            return losses, _gradients(cut)

        losses, gradients = self._once(key, losses_and_gradients)
        for name, gradient in gradients.items():
            getattr(cut, name).grad = gradient
        return dict(losses)

    def _student_backward(self, student: Taps, cut: Taps) -> None:
        reached = ((name, _signature(grad)) for name, grad in _gradients(cut).items())
        key = ("student_backward", *reached, *self._student_key)
        if key not in self._known:
            self._known[key] = self._run_student_backward(cut)
        found: _Backward = self._known[key]
        self.trace.add(found.part)
        self.saved.rise_to(self.saved.now_bytes + found.rise_bytes)
        for storage in found.freed:
            self.saved.release(storage)
        for parameter, gradient in found.gradients:
            parameter.grad = gradient

    def _run_student_backward(self, cut: Taps) -> _Backward:
        # A graph can be walked once only, so a step that took over its forward has none.
        graph, self._graph = self._graph or self._with_graph(), None
        self.trace.take()
        before, before_bytes = graph.saved.held(), graph.saved.now_bytes
        graph.saved.peak_bytes = before_bytes
        with graph.saved.hooks():
            super()._student_backward(graph.taps, cut)
        forward: _Forward = self._known[self._student_key]
        return _Backward(
            part=self.trace.take(),
            freed=[forward.saved.packed[number] for number in before - graph.saved.held()],
            rise_bytes=graph.saved.peak_bytes - before_bytes,
            gradients=[(p, p.grad) for p in self.student.parameters() if p.grad is not None],
        )

    def _once(self, key: Hashable, run: Callable[[], Any]) -> Any:
        """Return what ``run`` returns, from the first step under this mode that ran it."""
        if key not in self._known:
            result = run()
            self._known[key] = _Forward(self.trace.take(), result, self.saved.state())
        return self._take_over(self._known[key])

    def _take_over(self, found: _Forward) -> Any:
        self.trace.add(found.part)
        self.saved.restore(found.saved)
        return found.result


def _make_state(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradients(cut: Taps) -> dict[str, Tensor]:
    """Return the gradients of the taps that have one."""
    return {name: leaf.grad for name, leaf in vars(cut).items() if leaf.grad is not None}


def _signature(tensor: Tensor) -> Hashable:
    """Return everything about a dense tensor that the work of a backward depends on."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
