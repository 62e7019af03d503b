"""From a Study to the live objects that it names, or to everything that is wrong with it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdprof.budget import parse_budget
from kdprof.data import (
    Augmentation,
    Batches,
    DataOnDisk,
    SegmentationData,
    decoded,
    default_folder,
    fit_of,
    fitted_size,
    is_drawn,
    open_data,
)
from kdprof.data.scenario import Role, Scenario
from kdprof.device import configure_backends, find_device, missing_compiler, versions
from kdprof.errors import UserError, unknown
from kdprof.evaluate import Views
from kdprof.hardware import Hardware, hardware_of
from kdprof.method import (
    Found,
    Method,
    NetworkInfo,
    builtin_methods,
    find_method,
    source_hash,
)
from kdprof.models import (
    AdaptedNetwork,
    SegmentationNetwork,
    build,
    check_network,
    folded,
    is_adapted,
    parse_name,
    source_of,
)
from kdprof.models.names import NetworkName
from kdprof.models.weights import Weights, check_weights, load_weights, read_weights
from kdprof.parallel import Ranks
from kdprof.progress import Progress
from kdprof.records import REFERENCE
from kdprof.step import TrainStep
from kdprof.study import Study

CONTROLS = (REFERENCE, "kd")
"""What every comparison holds at the same budget, unless it is told not to."""


class ResolvedStudy:
    """A study whose every name was found: device, data, networks, methods.

    Args:
        parent: another process of ours on the device, which is no stranger there.
        weights: whether networks begin with their files' weights; a step costs the same with random
            ones.
        ranks: the group that this process makes steps with, where ``step.gpus`` asks for one. What
            its rank 0 does to the study's steps, the others are told to do.
        progress: told when images are decoded into memory or into the cache.

    Raises:
        UserError: whatever is wrong, all of it at once.
    """

    def __init__(
        self,
        study: Study,
        *,
        parent: int | None = None,
        progress: Progress | None = None,
        weights: bool = True,
        ranks: Ranks | None = None,
    ):
        self.study, self._progress, self.ranks = study, progress or Progress(None), ranks
        self._weights = weights
        self._own_pids = frozenset({os.getpid()} | ({parent} if parent is not None else set()))
        self._own_pids |= ranks.pids if ranks else frozenset()
        problems: list[str] = []
        self.device = _checked(problems, self._find_device, torch.device("cpu"))
        self.methods = self._find_methods(problems)
        for network in (study.student, study.teacher):
            _checked(problems, lambda name=network: check_network(name), None)
        self._teacher_weights = _checked(problems, self._read_teacher_weights, None)
        _checked(problems, self._check_teacher_method, None)
        _checked(problems, self._check_step, None)
        train = _checked(problems, lambda: self._open("train"), None)
        val = _checked(problems, lambda: self._open("val"), None) if not problems else None
        self.scenario = _checked(problems, lambda: self._scenario(train), None) if train else None
        if problems:
            raise UserError(*dict.fromkeys(problems))
        self.on_disk: dict[str, DataOnDisk] = {"train": train, "val": val}
        """The splits as their files hold them."""
        self._decoded: dict[str, SegmentationData] = {}
        self.train_data = self._view(train, "student", training=True)
        self.teacher_train_data = self._view(train, "teacher", training=True)
        self.teacher_name = self._full_teacher_name()
        """The teacher's network, with whatever its weights say of it."""
        self._check_crop()
        self._check_sizes()
        self._check_taps()
        configure_backends(self.device, study.step.precision)

    def alone(self) -> ResolvedStudy:
        """Return the same study without its group and with random weights: for what is counted."""
        study = copy.copy(self)
        study.ranks, study._weights = None, False
        return study

    def _find_device(self) -> torch.device:
        """Find the device, which of several GPUs is this rank's.

        Raises:
            UserError: no such device, or not as many.
        """
        gpus, name = self.study.step.gpus, self.study.device
        device = find_device(name)
        if gpus == 1 or device.type == "cpu":
            return device
        if ":" in name:
            raise UserError(
                f"step.gpus = {gpus} takes the first {gpus} GPUs, not {name}; use device = 'cuda', "
                "and CUDA_VISIBLE_DEVICES to choose"
            )
        if gpus > torch.cuda.device_count():
            raise UserError(
                f"step.gpus = {gpus}: this machine has {torch.cuda.device_count()}; use fewer"
            )
        return torch.device("cuda", self.ranks.rank if self.ranks else 0)

    def _find_methods(self, problems: list[str]) -> dict[str, Found]:
        """Return the study's methods, those its budgets name, and the controls."""
        found: dict[str, Found] = {}
        for spec in dict.fromkeys([*CONTROLS, *self.study.methods]):
            if spec in found:
                continue
            method = _checked(problems, lambda spec=spec: find_method(spec), None)
            if method is None:
                continue
            clash = found.get(method.cls.name)
            if clash is not None and clash.cls is not method.cls:
                problems.append(
                    f"method {spec} is called '{method.cls.name}' like the {clash.origin} one; "
                    "give its class another 'name'"
                )
            found[method.cls.name] = method
        known = {**builtin_methods(), **found}
        for name in self._budget_methods():
            if name in known:
                found[name] = known[name]
            elif name.partition(":")[0].endswith(".py"):
                problems.append(
                    f"budget of '{name}': write the method's own name, one of {', '.join(found)}"
                )
            else:
                problems.append(f"budget of '{name}': {unknown('method', name, known)}")
        for name, settings in self.study.method_settings.items():
            if name in known:
                _checked(problems, lambda n=name, s=settings: known[n].cls(**s), None)
            else:
                problems.append(f"method_settings: {unknown('method', name, known)}")
        return found

    def _check_teacher_method(self) -> None:
        """Find what the teacher is trained with.

        Raises:
            UserError: no such method, or one that reads a teacher itself.
        """
        name = self.study.teacher_training.method
        if find_method(name).cls.needs_teacher():
            raise UserError(
                f"teacher_training.method: '{name}' reads a teacher itself; use {REFERENCE}"
            )

    def _read_teacher_weights(self) -> Weights | None:
        path = self.study.teacher_weights
        if path is None:
            return None
        return read_weights(Path(path).expanduser(), adapted=is_adapted(self.study.teacher))

    def _full_teacher_name(self) -> NetworkName | str:
        """Return the teacher's network.

        Raises:
            UserError: its weights are another network's, or of other classes.
        """
        if self._teacher_weights is None:
            return self.study.teacher
        classes = self.teacher_train_data.class_names
        return check_weights(self._teacher_weights, self.study.teacher, classes)

    def _check_step(self) -> None:
        """Refuse step settings that this device, or the scenario, has no use for.

        Raises:
            UserError: all of them.
        """
        step, problems = self.study.step, []
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
        if step.gpus > 1 and self.study.measure.in_process:
            problems.append(
                f"step.gpus = {step.gpus} is measured in {step.gpus} processes; leave "
                "measure.in_process (--in-process) out"
            )
        if step.compile == "cuda-graphs" and self.device.type != "cuda":
            problems.append(
                f"step.compile = 'cuda-graphs' needs a CUDA device, this is {self.device.type}; "
                "use 'default' or 'none'"
            )
        if step.compile != "none" and (missing := missing_compiler(self.device)):
            problems.append(f"step.compile needs {missing}; install it or use 'none'")
        if step.fold_teacher and is_adapted(self.study.teacher):
            problems.append(
                f"step.fold_teacher: {self.study.teacher} is not kdprof's own; leave it out"
            )
        if self.starts_as_teacher and is_adapted(self.study.student):
            problems.append(
                f"a {self.study.student} cannot start as the teacher; set "
                'scenario.initialise = "fresh"'
            )
        if step.fold_teacher and self.starts_as_teacher:
            problems.append(
                "step.fold_teacher: a student that starts as the teacher needs its batch norms; "
                'leave it out, or set scenario.initialise = "fresh"'
            )
        if problems:
            raise UserError(*problems)

    def _scenario(self, data: SegmentationData) -> Scenario | None:
        settings, study = self.study.scenario, self.study
        if settings is None:
            return None
        if settings.initialise == "teacher" and study.student != study.teacher:
            raise UserError(
                f"scenario: a {study.student} cannot start as the teacher, a {study.teacher}; use "
                'the same network for both, or set scenario.initialise = "fresh"'
            )
        return Scenario.of(settings, data.class_names)

    def _budget_methods(self) -> list[str]:
        budgets = [parse_budget(text) for text in self.study.budgets]
        return [budget.method for budget in budgets if budget.method]

    def _open(self, split: str) -> DataOnDisk:
        settings = self.study.data_settings
        count = settings.synthetic_train if split == "train" else settings.synthetic_val
        return open_data(
            self.study.data,
            split,
            synthetic_size=settings.synthetic_size,
            synthetic_count=count,
            drawn=True,
        )

    def _check_crop(self) -> None:
        step = self.study.step
        checks = {self._student_shapes.check_input, self.teacher_shapes.check_input}
        # Synchronised batch norm sees the pictures of all.
        pictures = step.batch if step.sync_batchnorm else step.share
        found = {check(pictures, step.crop, True) for check in checks} - {None}
        if found:
            raise UserError(*sorted(found))

    def _check_sizes(self) -> None:
        """Refuse a network that could not be evaluated on the images, hours after the start.

        Raises:
            UserError: it does not take pictures of their sizes.
        """
        choosy = [n for n in (self._student_shapes, self.teacher_shapes) if n.multiple > 1]
        if not choosy or is_drawn(self.study.data):
            return
        data, fit = self.on_disk["val"], self.views.fit
        sizes = {fitted_size(data.size(index), fit) for index in range(len(data))}
        found = [net.check_input(1, size, training=False) for net in choosy for size in sizes]
        if problems := sorted({problem for problem in found if problem}):
            raise UserError(*problems[:3])

    def _check_taps(self) -> None:
        """Refuse what a network cannot give, before anything runs.

        Raises:
            UserError: a method reads a tap that a network lacks, or the auxiliary loss does; every
                one at once.
        """
        student, teacher = self._student_shapes, self.teacher_shapes
        trained = [student] if self._teacher_weights else [student, teacher]
        problems = [
            f"{name} has no auxiliary head; set step.aux_weight = 0"
            for name in dict.fromkeys(n.info.name for n in trained if "aux" not in n.info.channels)
            if self.study.step.aux_weight
        ]
        given = {"student": _taps_of(student), "teacher": _taps_of(teacher)}
        if self._teacher_weights and not self._teacher_weights.has_auxiliary:
            given["teacher"].discard("aux")
        for name in self.method_names(control=False):
            method = self.methods[name].cls
            read = {"student": method.student_taps(), "teacher": method.read_of_teacher()}
            for role, taps in read.items():
                if lacking := [tap for tap in taps if tap not in given[role]]:
                    problems.append(
                        f"method '{name}' reads {', '.join(lacking)} of the {role}, which has "
                        f"{', '.join(sorted(given[role]))}; use another network or method"
                    )
        if problems:
            raise UserError(*problems)

    @cached_property
    def _student_shapes(self) -> SegmentationNetwork:
        return build(self.study.student, self.train_data.num_classes)

    @cached_property
    def teacher_shapes(self) -> SegmentationNetwork:
        """The teacher with random weights, on the CPU: what shapes and costs need."""
        return build(self.teacher_name, self.teacher_train_data.num_classes)

    def _view(self, data: SegmentationData, role: Role, *, training: bool) -> SegmentationData:
        """Return what a network sees of a data set."""
        return self.scenario.view(data, role, training=training) if self.scenario else data

    def decoded(self, split: str) -> SegmentationData:
        """Return a split as ``data_settings.cache`` keeps it, which is made when first asked for.

        Raises:
            UserError: files that cannot be used, or a cache that cannot be written.
        """
        if is_drawn(self.study.data):
            return self.on_disk[split]  # nothing to decode
        if split not in self._decoded:
            cache, data = self.study.data_settings.cache, self.on_disk[split]
            self._decoded[split] = decoded(data, cache, self.cache_folder(), self._progress)
        return self._decoded[split]

    @property
    def views(self) -> Views:
        """How networks see the images that they are evaluated on."""
        return Views(fit=fit_of(self.study.data_settings.resize, self.on_disk["val"].name))

    def cache_folder(self) -> Path:
        """Return where decoded images are kept."""
        given = self.study.data_settings.cache_folder
        return Path(given).expanduser() if given else default_folder()

    @property
    def val_data(self) -> SegmentationData:
        """The images that students are evaluated on."""
        return self._view(self.decoded("val"), "student", training=False)

    @property
    def teacher_val_data(self) -> SegmentationData:
        """The images that the teacher is evaluated on."""
        return self._view(self.decoded("val"), "teacher", training=False)

    @cached_property
    def hardware(self) -> Hardware:
        """The device's hardware."""
        return hardware_of(self.device, self._own_pids, self.study.step.gpus)

    def method_names(self, *, control: bool) -> list[str]:
        """Return the methods to compare; with ``control`` the equal-cost controls lead."""
        by_spec = [find_method(spec).cls.name for spec in self.study.methods]
        return list(dict.fromkeys([*(CONTROLS if control else ()), *by_spec]))

    def student(self, seed: int) -> SegmentationNetwork:
        """Return a fresh student; its initialisation depends on the seed alone, not the method."""
        torch.manual_seed(seed)
        weights = self.study.student_backbone_weights if self._weights else "none"
        return build(self.study.student, self.train_data.num_classes, backbone_weights=weights)

    def teacher(self) -> SegmentationNetwork:
        """Return a fresh, untrained teacher."""
        torch.manual_seed(0)
        weights = self.study.teacher_backbone_weights if self._weights else "none"
        classes = self.teacher_train_data.num_classes
        return build(self.teacher_name, classes, backbone_weights=weights)

    @property
    def starts_as_teacher(self) -> bool:
        """Whether every student of this study is a teacher that grew."""
        settings = self.study.scenario
        return settings is not None and settings.initialise == "teacher"

    def method(self, name: str) -> Method:
        """Return a fresh method, built for this study's networks."""
        method = self.methods[name].cls(**self.study.method_settings.get(name, {}))
        background = self.scenario is not None and self.scenario.background
        student = replace(self._student_shapes.info, background=background)
        teacher = replace(self.teacher_shapes.info, background=background)
        if not method.incremental:
            student = _of_classes(student, teacher.num_classes)
        torch.manual_seed(1)
        method.build(student, teacher if method.needs_teacher() else None)
        return method

    def step(
        self,
        name: str,
        teacher: SegmentationNetwork | None,
        *,
        seed: int = 0,
        iterations: int = 1_000_000,
        device: torch.device | None = None,
        student: SegmentationNetwork | None = None,
    ) -> TrainStep:
        """Return the step of a method: fresh extras, the given teacher, a fresh student unless one
        is given, on the device already. In a scenario where students start as the teacher, a fresh
        one is the given teacher, grown.

        ``iterations`` is the run's length; a step that is only measured has none of its own.
        """
        device = device or self.device
        told = {"name": name, "seed": seed, "iterations": iterations}
        self._tell(do="make", **told, teacher=teacher is not None)
        if student is None:
            student = self._placed(self.student(seed), device)
            if self.starts_as_teacher and teacher is not None:
                student.inherit(teacher, background=self.scenario.background)
        return TrainStep(
            student=student,
            teacher=teacher if self.methods[name].cls.needs_teacher() else None,
            method=self.method(name).to(device),
            settings=self.study.step,
            iterations=iterations,
            seed=seed,
            device=device,
            ranks=self.ranks,
        )

    def _tell(self, **order: Any) -> None:
        """Have the other ranks do the same, where this is rank 0 of several."""
        if self.ranks and self.ranks.leads:
            self.ranks.tell(order)

    def forget_steps(self) -> None:
        """Have the other ranks drop the steps made so far, and their memory."""
        self._tell(do="forget")

    def teacher_step(self) -> TrainStep:
        """Return the step that trains the teacher itself: the reference method's."""
        self._tell(do="make", name=None)
        training = self.study.teacher_training
        rate = training.learning_rate or self.study.step.learning_rate
        return TrainStep(
            student=self._placed(self.teacher(), self.device),
            teacher=None,
            method=self._teacher_method(),
            settings=self.study.step.model_copy(update={"learning_rate": rate}),
            iterations=training.iterations,
            seed=0,
            device=self.device,
            ranks=self.ranks,
        )

    def _teacher_method(self) -> Method:
        method = find_method(self.study.teacher_training.method).cls()
        background = self.scenario is not None and self.scenario.background
        method.build(replace(self.teacher_shapes.info, background=background), None)
        return method.to(self.device)

    def _placed(self, network: SegmentationNetwork, device: torch.device) -> SegmentationNetwork:
        channels_last = self.study.step.channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return network.to(device, memory_format=layout)

    def frozen(self, teacher: SegmentationNetwork) -> SegmentationNetwork:
        """Return a teacher as steps read it: itself, or a copy with folded batch norm.

        On rank 0 of several, its weights become every rank's.
        """
        self._tell(do="teacher")
        if self.ranks and self.ranks.leads:
            self.ranks.share(teacher.state_dict())
        return folded(teacher) if self.study.step.fold_teacher else teacher

    def published_teacher(self) -> tuple[SegmentationNetwork, str] | None:
        """Return the teacher with the weights of its file, on the device, and what became of them
        in one line; None where it is to be trained.

        Raises:
            UserError: the file does not fit.
        """
        if self._teacher_weights is None:
            return None
        network = build(self.teacher_name, self.teacher_train_data.num_classes)
        loaded = load_weights(network, self._teacher_weights)
        told = f"{self.teacher_name}, {self._teacher_weights.source} names: {loaded.summary()}"
        return self._placed(network, self.device), told

    def placed_teacher(self) -> SegmentationNetwork:
        """Return an untrained teacher on the device: it costs what the trained one costs."""
        return self._placed(self.teacher(), self.device)

    def batches(self, seed: int) -> Batches:
        """Return the training batches of a seed: the same for every method."""
        return self._batches(self._view(self.decoded("train"), "student", training=True), seed)

    def teacher_batches(self) -> Batches:
        """Return the batches that the teacher is trained on."""
        return self._batches(self._view(self.decoded("train"), "teacher", training=True), seed=0)

    def _batches(self, data: SegmentationData, seed: int) -> Batches:
        settings = self.study.data_settings
        augmentation = Augmentation(
            crop=self.study.step.crop,
            scale=settings.scale,
            flip=settings.flip,
            photometric=settings.photometric,
            scale_step=settings.scale_step,
            fit=self.views.fit,
            max_class_share=settings.max_class_share,
        )
        return Batches(
            data,
            seed=seed,
            batch=self.study.step.batch,
            augmentation=augmentation,
            workers=settings.workers,
            rank=self.ranks.rank if self.ranks else 0,
            ranks=self.study.step.gpus,
        )

    def cost_settings(self, name: str) -> dict[str, Any]:
        """Return everything of the study that changes what a method's step costs."""
        found = self.methods[name]
        settings, scenario = self.study.method_settings.get(name, {}), self.study.scenario
        reads_teacher = found.cls.needs_teacher()
        return {
            "student": self._known_as(self.study.student),
            "teacher": self._known_as(self.teacher_name) if reads_teacher else None,
            "data": self.train_data.name,
            "drawn": is_drawn(self.study.data),
            "classes": self.train_data.num_classes,
            "teacher_classes": self.teacher_train_data.num_classes if reads_teacher else None,
            "scenario": scenario.model_dump(mode="json") if scenario else None,
            "data_settings": self.study.data_settings.model_dump(
                mode="json", exclude={"cache_folder"}
            ),
            "step": self.study.step.model_dump(mode="json"),
            "method": found.cls(**settings).settings(),
            "method_source_sha256": found.source_sha256,
        }

    @staticmethod
    def _known_as(name: NetworkName | str) -> str:
        """Return what a network costs the same as: its full name, or the content of its file."""
        if not isinstance(name, str):
            return str(name)
        if (source := source_of(name)) is not None:
            return f"{name} {hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]}"
        return name if is_adapted(name) else str(parse_name(name))

    def cost_key(self, name: str) -> str:
        """Return the hash under which the Cost of a method is stored."""
        content = [self.cost_settings(name), self.hardware.name, versions(), _engine_sha256()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _taps_of(network: SegmentationNetwork | AdaptedNetwork) -> set[str]:
    """Return the taps that a network has; the classifier's weight only kdprof's own have."""
    own = {"classifier"} if isinstance(network, SegmentationNetwork) else set()
    return {*network.info.channels, *own}


def _of_classes(info: NetworkInfo, classes: int) -> NetworkInfo:
    """Return what a method that only sees the first classes of a network may know of it."""
    channels = dict(info.channels, logits=classes, aux=classes)
    return replace(info, num_classes=classes, channels=channels)


def _engine_sha256() -> str:
    """Return the hash of the code that every step runs through."""
    return source_hash(Path(__file__).parent, ("step.py", "method.py", "models/*.py"))


def _checked(problems: list[str], attempt: Callable[[], Any], default: Any) -> Any:
    try:
        return attempt()
    except UserError as error:
        problems.extend(error.problems)
        return default
