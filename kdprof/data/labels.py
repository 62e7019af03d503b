"""What the pixels of a label file mean: class indices, other values, or colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdprof.data.base import Classes
from kdprof.errors import Problems, UserError, unknown
from kdprof.method import IGNORE
from kdprof.study import DataSettings

VOID = "void"
"""What ``label_map`` and, with colours, ``classes.txt`` call pixels that belong to no class."""
REFUSED = 254
"""Marks a value that no label may have in a table of label values."""
BILEVEL = "1"
"""Pillow's mode of images with one bit per pixel, which viewers show as 0 and 255."""


class LabelPixels:
    """What the pixels of a label file mean.

    Attributes:
        modes: the modes of Pillow that such a file may have.
        read_as: the mode that it is converted to; None = as it is.
    """

    modes: tuple[str, ...]
    read_as: str | None

    def classes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, uint8 (H, W); :data:`IGNORE` for void, :data:`REFUSED`
        where a pixel may not be so."""
        raise NotImplementedError

    def refusal(self, path: Path, pixels: np.ndarray, refused: np.ndarray) -> str:
        """Return what is wrong with the pixels of a file at ``refused``, and the fix."""
        raise NotImplementedError

    def wrong_mode(self, mode: str) -> str:
        """Return what is wrong with a file of another mode, and the fix."""
        raise NotImplementedError

    def identity(self) -> list[Any]:
        """Return all that the classes depend on, in types of JSON."""
        raise NotImplementedError


@dataclass(frozen=True)
class LabelValues(LabelPixels):
    """The meaning of the values in a label file of 8-bit grey or palette.

    Attributes:
        table: class of each value 0-255; :data:`IGNORE` for void, :data:`REFUSED` for a value that
            is not allowed.
        allowed: the allowed values, in words.
    """

    table: np.ndarray
    allowed: str
    modes: tuple[str, ...] = ("L", "P")
    read_as = None

    @classmethod
    def of(
        cls, meaning: Mapping[int, int], allowed: str, modes: tuple[str, ...] = ("L", "P")
    ) -> LabelValues:
        """Return the values whose classes ``meaning`` gives; no other value is allowed."""
        table = np.full(256, REFUSED, dtype=np.uint8)
        for value, index in meaning.items():
            table[value] = index
        return cls(table, allowed, modes)

    @classmethod
    def indices(cls, classes: int, void: int = IGNORE) -> LabelValues:
        """Return the values of class indices, with ``void`` for void."""
        meaning = {index: index for index in range(classes)} | {void: IGNORE}
        return cls.of(meaning, f"0-{classes - 1} or {void} (void)")

    @classmethod
    def from_one(cls, classes: int) -> LabelValues:
        """Return the values of class indices that begin with 1, with 0 for void."""
        meaning = {index + 1: index for index in range(classes)} | {0: IGNORE, IGNORE: IGNORE}
        return cls.of(meaning, f"1-{classes} or 0 (void)")

    @classmethod
    def mapped(cls, settings: DataSettings, classes: Classes) -> LabelValues:
        """Return the values that ``data_settings.label_map`` names, and the void one.

        Raises:
            UserError: it names a class that does not exist. It names every problem.
        """
        known = {VOID: IGNORE} | {name: index for index, name in enumerate(classes.names)}
        problems = [
            f"data_settings.label_map: {value} is {unknown('class', name, known)}"
            for value, name in settings.label_map.items()
            if name not in known
        ]
        if problems:
            raise UserError(*problems)
        meaning = {settings.ignore_index: IGNORE}
        meaning |= {value: known[name] for value, name in settings.label_map.items()}
        values = ", ".join(map(str, sorted(meaning)))
        bilevel = (BILEVEL,) if {0, 255} <= settings.label_map.keys() else ()
        allowed = f"the values of data_settings.label_map and the void one: {values}"
        return cls.of(meaning, allowed, ("L", "P", *bilevel))

    def classes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, uint8 (H, W), see :class:`LabelPixels`."""
        return self.table[_as_bytes(pixels)]

    def refusal(self, path: Path, pixels: np.ndarray, refused: np.ndarray) -> str:
        """Return what is wrong with the pixels of a file at ``refused``, and the fix."""
        wrong = int(_as_bytes(pixels)[refused].max())
        return (
            f"label value {wrong} in {path}; expected {self.allowed}: convert the labels to "
            "class indices"
        )

    def wrong_mode(self, mode: str) -> str:
        """Return what is wrong with a file of another mode, and the fix."""
        fix = "convert colours to class indices"
        if mode == "RGB":
            fix += ', or set data_settings.masks = "colours" for a folder: data set'
        if mode == BILEVEL:
            fix = "say what 0 and 255 are in data_settings.label_map"
        return f"is {mode}, not 8-bit class indices; {fix}"

    def identity(self) -> list[Any]:
        """Return all that the classes depend on."""
        return self.table.tolist()


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Return 8-bit values; those of one bit become 0 and 255."""
    return pixels.astype(np.uint8) * np.uint8(255) if pixels.dtype == bool else pixels


@dataclass(frozen=True)
class LabelColours(LabelPixels):
    """The meaning of the colours in a label file of RGB, or of grey or palette read as RGB.

    Attributes:
        colours: those of the classes, in order, then those of void.
        classes: the number of classes.
    """

    colours: tuple[tuple[int, int, int], ...]
    classes: int
    modes = ("RGB", "P", "L")
    read_as = "RGB"

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted 24-bit colours, and the class of each."""
        packed = _packed(np.array(self.colours, dtype=np.uint8))
        order = np.argsort(packed)
        classes = np.where(order < self.classes, order, IGNORE).astype(np.uint8)
        return packed[order], classes

    def classes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Return the class of each pixel, uint8 (H, W), see :class:`LabelPixels`."""
        known, classes = self._table
        packed = _packed(pixels)
        places = np.searchsorted(known, packed).clip(max=len(known) - 1)
        return np.where(known[places] == packed, classes[places], np.uint8(REFUSED))

    def refusal(self, path: Path, pixels: np.ndarray, refused: np.ndarray) -> str:
        """Return what is wrong with the pixels of a file at ``refused``, and the fix."""
        found, counts = np.unique(pixels[refused], axis=0, return_counts=True)
        colour = " ".join(map(str, found[counts.argmax()].tolist()))
        return (
            f"colour {colour} in {path} ({int(refused.sum())} pixels are of {len(found)} colours "
            f"that are no class's); add its class to classes.txt, or a line '{VOID}' with it"
        )

    def wrong_mode(self, mode: str) -> str:
        """Return what is wrong with a file of another mode, and the fix."""
        return f"is {mode}, not RGB; save the colours as 8-bit RGB without transparency"

    def identity(self) -> list[Any]:
        """Return all that the classes depend on."""
        return [self.classes, *map(list, self.colours)]


def _packed(colours: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) as 24-bit numbers (...)."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def label_pixels(
    settings: DataSettings, classes: Classes, void_colours: Sequence[tuple[int, int, int]]
) -> LabelPixels:
    """Return what label files mean that are not those of a published data set.

    Args:
        classes: with the colours that the label files have, if they are colours.
        void_colours: colours of pixels that belong to no class.

    Raises:
        UserError: settings exclude each other, or do not fit the classes. It names every problem.
    """
    count, problems = len(classes.names), Problems()
    if settings.masks == "colours":
        for name in ("label_map", "reduce_zero_label", "ignore_index"):
            if name in _given(settings):
                problems.append(f"data_settings.{name} is for masks of indices; leave it out")
        colours = (*classes.palette, *void_colours)
        twice = sorted({colour for colour in colours if colours.count(colour) > 1})
        problems += [
            f"classes.txt: {' '.join(map(str, colour))} is the colour of two classes; change one"
            for colour in twice
        ]
        problems.refuse()
        return LabelColours(colours, count)
    if settings.label_map:
        if settings.reduce_zero_label:
            problems.append("data_settings: give label_map or reduce_zero_label, not both")
        problems.refuse()
        return LabelValues.mapped(settings, classes)
    if settings.reduce_zero_label:
        if 1 <= settings.ignore_index <= count:
            problems.append(_taken(settings, classes.names[settings.ignore_index - 1]))
        problems.refuse()
        meaning = {index + 1: index for index in range(count)}
        meaning |= {0: IGNORE, settings.ignore_index: IGNORE}
        return LabelValues.of(meaning, f"1-{count}, 0 or {settings.ignore_index} (void)")
    if settings.ignore_index < count:
        problems.append(_taken(settings, classes.names[settings.ignore_index]))
    problems.refuse()
    return LabelValues.indices(count, settings.ignore_index)


def _taken(settings: DataSettings, name: str) -> str:
    return (
        f"data_settings.ignore_index = {settings.ignore_index} is the value of class '{name}'; "
        "leave it out, or say what each value is in data_settings.label_map"
    )


def _given(settings: DataSettings) -> set[str]:
    """Return the settings of labels that are not at their defaults."""
    usual = DataSettings()
    names = ("masks", "label_map", "reduce_zero_label", "ignore_index")
    return {name for name in names if getattr(settings, name) != getattr(usual, name)}


def published_pixels(name: str, settings: DataSettings, classes: Classes) -> LabelValues | None:
    """Return what the labels of a published data set mean by ``label_map``; None without one.

    Raises:
        UserError: settings say otherwise what these labels mean. It names every problem.
    """
    others = sorted(_given(settings) - {"label_map"})
    problems = [
        f"data_settings.{other}: the labels of {name} are known; leave it out, or use label_map"
        for other in others
    ]
    if problems:
        raise UserError(*problems)
    return LabelValues.mapped(settings, classes) if settings.label_map else None
