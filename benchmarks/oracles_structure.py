"""SKD and DSD written out: window by window, image by image, every similarity map whole.

The methods are tested and timed against these, in float64.
``ORACLES[name](student, teacher, labels, method)`` returns the method's terms, and
``AUXILIARY[name]`` those of its discriminator, with the method's own discriminator in training
mode, which stays unchanged: call the oracle first, then the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Return the map on the grid of the other, by kdprof's rule: no paper states one."""
    if maps.shape[-2:] == like.shape[-2:]:
        return maps
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def mean_of(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


# The pixel-wise term.


def pixel_terms(student: Tensor, teacher: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the log-probabilities of student and teacher at every position."""
    student, teacher = resized(student.double(), teacher.double()), teacher.double()
    images, _, height, width = teacher.shape
    for i in range(images):
        for y in range(height):
            for x in range(width):
                yield tuple(F.log_softmax(z[i, :, y, x], 0) for z in (student, teacher))


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over images and positions, divided by the positions of one image."""
    total = sum(-(log_p.exp() * log_q).sum() for log_q, log_p in pixel_terms(student, teacher))
    return total / teacher.shape[-2:].numel()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images and positions."""
    pairs = pixel_terms(student, teacher)
    return mean_of([(log_p.exp() * (log_p - log_q)).sum() for log_q, log_p in pairs])


# The pair-wise term.


def windows(image: Tensor, height: int, width: int) -> list[Tensor]:
    """Return the parts of a (C, h, w) image, (C, positions) each; parts at the border are cut."""
    return [
        image[:, y : y + height, x : x + width].flatten(1)
        for y in range(0, image.shape[1], height)
        for x in range(0, image.shape[2], width)
    ]


def similarity(image: Tensor, window: tuple[int, int], pooling: str, fixed: bool) -> Tensor:
    """Return the similarity of every node with every node of one image."""
    nodes = []
    for part in windows(image, *window):
        node = part.max(1).values if pooling == "max" else part.sum(1) / part.shape[1]
        length = node.norm()
        nodes.append(node / (length.detach() + 1e-8 if fixed else length.clamp(min=1e-8)))
    matrix = torch.stack(nodes)
    return matrix @ matrix.T


def pairwise(student: Tensor, teacher: Tensor, window, pooling: str, fixed: bool) -> Tensor:
    gaps = []
    for ours, theirs in zip(student, teacher, strict=True):
        of_both = (similarity(image, window, pooling, fixed) for image in (ours, theirs))
        gap = torch.sub(*of_both)
        gaps.append((gap * gap).sum() / gap.numel())
    return mean_of(gaps)


# The discriminator and its losses.


class Judge:
    """Scores logits with the weights of a method's discriminator; has its own power iteration."""

    def __init__(self, discriminator: nn.Module):
        self.module, self.left = discriminator, {}

    def __call__(self, logits: Tensor) -> Tensor:
        x = self.normalised(logits)
        x = F.pad(x, (0, max(0, 64 - x.shape[3]), 0, max(0, 64 - x.shape[2])))
        first, second, third, early, fourth, late, last = self.module.body
        for stage in (first, second, third):
            x = self.stage(stage[0], x)
        x = self.stage(fourth[0], self.attended(early, x))
        return self.convolved(last, self.attended(late, x))

    def normalised(self, logits: Tensor) -> Tensor:
        """Return the logits through the batch norm in training."""
        norm, channels = self.module.norm, []
        for c in range(logits.shape[1]):
            centred = logits[:, c] - logits[:, c].mean()
            scaled = centred / (centred.square().mean() + norm.eps).sqrt()
            channels.append(norm.weight[c].double() * scaled + norm.bias[c].double())
        return torch.stack(channels, 1)

    def stage(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return a convolution by the weight over its largest singular value, and a leaky ReLU."""
        matrix = layer.weight.double().flatten(1)
        left = self.left.get(layer, layer.u.double())
        with torch.no_grad():
            right = matrix.T @ left
            right = right / right.norm()
            left = matrix @ right
            left = self.left[layer] = left / left.norm()
        weight = layer.weight.double() / (left @ (matrix @ right))
        return F.leaky_relu(F.conv2d(x, weight, layer.bias.double(), 2, 1), 0.1)

    def attended(self, block: nn.Module, x: Tensor) -> Tensor:
        images = []
        for image in x:
            parts = (self.convolved(c, image[None]) for c in (block.query, block.key, block.value))
            query, key, value = (part[0].flatten(1) for part in parts)
            seen = [value @ (key.T @ looking).softmax(0) for looking in query.T]
            images.append(torch.stack(seen, 1).reshape(image.shape))
        return block.gate.double() * torch.stack(images) + x

    def convolved(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight.double(), layer.bias.double())


def adversarial(student: Tensor, teacher: Tensor, method: Method) -> Tensor:
    judge = Judge(method.adversary.discriminator)
    return -judge(resized(student.double(), teacher)).mean()


def auxiliary(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    """Return the discriminator's terms, with the same random draws as the method."""
    theirs = teacher.logits.double()
    ours = resized(student.logits.double(), theirs)
    judge = Judge(method.adversary.discriminator)
    fake, real = judge(ours), judge(theirs)
    if method.adversarial == "hinge":
        return {"discriminator": (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()}
    mix = torch.rand(len(theirs), 1, 1, 1, device=theirs.device).double()
    between = (mix * theirs + (1 - mix) * ours).detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    penalty = mean_of([((image * image).sum().sqrt() - 1) ** 2 for image in slope])
    return {"discriminator": fake.mean() - real.mean(), "gradient_penalty": penalty}


# SKD.


def skd_plain(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    kd = {"soft_cross_entropy": soft_cross_entropy, "pixel": divergence}[method.kd_reduction]
    theirs = teacher.head.double()
    window = [max(1, int(side * method.scale)) for side in theirs.shape[-2:]]
    ours = resized(student.head.double(), theirs)
    return {
        "kd": kd(student.logits, teacher.logits),
        "pairwise": pairwise(ours, theirs, window, method.pooling, fixed=True),
    }


def skd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    terms = skd_plain(student, teacher, labels, method)
    return {**terms, "adv": adversarial(student.logits, teacher.logits, method)}


def skd_cirkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    heat, theirs = method.temperature, teacher.head.double()
    ours, window = resized(student.head.double(), theirs), [method.window] * 2
    return {
        "kd": heat**2 * divergence(student.logits / heat, teacher.logits / heat),
        "pairwise": pairwise(ours, theirs, window, "max", fixed=False),
        "adv": adversarial(student.logits, teacher.logits, method),
    }


# DSD.


def unit_vector(values: Tensor) -> Tensor:
    """Return the vector scaled to length 1, or zeros if it is only rounding error."""
    length = values.norm()
    return values / length if length > 1e-9 else torch.zeros_like(values)


def pixel_similarity(student: list[Tensor], teacher: list[Tensor], power: int) -> Tensor:
    ours, theirs = ([(f**power).mean(1, keepdim=True) for f in fs] for fs in (student, teacher))
    grid, gaps = theirs[-1], []
    ours, theirs = ([resized(q, grid) for q in qs] for qs in (ours, theirs))
    for i in range(len(grid)):
        for m, n in combinations(range(len(ours)), 2):
            residual = [
                unit_vector(unit_vector(qs[n][i].flatten()) - unit_vector(qs[m][i].flatten()))
                for qs in (ours, theirs)
            ]
            gaps.append((residual[0] - residual[1]).square().mean())
    return mean_of(gaps)


def category_similarity(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    gaps = []
    for ours, theirs in zip(student, teacher, strict=True):
        of_both = []
        for image in (ours, theirs):
            pooled = [part.sum(1) / part.shape[1] for part in windows(image, 2, 2)]
            of_both.append(F.softmax(torch.stack(pooled, 1) / temperature, 1))
        p, q = of_both
        classes = range(len(p))
        gaps += [((p[k] @ p[m]) - (q[k] @ q[m])) ** 2 for k in classes for m in classes]
    return mean_of(gaps)


def dsd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    first = "aux" if "aux" in method.taps else "logits"
    maps = (
        [getattr(taps, tap).double() for tap in (first, "head", "logits")]
        for taps in (student, teacher)
    )
    theirs = teacher.logits.double()
    ours = resized(student.logits.double(), theirs)
    return {
        "psd": pixel_similarity(*maps, method.power),
        "csd": category_similarity(ours, theirs, method.temperature),
    }


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "skd": skd,
    "skd:plain": skd_plain,
    "skd:cirkd": skd_cirkd,
    "dsd": dsd,
    "dsd:no_aux": dsd,
}
AUXILIARY = {"skd": auxiliary, "skd:cirkd": auxiliary}
