"""Data sets, augmentation and batches."""

import colorsys
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import augment_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdprof.data import Augmentation, Batches, Feeder, evaluation_batches, fitted_size, open_data
from kdprof.data import feeder as feeder_module
from kdprof.data.augment import Draw, Gathered
from kdprof.data.batches import _next
from kdprof.data.camvid import CamVid
from kdprof.data.decoded import Decoded
from kdprof.data.streams import Stream, generator
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import KdprofError, UserError
from kdprof.progress import Progress

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


def noise(height, width, classes=11, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    label = rng.integers(0, classes, (height, width), dtype=np.uint8)
    return torch.from_numpy(image), torch.from_numpy(label)


def augmented(crop, image, label, draw):
    """Return a batch of one, as its only image and label."""
    augmentation = Augmentation(crop)
    images, labels = augmentation.apply(augmentation.gather([(image, label)], [draw]))
    assert len(images) == len(labels) == 1
    return images[0], labels[0]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


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


@same_every_time
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 1000))
def test_draws_are_functions_of_their_address(seed, batch, slot):
    augmentation = Augmentation((8, 8))
    first = augmentation.draw(seed, batch, slot)
    others = [(seed + 1, batch, slot), (seed, batch + 1, slot), (seed, batch, slot + 1)]
    assert all(augmentation.draw(*other) != first for other in others)
    assert augmentation.draw(seed, batch, slot) == first


def test_streams_are_apart():
    """Among them the addresses that numpy's zero padding would make one."""
    addresses = [(stream, *tail) for stream in Stream for tail in [(1, 2), (2, 1), (3, 4)]]
    addresses += [(Stream.AUGMENTATION, 1, 2, 3), (Stream.AUGMENTATION, 1, 3, 2)]
    drawn = [generator(*address).random() for address in addresses]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [generator(*address).random() for address in addresses]


# Batches


class Numbered:
    """Image i is filled with i."""

    name, split, num_classes = "numbered", "train", 3
    class_names, palette = ("a", "b", "c"), ((0, 0, 0),) * 3

    def __init__(self, sizes, unusable=()):
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


