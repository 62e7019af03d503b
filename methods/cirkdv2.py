"""CIRKDv2: cross-image relations after a graph module, and relations of channels."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import pixel_kl
from kdprof.methods._memory import RingQueues, gathered, projector
from kdprof.methods._recipes import cirkdv2
from kdprof.methods._relations import batch_relation, relation_kl, unit
from kdprof.methods.cirkd import CIRKD

POOLING = 4


class GraphModule(nn.Module):
    """Non-local attention over positions, joined to its input; (N, C, h, w) to the same shape.

    g = norm-ReLU(B softmax(q^T k / sqrt(C/2)) v) with q, k, v 1x1 convolutions to C/2 channels and
    B one back to C. The output is norm-ReLU of a 1x1 convolution of [x, g]. There are no biases.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        self.query, self.key, self.value = (
            nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3)
        )
        self.back = self._block(inner, channels)
        self.join = self._block(2 * channels, channels)

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined map, (N, C, h, w)."""
        # (N, 1, P, C/2), contiguous, or torch would use an attention that stores the whole map.
        parts = (
            layer(x).flatten(2).mT.contiguous()[:, None]
            for layer in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(*parts)[:, 0].mT.unflatten(2, x.shape[-2:])
        return self.join(torch.cat([x, self.back(seen)], 1))


class ChannelMemory(nn.Module):
    """A ring of teacher channels; a channel is a pattern over positions that are averaged 4x4.

    Args:
        channels: head channels of the student and of the teacher.
        size: slots of the ring.
        length: the most positions of a channel; shorter ones are padded with zeros at the end.
        updates: the most channels that are stored for each batch.
    """

    def __init__(self, channels: tuple[int, int], size: int, length: int, updates: int):
        super().__init__()
        self.updates = updates
        self.projection = projector(*channels)
        self.queue = RingQueues(1, size, length)

    def patterns(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both networks' unit patterns, (N, C_T, d), of (N, C, h, w) features."""
        pooled = (F.avg_pool2d(f.float(), POOLING, ceil_mode=True) for f in (student, teacher))
        student, teacher = pooled
        return unit(self.projection(student).flatten(2), 2), unit(teacher.flatten(2), 2)

    @torch.no_grad()
    def update(self, patterns: Tensor, order: Tensor | None = None) -> None:
        """Store random channels of the teacher's patterns, (N, C, d), of all ranks.

        Args:
            order: a permutation of the N C channels of all ranks, whose first entries are stored.
                None: random; the first rank draws it for all, so that all memories stay equal.
        """
        rows = gathered(patterns.flatten(0, 1))
        if order is None:
            order = torch.randperm(len(rows), device=rows.device)
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(order, 0)
        rows = rows.index_select(0, order[: self.updates])
        rows = F.pad(rows, (0, self._length() - rows.shape[1]))
        counts = torch.full((1, 1), len(rows), device=rows.device)
        self.queue.push(rows[None, None], counts)

    def keys(self, number: int, length: int, order: Tensor | None = None) -> Tensor:
        """Return random stored channels, cut to a length, (number, length)."""
        keys = self.queue.keys(number, order)
        # The initial keys are random vectors of the full length; cut ones are normalised again.
        return keys if length == self._length() else unit(keys[:, :length], 1)

    def _length(self) -> int:
        return self.queue.rows.shape[1]

    def fits(self, length: int) -> bool:
        """Return whether patterns of this length can be stored."""
        return length <= self._length()


def channel_relation(
    student: Tensor, teacher: Tensor, keys: Tensor, contrast: float, divergence: float
) -> Tensor:
    """Return T'^2 KL of the channels' similarities with the keys over T T', mean over channels.

    Args:
        student, teacher: unit patterns, (N, C, d).
        contrast, divergence: T and T'.
    """
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    total = relation_kl(student, teacher, contrast * divergence, keys)
    return divergence**2 * total / len(student)


