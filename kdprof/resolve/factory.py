"""Factory: the networks, methods, training steps and batches of a study."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kdprof.data import Batches
from kdprof.data.scenario import Role
from kdprof.discovery import find_method
from kdprof.distributed.ranks import Ranks
from kdprof.hardware.device import DTYPES, placed
from kdprof.method import Method, Network, NetworkInfo
from kdprof.models import AnyNetwork, SegmentationNetwork, build, folded
from kdprof.models.weights import load_weights
from kdprof.step import TrainStep

if TYPE_CHECKING:
    from kdprof.resolve.study import ResolvedStudy

MEASURED_ITERATIONS = 1_000_000
"""Length of the learning-rate schedule of a step that is only measured."""


class Factory:
    """Creates new networks, methods, steps and batches of a study.

    Args:
        weights: True to load the weights of files into new networks. False if nothing is trained: a
            step costs the same with random weights, and loading with a few of the images.
        ranks: the group that runs the steps together; None if this process runs them alone.
        device: where networks and steps are placed; if not given, the study's device.
    """

    def __init__(
        self,
        study: ResolvedStudy,
        *,
        weights: bool,
        ranks: Ranks | None,
        device: torch.device | None = None,
    ):
        self._study, self._weights, self._ranks = study, weights, ranks
        self._device = device or study.device

    def student(self, seed: int) -> AnyNetwork:
        """Return a new student; its initialisation depends on the seed alone, not on the method."""
        torch.manual_seed(seed)
        plain = self._study.plain
        weights = plain.student_backbone_weights if self._weights else "none"
        classes = self._study.data.num_classes("student")
        return build(plain.student, classes, backbone_weights=weights)

    def teacher(self) -> AnyNetwork:
        """Return a new, untrained teacher."""
        torch.manual_seed(0)
        weights = self._study.plain.teacher_backbone_weights if self._weights else "none"
        classes = self._study.data.num_classes("teacher")
        return build(self._study.teacher_name, classes, backbone_weights=weights)

    def placed_teacher(self) -> AnyNetwork:
        """Return an untrained teacher on the device; its cost is that of the trained one."""
        return self.placed(self.teacher())

    def placed_student(self, seed: int) -> AnyNetwork:
        """Return a new student on the device, not started as the teacher."""
        return self.placed(self.student(seed))

    def published_teacher(self) -> tuple[AnyNetwork, str] | None:
        """Return the teacher on the device, with the weights of its file, and a one-line summary of
        the loaded entries; None if the teacher is to be trained.

        Raises:
            UserError: the file does not fit the network.
        """
        study = self._study
        if study.teacher_weights is None:
            return None
        network = build(study.teacher_name, study.data.num_classes("teacher"))
        loaded = load_weights(network, study.teacher_weights)
        summary = f"{study.teacher_name}, {study.teacher_weights.told()}: {loaded.summary()}"
        return self.placed(network), summary

    def frozen(self, teacher: AnyNetwork) -> AnyNetwork:
        """Return a teacher as steps use it: unchanged, or a copy with folded batch norms and fused
        convolutions."""
        if not self._study.step.fold_teacher:
            return teacher
        assert isinstance(teacher, SegmentationNetwork), "step_problems() refuses others"
        return folded(teacher, DTYPES[self._study.step.precision])

    def placed(self, network: AnyNetwork) -> AnyNetwork:
        """Return a network on the device, in the step's memory layout."""
        return placed(network, self._device, channels_last=self._study.step.channels_last)

    def method(self, name: str) -> Method:
        """Return a new method, built for this study's networks."""
        entry = self._study.methods[name]
        method = entry.create(self._study.plain.method_settings.get(name, {}))
        student, teacher = self._info("student"), self._info("teacher")
        if not method.incremental:
            student = _of_classes(student, teacher.num_classes)
        torch.manual_seed(1)
        with entry.followed():
            method.build(student, teacher if method.needs_teacher() else None)
        return method

    def _info(self, role: Role) -> NetworkInfo:
        study = self._study
        network = study.student_shapes if role == "student" else study.teacher_shapes
        background = study.scenario is not None and study.scenario.background
        return replace(network.info, background=background)

    def step(
        self,
        name: str,
        teacher: AnyNetwork | None,
        *,
        seed: int = 0,
        iterations: int = MEASURED_ITERATIONS,
        student: Network | None = None,
    ) -> TrainStep:
        """Return the step of a method, with new extras.

        Args:
            iterations: iterations that the learning-rate schedule spans.
            student: the student to use, already on the device; if not given, a new one.
        """
        study = self._study
        return TrainStep(
            student=student or self._started_student(seed, teacher),
            teacher=teacher if study.methods[name].cls.needs_teacher() else None,
            method=self.method(name).to(self._device),
            settings=study.step,
            iterations=iterations,
            seed=seed,
            device=self._device,
            ranks=self._ranks,
        )

    def _started_student(self, seed: int, teacher: AnyNetwork | None) -> AnyNetwork:
        """Return a new student on the device; it starts as the teacher if the scenario says so."""
        student, scenario = self.placed_student(seed), self._study.scenario
        if self._study.starts_as_teacher and scenario is not None and teacher is not None:
            assert isinstance(student, SegmentationNetwork), "step_problems() refuses others"
            assert isinstance(teacher, SegmentationNetwork), "it has the student's architecture"
            student.inherit(teacher, background=scenario.background)
        return student

    def teacher_step(self) -> TrainStep:
        """Return the step that trains the teacher itself."""
        study, training = self._study, self._study.teacher_training
        rate = training.learning_rate or study.step.learning_rate
        network = self.placed_teacher()  # also seeds the random start of the method's extras
        method = find_method(training.method).cls()
        method.build(self._info("teacher"), None)
        return TrainStep(
            student=network,
            teacher=None,
            method=method.to(self._device),
            settings=study.step.model_copy(update={"learning_rate": rate}),
            iterations=training.iterations,
            seed=0,
            device=self._device,
            ranks=self._ranks,
        )

    def forget_steps(self) -> None:
        """Free the steps that other ranks hold; this process holds none."""

    def batches(self, seed: int, role: Role = "student") -> Batches:
        """Return this process's share of the training batches of a seed."""
        rank = self._ranks.rank if self._ranks else 0
        return self._study.data.batches(role, seed, rank, few=not self._weights)


def _of_classes(info: NetworkInfo, classes: int) -> NetworkInfo:
    """Return the description of a network for a method that receives only its first classes."""
    channels = dict(info.channels, logits=classes, aux=classes)
    return replace(info, num_classes=classes, channels=channels)
