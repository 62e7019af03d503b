"""CamVid, the common split of 11 classes (SegNet's).

``ROOT/train/*.png|jpg`` with ``ROOT/trainannot/*.png`` of the same stem, likewise ``val`` and
``test``. Labels are class indices 0-10; 11 is unlabelled.
"""

from __future__ import annotations

from pathlib import Path

from kdprof.data.files import Pair, PairedImages, classes_of, mirrored, no_root
from kdprof.data.labels import LabelValues
from kdprof.errors import UserError
from kdprof.method import IGNORE

UNLABELLED = 11
CLASSES = classes_of("camvid")
VALUES = LabelValues.of(
    {index: index for index in range(UNLABELLED)} | {UNLABELLED: IGNORE},
    f"0-{UNLABELLED - 1} or {UNLABELLED} (unlabelled)",
)


class CamVid(PairedImages):
    """One split of CamVid.

    Raises:
        UserError: a folder, a label or an image is missing, a header cannot be read, labels are
            not class indices, or the sizes of a pair differ. It names every problem. Only headers
            are checked here; what only decoding shows is raised when the image is read.
    """

    def __init__(self, root: Path, split: str):
        super().__init__("camvid", split, CLASSES, VALUES, _pairs(root, split), root=root)


def _pairs(root: Path, split: str) -> list[Pair]:
    """Return the (image, label) files of a split in order of name, or raise every problem."""
    if not root.is_dir():
        raise UserError(no_root(root, "camvid", "ROOT holds train, trainannot, val, valannot"))
    return mirrored(root / split, root / f"{split}annot", VALUES)
