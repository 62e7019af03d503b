"""Data sets opened by name, and decoded ones."""

import pytest
from data_cases import Numbered, equal

from kdprof.data import open_data
from kdprof.data.decoded import Decoded
from kdprof.errors import UserError
from kdprof.progress import Progress


def test_decoded_is_the_data_it_was_made_from():
    data = Numbered([(4, 6), (6, 4)])
    decoded = Decoded(data, Progress(None))
    assert len(decoded) == 2
    assert all(equal(decoded[i], data[i]) for i in range(2))
    for name in ("name", "split", "num_classes", "class_names", "palette"):
        assert getattr(decoded, name) == getattr(data, name)


def test_a_few_images_stand_for_all():
    """Every second of ten, at most four; unusable ones among the others do not matter."""
    data = Numbered([(4, 6 + index) for index in range(10)], unusable={1, 3, 8})
    few = Decoded(data, Progress(None), most=4)
    assert len(few) == 10
    shown = [int(few[index][0].shape[-1]) - 6 for index in range(10)]
    assert shown == [0, 2, 4, 6, 0, 2, 4, 6, 0, 2]
    assert len(Decoded(Numbered([(4, 6)] * 3), Progress(None), most=64)) == 3


def test_decoding_tells_all_unusable_files():
    with pytest.raises(UserError) as caught:
        Decoded(Numbered([(4, 6)] * 5, unusable={1, 3}), Progress(None))
    assert caught.value.problems == tuple(f"image {i} cannot be read; replace it" for i in (1, 3))


def opened(spec, split="train"):
    return open_data(spec, split, synthetic_size=(16, 24), synthetic_count=4)


def test_open_data(camvid):
    scenes = opened("synthetic", "val")
    assert (scenes.name, scenes.split, len(scenes)) == ("synthetic", "val", 4)
    assert scenes[0][1].shape == (16, 24)
    pairs = opened(f"camvid:{camvid}")
    assert (pairs.name, pairs.split, len(pairs)) == ("camvid", "train", 3)


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("camvidd:/x", "train", "did you mean 'camvid'?"),
        ("camvid", "train", "give camvid:ROOT"),
        ("camvid:", "train", "give camvid:ROOT"),
        ("synthetic:/x", "train", "takes no folder"),
        ("synthetic", "vall", "did you mean 'val'?"),
    ],
)
def test_unusable_names(spec, split, message):
    with pytest.raises(UserError) as caught:
        opened(spec, split)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
