"""Published recipes that several methods share: networks, schedule, optimiser, student alone.

Each function returns a :class:`kdprof.method.Recipe` with the published values as defaults;
``changes`` replaces fields of it. The mIoU are percent on the validation images unless ``split``
says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdprof.method import Recipe

MOMENTUM = "momentum 0.9"
FROM_BPKD: dict[str, Any] = {"gpus": 4, "gpu": "A100", "source": "BPKD repository"}
"""The fields in which BPKD's recipe differs from mmsegmentation's."""
BPKD_RERUN: dict[str, Any] = {
    "gpus": 4,
    "gpu": "A100",
    "source": "BPKD repository, its authors' rerun",
}
"""The same fields for another method of BPKD's table."""
SKDS_RERUN = BPKD_RERUN | {"source": "BPKD repository, its authors' rerun (terms not stated)"}
"""The same fields for the row SKDS of that table, which does not say which terms of structure KD it
has."""
VOC_WEIGHTS = {"pixel": 0.01, "region": 0.01}
"""CIRKD's weights of these terms on Pascal VOC."""

_CIRKD_DATA = {
    "Cityscapes": (40_000, (512, 1024), 78.07),
    "Pascal VOC": (40_000, (512, 512), 77.67),
    "CamVid": (40_000, (360, 360), 69.84),
    "ADE20K": (40_000, (512, 512), 42.70),
    "COCO-Stuff": (80_000, (512, 512), 38.71),
}
"""Iterations, crop and the mIoU of the DeepLabV3-R101 teacher."""
_CIRKD_ALONE = {
    ("Cityscapes", "DeepLabV3-R18"): 74.21,
    ("Cityscapes", "DeepLabV3-MobileNetV2"): 73.12,
    ("Cityscapes", "PSPNet-R18"): 72.55,
    ("Pascal VOC", "DeepLabV3-R18"): 73.21,
    ("Pascal VOC", "PSPNet-R18"): 73.33,
    ("CamVid", "DeepLabV3-R18"): 66.92,
    ("CamVid", "PSPNet-R18"): 66.73,
    ("ADE20K", "DeepLabV3-R18"): 33.91,
    ("COCO-Stuff", "DeepLabV3-R18"): 32.60,
}
"""mIoU of the student alone, by data and student."""
_CIRKDV2_ALONE = {
    ("Cityscapes", "DeepLabV3-R18"): 73.56,
    ("Cityscapes", "UperNet-R18"): 68.90,
    ("Cityscapes", "DeepLabV3-MobileNetV3-S"): 65.05,
    ("Cityscapes", "PSPNet-MobileNetV3-S"): 62.78,
    ("Cityscapes", "DeepLabV3-MobileViT-XXS"): 66.24,
    ("Cityscapes", "PSPNet-MobileViT-XXS"): 65.48,
    ("Cityscapes", "SegFormer-B0"): 74.12,
    ("ADE20K", "DeepLabV3-R18"): 36.92,
    ("ADE20K", "UperNet-R18"): 34.37,
}
"""mIoU of the student alone, by data and student."""
CIRKDV2_STUDENTS = [student for data, student in _CIRKDV2_ALONE if data == "Cityscapes"]
_ATTNFD_DATA = {
    "Cityscapes": (200, None, 0.01, 77.66, 64.09),
    "Pascal VOC": (120, 6, 0.007, 77.85, 67.50),
}
"""Epochs, batch, learning rate, mIoU of the teacher and of the student alone."""


def alone(recipe: Recipe) -> Recipe:
    """Return the recipe of the student alone that belongs to a distillation recipe."""
    return replace(
        recipe, teacher=None, teacher_miou=None, student_miou=None, miou=recipe.student_miou
    )


def mmseg(student: str = "PSPNet-R18", dataset: str = "Cityscapes", **changes: Any) -> Recipe:
    """Return mmsegmentation's recipe: 80k iterations of 8 images, 512 x 1024; on ADE20K 16 images,
    512 x 512."""
    ade = dataset == "ADE20K"
    fields = {
        "teacher": "PSPNet-R101",
        "iterations": 80_000,
        "batch": 16 if ade else 8,
        "crop": (512, 512) if ade else (512, 1024),
        "optimizer": f"SGD 0.01, {MOMENTUM}, wd 5e-4",
        "schedule": "poly 0.9, floor 1e-4",
        "source": "mmsegmentation model zoo",
        "gpus": 4,
    }
    return Recipe(**{"dataset": dataset, "student": student, **fields, **changes})


def bpkd_context(**changes: Any) -> Recipe:
    """Return BPKD's recipe for Pascal Context; of the schedule the iterations are published."""
    fields = {
        "batch": None,
        "crop": None,
        "optimizer": "not stated",
        "schedule": "not stated",
        "teacher_miou": 52.47,
        "student_miou": 43.79,
    }
    return mmseg("PSPNet-R18", "Pascal Context", **{**FROM_BPKD, **fields, **changes})


