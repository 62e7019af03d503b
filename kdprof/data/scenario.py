"""The class-incremental scenario: the images and labels of each step of learning.

The teacher is the model before the new classes were added. Its classes come first, so that class i
is the same class for both networks: the background (if there is one), the old classes, and for the
student also the new ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdprof.data.base import Classes, SegmentationData
from kdprof.errors import UserError, unknown
from kdprof.method import IGNORE
from kdprof.study import ADDED, NO_BACKGROUND, ScenarioSettings, Study

Role = Literal["teacher", "student"]
BACKGROUND = "background"
"""Name of a background that the scenario adds."""
_GREY = (128, 128, 128)


def scenario_of(study: Study, data: SegmentationData) -> Scenario | None:
    """Return a study's scenario on a data set; None if the study has none.

    Raises:
        UserError: the scenario does not fit the networks or the data set.
    """
    if study.scenario is None:
        return None
    if study.starts_as_teacher and study.student != study.teacher:
        raise UserError(
            f"scenario: a {study.student} cannot start as the teacher, a {study.teacher}; use "
            'the same network for both, or set scenario.initialise = "fresh"'
        )
    return Scenario.of(study.scenario, data.class_names)


@dataclass(frozen=True)
class Scenario:
    """A class-incremental scenario on the classes of a data set.

    Attributes:
        classes: the student's classes, in order; the teacher has the first ``len(shared)``.
        shared: the teacher's classes, including the background.
        new: the classes that only the student has.
        background: whether class 0 is the background.
    """

    setting: str
    shared: tuple[str, ...]
    new: tuple[str, ...]
    background: bool
    in_data: tuple[str, ...]
    """The classes of the data set, in its order."""

    @classmethod
    def of(cls, settings: ScenarioSettings, in_data: tuple[str, ...]) -> Scenario:
        """Return the scenario that ``settings`` describes on a data set's classes.

        Raises:
            UserError: the settings do not fit the data set. It names every problem.
        """
        own = settings.background not in (ADDED, NO_BACKGROUND)
        base = [settings.background] if own else []
        named = [*settings.old, *settings.new, *base]
        problems = [unknown("class", name, in_data) for name in named if name not in in_data]
        twice = sorted({name for name in named if named.count(name) > 1})
        problems += [f"class '{name}' is named twice; leave one" for name in twice]
        if settings.background == ADDED and BACKGROUND in in_data:
            problems.append(
                f"the data set has a class '{BACKGROUND}'; set background = \"{BACKGROUND}\""
            )
        old = settings.old or [name for name in in_data if name not in (*settings.new, *base)]
        if not old:
            problems.append("no old class is left for the teacher; name fewer new ones")
        if problems:
            raise UserError(*(f"scenario: {problem}" for problem in problems))
        first = base or ([BACKGROUND] if settings.background == ADDED else [])
        return cls(
            setting=settings.setting,
            shared=(*first, *old),
            new=tuple(settings.new),
            background=bool(first),
            in_data=in_data,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The student's classes, in order."""
        return (*self.shared, *self.new)

    @property
    def old(self) -> tuple[str, ...]:
        """The teacher's classes without the background."""
        return self.shared[self.background :]

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the groups of classes whose mIoU is reported in addition to that of all classes.

        The background is in the old group, because the teacher knows it.
        """
        return {"old": self.shared, "new": self.new}

    def view(self, data: SegmentationData, role: Role, *, training: bool) -> Relabelled:
        """Return the data that a network is trained on, or evaluated on.

        Training labels have the classes of the step only: for the teacher the old ones, for the
        student the new ones and, in the sequential setting, the old ones too. Every other pixel is
        background, or void if there is no background. A training image shows at least one class of
        the step and, except in the overlapped setting, no class of a later step. Evaluation is on
        all images; pixels of classes that the network cannot know are void.
        """
        classes = self.shared if role == "teacher" else self.classes
        if not training:
            return self._relabelled(data, classes, labelled=classes, rest=IGNORE)
        of_step = self.old if role == "teacher" else self.new
        labelled = self.taught(role)
        rest = 0 if self.background else IGNORE
        return self._relabelled(data, classes, labelled=labelled, rest=rest, shown=of_step)

    def taught(self, role: Role) -> tuple[str, ...]:
        """Return the classes that a network's training labels have, besides the background."""
        if self.setting == "sequential":
            return self.shared if role == "teacher" else self.classes
        return self.old if role == "teacher" else self.new

    def _relabelled(
        self,
        data: SegmentationData,
        classes: Sequence[str],
        *,
        labelled: Collection[str],
        rest: int,
        shown: Collection[str] = (),
    ) -> Relabelled:
        table = torch.full((256,), IGNORE, dtype=torch.uint8)
        table[: len(self.in_data)] = rest
        for number, name in enumerate(self.in_data):
            if name in labelled:
                table[number] = classes.index(name)
            elif name in classes[:1] and self.background:
                table[number] = 0
        colours = dict(zip(self.in_data, data.palette, strict=True))
        palette = tuple(colours.get(name, _GREY) for name in classes)
        wanted = self._numbers(shown)
        refused = set() if self.setting == "overlapped" else self._numbers(self._to_come(classes))
        return Relabelled(data, table, Classes(tuple(classes), palette), wanted, refused)

    def _to_come(self, classes: Sequence[str]) -> list[str]:
        return [name for name in self.in_data if name not in classes]

    def _numbers(self, names: Collection[str]) -> set[int]:
        return {number for number, name in enumerate(self.in_data) if name in names}


class Relabelled(SegmentationData):
    """The images of a data set that show certain classes, with labels mapped by a table.

    Args:
        table: (256,) uint8, the new label of every old one.
        wanted: labels of the data set of which an image must show at least one; empty = any image.
        refused: labels that an image must not show, if ``wanted`` is not empty.

    The images are selected when they are first needed, which reads every label.
    """

    def __init__(
        self,
        data: SegmentationData,
        table: Tensor,
        classes: Classes,
        wanted: Collection[int] = (),
        refused: Collection[int] = (),
    ):
        super().__init__(data.name, data.split, classes)
        self._data, self._table = data, table
        self._wanted, self._refused = sorted(wanted), sorted(refused)
        self._images: list[int] | None = None

    def __len__(self) -> int:
        return len(self._chosen())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._data[self._chosen()[index]]
        return image, self._table[label.long()]

    def label(self, index: int) -> Tensor:
        """Return the mapped label of an image."""
        return self._table[self._data.label(self._chosen()[index]).long()]

    @cached_property
    def labels_shown(self) -> np.ndarray:
        """The label values that each image shows, (images, 256) booleans, from those of the data
        set."""
        shown = self._data.labels_shown[self._chosen()]
        table, found = self._table.numpy(), np.zeros_like(shown)
        for value in range(len(table)):
            found[:, table[value]] |= shown[:, value]
        return found

    def _chosen(self) -> list[int]:
        """Return the indices of the selected images in the data set.

        Raises:
            UserError: no image is selected, or files cannot be read.
        """
        if self._images is None:
            every = np.ones((len(self._data), 256), bool)
            shown = self._data.labels_shown if self._wanted else every
            chosen = shown[:, self._wanted].any(1) if self._wanted else shown.any(1)
            if self._wanted and self._refused:
                chosen &= ~shown[:, self._refused].any(1)
            self._images = np.flatnonzero(chosen).tolist()
            if not self._images:
                raise UserError(
                    f"scenario: no {self.split} image of {self.name} shows a class of this step "
                    "and none of a later step; use setting 'overlapped', or other classes"
                )
        return self._images
