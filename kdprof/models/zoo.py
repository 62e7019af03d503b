"""Published checkpoints by the digest in their file names, with their reported mIoU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdprof.store import file_sha256

MMSEG_SOURCE = "mmsegmentation, configs/{head}/metafile.yaml"


@dataclass(frozen=True)
class Reported:
    """The published mIoU of a checkpoint, in percent, on whole images.

    Attributes:
        flipped: mIoU at several scales with flipping; None = not published.
    """

    file: str
    data: str
    miou: float
    flipped: float | None
    source: str


_CITYSCAPES = {
    "2966598c": ("pspnet_r50-d8_512x1024_40k", 77.85, 79.18),
    "467e7cf4": ("pspnet_r101-d8_512x1024_40k", 78.34, 79.74),
    "86638686": ("pspnet_r50-d8_769x769_40k", 78.26, 79.88),
    "61c6f5be": ("pspnet_r101-d8_769x769_40k", 79.08, 80.28),
    "09ffa746": ("pspnet_r18-d8_512x1024_80k", 74.87, 76.04),
    "2376f12b": ("pspnet_r50-d8_512x1024_80k", 78.55, 79.79),
    "e1e1100f": ("pspnet_r101-d8_512x1024_80k", 79.76, 81.01),
    "a0875e5c": ("pspnet_r101-d8_fp16_512x1024_80k", 79.46, None),
    "3deefc62": ("pspnet_r18-d8_769x769_80k", 75.90, 77.86),
    "5ccf03dd": ("pspnet_r50-d8_769x769_80k", 79.59, 80.69),
    "dba412fa": ("pspnet_r101-d8_769x769_80k", 79.77, 81.06),
    "26928a60": ("pspnet_r18b-d8_512x1024_80k", 74.23, 75.79),
    "6344287a": ("pspnet_r50b-d8_512x1024_80k", 78.22, 79.46),
    "3a4d38ab": ("pspnet_r101b-d8_512x1024_80k", 79.69, 80.79),
    "acadc2f8": ("deeplabv3_r50-d8_512x1024_40k", 79.09, 80.45),
    "7fd3f799": ("deeplabv3_r101-d8_512x1024_40k", 77.12, 79.61),
    "7eda553c": ("deeplabv3_r50-d8_769x769_40k", 78.58, 79.89),
    "c64f889f": ("deeplabv3_r101-d8_769x769_40k", 79.27, 80.11),
    "23dffbe2": ("deeplabv3_r18-d8_512x1024_80k", 76.70, 78.27),
    "b92cfdd4": ("deeplabv3_r50-d8_512x1024_80k", 79.32, 80.57),
    "9e428899": ("deeplabv3_r101-d8_512x1024_80k", 80.20, 81.21),
    "774d9cec": ("deeplabv3_r101-d8_fp16_512x1024_80k", 80.48, None),
    "6452126a": ("deeplabv3_r18-d8_769x769_80k", 76.60, 78.26),
    "788d6228": ("deeplabv3_r50-d8_769x769_80k", 79.89, 81.06),
    "60e95418": ("deeplabv3_r101-d8_769x769_80k", 79.67, 80.81),
    "46040cef": ("deeplabv3_r18b-d8_512x1024_80k", 76.26, 77.88),
    "ec368954": ("deeplabv3_r50b-d8_512x1024_80k", 79.63, 80.98),
}
"""mmsegmentation's checkpoints on Cityscapes val, by the first eight digits of the SHA-256."""


def reported(path: Path) -> Reported | None:
    """Return the published mIoU of a file, by its content; None if it is unknown."""
    found = _CITYSCAPES.get(file_sha256(path)[:8])
    if found is None:
        return None
    name, miou, flipped = found
    source = MMSEG_SOURCE.format(head=name.partition("_")[0])
    return Reported(f"{name}_cityscapes", "cityscapes", miou, flipped, source)
