"""The equations of mgd, maskd, bpkd and fakd:isda written out, position by position.

The methods are tested and timed against these: float64, in loops, with the method's own
extras and statistics, which stay unchanged. ``ORACLES[name](student, teacher, labels,
method)`` returns the method's terms; ``AUXILIARY`` those of its second optimiser. The random draws
are torch's own, so the seed decides them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import IGNORE, Method, Taps

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


def cwd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for ours, theirs in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        log_p = F.log_softmax(theirs.flatten() / temperature, 0)
        log_q = F.log_softmax(ours.flatten() / temperature, 0)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return temperature**2 * total / (teacher.shape[0] * teacher.shape[1])


# Masked generative distillation.


def convolved(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    """Return a convolution of stride 1 that keeps the size, of one (C, h, w) map."""
    weight, bias = layer.weight.double(), layer.bias.double()
    height, width = maps.shape[1:]
    reach = weight.shape[2] // 2
    columns = []
    for y, x in places(height, width):
        value = bias
        for dy, dx in places(weight.shape[2], weight.shape[3]):
            row, column = y + dy - reach, x + dx - reach
            if 0 <= row < height and 0 <= column < width:
                value = value + weight[:, :, dy, dx] @ maps[:, row, column]
        columns.append(value)
    return torch.stack(columns, 1).view(-1, height, width)


def mgd_feature(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    theirs, generator = teacher.c5.double(), method.generator
    images, _, height, width = theirs.shape
    draws, total = torch.rand(images, 1, height, width), 0.0
    for i in range(images):
        ours = student.c5[i].double()
        if not isinstance(generator.align, nn.Identity):
            ours = convolved(generator.align, ours)
        ours = resized(ours[None], theirs)[0]
        kept = torch.zeros(height, width, dtype=torch.float64)
        for y, x in places(height, width):
            kept[y, x] = 0.0 if draws[i, 0, y, x] > 1 - method.mask_ratio else 1.0
        hidden = convolved(generator.rebuild[0], ours * kept).clamp(min=0)
        rebuilt = convolved(generator.rebuild[2], hidden)
        for y, x in places(height, width):
            total = total + ((rebuilt[:, y, x] - theirs[i, :, y, x]) ** 2).sum()
    return {"mgd": total / images}


def mgd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    terms = mgd_feature(student, teacher, labels, method)
    theirs = teacher.logits.double()
    ours = resized(student.logits.double(), theirs)
    return {**terms, "cwd": cwd(ours, theirs, method.temperature)}


# Masked distillation with receptive tokens.


def token_masks(logits: Tensor, tokens: Tensor) -> list[list[Tensor]]:
    """Return the (h, w) mask of every image and token."""
    height, width = logits.shape[-2:]
    masks = []
    for image in logits:
        of_image = []
        for token in tokens:
            rows = [(token * image[:, y, x]).sum().sigmoid() for y, x in places(height, width)]
            of_image.append(torch.stack(rows).view(height, width))
        masks.append(of_image)
    return masks


def masked_distance(ours: Tensor, theirs: Tensor, masks: list[list[Tensor]]) -> Tensor:
    images, channels = theirs.shape[:2]
    values = []
    for n in range(images):
        for mask in masks[n]:
            for c in range(channels):
                gap = (mask * ours[n, c] - mask * theirs[n, c]) ** 2
                values.append(gap.sum() / (mask.sum() + 1e-5))
    return 0.5 * sum(values) / len(values)


def maskd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    theirs = teacher.logits.double()
    theirs_aux = resized(teacher.aux.double(), theirs)
    masks = token_masks(theirs, method.masks.tokens.detach().double())
    ours, ours_aux = (resized(z.double(), theirs) for z in (student.logits, student.aux))
    return {
        "maskd": masked_distance(ours, theirs, masks),
        "maskd_aux": masked_distance(ours_aux, theirs_aux, masks),
    }


def between(maps: Tensor, y: float, x: float) -> Tensor:
    """Return a (C, h, w) map at a place between its positions, by bilinear interpolation."""
    top, left = min(int(y), maps.shape[1] - 1), min(int(x), maps.shape[2] - 1)
    below, right = min(top + 1, maps.shape[1] - 1), min(left + 1, maps.shape[2] - 1)
    v, u = y - top, x - left
    upper = (1 - u) * maps[:, top, left] + u * maps[:, top, right]
    lower = (1 - u) * maps[:, below, left] + u * maps[:, below, right]
    return (1 - v) * upper + v * lower


def maskd_auxiliary(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    logits = teacher.logits.double()
    masks = token_masks(logits, method.masks.tokens.double())
    (height, width), (rows, columns) = labels.shape[-2:], logits.shape[-2:]
    scale_y = (rows - 1) / (height - 1) if height > 1 else 0.0
    scale_x = (columns - 1) / (width - 1) if width > 1 else 0.0
    losses, dices = [], []
    for n, of_image in enumerate(masks):
        masked = sum(logits[n] * mask for mask in of_image)
        for y, x in places(height, width):
            label = labels[n, y, x].item()
            if label != IGNORE:
                at = between(masked, y * scale_y, x * scale_x)
                losses.append(-F.log_softmax(at, 0)[label])
        for a, one in enumerate(of_image):
            for b, other in enumerate(of_image):
                if a != b:
                    square = (one**2).sum() + (other**2).sum() + 2e-12
                    dices.append(2 * (one * other).sum() / square)
    zero = 0.0 * method.masks.tokens.double().sum()
    return {
        "masked_task": sum(losses) / len(losses) if losses else zero,
        "overlap": sum(dices) / len(dices) if dices else zero,
    }


# Boundary privileged distillation.


def window(rows: list[list[int]], y: int, x: int, width: int) -> list[int]:
    """Return the values of a window, without those outside the image."""
    reach = width // 2
    return [
        rows[i][j]
        for i in range(max(0, y - reach), min(len(rows), y + reach + 1))
        for j in range(max(0, x - reach), min(len(rows[0]), x + reach + 1))
    ]


def pooled(rows: list[list[int]], height: int, width: int) -> Tensor:
    """Return the mean of every cell; cells that do not divide the image overlap by a pixel."""
    cells = torch.zeros(height, width, dtype=torch.float64)
    size_y, size_x = len(rows), len(rows[0])
    for y, x in places(height, width):
        inside = [
            rows[i][j]
            for i in range(y * size_y // height, math.ceil((y + 1) * size_y / height))
            for j in range(x * size_x // width, math.ceil((x + 1) * size_x / width))
        ]
        cells[y, x] = sum(inside) / len(inside)
    return cells


def edge_share(labels: Tensor, of_class: int, width: int, height: int, columns: int) -> Tensor:
    """Return the pooled edge of one class in one (H, W) label map."""
    members = [[int(label == of_class) for label in row] for row in labels.tolist()]
    edge = [[0] * len(members[0]) for _ in members]
    for y, x in places(len(members), len(members[0])):
        seen = window(members, y, x, width)
        edge[y][x] = max(seen) - min(seen)
    return pooled(edge, height, columns)


def bpkd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    theirs = teacher.logits.double()
    ours, t = resized(student.logits.double(), theirs), method.temperature
    images, classes, height, width = theirs.shape
    shares = torch.stack(
        [
            torch.stack(
                [edge_share(labels[n], k, method.edge_width, height, width) for k in range(classes)]
            )
            for n in range(images)
        ]
    )
    edge = 0.0
    for n in range(images):
        total = [0.0] * classes
        for y, x in places(height, width):
            mask = shares[n, :, y, x]
            log_p = F.log_softmax(mask * theirs[n, :, y, x] / t, 0)
            log_q = F.log_softmax(mask * ours[n, :, y, x] / t, 0)
            for k in range(classes):
                total[k] = total[k] + mask[k] * log_p[k].exp() * (log_p[k] - log_q[k])
        for k in range(classes):
            count = sum(1 for share in shares[n, k].flatten().tolist() if share > 0)
            edge = edge + (total[k] / count if count else 0.0 * total[k])
    body = cwd(ours * (1 - shares), theirs * (1 - shares), t)
    return {"edge": method.edge_factor * t**2 * edge / images, "body": body}


# Feature augmented distillation, ISDA's form.


def class_covariance(rows: Tensor, y: int, method: Method) -> Tensor:
    """Return a class's covariance over the rows seen by the method and the new (n, C) rows."""
    seen = method.statistics
    before, now = seen.count[y].item(), len(rows)
    if before + now == 0:
        return torch.zeros_like(seen.covariance[y], dtype=torch.float64)
    mean, covariance = seen.mean[y].double(), seen.covariance[y].double()
    first = before * mean
    second = before * (covariance + torch.outer(mean, mean))
    for row in rows:
        first, second = first + row, second + torch.outer(row, row)
    mean = first / (before + now)
    return second / (before + now) - torch.outer(mean, mean)