class CIRKDv2(CIRKD):
    """CIRKDv2 (Yang et al., technical report 2025, no arXiv id), from the authors' code only.

    g = GCN(f_S): attention over all positions of the student's head feature, joined to it (see
    :class:`GraphModule`), with the student's channels. The student's logits come from f_S itself.
    L = 1 L_kd + 1 L_fitnet + 1 L_batch + 0.1 L_pixel + 0.1 L_region
    + 1 L_channel + 0.1 L_channel_memory + 100 L_channel_mse:

    - kd, batch, pixel, region as in ``cirkd``, with g for f_S; fitnet as in ``fitnet``, with g.
    - channel terms: features are averaged 4x4 (g is then projected as for the memory, by another
      projection), and each channel is a unit vector over its d positions (512 at 64 x 128).
      ``channel``: for all ordered pairs of images KL of the softmax over channels of the C_T x C_T
      similarities / 0.1, mean. ``channel_memory``: KL of the similarities / 0.1 with 2048 keys of a
      ring of 10000 teacher channels, in which each batch (of all ranks) stores up to 256.
      ``channel_mse``: mean squared difference of the unit vectors.

    The weight of fitnet is 1 for Cityscapes DeepLabV3-R18, UperNet-R18, DeepLabV3-MobileNetV3-S,
    PSPNet-MobileViT and SegFormer and for two pairs on ADE20K, and 10 in the remaining scripts. If
    it is 0, there is no GCN.

    The authors' code needs sides that are multiples of 4; here d is that of the rounded-up grid.
    ``build`` does not know the crop: the ring has ``channel_positions`` positions, shorter channels
    leave the rest 0, and a larger grid needs a larger setting. The authors do not average the
    gradients of the GCN and of fitnet over devices, so these parts become different on each device;
    in kdprof they are ordinary extras. Their Cityscapes schedule has one image per device, so only
    the memories relate different images there: ``images_per_group = 1``.

    As in ``cirkd``, the gradients of the relations are computed in the forward pass.
    """

    name = "cirkdv2"
    title = "CIRKDv2"
    paper = "technical report 2025"
    family = "relational + feature + logit"
    weights = {
        "kd": 1.0, "fitnet": 1.0, "batch": 1.0, "pixel": 0.1, "region": 0.1, "channel": 1.0,
        "channel_memory": 0.1, "channel_mse": 100.0,
    }  # fmt: skip
    equation = (
        "L = kd + fitnet + batch + 0.1 pixel + 0.1 region + channel + 0.1 channel_memory + 100 "
        "channel_mse, each of g = GCN(f_S)"
    )
    cost_drivers = (
        "as cirkd, plus attention over (h w)^2 positions of the student's feature (again in "
        "backward), its convolutions, a second projection and relations of the teacher's channels"
    )
    recipes = (
        cirkdv2("DeepLabV3-R18", miou=75.60),
        cirkdv2("UperNet-R18", miou=72.11),
        cirkdv2("DeepLabV3-MobileNetV3-S", miou=67.62),
        cirkdv2("PSPNet-MobileNetV3-S", weights={"fitnet": 10.0}, miou=65.42),
        cirkdv2("DeepLabV3-MobileViT-XXS", weights={"fitnet": 10.0}, miou=68.91),
        cirkdv2("PSPNet-MobileViT-XXS", miou=68.45),
        cirkdv2("SegFormer-B0", miou=75.52),
        cirkdv2("DeepLabV3-R18", "ADE20K", miou=39.82),
        cirkdv2("UperNet-R18", "ADE20K", weights={"fitnet": 10.0}, miou=36.87),
    )

    channel_memory: int = 10_000
    channel_contrast: int = 2_048
    channel_updates: int = 256
    channel_positions: int = 512

    def __init__(self, **settings):
        super().__init__(**settings)
        sizes = ("channel_memory", "channel_contrast", "channel_updates", "channel_positions")
        check_settings(self, positive=sizes)
        if self.channel_updates > self.channel_memory:
            raise UserError(
                f"method '{self.name}': channel_updates ({self.channel_updates}) must not be above "
                f"channel_memory ({self.channel_memory})"
            )

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the GCN, the adaptor, the projections and the memories."""
        super().build(student, teacher)
        channels = before, after = student.channels["head"], teacher.channels["head"]
        self.gcn = GraphModule(before) if self.weights["fitnet"] else nn.Identity()
        self.adaptor = nn.Conv2d(before, after, 1, bias=False)
        self.channels = ChannelMemory(
            channels, self.channel_memory, self.channel_positions, self.channel_updates
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Store the batch and return the eight terms."""
        feature, head = match_grid(self.gcn(student.head), teacher.head), teacher.head
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            "fitnet": F.mse_loss(self.adaptor(feature).float(), head.float()),
            "batch": self._batch(feature, head),
            **self._memory(feature, head, labels),
            **self._channels(feature, head),
        }

    def _channels(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        ours, theirs = self.channels.patterns(student, teacher)
        length = theirs.shape[2]
        if not self.channels.fits(length):
            raise UserError(
                f"method '{self.name}': a channel has {length} positions after pooling, more than "
                f"channel_positions ({self.channel_positions}): set it to {length}"
            )
        self.channels.update(theirs)
        keys = self.channels.keys(self.channel_contrast, length)
        group = self.group_size(len(theirs))
        temperatures = self.contrast_temperature, self.contrast_kd_temperature
        return {
            "channel": batch_relation(ours, theirs, self.contrast_temperature, group),
            "channel_memory": channel_relation(ours, theirs, keys, *temperatures),
            "channel_mse": (ours - theirs).square().mean(),
        }
