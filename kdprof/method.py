"""The contract between the engine and a distillation method.

A method is one class. It declares what it reads (``taps``), its published weights and recipes,
builds its learnable extras when the network shapes are known, and returns its *unweighted* loss
terms; the engine weights, logs, times and counts each of them.
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

FEATURE_TAPS = ("logits", "aux", "head", "c2", "c3", "c4", "c5")
"""What a network can be read at: logits and auxiliary logits at head resolution (before any
resize), the input of the last 1x1 classifier (after its dropout), and the backbone stages."""

PARAMETER_TAPS = ("classifier",)
"""Parameters that an objective may read and train through: the (classes, C, 1, 1) weight of the
1x1 classifier, C the channels of ``head``."""

NETWORK_TAPS = (*FEATURE_TAPS, *PARAMETER_TAPS)
TAPS = (*NETWORK_TAPS, "labels")
IGNORE = 255
"""The label value of pixels that belong to no class, in every data set kdprof reads."""


class Taps:
    """The tensors a method asked for, as attributes: ``student.logits``, ``teacher.head``, ...

    Maps are (N, C, h, w), see :data:`PARAMETER_TAPS` for what is no map. Reading a tap that the
    method did not declare raises, because an undeclared tap would be computed for one method and
    paid for by nobody.
    """

    def __init__(self, **maps: Tensor):
        self.__dict__.update(maps)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"tap '{name}' was read but not declared: add it to the method's taps")

    def detach(self) -> Taps:
        """Return the same taps cut off from the graph."""
        return Taps(**{name: value.detach() for name, value in self.__dict__.items()})


@dataclass(frozen=True)
class NetworkInfo:
    """What a method may know of a network when it builds its extras."""

    name: str
    num_classes: int
    channels: Mapping[str, int]
    """Channels of each tap."""
    stride: Mapping[str, int]
    """Input pixels per output position, for each tap."""
    background: bool = False
    """Whether class 0 is the background of a class-incremental scenario: every pixel that the
    other classes do not claim."""


class Network(nn.Module):
    """What a training step and an evaluation need of a network.

    Called as ``network(images, taps)``, with RGB images (N, 3, H, W) in 0..255, it returns exactly
    the tensors that ``taps`` names, as :class:`Taps`.
    """

    info: NetworkInfo
    align_corners: bool
    """How its logits are resized."""


@dataclass(frozen=True)
class Recipe:
    """A published training schedule and what it was reported to reach. None = not published."""

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
    """Where the figures are from, and what must be known to quote them."""
    gpus: str | None = None
    student_miou: float | None = None
    """mIoU of the student alone, percent, as reported beside ``miou``."""
    miou: float | None = None
    epochs: int | None = None
    """Where the length of the training is published in epochs."""
    weights: Mapping[str, float] | None = None
    """Published weights of terms that differ from the class's."""
    teacher_miou: float | None = None
    split: str = "val"
    """Images that the mIoU are of."""


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
            if name in contract:  # ``name: str = "mine"``: no setting, however it is annotated
                continue
            if hints[name] not in (bool, float, int, str):
                raise UserError(
                    f"{cls.__name__}: hyper-parameter '{name}' must be bool, float, int or str, "
                    f"not {hints[name]}; annotate what no study sets as ClassVar"
                )
            found[name] = Hyper(hints[name], getattr(base, name))
    return {name: Hyper(hyper.type, getattr(cls, name)) for name, hyper in found.items()}


