"""Objectives on whole maps, in the steps that the authors' code takes.

These forms are timed in place of oracles that loop over positions. The oracles (`oracles_*.py`) are
close to the equations, but being faster than a loop proves nothing.
``WHOLE_MAPS[name](student, teacher, labels, method)`` returns the terms of ``ORACLES``, in the
precision of the taps and on equal grids, with the method's own extras and published settings. Like
the method, it updates statistics. Discriminators and generators are the method's own modules: they
have no other form on whole maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from oracles_core import channelwise, pixels
from torch import Tensor, nn

from kdprof.method import Method, Taps

Terms = dict[str, Tensor]


def rows(maps: Tensor) -> Tensor:
    """Return (N, C, h, w) maps as (N h w, C)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


# Attention transfer, DIST, PKD, NFD.


def unit_energy(features: Tensor, power: int) -> Tensor:
    return F.normalize(features.pow(power).mean(1).flatten(1))


def at(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    gap = unit_energy(student.head, method.power) - unit_energy(teacher.head, method.power)
    return {
        "at": gap.pow(2).mean(),
        "kd": pixels(student.logits, teacher.logits, method.temperature, "pixel"),
    }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of rows."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def relations(student: Tensor, teacher: Tensor, heat: float) -> tuple[Tensor, Tensor]:
    p, q = (rows(maps / heat).softmax(1) for maps in (student, teacher))
    inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
    return heat**2 * inter, heat**2 * intra


def dist(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    inter, intra = relations(student.logits, teacher.logits, method.temperature)
    aux_inter, aux_intra = relations(student.aux, teacher.aux, method.temperature)
    return {"inter": inter, "intra": intra, "aux_inter": aux_inter, "aux_intra": aux_intra}


def pkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    scores = []
    for maps in (method.adaptor(student.head), teacher.head):
        channels = maps.permute(1, 0, 2, 3).reshape(maps.shape[1], -1)
        mean, std = channels.mean(1, keepdim=True), channels.std(1, keepdim=True)
        scores.append((channels - mean) / (std + 1e-6))
    return {"pkd": F.mse_loss(*scores) / 2}


def nfd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    scores = []
    for maps in (method.adaptor(student.head), teacher.head):
        mean = maps.mean((2, 3), keepdim=True)
        std = maps.std((2, 3), keepdim=True, unbiased=False)
        scores.append((maps - mean) / (std + 1e-6))
    return {"nfd": F.mse_loss(*scores)}


# AttnFD.


def attended(block: nn.Module, x: Tensor) -> Tensor:
    """Return the map through the channel gate and the spatial gate."""
    pools = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
    seen = [block.mlp(pool(x, 1).flatten(1)) for pool in pools]
    x = x * torch.sigmoid(sum(seen))[:, :, None, None].expand_as(x)
    pooled = torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)
    return x * torch.sigmoid(block.spatial(pooled))


def attnfd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    terms = {}
    for tap in ("c5", "head"):
        ours = method.connectors[tap](attended(method.student_blocks[tap], getattr(student, tap)))
        theirs = attended(method.teacher_blocks[tap], getattr(teacher, tap))
        gap = ours / ours.norm(p=2) - theirs / theirs.norm(p=2)
        terms[f"attnfd_{tap}"] = gap.pow(2).sum() / len(theirs)
    return terms


# SKD and DSD.


def adversarial(student: Tensor, method: Method) -> Tensor:
    return -method.adversary.discriminator(student).mean()


def similarity(nodes: Tensor, fixed: bool) -> Tensor:
    """Return (N, M, M) of (N, C, h, w)."""
    nodes = nodes.flatten(2)
    length = nodes.pow(2).sum(1, keepdim=True).sqrt()
    nodes = nodes / (length.detach() + 1e-8) if fixed else F.normalize(nodes, dim=1)
    return torch.einsum("icm,icn->imn", nodes, nodes)


def pairwise(student: Tensor, teacher: Tensor, window: Sequence[int], fixed: bool) -> Tensor:
    pooled = (F.max_pool2d(maps, window, window, ceil_mode=True) for maps in (student, teacher))
    ours, theirs = (similarity(maps, fixed) for maps in pooled)
    return (theirs - ours).pow(2).sum() / ours.numel()


def skd_plain(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    p, log_q = F.softmax(teacher.logits, 1), F.log_softmax(student.logits, 1)
    window = [max(1, int(side * method.scale)) for side in teacher.head.shape[-2:]]
    return {
        "kd": (-p * log_q).sum() / teacher.logits.shape[-2:].numel(),
        "pairwise": pairwise(student.head, teacher.head, window, fixed=True),
    }


def skd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    terms = skd_plain(student, teacher, labels, method)
    return {**terms, "adv": adversarial(student.logits, method)}


def skd_cirkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    window = [method.window] * 2
    return {
        "kd": pixels(student.logits, teacher.logits, method.temperature, "pixel"),
        "pairwise": pairwise(student.head, teacher.head, window, fixed=False),
        "adv": adversarial(student.logits, method),
    }


def residuals(maps: Sequence[Tensor], power: int) -> Tensor:
    energies = [unit_energy(m, power) for m in maps]
    return torch.stack([F.normalize(b - a) for a, b in combinations(energies, 2)])


def class_similarity(logits: Tensor, heat: float) -> Tensor:
    p = F.softmax(F.avg_pool2d(logits, 2, 2, ceil_mode=True).flatten(2) / heat, 2)
    return torch.bmm(p, p.transpose(1, 2))


def dsd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    maps = ([getattr(taps, tap) for tap in method.compared] for taps in (student, teacher))
    ours, theirs = (residuals(m, method.power) for m in maps)
    logits = student.logits, teacher.logits
    similar = [class_similarity(z, method.temperature) for z in logits]
    return {"psd": (ours - theirs).pow(2).mean(), "csd": F.mse_loss(*similar)}


# MGD and MasKD.


def mgd_feature(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    images, _, height, width = teacher.c5.shape
    draws = torch.rand(images, 1, height, width, device=teacher.c5.device)
    ones = torch.ones_like(draws)
    mask = torch.where(draws > 1 - method.mask_ratio, 0 * ones, ones)
    aligned = method.generator.align(student.c5)
    rebuilt = method.generator.rebuild(torch.mul(aligned, mask))
    return {"mgd": F.mse_loss(rebuilt, teacher.c5, reduction="sum") / images}


def mgd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    terms = mgd_feature(student, teacher, labels, method)
    return {**terms, "cwd": channelwise(student.logits, teacher.logits, method.temperature)}


def masked_distance(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Return the mean over images, masks and channels; the masked maps are (N, T, C, h w)."""
    ours, theirs = (masks[:, :, None] * maps.flatten(2)[:, None] for maps in (student, teacher))
    total = F.mse_loss(ours, theirs, reduction="none").sum(3) / (masks.sum(2)[:, :, None] + 1e-5)
    return total.mean() / 2


def maskd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    with torch.no_grad():
        masks = (method.masks.tokens @ teacher.logits.flatten(2)).sigmoid()
    return {
        "maskd": masked_distance(student.logits, teacher.logits, masks),
        "maskd_aux": masked_distance(student.aux, teacher.aux, masks),
    }


# Af-DCD and ReviewKD.


def patches(maps: Tensor, method: Method) -> Tensor:
    """Return (N patches, positions groups, C / groups) of a pooled map, in whole patches."""
    maps = F.max_pool2d(maps, [min(method.pool, side) for side in maps.shape[-2:]])
    tall, wide = (
        min(a, b)
        for a, b in zip((method.patch_height, method.patch_width), maps.shape[-2:], strict=True)
    )
    cut = F.unfold(maps, (tall, wide), stride=(tall, wide)).transpose(1, 2).flatten(0, 1)
    cut = cut.unflatten(1, (method.groups, -1, tall * wide))  # patches, groups, C / groups, places
    return cut.permute(0, 3, 1, 2).flatten(1, 2)


def contrast(anchors: Tensor, keys: Tensor, method: Method) -> Tensor:
    """Return the mean over positions of the cross-entropy summed over groups."""
    similar = -torch.cdist(anchors, keys, p=1) / method.contrast_temperature
    group = torch.arange(anchors.shape[1], device=anchors.device) % method.groups
    own = torch.eye(len(group), dtype=torch.bool, device=anchors.device)
    absent = (group[:, None] == group) & ~own
    log_p = similar.masked_fill(absent, -torch.inf).log_softmax(2)
    positions = anchors.shape[0] * anchors.shape[1] // method.groups
    return -log_p.diagonal(dim1=1, dim2=2).sum() / positions


def af_dcd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    images, _, height, width = teacher.c5.shape
    draws = torch.rand(images, 1, height, width, device=teacher.c5.device)
    mask = torch.where(draws > 1 - method.mask_ratio, 0.0, 1.0)
    rebuilt = method.projector(torch.mul(method.align(student.c5), mask))
    pair = (patches(maps, method) for maps in (rebuilt, teacher.c5))
    return {
        "fd": F.mse_loss(rebuilt, teacher.c5, reduction="sum") / images,
        "ctr": contrast(*pair, method),
        "kd": pixels(student.logits, teacher.logits, method.temperature, "pixel"),
    }


def hierarchical(ours: Tensor, theirs: Tensor) -> Tensor:
    loss = F.mse_loss(ours, theirs)
    for cells, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        pooled = (F.adaptive_avg_pool2d(maps, cells) for maps in (ours, theirs))
        loss = loss + weight * F.mse_loss(*pooled)
    return loss / 1.875


def reviewkd(student: Taps, teacher: Taps, labels: None, method: Method) -> Terms:
    total, deeper = 0.0, None
    for tap in ("c5", "c4", "c3", "c2"):
        block = method.fusions[tap]
        x = block.reduce(getattr(student, tap))
        if deeper is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            gates = torch.sigmoid(block.attend(torch.cat((x, deeper), 1)))
            x = x * gates[:, :1] + deeper * gates[:, 1:]
        deeper = x
        total = total + hierarchical(block.restore(x), getattr(teacher, tap))
    return {"reviewkd": total}


# BPKD and FAKD.


@torch.no_grad()
def edges(labels: Tensor, classes: int, width: int, grid: torch.Size) -> Tensor:
    """Return dilation minus erosion of the one-hot labels, averaged over cells."""
    members = F.one_hot(labels.clamp(max=classes), classes + 1)[..., :classes]
    members = members.permute(0, 3, 1, 2).float()
    dilated, other = (
        F.max_pool2d(maps, width, stride=1, padding=width // 2) for maps in (members, -members)
    )
    return F.adaptive_avg_pool2d(dilated + other, grid)


def bpkd(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    ours, theirs, heat = student.logits, teacher.logits, method.temperature
    mask = edges(labels, method.num_classes, method.edge_width, theirs.shape[-2:])
    q = F.softmax(mask * theirs / heat, 1)
    gap = q.log() - F.log_softmax(mask * ours / heat, 1)
    of_class = (mask * q * gap).sum((2, 3)) / (mask > 0).sum((2, 3)).clamp(min=1)
    return {
        "edge": method.edge_factor * heat**2 * of_class.sum() / len(theirs),
        "body": channelwise((1 - mask) * ours, (1 - mask) * theirs, heat),
    }


def take_in(seen: nn.Module, logits: Tensor, which: Tensor, classes: int) -> None:
    """Update means and covariances as ISDA does, by (positions, classes, C) maps of members."""
    valid = which < classes
    logits, which = logits[valid], which[valid]
    members = F.one_hot(which, classes).to(logits.dtype)
    of_class = logits[:, None, :].expand(-1, classes, -1) * members[:, :, None]
    count = members.sum(0)
    mean = of_class.sum(0) / count.clamp(min=1)[:, None]
    centred = (of_class - mean * members[:, :, None]).permute(1, 2, 0)
    covariance = centred @ centred.transpose(1, 2) / count.clamp(min=1)[:, None, None]
    share = (count / (count + seen.count).clamp(min=1))[:, None, None]
    gap = mean - seen.mean
    between = share * (1 - share) * gap[:, :, None] * gap[:, None, :]
    seen.covariance.copy_((1 - share) * seen.covariance + share * covariance + between)
    seen.mean.add_(share[:, 0] * gap)
    seen.count.add_(count)


def fakd_isda(student: Taps, teacher: Taps, labels: Tensor, method: Method) -> Terms:
    """Return the term; whole tensors of positions x classes x classes."""
    classes, seen = method.num_classes, method.statistics
    ours, theirs = rows(student.logits), rows(teacher.logits)
    nearest = F.interpolate(labels[:, None].float(), teacher.logits.shape[-2:], mode="nearest")
    which = nearest.flatten().long().clamp(max=classes)
    with torch.no_grad():
        take_in(seen, ours, which, classes)
        method.step += 1
        variance = seen.covariance.diagonal(dim1=1, dim2=2)
        spread = variance[:, :, None] + variance[:, None, :] - 2 * seen.covariance
        strength = method.strength * (method.step / method.ramp_iterations).clamp(max=1)
        shift = strength / 2 * F.pad(spread, (0, 0, 0, 0, 0, 1))[which]
    augmented = ours[:, None, :] - ours[:, :, None] + shift
    q, log_q = theirs.softmax(1), theirs.log_softmax(1)
    return {"fakd": (q * (log_q + augmented.logsumexp(2))).sum() / len(ours)}


WHOLE_MAPS: dict[str, Callable[[Taps, Taps, Tensor | None, Method], Terms]] = {
    "af_dcd": af_dcd,
    "af_dcd:enhanced": af_dcd,
    "at": at,
    "attnfd": attnfd,
    "bpkd": bpkd,
    "dist": dist,
    "dsd": dsd,
    "dsd:no_aux": dsd,
    "fakd:isda": fakd_isda,
    "maskd": maskd,
    "mgd": mgd,
    "mgd:feature": mgd_feature,
    "nfd": nfd,
    "pkd": pkd,
    "reviewkd": reviewkd,
    "reviewkd:imagenet": reviewkd,
    "skd": skd,
    "skd:cirkd": skd_cirkd,
    "skd:plain": skd_plain,
}
