"""The generated data set."""

import pytest
import torch
from data_cases import equal

from kdprof.data.synthetic import SyntheticScenes


def test_scene_is_a_function_of_split_and_index():
    def scene(split, index, count=9):
        return SyntheticScenes(split, (24, 32), count)[index]

    assert equal(scene("train", 3), scene("train", 3))
    assert equal(scene("train", 3), scene("train", 3, count=400))
    images = [scene(split, index)[0] for split in ("train", "val", "test") for index in range(4)]
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_content_of_the_scenes():
    data = SyntheticScenes("train", (60, 80), 50)
    shares = torch.stack([torch.bincount(label.flatten(), minlength=256) for _, label in data])
    shares = shares.double() / (60 * 80)
    used = shares.mean(0)
    assert set(used.nonzero().flatten().tolist()) <= {*range(data.num_classes), 255}
    classes = used[: data.num_classes]
    assert (classes > 0).sum() >= 11
    assert classes.max() > 20 * classes[classes > 0].min()  # imbalanced, as streets are
    void = shares[:, 255]
    assert void.max() < 0.25
    assert (void > 0).double().mean() > 0.3
    brightness = torch.tensor([float(image.float().mean()) for image, _ in data])
    assert brightness.std() > 10


@pytest.mark.parametrize("size", [(17, 23), (64, 96), (96, 64), (8, 8)])
def test_sizes_of_scenes(size):
    data = SyntheticScenes("val", size, 6)
    for image, label in data:
        assert image.shape == (3, *size)
        assert label.shape == size
        assert image.dtype == label.dtype == torch.uint8
        assert image.is_contiguous()
        assert (label == 255).double().mean() < 0.25


def test_scenes_end():
    """Iteration by index stops there."""
    data = SyntheticScenes("train", (16, 16), 2)
    assert len(data) == len(list(data)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            data[index]
