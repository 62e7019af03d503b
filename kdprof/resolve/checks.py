"""Checks of a study: each returns the problems that it finds.

Pure functions: nothing here opens a file, queries a device or builds a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdprof.method import Method
from kdprof.models import AnyNetwork, SegmentationNetwork, is_adapted
from kdprof.models.weights import Weights
from kdprof.study import StepSettings, Study


def gpus_problems(gpus: int, device: str, available: int) -> list[str]:
    """Return why a step cannot run on several GPUs.

    Args:
        device: the study's name of the device.
        available: GPUs of this machine.
    """
    if ":" in device:
        return [
            f"step.gpus = {gpus} takes the first {gpus} GPUs, not {device}; use device = 'cuda', "
            "and CUDA_VISIBLE_DEVICES to choose"
        ]
    if gpus > available:
        return [f"step.gpus = {gpus}: this machine has {available}; use fewer"]
    return []


def step_problems(study: Study, device_type: str, missing_compiler: str | None) -> list[str]:
    """Return the problems of the step settings on this device and in this study.

    Args:
        device_type: cpu or cuda.
        missing_compiler: what torch.compile lacks on this machine; None if it lacks nothing, or if
            the step is not compiled.
    """
    step, problems = study.step, []
    if step.batch % step.gpus:
        problems.append(
            f"a batch of {step.batch} cannot be shared equally by {step.gpus} GPUs; use a "
            f"multiple of {step.gpus} for step.batch"
        )
    if step.gpus > 1 and step.compile == "cuda-graphs":
        problems.append(
            "step.compile = 'cuda-graphs' records the work of one GPU; use 'default' or 'none' "
            f"with step.gpus = {step.gpus}"
        )
    if step.gpus > 1 and study.measure.in_process:
        problems.append(
            f"step.gpus = {step.gpus} is measured in {step.gpus} processes; leave "
            "measure.in_process (--in-process) out"
        )
    if step.compile == "cuda-graphs" and device_type != "cuda":
        problems.append(
            f"step.compile = 'cuda-graphs' needs a CUDA device, this is {device_type}; "
            "use 'default' or 'none'"
        )
    if missing_compiler:
        problems.append(f"step.compile needs {missing_compiler}; install it or use 'none'")
    return problems + _rate_problems(study) + _network_problems(study)


def _rate_problems(study: Study) -> list[str]:
    """Return the base rates that lie below the floor of the schedule."""
    step, teacher = study.step, study.teacher_training.learning_rate
    rates = {"step": step.learning_rate, "teacher_training": teacher}
    return [
        f"{section}.learning_rate = {rate:g} is below step.min_learning_rate = "
        f"{step.min_learning_rate:g}, where the schedule ends; lower step.min_learning_rate"
        for section, rate in rates.items()
        if rate is not None and rate < step.min_learning_rate
    ]


def _network_problems(study: Study) -> list[str]:
    step, problems = study.step, []
    if step.fold_teacher and is_adapted(study.teacher):
        problems.append(
            f"step.fold_teacher cannot fold {study.teacher}, only kdprof's networks; leave it out"
        )
    if study.starts_as_teacher and is_adapted(study.student):
        problems.append(
            f"{study.student} cannot start with the teacher's weights; set "
            'scenario.initialise = "fresh"'
        )
    if step.fold_teacher and study.starts_as_teacher:
        problems.append(
            "step.fold_teacher: a student that starts with the teacher's weights needs its batch "
            "norms; "
            'leave it out, or set scenario.initialise = "fresh"'
        )
    return problems


def crop_problems(networks: Iterable[AnyNetwork], step: StepSettings) -> list[str]:
    """Return why the networks cannot take a training batch."""
    # Synchronised batch norm sees the images of all devices.
    images = step.batch if step.sync_batchnorm else step.share
    return _distinct(network.check_input(images, step.crop, True) for network in networks)


def _distinct(found: Iterable[str | None]) -> list[str]:
    return sorted({problem for problem in found if problem})


def tap_problems(
    methods: Sequence[type[Method]],
    student: AnyNetwork,
    teacher: AnyNetwork,
    aux_weight: float,
    teacher_weights: Weights | None,
) -> list[str]:
    """Return the taps that methods or the auxiliary loss use and a network does not have.

    Args:
        teacher_weights: None if the teacher is to be trained.
    """
    trained = [student] if teacher_weights else [student, teacher]
    problems = [
        f"{name} has no auxiliary head; set step.aux_weight = 0"
        for name in dict.fromkeys(n.info.name for n in trained if "aux" not in n.info.channels)
        if aux_weight
    ]
    given = {"student": _taps_of(student), "teacher": _taps_of(teacher)}
    if teacher_weights and not teacher_weights.has_auxiliary:
        given["teacher"].discard("aux")
    for method in methods:
        read = {"student": method.student_taps(), "teacher": method.read_of_teacher()}
        for role, taps in read.items():
            if lacking := [tap for tap in taps if tap not in given[role]]:
                problems.append(
                    f"method '{method.name}' uses {', '.join(lacking)} of the {role}, which has "
                    f"{', '.join(sorted(given[role]))}; use another network or method"
                )
    return problems


def _taps_of(network: AnyNetwork) -> set[str]:
    """Return the taps of a network; only kdprof's networks have the classifier's weight."""
    own = {"classifier"} if isinstance(network, SegmentationNetwork) else set()
    return {*network.info.channels, *own}
