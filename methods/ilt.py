"""Distillation for incremental learning: the output and the feature term."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdprof.method import Method, NetworkInfo, Recipe, Taps
from kdprof.methods._common import adaptor, match_grid


def _added_class(miou: float, new_class_iou: float) -> Recipe:
    """Return the recipe of one class added to 19 of Pascal VOC."""
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
        gpus="RTX 2080 Ti",
        miou=miou,
    )


def padded_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the soft cross-entropy over all classes where an old class or background is labelled.

    Args:
        student: logits, (N, C, h, w).
        teacher: logits of the first C_old of the classes, (N, C_old, h, w).
        labels: (N, H, W), resized to the grid by nearest; values of C_old and above do not count.

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

    The teacher is the network one task ago, frozen; the student knows C_old classes of its own and
    new ones. With p = softmax of the student's logits over all C classes and q = softmax of the
    teacher's over its C_old, and M the positions labelled with an old class or background:
    L'_D = - 1 / |M| sum_{m in M} sum_{c < C_old} q_{m,c} log p_{m,c}; q is 0 for the new classes.
    T = 1, weight 1, beside the cross-entropy. 0 where M is empty. Where student and teacher agree
    it is the teacher's entropy, not 0.

    At which resolution is not stated; assumed: it is taken on the grid of the logits, with labels
    resized by nearest. Where grids differ the student's logits are resized bilinearly to the
    teacher's (kdprof's rule). Without new classes it is cross-entropy with soft labels at labelled
    positions.

    Of the paper's other variants ``ilt:feature`` is the feature term; the frozen encoder (E_F) is
    no objective and is left out. The authors published the terms one at a time, not together. A
    known re-implementation (MiB's) is another reduction: softmax over the old classes, mean over
    classes and positions, weight 100.
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
    cost_drivers = "the old model's forward; softmaxes over logits: little"
    recipes = (_added_class(miou=68.39, new_class_iou=35.33),)

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Say where the term can be nothing."""
        if student.num_classes > teacher.num_classes and not student.background:
            self.notes.append(
                "ilt reads positions of old classes or background only; without a background there "
                "are none where labels hold new classes alone, and the term is 0"
            )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor) -> dict[str, Tensor]:
        """Return ``ilt``."""
        return {"ilt": padded_cross_entropy(student.logits, teacher.logits, labels)}


class ILTFeature(Method):
    """Knowledge distillation for incremental learning, feature term L''_D (see ``ilt``).

    L''_D = mean over N, C_T, h, w of ( f_S - f_T )^2, with f the last backbone stage (c5) and the
    teacher the network one task ago. Weight 50, beside the cross-entropy. No label is read.

    In the paper both networks are one architecture. For others, assumed: a 1x1 convolution
    C_S -> C_T without bias, there only where the widths differ and trained with the student, as in
    ``fitnet``; the student's feature is resized bilinearly where grids differ (kdprof's rule).
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
        "the old model's forward; reading c5; where widths differ a 1x1 convolution to the width "
        "of the teacher's c5"
    )
    recipes = (_added_class(miou=71.57, new_class_iou=50.64),)

    def build(self, student: NetworkInfo, teacher: NetworkInfo) -> None:
        """Create the adaptor where one is needed."""
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
