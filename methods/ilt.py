"""Distillation for incremental learning (ILT): the output term and the feature term."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import adaptor, match_grid


def _added_class(miou: float, new_class_iou: float) -> Recipe:
    """Return the recipe that adds one class to 19 classes of Pascal VOC."""
    return Recipe(
        dataset="Pascal VOC 19-1",
        teacher="DeepLabV2-R101",
        student="DeepLabV2-R101",
        iterations=1_000,
        batch=4,
        crop=(321, 321),
        optimizer="SGD 5e-5, momentum 0.9, wd 1e-4",
        schedule="not stated; the old model: 20k iterations, 1e-4 to 1e-6, poly 0.9",
        source=f"ILT repository; the new class alone {new_class_iou:.2f}",
        gpus=1,
        gpu="RTX 2080 Ti",
        miou=miou,
    )


def padded_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the soft cross-entropy over all classes at positions of old classes or background.

    Args:
        student: logits, (N, C, h, w).
        teacher: logits of the first C_old classes, (N, C_old, h, w).
        labels: (N, H, W), resized to the grid by nearest; positions with a label of C_old or above
            do not count.

    Returns:
        - mean over the counted positions of sum_{c < C_old} softmax(t)_c log softmax(s)_c, the
        student's softmax over all C classes; 0 where no position counts.
    """
    log_p = F.log_softmax(match_grid(student, teacher).float(), dim=1)
    target = F.softmax(teacher.float(), dim=1)
    entropy = -(target * log_p[:, : target.shape[1]]).sum(1)
    nearest = F.interpolate(labels[:, None].float(), teacher.shape[-2:], mode="nearest")[:, 0]
    counted = (nearest < target.shape[1]).float()
    return (entropy * counted).sum() / counted.sum().clamp(min=1)


class ILT(Method):
    """Knowledge distillation for incremental learning (Michieli and Zanuttigh, ICCV workshops 2019,
    arXiv 1907.13372), output term L'_D.

    The teacher is the frozen network of the previous task; the student has the teacher's C_old
    classes and new ones. With p = softmax of the student's logits over all C classes, q = softmax
    of the teacher's over its C_old, and M the positions labelled with an old class or background:
    L'_D = - 1 / |M| sum_{m in M} sum_{c < C_old} q_{m,c} log p_{m,c}; q is 0 for the new classes.
    T = 1, weight 1, in addition to the cross-entropy. If M is empty, the term is 0. If student and
    teacher agree, it is the teacher's entropy, not 0.

    The resolution is not published. Assumed: the term is computed on the grid of the logits, with
    labels resized by nearest. If the grids differ, the student's logits are resized bilinearly to
    the teacher's (kdprof's rule). Without new classes it is the cross-entropy with soft labels at
    labelled positions.

    Of the paper's other variants ``ilt:feature`` is the feature term; the frozen encoder (E_F) is
    not an objective and is left out. The authors published results of the terms one at a time, not
    together. A known re-implementation (MiB's) has another reduction: softmax over the old classes,
    mean over classes and positions, weight 100.
    """

    name = "ilt"
    title = "Incremental learning by distillation (output)"
    paper = "ICCV workshops 2019, arXiv 1907.13372"
    family = "incremental"
    taps = ("logits", "labels")
    teacher_taps = ("logits",)
    weights = {"ilt": 1.0}
    incremental = True
    equation = (
        "L = - mean over positions of old classes or background of sum_{c old} q_c log p_c, "
        "q = softmax(t) over old classes, p = softmax(s) over all"
    )
    cost_drivers = "the old model's forward; softmaxes over logits, which cost little"
    recipes = (_added_class(miou=68.39, new_class_iou=35.33),)

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Note in which case the term can be 0."""
        if student.num_classes > teacher.num_classes and not student.background:
            self.notes.append(
                "ilt uses only positions of old classes or background; without a background, an "
                "image that is labelled with new classes only has no such position: if all images "
                "of a batch are like that, the term is 0"
            )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``ilt``."""
        return {"ilt": padded_cross_entropy(student.logits, teacher.logits, labels)}


class ILTFeature(Method):
    """Knowledge distillation for incremental learning, feature term L''_D (see ``ilt``).

    L''_D = mean over N, C_T, h, w of ( f_S - f_T )^2, with f the last backbone stage (c5). The
    teacher is the network of the previous task. The weight is 50, in addition to the cross-entropy.
    No labels are used.

    In the paper both networks have the same architecture. For others, assumed: if the widths
    differ, a 1x1 convolution C_S -> C_T without bias is trained with the student, as in ``fitnet``;
    if the grids differ, the student's feature is resized bilinearly (kdprof's rule).
    """

    name = "ilt:feature"
    title = "Incremental learning by distillation (feature)"
    paper = "ICCV workshops 2019, arXiv 1907.13372"
    family = "incremental"
    taps = ("c5",)
    weights = {"ilt_feature": 50.0}
    incremental = True
    equation = "L = mean over N, C_T, h, w of ( f_S - f_T )^2, f = c5"
    cost_drivers = (
        "the old model's forward; one pass over c5; if the widths differ, a 1x1 convolution to the "
        "width of the teacher's c5"
    )
    recipes = (_added_class(miou=71.57, new_class_iou=50.64),)

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor if the widths differ."""
        self.adaptor = adaptor(student, teacher, "c5")
        before, after = student.channels["c5"], teacher.channels["c5"]
        if before != after:
            self.notes.append(
                f"c5 has {before} and {after} channels: the 1x1 adaptor between them is kdprof's, "
                "the published method has none"
            )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return ``ilt_feature``."""
        adapted = match_grid(self.adaptor(student.c5), teacher.c5)
        return {"ilt_feature": F.mse_loss(adapted.float(), teacher.c5.float())}