class Method(nn.Module):
    """A distillation objective with its published recipe.

    A subclass sets the class attributes below, annotates its hyper-parameters
    (``temperature: float = 4.0``) and implements :meth:`forward`.
    """

    name: ClassVar[str] = ""
    """The key users type; the lower-cased class name where it is left empty."""
    title: ClassVar[str] = ""
    """Full name as published."""
    paper: ClassVar[str] = ""
    """Venue, year and arXiv id."""
    family: ClassVar[str] = "custom"
    """control, logit, feature, attention, relational, ..."""
    taps: ClassVar[tuple[str, ...]] = ()
    """What is read of the student, ``labels`` included."""
    teacher_taps: ClassVar[tuple[str, ...] | None] = None
    """What is read of the teacher, where that differs from ``taps``."""
    weights: Mapping[str, float] = {}
    """Published weight of every term that ``forward`` returns."""
    auxiliary_weights: Mapping[str, float] = {}
    """Weight of every term that ``auxiliary_forward`` returns."""
    incremental: ClassVar[bool] = False
    """Whether the objective reads the classes that a teacher of fewer classes lacks. Any other
    method sees the shared classes only: the first channels of the student's logits, and labels in
    which the new classes are void."""
    replaces_task_loss: ClassVar[bool] = False
    """Whether the terms take the place of the cross-entropy of the student's logits."""
    auxiliary_decays: ClassVar[bool] = False
    """Whether the auxiliary optimiser's learning rate follows the student's schedule."""
    equation: ClassVar[str] = ""
    """The terms in plain text, a line or two; the docstring says what each symbol is."""
    cost_drivers: ClassVar[str] = ""
    """What makes a step dear, a line or two."""
    graph_breaks: ClassVar[str] = ""
    """Why torch.compile cannot trace the objective whole; empty: it can."""
    recipes: ClassVar[tuple[Recipe, ...]] = ()
    hyper: ClassVar[dict[str, Hyper]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
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
        """What the user must know of this method under these shapes; printed with its Cost."""

    @classmethod
    def _wrong_weights(cls, weights: Any) -> Iterator[str]:
        """Yield what is wrong with the weights that a study sets."""
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

        ``teacher`` is None only for a method that reads nothing of a teacher.
        """

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return the unweighted terms, each a scalar. ``labels`` is (N, H, W) int64 at crop size,
        :data:`IGNORE` where void, and None unless ``labels`` is among the taps."""
        raise NotImplementedError

    def decide(self, logits: Tensor) -> Tensor:
        """Return what the prediction is the argmax of, (N, C, h, w), given the student's logits;
        the logits themselves unless the method trains them to mean something else."""
        return logits

    def auxiliary(self) -> nn.Module | None:
        """Return what a second optimiser trains (a discriminator); its parameters are left out of
        the student's optimiser. None where there is no such thing."""
        return None

    def auxiliary_optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the second optimiser. Only called where :meth:`auxiliary` is not None."""
        raise NotImplementedError

    def auxiliary_forward(
        self, student: Taps, teacher: Taps, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the auxiliary module's own unweighted terms. The taps are detached."""
        raise NotImplementedError

    def extra_parameters(self) -> list[nn.Parameter]:
        """Return the extras trained by the student's optimiser."""
        auxiliary = self.auxiliary()
        aside = {id(p) for p in auxiliary.parameters()} if auxiliary is not None else set()
        return [p for p in self.parameters() if id(p) not in aside]

    @classmethod
    def student_taps(cls) -> tuple[str, ...]:
        """Return the network taps read of the student."""
        return tuple(tap for tap in cls.taps if tap != "labels")

    @classmethod
    def read_of_teacher(cls) -> tuple[str, ...]:
        """Return the network taps read of the teacher; empty = no teacher is run or paid for."""
        taps = cls.taps if cls.teacher_taps is None else cls.teacher_taps
        return tuple(tap for tap in taps if tap != "labels")

    @classmethod
    def needs_teacher(cls) -> bool:
        """Say whether a teacher forward is part of this method's step."""
        return bool(cls.read_of_teacher())

    def settings(self) -> dict[str, Any]:
        """Return hyper-parameters and weights as they are in force, for records and keys."""
        values = {name: getattr(self, name) for name in self.hyper}
        weights = {**self.weights, **self.auxiliary_weights}
        return {**values, "weights": weights}
