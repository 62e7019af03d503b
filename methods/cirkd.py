"""Cross-image relational knowledge distillation (CIRKD), whole and in parts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._recipes import (
    BPKD_RERUN,
    VOC_WEIGHTS,
    attnfd,
    cirkd,
    cirkd_segformer,
    mmseg,
)
from kdprof.methods.ifvd import membership
from kdprof.methods.kd import pixel_kl

EPS = 1e-12
"""Smallest length that has a direction, as in torch's ``normalize``."""
BLOCK_ELEMENTS = 2**22
"""Elements of a similarity map that is held at a time: 16 MiB, which the caches of large
processors hold."""
LEAST_ROWS = 128
"""Rows of such a map at least, so that a matrix product stays one of matrices."""


def unit(values: Tensor, dim: int) -> Tensor:
    """Return float32 vectors of length 1 along ``dim``; a vector of length 0 stays 0.

    Its gradient is 0, too: the published code divides it by 1e-12, which overflows.
    """
    values = values.float()
    length = values.norm(dim=dim, keepdim=True)
    return torch.where(length > EPS, values / length.clamp(min=EPS), 0.0)


def unit_positions(features: Tensor) -> Tensor:
    """Return the unit vectors of all positions of (N, C, h, w), image by image: (N h w, C)."""
    return unit(features.permute(0, 2, 3, 1).flatten(0, 2), 1)


# Relations: the divergence of two similarity maps that are never whole.


class _RelationKL(torch.autograd.Function):
    """See :func:`relation_kl`.

    Rows are taken in blocks, so that memory grows with rows + columns and not with their product.
    The gradient is taken in the same pass: it is linear in what backward is given, which is one
    number, and a second pass over the maps would cost the matrix products once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        keys: Tensor | None,
        parts: int,
        temperature: float,
        weights: Tensor | None,
    ) -> Tensor:
        ours, theirs = (student, teacher) if keys is None else (keys, keys)
        total = student.new_zeros(())
        gradient = student.new_zeros(student.shape) if ctx.needs_input_grad[0] else None
        rows = max(LEAST_ROWS, BLOCK_ELEMENTS // len(ours))
        for first in range(0, len(student), rows):
            block = slice(first, first + rows)
            log_p = _log_similarity(teacher[block], theirs, parts, temperature)
            log_q = _log_similarity(student[block], ours, parts, temperature)
            p = log_p.exp()
            divergence = log_p.sub_(log_q).mul_(p).sum((1, 2))
            slope = log_q.exp_().sub_(p).flatten(1)
            if weights is not None:
                divergence *= weights[block]
                slope *= weights[block, None]
            total += divergence.sum()
            if gradient is not None:
                torch.addmm(gradient[block], slope, ours, out=gradient[block])
                if keys is None:  # a row is also what others are compared with
                    torch.addmm(gradient, slope.T, student[block], out=gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(temperature))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None, None, None


def _log_similarity(rows: Tensor, columns: Tensor, parts: int, temperature: float) -> Tensor:
    """Return the log-softmax of rows . columns / T within each part of the columns, (b, parts,
    columns of a part)."""
    similar = (rows / temperature) @ columns.T
    return similar.view(len(rows), parts, -1).log_softmax(2)


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    keys: Tensor | None = None,
    parts: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """Return sum_r w_r sum_parts KL( softmax(t_r . K / T) || softmax(s_r . K / T) ).

    Args:
        student, teacher: one vector for each row r, (R, C); the C may differ where keys is None.
        keys: what both are compared with, (M, C), without gradient; None: the student's rows
            among themselves, and the teacher's, both with gradient to the student.
        parts: the columns are this many groups of equal size, each with a softmax of its own.
        weights: (R,); None: all 1.

    Never more than a few blocks of R x M are held, forward and backward. Backward costs nothing:
    forward has made the gradient. Not differentiable twice.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _RelationKL.apply(student, teacher, keys, parts, temperature, weights)


def batch_relation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the relations within and across images.

    Args:
        student, teacher: (N, P, C), P unit vectors for each of N images.

    Returns:
        The mean over the N^2 ordered pairs of images and the P rows of each pair's similarity map;
        softmax over the P columns.
    """
    images, rows = student.shape[:2]
    total = relation_kl(student.flatten(0, 1), teacher.flatten(0, 1), temperature, parts=images)
    return total / (images**2 * rows)


def mini_batch_kl(student: Tensor, teacher: Tensor, temperature: float, pooling: int = 0) -> Tensor:
    """Return the mini-batch pixel-to-pixel term of (N, C, h, w) features; the C may differ.

    Args:
        pooling: see :class:`CIRKDMiniBatch`.
    """
    student = match_grid(student, teacher)
    window = pooling or (4 if min(teacher.shape[-2:]) >= 256 else 1)
    if window > 1:
        student, teacher = (F.avg_pool2d(f, window, ceil_mode=True) for f in (student, teacher))
    images = len(student)
    ours, theirs = (unit_positions(f).unflatten(0, (images, -1)) for f in (student, teacher))
    return batch_relation(ours, theirs, temperature)


# Memories.


def gathered(values: Tensor) -> Tensor:
    """Return the values of all ranks, one after the other along the first dimension.

    Shapes must be those of every rank: as many images on each.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


