"""Augmentation: geometry against an oracle and torch, colour, crops, fitted sizes."""

import colorsys
from dataclasses import replace

import augment_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_cases import (
    equal,
    noise,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kdprof.data import Augmentation, fitted_size
from kdprof.data.augment import Draw

same_every_time = settings(derandomize=True, deadline=None, max_examples=60)


PLAIN = Draw(
    scale=1.0,
    top=0.0,
    left=0.0,
    flip=False,
    brightness=None,
    contrast=None,
    saturation=None,
    hue=None,
    contrast_last=False,
)


def augmented(crop, image, label, draw):
    """Return a batch of one, as its only image and label."""
    augmentation = Augmentation(crop)
    images, labels = augmentation.apply(augmentation.gather([(image, label)], [draw]))
    assert len(images) == len(labels) == 1
    return images[0], labels[0]


# Augmentation: where pixels come from


@pytest.mark.parametrize(("height", "width"), [(17, 23), (64, 96)])
def test_scale_1_copies_the_image(height, width):
    image, label = noise(height, width)
    assert equal(augmented((height, width), image, label, PLAIN), (image, label))


def test_crop_is_a_window_of_the_image():
    image, label = noise(40, 50)
    draw = replace(PLAIN, top=0.5, left=1.0)
    cropped = augmented((20, 30), image, label, draw)
    assert equal(cropped, (image[:, 10:30, 20:], label[10:30, 20:]))


geometry = {
    "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "crop": st.tuples(st.integers(1, 48), st.integers(1, 48)),
    "scale": st.floats(0.25, 3),
    "top": st.floats(0, 1, exclude_max=True),
    "left": st.floats(0, 1, exclude_max=True),
    "colour": st.booleans(),
}


@same_every_time
@given(**geometry)
def test_any_crop_of_any_image(size, crop, scale, top, left, colour):
    """Flips are exact, label values come from the source, and what lies outside the image is void
    and mid-grey whatever the colours do: as many rows and columns as the crop is too large."""
    image, label = noise(*size)
    draw = replace(PLAIN, scale=scale, top=top, left=left)
    if colour:
        draw = replace(draw, brightness=0.1, contrast=1.4, saturation=0.6, hue=-0.08)
    pixels, classes = augmented(crop, image, label, draw)
    flipped = augmented(crop, image, label, replace(draw, flip=True))

    assert equal(flipped, (pixels.flip(2), classes.flip(1)))
    assert pixels.dtype == classes.dtype == torch.uint8
    assert pixels.shape == (3, *crop)
    assert classes.shape == crop
    assert set(classes.unique().tolist()) <= set(label.unique().tolist()) | {255}
    covered = [min(c, max(1, round(s * scale))) for c, s in zip(crop, size, strict=True)]
    inside = classes != 255
    assert inside.any(1).sum() == covered[0]
    assert inside.any(0).sum() == covered[1]
    assert inside.sum() == covered[0] * covered[1]
    assert (pixels[:, ~inside] == 128).all()


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.31, 2.0])
def test_resizing_agrees_with_torch(scale):
    image, label = noise(31, 44)
    size = (round(31 * scale), round(44 * scale))
    pixels, classes = augmented(size, image, label, replace(PLAIN, scale=scale))
    wanted = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]
    assert (pixels - wanted).abs().max() <= 0.51
    nearest = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0]
    # torch's positions are float32: on the very border of two pixels they may go to either.
    assert (classes == nearest).float().mean() > 0.99


@pytest.mark.parametrize("scale", [0.6, 1.4, 1.9])
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_aligned(scale, axis):
    """An edge in the image lies where the label changes, to the pixel."""
    label = torch.zeros(32, 32, dtype=torch.uint8)
    label.narrow(axis, 13, 19).fill_(1)
    image = (255 * label).expand(3, -1, -1)
    side = round(32 * scale)
    pixels, classes = augmented((side, side), image, label, replace(PLAIN, scale=scale))
    clear = (pixels[0].int() - 127).abs() > 2
    assert torch.equal((pixels[0] > 127)[clear], classes.bool()[clear])
    assert clear.float().mean() > 0.95


def test_void_stays_void():
    image, label = noise(20, 20)
    label[:] = 255
    _, classes = augmented((30, 30), image, label, replace(PLAIN, scale=1.3))
    assert (classes == 255).all()


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
places = st.floats(0, 1, exclude_max=True)
draws = st.builds(
    Draw,
    scale=st.floats(0.25, 3),
    top=places,
    left=places,
    flip=st.booleans(),
    brightness=st.none() | st.floats(-32 / 255, 32 / 255),
    contrast=st.none() | st.floats(0.5, 1.5),
    saturation=st.none(),
    hue=st.none() | st.floats(-0.1, 0.1),
    contrast_last=st.booleans(),
)


