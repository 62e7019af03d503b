"""The student alone: the baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from kdprof.method import Method, Recipe, Taps


class NoDistillation(Method):
    """The student alone: task loss, no teacher is run or paid for.

    The task loss is the step's own: cross-entropy of the resized logits plus 0.4 times that of the
    auxiliary head. The same network spans 69.1 to 74.9 mIoU by recipe alone.
    """

    name = "none"
    title = "Student alone"
    paper = "-"
    family = "baseline"
    recipes = (
        Recipe(
            "Cityscapes", None, "PSPNet-R18", 80_000, 8, (512, 1024),
            "SGD 0.01, momentum 0.9, wd 5e-4", "poly 0.9, floor 1e-4", "mmsegmentation model zoo",
            gpus="4 x 2", miou=74.87,
        ),
        Recipe(
            "Cityscapes", None, "PSPNet-R18", 40_000, 16, (512, 1024),
            "SGD 0.02, momentum 0.9, wd 1e-4", "poly 0.9", "CIRKD repository", gpus="8 x 2",
            miou=72.55,
        ),
        Recipe(
            "Cityscapes", None, "PSPNet-R18", 40_000, 8, (512, 512),
            "SGD 0.01, momentum 0.9, wd 5e-4", "poly 0.9", "structure-KD repository", gpus="1",
            miou=69.10,
        ),
    )  # fmt: skip

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return no terms."""
        return {}