@same_every_time
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 100))
def test_every_epoch_holds_each_sample_once(count, batch, seed):
    """Also where a batch holds more than one epoch."""
    batches = numbered_batches(count, batch, seed=seed)
    epochs = 3
    needed = -(-epochs * count // batch)
    visited = [int(image[0, 0, 0]) for i in range(needed) for image in batches.batch(i)[0]]
    for epoch in range(epochs):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(numbered_batches(20, 1, seed=seed).sample_index(20 * epoch + i) for i in range(20))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_batch_depends_on_nothing_but_its_index():
    in_order, mixed = scene_batches(0), scene_batches(0)
    wanted = [in_order.batch(i) for i in range(6)]
    np.random.seed(7)
    torch.manual_seed(7)
    for i in (5, 0, 3, 3, 4, 1, 2):
        assert equal(mixed.batch(i), wanted[i])
    assert not equal(scene_batches(0, seed=1).batch(0), wanted[0])


def test_images_and_labels_of_a_batch():
    images, labels = scene_batches(0).batch(0)
    assert images.shape == (3, 3, 20, 28)
    assert labels.shape == (3, 20, 28)
    assert images.dtype == labels.dtype == torch.uint8


def test_loader_processes_change_nothing():
    """Bit for bit, from any start, and torch's global generator is left alone."""
    wanted = [scene_batches(0).batch(i) for i in range(2, 9)]
    for workers in (0, 2):
        before = torch.get_rng_state()
        batches = list(fed(scene_batches(workers), 2, 9))
        assert torch.equal(torch.get_rng_state(), before)
        assert len(batches) == 7
        assert all(equal(b, w) for b, w in zip(batches, wanted, strict=True))
    assert multiprocessing.active_children() == []


def test_feeder_tells_how_long_was_waited():
    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    batches = numbered_batches(8, 2)
    batches.data = Slow(batches.data.sizes)
    feeder = fed(batches, 0, 4)
    assert feeder.waited_s == 0
    began = time.perf_counter()
    list(feeder)
    assert 8 * 0.02 <= feeder.waited_s <= time.perf_counter() - began
    feeder.forget_waits()
    time.sleep(0.02)  # is no wait
    assert feeder.waited_s == 0


class FakeEvent:
    """An event that happens at once, at the next second of a clock, unless ``behind``."""

    seconds = 0.0
    behind = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.seconds += 1
        self.at = FakeEvent.seconds

    def query(self):
        return not FakeEvent.behind

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_on_a_gpu_one_batch_is_made_ahead_and_only_its_own_is_waited_for(monkeypatch):
    """The order of the calls to CUDA, on a stand-in for it."""
    told, made = [], Batches.gathered

    class Stream:
        def record_event(self):
            told.append("record")
            return len(told)

        def wait_event(self, event):
            told.append(f"wait for {event}")

    def gathered(self, index):
        told.append(f"make {index}")
        return made(self, index)

    monkeypatch.setattr(feeder_module, "_side_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Gathered, "to", lambda batch, device: batch)
    monkeypatch.setattr(Batches, "gathered", gathered)
    feeder = Feeder(scene_batches(0), torch.device("cuda"), 0, 3)
    assert told == []
    got = [next(feeder)]
    assert told == ["make 0", "record", "make 1", "wait for 2"]
    monkeypatch.setattr(FakeEvent, "behind", True)
    got.append(next(feeder))
    assert told[4:] == ["record", "make 2", "wait for 5"]
    assert feeder.waited_s == 1  # the device has not come to the second one
    monkeypatch.setattr(FakeEvent, "behind", False)
    assert feeder.waited_s == 2
    got += feeder
    assert [m for m in told if m.startswith("make")] == ["make 0", "make 1", "make 2"]
    assert all(equal(g, scene_batches(0).batch(i)) for i, g in enumerate(got))
    assert len(got) == 3
    feeder.forget_waits()
    assert feeder.waited_s == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_feeder_of_a_gpu_gives_what_a_cpu_gives(workers):
    """But for rounding, and without waiting for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [scene_batches(0).batch(i) for i in range(12)]
    feeder = Feeder(scene_batches(workers), device, 0, 12)
    got = [next(feeder)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in feeder:
            # Keeps the step's stream busy, and the batch's memory in use, while more are made.
            torch.cuda._sleep(2_000_000)
            got.append(tuple(t.clone() for t in batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len(got) == 12
    for (images, labels), (on_cpu, classes) in zip(got, wanted, strict=True):
        assert images.device == labels.device == device
        assert torch.equal(labels.cpu(), classes)
        difference = (images.cpu().int() - on_cpu.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slow_s", [0.0, 0.05])
def test_waits_of_a_gpu_are_its_own(slow_s):
    """A loader slower than the step is waited for; one that is hidden behind it is not."""

    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(slow_s)
            return super().__getitem__(index)

    batches = numbered_batches(8, 1)
    batches.data = Slow(batches.data.sizes)
    feeder = Feeder(batches, torch.device("cuda", torch.cuda.current_device()), 0, 14)
    for _ in range(4):
        next(feeder)
    torch.cuda.synchronize()
    feeder.forget_waits()
    for _ in feeder:
        torch.cuda._sleep(40_000_000)  # some 20 ms
    torch.cuda.synchronize()
    if slow_s:
        assert feeder.waited_s > 9 * 0.01
    else:
        assert feeder.waited_s < 0.02


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_iterate(workers):
    assert list(fed(scene_batches(workers), 4, 4)) == []


def test_closing_midway_ends_the_processes():
    batches = fed(scene_batches(2), 0, 1000)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_loader_processes_outlive_the_signals_of_the_job():
    """Slurm and Ctrl-C signal the whole group; the main process decides."""
    wanted = [scene_batches(0).batch(i) for i in range(12)]
    batches = fed(scene_batches(2), 0, 12)
    got = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    got += batches
    assert all(equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_file_is_one_line_from_any_process(workers):
    batches = numbered_batches(8, 2, workers=workers, unusable={5})
    with pytest.raises(UserError) as caught:
        list(fed(batches, 0, 4))
    assert str(caught.value) == "image 5 cannot be read; replace it"
    assert caught.value.problems == (str(caught.value),)
    # While the error, and with it the iterator's frame, is still held.
    assert multiprocessing.active_children() == []


class Broken(Numbered):
    def __getitem__(self, index):
        raise ValueError("a fault of the program")


def test_fault_in_a_loader_process_ends_them_all():
    batches = numbered_batches(8, 2, workers=2)
    batches.data = Broken(batches.data.sizes)
    with pytest.raises(ValueError, match="a fault of the program"):
        list(batches.iterate(0, 4))
    assert multiprocessing.active_children() == []


LEFT_OPEN = """
from kdprof.data import Augmentation, Batches
from kdprof.data.synthetic import SyntheticScenes
data = SyntheticScenes("train", (24, 32), 8)
batches = Batches(data, seed=0, batch=2, augmentation=Augmentation((16, 16)), workers=2)
held = batches.iterate(0, 1000)
next(held)
print("leaving")
"""


def test_iterator_left_open_does_not_keep_python_from_exiting():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_dead_loader_process_is_one_line_with_the_mend(error):
    with pytest.raises(KdprofError, match=r"^a loader process died.*workers lower$"):
        _next([raising(error)])


def test_other_failures_are_not_taken_for_a_dead_process():
    with pytest.raises(RuntimeError, match="out of memory"):
        _next([raising(RuntimeError("CUDA out of memory"))])


def raising(error):
    raise error
    yield


# Evaluation


def test_evaluation_shows_every_image_once_in_order():
    sizes = [(4, 6)] * 3 + [(6, 4)] * 2 + [(4, 6)]
    batches = list(evaluation_batches(Numbered(sizes), 2))
    assert [len(images) for images, _ in batches] == [2, 1, 2, 1]
    seen = [(int(i[0, 0, 0]), tuple(i.shape[1:])) for images, _ in batches for i in images]
    assert seen == list(enumerate(sizes))
    assert all(images.shape[-2:] == labels.shape[-2:] for images, labels in batches)


def test_decoded_is_the_data_it_was_made_from():
    data = Numbered([(4, 6), (6, 4)])
    decoded = Decoded(data, Progress(None))
    assert len(decoded) == 2
    assert all(equal(decoded[i], data[i]) for i in range(2))
    for name in ("name", "split", "num_classes", "class_names", "palette"):
        assert getattr(decoded, name) == getattr(data, name)


def test_decoding_tells_all_unusable_files():
    with pytest.raises(UserError) as caught:
        Decoded(Numbered([(4, 6)] * 5, unusable={1, 3}), Progress(None))
    assert caught.value.problems == tuple(f"image {i} cannot be read; replace it" for i in (1, 3))


# Synthetic scenes


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


# CamVid


def png(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)


def picture(height=12, width=16):
    return noise(height, width)[0].permute(1, 2, 0).numpy()


def indices(height=12, width=16):
    return noise(height, width, classes=12)[1].numpy()


@pytest.fixture
def camvid(tmp_path):
    """A good tree of three pairs."""
    root = tmp_path / "camvid"
    for stem in ("c", "a", "b"):
        png(root / "train" / f"{stem}.png", picture())
        png(root / "trainannot" / f"{stem}.png", indices())
    return root


def problems(root, split="train", read=False):
    """Return what opening, or reading too, complains about; each in one line."""
    use = (lambda data: Decoded(data, Progress(None))) if read else len
    with pytest.raises(UserError) as caught:
        use(CamVid(root, split))
    assert all("\n" not in p and "Traceback" not in p for p in caught.value.problems)
    return caught.value.problems


def test_labels_and_sizes_need_no_image(camvid):
    scenes = SyntheticScenes("val", (20, 28), 3)
    for data in (CamVid(camvid, "train"), scenes):
        for index in range(3):
            assert torch.equal(data.label(index), data[index][1])
            assert data.size(index) == tuple(data.label(index).shape)
    data = CamVid(camvid, "train")
    for path, _ in data.pairs:
        path.write_bytes(path.read_bytes()[:60])  # the header is left
    assert data.size(1) == tuple(data.label(1).shape) == (12, 16)


def test_good_tree(camvid):
    data = CamVid(camvid, "train")
    assert [image.stem for image, _ in data.pairs] == ["a", "b", "c"]
    image, label = data[0]
    assert torch.equal(image, noise(12, 16)[0])
    wanted = torch.from_numpy(indices())
    assert torch.equal(label, wanted.masked_fill(wanted == 11, 255))
    assert (label == 255).any()
    assert data.num_classes == len(data.class_names) == len(data.palette) == 11


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_images_of_other_kinds_become_rgb(camvid, mode):
    png(camvid / "train/a.png", picture(), mode)
    image, _ = CamVid(camvid, "train")[0]
    assert image.shape == (3, 12, 16)
    if mode == "RGBA":
        assert torch.equal(image, noise(12, 16)[0])
    if mode.startswith("L"):
        assert torch.equal(image[0], image[1])
    assert 100 < image.float().mean() < 160


def test_jpeg_and_capital_suffixes(camvid):
    (camvid / "train/a.png").unlink()
    Image.fromarray(picture()).save(camvid / "train/a.JPG", "JPEG")
    (camvid / "train/Thumbs.db").write_bytes(b"not an image, and nobody's business")
    assert len(CamVid(camvid, "train")) == 3
    assert CamVid(camvid, "train")[0][0].shape == (3, 12, 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_palette_labels_are_read_as_indices(camvid, bits):
    labels = Image.fromarray(indices())
    labels.putpalette([value for colour in CamVid.palette for value in colour] + [0, 0, 0])
    labels.save(camvid / "trainannot/b.png", bits=bits)
    data = CamVid(camvid, "train")
    assert torch.equal(data[0][1], data[1][1])


def test_label_without_image_and_image_without_label(camvid):
    (camvid / "train/a.png").unlink()
    (camvid / "trainannot/b.png").unlink()
    first, second = problems(camvid)
    assert "b.png has no label" in first
    assert "a.png has no image" in second


def test_pair_of_two_sizes(camvid):
    png(camvid / "trainannot/b.png", indices(10, 16))
    (problem,) = problems(camvid)
    assert "12x16" in problem
    assert "10x16" in problem


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_labels_that_are_no_indices(camvid, mode):
    values = indices().astype(np.uint16) if mode == "I;16" else indices()
    png(camvid / "trainannot/b.png", values, None if mode == "I;16" else mode)
    (problem,) = problems(camvid)
    assert f"b.png is {mode}, not 8-bit class indices" in problem


def test_deep_images_are_refused_not_cut_to_white(camvid):
    deep = np.linspace(0, 65535, 12 * 16).reshape(12, 16).astype(np.uint16)
    png(camvid / "train/b.png", deep)
    (problem,) = problems(camvid)
    assert "b.png is I;16, not 8 bits" in problem


@pytest.mark.parametrize("value", [12, 255])
def test_label_value_out_of_range(camvid, value):
    labels = indices()
    labels[3, 4] = value
    png(camvid / "trainannot/b.png", labels)
    (problem,) = problems(camvid, read=True)
    assert f"label value {value} in" in problem
    assert "b.png" in problem


@pytest.mark.parametrize("name", ["train/b.png", "trainannot/b.png", "train/b.jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.7])
def test_truncated_file(camvid, name, keep):
    path = camvid / name
    if path.suffix == ".jpg":
        path.with_suffix(".png").unlink()
        Image.fromarray(picture()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    (problem,) = problems(camvid, read=True)
    assert f"{path} cannot be read" in problem


def test_damaged_and_foreign_content(camvid):
    path = camvid / "train/a.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    (camvid / "train/b.png").write_text("<html>404</html>")
    (problem,) = problems(camvid)
    assert "b.png cannot be read" in problem
    png(camvid / "train/b.png", picture())
    (problem,) = problems(camvid, read=True)
    assert "a.png cannot be read" in problem


def test_truncated_file_in_a_loader_process(camvid):
    path = camvid / "train/b.png"
    path.write_bytes(path.read_bytes()[:200])
    batches = Batches(
        CamVid(camvid, "train"), seed=0, batch=2, augmentation=Augmentation((8, 8)), workers=2
    )
    with pytest.raises(UserError) as caught:
        list(batches.iterate(0, 6))
    assert str(caught.value).startswith(f"{path} cannot be read")
    assert "\n" not in str(caught.value)


def test_one_name_twice(camvid):
    Image.fromarray(picture()).save(camvid / "train/a.jpg")
    (problem,) = problems(camvid)
    assert "a.jpg" in problem
    assert "a.png" in problem


def test_all_problems_at_once(camvid):
    png(camvid / "train/d.png", picture())
    png(camvid / "trainannot/a.png", picture())
    (camvid / "train/b.png").write_bytes(b"")
    png(camvid / "trainannot/c.png", indices(6, 6))
    assert len(problems(camvid)) == 4


def test_empty_and_missing_folders(camvid):
    for path in camvid.glob("train/*"):
        path.unlink()
    (camvid / "trainannot").rename(camvid / "trainanot")
    empty, missing = problems(camvid)
    assert "holds no .png" in empty
    assert "did you mean 'trainanot'?" in missing
    assert len(problems(camvid, "val")) == 2


def test_missing_root_suggests_the_nearest(camvid, tmp_path, monkeypatch):
    (problem,) = problems(tmp_path / "camvod")
    assert f"did you mean '{tmp_path / 'camvid'}'?" in problem
    (problem,) = problems(tmp_path / "camvod" / "deeper")
    assert f"did you mean '{tmp_path / 'camvid'}'?" in problem
    (problem,) = problems(tmp_path / "nothing-like-it")
    assert "did you mean" not in problem
    (problem,) = problems(camvid / "train/a.png")
    assert "no folder" in problem


def test_the_real_camvid(repo):
    root = repo.parent / "shared" / "camvid"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    train, val = CamVid(root, "train"), CamVid(root, "val")
    assert (len(train), len(val)) == (367, 101)
    seen = torch.zeros(256, dtype=torch.int64)
    for index in range(0, 360, 60):
        image, label = train[index]
        assert image.shape == (3, 360, 480)
        seen += torch.bincount(label.flatten(), minlength=256)
        assert image.float().std() > 20
    assert set(seen.nonzero().flatten().tolist()) <= {*range(11), 255}
    assert (seen[:11] > 0).sum() >= 10
    assert train.class_names[int(seen[:11].argmax())] in {"sky", "road", "building", "tree"}
    _, label = val[0]
    assert (label[-60:] == train.class_names.index("road")).float().mean() > 0.3


# Opening by name


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