@same_every_time
@given(st.lists(st.tuples(sizes, draws), min_size=1, max_size=6), sizes, st.booleans())
def test_batch_of_images_of_any_sizes_equals_one_by_one(content, crop, photometric):
    """Bit for bit, but for the rounding of a turned hue."""
    if not photometric:
        plain = {"brightness": None, "contrast": None, "hue": None}
        content = [(size, replace(draw, **plain)) for size, draw in content]
    samples = [noise(*size, seed=seed) for seed, (size, _) in enumerate(content)]
    augmentation = Augmentation(crop, photometric=photometric)
    batch = augmentation.gather(samples, [draw for _, draw in content])
    images, labels = augmentation.apply(batch)

    assert images.dtype == labels.dtype == torch.uint8
    assert images.is_contiguous()
    assert images.shape == (len(content), 3, *crop)
    for number, ((_, draw), sample) in enumerate(zip(content, samples, strict=True)):
        pixels, classes = augment_oracle.apply(crop, *sample, draw)
        assert torch.equal(labels[number], classes)
        difference = (images[number].int() - pixels.int()).abs()
        if draw.hue is None:
            assert difference.max() == 0
        else:
            assert difference.max() <= 1
            assert difference.sum() <= 2 + 0.01 * difference.numel()


@pytest.mark.parametrize(
    ("scale", "rows", "columns"),
    [(2.0, 52, 102), (1.0, 101, 201), (0.5, 201, 400), (0.25, 300, 400)],
)
def test_only_what_the_crop_touches_is_moved(scale, rows, columns):
    image, label = noise(300, 400)
    draw = replace(PLAIN, scale=scale, top=0.5, left=0.5)
    moved = Augmentation((100, 200)).gather([(image, label)], [draw]).planes
    assert moved.shape[0] == 4
    assert moved.shape[1] <= rows * columns


# Augmentation: colour


def distorted(pixel, draw):
    """PhotoMetricDistortion of an RGB pixel in 0 to 1, without its rounding in between."""
    rgb = np.array(pixel)
    if draw.brightness is not None:
        rgb = (rgb + draw.brightness).clip(0, 1)
    if draw.contrast is not None and not draw.contrast_last:
        rgb = (rgb * draw.contrast).clip(0, 1)
    hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
    if draw.saturation is not None:
        saturation = min(1, saturation * draw.saturation)
    if draw.hue is not None:
        hue = (hue + draw.hue) % 1
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    if draw.contrast is not None and draw.contrast_last:
        rgb = (rgb * draw.contrast).clip(0, 1)
    return rgb


@pytest.mark.parametrize(
    "changes",
    [
        {"brightness": -0.12},
        {"contrast": 1.5},
        {"saturation": 1.5},
        {"saturation": 0.5},
        {"hue": 0.1},
        {"hue": -0.1},
        {"brightness": 0.1, "contrast": 1.4, "saturation": 1.3, "hue": 0.07},
        {"brightness": 0.1, "contrast": 0.6, "saturation": 1.3, "hue": 0.07, "contrast_last": True},
    ],
)
def test_colours_pixel_by_pixel(changes):
    image, label = noise(12, 12)
    image[:, 0] = image[:1, 0]  # greys, which have no hue
    image[:, 1, 0], image[:, 1, 1] = 0, 255
    image[1, 2] = image[0, 2]  # two channels at the value
    draw = replace(PLAIN, **changes)
    pixels, classes = augmented((12, 12), image, label, draw)
    assert torch.equal(classes, label)
    for got, source in zip(pixels.flatten(1).T, image.flatten(1).T, strict=True):
        wanted = 255 * distorted(source.numpy() / 255, draw)
        assert np.abs(got.numpy() - wanted).max() <= 0.51


def test_colours_of_a_batch_are_each_images_own():
    """What one image draws leaves the others as they are, to the bit."""
    samples = [noise(9, 11, seed=seed) for seed in range(5)]
    full = replace(PLAIN, brightness=0.1, contrast=0.7, saturation=1.4, hue=0.09)
    drawn = [full, PLAIN, replace(full, contrast_last=True), replace(PLAIN, hue=-0.1), PLAIN]
    augmentation = Augmentation((9, 11))
    images, _ = augmentation.apply(augmentation.gather(samples, drawn))
    for image, sample, draw in zip(images, samples, drawn, strict=True):
        assert torch.equal(image, augmented((9, 11), *sample, draw)[0])
    assert torch.equal(images[1], samples[1][0])
    assert torch.equal(images[4], samples[4][0])


