"""Evaluation: predictions of whole images, confusion matrix, mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.data import DataOnDisk, SegmentationData, evaluation_batches, fitted_size
from kdprof.errors import Problems, UserError
from kdprof.hardware.device import autocast, configure_backends, placed
from kdprof.method import IGNORE, Network
from kdprof.models import AnyNetwork, build, is_adapted
from kdprof.models.adapted import build_adapted
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import check_weights, load_weights, read_weights
from kdprof.models.zoo import Reported, reported
from kdprof.pauses import running_s
from kdprof.progress import Progress
from kdprof.records import AbsentClasses
from kdprof.resized import resized_argmax


@dataclass(frozen=True)
class Scores:
    """Scores as fractions. None for a class that is left out of the mean.

    Attributes:
        miou, per_class: intersection over union.
        macc: mean over classes of the share of a class's pixels that is predicted right.
        pixel_accuracy: share of all valid pixels that is predicted right.
    """

    miou: float
    per_class: list[float | None]
    macc: float
    pixel_accuracy: float


@dataclass(frozen=True)
class Views:
    """How images are given to a network in evaluation.

    Attributes:
        window: height and width of a sliding window, pixels; None = the whole image at once.
        stride: distance between windows, pixels, at most the window; None = the window. They lie as
            in mmsegmentation, the last one at the border.
        scales: factors that the image is resized by; softmax is averaged over them.
        flip: True to predict the mirrored image at each scale as well.
        fit: size that the image is first resized to fit, see :func:`kdprof.data.augment.fitting`.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fit: tuple[int, int] | None = None


WHOLE = Views()
SIZE_PERIOD = 32
"""Networks that halve an image five times refuse a side by its remainder modulo 32."""
SIZES_NAMED = 3
"""How many problems with image sizes are reported."""


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the (classes, classes) int64 counts, rows = label, columns = prediction.

    Args:
        predicted, labels: integer tensors of one shape; pixels labelled :data:`IGNORE` are left
            out.
    """
    valid = labels != IGNORE
    pairs = labels[valid].long() * classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores(confusion: Tensor, absent_classes: AbsentClasses = "skip") -> Scores:
    """Return IoU per class and its mean.

    Args:
        absent_classes: ``skip`` for the mean over the classes present in the labels; ``zero`` to
            count a class that is predicted, but not in the labels, with an IoU of 0, as
            mmsegmentation and CIRKD do. A class that is neither has no IoU.
    """
    confusion = confusion.double().cpu()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    present = confusion.sum(1) > 0
    counted = present if absent_classes == "skip" else union > 0
    iou = hit / union.clamp(min=1)
    per_class = [float(v) if c else None for v, c in zip(iou, counted, strict=True)]
    recall = (hit / confusion.sum(1).clamp(min=1))[present]
    accuracy = hit.sum() / confusion.sum().clamp(min=1)
    return Scores(float(iou[counted].mean()), per_class, float(recall.mean()), float(accuracy))


def predict(network: Network, images: Tensor, views: Views = WHOLE) -> Tensor:
    """Return scores (N, C, H, W) at the images' size: the logits, or the sum of the softmax over
    several views.

    Args:
        images: (N, 3, H, W) RGB in 0..255.
    """
    size = _size_of(images)
    if views.scales == (1.0,) and not views.flip:
        fitted = _rescaled(images, fitted_size(size, views.fit))
        return _resized(_logits(network, fitted, views), size, network)
    total: Tensor | None = None
    for scale in views.scales:
        scaled = _rescaled(images, fitted_size(size, views.fit, scale))
        for mirrored in (False, True) if views.flip else (False,):
            found = _logits(network, scaled.flip(-1) if mirrored else scaled, views)
            found = _resized(found.flip(-1) if mirrored else found, size, network)
            probabilities = found.softmax(1)
            total = probabilities if total is None else total + probabilities
    assert total is not None, "views have at least one scale"
    return total


def predict_classes(network: Network, images: Tensor, views: Views = WHOLE) -> Tensor:
    """Return the class with the highest score at each pixel, (N, H, W) int64.

    The scores are those of :func:`predict`, but their map is not made where it is one resize of the
    network's logits.
    """
    size = _size_of(images)
    several = views.flip or views.window is not None or views.scales != (1.0,)
    if several or fitted_size(size, views.fit) != size:
        return predict(network, images, views).argmax(1)
    return resized_argmax(network(images, ["logits"]).logits, size, network.align_corners)


def _size_of(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width


def _rescaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images.float(), size, mode="bilinear")


def _resized(logits: Tensor, size: tuple[int, int], network: Network) -> Tensor:
    if logits.shape[-2:] == size:
        return logits.float()
    align = network.align_corners
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align)


def _logits(network: Network, images: Tensor, views: Views) -> Tensor:
    """Return logits at the images' size: with windows, the mean of those that contain a pixel."""
    size = _size_of(images)
    if views.window is None:
        return _resized(network(images, ["logits"]).logits, size, network)
    total: Tensor | None = None
    seen = torch.zeros(size, device=images.device)
    for rows in _places(size[0], views.window[0], (views.stride or views.window)[0]):
        for columns in _places(size[1], views.window[1], (views.stride or views.window)[1]):
            part = images[..., rows, columns]
            found = _resized(network(part, ["logits"]).logits, _size_of(part), network)
            if total is None:
                total = found.new_zeros(*found.shape[:2], *size)
            total[..., rows, columns] += found
            seen[rows, columns] += 1
    assert total is not None, "an image has at least one window"
    return total / seen


