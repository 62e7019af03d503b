"""Decomposed knowledge distillation for class-incremental segmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import check_settings
from kdprof.resized import resize_backward

BLOCK_ELEMENTS = 2**24
"""The most elements of a full-resolution map that are in memory at a time: 64 MiB in float32. A
block has at least one class of all images, even if that is more."""

Target = Callable[[slice], Tensor]
"""A function that returns the targets of a slice of classes, 0 to 1, (N, classes, H, W)."""


def resized(maps: Tensor, size: torch.Size) -> Tensor:
    """Return (N, C, h, w) maps resized bilinearly to ``size``."""
    if maps.shape[-2:] == size:
        return maps
    # The layout of the labels, whatever the network's: the targets are compared with it.
    return F.interpolate(maps.contiguous(), size, mode="bilinear", align_corners=False)


def labelled(labels: Tensor, first: int, count: int) -> Target:
    """Return the one-hot targets of the classes ``first`` to ``first + count - 1``.

    A pixel with any other label, or void, is 0 for all of them.
    """
    classes = torch.arange(first, first + count, device=labels.device)
    return lambda block: labels[:, None] == classes[block, None, None]


def sigmoids(logits: Tensor, size: torch.Size) -> Target:
    """Return soft targets: the sigmoid of logits that are resized to ``size``."""
    return lambda block: resized(logits[:, block].float(), size).sigmoid()


class _OneVsAll(torch.autograd.Function):
    """The autograd Function of :func:`one_vs_all`, before the division.

    Classes are processed in blocks, so that no full-resolution map of all of them is in memory. The
    same pass computes the gradient. This is possible because the gradient is linear in the one
    number that backward receives; it is small, because it has the size of the logits before their
    resize.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Target | None,
        size: torch.Size,
        positive_weight: float | Tensor,
    ) -> Tensor:
        total, gradient = logits.new_zeros(()), logits.new_zeros(logits.shape)
        classes = max(1, BLOCK_ELEMENTS // (len(logits) * size.numel()))
        for first in range(0, logits.shape[1], classes):
            block = slice(first, first + classes)
            small = logits[:, block]
            full = resized(small, size)
            y = None if target is None else target(block).to(full.dtype)
            weight = positive_weight
            if isinstance(weight, Tensor):
                weight = weight[block, None, None]
            loss, slope = _cross_entropy(full, y, weight)
            total += loss.sum()
            if small.shape != full.shape:
                slope = resize_backward(slope, small.shape[-2:])
            gradient[:, block] = slope
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def _cross_entropy(x: Tensor, y: Tensor | None, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return - w y log sigmoid(x) - (1 - y) log(1 - sigmoid(x)) and its derivative in x.

    If y is None, it counts as 0.
    """
    loss, slope = F.softplus(x), x.sigmoid()
    if y is None:
        return loss, slope
    if isinstance(weight, Tensor) or weight != 1:
        scale = 1 + (weight - 1) * y
        loss, slope, y = loss.mul_(scale), slope.mul_(scale), weight * y
    return loss.addcmul_(x, y, value=-1), slope.sub_(y)


def one_vs_all(
    logits: Tensor,
    target: Target | None,
    size: torch.Size | None = None,
    positive_weight: float | Tensor = 1.0,
) -> Tensor:
    """Return the binary cross-entropy of each class, averaged over N, H, W, summed over classes.

    Args:
        logits: (N, K, h, w), resized to the target bilinearly.
        target: None: all targets are 0.
        size: height and width of the target, if they are not those of the logits.
        positive_weight: factor of the y = 1 part, one for all classes or one for each, (K,).

    The full-resolution maps of logits, targets and losses exist only for one block of classes at a
    time. Backward costs almost nothing, because forward has computed the gradient. It cannot be
    differentiated again.
    """
    size = size or logits.shape[-2:]
    with torch.autocast(logits.device.type, enabled=False):
        total = _OneVsAll.apply(logits.float(), target, size, positive_weight)
    return total / (len(logits) * size.numel())


def split_logits(head: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the positive weights alone and of the negative weights alone, no bias.

    Args:
        head: (N, C, h, w) float32.
        classifier: (K, C, 1, 1).
    """
    weight = classifier.float()
    # One convolution computes both, so that the feature is read once.
    positive, negative = F.conv2d(head, torch.cat([weight.relu(), -(-weight).relu()])).chunk(2, 1)
    return positive, negative


_VOC = Recipe(
    dataset="Pascal VOC",
    teacher="DeepLabV3-R101",
    student="DeepLabV3-R101",
    iterations=None,
    epochs=60,
    batch=32,
    crop=(512, 512),
    optimizer="SGD 1e-4 (head 1e-3), Nesterov 0.9, wd 1e-4 on new classifiers only",
    schedule="decay not stated",
    source="DKD repository; overlapped, all classes after the last step",
    gpus=4,
)
_ADE = replace(
    _VOC,
    dataset="ADE20K",
    epochs=100,
    batch=24,
    optimizer="SGD 2.5e-4 (head 2.5e-3), Nesterov 0.9, wd 1e-4 on new classifiers only",
    schedule="20 % warm-up, decay not stated",
    source="DKD repository; overlapped, all classes after the last step; positive_weight 35",
    gpus=None,
)


class DKD(Method):
    """Decomposed knowledge distillation (Baek et al., NeurIPS 2022, arXiv 2210.05941), a step that
    adds classes. (It is not decoupled KD, which has the same initials.)

    Every class has its own binary classifier: a sigmoid instead of a softmax over the classes. BCE
    is the binary cross-entropy; each term is a mean over N, H, W for each class, then a *sum* over
    classes. With z the logits, f the head feature, W the 1x1 classifier, W+ = max(W, 0),
    W- = min(W, 0):

    - mbce 1: BCE(up(z_S), y = k) of the new classes k; ``positive_weight`` multiplies the part of
      y = k. It replaces the step's cross-entropy. All other pixels, also void ones, are negative.
    - kd 5: BCE(up(z_S), sigmoid(up(z_T))) of the old classes without the background.
    - dkd_positive 5, dkd_negative 5: BCE(W+ f of the student, sigmoid(W+ f of the teacher)) of the
      same classes on the grid of f, and the same with W-; no bias.
    - ac 1: BCE(up(A f_S), 0) of an auxiliary classifier A, whose input f_S is detached.

    ``positive_weight`` is 1 for VOC and 35 for ADE20K. The prediction is background where no
    sigmoid is above 0.5 (:meth:`decide`). If student and teacher agree, BCE against a soft target
    is the target's entropy, not 0.

    The published network has f at stride 16; here f has the stride of the networks. Assumed: ``up``
    resizes bilinearly to the labels' size, without aligned corners, and ac is computed at that
    size too. If the grids of f differ, the student's split logits are resized bilinearly to the
    teacher's (kdprof's rule); the widths of f may differ. Without new classes mbce covers all
    classes. A is an extra of the method (default initialisation, assumed). It is not channel 0 of
    the logits, which no term here trains. These published settings are not part of the objective
    and are left to the study: head learning rate x10, weight decay on new classifiers only, frozen
    batch norm and no dropout. DKD-M's memory of old images is left out. ``dkd:first`` trains the
    old model.

    The published form stores maps of classes x H x W of both networks. Here blocks of classes are
    processed one after the other and the gradient is computed in the forward pass, so backward
    takes almost no time. Only the sum of both can be compared with other methods.
    """

    name = "dkd"
    title = "Decomposed knowledge distillation"
    paper = "NeurIPS 2022, arXiv 2210.05941"
    family = "incremental"
    taps: ClassVar[tuple[str, ...]] = ("logits", "head", "classifier", "labels")
    teacher_taps: ClassVar[tuple[str, ...] | None] = ("logits", "head", "classifier")
    weights = {"mbce": 1.0, "kd": 5.0, "dkd_positive": 5.0, "dkd_negative": 5.0, "ac": 1.0}
    incremental = True
    replaces_task_loss = True
    equation = (
        "L = BCE(up(z), y) of new classes + 5 BCE(up(z_S), sigmoid(up(z_T))) + 5 BCE(W+ f_S, "
        "sigmoid(W+ f_T)) + 5 the same of W-, of old classes, + BCE(up(A f_S), 0)"
    )
    cost_drivers = (
        "the old model's forward; logits of every class of both networks at label resolution, "
        "which is memory traffic"
    )
    recipes: ClassVar[tuple[Recipe, ...]] = (
        *(
            replace(_VOC, dataset=f"Pascal VOC {step}", miou=miou)
            for step, miou in (
                ("19-1", 76.13), ("15-5", 73.95), ("15-1", 70.50), ("10-1", 60.43), ("5-3", 58.98),
            )
        ),
        *(
            replace(_ADE, dataset=f"ADE20K {step}", miou=miou)
            for step, miou in (("100-50", 35.55), ("100-10", 34.53), ("50-50", 34.39))
        ),
    )  # fmt: skip

    positive_weight: float = 1.0

    def __init__(self, **settings):
        super().__init__(**settings)
        check_settings(self, positive=("positive_weight",))
        self.background = False

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the auxiliary classifier."""
        self.background = student.background
        self.known = slice(int(student.background), teacher.num_classes)
        more = student.num_classes > teacher.num_classes
        self.first_learned = teacher.num_classes if more else self.known.start
        self.auxiliary_classifier = nn.Conv2d(student.channels["head"], 1, 1)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``mbce``, ``kd``, ``dkd_positive``, ``dkd_negative`` and ``ac``."""
        # float32, because sums of products of one sign may exceed the range of half precision.
        with torch.autocast(labels.device.type, enabled=False):
            head, size = student.head.float(), labels.shape[-2:]
            ours, theirs = student.logits[:, self.known], teacher.logits[:, self.known]
            auxiliary = self.auxiliary_classifier(head.detach())
            return {
                "mbce": self._mbce(student.logits, labels),
                "kd": one_vs_all(ours, sigmoids(theirs, size), size),
                **self._split_terms(head, student.classifier, teacher),
                "ac": one_vs_all(auxiliary, None, size),
            }

    def _mbce(self, logits: Tensor, labels: Tensor) -> Tensor:
        learned = logits[:, self.first_learned :]
        target = labelled(labels, self.first_learned, learned.shape[1])
        return one_vs_all(learned, target, labels.shape[-2:], self.positive_weight)

    def _split_terms(self, head: Tensor, classifier: Tensor, teacher: Taps) -> dict[str, Tensor]:
        ours = split_logits(head, classifier[self.known])
        theirs = split_logits(teacher.head.float(), teacher.classifier[self.known])
        grid = teacher.head.shape[-2:]
        return {
            name: one_vs_all(mine, sigmoids(target, grid), grid)
            for name, mine, target in zip(
                ("dkd_positive", "dkd_negative"), ours, theirs, strict=True
            )
        }

    def decide(self, logits: Tensor) -> Tensor:
        """Return the logits with 0 for the background, if there is one.

        The background is therefore predicted where no sigmoid is above 0.5.
        """
        if not self.background:
            return logits
        return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, 1:]], 1)


