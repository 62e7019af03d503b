"""The equations of af_dcd and reviewkd written out, position by position.

The methods are tested and timed against these: float64, in loops, with the method's own
extras. ``ORACLES[name](student, teacher, labels, method)`` returns the method's terms. The random
draws are torch's own, so the seed decides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


def places(height: int, width: int) -> Iterator[tuple[int, int]]:
    for y in range(height):
        for x in range(width):
            yield y, x


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Return the map on the grid of the other, by kdprof's rule: no paper states one."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def convolved(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """Return a convolution of stride 1 that keeps the size, of one (C, h, w) map."""
    weight = layer.weight.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    height, width = maps.shape[1:]
    reach = weight.shape[2] // 2
    columns = []
    for y, x in places(height, width):
        value = torch.zeros(len(weight), dtype=torch.float64) + bias
        for dy, dx in places(weight.shape[2], weight.shape[3]):
            row, column = y + dy - reach, x + dx - reach
            if 0 <= row < height and 0 <= column < width:
                value = value + weight[:, :, dy, dx] @ maps[:, row, column]
        columns.append(value)
    return torch.stack(columns, 1).view(-1, height, width)


# Augmentation-free dense contrastive distillation.


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total, count = 0.0, 0
    for ours, theirs in zip(student, teacher, strict=True):
        for y, x in places(*theirs.shape[1:]):
            log_p = F.log_softmax(theirs[:, y, x] / temperature, 0)
            log_q = F.log_softmax(ours[:, y, x] / temperature, 0)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
            count += 1
    return temperature**2 * total / count


def kept(draws: Tensor | None, y: int, x: int, height: int, width: int, method: Method) -> float:
    """Return the mask at a position; without draws it is the fixed one."""
    if draws is not None:
        return 0.0 if draws[y, x] > 1 - method.mask_ratio else 1.0
    inside = height // 3 <= y < 2 * height // 3 and width // 3 <= x < 2 * width // 3
    return 0.0 if inside else 1.0


def rebuilt(ours: Tensor, mask: Tensor, method: Method) -> Tensor:
    """Return g of one aligned (C, h, w) map."""
    p, masked = method.projector, ours * mask
    if method.name == "af_dcd":
        return convolved(p[2], convolved(p[0], masked).clamp(min=0))
    a = convolved(p.first, masked).clamp(min=0)
    b = convolved(p.second, a).clamp(min=0)
    return (convolved(p.of_first, a) + convolved(p.of_second, b)) / 2


def pooled_by_maximum(maps: Tensor, size: int) -> Tensor:
    """Return the maximum of every whole window; a window is no larger than the map."""
    if size == 0:
        return maps
    tall, wide = min(size, maps.shape[1]), min(size, maps.shape[2])
    rows = []
    for y in range(maps.shape[1] // tall):
        row = []
        for x in range(maps.shape[2] // wide):
            cell = maps[:, y * tall : (y + 1) * tall, x * wide : (x + 1) * wide]
            row.append(cell.flatten(1).max(1).values)
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def contrast(ours: Tensor, theirs: Tensor, method: Method) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of one image and the positions that took part."""
    if method.crop:
        ours, theirs = (m[:, : method.crop, : method.crop] for m in (ours, theirs))
    channels, height, width = theirs.shape
    depth = channels // method.groups
    tall, wide = min(method.patch_height, height), min(method.patch_width, width)
    total, count = 0.0, 0
    for top in range(0, height - tall + 1, tall):
        for left in range(0, width - wide + 1, wide):
            at = [(top + y, left + x) for y, x in places(tall, wide)]
            count += len(at)
            for y, x in at:
                for g in range(method.groups):
                    anchor = ours[g * depth : (g + 1) * depth, y, x]
                    similar = [-(anchor - theirs[g * depth : (g + 1) * depth, y, x]).abs().sum()]
                    for j, i in at:
                        for other in range(method.groups):
                            if other != g:
                                key = theirs[other * depth : (other + 1) * depth, j, i]
                                similar.append(-(anchor - key).abs().sum())
                    scaled = torch.stack(similar) / method.contrast_temperature
                    total = total - F.log_softmax(scaled, 0)[0]
    return total, count