def _places(length: int, window: int, stride: int) -> list[slice]:
    """Return the positions of windows along a side; the last window ends at the border."""
    assert stride <= window, "windows that leave pixels out were refused"
    count = max(0, length - window + stride - 1) // stride + 1
    ends = [min(length, place * stride + window) for place in range(count)]
    return [slice(max(0, end - window), end) for end in ends]


def evaluated_sizes(data: DataOnDisk, views: Views) -> set[tuple[int, int]]:
    """Return the heights and widths that a network gets in evaluation, pixels, from the headers of
    the images."""
    found = set()
    for size in {data.size(index) for index in range(len(data))}:
        for scale in views.scales:
            height, width = fitted_size(size, views.fit, scale)
            window = views.window or (height, width)
            found.add((min(height, window[0]), min(width, window[1])))
    return found


def size_problems(networks: Iterable[AnyNetwork], sizes: Collection[tuple[int, int]]) -> list[str]:
    """Return why networks cannot be evaluated on images of some sizes (height, width), pixels.

    Of many sizes it tries some: the smallest, the largest, and for each remainder of a height or a
    width modulo :data:`SIZE_PERIOD` one.
    """
    tried = [(network, size) for network in networks for size in _different(sizes)]
    refused = [network.check_input(1, size, training=False) for network, size in tried]
    found = list(dict.fromkeys(problem for problem in refused if problem))
    more = len(found) - SIZES_NAMED
    return found[:SIZES_NAMED] + ([f"and {more} more sizes of images"] if more > 0 else [])


def _different(sizes: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return sizes that stand for all."""
    ordered = sorted(sizes, key=lambda size: (min(size), max(size)))
    heights = {height % SIZE_PERIOD: (height, width) for height, width in ordered}
    widths = {width % SIZE_PERIOD: (height, width) for height, width in ordered}
    chosen = {*ordered[:1], *ordered[-1:], *heights.values(), *widths.values()}
    return [size for size in ordered if size in chosen]


def mean_iou(per_class: Iterable[float | None]) -> float | None:
    """Return the mean over the classes that have an IoU; None if no class has one."""
    found = [iou for iou in per_class if iou is not None]
    return sum(found) / len(found) if found else None


@torch.no_grad()
def evaluate(
    network: Network,
    data: SegmentationData,
    device: torch.device,
    *,
    batch: int,
    autocast: torch.autocast,
    decide: Callable[[Tensor], Tensor] | None = None,
    views: Views = WHOLE,
    absent_classes: AbsentClasses = "skip",
    advance: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Return the scores of a network on a data set, at the original size of the images.

    ``decide`` maps logits to the scores whose argmax is the prediction; leave it out if these are
    the logits themselves, which saves their resized map. ``advance`` is called with the number of
    images of every batch.

    The network is left in training mode, as a run needs it.

    Raises:
        UserError: every pixel of the labels is void, or a file cannot be used.
    """
    network.eval()
    total = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64, device=device)
    for images, labels in evaluation_batches(data, batch):
        with autocast:
            found = (predict if decide else predict_classes)(network, images.to(device), views)
        predicted = decide(found).argmax(1) if decide else found
        total += confusion_matrix(predicted, labels.to(device), data.num_classes)
        advance(len(images))
    network.train()
    if not total.any():
        raise UserError(
            f"every label of {data.name} {data.split} is void, so nothing can be scored; check the "
            "label values"
        )
    return scores(total, absent_classes)


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate_file`.

    Attributes:
        network: full name of the network in the file.
        loaded: one-line summary of the entries that were loaded.
        missing: entries of the network's auxiliary head that the file lacks.
        left: entries of the file's auxiliary head that the network does not have.
        absent_classes: which classes the mIoU is the mean over, see :func:`scores`.
        images_per_second: including the time to read the images.
        reported: published scores of the file; None if it is not a known file.
    """

    network: str
    loaded: str
    missing: list[str]
    left: list[str]
    data: str
    split: str
    images: int
    class_names: tuple[str, ...]
    scores: Scores
    absent_classes: AbsentClasses
    images_per_second: float
    reported: Reported | None


def evaluate_file(
    model: str,
    path: Path,
    data: DataOnDisk,
    device: torch.device,
    *,
    batch: int,
    precision: str,
    views: Views,
    absent_classes: AbsentClasses = "skip",
    progress: Progress,
) -> Evaluation:
    """Evaluate a file of weights on a data set.

    Args:
        model: the network's name; if it names no layout, that of the file is used.
        precision: fp32, tf32, bf16 or fp16.

    Raises:
        UserError: the file holds another network, or other classes, or the network cannot take
            images of these sizes.
    """
    file = open_weights(path)
    adapted = build_adapted(model, data.num_classes) if is_adapted(model) else None
    weights = read_weights(file, adapted)
    name = check_weights(weights, model, data.class_names)
    network = adapted or build(name, data.num_classes)
    Problems(size_problems([network], evaluated_sizes(data, views))).refuse()
    loaded = load_weights(network, weights)
    configure_backends(device, precision)
    placed(network, device, channels_last=True)
    with progress.task("images", len(data)) as advance:
        began = running_s()
        found = evaluate(
            network,
            data,
            device,
            batch=batch,
            autocast=autocast(device, precision),
            views=views,
            absent_classes=absent_classes,
            advance=advance,
        )
        elapsed_s = running_s() - began
    return Evaluation(
        network=str(name),
        loaded=f"{weights.told()}: {loaded.summary()}",
        missing=loaded.missing,
        left=loaded.left,
        data=data.name,
        split=data.split,
        images=len(data),
        class_names=data.class_names,
        scores=found,
        absent_classes=absent_classes,
        images_per_second=len(data) / elapsed_s,
        reported=reported(weights.path),
    )
