"""The equations of at, dist, pkd, nfd and attnfd written out, position by position.

The methods are tested and timed against these: float64, in loops, with the method's own
adaptors. ``ORACLES[name](student, teacher, labels, method)`` returns the method's terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


def places(maps: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (image, row, column) of an (N, C, h, w) tensor."""
    images, _, height, width = maps.shape
    for i in range(images):
        for y in range(height):
            for x in range(width):
                yield i, y, x


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Return the map on the grid of the other, by kdprof's rule: no paper states one."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def adapted(adaptor: nn.Module, maps: Tensor) -> Tensor:
    """Return the map through a 1x1 convolution without bias, or as it is."""
    if isinstance(adaptor, nn.Identity):
        return maps
    return torch.einsum("oc,nchw->nohw", adaptor.weight.double()[:, :, 0, 0], maps)


def mean_of(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


# Pixel-wise kd, a term of at.


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student, teacher = resized(student.double(), teacher.double()), teacher.double()
    rows = []
    for i, y, x in places(teacher):
        log_p = F.log_softmax(teacher[i, :, y, x] / temperature, 0)
        log_q = F.log_softmax(student[i, :, y, x] / temperature, 0)
        rows.append((log_p.exp() * (log_p - log_q)).sum())
    return temperature**2 * mean_of(rows)


# Attention transfer.


def energies(features: Tensor, power: int) -> Tensor:
    images, channels, height, width = features.shape
    rows = [sum(features[i, :, y, x] ** power) / channels for i, y, x in places(features)]
    return torch.stack(rows).reshape(images, 1, height, width)


def unit_map(energy: Tensor) -> Tensor:
    length = energy.square().sum().sqrt()
    return energy / length if length > 0 else energy


def at(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    ours = energies(student.head.double(), method.power)
    theirs = energies(teacher.head.double(), method.power)
    ours, gaps = resized(ours, theirs), []
    for i in range(len(theirs)):
        gap = unit_map(ours[i, 0]) - unit_map(theirs[i, 0])
        gaps += [value**2 for value in gap.flatten()]
    return {
        "at": mean_of(gaps),
        "kd": kd(student.logits, teacher.logits, method.temperature),
    }


# DIST.


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors, with the published eps."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (length(a) * length(b) + 1e-8)


def length(a: Tensor) -> Tensor:
    """Return the length; for zeros, without the infinite gradient of a square root at 0."""
    squared = (a * a).sum()
    return squared.sqrt() if squared > 0 else squared


def relations(student: Tensor, teacher: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    heat = method.temperature
    student = resized(student.double(), teacher.double())
    p, q = F.softmax(student / heat, 1), F.softmax(teacher.double() / heat, 1)
    inter = mean_of([correlation(p[i, :, y, x], q[i, :, y, x]) for i, y, x in places(p)])
    if method.intra_over == "pixels":
        per_class = [correlation(p[:, c].flatten(), q[:, c].flatten()) for c in range(p.shape[1])]
    else:
        per_class = [
            correlation(p[:, c, y, x], q[:, c, y, x])
            for c in range(p.shape[1])
            for y in range(p.shape[2])
            for x in range(p.shape[3])
        ]
    return heat**2 * (1 - inter), heat**2 * (1 - mean_of(per_class))


def dist(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    inter, intra = relations(student.logits, teacher.logits, method)
    aux_inter, aux_intra = relations(student.aux, teacher.aux, method)
    return {"inter": inter, "intra": intra, "aux_inter": aux_inter, "aux_intra": aux_intra}


# PKD and NFD.


def standard_scores(values: Tensor, correction: int) -> Tensor:
    """Return (value - mean) / (std + 1e-6); zeros if all values are equal."""
    count = values.numel()
    centred = values - values.sum() / count
    if count == 1 or centred.abs().max() == 0:
        return torch.zeros_like(values)
    std = (centred.square().sum() / (count - correction)).sqrt()
    return centred / (std + 1e-6)


def pkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    ours, theirs = adapted(method.adaptor, student.head.double()), teacher.head.double()
    if method.resized == "student":
        ours = resized(ours, theirs)
    else:
        theirs = resized(theirs, ours)
    gaps = [
        standard_scores(ours[:, c], 1) - standard_scores(theirs[:, c], 1)
        for c in range(theirs.shape[1])
    ]
    return {"pkd": sum(gap.square().sum() for gap in gaps) / theirs.numel() / 2}


def nfd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    theirs = teacher.head.double()
    ours = resized(adapted(method.adaptor, student.head.double()), theirs)
    gaps = [
        standard_scores(ours[i, c], 0) - standard_scores(theirs[i, c], 0)
        for i in range(theirs.shape[0])
        for c in range(theirs.shape[1])
    ]
    total = sum(gap.square().sum() for gap in gaps)
    if method.form == "norm":
        return {"nfd": total.sqrt() / theirs.shape[-2:].numel()}
    return {"nfd": total / theirs.numel()}


# AttnFD.


def perceptron(mlp: nn.Module, values: Tensor) -> Tensor:
    inner = mlp[0].weight.double() @ values + mlp[0].bias.double()
    return mlp[2].weight.double() @ inner.clamp(min=0) + mlp[2].bias.double()


def normalised(norm: nn.Module, maps: Tensor) -> Tensor:
    """Return the map through a batch norm in training."""
    channels = []
    for c in range(maps.shape[1]):
        centred = maps[:, c] - maps[:, c].mean()
        scaled = centred / (centred.square().mean() + norm.eps).sqrt()
        channels.append(norm.weight[c].double() * scaled + norm.bias[c].double())
    return torch.stack(channels, 1)


def attended(block: nn.Module, x: Tensor) -> Tensor:
    """Return the map through the channel gate and the spatial gate."""
    images = []
    for image in x:
        pooled = [
            torch.stack([channel.mean() for channel in image]),
            torch.stack([channel.flatten()[channel.argmax()] for channel in image]),
        ]
        if block.learned:
            pooled = [perceptron(block.mlp, values) for values in pooled]
        gate = torch.sigmoid(pooled[0] + pooled[1])
        images.append(torch.stack([channel * g for channel, g in zip(image, gate, strict=True)]))
    x = torch.stack(images)
    largest, mean = x.max(1).values, x.sum(1) / x.shape[1]
    if not block.learned:
        return x * torch.sigmoid(largest + mean)[:, None]
    height, width = x.shape[-2:]
    weight = block.spatial[0].weight.double()
    seen = torch.zeros_like(mean)
    for k, maps in enumerate((largest, mean)):
        wide = F.pad(maps, (3, 3, 3, 3))
        for dy in range(7):
            for dx in range(7):
                seen = seen + weight[0, k, dy, dx] * wide[:, dy : dy + height, dx : dx + width]
    return x * torch.sigmoid(normalised(block.spatial[1], seen[:, None]))


def attnfd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    """Return the terms of a method in training mode."""
    terms = {}
    for tap in ("c5", "head"):
        theirs = attended(method.teacher_blocks[tap], getattr(teacher, tap).double())
        ours = attended(method.student_blocks[tap], getattr(student, tap).double())
        convolution, norm = method.connectors[tap]
        ours = resized(normalised(norm, adapted(convolution, ours)), theirs)
        gap = ours / ours.square().sum().sqrt() - theirs / theirs.square().sum().sqrt()
        terms[f"attnfd_{tap}"] = sum(image.square().sum() for image in gap) / len(theirs)
    return terms


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "at": at,
    "dist": dist,
    "pkd": pkd,
    "nfd": nfd,
    "attnfd": attnfd,
}
