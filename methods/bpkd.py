"""Boundary privileged distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdprof.errors import UserError
from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import channel_kl
from kdprof.methods._recipes import FROM_BPKD, bpkd_context, mmseg

WORD_BITS = 30
"""Number of classes in one int32, in bits 0 to 29."""

BLOCK_ELEMENTS = 2**24
"""The most elements of a one-hot block: 64 MiB in float32."""


def classes_in_window(labels: Tensor, num_classes: int, width: int) -> Tensor:
    """Return the set of classes in the ``width`` x ``width`` window around each pixel, as bits.

    Args:
        labels: (N, H, W); values of ``num_classes`` and above are void.

    Returns:
        (N, words, H, W) int32: class k is bit k % 30 of word k // 30, void is class
        ``num_classes``. Positions outside the image add no class.

    The union of sets is a bitwise or, so all classes are dilated at once. The usual form, two
    max-pools of one-hot maps of N x K x H x W, is not needed.
    """
    labels = labels.clamp(max=num_classes)
    words = num_classes // WORD_BITS + 1
    first = WORD_BITS * torch.arange(words, device=labels.device)[:, None, None]
    bit = labels[:, None] - first
    inside = (bit >= 0) & (bit < WORD_BITS)
    one = torch.ones((), dtype=torch.int32, device=labels.device)
    sets = (one << bit.clamp(0, WORD_BITS - 1).int()) * inside
    radius = width // 2
    for dim in (2, 3):
        padding = (radius, radius) if dim == 3 else (0, 0, radius, radius)
        padded, size = F.pad(sets, padding), sets.shape[dim]
        sets = padded.narrow(dim, 0, size).clone()
        for offset in range(1, width):
            sets |= padded.narrow(dim, offset, size)
    return sets


@torch.no_grad()
def edge_masks(labels: Tensor, num_classes: int, width: int, grid: torch.Size) -> Tensor:
    """Return the fraction of each cell that is edge of each class, (N, K, h, w), 0 to 1.

    The edge of a class is the dilation of its one-hot map minus the erosion: the pixels whose
    window contains the class and another class or void. It is averaged over the grid's cells.
    """
    sets = classes_in_window(labels, num_classes, width)
    several = ((sets & (sets - 1)) != 0).any(1) | ((sets != 0).sum(1) > 1)
    edges = sets * several[:, None]
    size = max(1, BLOCK_ELEMENTS // labels.numel())
    classes = torch.arange(num_classes, device=labels.device).split(size)
    return torch.cat([_share(edges, block, grid) for block in classes], 1)


def _share(edges: Tensor, classes: Tensor, grid: torch.Size) -> Tensor:
    """Return the edges of some classes, unpacked from their bits and averaged over grid cells."""
    words = edges.index_select(1, classes // WORD_BITS)
    held = (words >> (classes % WORD_BITS).int()[:, None, None]) & 1
    height, width = grid
    return F.adaptive_avg_pool2d(held.float(), (height, width))


def edge_kl(student: Tensor, teacher: Tensor, edges: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the distillation term of the pixels near an edge.

    With q = softmax over classes of (edges * z) / T it is
    T^2 / N sum_{n,k} [ sum_p edges_kp q^T_kp log(q^T_kp / q^S_kp) / #{p: edges_kp > 0} ].
    A class without an edge adds 0.

    Args:
        student, teacher: (N, K, h, w) logits of one grid.
        edges: (N, K, h, w), 0 to 1.
    """
    target = F.log_softmax(teacher.float() * edges / temperature, dim=1)
    log_p = F.log_softmax(student.float() * edges / temperature, dim=1)
    divergence = F.kl_div(log_p, target, reduction="none", log_target=True)
    count = (edges > 0).sum((2, 3)).clamp(min=1)
    of_class = (edges * divergence).sum((2, 3)) / count
    return temperature**2 * of_class.sum(1).mean()


class BPKD(Method):
    """Boundary privileged knowledge distillation (Liu et al., WACV 2024, arXiv 2306.08075).

    E_k in [0, 1] is the fraction of each cell of the logits' grid that is edge of class k: dilation
    minus erosion of its one-hot labels by a square window of 7 at label resolution, average-pooled.
    Edge: with q = softmax over classes of E z, L_edge = 2 / N sum_{n,k} [ sum_p E_kp q^T_kp
    log(q^T_kp / q^S_kp) / #edge positions of k ]. Body: L_body = the ``cwd`` form of (1 - E) z:
    softmax over positions for each class, mean over N K. T = 1. Weights 50 edge, 20 body.

    The authors' training code is not published. The equation, the window, T, the factor 2 and the
    weights are those of two re-implementations that agree with each other. Assumed: an edge
    position is one with E_kp > 0; void is not a class, but a border with void is an edge of the
    class next to it; positions outside the crop do not count; T^2 if T is not 1. If the size of the
    labels is not a multiple of that of the logits, the pooling is adaptive. If the grids differ,
    the student's logits are resized bilinearly to the teacher's grid (kdprof's rule).
    """

    name = "bpkd"
    title = "Boundary privileged distillation"
    paper = "WACV 2024, arXiv 2306.08075"
    family = "logit"
    taps = ("logits", "labels")
    weights = {"edge": 50.0, "body": 20.0}
    equation = (
        "L_edge = 2 / N sum_{n,k} [ sum_p E_kp KL of softmax over classes of E z / #edge "
        "positions of k ]; L_body = cwd of (1 - E) z"
    )
    cost_drivers = (
        "the teacher's forward; edge masks of every class at label resolution, which is memory "
        "traffic; softmaxes over logits, which cost little"
    )
    recipes = (
        mmseg(
            teacher_miou=79.74,
            student_miou=74.23,
            miou=77.57,
            **FROM_BPKD | {"source": "BPKD repository; the student alone is mmsegmentation's R18b"},
        ),
        mmseg("HRNetV2-W18S", teacher="HRNetV2-W48", student_miou=75.31, miou=78.58, **FROM_BPKD),
        mmseg(
            "DeepLabV3+-MobileNetV2",
            teacher="DeepLabV3+-R101",
            student_miou=75.29,
            miou=78.59,
            **FROM_BPKD,
        ),
        mmseg("ISANet-R18", teacher="ISANet-R101", student_miou=73.62, miou=75.72, **FROM_BPKD),
        mmseg(
            "PSPNet-R18", "ADE20K", teacher_miou=44.39, student_miou=33.30, miou=38.51, **FROM_BPKD
        ),
        bpkd_context(miou=46.82),
    )

    temperature: float = 1.0
    edge_width: int = 7
    edge_factor: float = 2.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("temperature", "edge_width", "edge_factor"))
        if self.edge_width % 2 == 0:
            raise UserError(f"method '{self.name}': edge_width must be odd, not {self.edge_width}")

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Store the number of classes."""
        self.num_classes = student.num_classes

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``edge`` and ``body``."""
        ours, theirs = match_grid(student.logits, teacher.logits).float(), teacher.logits.float()
        edges = edge_masks(labels, self.num_classes, self.edge_width, theirs.shape[-2:])
        body = 1 - edges
        return {
            "edge": self.edge_factor * edge_kl(ours, theirs, edges, self.temperature),
            "body": channel_kl(ours * body, theirs * body, self.temperature),
        }