class RingQueues(nn.Module):
    """Ring memories of one length, such as one for each class, that start as random directions.

    Where a push of k vectors reaches or passes the end, it goes to the last k slots and the pointer
    to 0 (the published rule; of one vector at a time, an ordinary ring).
    """

    def __init__(self, queues: int, size: int, channels: int):
        super().__init__()
        self.queues, self.size = queues, size
        # The last row belongs to no queue. What is not to be stored is written there, so that
        # shapes are fixed, then cleared.
        rows = torch.randn(queues * size + 1, channels)
        rows /= rows.norm(dim=1, keepdim=True)
        rows[-1] = 0
        self.register_buffer("rows", rows)
        self.register_buffer("pointers", torch.zeros(queues, dtype=torch.long))

    def contents(self) -> Tensor:
        """Return the memory itself, (queues, size, C)."""
        return self.rows[:-1].view(self.queues, self.size, -1)

    def keys(self, number: int, order: Tensor | None = None) -> Tensor:
        """Return the same ``number`` random slots of every queue, (queues number, C).

        Args:
            order: a permutation of the slots whose first entries are taken; None: drawn.
        """
        if order is None:
            order = torch.randperm(self.size, device=self.rows.device)
        return self.contents().index_select(1, order[:number]).flatten(0, 1)

    @torch.no_grad()
    def push(self, values: Tensor, counts: Tensor) -> None:
        """Store the first ``counts`` of the values of each turn and queue, turn after turn.

        Args:
            values: (turns, queues, most, C); ``most`` is at most the size.
            counts: (turns, queues) int64, 0 to ``most``.
        """
        most = values.shape[2]
        starts = self._take_turns(counts, most)
        slots = starts[:, :, None] + torch.arange(most, device=starts.device)
        stored = slots < (starts + counts)[:, :, None]
        turns = torch.arange(len(counts), device=starts.device)
        later = turns[None, :, None, None] > turns[:, None, None, None]
        again = (slots[:, None] >= starts[..., None]) & (
            slots[:, None] < (starts + counts)[..., None]
        )
        stored &= ~(later & again).any(1)
        first = self.size * torch.arange(self.queues, device=starts.device)
        places = torch.where(stored, slots + first[:, None], self.queues * self.size)
        self.rows.index_copy_(0, places.flatten(), values.flatten(0, 2).to(self.rows.dtype))
        self.rows[-1].zero_()

    def _take_turns(self, counts: Tensor, most: int) -> Tensor:
        """Move the pointers on and return the first slot of every push, (turns, queues).

        Between two pushes that reach the end the pointer is a running sum; so there is one round
        for each such push that there can be, which is one at the published sizes.
        """
        turns = len(counts)
        ends = counts.cumsum(0)
        turn = torch.arange(turns, device=counts.device)[:, None]
        offset = self.pointers.expand(turns, -1)
        wrapped = torch.full_like(self.pointers, -1)
        for _ in range(min(turns, 1 + turns * most // self.size)):
            full = (offset + ends >= self.size) & (turn > wrapped)
            wrapped = torch.where(full, turn, turns).amin(0)
            before = ends.gather(0, wrapped.clamp(max=turns - 1)[None])
            offset = torch.where(turn > wrapped, -before, offset)
        starts, stops = offset + ends - counts, offset + ends
        self.pointers.copy_(torch.where(stops[-1] >= self.size, 0, stops[-1]))
        return torch.where(stops >= self.size, self.size - counts, starts)


def distinct(counts: Tensor, number: int) -> Tensor:
    """Return ``number`` different random integers from 0 to count - 1 for each count.

    Every subset is equally likely (Floyd's way; nothing is sorted and no shape depends on a
    count). Of a count below ``number`` only the first ``count`` are meant.
    """
    draws = torch.rand(*counts.shape, number, device=counts.device)
    lowest = (counts - number).clamp(min=0)
    chosen = torch.full_like(draws, -1, dtype=torch.long)
    for i in range(number):
        highest = lowest + i
        pick = (draws[..., i] * (highest + 1)).long().minimum(highest)
        taken = (chosen == pick[..., None]).any(-1)
        chosen[..., i] = torch.where(taken, highest, pick)
    return chosen


def positions_of_ranks(members: Tensor, ranks: Tensor) -> Tensor:
    """Return where in the image the r-th position of a class is, in raster order.

    Args:
        members: one-hot labels, (N, P, K).
        ranks: (N, K, m); of what reaches beyond the class, any position is returned.
    """
    members = members.int()
    positions = members.shape[1]
    counts = members.sum(1)
    begins = counts.cumsum(1) - counts
    # Counting sort by class. Void positions go to one place behind the end.
    places = members.cumsum(1).sub_(1).add_(begins[:, None]).mul_(members).sum(2)
    places = torch.where(members.sum(2) > 0, places, positions)
    raster = torch.arange(positions, device=members.device).expand_as(places)
    table = raster.new_zeros(len(members), positions + 1).scatter(1, places, raster)
    wanted = (begins[:, :, None] + ranks).clamp(max=positions)
    return table.gather(1, wanted.flatten(1)).view_as(ranks)


def projector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Return 1x1 convolution, batch norm, ReLU, 1x1 convolution; no biases."""
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
        nn.BatchNorm2d(teacher_channels),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
    )


class ClassMemory(nn.Module):
    """Teacher pixels and class means of past batches, and the relations of the present one to them.

    Args:
        pixel_size, region_size: slots of each class.
        updates: pixels stored at most for each image and class.
        own_pixels: see :class:`CIRKDMemory`.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        num_classes: int,
        pixel_size: int,
        region_size: int,
        updates: int,
        own_pixels: bool = False,
    ):
        super().__init__()
        self.updates, self.own_pixels = updates, own_pixels
        self.projection = projector(*channels)
        self.pixels = RingQueues(num_classes, pixel_size, channels[1])
        self.regions = RingQueues(num_classes, region_size, channels[1])

    @torch.no_grad()
    def update(self, units: Tensor, members: Tensor, ranks: Tensor | None = None) -> None:
        """Store the present batch, of all ranks where there are several.

        Args:
            units: the teacher's unit vectors, (N, P, C).
            members: one-hot labels, (N, P, K); a void row is 0.
            ranks: which of as many pixels as a class has are stored, (N, K, updates); None: drawn.

        What is chosen is sent, not whole feature maps; so all ranks' memories stay equal.
        """
        counts = members.sum(1).long()
        if ranks is None:
            ranks = distinct(counts, self.updates)
        positions = positions_of_ranks(members, ranks) if self.own_pixels else ranks
        wanted = positions.flatten(1).clamp(max=units.shape[1] - 1)
        pixels = units.gather(1, wanted[:, :, None].expand(-1, -1, units.shape[2]))
        pixels = pixels.unflatten(1, positions.shape[1:])
        with torch.autocast(units.device.type, enabled=False):
            means = (members.mT @ units) / counts.clamp(min=1)[:, :, None]
        counts = gathered(counts)
        self.regions.push(gathered(unit(means, 2))[:, :, None], counts.clamp(max=1))
        self.pixels.push(gathered(pixels), counts.clamp(max=self.updates))

    def relation(
        self, student: Tensor, teacher: Tensor, members: Tensor, keys: Tensor, *temperatures: float
    ) -> Tensor:
        """Return T'^2 KL of the similarities with the keys over T T', mean over valid positions.

        Args:
            student, teacher: unit vectors, (N P, C).
            temperatures: T of the contrast, T' of the divergence.
        """
        contrast, divergence = temperatures
        valid = members.sum(2).flatten()
        weights = divergence**2 * valid / valid.sum().clamp(min=1)
        return relation_kl(student, teacher, contrast * divergence, keys, weights=weights)


# The methods.


class CIRKDMiniBatch(Method):
    """The mini-batch part of CIRKD alone, beside kd (kdprof's subset; not published as such).

    F = head features as unit vectors over channels. For every ordered pair (i, j) of the images on
    one device, i = j included, S_ij = F_i^T F_j / T, (h w) x (h w), and
    L_batch = 1 / N^2 sum_ij mean over rows KL( softmax S^T_ij || softmax S^S_ij ), T = 0.1, weight
    1, beside kd at weight 1. Void positions count, nothing crosses devices; with one image per
    device nothing crosses images.

    ``pooling``: 0 is the authors' rule of 2025, 4x4 averages where both sides have 256 positions or
    more and none below; k > 0 is k x k averages always (their 2022 code has 2 as a switch, and they
    advise it where memory is short). Where grids differ the student's feature is resized bilinearly
    to the teacher's (kdprof's rule).

    The published form holds maps of N^2 (h w)^2; here they are taken in blocks and the gradient is
    made in the forward pass, so backward takes no time: read both together.
    """

    name = "cirkd:minibatch"
    title = "Cross-image relational distillation, mini-batch part"
    paper = "CVPR 2022, arXiv 2204.06986"
    family = "relational + logit"
    taps = ("logits", "head")
    weights = {"kd": 1.0, "batch": 1.0}
    equation = (
        "S_ij = F_i^T F_j / T for images i, j; L_batch = 1 / N^2 sum_ij mean over rows KL( "
        "softmax S^T_ij || softmax S^S_ij )"
    )
    cost_drivers = (
        "the teacher's forward; (h w)^2 similarities of every ordered pair of images on the "
        "device, in blocks: grows with the square of images and of positions"
    )

    temperature: float = 1.0
    batch_temperature: float = 0.1
    pooling: int = 0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature", "batch_temperature"))
        if self.pooling < 0:
            raise UserError(f"method '{self.name}': pooling must be 0 or more, not {self.pooling}")

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``kd`` and ``batch``."""
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            "batch": self._batch(student.head, teacher.head),
        }

    def _batch(self, student: Tensor, teacher: Tensor) -> Tensor:
        note = (
            "one image per device: the batch term relates the positions of one image, and nothing "
            "crosses images"
        )
        if len(student) == 1 and note not in self.notes:
            self.notes.append(note)
        return mini_batch_kl(student, teacher, self.batch_temperature, self.pooling)


class CIRKDMemory(Method):
    """The memory part of CIRKD alone, beside kd (kdprof's subset; not published as such).

    t_p, s_p = unit vectors of the teacher's head feature and of the student's projected one (1x1
    convolution, batch norm, ReLU, 1x1 convolution, to the teacher's channels) at position p; keys K
    = stored teacher vectors, the same for both. L = T'^2 mean over valid p of
    KL( softmax(t_p . K / T T') || softmax(s_p . K / T T') ), T = 0.1, T' = 1, for ``pixel`` and
    ``region`` at weight 0.1 each (VOC 0.01), beside kd 1.

    Each class has a ring of 20000 pixels and one of 2000 regions (SegFormer students: 2000 and
    2000). Before the terms are taken the batch is stored: of each image and class the mean of its
    unit vectors as a region, and up to 16 pixels. One random set of slots, the same in every class,
    gives the keys: 4096 // classes + 1 pixels and 1024 // classes + 1 regions of each. Of several
    ranks all store the images of all.

    The authors' code draws those 16 pixels among as many as the class has, but takes them at the
    first positions of the image, whatever their class; the published numbers have this, and it is
    the default. ``own_pixels`` takes pixels of the class itself, as the paper says. Where every
    pixel is void the authors get NaN; here the terms are 0.

    Labels are resized by nearest; where grids differ the student's feature is resized bilinearly to
    the teacher's before it is projected (kdprof's rule). The similarities are taken in blocks and
    the gradient is made in the forward pass, so backward takes no time: read both together.
    """

    name = "cirkd:memory"
    title = "Cross-image relational distillation, memory part"
    paper = "CVPR 2022, arXiv 2204.06986"
    family = "relational + logit"
    taps = ("logits", "head", "labels")
    weights = {"kd": 1.0, "pixel": 0.1, "region": 0.1}
    equation = (
        "L = T'^2 mean over p of KL( softmax( t_p . K / T T' ) || softmax( s_p . K / T T' ) ), K "
        "of the stored pixels or regions"
    )
    cost_drivers = (
        "the teacher's forward; similarities of every position with about 5000 stored vectors, in "
        "blocks; a projection; storing each batch in two memories"
    )

    temperature: float = 1.0
    contrast_temperature: float = 0.1
    contrast_kd_temperature: float = 1.0
    pixel_memory: int = 20_000
    region_memory: int = 2_000
    pixel_contrast: int = 4_096
    region_contrast: int = 1_024
    pixel_updates: int = 16
    own_pixels: bool = False

    def __init__(self, **settings):
        super().__init__(**settings)
        sizes = ("pixel_memory", "region_memory", "pixel_contrast", "region_contrast")
        temperatures = ("temperature", "contrast_temperature", "contrast_kd_temperature")
        check_settings(self, positive=(*temperatures, *sizes, "pixel_updates"))
        if self.pixel_updates > self.pixel_memory:
            raise UserError(
                f"method '{self.name}': pixel_updates ({self.pixel_updates}) must not be above "
                f"pixel_memory ({self.pixel_memory})"
            )

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the projection and the memories."""
        self.num_classes = student.num_classes
        channels = student.channels["head"], teacher.channels["head"]
        self.memory = ClassMemory(
            channels,
            self.num_classes,
            self.pixel_memory,
            self.region_memory,
            self.pixel_updates,
            self.own_pixels,
        )
        slots = self.num_classes * (self.pixel_memory + self.region_memory)
        self.notes.append(
            f"the memories hold {slots} vectors of {channels[1]} channels, "
            f"{4e-6 * slots * channels[1]:.0f} MB, on the device and in every checkpoint"
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Store the batch; return ``kd``, ``pixel`` and ``region``."""
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            **self._memory(student.head, teacher.head, labels),
        }

    def _memory(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        members = membership(labels, teacher.shape[-2:], self.num_classes)
        projected = self.memory.projection(match_grid(student, teacher))
        ours, theirs = unit_positions(projected), unit_positions(teacher)
        self.memory.update(theirs.unflatten(0, members.shape[:2]), members)
        temperatures = self.contrast_temperature, self.contrast_kd_temperature
        queues = {
            "pixel": (self.memory.pixels, self.pixel_contrast),
            "region": (self.memory.regions, self.region_contrast),
        }
        terms = {}
        for name, (queue, total) in queues.items():
            keys = queue.keys(total // self.num_classes + 1)
            terms[name] = self.memory.relation(ours, theirs, members, keys, *temperatures)
        return terms


class CIRKD(CIRKDMiniBatch, CIRKDMemory):
    """Cross-image relational knowledge distillation (Yang et al., CVPR 2022, arXiv 2204.06986).

    L = 1 L_kd + 1 L_batch + 0.1 L_pixel + 0.1 L_region: logit distillation at T = 1, the relations
    of all positions of all images on a device to each other (``cirkd:minibatch`` has the equation
    and ``pooling``), and their relations to teacher pixels and regions of past batches
    (``cirkd:memory`` has the equation, the sizes and ``own_pixels``). VOC uses 0.01 for pixel and
    region; SegFormer students a ``pixel_memory`` of 2000.

    The batch term grows with the square of the images on a device and of the positions; the
    published schedule has 2 images on each of 8 devices, and other layouts are other objectives.

    The widths of the head features that are compared are those of the networks: 128 and 256 in the
    authors' code of 2022, 512 and 512 in that of 2025. Their projection has synchronised batch
    norm; here it is batch norm.
    """

    name = "cirkd"
    title = "Cross-image relational knowledge distillation"
    taps = ("logits", "head", "labels")
    weights = {"kd": 1.0, "batch": 1.0, "pixel": 0.1, "region": 0.1}
    equation = (
        "L_kd + L_batch + 0.1 L_pixel + 0.1 L_region: KL of the softmax of similarities between "
        "positions of the batch, and with stored pixels and regions"
    )
    cost_drivers = (
        "the teacher's forward; (h w)^2 similarities of every ordered pair of images on the "
        "device, in blocks, and of every position with about 5000 stored vectors; a projection; "
        "two memories"
    )
    recipes = (
        cirkd("PSPNet-R18", source="CIRKD repository; test 74.05", miou=74.73),
        cirkd("DeepLabV3-R18", source="CIRKD repository; test 75.05", miou=76.38),
        cirkd("DeepLabV3-MobileNetV2", source="CIRKD repository; test 74.03", miou=75.42),
        cirkd_segformer(miou=76.92),
        mmseg(teacher_miou=79.74, baseline_miou=74.23, miou=76.03, **BPKD_RERUN),
        cirkd("DeepLabV3-R18", "Pascal VOC", weights=VOC_WEIGHTS, miou=74.50),
        cirkd("PSPNet-R18", "Pascal VOC", weights=VOC_WEIGHTS, miou=74.78),
        cirkd("DeepLabV3-R18", "CamVid", miou=68.21),
        cirkd("PSPNet-R18", "CamVid", miou=68.65),
        cirkd("DeepLabV3-R18", "ADE20K", miou=35.41),
        mmseg(
            "PSPNet-R18",
            "ADE20K",
            teacher_miou=44.39,
            baseline_miou=33.30,
            miou=35.07,
            **BPKD_RERUN,
        ),
        cirkd("DeepLabV3-R18", "COCO-Stuff", miou=33.11),
        attnfd("Cityscapes", miou=70.49),
        attnfd("Pascal VOC", miou=71.02),
    )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Store the batch; return ``kd``, ``batch``, ``pixel`` and ``region``."""
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            "batch": self._batch(student.head, teacher.head),
            **self._memory(student.head, teacher.head, labels),
        }
