"""CIRKD and CIRKDv2 written out: image by image, pair by pair, class by class, every map whole.

Slow and memory-hungry on purpose: the fast forms are tested and timed against these. Each oracle
makes the same random draws as the method, in its order, and updates the method's own memories.
"""

import math

import torch
import torch.nn.functional as F

from kdprof.method import Taps
from kdprof.methods._memory import distinct


def resized(student, teacher):
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)


def divergence(ours, theirs, temperature=1.0):
    """Return the KL divergence of two score tables, (rows, columns), for each row."""
    p, log_q = (theirs / temperature).softmax(1), (ours / temperature).log_softmax(1)
    return (p * ((theirs / temperature).log_softmax(1) - log_q)).sum(1)


def kd(student, teacher, temperature):
    rows = [
        z.permute(0, 2, 3, 1).flatten(0, 2) for z in (resized(student, teacher), teacher)
    ]  # (N h w, classes)
    return temperature**2 * divergence(*rows, temperature).mean()


def pairs(ours, theirs, temperature):
    """Return the mean over ordered pairs of images, given as lists of (rows, C) unit vectors."""
    terms = []
    for i in range(len(ours)):
        for j in range(len(ours)):
            s, t = (f[i] @ f[j].T / temperature for f in (ours, theirs))
            terms.append(divergence(s, t).mean())
    return torch.stack(terms).mean()


def units(features):
    """Return unit vectors as a list of (positions, C), one for each image."""
    return [F.normalize(f.flatten(1), dim=0).T for f in features]


def batch(student, teacher, method):
    student = resized(student, teacher)
    window = method.pooling
    if not window and min(teacher.shape[-2:]) >= 256:
        window = 4
    if window > 1:
        student, teacher = (F.avg_pool2d(f, window, ceil_mode=True) for f in (student, teacher))
    return pairs(units(student), units(teacher), method.batch_temperature)


def nearest(labels, height, width):
    """Return labels of (N, H, W) on the grid, in raster order."""
    rows = torch.arange(height) * labels.shape[1] // height
    columns = torch.arange(width) * labels.shape[2] // width
    return labels[:, rows][:, :, columns].flatten(1)


def enqueue(queue, label, vectors):
    """Store vectors of one class by the published rule: without room they take the last slots."""
    memory, start = queue.contents(), queue.pointers[label].item()
    if start + len(vectors) >= queue.size:
        memory[label, -len(vectors) :] = vectors
        queue.pointers[label] = 0
    else:
        memory[label, start : start + len(vectors)] = vectors
        queue.pointers[label] += len(vectors)


@torch.no_grad()
def store(memory, theirs, labels, num_classes):
    counts = torch.stack([(labels == k).sum(1) for k in range(num_classes)], 1)
    ranks = distinct(counts, memory.updates)
    for image, vectors in enumerate(theirs):
        for label in labels[image].unique().tolist():
            if label >= num_classes:
                continue
            places = (labels[image] == label).nonzero()[:, 0]
            mean = F.normalize(vectors[places].mean(0), dim=0)
            enqueue(memory.regions, label, mean[None])
            chosen = ranks[image, label, : min(len(places), memory.updates)]
            # The published code takes the rank for a position of the image.
            chosen = places[chosen] if memory.own_pixels else chosen
            enqueue(memory.pixels, label, vectors[chosen])


def memory(student, teacher, labels, method):
    mine = method.memory
    labels = nearest(labels, *teacher.shape[-2:])
    ours = units(mine.projection(resized(student, teacher)))
    theirs = units(teacher)
    store(mine, theirs, labels, method.num_classes)
    terms = {}
    for name, total in (("pixel", method.pixel_contrast), ("region", method.region_contrast)):
        queue = getattr(mine, f"{name}s")
        order = torch.randperm(queue.size)[: total // method.num_classes + 1]
        keys = torch.cat([of_class[order] for of_class in queue.contents()])
        kept = torch.cat(list(labels)) < method.num_classes
        if not kept.any():
            terms[name] = 0 * torch.cat(ours).sum()
            continue
        s, t = (torch.cat(f)[kept] @ keys.T / method.contrast_temperature for f in (ours, theirs))
        scale = method.contrast_kd_temperature**2
        terms[name] = scale * divergence(s, t, method.contrast_kd_temperature).mean()
    return terms


def gcn(module, x):
    images = []
    for image in x:
        q, k, v = (
            F.conv2d(image[None], layer.weight)[0].flatten(1)
            for layer in (module.query, module.key, module.value)
        )
        weights = (q.T @ k / math.sqrt(len(q))).softmax(1)
        images.append((v @ weights.T).view(len(v), *x.shape[-2:]))
    return module.join(torch.cat([x, module.back(torch.stack(images))], 1))


def channels(student, teacher, method):
    mine, contrast = method.channels, method.contrast_temperature
    student, teacher = (F.avg_pool2d(f, 4, ceil_mode=True) for f in (student, teacher))
    ours = [F.normalize(f.flatten(1), dim=1) for f in mine.projection(student)]
    theirs = [F.normalize(f.flatten(1), dim=1) for f in teacher]
    terms = {"channel": pairs(ours, theirs, contrast)}
    s, t = torch.cat(ours), torch.cat(theirs)
    terms["channel_mse"] = (s - t).square().mean()
    d, length = s.shape[1], mine.queue.contents().shape[2]
    chosen = t[torch.randperm(len(t))[: mine.updates]]
    enqueue(mine.queue, 0, torch.cat([chosen, chosen.new_zeros(len(chosen), length - d)], 1))
    order = torch.randperm(mine.queue.size)[: method.channel_contrast]
    keys = mine.queue.contents()[0][order][:, :d]
    keys = keys if d == length else F.normalize(keys, dim=1)
    scale = method.contrast_kd_temperature
    tables = (s @ keys.T / contrast, t @ keys.T / contrast)
    terms["channel_memory"] = scale**2 * divergence(*tables, scale).mean()
    return terms


def cirkd_minibatch(student: Taps, teacher: Taps, labels, method):
    return {
        "kd": kd(student.logits, teacher.logits, method.temperature),
        "batch": batch(student.head, teacher.head, method),
    }


def cirkd_memory(student: Taps, teacher: Taps, labels, method):
    return {
        "kd": kd(student.logits, teacher.logits, method.temperature),
        **memory(student.head, teacher.head, labels, method),
    }


def cirkd(student: Taps, teacher: Taps, labels, method):
    return {
        **cirkd_minibatch(student, teacher, labels, method),
        **memory(student.head, teacher.head, labels, method),
    }


def cirkdv2(student: Taps, teacher: Taps, labels, method):
    feature = resized(gcn(method.gcn, student.head), teacher.head)
    adapted = F.conv2d(feature, method.adaptor.weight)
    graph = Taps(logits=student.logits, head=feature)
    return {
        **cirkd(graph, teacher, labels, method),
        "fitnet": (adapted - teacher.head).square().mean(),
        **channels(feature, teacher.head, method),
    }


ORACLES = {
    "cirkd": cirkd,
    "cirkd:minibatch": cirkd_minibatch,
    "cirkd:memory": cirkd_memory,
    "cirkdv2": cirkdv2,
}