class DKDFirst(DKD):
    """The first step of ``dkd``, which trains the old model without a teacher.

    It is mbce 1 of all classes, with ``positive_weight`` 2 (35 for ADE20K); void pixels are
    negative.

    The target of channel 0, the background, is 0 at every pixel (``ignore_bg`` of the authors'
    code): the classifiers of new classes are initialised from it and should predict no pixel at
    first. The authors' new classifiers are initialised from their auxiliary classifier, which is
    trained to the same target, but on detached features. Here the gradient reaches the features
    too, but it becomes small as soon as the channel is negative.
    """

    name = "dkd:first"
    title = "Decomposed knowledge distillation (first step)"
    taps = ("logits", "labels")
    teacher_taps = ()
    weights = {"mbce": 1.0}
    equation = "L = BCE(up(z), y) of all classes, sigmoid by sigmoid; the background always 0"
    cost_drivers = "logits of every class at label resolution, which is memory traffic; no teacher"
    recipes = (
        replace(
            _VOC,
            dataset="Pascal VOC, first step",
            teacher=None,
            optimizer="SGD 1e-3 (head 1e-2), Nesterov 0.9, wd 1e-4",
            source="DKD repository",
        ),
    )

    positive_weight: float = 2.0

    def build(self, student: NetworkInfo, teacher: NetworkInfo | None) -> None:
        """Store whether class 0 is a background."""
        self.background = student.background
        self.first_learned = int(student.background)

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``mbce``."""
        mbce = self._mbce(student.logits, labels)
        if self.background:
            mbce = mbce + one_vs_all(student.logits[:, :1], None, labels.shape[-2:])
        return {"mbce": mbce}
