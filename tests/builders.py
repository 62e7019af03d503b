"""Small real objects that several test files need."""

import torch
import torch.nn.functional as F
from torch import nn

from kdprof.method import Method, NetworkInfo, Taps
from kdprof.step import TrainStep
from kdprof.study import StepSettings

CLASSES = 3

MY_METHOD = '''
import torch.nn.functional as F
from kdprof.method import Method


class MyKD(Method):
    """Mean squared error between logits."""

    taps = ("logits",)
    weights = {"mse": 1.0}

    def forward(self, student, teacher, labels):
        return {"mse": F.mse_loss(student.logits, teacher.logits)}
'''
"""The method of README.md, in a user's file."""


class TinyNet(nn.Module):
    """A network with the interface of kdprof's own and all that a step can trip over: batch
    norm, dropout, an auxiliary head, stride 4."""

    align_corners = False
    heads = ("classifier", "auxiliary")

    def __init__(self, width: int = 6, dropout: float = 0.1):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 4, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.body = nn.Conv2d(width, 2 * width, 3, 1, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(2 * width, CLASSES, 1)
        self.auxiliary = nn.Conv2d(width, CLASSES, 1)
        self.runs = 0
        channels = {"logits": CLASSES, "aux": CLASSES, "head": 2 * width, "c4": width}
        self.info = NetworkInfo("tiny", CLASSES, channels, dict.fromkeys(channels, 4))

    def forward(self, images, taps):
        self.runs += 1
        c4 = self.stem((images.float() - 128) / 64)
        head = self.dropout(self.body(c4).relu())
        made = {"c4": c4, "head": head, "logits": self.classifier(head), "aux": self.auxiliary(c4)}
        return Taps(**{tap: made[tap] for tap in taps})


class Mimic(Method):
    """Mean squared error of logits and of adapted head features."""

    taps = ("logits", "head")
    weights = {"logits": 2.0, "head": 0.5}

    def build(self, student, teacher):
        self.adapt = nn.Conv2d(student.channels["head"], teacher.channels["head"], 1)

    def forward(self, student, teacher, labels):
        head = self.adapt(student.head)
        return {
            "logits": (student.logits - teacher.logits).square().mean(),
            "head": (head - teacher.head).square().mean(),
        }


class Alone(Method):
    """Reads nothing."""

    def forward(self, student, teacher, labels):
        return {}


def tiny_step(
    method_cls=Mimic, *, seed=0, iterations=20, dropout=0.1, ranks=None, **settings
) -> TrainStep:
    torch.manual_seed(seed)
    student, teacher, method = TinyNet(6, dropout), TinyNet(10), method_cls()
    method.build(student.info, teacher.info)
    values = {"batch": 4, "crop": (16, 20), "learning_rate": 0.05, **settings}
    return TrainStep(
        student=student,
        teacher=teacher if method.needs_teacher() else None,
        method=method,
        settings=StepSettings(**values),
        iterations=iterations,
        seed=seed,
        device=torch.device("cpu"),
        ranks=ranks,
    )


def tiny_batch(index=0, size=(16, 20), batch=4):
    generator = torch.Generator().manual_seed(index)
    coarse = torch.randint(0, 256, (batch, 1, 4, 5), dtype=torch.uint8, generator=generator)
    images = F.interpolate(coarse, size).expand(-1, 3, -1, -1).contiguous()
    labels = images[:, 0] // 86  # learnable: three bands of brightness
    labels[:, :2] = 255
    return images, labels
