"""TrainStep: one optimisation step of a student under a method.

This is the only implementation of a step: ``measure`` times this object and ``train`` runs it.

The graph is cut at the student's outputs. The task loss and the objective are differentiated down
to the cut, then the student's backward runs once from there. The gradients are the same as those of
one backward through everything, but each part can be timed and counted separately.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdprof.distributed.data_parallel import (
    CallableModule,
    data_parallel,
    leaves_of,
    synchronize_norms,
)
from kdprof.distributed.ranks import Lead, Ranks
from kdprof.errors import KdprofError, unknown
from kdprof.hardware.device import autocast
from kdprof.method import IGNORE, Method, Network, Taps
from kdprof.optimizer import build_optimizer, clip_gradients, parameter_groups
from kdprof.resized import resized_cross_entropy
from kdprof.resized.tiles import why_no_triton
from kdprof.schedule import learning_rate_factor
from kdprof.study import StepSettings

PHASES = (
    "data",
    "teacher_forward",
    "student_forward",
    "task_loss",
    "objective",
    "objective_backward",
    "student_backward",
    "optimizer",
    "auxiliary",
)
"""The phases partition a step, in this order. task_loss is forward and backward down to the
student's outputs; auxiliary is all of the second optimiser's work."""

Mark = Callable[[str], None]


def ignore_phase(phase: str) -> None:
    """Do nothing at the end of a phase."""


def missing_compiler(device: torch.device) -> str | None:
    """Return what the compiling of a step lacks on this machine; None if it lacks nothing."""
    if device.type != "cuda":
        names = [os.environ.get("CXX", "g++"), "clang++"]
        return None if any(map(shutil.which, names)) else "a C++ compiler, such as g++"
    with torch.cuda.device(device):
        reason = why_no_triton()
    return f"Triton, which does not work here ({reason})" if reason else None


def valid_pixels(labels: Tensor) -> Tensor:
    """Return how many pixels are not void; a scalar on the device."""
    return (labels != IGNORE).sum()


def task_loss(
    logits: Tensor, labels: Tensor, align_corners: bool = False, pixels: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of logits resized to the labels, averaged over valid pixels.

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) int64, :data:`IGNORE` where void.
        align_corners: how the bilinear resize aligns, the network's own setting.
        pixels: divisor of the sum over valid pixels; their number if not given.

    The mean is over valid pixels, as in CIRKD's code; it is 0 if every pixel is void.
    """
    total = resized_cross_entropy(logits, labels, align_corners)
    return total / (valid_pixels(labels) if pixels is None else pixels).clamp(min=1)


def step_seed(seed: int, iteration: int, rank: int = 0) -> int:
    """Return the random seed of one step: a pure function, so that a resumed run draws the same
    dropout and masks as an uninterrupted one. Each rank draws differently."""
    entropy = [seed, iteration, rank] if rank else [seed, iteration]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _shared_classes(student: Network, teacher: Network | None, method: Method) -> int | None:
    """Return how many classes a method receives; None = all classes of the student."""
    if teacher is None or method.incremental:
        return None
    classes = teacher.info.num_classes
    return classes if classes < student.info.num_classes else None


