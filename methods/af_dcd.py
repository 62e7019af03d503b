"""Augmentation-free dense contrastive distillation."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.hardware.blocks import block_elements
from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import check_settings, match_grid
from kdprof.methods._divergences import pixel_kl
from kdprof.methods._recipes import cirkd

MASKS = ("random", "centre")
_recipe = partial(cirkd, gpus=None, source="Af-DCD repository")


def plain_projector(channels: int) -> nn.Sequential:
    """Return conv3x3 - ReLU - conv3x3, with biases."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class EnhancedProjector(nn.Module):
    """The projector ( conv a + conv b ) / 2 with a = relu(conv x), b = relu(conv a); all 3x3."""

    first: nn.Conv2d
    second: nn.Conv2d
    of_first: nn.Conv2d
    of_second: nn.Conv2d

    def __init__(self, channels: int):
        super().__init__()
        names = ("first", "second", "of_first", "of_second")
        for name in names:
            self.add_module(name, nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, h, w)."""
        a = self.first(x).relu()
        b = self.second(a).relu()
        return (self.of_first(a) + self.of_second(b)) / 2


def random_mask(uniform: Tensor, ratio: float) -> Tensor:
    """Return 0 where the uniform draw of a position is above 1 - ratio, 1 elsewhere."""
    return (uniform <= 1 - ratio).float()


def centre_mask(features: Tensor) -> Tensor:
    """Return (1, 1, h, w): 0 in the middle third of the rows and columns, 1 elsewhere."""
    height, width = features.shape[-2:]
    mask = features.new_ones(1, 1, height, width, dtype=torch.float32)
    mask[..., height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0
    return mask


def patch_vectors(
    features: Tensor, pool: int, crop: int, patch: tuple[int, int], groups: int
) -> tuple[Tensor, int]:
    """Return the vectors of every patch, (patches, vectors, C / groups), and the positions used.

    Args:
        features: (N, C, h, w). They are pooled, then cropped, then cut into patches.
        pool: window and stride of a max-pool, reduced to the map's size; 0 or 1 for none.
        crop: the largest height and width that are used, from the top left; 0 for all.
        patch: height and width of a patch, reduced to the map's size. Rows and columns that do not
            fill a patch are left out.
        groups: number of groups of consecutive channels; each forms one vector. The vectors of a
            patch are ordered by position, then by group.
    """
    if pool > 1:
        features = F.max_pool2d(features, [min(pool, side) for side in features.shape[-2:]])
    used = [min(side, crop or side) for side in features.shape[-2:]]
    height, width = (min(side, wanted) for side, wanted in zip(used, patch, strict=True))
    rows, columns = used[0] // height, used[1] // width
    features = features[..., : rows * height, : columns * width].float()
    # N, group, channel, row of patches, row, column of patches, column
    cut = features.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).unflatten(1, (groups, -1))
    vectors = cut.permute(0, 3, 5, 4, 6, 1, 2).flatten(3, 5).flatten(0, 2)
    return vectors, cut.shape[0] * rows * columns * height * width


class PatchContrast(torch.autograd.Function):
    """The summed cross-entropy of each anchor with its own key among the keys of other groups.

    The similarity is the negative L1 distance / temperature. The distances and their gradient need
    the differences of all pairs, anchors x keys x channels: 4 GiB for 4 images of published size.
    They are computed in blocks. The same pass computes the gradient, which has the size of the
    anchors.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, keys: Tensor, groups: int, temperature: float) -> Tensor:
        """Return the sum over (patches, vectors, channels) of :func:`patch_vectors`."""
        patches, vectors, channels = anchors.shape
        index = torch.arange(vectors, device=anchors.device)
        own = index[:, None] == index
        absent = (index[:, None] % groups == index % groups) & ~own
        rows = max(1, min(vectors, block_elements(anchors) // (vectors * channels)))
        size = max(1, block_elements(anchors) // (rows * vectors * channels))
        total, gradient = anchors.new_zeros(()), torch.empty_like(anchors)
        with torch.autocast(anchors.device.type, enabled=False):
            for p in range(0, patches, size):
                for r in range(0, vectors, rows):
                    block = slice(p, p + size), slice(r, r + rows)
                    at = slice(r, r + rows)
                    value, slope = _contrast(
                        anchors[block], keys[p : p + size], own[at], absent[at], temperature
                    )
                    total += value
                    gradient[block] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient of the anchors."""
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def _contrast(
    anchors: Tensor, keys: Tensor, own: Tensor, absent: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sum over a block and its gradient; ``own`` and ``absent`` are (anchors, keys)."""
    gap = anchors[:, :, None] - keys[:, None]
    similar = torch.linalg.vector_norm(gap, 1, dim=3).div_(-temperature)
    log_p = similar.masked_fill_(absent, -torch.inf).log_softmax(2)
    value = -log_p.masked_fill(~own, 0).sum()
    of_distance = (own.float() - log_p.exp_()).div_(temperature)
    return value, (of_distance[:, :, None] @ gap.sign_())[:, :, 0]


class AfDCD(Method):
    """Augmentation-free dense contrastive distillation (Fan et al., NeurIPS 2023, 2312.04168).

    The student's c5 is masked and rebuilt as in ``mgd``, g = P( m * A f_S ). A is a 1x1 convolution
    C_S -> C_T with bias, which is there even if C_S = C_T; P is conv3x3 - ReLU - conv3x3 with
    biases; m in {0, 1} is drawn for each position and is 0 with probability ``mask_ratio`` = 0.75.
    Then

    L_fd = 1 / N sum over N, C_T, h, w of ( g - f_T )^2;
    L_ctr = 1 / (N h' w') sum over anchors i of -log( e^{-d_ii/tau} / ( e^{-d_ii/tau} +
    sum_j e^{-d_ij/tau} ) ).

    For L_ctr, g and f_T are max-pooled by 4 to h' x w' and cut into patches of 4 x 4, and their
    channels are cut into 16 groups. An anchor i is a position and group of g. d_ij is its L1
    distance to a position and group of f_T in the same patch, d_ii to the same position and group;
    j runs over all positions of the other groups. This gives 1 positive and 240 negatives;
    tau = 0.07. L_ctr is a mean over positions and a sum over groups. kd is that of CIRKD (T = 1 is
    assumed). The weights fd 2e-6, ctr 0.005, kd 1 are those of Cityscapes; the recipes state the
    others. CamVid, which has 45 x 45 positions, is not pooled but cropped to 44 x 44: ``pool = 0``,
    with or without ``crop = 44``.

    ``mask = "centre"`` is the authors' fixed mask, which zeroes the middle third of rows and
    columns. Their scripts pass switches as text, and the text "False" counts as true. It is
    therefore not known which mask and which projector the published figures have. The plain
    projector is assumed here; ``af_dcd:enhanced`` has the other one. There is no label mask.

    Left out: the authors clip the norm of the gradient of A and P at 15; kdprof's step clips no
    gradient. kdprof's rules: if the grids differ, the adapted student is resized bilinearly;
    positions that do not fill a patch are left out of L_ctr; windows and patches are not larger
    than the map. From R18 to R101 the extras have 77 M parameters and cost 627 GMAC forward for a
    512 x 1024 image, more than the teacher.
    """

    name = "af_dcd"
    title = "Augmentation-free dense contrastive distillation"
    paper = "NeurIPS 2023, arXiv 2312.04168"
    family = "feature + contrastive + logit"
    taps = ("c5", "logits")
    weights = {"fd": 2e-6, "ctr": 0.005, "kd": 1.0}
    equation = (
        "g = P( m * A f_S ); L_fd = 1/N sum ( g - f_T )^2; L_ctr = 1/(N h' w') sum_i -log softmax "
        "of -d_ij / tau at j = i, d the L1 distance of vectors of g and f_T in a patch"
    )
    cost_drivers = (
        "the teacher's forward; two 3x3 convolutions at the width of the teacher's c5, which from "
        "R18 to R101 cost more than teacher and student together; L1 distances of all vectors of "
        "a patch, in blocks"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        _recipe("DeepLabV3-R18", miou=77.03),
        _recipe("DeepLabV3-MobileNetV2", miou=76.43),
        _recipe(
            "DeepLabV3-R18", "ADE20K", weights={"fd": 1e-6, "ctr": 0.04, "kd": 0.5}, miou=36.21
        ),
        _recipe("DeepLabV3-R18", "COCO-Stuff", weights={"fd": 5e-6, "kd": 0.5}, miou=34.02),
        _recipe("DeepLabV3-R18", "Pascal VOC", weights={"fd": 1e-6}, miou=76.25),
        _recipe("PSPNet-R18", "Pascal VOC", weights={"fd": 1e-6}, miou=76.14),
        cirkd(
            "DeepLabV3-R18",
            "CamVid",
            weights={"fd": 8e-6, "ctr": 0.01},
            miou=69.27,
            gpus=None,
            source="Af-DCD repository, pool 0 (assumed: the first of its two CamVid students)",
        ),
        cirkd(
            "PSPNet-R18",
            "CamVid",
            weights={"fd": 8e-6, "ctr": 0.01},
            miou=69.48,
            gpus=None,
            source="Af-DCD repository, pool 0 (assumed: the second of its two CamVid students)",
        ),
    )

    temperature: float = 1.0
    contrast_temperature: float = 0.07
    groups: int = 16
    pool: int = 4
    crop: int = 0
    patch_height: int = 4
    patch_width: int = 4
    mask: str = "random"
    mask_ratio: float = 0.75

    def __init__(self, **settings):
        super().__init__(**settings)
        positive = (
            "temperature", "contrast_temperature", "groups", "patch_height", "patch_width"
        )  # fmt: skip
        check_settings(self, {"mask": MASKS}, positive=positive)
        problems = [
            f"method '{self.name}': {name} must be 0 (off) or above, not {getattr(self, name)!r}"
            for name in ("pool", "crop")
            if getattr(self, name) < 0
        ]
        if not 0 <= self.mask_ratio <= 1:
            problems.append(
                f"method '{self.name}': mask_ratio must be from 0 to 1, not {self.mask_ratio!r}"
            )
        if problems:
            raise UserError(*problems)

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create A and P."""
        before, after = student.channels["c5"], teacher.channels["c5"]
        if after % self.groups:
            raise UserError(
                f"method '{self.name}': groups must divide the {after} channels of c5 of "
                f"{teacher.name}, and {self.groups} does not"
            )
        self.align = nn.Conv2d(before, after, 1)
        self.projector = self._projector(after)

    def _projector(self, channels: int) -> nn.Module:
        return plain_projector(channels)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``fd``, ``ctr`` and ``kd``."""
        fd, ctr = self.feature_terms(student.c5, teacher.c5, self._draw_mask(teacher.c5))
        return {"fd": fd, "ctr": ctr, "kd": self._kd(student, teacher)}

    def _kd(self, student: Taps, teacher: Taps) -> Tensor:
        return pixel_kl(student.logits, teacher.logits, self.temperature)

    def _draw_mask(self, features: Tensor) -> Tensor:
        if self.mask == "centre":
            return centre_mask(features)
        images, _, height, width = features.shape
        uniform = torch.rand(images, 1, height, width, device=features.device)
        return random_mask(uniform, self.mask_ratio)

    def feature_terms(self, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return ``fd`` and ``ctr`` of two c5; ``mask`` broadcasts to (N, 1, h, w)."""
        aligned = match_grid(self.align(student), teacher)
        rebuilt = self.projector(aligned * mask.to(aligned.dtype))
        fd = F.mse_loss(rebuilt.float(), teacher.float(), reduction="sum") / len(teacher)
        patch = self.patch_height, self.patch_width
        anchors, keys = (
            patch_vectors(maps, self.pool, self.crop, patch, self.groups)
            for maps in (rebuilt, teacher)
        )
        total = PatchContrast.apply(anchors[0], keys[0], self.groups, self.contrast_temperature)
        return fd, total / anchors[1]


class AfDCDEnhanced(AfDCD):
    """Af-DCD with the enhanced projector: four 3x3 convolutions instead of two.

    a = relu(conv x), b = relu(conv a), P(x) = ( conv a + conv b ) / 2, all convolutions with a
    bias. See ``af_dcd`` for the rest. From R18 to R101 the extras have 152 M parameters and cost
    1246 GMAC forward for a 512 x 1024 image. It is not known which projector the published figures
    have; they are listed with ``af_dcd``.
    """

    name = "af_dcd:enhanced"
    title = "Augmentation-free dense contrastive distillation (enhanced projector)"
    cost_drivers = (
        "the teacher's forward; four 3x3 convolutions at the width of the teacher's c5, twice "
        "those of af_dcd; L1 distances of all vectors of a patch, in blocks"
    )
    recipes = ()

    def _projector(self, channels: int) -> nn.Module:
        return EnhancedProjector(channels)
