"""Networks and maps for the tests of methods, and what is asked of their terms."""

from itertools import pairwise

import pytest
import torch
from builders import tiny_batch
from torch import nn

from kdprof.discovery import builtin_methods, find_method
from kdprof.hardware import blocks
from kdprof.method import NetworkInfo, Taps
from kdprof.step import TrainStep
from kdprof.study import StepSettings

CLASSES = 5
CPU = torch.device("cpu")
NAMES = sorted(name for name, entry in builtin_methods().items() if entry.origin == "built-in")
DISTILLING = [name for name in NAMES if find_method(name).cls.weights]


def network(width: int) -> NetworkInfo:
    channels = {"logits": CLASSES, "aux": CLASSES, "head": 3 * width}
    channels |= {stage: (i + 1) * width for i, stage in enumerate(("c2", "c3", "c4", "c5"))}
    return NetworkInfo(f"net{width}", CLASSES, channels, dict.fromkeys(channels, 4))


STUDENT, TEACHER = network(2), network(4)


def make(name: str, seed: int = 0, **hyper):
    torch.manual_seed(seed)
    method = find_method(name).cls(**hyper)
    method.build(STUDENT, TEACHER if method.needs_teacher() else None)
    return method.train()


def draw(method, images=2, grid=(9, 7), teacher_grid=None, scale=1.0, seed=0, void=False):
    """Return random student taps (leaves), teacher taps and labels for a method."""
    generator = torch.Generator().manual_seed(seed)

    def maps(info, taps, size):
        shape = {tap: (images, info.channels[tap], *size) for tap in taps if tap != "classifier"}
        if "classifier" in taps:
            shape["classifier"] = (info.num_classes, info.channels["head"], 1, 1)
        return {t: scale * torch.randn(s, generator=generator) for t, s in shape.items()}

    student = maps(STUDENT, method.student_taps(), grid)
    teacher = maps(TEACHER, method.read_of_teacher(), teacher_grid or grid)
    size = (images, 4 * grid[0] + 1, 4 * grid[1] + 3)
    labels = torch.randint(0, CLASSES, size, generator=generator)
    labels[torch.rand(size, generator=generator) < (1.0 if void else 0.2)] = 255
    student = Taps(**{tap: value.requires_grad_() for tap, value in student.items()})
    return student, Taps(**teacher), labels if "labels" in method.taps else None


def cast(taps: Taps, dtype: torch.dtype) -> Taps:
    return Taps(**{tap: value.detach().to(dtype) for tap, value in vars(taps).items()})


def exactly(taps: Taps) -> Taps:
    return Taps(**{tap: value.double() for tap, value in vars(taps).items()})


def rounded(taps: Taps, dtype: torch.dtype, *, leaves: bool = False) -> Taps:
    """Return taps in half precision, clamped to what float16 holds."""
    maps = {t: v.detach().clamp(-3e4, 3e4).to(dtype) for t, v in vars(taps).items()}
    return Taps(**{tap: value.requires_grad_(leaves) for tap, value in maps.items()})


def random(shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator)


def set_block(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Set the float32 numbers of a block of every computation in blocks."""
    patch.setattr(blocks, "CPU_BLOCK_BYTES", 4 * elements)


def seeded(function, *arguments):
    torch.manual_seed(5)
    return function(*arguments)


def weighted(method, terms):
    return sum(method.weights[name] * term.double() for name, term in terms.items())


def finite_with_gradient(loss, *inputs):
    """Return the gradients of a loss; it and they are finite."""
    assert loss.isfinite()
    found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    assert all(g.isfinite().all() for g in found if g is not None)
    return found


EQUATION_CASES = {
    "odd": {"images": 3, "grid": (5, 7), "scale": 2.0},
    "batch-1": {"images": 1, "grid": (3, 5)},
    "coarser": {"grid": (3, 4), "teacher_grid": (6, 7)},
    "finer": {"grid": (6, 5), "teacher_grid": (3, 4), "scale": 5.0},
}
"""What :func:`draw` is given where every setting of a method is compared with its oracle."""


def assert_equation(oracle, method, student, teacher):
    """Terms within 1e-4 and gradients, of extras too, within 1e-3 of the loops in float64."""
    # The oracle comes first: a forward of the method moves the spectral norms of a discriminator.
    expected = oracle(student, teacher, None, method)
    terms = method(student, teacher, None)
    assert terms.keys() == expected.keys() == method.weights.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    leaves = [*vars(student).values(), *method.extra_parameters()]
    ours, exact = (torch.autograd.grad(weighted(method, t), leaves) for t in (terms, expected))
    largest = max(g.norm().item() for g in exact)
    for value, wanted in zip(ours, exact, strict=True):
        # A gradient that vanishes by cancellation is compared with those it is made of.
        assert (value - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5 * largest


class StagedNet(nn.Module):
    """A network with every tap there is: c2 at stride 4, the others at stride 8."""

    align_corners = False
    heads = ()

    def __init__(self, width: int):
        super().__init__()
        self.info = network(width)
        self.info.stride.update(dict.fromkeys(self.info.stride, 8), c2=4)
        c = self.info.channels
        self.c2 = nn.Sequential(nn.Conv2d(3, c["c2"], 3, 4, 1), nn.BatchNorm2d(c["c2"]), nn.ReLU())
        self.c3 = nn.Sequential(nn.Conv2d(c["c2"], c["c3"], 3, 2, 1), nn.ReLU())
        self.c4 = nn.Sequential(nn.Conv2d(c["c3"], c["c4"], 1), nn.ReLU())
        self.c5 = nn.Sequential(nn.Conv2d(c["c4"], c["c5"], 1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(c["c5"], c["head"], 1), nn.ReLU(), nn.Dropout2d(0.1))
        self.logits = nn.Conv2d(c["head"], CLASSES, 1)
        self.aux = nn.Conv2d(c["c4"], CLASSES, 1)

    def forward(self, images, taps):
        made = {"c2": self.c2((images.float() - 128) / 64)}
        path = ("c2", "c3", "c4", "c5", "head", "logits")
        for before, after in pairwise(path):
            made[after] = getattr(self, after)(made[before])
        made |= {"aux": self.aux(made["c4"]), "classifier": self.logits.weight}
        return Taps(**{tap: made[tap] for tap in taps})


def real_step(
    name: str, *, initial_seed: int = 0, precision: str = "fp32", device=CPU
) -> TrainStep:
    """Return the step of a method on networks with logits of 12 x 16; run seed 0."""
    torch.manual_seed(9)
    teacher = StagedNet(4)
    torch.manual_seed(initial_seed)
    student, method = StagedNet(2), find_method(name).cls()
    method.build(student.info, teacher.info if method.needs_teacher() else None)
    values = {"batch": 2, "crop": (96, 128), "learning_rate": 0.01, "precision": precision}
    return TrainStep(
        student=student.to(device),
        teacher=teacher.to(device) if method.needs_teacher() else None,
        method=method.to(device),
        settings=StepSettings(**values),
        iterations=10,
        seed=0,
        device=device,
    )


def real_batch(index=0):
    return tiny_batch(index, (96, 128), 2)
