"""Small networks, random taps, and runs of one method on them: the parts of the checks.

Nothing here depends on a data set or on kdprof's networks; everything runs on the CPU in
milliseconds. Student and teacher differ in width; c2 has stride 4, the other maps have stride 8.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdprof.discovery import MethodEntry
from kdprof.method import IGNORE, Method, Network, NetworkInfo, Taps
from kdprof.method_checks.two_ranks import in_two_processes

if TYPE_CHECKING:
    from kdprof.step import TrainStep

CLASSES, OLD_CLASSES = 5, 3
"""Classes of every network, and of the teacher of an incremental method."""
CROP, BATCH = (64, 64), 2
GRID = (8, 8)
"""Height x width of the maps at stride 8: a harmless size, since separate checks use others."""
BUILD_SEED, RUN_SEED = 1, 3


def _info(name: str, width: int, classes: int, background: bool) -> NetworkInfo:
    channels = {"logits": classes, "aux": classes, "head": 2 * width}
    channels |= {"c2": width, "c3": width, "c4": 2 * width, "c5": 2 * width}
    stride = {**dict.fromkeys(channels, 8), "c2": 4}
    return NetworkInfo(name, classes, channels, stride, background)


class SmallNetwork(Network):
    """A network with every tap, batch norm and dropout."""

    align_corners = False

    def __init__(self, info: NetworkInfo):
        super().__init__()
        self.info, c = info, info.channels
        self.c2 = self._stage(3, c["c2"], kernel=5, stride=4)
        self.c3 = self._stage(c["c2"], c["c3"], kernel=3, stride=2)
        self.c4 = self._stage(c["c3"], c["c4"])
        self.c5 = self._stage(c["c4"], c["c5"])
        self.head = self._stage(c["c5"], c["head"])
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(c["head"], info.num_classes, 1)
        self.auxiliary_head = nn.Conv2d(c["c4"], info.num_classes, 1)

    @staticmethod
    def _stage(before: int, after: int, *, kernel: int = 1, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2)
        return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())

    def forward(self, images: Tensor, taps: Iterable[str]) -> Taps:
        """Return the tensors that ``taps`` names."""
        made = {"c2": self.c2((images.float() - 128) / 64)}
        for stage, before in (("c3", "c2"), ("c4", "c3"), ("c5", "c4")):
            made[stage] = getattr(self, stage)(made[before])
        made["head"] = self.dropout(self.head(made["c5"]))
        made["logits"] = self.conv_seg(made["head"])
        made["aux"] = self.auxiliary_head(made["c4"])
        made["classifier"] = self.conv_seg.weight
        return Taps(**{tap: made[tap] for tap in taps})


class Inputs(NamedTuple):
    """The arguments of an objective."""

    student: Taps
    teacher: Taps
    labels: Tensor | None


@dataclass
class Outcome:
    """The result of one run of an objective. A gradient is None if backward did not reach it."""

    terms: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Any]
    seed: int
    """The seed of torch's generator at the end."""

    def all_terms(self) -> dict[str, Tensor]:
        """Return the student's and the auxiliary module's terms."""
        return {**self.terms, **self.auxiliary}

    def values(self) -> dict[str, Any]:
        """Return everything that two equal runs agree on, by its name in messages."""
        found: dict[str, Any] = {f"term '{k}'": v for k, v in self.all_terms().items()}
        found |= {f"the gradient of {k}": v for k, v in self.gradients.items()}
        return found | {f"the state '{k}'": v for k, v in self.state.items()}