def test_ranges_of_the_draws():
    """Those of PhotoMetricDistortion: 32 of 255, a half to one and a half, 18 of 180 degrees of
    OpenCV's hue circle, each half of the time."""
    augmentation = Augmentation((8, 8), scale=(0.5, 2.0))
    draws = [augmentation.draw(0, batch, slot) for batch in range(250) for slot in range(8)]
    ranges = {
        "brightness": (-32 / 255, 32 / 255),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-18 / 180, 18 / 180),
    }
    for name, (low, high) in ranges.items():
        values = np.array([v for d in draws if (v := getattr(d, name)) is not None])
        assert 0.45 < len(values) / len(draws) < 0.55
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    scales = np.array([d.scale for d in draws])
    assert 0.5 <= scales.min() < 0.51
    assert 1.99 < scales.max() <= 2
    for name in ("flip", "contrast_last"):
        assert 0.45 < np.mean([getattr(d, name) for d in draws]) < 0.55
    # Independent of each other, of the place and of the scale.
    table = np.array(
        [[d.scale, d.top, d.left, d.flip, d.hue is None, d.contrast is None] for d in draws], float
    )
    assert np.abs(np.corrcoef(table.T) - np.eye(6)).max() < 0.09


def test_scales_in_steps():
    """CIRKD's: 0.5, 0.6, ..., 2.0, all as likely."""
    augmentation = Augmentation((8, 8), scale=(0.5, 2.0), scale_step=0.1)
    drawn = [augmentation.draw(0, batch, 0).scale for batch in range(3200)]
    scales, counts = np.unique(np.round(drawn, 9), return_counts=True)
    assert scales == pytest.approx(0.5 + 0.1 * np.arange(16))
    assert np.abs(counts - 200).max() < 60


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [
        ((512, 683), (512, 2048), (512, 683)),
        ((375, 500), (512, 2048), (512, 683)),  # 1.365 times: the shorter side decides
        ((200, 1000), (512, 2048), (410, 2048)),  # the longer one
        ((500, 375), (2048, 512), (683, 512)),  # whichever way round
        ((375, 500), (520, 520), (390, 520)),
        ((375, 500), None, (375, 500)),
    ],
)
def test_images_are_resized_to_fit(size, fit, expected):
    assert fitted_size(size, fit) == expected


def test_fit_comes_before_the_scale():
    image, label = noise(30, 40)
    plain, fitted = Augmentation((24, 24)), Augmentation((24, 24), fit=(60, 400))
    twice, once = replace(PLAIN, scale=1.5), replace(PLAIN, scale=0.75)
    assert equal(
        plain.apply(plain.gather([(image, label)], [twice])),
        fitted.apply(fitted.gather([(image, label)], [once])),
    )


class TestOneClass:
    """Left half class 0, right half 1 with a column of void; crops of 8x8 from 16x40."""

    label = torch.cat([torch.zeros(16, 20), torch.ones(16, 20)], 1).byte()
    label[:, 25] = 255
    image = label.expand(3, -1, -1)

    def columns(self, *places, share=0.75):
        """Return the classes that the crop has in its first row."""
        draw = replace(PLAIN, left=places[0], retries=tuple((0.0, place) for place in places[1:]))
        augmentation = Augmentation((8, 8), max_class_share=share, photometric=False)
        _, labels = augmentation.apply(augmentation.gather([(self.image, self.label)], [draw]))
        return labels[0, 0].tolist()

    def test_first_crop_that_is_mixed_is_taken(self):
        assert self.columns(0.0, 1.0, 0.5, 0.25) == [0] * 4 + [1] * 4

    def test_mixed_at_once(self):
        assert self.columns(0.5, 0.0) == [0] * 4 + [1] * 4

    def test_last_one_where_none_is(self):
        assert self.columns(0.0, 0.1, 1.0) == [1] * 8

    def test_void_does_not_count(self):
        """Columns 19 to 26: one of class 0, six of class 1, one void: 6 of 7."""
        assert self.columns(19 / 32, 0.0, share=0.85) == [0] * 8
        assert self.columns(19 / 32, 0.0, share=0.86) == [0, 1, 1, 1, 1, 1, 255, 1]

    def test_retries_are_drawn_on_request_and_change_nothing_else(self):
        plain = Augmentation((8, 8)).draw(3, 5, 1)
        redrawn = Augmentation((8, 8), max_class_share=0.75).draw(3, 5, 1)
        assert plain.retries == ()
        assert len(set(redrawn.retries)) == 10
        assert replace(redrawn, retries=()) == plain


def test_no_colour_and_no_flip_on_request():
    augmentation = Augmentation((8, 8), flip=0.0, photometric=False)
    for slot in range(50):
        draw = augmentation.draw(0, 0, slot)
        assert not draw.flip
        assert draw.brightness is draw.contrast is draw.saturation is draw.hue is None
