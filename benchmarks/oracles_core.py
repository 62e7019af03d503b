"""kd, fitnet, cwd and ifvd written out as they were published: whole maps, step by step.

The methods are tested and timed against these, in the precision of the taps.
``ORACLES[name](student, teacher, labels, method)`` returns the method's terms, with the method's
own adaptors and discriminator, which stay unchanged: call the oracle first, then the method. Only
the published settings of the methods are covered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from oracles_structure import adversarial, resized
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


# Logits.


def divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """Return the sum of p_T (log p_T - log p_S), p the softmax over one dimension."""
    p = F.softmax(teacher / temperature, dim)
    log_p = F.log_softmax(teacher / temperature, dim)
    log_q = F.log_softmax(student / temperature, dim)
    return (p * (log_p - log_q)).sum()


def pixels(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """Return the divergence over classes, per position or, without T^2, per element."""
    total = divergence(resized(student, teacher), teacher, temperature, 1)
    if reduction == "element":
        return total / teacher.numel()
    if reduction == "pixel":
        return temperature**2 * total / (teacher.numel() // teacher.shape[1])
    raise NotImplementedError(f"no oracle of the reduction '{reduction}'")


def channelwise(
    student: Tensor, teacher: Tensor, temperature: float, channels: int | None = None
) -> Tensor:
    """Return the divergence over positions, divided by images and channels."""
    ours, theirs = (maps.flatten(2) for maps in (resized(student, teacher), teacher))
    total = divergence(ours, theirs, temperature, 2)
    return temperature**2 * total / (teacher.shape[0] * (channels or teacher.shape[1]))


def kd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    settings = method.temperature, method.reduction
    return {"kd": pixels(student.logits, teacher.logits, *settings)}


def cwd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    if (method.norm, method.divergence) != ("channel", "kl"):
        raise NotImplementedError("no oracle of other norms and divergences")
    return {"cwd": channelwise(student.logits, teacher.logits, method.temperature)}


# Features.


def mapped(layer: nn.Module, maps: Tensor) -> Tensor:
    """Return the map through a 1x1 convolution without bias, or as it is."""
    if isinstance(layer, nn.Identity):
        return maps
    weight = layer.weight[:, :, 0, 0].to(maps.dtype)
    return torch.einsum("oc,nchw->nohw", weight, maps)


def normalised(norm: nn.Module, maps: Tensor) -> Tensor:
    """Return the map through a batch norm in training."""
    centred = maps - maps.mean((0, 2, 3), keepdim=True)
    variance = centred.square().mean((0, 2, 3), keepdim=True)
    scale, shift = (p.to(maps.dtype)[:, None, None] for p in (norm.weight, norm.bias))
    return scale * centred / (variance + norm.eps).sqrt() + shift


def fitnet(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    gap = resized(mapped(method.adaptor, student.head), teacher.head) - teacher.head
    return {
        "fitnet": gap.square().mean(),
        "kd": pixels(student.logits, teacher.logits, method.temperature, "pixel"),
    }


def cwd_feature(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    convolution, norm, _ = method.adaptor
    adapted = normalised(norm, mapped(convolution, student.head)).clamp(min=0)
    return {"cwd_feature": channelwise(adapted, teacher.head, method.temperature)}


def cwd_cirkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    """Return CIRKD's bundle; its feature term is divided by the channels before the adaptor."""
    heat, before = method.temperature, student.head.shape[1]
    adapted = mapped(method.adaptor, student.head)
    return {
        "cwd_feature": channelwise(adapted, teacher.head, heat, before),
        "cwd": channelwise(student.logits, teacher.logits, heat),
        "kd": pixels(student.logits, teacher.logits, 1.0, "pixel"),
        "adv": adversarial(student.logits, teacher.logits, method),
    }


# Intra-class feature variation: the authors' loop over classes.


def centres(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return a map with the mean feature of the class at each position; void stays unchanged."""
    found = features.clone()
    for label in range(num_classes):
        mask = (labels == label).to(features.dtype)
        mean = (mask * features).sum((2, 3)) / (mask.sum((2, 3)) + 1e-6)
        found = (1 - mask) * found + mask * mean[:, :, None, None]
    return found


def variation(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean squared gap of the cosines with the centres; the teacher has no gradient."""
    student = resized(student, teacher)
    cosines = []
    for features in (student, teacher.detach()):
        nearest = F.interpolate(labels[:, None].float(), features.shape[-2:], mode="nearest")
        wide = nearest.expand(features.shape)
        cosines.append(F.cosine_similarity(features, centres(features, wide, num_classes), dim=1))
    return (cosines[0] - cosines[1]).square().mean()


def ifvd_plain(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    return {
        "ifv": variation(student.head, teacher.head, labels, method.num_classes),
        "kd": pixels(student.logits, teacher.logits, 1.0, method.kd_reduction),
    }


def ifvd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    terms = ifvd_plain(student, teacher, labels, method)
    return {**terms, "adv": adversarial(student.logits, teacher.logits, method)}


ORACLES: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "kd": kd,
    "cwd": cwd,
    "cwd:mmrazor": cwd,
    "cwd:feature": cwd_feature,
    "cwd:cirkd": cwd_cirkd,
    "fitnet": fitnet,
    "ifvd": ifvd,
    "ifvd:plain": ifvd_plain,
    "ifvd:cirkd": ifvd,
}