class Bench:
    """One method on small networks.

    Args:
        found: the method.
        ranks: its reports from two processes, by rank; None: the processes start when needed.
    """

    def __init__(self, found: MethodEntry, ranks: Mapping[str, Any] | None = None):
        self.found, self.cls, self._ranks = found, found.cls, ranks
        self._prototypes: dict[int, Method] = {}

    @cached_property
    def student(self) -> NetworkInfo:
        """The NetworkInfo of the student."""
        return _info("student", 8, CLASSES, self.cls.incremental)

    @cached_property
    def teacher(self) -> NetworkInfo:
        """The NetworkInfo of the teacher, with fewer classes if the method is incremental."""
        classes = OLD_CLASSES if self.cls.incremental else CLASSES
        return _info("teacher", 16, classes, self.cls.incremental)

    @property
    def ranks(self) -> Mapping[str, Any]:
        """The reports of the two processes of :mod:`kdprof.method_checks.two_ranks`, by rank."""
        if self._ranks is None:
            self._ranks = in_two_processes([self.found])[self.cls.name]
        return self._ranks

    @cached_property
    def plain(self) -> Outcome:
        """The result of a run on harmless inputs."""
        return self.run(self.draw())

    def method(self, seed: int = BUILD_SEED) -> Method:
        """Return a fresh method, its extras drawn from a seed."""
        if seed not in self._prototypes:
            torch.manual_seed(seed)
            made = self.cls()
            made.build(self.student, self.teacher if made.needs_teacher() else None)
            self._prototypes[seed] = made.train()
        return copy.deepcopy(self._prototypes[seed])

    def draw(
        self,
        *,
        images: int = 2,
        grid: tuple[int, int] = GRID,
        teacher_grid: tuple[int, int] | None = None,
        ragged: bool = False,
        void: bool = False,
        seed: int = 0,
    ) -> Inputs:
        """Return random taps and labels: those that the method declares, of both networks.

        Args:
            grid: height and width of the maps at stride 8.
            teacher_grid: the teacher's grid, if it differs.
            ragged: the crop is 5 pixels short of a multiple of 8, and c2 has odd sides.
            void: every label is :data:`IGNORE`, instead of a fifth of them.
        """
        generator = torch.Generator().manual_seed(seed)
        sides = {"student": grid, "teacher": teacher_grid or grid}
        taps = {"student": self.cls.student_taps(), "teacher": self.cls.read_of_teacher()}
        student, teacher = (
            random_taps(getattr(self, who), taps[who], images, sides[who], generator, ragged)
            for who in ("student", "teacher")
        )
        size = (images, *(8 * side - 5 * ragged for side in grid))
        labels = torch.randint(0, CLASSES, size, generator=generator)
        ignored = torch.rand(size, generator=generator) < (1.0 if void else 0.2)
        labels = labels.masked_fill(ignored, IGNORE)
        return Inputs(student, teacher, labels if "labels" in self.cls.taps else None)

    def run(
        self,
        inputs: Inputs,
        method: Method | None = None,
        *,
        call: Callable[..., dict[str, Tensor]] | None = None,
        bf16: bool = False,
        of_python: int = 0,
        of_numpy: int = 0,
    ) -> Outcome:
        """Run an objective forward and backward, its auxiliary module too, under fixed seeds.

        Args:
            method: None = a fresh one.
            call: what to call instead of the method.
            bf16: run under bf16 autocast.
            of_python, of_numpy: seeds of generators that no method should draw from.
        """
        seed_others(of_python, of_numpy)
        method = self.method() if method is None else method
        student = Taps(
            **{k: v.detach().clone().requires_grad_() for k, v in vars(inputs.student).items()}
        )
        torch.manual_seed(RUN_SEED)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            terms = (method if call is None else call)(student, inputs.teacher, inputs.labels)
        backward(terms, method.weights)
        auxiliary = {}
        if method.auxiliary() is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                auxiliary = method.auxiliary_forward(
                    student.detach(), inputs.teacher, inputs.labels
                )
            backward(auxiliary, method.auxiliary_weights)
        gradients = {f"student tap '{k}'": v.grad for k, v in vars(student).items()}
        gradients |= {f"extra '{k}'": p.grad for k, p in trained(method).items()}
        state = {k: copy.deepcopy(v) for k, v in method.state_dict().items()}
        return Outcome(terms, auxiliary, gradients, state, torch.initial_seed())

    def step(self, seed: int = BUILD_SEED) -> TrainStep:
        """Return a training step of the method on small networks."""
        # Imported here: the two processes make no step, and start in half the time without it.
        from kdprof.step import TrainStep
        from kdprof.study import StepSettings

        method = self.method(seed)
        torch.manual_seed(0)
        student, teacher = SmallNetwork(self.student), SmallNetwork(self.teacher)
        return TrainStep(
            student=student,
            teacher=teacher if method.needs_teacher() else None,
            method=method,
            settings=StepSettings(batch=BATCH, crop=CROP, learning_rate=0.05),
            iterations=4,
            seed=0,
            device=torch.device("cpu"),
        )


def random_taps(
    info: NetworkInfo,
    taps: Iterable[str],
    images: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    ragged: bool = False,
) -> Taps:
    """Return normal maps with the shapes of a network's taps, see :meth:`Bench.draw`."""
    shapes = {}
    for tap in taps:
        sides = [2 * side - ragged for side in grid] if tap == "c2" else grid
        shapes[tap] = (images, info.channels.get(tap, 0), *sides)
        if tap == "classifier":
            shapes[tap] = (info.num_classes, info.channels["head"], 1, 1)
    return Taps(**{tap: torch.randn(s, generator=generator) for tap, s in shapes.items()})


def random_batch(index: int) -> tuple[Tensor, Tensor]:
    """Return images and labels for a step, uint8 as a loader gives them."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randint(0, 256, (BATCH, 3, *CROP), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH, *CROP), dtype=torch.uint8, generator=generator)
    labels[:, :3] = IGNORE
    return images, labels


def seed_others(of_python: int, of_numpy: int) -> None:
    """Seed the generators that a step does not seed: only one check must notice their use."""
    random.seed(of_python)
    np.random.seed(of_numpy)


def trained(method: Method) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimiser gets: those that require a gradient."""
    return {name: p for name, p in method.named_parameters() if p.requires_grad}


def backward(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Differentiate the weighted sum; a term without a weight (another check's problem) has 1."""
    scalars = [weights.get(k, 1.0) * t.mean() for k, t in terms.items() if t.requires_grad]
    if scalars:
        torch.stack(scalars).sum().backward()


def same(a: Any, b: Any) -> bool:
    """Return whether two values are the same to the last bit; NaN equals NaN here."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def gap(a: Tensor, b: Tensor) -> float:
    """Return the length of a - b; infinite if shapes differ or a number is not finite."""
    if a.shape != b.shape:
        return math.inf
    length = (a.double() - b.double()).norm().item()
    return length if math.isfinite(length) else math.inf
