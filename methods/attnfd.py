"""Attention-guided feature distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdprof.method import NetworkInfo, Taps
from kdprof.methods._common import GroupedMethod, check_settings, grouped, match_grid
from kdprof.methods._recipes import attnfd

ATTENTIONS = ("cbam", "plain")
POOLS = ("avg", "max")
SHORTEST = 1e-12
"""Maps of this length or less have no direction."""


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., ECCV 2018, arXiv 1807.06521): two gates.

    The first gate has one number for each channel: x' = x sigmoid( sum over the pools of
    MLP(pool(x)) ). The MLP is C -> C/r -> C with a ReLU; the pools are the mean and the maximum
    over positions. The second gate has one number for each position:
    x'' = x' sigmoid( BN( conv7x7( [max_c x', mean_c x'] ) ) ).

    Args:
        ratio: r; the inner width is at least 1.
        learned: False for the form without MLP, convolution and norm, whose gates are the sigmoids
            of the sums of the pools.
        spatial: False to leave out the second gate.
        pools: the pools of the first gate, "avg" and "max" or one of them.

    The gates are float32 under autocast: they are small, and a maximum overflows half precision.
    """

    def __init__(
        self,
        channels: int,
        ratio: int = 16,
        *,
        learned: bool = True,
        spatial: bool = True,
        pools: tuple[str, ...] = POOLS,
    ):
        super().__init__()
        self.learned, self.pools, self.gates_positions = learned, pools, spatial
        if learned:
            inner = max(1, channels // ratio)
            self.mlp = nn.Sequential(
                nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels)
            )
        if learned and spatial:
            self.spatial = nn.Sequential(
                nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated (N, C, h, w) in the data type of ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            x = x * self._channel_gate(x).to(x.dtype)
            if self.gates_positions:
                x = x * self._spatial_gate(x).to(x.dtype)
        return x

    def _channel_gate(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        pooled = []
        if "avg" in self.pools:
            pooled.append(flat.mean(2, dtype=torch.float32))
        if "max" in self.pools:
            # Like a pooling layer, max gives the gradient to one position; amax would split it
            # among equal ones.
            pooled.append(flat.max(2).values.float())
        seen = torch.stack(pooled)
        return (self.mlp(seen) if self.learned else seen).sum(0).sigmoid()[:, :, None, None]

    def _spatial_gate(self, x: Tensor) -> Tensor:
        largest = x.max(1, keepdim=True).values.float()
        mean = x.mean(1, keepdim=True, dtype=torch.float32)
        seen = self.spatial(torch.cat((largest, mean), 1)) if self.learned else largest + mean
        return seen.sigmoid()


def connector(student_channels: int, teacher_channels: int) -> nn.Sequential:
    """Return a 1x1 convolution without bias to the teacher's channels, and batch norm."""
    layer = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
    nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / teacher_channels))
    return nn.Sequential(layer, nn.BatchNorm2d(teacher_channels))


def direction_gap(student: Tensor, teacher: Tensor, group: int | None = None) -> Tensor:
    """Return 1/n || s / ||s|| - t / ||t|| ||^2 of n maps, (N, C, h, w), mean over N / n groups.

    The norms are over the n = ``group`` images of a group; None: all images are one group. It is
    computed as ( 2 - 2 cos ) / n, which needs no normalised map. The rounding error is that of a
    number near 1, 1e-7.
    """
    student = match_grid(student, teacher).float()
    teacher = teacher.float()
    group = group or len(student)
    product = grouped((student * teacher).sum((1, 2, 3)), group).sum(1)
    cosine = product * _inverse_length(student, group) * _inverse_length(teacher, group)
    return ((2 - 2 * cosine) / group).mean()


def _inverse_length(maps: Tensor, group: int) -> Tensor:
    """Return 1 / ||maps|| of each group; 0 for maps of zeros, which have no direction."""
    # The norm is taken in two steps, because one float32 sum over all maps would lose digits.
    of_channels = grouped(torch.linalg.vector_norm(maps, dim=(2, 3)), group)
    length = torch.linalg.vector_norm(of_channels, dim=(1, 2))
    return torch.where(length > SHORTEST, 1 / length.clamp(min=SHORTEST), 0.0)


