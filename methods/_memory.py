"""Memories of past batches: ring queues, what is stored in them, and relations to it.

Used by CIRKD, for pixels and class means, and by CIRKDv2, for channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdprof.methods._relations import relation_kl, unit


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
