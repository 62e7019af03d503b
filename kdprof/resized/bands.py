"""The form of a CPU: blocks of the resized logits, each of which stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdprof.method import IGNORE
from kdprof.resized.bilinear import BAND_ROWS, Resize, Span

BLOCK_ELEMENTS = 2**21
"""The most resized logits that exist at a time: 8 MiB in float32. A block has at least one row of
all classes, even if that is more. More blocks cost more calls, and with several threads each call
waits for the slowest; larger blocks leave the cache."""
BLOCK_COLUMNS = 512
LOWEST = -60.0
"""Below this, a sum of exponentials could lose its largest term to underflow in float32."""


def _blocks(shape: torch.Size, size: tuple[int, int]) -> Iterator[tuple[Span, Span, Span]]:
    """Yield the images, rows and columns of each block; small images share a block."""
    images, classes = shape[:2]
    columns = min(size[1], BLOCK_COLUMNS)
    rows = min(size[0], BAND_ROWS, max(1, BLOCK_ELEMENTS // (classes * columns)))
    whole = (rows, columns) == size
    together = max(1, BLOCK_ELEMENTS // (classes * rows * columns)) if whole else 1
    for some in _spans(images, together):
        for band in _spans(size[0], rows):
            for part in _spans(size[1], columns):
                yield some, band, part


def _spans(length: int, most: int) -> Iterator[Span]:
    for first in range(0, length, most):
        yield slice(first, min(first + most, length))


def _resized_blocks(
    maps: Tensor, size: tuple[int, int], resize: Resize
) -> Iterator[tuple[Tensor, tuple[Span, Span, Span]]]:
    """Yield each block of the resized maps, (N, C, rows, columns), and where it lies.

    A block may be changed; the next one overwrites it.
    """
    memory = maps.new_empty(0)
    for place in _blocks(maps.shape, size):
        images, rows, columns = place
        some = maps[images]
        shape = torch.Size((*some.shape[:2], rows.stop - rows.start, columns.stop - columns.start))
        if not len(memory):  # the first block is the largest
            memory = maps.new_empty(shape.numel())
        out = memory[: shape.numel()].view(shape)
        yield resize.block(some, rows, columns, out), place


@torch.library.custom_op(
    "kdprof::banded_cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor labels, bool align_corners) -> (Tensor, Tensor)",
)
def banded_cross_entropy(
    logits: Tensor, labels: Tensor, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over valid pixels, and its gradient to the logits.

    Args:
        logits: (N, C, h, w), float32 or float64.
        labels: (N, H, W) integers.

    The gradient has the logits' memory layout. It is computed with the loss, because both need the
    softmax of the same block. This is one operator to torch, so that a step is counted on fake
    tensors without its hundreds of blocks.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _cross_entropy(logits, labels, align_corners)


@banded_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), torch.empty_like(logits)


def _cross_entropy(logits: Tensor, labels: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    size = labels.shape[-2], labels.shape[-1]
    # The weights of a resize add up to 1, so this subtracts one number from all logits of a pixel,
    # which does not change their softmax. Now no exponential overflows.
    maps = (logits - logits.amax(1, keepdim=True)).contiguous()
    deep = not maps.amin() > LOWEST
    valid = labels != IGNORE
    weight, label = valid.to(maps.dtype), labels.long().where(valid, 0)
    resize = Resize(maps, size, align_corners)
    gradient = torch.zeros_like(maps)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block, (images, rows, columns) in _resized_blocks(maps, size, resize):
        if deep:
            block -= block.amax(1, keepdim=True)
        chosen, counted = (
            pixels[images, rows, columns].flatten(1)[:, None] for pixels in (label, weight)
        )
        total += _softmax_loss(block.flatten(2), chosen, counted)
        resize.add_transposed(block, rows, columns, gradient[images])
    return total.to(logits.dtype), torch.empty_like(logits).copy_(gradient)


def _softmax_loss(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return the cross-entropy summed with weights; the logits become its gradient.

    Args:
        logits: (N, C, P), with no large positive number.
        label: (N, 1, P) int64.
        weight: (N, 1, P), 0 for a void pixel.

    Raises:
        RuntimeError: a label is not a class.
    """
    chosen = logits.gather(1, label)
    norm = logits.exp_().sum(1, keepdim=True)
    loss = (norm.log() - chosen).flatten().dot(weight.flatten())
    logits *= weight / norm
    logits.scatter_add_(1, label, -weight)
    return loss


def banded_argmax(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Return the class of the largest resized logit, (N, H, W) int64; of equal ones the first.

    Args:
        logits: (N, C, h, w), float32 or float64.
    """
    maps, classes = logits.contiguous(), logits.shape[1]
    found = torch.empty(len(maps), *size, dtype=torch.int64, device=maps.device)
    # torch's argmax over classes that are not next to each other takes ten times as long.
    narrow = torch.uint8 if classes < 256 else torch.int64
    rank = torch.arange(classes, 0, -1, dtype=narrow, device=maps.device)[:, None, None]
    with torch.autocast(maps.device.type, enabled=False):
        resize = Resize(maps, size, align_corners)
        for block, (images, rows, columns) in _resized_blocks(maps, size, resize):
            largest = (block == block.amax(1, keepdim=True)).to(narrow).mul_(rank).amax(1)
            # Where one is NaN, no class is the largest.
            found[images, rows, columns] = (classes - largest.long()).clamp_(max=classes - 1)
    return found
