"""Scale, crop, flip and colour of one image, step by step: what kdprof's batched augmentation must
equal. Saturation is not here: tests/test_data.py holds it to colorsys."""

import torch
from torchvision.transforms.v2 import functional as colour

from kdprof.method import IGNORE

FILL = 0.5


def apply(crop, image, label, draw):
    """Return the augmented (image, label), uint8, of the crop's size."""
    assert draw.saturation is None
    height, width = label.shape
    rows = positions(height, crop[0], draw.scale, draw.top)
    columns = positions(width, crop[1], draw.scale, draw.left)
    if draw.flip:
        columns = columns.flip(0)
    outside = ~(inside(rows, height)[:, None] & inside(columns, width))
    classes = label[nearest(rows, height)][:, nearest(columns, width)]
    classes = classes.masked_fill(outside, IGNORE)
    pixels = interpolated(interpolated(image, 1, rows), 2, columns)
    pixels = distort(pixels.div_(255), draw).masked_fill_(outside, FILL)
    return pixels.mul_(255).round_().byte(), classes


def positions(length, crop, scale, place):
    resized = max(1, round(length * scale))
    start = round((resized - crop) * place)
    pixels = torch.arange(start, start + crop, dtype=torch.float64)
    return (pixels + 0.5) * (length / resized) - 0.5


def inside(where, length):
    return (where > -0.5) & (where < length - 0.5)


def nearest(where, length):
    return (where + 0.5).floor_().long().clamp_(0, length - 1)


def interpolated(values, axis, where):
    last = values.shape[axis] - 1
    lower = where.floor().long()
    weight = (where - lower).float().unflatten(0, (-1,) + (1,) * (2 - axis))
    low = values.index_select(axis, lower.clamp(0, last)).float()
    high = values.index_select(axis, (lower + 1).clamp_(0, last)).float()
    return low.lerp_(high, weight)


def distort(image, draw):
    if draw.brightness is not None:
        image = (image + draw.brightness).clamp_(0, 1)
    if draw.contrast is not None and not draw.contrast_last:
        image = (image * draw.contrast).clamp_(0, 1)
    if draw.hue is not None:
        image = colour.adjust_hue(image, draw.hue)
    if draw.contrast is not None and draw.contrast_last:
        image = (image * draw.contrast).clamp_(0, 1)
    return image
