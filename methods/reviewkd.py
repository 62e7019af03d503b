"""Knowledge review."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid

LEVELS = {4: 1 / 2, 2: 1 / 4, 1: 1 / 8}
"""Weight of each pooled comparison, by its number of cells per side; the whole map has weight 1."""


class Fusion(nn.Module):
    """Attention-based fusion of a student stage with the residual of the deeper stages.

    Args:
        before, middle, after: channels of the student's stage, of the residual and of the
            teacher's stage.
        fuses: False for the deepest stage, which has no residual to be fused with.
    """

    def __init__(self, before: int, middle: int, after: int, fuses: bool):
        super().__init__()
        first = nn.Conv2d(before, middle, 1, bias=False)
        self.reduce = nn.Sequential(first, nn.BatchNorm2d(middle))
        self.attend = nn.Conv2d(2 * middle, 2, 1) if fuses else None
        last = nn.Conv2d(middle, after, 3, padding=1, bias=False)
        self.restore = nn.Sequential(last, nn.BatchNorm2d(after))
        for layer in (first, last):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, stage: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the stage with the teacher's channels, and the residual for the next stage."""
        residual = self.reduce(stage)
        if self.attend is not None:
            assert deeper is not None, "only the deepest stage has no residual to be fused with"
            if deeper.shape[-2:] != residual.shape[-2:]:
                deeper = F.interpolate(deeper, residual.shape[-2:], mode="nearest")
            # The sum of two convolutions is that of the concatenated map, which is not needed.
            ours, theirs = self.attend.weight.split(residual.shape[1], dim=1)
            seen = F.conv2d(residual, ours, self.attend.bias) + F.conv2d(deeper, theirs)
            gates = seen.sigmoid()
            residual = residual * gates[:, :1] + deeper * gates[:, 1:]
        return self.restore(residual), residual


def cell_means(cells: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return the (cells^2, height width) matrix of adaptive average pooling."""
    sides = []
    for size in (height, width):
        cell = torch.arange(cells, device=device)[:, None]
        position = torch.arange(size, device=device)
        start, end = cell * size // cells, ((cell + 1) * size + cells - 1) // cells
        sides.append(((position >= start) & (position < end)).float() / (end - start))
    rows, columns = sides
    return (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the maps and of their 4x4, 2x2 and 1x1 cell averages.

    The weights are 1, 1/2, 1/4 and 1/8, divided by their sum 1.875. Averages are linear, so one
    matrix product computes all 21 averages of the difference. This needs no pooled map of either
    network, and its backward is deterministic on a GPU, unlike that of adaptive pooling.

    Args:
        student, teacher: (N, C, h, w); a student on another grid is resized bilinearly.
    """
    gap = match_grid(student, teacher).float() - teacher.float()
    height, width = gap.shape[-2:]
    means = torch.cat([cell_means(n, height, width, gap.device) for n in LEVELS])
    with torch.autocast(gap.device.type, enabled=False):
        of_cells = (means @ gap.flatten(2).mT).square().mean((0, 2))
    parts = of_cells.split([n * n for n in LEVELS])
    pooled = sum(w * part.mean() for w, part in zip(LEVELS.values(), parts, strict=True))
    return (gap.square().mean() + pooled) / (1 + sum(LEVELS.values()))


class ReviewKD(Method):
    """Knowledge review (Chen et al., CVPR 2021, arXiv 2104.09044) on the stages c2..c5.

    From the deepest stage k = 5 up to 2: x_k = BN(conv1x1 f^S_k), ``middle`` = 256 channels;
    r_5 = x_5; for the other stages, with u the residual r_{k+1} enlarged by nearest to the grid of
    x_k, (a, b) = sigmoid( conv1x1 [x_k, u] ), two maps, and r_k = a x_k + b u;
    o_k = BN(conv3x3 r_k), with the channels of the teacher's stage. The first and the last
    convolution have no bias. L = sum_k HCL(o_k, f^T_k), the hierarchical context loss

    HCL(o, f) = ( MSE(o, f) + sum_{l in 4, 2, 1} w_l MSE(pool_l o, pool_l f) ) / 1.875,

    with pool_l the averages of l x l cells (adaptive pooling) and w = 1/2, 1/4, 1/8.

    The method was published for classification, detection and instance segmentation; no recipe for
    semantic segmentation was found. Assumed here: weight 1.2, 256 channels and no warm-up, as in
    detection (R101 -> R18; there the maps are the 256-channel levels of a feature pyramid, here
    they are the backbone's stages, after their ReLU). ``reviewkd:imagenet`` has the settings of the
    classifiers, whose maps are the stages. CIFAR's weights are 0.6 to 8, raised linearly for 20
    epochs; classifiers compare the pooled vector too, which is left out. The only random numbers
    are the initial weights of the extras (Kaiming-uniform); the extras are trained with the
    student.

    There is no label mask. If the grids differ, o_k is resized bilinearly to the teacher's grid
    (kdprof's rule). The authors' code leaves out an l that is not below the map's height; at output
    stride 8 that happens only for crops of up to 32 pixels.
    """

    name = "reviewkd"
    title = "Knowledge review"
    paper = "CVPR 2021, arXiv 2104.09044"
    family = "feature + attention"
    taps = ("c2", "c3", "c4", "c5")
    weights = {"reviewkd": 1.2}
    equation = (
        "r_k = a_k x_k + b_k up(r_{k+1}), x_k = BN(conv f^S_k); L = sum_k HCL( BN(conv3x3 r_k), "
        "f^T_k ); HCL = ( MSE + sum_{l in 4,2,1} w_l MSE of l x l cell means ) / 1.875"
    )
    cost_drivers = (
        "the teacher's forward; 3x3 convolutions from 256 channels to those of every teacher "
        "stage: from R18 to R101 89 GMAC forward for 512 x 1024, four fifths of the student's; "
        "batch norms and squared errors of maps of the teacher's size"
    )

    middle: int = 256

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("middle",))

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the fusion blocks."""
        deepest = self.taps[-1]
        self.fusions = nn.ModuleDict(
            {
                tap: Fusion(
                    student.channels[tap], self.middle, teacher.channels[tap], tap != deepest
                )
                for tap in self.taps
            }
        )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``reviewkd``."""
        gaps, residual = [], None
        for tap in reversed(self.taps):
            rebuilt, residual = self.fusions[tap](getattr(student, tap), residual)
            gaps.append(hierarchical_context(rebuilt, getattr(teacher, tap)))
        return {"reviewkd": reduce(torch.add, gaps)}


class ReviewKDImageNet(ReviewKD):
    """Knowledge review with the settings of its ImageNet classifiers: 512 channels, weight 1.

    See ``reviewkd`` for the equation. Nothing was published for segmentation.
    """

    name = "reviewkd:imagenet"
    title = "Knowledge review (ImageNet settings)"
    weights = {"reviewkd": 1.0}
    cost_drivers = (
        "the teacher's forward; 3x3 convolutions from 512 channels to those of every teacher "
        "stage: from R18 to R101 179 GMAC forward for 512 x 1024, more than the student's; batch "
        "norms and squared errors of maps of the teacher's size"
    )

    middle: int = 512