def fix(module: nn.Module) -> None:
    """Turn the module's parameters into buffers, which are saved but not trained."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, parameter.detach())


class AttnFD(GroupedMethod):
    """AttnFD: attention-guided feature distillation (Mansourian et al. 2024, arXiv 2403.05451).

    Each feature of each network passes through its own :class:`CBAM` (r = 16). The student's then
    passes through a connector (1x1 convolution without bias, batch norm) to the teacher's channels.
    The results are s and t. For each layer L = 1/N || s / ||s||_F - t / ||t||_F ||_F^2, with the
    norms over all images of the device (``images_per_group = n``: over n at a time). The layers are
    summed, each with weight 2.

    The method was published for DeepLabV3+ of output stride 16 with three layers: c5 before its
    ReLU, the output of the pyramid, and the last feature of the decoder. kdprof's networks have two
    of them, c5 (after its ReLU) and the head feature. If the grids differ, the connected student is
    resized bilinearly to the teacher's grid (kdprof's rule).

    As in the authors' code, which gave the published numbers, no optimiser trains the teacher's
    blocks and the student's MLPs. Both keep their random initial values, and the norms use the
    statistics of the batch. ``train_channel_gate = true`` trains the student's MLPs too.
    ``teacher_attention = "plain"`` uses blocks without parameters, an option that the authors' code
    has but never sets.

    These parts of the published training are left out: one epoch that trains only the connectors,
    after which they are fixed (here they train together with the student); a teacher in training
    mode through which gradients are computed without any use (here it is frozen, at about a third
    of the cost); the division of the task loss by the batch size; layers with ten times the
    learning rate.
    """

    name = "attnfd"
    title = "Attention-guided feature distillation"
    paper = "arXiv 2403.05451 (2024)"
    family = "feature + attention"
    taps = ("c5", "head")
    weights = {"attnfd_c5": 2.0, "attnfd_head": 2.0}
    equation = (
        "L = sum over c5 and head of 1/N || s / ||s||_F - t / ||t||_F ||_F^2, s = A CBAM(f_S), t "
        "= CBAM(f_T)"
    )
    cost_drivers = (
        "the teacher's forward; attention blocks on c5 and the head feature of both networks; 1x1 "
        "connectors to the teacher's channels"
    )
    recipes = (
        attnfd(
            "Cityscapes",
            source="AttnFD repository (its default length; inputs of fixed size)",
            miou=73.04,
        ),
        attnfd(
            "Pascal VOC",
            miou=73.09,
            source="AttnFD repository (without the extra annotations; +/- 0.06)",
        ),
    )

    reduction_ratio: int = 16
    teacher_attention: str = "cbam"
    train_channel_gate: bool = False

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, {"teacher_attention": ATTENTIONS}, positive=("reduction_ratio",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the attention blocks of both networks and the connectors."""
        learned, ratio = self.teacher_attention == "cbam", self.reduction_ratio
        ours, theirs, joints = {}, {}, {}
        for tap in self.taps:
            before, after = student.channels[tap], teacher.channels[tap]
            ours[tap] = CBAM(before, ratio)
            theirs[tap] = CBAM(after, ratio, learned=learned)
            joints[tap] = connector(before, after)
            if not self.train_channel_gate:
                fix(ours[tap].mlp)
        self.student_blocks = nn.ModuleDict(ours)
        self.teacher_blocks = nn.ModuleDict(theirs)
        self.connectors = nn.ModuleDict(joints)
        fix(self.teacher_blocks)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``attnfd_c5`` and ``attnfd_head``."""
        terms = {}
        for tap in self.taps:
            attended = self.student_blocks[tap](getattr(student, tap))
            target = self.teacher_blocks[tap](getattr(teacher, tap))
            joined = self.connectors[tap](attended)
            terms[f"attnfd_{tap}"] = direction_gap(joined, target, self.group_size(len(joined)))
        return terms
