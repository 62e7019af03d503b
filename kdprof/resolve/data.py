"""The splits of a study's data set, for each of its networks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import get_args

from kdprof.data import (
    Augmentation,
    Batches,
    DataOnDisk,
    Decoded,
    Findings,
    PairedImages,
    SegmentationData,
    cache_folder,
    content_of,
    decoded,
    examine_files,
    examine_labels,
    file_sizes,
    fit_of,
    uses_placeholders,
)
from kdprof.data.scenario import Role, Scenario
from kdprof.errors import Problems
from kdprof.evaluate import Views, evaluated_sizes
from kdprof.progress import Progress
from kdprof.store import short_hash
from kdprof.study import Study

LEAST_MEASURED_IMAGES, MEASURED_BATCHES = 64, 4
"""Measuring with ``cache = "memory"`` decodes this many images or batches, whichever is more."""


class StudyData:
    """The train and val split of a study.

    Attributes:
        files: the splits, read from their files.
        name: name of the data set.
        kind: its name in the study without the folder: synthetic, folder, cityscapes, ...
        uses_placeholders: True if placeholder images stand for the files of the data set.
        views: how images are given to the networks in evaluation.
    """

    def __init__(
        self,
        study: Study,
        files: Mapping[str, DataOnDisk],
        scenario: Scenario | None,
        progress: Progress,
    ):
        self.files, self.name = files, files["train"].name
        self.kind = study.data.partition(":")[0]
        self.uses_placeholders = uses_placeholders(study.data)
        self._settings, self._step = study.data_settings, study.step
        self._scenario, self._progress = scenario, progress
        self._decoded: dict[str, SegmentationData] = {}
        self.views = Views(fit=fit_of(study.data_settings.resize, self.files["val"].name))

    def class_names(self, role: Role) -> tuple[str, ...]:
        """Return the classes that a network distinguishes, in order."""
        return self._view(self.files["train"], role, training=True).class_names

    def num_classes(self, role: Role) -> int:
        """Return how many classes a network distinguishes."""
        return len(self.class_names(role))

    def train(self, role: Role) -> SegmentationData:
        """Return the images that a network is trained on."""
        return self._view(self.decoded("train"), role, training=True)

    def val(self, role: Role) -> SegmentationData:
        """Return the images that a network is evaluated on."""
        return self._view(self.decoded("val"), role, training=False)

    def _view(self, data: SegmentationData, role: Role, *, training: bool) -> SegmentationData:
        return self._scenario.view(data, role, training=training) if self._scenario else data

    def decoded(self, split: str) -> SegmentationData:
        """Return a split with its images cached as ``data_settings.cache`` says; the first call
        creates it.

        Raises:
            UserError: files cannot be used, or the cache cannot be written.
        """
        if self.uses_placeholders:
            return self.files[split]  # nothing to decode
        if split not in self._decoded:
            settings, data = self._settings, self.files[split]
            self._decoded[split] = decoded(
                data, settings.cache, settings.cache_folder, self._progress
            )
        return self._decoded[split]

    def cache_folder(self) -> Path:
        """Return the folder of decoded images.

        Raises:
            UserError: there is none, see :func:`~kdprof.data.cache_folder`.
        """
        return cache_folder(self._settings.cache_folder)

    @cached_property
    def file_sizes(self) -> str | None:
        """A hash of the sizes of the training files; None for images that are made."""
        data = self.files["train"]
        return file_sizes(data) if isinstance(data, PairedImages) else None

    @cached_property
    def content(self) -> dict[str, str]:
        """What runs depend on in the data, by name: hashes of images, labels and classes, when they
        were first asked for. Images that are made depend on the study's settings alone.

        Raises:
            UserError: files cannot be read.
        """
        found = {"classes": short_hash("\n".join(self.files["train"].class_names))}
        kept = Problems().attempt(self.cache_folder, None)
        for data in self.files.values():
            if isinstance(data, PairedImages):
                found |= content_of(data, kept, self._progress)
        return found

    def evaluated_sizes(self) -> set[tuple[int, int]]:
        """Return the heights and widths that images are evaluated at, pixels, from their
        headers."""
        return evaluated_sizes(self.files["val"], self.views)

    def examine(self) -> Findings:
        """Return what is degenerate in the labels and images; empty for images that are made.

        It reads every label.

        Raises:
            UserError: a file cannot be used. It names all such files.
        """
        found = Findings()
        if not isinstance(self.files["train"], PairedImages):
            return found
        for role in get_args(Role) if self._scenario else ("student",):
            of_role, prefix = self._examine(role), f"{role}: " if self._scenario else ""
            found.problems += [prefix + problem for problem in of_role.problems]
            found.warnings += [prefix + warning for warning in of_role.warnings]
        found.warnings += examine_files(
            data for data in self.files.values() if isinstance(data, PairedImages)
        )
        return found

    def _examine(self, role: Role) -> Findings:
        """Return what is degenerate in the labels that a network learns and is scored on."""
        shown = {
            "train": self._view(self._labels("train"), role, training=True).labels_shown,
            "val": self._view(self._labels("val"), role, training=False).labels_shown,
        }
        taught = self._scenario.taught(role) if self._scenario else None
        return examine_labels(self.class_names(role), shown, taught)

    def _labels(self, split: str) -> SegmentationData:
        """Return a split whose labels are read without its images where they are not decoded."""
        kept = self._settings.cache == "disk" or split in self._decoded
        return self.decoded(split) if kept else self.files[split]

    def _few(self, role: Role) -> SegmentationData:
        """Return images of which only a few are decoded, if all would be kept in memory."""
        whole = self._settings.cache != "memory" or self._scenario or "train" in self._decoded
        if whole or self.uses_placeholders:
            return self.train(role)
        most = max(LEAST_MEASURED_IMAGES, MEASURED_BATCHES * self._step.batch)
        return Decoded(self.files["train"], self._progress, most)

    def batches(self, role: Role, seed: int, rank: int = 0, *, few: bool = False) -> Batches:
        """Return the training batches of a network for a seed: the same for every method.

        Args:
            rank: the rank whose share of each batch is returned.
            few: True if a few images may stand for all, because loading is only measured.
        """
        settings = self._settings
        augmentation = Augmentation(
            crop=self._step.crop,
            scale=settings.scale,
            flip=settings.flip,
            photometric=settings.photometric,
            scale_step=settings.scale_step,
            fit=self.views.fit,
            max_class_share=settings.max_class_share,
        )
        return Batches(
            self._few(role) if few else self.train(role),
            seed=seed,
            batch=self._step.batch,
            augmentation=augmentation,
            workers=settings.workers,
            rank=rank,
            ranks=self._step.gpus,
        )
