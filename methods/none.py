"""The student alone, one of the two controls of every comparison."""

from __future__ import annotations

from torch import Tensor

from kdprof.method import Method, Taps
from kdprof.methods._recipes import (
    CIRKDV2_STUDENTS,
    FROM_BPKD,
    alone,
    attnfd,
    bpkd_context,
    cirkd,
    cirkd_segformer,
    cirkdv2,
    mgd,
    mmseg,
    skd,
)


class NoDistillation(Method):
    """The student alone: only the task loss, without a teacher.

    The task loss is that of every step: cross-entropy of the resized logits plus 0.4 times that of
    the auxiliary head. The same network reaches 69.1 to 74.9 mIoU, depending on the recipe alone.
    """

    name = "none"
    title = "Student alone"
    paper = "-"
    family = "control"
    equation = "CE(up(z), y) + 0.4 CE(up(z_aux), y): the task loss alone"
    cost_drivers = "the student's own convolutions, forward and backward; no teacher is run"
    recipes = (
        mmseg(teacher=None, miou=74.87),
        mmseg("PSPNet-R18b", teacher=None, miou=74.23),
        mmseg("PSPNet-R101", teacher=None, iterations=40_000, miou=78.34),
        mmseg("PSPNet-R101", teacher=None, miou=79.76),
        mmseg("DeepLabV3-R18", teacher=None, miou=76.70),
        mmseg("DeepLabV3-R18b", teacher=None, miou=76.26),
        mmseg("DeepLabV3-R101", teacher=None, iterations=40_000, miou=77.12),
        mmseg("DeepLabV3-R101", teacher=None, miou=80.20),
        mmseg("PSPNet-R101", "ADE20K", teacher=None, miou=43.57),
        mmseg("PSPNet-R101", "ADE20K", teacher=None, iterations=160_000, miou=44.39),
        mmseg("PSPNet-R50", "ADE20K", teacher=None, miou=41.13),
        mmseg("PSPNet-R18", "ADE20K", teacher=None, miou=33.30, **FROM_BPKD),
        mmseg("HRNetV2-W18S", teacher=None, miou=75.31, source=FROM_BPKD["source"], gpus=None),
        mmseg(
            "DeepLabV3+-MobileNetV2",
            teacher=None,
            miou=75.29,
            source=FROM_BPKD["source"],
            gpus=None,
        ),
        mmseg("ISANet-R18", teacher=None, miou=73.62, **FROM_BPKD),
        alone(bpkd_context()),
        alone(cirkd("PSPNet-R18", source="CIRKD repository; test 72.29")),
        alone(cirkd("DeepLabV3-R18", source="CIRKD repository; test 73.45")),
        alone(cirkd("DeepLabV3-MobileNetV2")),
        alone(cirkd_segformer()),
        alone(cirkd("PSPNet-R18", "Pascal VOC")),
        alone(cirkd("DeepLabV3-R18", "Pascal VOC")),
        alone(cirkd("PSPNet-R18", "CamVid")),
        alone(cirkd("DeepLabV3-R18", "CamVid")),
        alone(cirkd("DeepLabV3-R18", "ADE20K")),
        alone(cirkd("DeepLabV3-R18", "COCO-Stuff")),
        alone(
            cirkd(
                "DeepLabV3-R18",
                iterations=80_000,
                batch=8,
                crop=None,
                gpus=None,
                source="an issue of the CIRKD repository (a third party, lr 0.02; crop not stated)",
                student_miou=76.21,
            )
        ),
        *(alone(cirkdv2(student)) for student in CIRKDV2_STUDENTS),
        alone(cirkdv2("DeepLabV3-R18", "ADE20K")),
        alone(cirkdv2("UperNet-R18", "ADE20K")),
        alone(skd()),
        alone(
            skd(
                "ESPNet",
                dataset="CamVid",
                iterations=None,
                batch=None,
                crop=None,
                gpus=None,
                optimizer="not stated",
                schedule="not stated",
                student_miou=57.8,
            )
        ),
        alone(mgd("PSPNet-R18", source="MGD repository, its own rerun")),
        alone(mgd("DeepLabV3-R18")),
        alone(attnfd("Cityscapes")),
        alone(attnfd("Pascal VOC")),
    )

    def forward(self, student: Taps, teacher: Taps, labels: Tensor | None) -> dict[str, Tensor]:
        """Return no terms."""
        return {}