class TrainStep:
    """One optimisation step of ``student`` under ``method``.

    Args:
        student, teacher: networks on ``device``; the teacher is None if the method uses none.
        method: built for these networks, on ``device``.
        iterations: iterations that the learning-rate schedule spans.
        seed: seed of the run; with the iteration it fixes every random draw of the step.
        ranks: the group that runs this step together, each rank on its share of the batch; None if
            one process runs it alone.
    """

    def __init__(
        self,
        *,
        student: Network,
        teacher: Network | None,
        method: Method,
        settings: StepSettings,
        iterations: int,
        seed: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ):
        self.student, self.teacher, self.method = student.train(), teacher, method.train()
        self.settings, self.iterations, self.seed, self.device = settings, iterations, seed, device
        if teacher is not None:
            teacher.eval().requires_grad_(False)
        self._student_taps = ["logits", *(["aux"] if settings.aux_weight else [])]
        self._student_taps += [t for t in method.student_taps() if t not in self._student_taps]
        self._teacher_taps = method.read_of_teacher()
        self._labels_read = "labels" in method.taps
        self._shared_classes = _shared_classes(student, teacher, method)
        self.lead, self._ranks = Lead(ranks), ranks
        self._wrap()
        self._graphs = settings.compile == "cuda-graphs"
        self._optimizer = build_optimizer(parameter_groups(student, method, settings), settings)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._auxiliary_optimizer = self._build_auxiliary()
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format

    def _wrap(self) -> None:
        """Prepare the modules that the step calls: compiled and data-parallel if set so."""
        student, method, ranks = self.student, self.method, self._ranks
        auxiliary = method.auxiliary()
        if ranks and self.settings.sync_batchnorm:
            synchronize_norms(student, ranks)
            synchronize_norms(method, ranks, skip=[auxiliary] if auxiliary is not None else [])
        self._run_student = self._compiled(student)
        self._run_method = self._compiled(method)
        teacher = self.teacher
        self._run_frozen = None if teacher is None else self._compiled(teacher, trained=False)
        self._run_auxiliary: Callable[..., Any] = method.auxiliary_forward
        if ranks:
            self._run_student = data_parallel(
                CallableModule(self._run_student), self._used_parameters()
            )
            self._run_method = data_parallel(
                CallableModule(self._run_method), method.extra_parameters()
            )
        if ranks and auxiliary is not None:
            auxiliary_call = CallableModule(method, "auxiliary_forward")
            self._run_auxiliary = data_parallel(auxiliary_call, auxiliary.parameters())

    def _used_parameters(self) -> set[Tensor]:
        """Return the student's parameters that its taps depend on. The others get no gradient, so
        data parallelism must not wait for one."""
        image = torch.zeros(1, 3, *self.settings.crop, dtype=torch.uint8, device=self.device)
        taps = self.student.eval()(image, self._student_taps)
        self.student.train()
        return leaves_of(vars(taps).values())

    def _compiled(self, module: nn.Module, *, trained: bool = True) -> nn.Module:
        """Return a module, compiled if set so; the second optimiser's work is never compiled."""
        wanted = self.settings.compile
        if wanted == "none" or (wanted == "teacher" and trained):
            return module
        if self.device.type == "cuda":
            why_no_triton()  # the compiler could not find the answer out
        mode = "reduce-overhead" if wanted == "cuda-graphs" else "default"
        compiled = torch.compile(module, dynamic=False, mode=mode)
        return cast(nn.Module, compiled)  # torch's stub does not say that it is a module again

    def _build_auxiliary(self) -> torch.optim.Optimizer | None:
        auxiliary = self.method.auxiliary()
        if auxiliary is None:
            return None
        optimizer = self.method.auxiliary_optimizer(auxiliary.parameters())
        self._auxiliary_rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        iteration: int,
        mark: Mark = ignore_phase,
        *,
        position: float | None = None,
    ) -> dict[str, Tensor]:
        """Take one step and return its unweighted loss terms, detached, on the device.

        Args:
            images: (N, 3, H, W) uint8 RGB.
            labels: (N, H, W) uint8, :data:`IGNORE` where void.
            iteration: from 0; it sets the random draws.
            mark: called at the end of each phase with its name.
            position: position in the learning-rate schedule; the iteration if not given.
        """
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(step_seed(self.seed, iteration, self._ranks.rank if self._ranks else 0))
        self._set_learning_rate(iteration if position is None else position)
        images = images.to(self.device, non_blocking=True, memory_format=self._layout)
        labels = labels.to(self.device, non_blocking=True).long()
        mark("data")
        teacher = self.teacher_taps(images)
        mark("teacher_forward")
        student = self._student_forward(images)
        mark("student_forward")
        cut = Taps(**{k: v.detach().requires_grad_() for k, v in vars(student).items()})
        losses = self._task(cut, labels)
        mark("task_loss")
        terms = self._objective(cut, teacher, labels)
        mark("objective")
        self._backward(terms, self.method.weights)
        mark("objective_backward")
        self._student_backward(student, cut)
        mark("student_backward")
        self._optimizer_step()
        mark("optimizer")
        auxiliary = self._auxiliary_step(cut, teacher, labels)
        mark("auxiliary")
        losses.update(terms, **auxiliary)
        found = self._over_ranks({name: value.detach() for name, value in losses.items()})
        # The next replay of a graph overwrites what this one returned.
        return {name: v.clone() for name, v in found.items()} if self._graphs else found

    def _over_ranks(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of each term over the ranks, so that all ranks see a value that is not
        finite on one of them."""
        if not self._ranks or not losses:
            return losses
        mean = self._ranks.mean(torch.stack([value.float() for value in losses.values()]))
        return dict(zip(losses, mean, strict=True))

    def learning_rate(self, position: float) -> float:
        """Return the learning rate at a position in this step's schedule; groups with a factor have
        that multiple of it."""
        factor = learning_rate_factor(self.settings, position, self.iterations)
        return self.settings.learning_rate * factor

    def _set_learning_rate(self, position: float) -> None:
        factor = learning_rate_factor(self.settings, position, self.iterations)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        if self._auxiliary_optimizer is not None and self.method.auxiliary_decays:
            for group, rate in zip(
                self._auxiliary_optimizer.param_groups, self._auxiliary_rates, strict=True
            ):
                group["lr"] = rate * factor

    def autocast(self) -> torch.autocast:
        """Return the autocast context in which forwards run."""
        return autocast(self.device, self.settings.precision)

    @torch.no_grad()
    def teacher_taps(self, images: Tensor) -> Taps:
        """Return what the method reads of the teacher for images on the device; nothing without a
        teacher."""
        if self._run_frozen is None:
            return Taps()
        with self.autocast():
            return self._run_frozen(images, self._teacher_taps)

    def _student_forward(self, images: Tensor) -> Taps:
        with self.autocast():
            return self._run_student(images, self._student_taps)

    def _task(self, cut: Taps, labels: Tensor) -> dict[str, Tensor]:
        align, pixels = self.student.align_corners, valid_pixels(labels)
        if self._ranks:
            # The mean, because the gradients of ranks with different void pixels are averaged.
            pixels = self._ranks.mean(pixels.float())
        losses = {}
        if not self.method.replaces_task_loss:
            losses["task"] = task_loss(cut.logits, labels, align, pixels)
        weights = {"task": 1.0}
        if self.settings.aux_weight:
            losses["task_aux"] = task_loss(cut.aux, labels, align, pixels)
            weights["task_aux"] = self.settings.aux_weight
        self._backward(losses, weights)
        return losses

    def _objective(self, cut: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        student, method_labels = self._method_inputs(cut, labels)
        with self.autocast():
            return self._run_method(student, teacher, method_labels)

    def _method_inputs(self, cut: Taps, labels: Tensor) -> tuple[Taps, Tensor | None]:
        """Return the student's taps and the labels that the method declared. If the teacher has
        fewer classes, they contain the shared classes only, unless the method is incremental."""
        student = {tap: getattr(cut, tap) for tap in self.method.student_taps()}
        if self._shared_classes is not None:
            per_class = {"logits", "aux", "classifier"}
            for tap in per_class & student.keys():
                axis = 0 if tap == "classifier" else 1
                student[tap] = student[tap].narrow(axis, 0, self._shared_classes)
            # IGNORE is larger than every class, so it stays IGNORE.
            labels = labels.masked_fill(labels >= self._shared_classes, IGNORE)
        return Taps(**student), labels if self._labels_read else None

    def _backward(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        for term in terms:
            if term not in weights:
                raise KdprofError(
                    f"method '{self.method.name}' returns a term without a weight: "
                    f"{unknown('term', term, weights)}"
                )
        weighted = [weights[name] * term for name, term in terms.items() if term.requires_grad]
        if weighted:
            self._scaler.scale(torch.stack(weighted).sum()).backward()

    def _student_backward(self, student: Taps, cut: Taps) -> None:
        reached = [name for name, leaf in vars(cut).items() if leaf.grad is not None]
        torch.autograd.backward(
            [getattr(student, name) for name in reached],
            [getattr(cut, name).grad for name in reached],
        )

    def _optimizer_step(self) -> None:
        if self.settings.max_gradient_norm is not None:
            self._scaler.unscale_(self._optimizer)  # the norm is that of the real gradients
            clip_gradients(self._optimizer, self.settings.max_gradient_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _auxiliary_step(self, cut: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        if self._auxiliary_optimizer is None:
            return {}
        student, method_labels = self._method_inputs(cut, labels)
        with self.autocast():
            terms = self._run_auxiliary(student.detach(), teacher, method_labels)
        weights = self.method.auxiliary_weights
        # Unscaled: a gradient penalty differentiates twice, and the scale would enter squared.
        torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
        self._auxiliary_optimizer.step()
        self._auxiliary_optimizer.zero_grad(set_to_none=True)
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: student, extras, optimisers, loss scale."""
        auxiliary = self._auxiliary_optimizer
        return {
            "student": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "auxiliary_optimizer": auxiliary.state_dict() if auxiliary is not None else {},
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`; on rank 0, this restores it on every rank."""
        self.lead.load(state)
        self.student.load_state_dict(state["student"])
        self.method.load_state_dict(state["method"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._auxiliary_optimizer is not None:
            self._auxiliary_optimizer.load_state_dict(state["auxiliary_optimizer"])
        self._scaler.load_state_dict(state["scaler"])
