"""Small images, trees and batches for the tests of data."""

import numpy as np
import torch
from PIL import Image

from kdprof.data import Augmentation, Batches, Feeder
from kdprof.data.base import Classes, SegmentationData
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError


def noise(height, width, classes=11, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    label = rng.integers(0, classes, (height, width), dtype=np.uint8)
    return torch.from_numpy(image), torch.from_numpy(label)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Numbered(SegmentationData):
    """Image i is filled with i."""

    def __init__(self, sizes, unusable=()):
        super().__init__("numbered", "train", Classes(("a", "b", "c"), ((0, 0, 0),) * 3))
        self.sizes, self.unusable = sizes, unusable

    def label(self, index):
        return self[index][1]

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        if index in self.unusable:
            raise UserError(f"image {index} cannot be read; replace it")
        size = self.sizes[index]
        return (
            torch.full((3, *size), index, dtype=torch.uint8),
            torch.full(size, index % 3, dtype=torch.uint8),
        )


def numbered_batches(count, batch, *, seed=0, workers=0, unusable=()):
    return Batches(
        Numbered([(6, 8)] * count, unusable),
        seed=seed,
        batch=batch,
        augmentation=Augmentation((6, 8), scale=(1.0, 1.0), photometric=False),
        workers=workers,
    )


def scene_batches(workers, seed=0):
    return Batches(
        SyntheticScenes("train", (24, 32), 7),
        seed=seed,
        batch=3,
        augmentation=Augmentation((20, 28)),
        workers=workers,
    )


def fed(batches, start, stop):
    return Feeder(batches, torch.device("cpu"), start, stop)


def png(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)


def image_of_noise(height=12, width=16):
    return noise(height, width)[0].permute(1, 2, 0).numpy()


def indices(height=12, width=16):
    return noise(height, width, classes=12)[1].numpy()
