"""Whole-image evaluation: confusion matrix and mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.data import SegmentationData, evaluation_batches
from kdprof.method import IGNORE
from kdprof.models import SegmentationNetwork


@dataclass(frozen=True)
class Scores:
    """Intersection over union, as fractions. None for a class absent from the labels."""

    miou: float
    per_class: list[float | None]


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the (classes, classes) int64 counts, rows = label, columns = prediction.

    Args:
        predicted, labels: integer tensors of one shape; pixels labelled :data:`IGNORE` are left
            out.
    """
    valid = labels != IGNORE
    pairs = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores(confusion: Tensor) -> Scores:
    """Return IoU per class and its mean over the classes present in the labels."""
    confusion = confusion.double().cpu()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    present = confusion.sum(1) > 0
    iou = hit / union.clamp(min=1)
    per_class = [float(v) if p else None for v, p in zip(iou, present, strict=True)]
    return Scores(float(iou[present].mean()), per_class)


def mean_iou(per_class: Iterable[float | None]) -> float | None:
    """Return the mean over the classes that the labels show; None where they show none."""
    found = [iou for iou in per_class if iou is not None]
    return sum(found) / len(found) if found else None


@torch.no_grad()
def evaluate(
    network: SegmentationNetwork,
    data: SegmentationData,
    device: torch.device,
    *,
    batch: int,
    autocast: torch.autocast,
    decide: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Return the scores of a network over whole images at their own size.

    ``decide`` turns logits into what the prediction is the argmax of, where that is not the logits.

    The network is left in training mode, as a run needs it.
    """
    network.eval()
    total = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64, device=device)
    for images, labels in evaluation_batches(data, batch):
        with autocast:
            logits = network(images.to(device), ["logits"]).logits
        resized = F.interpolate(
            logits.float(),
            labels.shape[-2:],
            mode="bilinear",
            align_corners=network.align_corners,
        )
        if decide is not None:
            resized = decide(resized)
        total += confusion_matrix(resized.argmax(1), labels.to(device), data.num_classes)
    network.train()
    return scores(total)
