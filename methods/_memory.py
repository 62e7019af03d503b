"""Memories of vectors of past batches: ring queues, and how a batch is sampled and stored.

CIRKD stores pixels and class means of the teacher, CIRKDv2 its channels too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdprof.methods._common import grouped
from kdprof.methods._relations import relation_kl, unit


def gathered(values: Tensor) -> Tensor:
    """Return the values of all ranks, concatenated along the first dimension.

    The shapes must be equal on all ranks, so each rank must have the same number of images.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    values = values.contiguous()
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


class RingQueues(nn.Module):
    """Ring memories of equal size, for example one for each class, that start as random directions.

    If a push of k vectors reaches or passes the end, it is stored in the last k slots and the
    pointer goes to 0. This is the published rule; for pushes of one vector it is an ordinary ring.
    """

    rows: Tensor
    pointers: Tensor

    def __init__(self, queues: int, size: int, channels: int):
        super().__init__()
        self.queues, self.size = queues, size
        # The last row belongs to no queue. Vectors that are not stored are written there, which
        # keeps all shapes fixed, and the row is cleared after that.
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
            order: a permutation of the slots, whose first entries are returned; None: random.
        """
        if order is None:
            order = torch.randperm(self.size, device=self.rows.device)
        return self.contents().index_select(1, order[:number]).flatten(0, 1)

    @torch.no_grad()
    def push(self, values: Tensor, counts: Tensor) -> None:
        """Store the first ``counts`` values of each turn and queue, one turn after the other.

        Args:
            values: (turns, queues, most, C); ``most`` must not be above the size of a queue.
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
        """Advance the pointers and return the first slot of every push, (turns, queues).

        Between two pushes that reach the end, the pointer is a running sum. The loop therefore has
        one round for each possible push of that kind, which is one round at the published sizes.
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

    Every subset is equally likely. This is Floyd's algorithm: it sorts nothing, and no shape
    depends on a count. If a count is below ``number``, only its first ``count`` integers are valid.
    """
    lowest = (counts - number).clamp(min=0)[..., None]
    order = torch.arange(number, device=counts.device)
    highest = lowest + order
    draws = torch.rand(*counts.shape, number, device=counts.device)
    picks = (draws * (highest + 1)).long().minimum(highest)
    return torch.where(_taken_before(picks, picks - lowest, order), highest, picks)


def _taken_before(picks: Tensor, source: Tensor, order: Tensor) -> Tensor:
    """Return whether each pick is among the numbers chosen before it, without a loop over picks.

    Number j is pick j or, if that was taken, its own highest number. So pick i is taken if an
    earlier pick equals it, or if it is the highest number of an earlier j whose pick was taken.
    That j is ``source``; following it doubles its reach with every round.
    """
    earlier = order[:, None] > order
    taken = ((picks[..., None] == picks[..., None, :]) & earlier).any(-1)
    known = (source >= 0) & (source < order)
    source = torch.where(known, source, order)
    for _ in range((len(order) - 1).bit_length()):
        taken |= taken.gather(-1, source)
        source = source.gather(-1, source)
    return taken


def positions_of_ranks(members: Tensor, ranks: Tensor) -> Tensor:
    """Return the position in the image of the r-th pixel of a class, in raster order.

    Args:
        members: one-hot labels, (N, P, K).
        ranks: r, (N, K, m). For a rank that the class does not have, any position is returned.
    """
    members = members.int()
    positions = members.shape[1]
    counts = members.sum(1)
    begins = counts.cumsum(1) - counts
    # Counting sort by class. All void positions go to the one place after the end.
    places = members.cumsum(1).sub_(1).add_(begins[:, None]).mul_(members).sum(2)
    places = torch.where(members.sum(2) > 0, places, positions)
    raster = torch.arange(positions, device=members.device).expand_as(places)
    table = raster.new_zeros(len(members), positions + 1).scatter(1, places, raster)
    wanted = (begins[:, :, None] + ranks).clamp(max=positions)
    return table.gather(1, wanted.flatten(1)).view_as(ranks)


def projector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Return 1x1 convolution, batch norm, ReLU, 1x1 convolution. The convolutions have no bias."""
    return nn.Sequential(
        nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
        nn.BatchNorm2d(teacher_channels),
        nn.ReLU(),
        nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
    )


class ClassMemory(nn.Module):
    """Teacher pixels and class means of past batches, and the relations of a new batch to them.

    Args:
        channels: head channels of the student and of the teacher.
        pixel_size, region_size: slots of each class.
        updates: the most pixels that are stored for each image and class.
        own_pixels: see the class :class:`CIRKDMemory` of ``cirkd.py``.
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
        """Store a batch; if there are several ranks, the batches of all of them.

        Args:
            units: the teacher's unit vectors, (N, P, C).
            members: one-hot labels, (N, P, K); the row of a void position is 0.
            ranks: the pixels that are stored, as numbers from 0 to the class's pixel count - 1,
                (N, K, updates); None: random.

        The ranks exchange the chosen vectors, not whole feature maps, so all memories stay equal.
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
        self,
        student: Tensor,
        teacher: Tensor,
        members: Tensor,
        keys: Tensor,
        *temperatures: float,
        group: int | None = None,
    ) -> Tensor:
        """Return T'^2 KL of the similarities with the keys over T T', mean over valid positions.

        Args:
            student, teacher: unit vectors, (N P, C).
            members: one-hot labels, (N, P, K); the row of a void position is 0.
            keys: stored unit vectors, (M, C).
            temperatures: T of the contrast, T' of the divergence.
            group: the mean is over the valid positions of so many images at a time, and then over
                the N / group groups; None: all images are one group.
        """
        contrast, divergence = temperatures
        valid = grouped(members.sum(2), group or len(members)).flatten(1)
        weights = divergence**2 * valid / valid.sum(1, keepdim=True).clamp(min=1) / len(valid)
        return relation_kl(student, teacher, contrast * divergence, keys, weights=weights.flatten())
