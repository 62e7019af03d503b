"""Cross-image relational knowledge distillation (CIRKD), the whole method and its parts."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Recipe, Taps
from kdprof.methods._common import GroupedMethod, check_settings, match_grid, membership
from kdprof.methods._divergences import pixel_kl
from kdprof.methods._memory import ClassMemory
from kdprof.methods._recipes import (
    BPKD_RERUN,
    VOC_WEIGHTS,
    attnfd,
    cirkd,
    cirkd_segformer,
    mmseg,
)
from kdprof.methods._relations import mini_batch_kl, unit_positions


class CIRKDMiniBatch(GroupedMethod):
    """The mini-batch part of CIRKD with kd (kdprof's subset; not published as such).

    F = head features as unit vectors over channels. For every ordered pair (i, j) of the images on
    one device, i = j included, S_ij = F_i^T F_j / T, (h w) x (h w), and
    L_batch = 1 / N^2 sum_ij mean over rows KL( softmax S^T_ij || softmax S^S_ij ), T = 0.1, weight
    1, together with kd at weight 1. Void positions count. Devices exchange nothing, so with one
    image per device no relation crosses images. ``images_per_group = n`` relates n images at a time
    and averages over the groups, as devices with n images do: 2 in the published runs.

    ``pooling = 0`` is the authors' rule of 2025: 4x4 averages if both sides have 256 positions or
    more, no pooling below that. ``pooling = k`` above 0 takes k x k averages always (the option of
    their 2022 code has k = 2, and they advise it if memory is short). If the grids differ, the
    student's feature is resized bilinearly to the teacher's (kdprof's rule).

    The published form stores maps of N^2 (h w)^2. Here the map of two images is computed once for
    both orders, a few maps at a time (in blocks of rows, and once for each order, if a map is too
    large or T is below 1/60). The gradient is computed in the forward pass, so backward takes
    almost no time. Only the sum of both can be compared with other methods.
    """

    name = "cirkd:minibatch"
    title = "Cross-image relational distillation, mini-batch part"
    paper = "CVPR 2022, arXiv 2204.06986"
    family = "relational + logit"
    taps: ClassVar[tuple[str, ...]] = ("logits", "head")
    weights = {"kd": 1.0, "batch": 1.0}
    equation = (
        "S_ij = F_i^T F_j / T for images i, j; L_batch = 1 / N^2 sum_ij mean over rows KL( "
        "softmax S^T_ij || softmax S^S_ij )"
    )
    cost_drivers = (
        "the teacher's forward; (h w)^2 similarities of every pair of images on the device, which "
        "grows with the square of images (of a group) and of positions"
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
            "one image in a group: the batch term compares the positions of one image only, and no "
            "relation crosses images"
        )
        group = self.group_size(len(student))
        if group == 1 and note not in self.notes:
            self.notes.append(note)
        return mini_batch_kl(student, teacher, self.batch_temperature, self.pooling, group)


class CIRKDMemory(GroupedMethod):
    """The memory part of CIRKD with kd (kdprof's subset; not published as such).

    t_p, s_p = unit vectors of the teacher's head feature and of the student's projected one (1x1
    convolution, batch norm, ReLU, 1x1 convolution, to the teacher's channels) at position p; the
    keys K = stored teacher vectors, the same for both. L = T'^2 mean over valid p of
    KL( softmax(t_p . K / T T') || softmax(s_p . K / T T') ), T = 0.1, T' = 1, for ``pixel`` and
    ``region`` at weight 0.1 each (VOC 0.01), together with kd at weight 1.

    Each class has a ring of 20000 pixels and one of 2000 regions (SegFormer students: 2000 and
    2000). The batch is stored before the terms are computed: for each image and class the mean of
    its unit vectors as a region, and up to 16 pixels. The keys are one random set of slots, the
    same in every class: 4096 // classes + 1 pixels and 1024 // classes + 1 regions of each class.
    If there are several ranks, each of them stores the images of all, and draws keys of its own.
    With ``images_per_group = n`` the mean is over the valid p of n images at a time and then over
    the groups, as on devices with n images, but all groups have the same keys.

    The authors' code draws these 16 pixels as random numbers below the class's pixel count, but
    then uses the numbers as positions in the whole image. It therefore stores pixels of the first
    positions, whatever their class. The published numbers were obtained with this, and it is the
    default. ``own_pixels`` stores pixels of the class itself, as the paper says. If every pixel is
    void, the authors' code gives NaN; here the terms are 0.

    Labels are resized by nearest. If the grids differ, the student's feature is resized bilinearly
    to the teacher's before the projection (kdprof's rule). The similarities are computed in blocks
    and the gradient is computed in the forward pass, so backward takes almost no time. Only the sum
    of both can be compared with other methods.
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
        "blocks; a projection; the storing of each batch in two memories"
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
        """Store the batch and return ``kd``, ``pixel`` and ``region``."""
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
        group = self.group_size(len(members))
        queues = {
            "pixel": (self.memory.pixels, self.pixel_contrast),
            "region": (self.memory.regions, self.region_contrast),
        }
        terms = {}
        for name, (queue, total) in queues.items():
            keys = queue.keys(total // self.num_classes + 1)
            terms[name] = self.memory.relation(
                ours, theirs, members, keys, *temperatures, group=group
            )
        return terms


class CIRKD(CIRKDMiniBatch, CIRKDMemory):
    """Cross-image relational knowledge distillation (Yang et al., CVPR 2022, arXiv 2204.06986).

    L = 1 L_kd + 1 L_batch + 0.1 L_pixel + 0.1 L_region: logit distillation at T = 1, the relations
    of all positions of all images on a device to each other (see ``cirkd:minibatch`` for the
    equation and ``pooling``), and their relations to teacher pixels and regions of past batches
    (see ``cirkd:memory`` for the equation, the sizes and ``own_pixels``). VOC uses 0.01 for pixel
    and region; SegFormer students use a ``pixel_memory`` of 2000.

    The cost of the batch term grows with the square of the images on a device and of the positions.
    The published schedule has 2 images on each of 8 devices; with another number of images per
    device the objective is a different one. ``images_per_group = 2`` gives the published one on any
    device.

    The head features have the widths of the networks: 128 and 256 in the authors' code of 2022, 512
    and 512 in that of 2025. Their projection has synchronised batch norm; here it has batch norm.
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
        "the teacher's forward; (h w)^2 similarities of every pair of images on the device (of a "
        "group), and of every position with about 5000 stored vectors; a projection; two memories"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        cirkd("PSPNet-R18", source="CIRKD repository; test 74.05", miou=74.73),
        cirkd("DeepLabV3-R18", source="CIRKD repository; test 75.05", miou=76.38),
        cirkd("DeepLabV3-MobileNetV2", source="CIRKD repository; test 74.03", miou=75.42),
        cirkd_segformer(miou=76.92),
        mmseg(teacher_miou=79.74, student_miou=74.23, miou=76.03, **BPKD_RERUN),
        cirkd("DeepLabV3-R18", "Pascal VOC", weights=VOC_WEIGHTS, miou=74.50),
        cirkd("PSPNet-R18", "Pascal VOC", weights=VOC_WEIGHTS, miou=74.78),
        cirkd("DeepLabV3-R18", "CamVid", miou=68.21),
        cirkd("PSPNet-R18", "CamVid", miou=68.65),
        cirkd("DeepLabV3-R18", "ADE20K", miou=35.41),
        mmseg(
            "PSPNet-R18",
            "ADE20K",
            teacher_miou=44.39,
            student_miou=33.30,
            miou=35.07,
            **BPKD_RERUN,
        ),
        cirkd("DeepLabV3-R18", "COCO-Stuff", miou=33.11),
        attnfd("Cityscapes", miou=70.49),
        attnfd("Pascal VOC", miou=71.02),
    )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Store the batch and return ``kd``, ``batch``, ``pixel`` and ``region``."""
        return {
            "kd": pixel_kl(student.logits, teacher.logits, self.temperature),
            "batch": self._batch(student.head, teacher.head),
            **self._memory(student.head, teacher.head, labels),
        }
