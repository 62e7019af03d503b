"""The contract between the engine and a distillation method.

A method is one class. It declares the tensors that it uses (``taps``), its published weights and
its recipes. It builds its learnable extras when the network shapes are known, and returns its
*unweighted* loss terms; the engine weights, logs, times and counts each of them.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdprof.errors import UserError, unknown
from kdprof.records import METHOD_NAME

FEATURE_TAPS = ("logits", "aux", "head", "c2", "c3", "c4", "c5")
"""The feature maps of a network that a method can use: logits and auxiliary logits at head
resolution (before any resize), the input of the last 1x1 classifier (after its dropout), and the
backbone stages."""

PARAMETER_TAPS = ("classifier",)
"""Parameters that an objective may use and send gradients to: the (classes, C, 1, 1) weight of the
1x1 classifier, where C is the number of channels of ``head``."""

NETWORK_TAPS = (*FEATURE_TAPS, *PARAMETER_TAPS)
TAPS = (*NETWORK_TAPS, "labels")
IGNORE = 255
"""The label value of pixels of no class (void), in every data set that kdprof reads."""


class Taps:
    """The tensors that a method declared, as attributes: ``student.logits``, ``teacher.head``, ...

    Feature maps are (N, C, h, w); for the other taps see :data:`PARAMETER_TAPS`. Only declared
    tensors are computed; reading any other raises AttributeError.
    """

    def __init__(self, **maps: Tensor):
        self.__dict__.update(maps)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"tap '{name}' was read but not declared: add it to the method's taps")

    def detach(self) -> Taps:
        """Return the same taps, detached from the autograd graph."""
        return Taps(**{name: value.detach() for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class NetworkInfo:
    """The description of a network from which a method builds its extras."""

    name: str
    num_classes: int
    channels: Mapping[str, int]
    """Channels of each tap."""
    stride: Mapping[str, int]
    """Input pixels per output position, for each tap."""
    background: bool = False
    """True if class 0 is the background of a class-incremental scenario: every pixel that belongs
    to no other class."""


class Network(nn.Module):
    """Base class of the networks that training steps and evaluations use.

    Called as ``network(images, taps)``, with RGB images (N, 3, H, W) in 0..255, it returns exactly
    the tensors that ``taps`` names, as :class:`Taps`.
    """

    info: NetworkInfo
    align_corners: bool
    """The ``align_corners`` setting with which its logits are resized."""
    heads: tuple[str, ...] = ()
    """Names of the submodules behind the backbone; empty if that is not known."""


@dataclass(frozen=True)
class Recipe:
    """A published training schedule and its reported results. None = not published."""

    dataset: str
    teacher: str | None
    student: str
    iterations: int | None
    batch: int | None
    """Images per iteration, over all devices."""
    crop: tuple[int, int] | None
    """Height x width, pixels."""
    optimizer: str
    schedule: str
    source: str
    """The source of the figures, and what a reader must know to quote them."""
    gpus: int | None = None
    """Devices that the images of an iteration are shared by, in equal parts."""
    gpu: str = ""
    """Their model, if published."""
    student_miou: float | None = None
    """mIoU of the student alone, percent, as reported together with ``miou``."""
    miou: float | None = None
    epochs: int | None = None
    """Length of the training, if it is published in epochs."""
    weights: Mapping[str, float] | None = None
    """Published weights of terms, where they differ from those of the class."""
    teacher_miou: float | None = None
    split: str = "val"
    """The images that the mIoU values were measured on."""

    @property
    def images_per_gpu(self) -> int | None:
        """Images of an iteration on each device: those that an objective can couple."""
        if self.batch is None or self.gpus is None:
            return None
        return self.batch // self.gpus


@dataclass(frozen=True)
class Hyper:
    """One declared hyper-parameter: its type and published default."""

    type: type
    default: Any


def _hyper_parameters(cls: type) -> dict[str, Hyper]:
    """Collect the annotated, non-ClassVar class attributes of a method and its bases."""
    found: dict[str, Hyper] = {}
    contract = inspect.get_annotations(Method)
    for base in reversed(cls.__mro__):
        if not (isinstance(base, type) and issubclass(base, Method)) or base is Method:
            continue
        hints = typing.get_type_hints(base)
        for name in inspect.get_annotations(base):
            if typing.get_origin(hints[name]) is ClassVar or not hasattr(base, name):
                continue
            if name in contract:  # such as ``name: str = "mine"``: an attribute of every method
                continue
            if hints[name] not in (bool, float, int, str):
                raise UserError(
                    f"{cls.__name__}: hyper-parameter '{name}' must be bool, float, int or str, "
                    f"not {hints[name]}; annotate an attribute that is not a setting as ClassVar"
                )
            found[name] = Hyper(hints[name], getattr(base, name))
    return {name: Hyper(hyper.type, getattr(cls, name)) for name, hyper in found.items()}


class Method(nn.Module):
    """A distillation objective with its published recipe.

    A subclass sets the class attributes below, annotates its hyper-parameters
    (``temperature: float = 4.0``) and implements :meth:`forward`.
    """

    name: ClassVar[str] = ""
    """The name that users type; if empty, the class name in lower case."""
    title: ClassVar[str] = ""
    """Full name as published."""
    paper: ClassVar[str] = ""
    """Venue, year and arXiv id."""
    family: ClassVar[str] = "custom"
    """control, logit, feature, attention, relational, ..."""
    taps: ClassVar[tuple[str, ...]] = ()
    """Student tensors that the objective uses; ``labels`` is among them if it uses the labels."""
    teacher_taps: ClassVar[tuple[str, ...] | None] = None
    """Teacher tensors that the objective uses, if they differ from ``taps``."""
    weights: Mapping[str, float] = {}
    """Published weight of every term that ``forward`` returns."""
    auxiliary_weights: Mapping[str, float] = {}
    """Weight of every term that ``auxiliary_forward`` returns."""
    incremental: ClassVar[bool] = False
    """True if the objective uses the new classes, which the teacher does not know. Any other method
    receives the shared classes only: the first channels of the student's logits, and labels in
    which the new classes are void."""
    replaces_task_loss: ClassVar[bool] = False
    """True if the terms replace the cross-entropy of the student's logits."""
    auxiliary_decays: ClassVar[bool] = False
    """True if the auxiliary optimiser's learning rate follows the student's schedule."""
    equation: ClassVar[str] = ""
    """The terms in plain text, one or two lines; the docstring defines each symbol."""
    cost_drivers: ClassVar[str] = ""
    """What makes a step expensive, one or two lines."""
    graph_breaks: ClassVar[str] = ""
    """Why torch.compile cannot trace the whole objective; empty if it can."""
    recipes: ClassVar[tuple[Recipe, ...]] = ()
    hyper: ClassVar[dict[str, Hyper]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        if not isinstance(cls.name, str) or not METHOD_NAME.fullmatch(cls.name):
            raise UserError(
                f"{cls.__name__}: the name {cls.name!r} must be letters, digits, '_', '+' or '-', "
                "with at most one ':' for a variant, such as cwd:feature; change it"
            )
        wrong = [tap for tap in (*cls.taps, *(cls.teacher_taps or ())) if tap not in TAPS]
        if wrong:
            raise UserError(f"{cls.__name__}: {unknown('tap', wrong[0], TAPS)}")
        cls.hyper = _hyper_parameters(cls)

    def __init__(self, weights: Mapping[str, float] | None = None, **hyper: Any):
        super().__init__()
        problems = [f"method '{self.name}': {problem}" for problem in self._wrong_weights(weights)]
        for name, value in hyper.items():
            if name not in self.hyper:
                valid = [*self.hyper, "weights"]
                problems.append(f"method '{self.name}': {unknown('hyper-parameter', name, valid)}")
                continue
            wanted = self.hyper[name].type
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                problems.append(
                    f"method '{self.name}': {name} must be {wanted.__name__}, not {value!r}"
                )
            setattr(self, name, value)
        if problems:
            raise UserError(*problems)
        self.weights = {**type(self).weights, **(weights or {})}
        self.notes: list[str] = []
        """What the user must know about this method with these shapes; printed with its Cost."""

    @classmethod
    def _wrong_weights(cls, weights: Any) -> Iterator[str]:
        """Yield the problems of the weights that a study sets."""
        if not isinstance(weights or {}, Mapping):
            yield f"weights must be a table of numbers, not {weights!r}"
            return
        for term, weight in (weights or {}).items():
            if term not in cls.weights:
                yield unknown("weight", term, cls.weights)
            elif type(weight) not in (int, float) or not math.isfinite(weight):
                yield f"the weight of {term} must be a number, not {weight!r}"

    def build(self, student: NetworkInfo, teacher: NetworkInfo | None) -> None:
        """Create learnable extras (adaptors, projectors, banks). Called once, before any step.

        ``teacher`` is None only for a method that uses no teacher.
        """

    def check_images(self, images: int) -> None:
        """Refuse numbers of images per device that the settings do not allow. Called by a study
        before anything runs.

        Raises:
            UserError: the method cannot take steps of so many images.
        """

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the unweighted terms, each a scalar. ``labels`` is (N, H, W) int64 at crop size,
        :data:`IGNORE` where void, and None unless ``labels`` is among the taps."""
        raise NotImplementedError

    def decide(self, logits: Tensor) -> Tensor:
        """Return the scores (N, C, h, w) whose argmax is the prediction, from the student's logits:
        these logits, unless the method trains them to mean something else."""
        return logits

    @classmethod
    def decides(cls) -> bool:
        """Return whether the method has a :meth:`decide` of its own."""
        return cls.decide is not Method.decide

    def auxiliary(self) -> nn.Module | None:
        """Return the module that a second optimiser trains, such as a discriminator, or None. Its
        parameters are left out of the student's optimiser."""
        return None

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the second optimiser. Only called if :meth:`auxiliary` is not None."""
        raise NotImplementedError

    def auxiliary_forward(
        self, student: Taps, teacher: Taps, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the auxiliary module's unweighted terms. The taps are detached."""
        raise NotImplementedError

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the extras that the student's optimiser trains."""
        auxiliary = self.auxiliary()
        excluded = {id(p) for p in auxiliary.parameters()} if auxiliary is not None else set()
        return [p for p in self.parameters() if id(p) not in excluded]

    @classmethod
    def student_taps(cls) -> tuple[str, ...]:
        """Return the taps of the student network that the objective uses, without ``labels``."""
        return tuple(tap for tap in cls.taps if tap != "labels")

    @classmethod
    def read_of_teacher(cls) -> tuple[str, ...]:
        """Return the taps of the teacher network that the objective uses; if empty, none runs."""
        taps = cls.taps if cls.teacher_taps is None else cls.teacher_taps
        return tuple(tap for tap in taps if tap != "labels")

    @classmethod
    def needs_teacher(cls) -> bool:
        """Return True if a teacher forward is part of this method's step."""
        return bool(cls.read_of_teacher())

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters and weights in use, for records and keys."""
        values = {name: getattr(self, name) for name in self.hyper}
        weights = {**self.weights, **self.auxiliary_weights}
        return {**values, "weights": weights}
