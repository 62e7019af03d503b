"""ResolvedStudy: a study whose names were all looked up and checked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch

from kdprof.budget import parse_budget
from kdprof.data import DataOnDisk, open_data
from kdprof.data.scenario import scenario_of
from kdprof.discovery import MethodEntry, builtin_methods, find_method
from kdprof.distributed.ranks import Ranks
from kdprof.errors import Problems, UserError, unknown
from kdprof.evaluate import size_problems
from kdprof.hardware import Hardware, hardware_of
from kdprof.hardware.device import (
    check_precision,
    configure_backends,
    find_device,
    require_repeatable_cublas,
)
from kdprof.models import (
    AnyNetwork,
    SegmentationNetwork,
    build,
    is_adapted,
    is_from_file,
    outlined,
    parse_name,
)
from kdprof.models.names import NetworkName
from kdprof.models.weight_files import WeightFile, open_weights
from kdprof.models.weights import Weights, check_weights, misfits, read_weights
from kdprof.optimizer import find_function, parameter_groups
from kdprof.progress import Progress
from kdprof.records import CONTROLS, REFERENCE
from kdprof.resolve import checks
from kdprof.resolve.data import StudyData
from kdprof.resolve.factory import Factory
from kdprof.resolve.follow import LeadingFactory
from kdprof.step import missing_compiler
from kdprof.study import Study, own_optimizer
from kdprof.user_files import ask_again, named_in_file


class ResolvedStudy:
    """A study with the device, data, networks and methods that it names.

    Args:
        parent: id of another kdprof process on the device, which does not count as foreign.
        weights: True to load the weights of files into new networks; a step costs the same with
            random weights.
        ranks: the group that runs steps together with this process, if ``step.gpus`` needs one.
        progress: shows the decoding of images into memory or into the cache.
        runs: False if steps are only counted; the device then need not have the precision.
        control: False if the controls are not trained: without a method that needs a teacher, its
            backbone's weights are then not read.

    Attributes:
        plain: the Study that this was made from.
        step, training, evaluation, measure, data_settings, teacher_training, budgets, seeds: its
            sections.
        methods: the study's methods, those that its budgets name, and the controls; by name.
        teacher_weights: content of the teacher's weights file; None if it is to be trained.
        teacher_name: the teacher's network name, completed by its weights file.
        scenario: None if teacher and student learn the same classes.
        data: the splits, for each network.
        factory: creates networks, methods, steps and batches; on rank 0 of a group, on all ranks.

    Raises:
        UserError: the study has problems; reports all of them at once.
    """

    def __init__(
        self,
        study: Study,
        *,
        parent: int | None = None,
        progress: Progress | None = None,
        weights: bool = True,
        ranks: Ranks | None = None,
        runs: bool = True,
        control: bool = True,
    ):
        ask_again()
        self.plain, self.ranks = study, ranks
        self.step, self.training, self.evaluation = study.step, study.training, study.evaluation
        self.measure, self.data_settings = study.measure, study.data_settings
        self.teacher_training = study.teacher_training
        self.budgets, self.seeds = study.budgets, study.seeds
        self._own_pids = frozenset({os.getpid()} | ({parent} if parent is not None else set()))
        self._own_pids |= ranks.pids if ranks else frozenset()
        progress = progress or Progress(None)
        self._look_up(progress, runs)
        self._check()
        if weights:
            self._check_backbones(progress, self.method_names(control=control))
        configure_backends(
            self.device, study.step.precision, deterministic=study.step.deterministic
        )
        self.factory = _factory(self, weights, ranks)
        self._follow_methods()

    def _look_up(self, progress: Progress, runs: bool) -> None:
        """Find everything that the study names.

        Raises:
            UserError: something that the study names does not exist or is not usable; reports all
                problems at once.
        """
        study, problems = self.plain, Problems()
        self.device = problems.attempt(self._find_device, torch.device("cpu"))
        if study.step.deterministic and self.device.type == "cuda":
            problems.attempt(require_repeatable_cublas, None)  # before anything uses CUDA
        self.methods = self._find_methods(problems)
        for network in (study.student, study.teacher):
            if not is_adapted(network):
                problems.attempt(partial(parse_name, network), None)
        weights = problems.attempt(self._open_teacher_weights, None)
        problems.attempt(self._check_teacher_method, None)
        if own_optimizer(study.step.optimizer):
            problems.attempt(partial(find_function, study.step.optimizer), None)
        missing = None if study.step.compile == "none" else missing_compiler(self.device)
        problems += checks.step_problems(study, self.device.type, missing)
        if runs:
            problems.attempt(partial(check_precision, self.device, study.step.precision), None)
        train = problems.attempt(lambda: self._open("train"), None)
        val = None if problems else problems.attempt(lambda: self._open("val"), None)
        self.scenario = problems.attempt(lambda: scenario_of(study, train), None) if train else None
        problems.refuse()
        assert train is not None, "a split that cannot be opened was refused"
        assert val is not None, "a split that cannot be opened was refused"
        self.data = StudyData(study, {"train": train, "val": val}, self.scenario, progress)
        self._identify_teacher(weights)

    def _check(self) -> None:
        """Refuse what would fail later, before anything runs.

        Raises:
            UserError: the crop, the sizes of the images, the taps of the methods or the parameters
                that the optimiser's settings name do not fit.
        """
        step, networks = self.step, (self.student_shapes, self.teacher_shapes)
        Problems(checks.crop_problems(networks, step)).refuse()
        if not self.data.uses_placeholders:
            Problems(size_problems(networks, self.data.evaluated_sizes())).refuse()
        classes = [self.methods[name].cls for name in self.method_names(control=False)]
        found = checks.tap_problems(classes, *networks, step.aux_weight, self.teacher_weights)
        problems = Problems(found)
        for network in self.trained_shapes():
            problems.attempt(partial(parameter_groups, network, None, step), None)
        problems.refuse()

    def _follow_methods(self) -> None:
        """Build the users' methods once: what they read is among their sources from now on."""
        for name, entry in self.methods.items():
            if not entry.is_builtin:
                with suppress(Exception):  # it comes again where the method is measured
                    self.factory.method(name)

    def _check_backbones(self, progress: Progress, names: Collection[str]) -> None:
        """Load the files of backbones that will be trained, and say what was taken from them.

        Args:
            names: the methods to train; the teacher is trained only if one of them needs it.

        Raises:
            UserError: a file cannot be read, or does not fit its backbone; or weights are given for
                a network that loads its own.
        """
        plain, problems = self.plain, Problems()
        given = {"student": (plain.student, plain.student_backbone_weights)}
        if self.teacher_weights is None and self.needs_teacher(names):
            given["teacher"] = (plain.teacher, plain.teacher_backbone_weights)
        for role, (name, weights) in given.items():
            if weights == "none":
                continue
            if is_from_file(name):
                problems.append(
                    f"{role}_backbone_weights: {name} loads its weights itself; set it to none, "
                    f"not {weights}"
                )
                continue
            if weights == "imagenet":
                continue
            network = problems.attempt(partial(build, name, 2, backbone_weights=weights), None)
            if isinstance(network, SegmentationNetwork):
                progress.say(f"backbone of the {role}: {network.backbone.loaded}")
        problems.refuse()

    def _find_device(self) -> torch.device:
        """Return the device; with several GPUs, that of this rank.

        Raises:
            UserError: the device does not exist, or this machine has fewer GPUs.
        """
        gpus, name = self.step.gpus, self.plain.device
        device = find_device(name)
        if gpus == 1 or device.type == "cpu":
            return device
        Problems(checks.gpus_problems(gpus, name, torch.cuda.device_count())).refuse()
        return torch.device("cuda", self.ranks.rank if self.ranks else 0)

    def _find_methods(self, problems: Problems) -> dict[str, MethodEntry]:
        """Return the study's methods, those that its budgets name, and the controls."""
        found: dict[str, MethodEntry] = {}
        for spec in dict.fromkeys([*CONTROLS, *self.plain.methods]):
            if spec in found:
                continue
            entry = problems.attempt(partial(find_method, spec), None)
            if entry is None:
                continue
            clash = found.get(entry.cls.name)
            if clash is not None and clash.cls is not entry.cls:
                problems.append(
                    f"method {spec} has the same name '{entry.cls.name}' as the {clash.origin} "
                    "method; give its class another 'name'"
                )
            found[entry.cls.name] = entry
        known = {**builtin_methods(), **found}
        for name in self.budget_methods():
            if name in known:
                found[name] = known[name]
            elif named_in_file(name) is not None:
                problems.append(
                    f"budget of '{name}': write the method's name, one of {', '.join(found)}"
                )
            else:
                problems.append(f"budget of '{name}': {unknown('method', name, known)}")
        for name, settings in self.plain.method_settings.items():
            if name in known:
                problems.attempt(partial(self._check_settings, known[name], settings), None)
            else:
                problems.append(f"method_settings: {unknown('method', name, known)}")
        return found

    def _check_settings(self, method: MethodEntry, settings: Mapping[str, Any]) -> None:
        method.create(settings).check_images(self.step.share)

    def _open_teacher_weights(self) -> WeightFile | None:
        path = self.plain.teacher_weights
        return None if path is None else open_weights(path)

    def _identify_teacher(self, file: WeightFile | None) -> None:
        """Set the full name of the teacher's network, and its weights.

        Raises:
            UserError: the file holds unusable weights, or those of another network or of other
                classes.
        """
        self.teacher_name: NetworkName | str = self.plain.teacher
        self.teacher_weights: Weights | None = None
        if file is None:
            return
        adapted = self.teacher_shapes if is_adapted(self.plain.teacher) else None
        assert not isinstance(adapted, SegmentationNetwork), "an adapted network is built"
        self.teacher_weights = read_weights(file, adapted)
        classes = self.data.class_names("teacher")
        self.teacher_name = check_weights(self.teacher_weights, self.plain.teacher, classes)
        Problems(misfits(self.teacher_shapes, self.teacher_weights)).refuse()

    def _check_teacher_method(self) -> None:
        """Check the method that the teacher is trained with.

        Raises:
            UserError: the method does not exist, or uses a teacher itself.
        """
        name = self.teacher_training.method
        if find_method(name).cls.needs_teacher():
            raise UserError(
                f"teacher_training.method: '{name}' uses a teacher itself; use {REFERENCE}"
            )

    def _open(self, split: str) -> DataOnDisk:
        settings = self.data_settings
        count = settings.synthetic_train if split == "train" else settings.synthetic_val
        return open_data(
            self.plain.data,
            split,
            synthetic_size=settings.synthetic_size,
            synthetic_count=count,
            placeholders=True,
            labels=settings,
        )

    @cached_property
    def student_shapes(self) -> AnyNetwork:
        """The student without weights, for what is known of it."""
        return outlined(self.plain.student, self.data.num_classes("student"))

    @cached_property
    def teacher_shapes(self) -> AnyNetwork:
        """The teacher without weights, for what is known of it."""
        return outlined(self.teacher_name, self.data.num_classes("teacher"))

    def trained_shapes(self) -> list[AnyNetwork]:
        """Return the student, and the teacher if this study trains it, without weights."""
        teacher = [] if self.teacher_weights else [self.teacher_shapes]
        return [self.student_shapes, *teacher]

    @cached_property
    def hardware(self) -> Hardware:
        """The device's hardware."""
        return hardware_of(self.device, self._own_pids, self.step.gpus)

    @property
    def starts_as_teacher(self) -> bool:
        """True if every student of this study starts with the teacher's weights."""
        return self.plain.starts_as_teacher

    def needs_teacher(self, names: Iterable[str]) -> bool:
        """Return whether any of the named methods is trained with a teacher."""
        return self.starts_as_teacher or any(self.methods[n].cls.needs_teacher() for n in names)

    @property
    def needs_energy(self) -> bool:
        """True if runs end by their energy, or a budget is an amount of it."""
        budgets = [parse_budget(text) for text in self.budgets]
        matched = any(budget.matches == "energy" for budget in budgets)
        return matched or self.training.enforce == "energy"

    @property
    def needs_flop(self) -> str | None:
        """The setting that needs all FLOP of a step, a budget or what ends a run; None if none."""
        budgets = [parse_budget(text) for text in self.budgets]
        found = [f"budget '{budget.text}'" for budget in budgets if budget.matches == "FLOP"]
        if self.training.enforce == "flop":
            found.append("--enforce flop")
        return next(iter(found), None)

    def method_names(self, *, control: bool) -> list[str]:
        """Return the methods to compare; with ``control`` the controls come first."""
        by_spec = [find_method(spec).cls.name for spec in self.plain.methods]
        return list(dict.fromkeys([*(CONTROLS if control else ()), *by_spec]))

    def budget_methods(self) -> list[str]:
        """Return the methods that budgets name, as in 40k@cwd."""
        budgets = [parse_budget(text) for text in self.budgets]
        return [budget.method for budget in budgets if budget.method]


def _factory(study: ResolvedStudy, weights: bool, ranks: Ranks | None) -> Factory:
    if ranks is not None and ranks.leads:
        return LeadingFactory(study, weights=weights, ranks=ranks)
    return Factory(study, weights=weights, ranks=ranks)