def af_dcd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    theirs = teacher.c5.double()
    images, _, height, width = theirs.shape
    draws = torch.rand(images, 1, height, width) if method.mask == "random" else None
    fd, ctr, positions = 0.0, 0.0, 0
    for n in range(images):
        ours = resized(convolved(method.align, student.c5[n].double())[None], theirs)[0]
        mask = torch.ones(height, width, dtype=torch.float64)
        for y, x in places(height, width):
            mask[y, x] = kept(None if draws is None else draws[n, 0], y, x, height, width, method)
        made = rebuilt(ours, mask, method)
        for y, x in places(height, width):
            fd = fd + ((made[:, y, x] - theirs[n, :, y, x]) ** 2).sum()
        pair = (pooled_by_maximum(maps, method.pool) for maps in (made, theirs[n]))
        value, count = contrast(*pair, method)
        ctr, positions = ctr + value, positions + count
    logits = teacher.logits.double()
    kd = pixel_kl(resized(student.logits.double(), logits), logits, method.temperature)
    return {"fd": fd / images, "ctr": ctr / positions, "kd": kd}


# Knowledge review.


def normed(layer: nn.BatchNorm2d, maps: Tensor) -> Tensor:
    """Return batch norm in training, of (N, C, h, w)."""
    made = []
    for c in range(maps.shape[1]):
        values = maps[:, c]
        mean = values.sum() / values.numel()
        variance = ((values - mean) ** 2).sum() / values.numel()
        scaled = (values - mean) / (variance + layer.eps).sqrt()
        made.append(scaled * layer.weight[c].double() + layer.bias[c].double())
    return torch.stack(made, 1)


def convolved_batch(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    return torch.stack([convolved(layer, image) for image in maps])


def enlarged(maps: Tensor, height: int, width: int) -> Tensor:
    """Return the map on another grid by nearest: source position floor(y h / H)."""
    rows = []
    for y in range(height):
        row = [
            maps[:, :, y * maps.shape[2] // height, x * maps.shape[3] // width]
            for x in range(width)
        ]
        rows.append(torch.stack(row, 2))
    return torch.stack(rows, 2)


def cell_averages(maps: Tensor, cells: int) -> Tensor:
    """Return adaptive average pooling to cells x cells; cells may overlap."""
    height, width = maps.shape[2:]
    means = []
    for y, x in places(cells, cells):
        top, left = y * height // cells, x * width // cells
        end, right = math.ceil((y + 1) * height / cells), math.ceil((x + 1) * width / cells)
        means.append(maps[:, :, top:end, left:right].mean((2, 3)))
    return torch.stack(means, 2)


def mse(ours: Tensor, theirs: Tensor) -> Tensor:
    return ((ours - theirs) ** 2).sum() / theirs.numel()


def hcl(ours: Tensor, theirs: Tensor) -> Tensor:
    loss = mse(ours, theirs)
    for cells, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        loss = loss + weight * mse(cell_averages(ours, cells), cell_averages(theirs, cells))
    return loss / 1.875


def reviewkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    total, previous = 0.0, None
    for tap in ("c5", "c4", "c3", "c2"):
        block, theirs = method.fusions[tap], getattr(teacher, tap).double()
        x = convolved_batch(block.reduce[0], getattr(student, tap).double())
        x = normed(block.reduce[1], x)
        if previous is not None:
            residual = enlarged(previous, *x.shape[2:])
            both = convolved_batch(block.attend, torch.cat((x, residual), 1))
            ours, deeper = 1 / (1 + (-both).exp()[:, :1]), 1 / (1 + (-both).exp()[:, 1:])
            x = ours * x + deeper * residual
        previous = x
        made = normed(block.restore[1], convolved_batch(block.restore[0], x))
        total = total + hcl(resized(made, theirs), theirs)
    return {"reviewkd": total}


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "af_dcd": af_dcd,
    "af_dcd:enhanced": af_dcd,
    "reviewkd": reviewkd,
    "reviewkd:imagenet": reviewkd,
}