def fakd_isda(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    theirs = teacher.logits.double()
    ours = resized(student.logits.double(), theirs)
    images, classes, height, width = theirs.shape
    rows, columns = labels.shape[-2:]
    strength = method.strength * min(1.0, (method.step.item() + 1) / method.ramp_iterations)
    class_at = {
        (n, y, x): labels[n, y * rows // height, x * columns // width].item()
        for n in range(images)
        for y, x in places(height, width)
    }
    spread = {}
    for k in range(classes):
        members = [ours[n, :, y, x].detach() for (n, y, x), c in class_at.items() if c == k]
        spread[k] = class_covariance(members, k, method)
    total = 0.0
    for (n, y, x), k in class_at.items():
        z, log_p = ours[n, :, y, x], F.log_softmax(theirs[n, :, y, x], 0)
        for c in range(classes):
            shift = torch.zeros(classes, dtype=torch.float64)
            if k in spread:
                for j in range(classes):
                    v = spread[k]
                    shift[j] = strength / 2 * (v[j, j] + v[c, c] - 2 * v[j, c])
            bound = (z - z[c] + shift).logsumexp(0)
            total = total + log_p[c].exp() * (log_p[c] + bound)
    return {"fakd": total / len(class_at)}


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "mgd": mgd,
    "mgd:feature": mgd_feature,
    "maskd": maskd,
    "bpkd": bpkd,
    "fakd:isda": fakd_isda,
}
AUXILIARY: dict[str, Callable[[Taps, Taps, Tensor, Method], Terms]] = {"maskd": maskd_auxiliary}