def skd(student: str = "PSPNet-R18", **changes: Any) -> Recipe:
    """Return structure KD's recipe for Cityscapes: 40k iterations of 8 images, 512 x 512."""
    fields = {
        "dataset": "Cityscapes",
        "teacher": "PSPNet-R101",
        "iterations": 40_000,
        "batch": 8,
        "crop": (512, 512),
        "optimizer": f"SGD 0.01, {MOMENTUM}, wd 5e-4",
        "schedule": "poly 0.9",
        "source": "structure-KD repository",
        "gpus": 1,
        "student_miou": 69.10,
    }
    return Recipe(**{"student": student, **fields, **changes})


def mgd(student: str = "PSPNet-R18", **changes: Any) -> Recipe:
    """Return MGD's recipe for Cityscapes: 40k iterations of 16 images, 512 x 512."""
    fields = {
        "iterations": 40_000,
        "batch": 16,
        "crop": (512, 512),
        "source": "MGD repository",
        "gpus": 8,
        "teacher_miou": 78.34,
        "student_miou": {"PSPNet-R18": 69.85, "DeepLabV3-R18": 73.20}[student],
    }
    return mmseg(student, **{**fields, **changes})


def cirkd(student: str = "PSPNet-R18", dataset: str = "Cityscapes", **changes: Any) -> Recipe:
    """Return CIRKD's recipe of 2022: 40k iterations (COCO-Stuff 80k) of 16 images."""
    iterations, crop, teacher_miou = _CIRKD_DATA[dataset]
    fields = {
        "teacher": "DeepLabV3-R101",
        "iterations": iterations,
        "batch": 16,
        "crop": crop,
        "optimizer": f"SGD 0.02, {MOMENTUM}, wd 1e-4",
        "schedule": "poly 0.9",
        "source": "CIRKD repository",
        "gpus": 8,
        "gpu": "RTX 3090",
        "teacher_miou": teacher_miou,
        "student_miou": _CIRKD_ALONE[dataset, student],
    }
    return Recipe(**{"dataset": dataset, "student": student, **fields, **changes})


def cirkd_segformer(**changes: Any) -> Recipe:
    """Return CIRKD's recipe for SegFormer on Cityscapes, of its training scripts.

    They give no images per device: those of skd, cwd, ifvd and dsd start two processes on eight
    GPUs. The weight decay is the training file's default.
    """
    fields = {
        "teacher": "SegFormer-B4",
        "iterations": 160_000,
        "batch": 8,
        "crop": (1024, 1024),
        "optimizer": "AdamW 2e-4, wd 1e-4",
        "schedule": "poly 0.9",
        "source": "CIRKD repository",
        "teacher_miou": 81.23,
        "student_miou": 75.58,
    }
    return Recipe(**{"dataset": "Cityscapes", "student": "SegFormer-B0", **fields, **changes})


def cirkdv2(student: str, dataset: str = "Cityscapes", **changes: Any) -> Recipe:
    """Return CIRKD's recipe of 2025: 80k iterations, with one image per device on Cityscapes."""
    city = dataset == "Cityscapes"
    fields = {
        "teacher": "DeepLabV3-R101",
        "iterations": 80_000,
        "batch": 8 if city else 16,
        "crop": (512, 1024) if city else (512, 512),
        "optimizer": f"SGD {0.01 if city else 0.02}, {MOMENTUM}, wd 1e-4",
        "schedule": "poly 0.9",
        "source": "CIRKD repository, 2025",
        "gpus": 8 if city else None,
        "teacher_miou": 78.30 if city else 43.83,
        "split": "test" if city else "val",
        "student_miou": _CIRKDV2_ALONE[dataset, student],
    }
    if "MobileViT" in student:
        fields |= {"optimizer": "AdamW 9e-4"}
    if "SegFormer" in student:
        fields |= {
            "teacher": "SegFormer-B4", "teacher_miou": None, "iterations": 160_000,
            "crop": (1024, 1024), "optimizer": "AdamW 2e-4, wd 1e-4",
        }  # fmt: skip
    return Recipe(**{"dataset": dataset, "student": student, **fields, **changes})


def attnfd(dataset: str, **changes: Any) -> Recipe:
    """Return AttnFD's recipe, whose length is published in epochs."""
    epochs, batch, rate, teacher_miou, student_miou = _ATTNFD_DATA[dataset]
    fields = {
        "teacher": "DeepLabV3+-R101",
        "iterations": None,
        "epochs": epochs,
        "batch": batch,
        "crop": (513, 513),
        "optimizer": f"SGD {rate} (head {10 * rate:g}), Nesterov, wd 5e-4",
        "schedule": "poly 0.9",
        "source": "AttnFD repository" + (" (inputs of fixed size)" if batch is None else ""),
        "teacher_miou": teacher_miou,
        "student_miou": student_miou,
    }
    return Recipe(**{"dataset": dataset, "student": "DeepLabV3+-R18", **fields, **changes})
