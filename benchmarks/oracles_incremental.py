"""The equations of ilt and dkd written out: whole maps, class by class.

The methods are tested and timed against these, in the precision of the taps.
``ORACLES[name](student, teacher, labels, method)`` returns the method's terms. The oracles read the
method's background, settings and extras; the teacher's logits give the number of old classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


def resized(maps: Tensor, size: torch.Size) -> Tensor:
    """Return the map at another size: kdprof's rule for other grids and for logits at labels."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


# ilt.


def ilt(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    images, old, height, width = teacher.logits.shape
    logits = resized(student.logits, teacher.logits.shape[-2:])
    rows = torch.arange(height, device=labels.device) * labels.shape[1] // height
    columns = torch.arange(width, device=labels.device) * labels.shape[2] // width
    total, count = 0 * logits.sum(), 0
    for i in range(images):
        counted = labels[i][rows][:, columns] < old  # neither a new class nor void
        log_p, q = F.log_softmax(logits[i], 0), F.softmax(teacher.logits[i], 0)
        for k in range(len(log_p)):
            of_class = q[k] if k < old else torch.zeros_like(q[0])
            total = total - (of_class * log_p[k])[counted].sum()
        count += counted.sum()
    return {"ilt": total / max(count, 1)}


def ilt_feature(student: Taps, teacher: Taps, labels: Tensor | None, method: Method) -> Terms:
    feature = student.c5
    if isinstance(method.adaptor, nn.Conv2d):
        matrix = method.adaptor.weight.to(feature.dtype).flatten(1)
        feature = torch.einsum("oc,nchw->nohw", matrix, feature)
    gap = resized(feature, teacher.c5.shape[-2:]) - teacher.c5
    return {"ilt_feature": (gap * gap).sum() / gap.numel()}


# dkd.


def cross_entropy(x: Tensor, y: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Return the binary cross-entropy of every element."""
    return -positive_weight * y * F.logsigmoid(x) - (1 - y) * F.logsigmoid(-x)


def summed(logits: Tensor, targets: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Return the sum over classes of the mean over images and positions."""
    total = 0 * logits.sum()
    for k in range(logits.shape[1]):
        total = total + cross_entropy(logits[:, k], targets[:, k], positive_weight).mean()
    return total


def one_hot(labels: Tensor, classes: range, like: Tensor) -> Tensor:
    """Return a map for each class, which is 1 at pixels with its label."""
    return torch.stack([(labels == k).to(like.dtype) for k in classes], 1)


def one_sign(head: Tensor, classifier: Tensor, sign: int) -> Tensor:
    """Return the logits that only the weights of one sign give, class by class."""
    maps = []
    for weight in classifier:
        kept = torch.where(sign * weight > 0, weight, 0.0)
        maps.append((kept * head).sum(1))
    return torch.stack(maps, 1)


def dkd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    size, grid = labels.shape[-2:], teacher.head.shape[-2:]
    count, old = student.logits.shape[1], teacher.logits.shape[1]
    start = 1 if method.background else 0
    logits, of_teacher = (resized(taps.logits, size) for taps in (student, teacher))
    new = range(old, count) if count > old else range(start, count)
    targets = one_hot(labels, new, logits)
    terms = {
        "mbce": summed(logits[:, new.start :], targets, method.positive_weight),
        "kd": summed(logits[:, start:old], of_teacher[:, start:].sigmoid()),
    }
    for name, sign in (("dkd_positive", 1), ("dkd_negative", -1)):
        ours = resized(one_sign(student.head, student.classifier[start:old], sign), grid)
        theirs = one_sign(teacher.head, teacher.classifier[start:old], sign)
        terms[name] = summed(ours, theirs.sigmoid())
    extra = method.auxiliary_classifier
    weight, bias = (parameter.to(logits.dtype) for parameter in (extra.weight, extra.bias))
    auxiliary = (weight * student.head.detach()).sum(1, keepdim=True) + bias
    terms["ac"] = summed(resized(auxiliary, size), torch.zeros_like(logits[:, :1]))
    return terms


def dkd_first(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    logits = resized(student.logits, labels.shape[-2:])
    targets = one_hot(labels, range(logits.shape[1]), logits)
    if method.background:
        targets[:, 0] = 0
    return {"mbce": summed(logits, targets, method.positive_weight)}


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "ilt": ilt,
    "ilt:feature": ilt_feature,
    "dkd": dkd,
    "dkd:first": dkd_first,
}
