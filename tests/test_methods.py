"""Each objective against its equation written out, and what every method must hold to."""

import ast
import copy
import importlib
import inspect
import math
from itertools import pairwise

import pytest
import torch
from builders import tiny_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles_core import ORACLES, variation
from torch import nn

from kdprof.discovery import builtin_methods, find_method, method_modules
from kdprof.errors import UserError
from kdprof.measure.count import count_step, fake_tensors
from kdprof.method import Method, NetworkInfo, Taps
from kdprof.methods._discriminator import (
    AdversarialMethod,
    Adversary,
    Discriminator,
    SpectralConv,
)
from kdprof.methods._divergences import channel_kl, pixel_kl
from kdprof.methods.cwd import CWD, CWDCirkd
from kdprof.methods.fitnet import FitNet
from kdprof.methods.ifvd import IFVDPlain, intra_class_variation
from kdprof.methods.kd import KD
from kdprof.step import TrainStep
from kdprof.study import StepSettings

CLASSES = 5
NAMES = sorted(name for name, found in builtin_methods().items() if found.origin == "built-in")
DISTILLING = [name for name in NAMES if find_method(name).cls.weights]
ADVERSARIAL = [name for name in NAMES if issubclass(find_method(name).cls, AdversarialMethod)]
few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.tuples(*(st.integers(1, top) for top in (3, 4, 5, 5)))
seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.1, 3.0, 40.0, 1e4])
temperatures = st.sampled_from([1.0, 2.5, 4.0])


# What a test needs: networks, maps, and runs of a method on them.


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


def weighted(method, terms):
    return sum(method.weights[name] * term for name, term in terms.items())


def assert_finite_with_gradients(method, student, teacher, labels):
    terms = method(student, teacher, labels)
    assert all(term.isfinite() for term in terms.values()), terms
    gradients = torch.autograd.grad(
        weighted(method, terms), list(vars(student).values()), allow_unused=True
    )
    assert all(g.isfinite().all() for g in gradients if g is not None)
    return terms


# The equations, in float64.


def two_maps(shape, seed, scale, teacher_channels=None):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    other = (n, teacher_channels or c, h, w)
    return tuple(scale * torch.randn(s, generator=generator) for s in (shape, other))


def random_labels(size, seed, present):
    """Return labels of ``present`` classes (0: all void), some void, some of no class (4)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, max(present, 1), size, generator=generator)
    labels[torch.rand(size, generator=generator) < (0.2 if present else 1.0)] = 255
    labels[torch.rand(size, generator=generator) < 0.1] = 4
    return labels


def close(value, expected, rel=2e-4, absolute=2e-6):
    return value.item() == pytest.approx(expected, rel=rel, abs=absolute)


def exactly(taps: Taps) -> Taps:
    return Taps(**{tap: value.double() for tap, value in vars(taps).items()})


def assert_equals_oracle(method, student, teacher, labels=None, rel=2e-4, absolute=2e-6):
    """Terms and gradients, of the student's maps and of the extras, near those in float64."""
    expected = ORACLES[method.name](exactly(student), exactly(teacher), labels, method)
    terms = method(student, teacher, labels)
    assert terms.keys() == expected.keys() == method.weights.keys()
    for name, value in expected.items():
        assert close(terms[name], value.item(), rel, absolute), name
    wanted = [v for v in (*vars(student).values(), *method.extra_parameters()) if v.requires_grad]
    slopes, exact = (
        torch.autograd.grad(weighted(method, of), wanted, allow_unused=True)
        for of in (terms, expected)
    )
    for ours, theirs in zip(slopes, exact, strict=True):
        assert (ours - theirs).norm() <= 10 * rel * theirs.norm() + absolute


def of_logits(*maps):
    return [Taps(logits=m.requires_grad_(not i)) for i, m in enumerate(maps)]


@few
@given(shapes, seeds, scales, temperatures)
def test_kd_equation(shape, seed, scale, temperature):
    taps = of_logits(*two_maps(shape, seed, scale))
    assert_equals_oracle(KD(temperature=temperature), *taps)


@few
@given(shapes, seeds, scales, temperatures)
def test_cwd_equation(shape, seed, scale, temperature):
    taps = of_logits(*two_maps(shape, seed, scale))
    assert_equals_oracle(CWD(temperature=temperature), *taps)


@few
@given(shapes, seeds, scales)
def test_fitnet_equation(shape, seed, scale):
    torch.manual_seed(seed)
    student, teacher = two_maps(shape, seed, scale, teacher_channels=3)
    method = FitNet()
    infos = [NetworkInfo("n", 2, {"head": m.shape[1]}, {}) for m in (student, teacher)]
    method.build(*infos)
    logits = torch.zeros(1, 2, 1, 1)
    taps = (Taps(head=m, logits=logits) for m in (student.requires_grad_(), teacher))
    assert_equals_oracle(method, *taps)


@pytest.mark.parametrize("name", sorted(ORACLES))
@pytest.mark.parametrize(
    "case",
    [
        {"scale": 3.0},
        {"images": 1, "grid": (3, 5)},
        {"grid": (3, 4), "teacher_grid": (6, 7)},
        {"grid": (6, 5), "teacher_grid": (3, 4)},
    ],
    ids=["odd", "batch-1", "coarser", "finer"],
)
def test_equation_with_gradients(name, case):
    method = make(name)
    assert_equals_oracle(method, *draw(method, **case))


def test_cwd_feature_is_divided_by_the_channels_before_the_adaptor():
    """In CIRKD's bundle: by 2 and not by 4, which makes it twice the definition."""
    student, teacher = two_maps((2, 2, 3, 5), 1, 2.0, teacher_channels=4)
    infos = [NetworkInfo("n", 2, {"head": m.shape[1]}, {}) for m in (student, teacher)]
    method = CWDCirkd(temperature=2.0)
    method.build(*infos)
    taps = (Taps(head=m, logits=torch.zeros(2, 2, 3, 5)) for m in (student, teacher))
    value = method(*taps, None)["cwd_feature"]
    torch.testing.assert_close(value, 2 * channel_kl(method.adaptor(student), teacher, 2.0))


@few
@given(shapes, seeds, st.sampled_from([0.1, 3.0]), st.integers(1, 3), st.integers(0, 4))
def test_ifv_equation(shape, seed, scale, factor, present):
    """Any number of classes present, one or none among them; labels larger than the grid."""
    student, teacher = two_maps(shape, seed, scale, teacher_channels=3)
    labels = random_labels((shape[0], factor * shape[2] + 1, factor * shape[3]), seed, present)
    value = intra_class_variation(student, teacher, labels, 4)
    assert close(value, variation(student.double(), teacher.double(), labels, 4).item())


@few
@given(shapes, seeds, st.sampled_from([torch.bfloat16, torch.float16]))
def test_equations_on_half_precision_maps(shape, seed, dtype):
    student, teacher = (maps.to(dtype) for maps in two_maps(shape, seed, 3.0))
    labels = random_labels((shape[0], 4 * shape[2], 4 * shape[3]), seed, 3)
    taps = Taps(logits=student), Taps(logits=teacher)
    for method in (KD(temperature=2.5), CWD()):
        expected = ORACLES[method.name](*map(exactly, taps), None, method)
        for name, value in method(*taps, None).items():
            assert close(value, expected[name].item(), 2e-3)
    value = intra_class_variation(student, teacher, labels, 4)
    exact = variation(student.double(), teacher.double(), labels, 4)
    assert close(value, exact.item(), 2e-3, 1e-5)


# Identities (method cards, 25.5).


@pytest.mark.parametrize("method", [KD(), KD(reduction="element"), CWD(), CWD(norm="spatial")])
def test_equal_logits_cost_nothing(method):
    logits, _ = two_maps((2, 4, 5, 7), 0, 3.0)
    (term,) = method(Taps(logits=logits), Taps(logits=logits), None).values()
    assert term.abs() < 1e-5


def test_equal_features_have_equal_variation():
    features, _ = two_maps((2, 4, 5, 7), 0, 3.0)
    labels = torch.randint(0, 3, (2, 20, 28))
    assert intra_class_variation(features, features.clone(), labels, 3) == 0


def test_constants_that_do_not_matter():
    student, teacher = two_maps((2, 4, 5, 7), 0, 3.0)
    per_pixel, per_channel = torch.randn(2, 1, 5, 7), torch.randn(2, 4, 1, 1)
    ours, theirs = Taps(logits=student), Taps(logits=teacher)
    for method, shift in ((KD(), per_pixel), (CWD(), per_channel)):
        (plain,) = method(ours, theirs, None).values()
        (of_ours,) = method(Taps(logits=student + shift), theirs, None).values()
        (of_theirs,) = method(ours, Taps(logits=teacher + shift), None).values()
        torch.testing.assert_close(of_ours, plain)
        torch.testing.assert_close(of_theirs, plain)


def test_reductions_of_kd():
    student, teacher = two_maps((3, 4, 5, 7), 0, 3.0)
    student.requires_grad_()
    value = {
        r: pixel_kl(student, teacher, 1.0, r)
        for r in ("pixel", "element", "image", "sum", "soft_cross_entropy")
    }
    torch.testing.assert_close(value["element"], value["pixel"] / 4)
    torch.testing.assert_close(value["image"], value["pixel"] * 35)
    torch.testing.assert_close(value["sum"], value["pixel"] * 105)
    of_kl, of_entropy = (
        torch.autograd.grad(value[r], student)[0] for r in ("pixel", "soft_cross_entropy")
    )
    torch.testing.assert_close(of_entropy, 3 * of_kl)


def test_spatial_cwd_is_kd():
    student, teacher = two_maps((3, 4, 5, 7), 0, 3.0)
    taps = Taps(logits=student), Taps(logits=teacher)
    spatial = CWD(norm="spatial")(*taps, None)["cwd"]
    torch.testing.assert_close(spatial, KD(temperature=4.0)(*taps, None)["kd"])


def test_features_at_void_do_not_matter_to_ifv():
    student, teacher = two_maps((2, 4, 6, 6), 0, 1.0)
    labels = torch.randint(0, 3, (2, 6, 6))
    labels[:, 2:4] = 255
    before = intra_class_variation(student, teacher, labels, 3)
    student[:, :, 2:4], teacher[:, :, 2:4] = 7.0, -3.0
    assert torch.equal(before, intra_class_variation(student, teacher, labels, 3))
    student[:, :, 2:4] = 0
    assert torch.equal(before, intra_class_variation(student, teacher, labels, 3))


def test_ifv_of_dead_positions_has_a_bounded_gradient():
    student, teacher = two_maps((2, 4, 6, 6), 0, 1.0)
    student[:, :, :3] = 0
    student.requires_grad_()
    labels = torch.zeros(2, 6, 6, dtype=torch.long)
    labels[:, :3] = 1  # a class whose features, and so whose centre, are all zero
    (gradient,) = torch.autograd.grad(intra_class_variation(student, teacher, labels, 3), student)
    assert gradient.abs().max() < 1


# The discriminator.


def test_discriminator_is_the_published_one():
    """3.19 M parameters at 19 classes; 64x64 is the smallest grid with a score of its own."""
    judge = Discriminator(19)
    assert sum(p.numel() for p in judge.parameters()) == 3_191_721
    assert judge(torch.randn(2, 19, 64, 64)).shape == (2, 1, 1, 1)
    assert judge(torch.randn(1, 19, 64, 128)).shape == (1, 1, 1, 5)
    assert judge(torch.randn(1, 19, 9, 70)).shape == (1, 1, 1, 1)


def test_padding_is_told_once():
    adversary, notes = Adversary(CLASSES, "hinge"), []
    for grid in ((64, 64), (9, 70), (9, 70)):
        adversary.generator_loss(*torch.randn(2, 2, CLASSES, *grid), notes)
    (note,) = notes
    assert "9x70" in note


def test_padding_is_zeros_after_the_norm():
    """Below and beside the logits, where they leave the norm's statistics alone."""
    judge, logits = Discriminator(CLASSES).train(), torch.randn(2, CLASSES, 12, 16)
    seen = []
    judge.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    judge(logits)
    (padded,) = seen
    assert padded.shape == (2, CLASSES, 64, 64)
    assert padded.count_nonzero() == padded[:, :, :12, :16].count_nonzero()
    torch.testing.assert_close(padded.sum((0, 2, 3)), torch.zeros(CLASSES), atol=1e-3, rtol=0)


def test_power_iteration_finds_the_largest_singular_value():
    layer = SpectralConv(3, 8).eval()
    for _ in range(100):
        layer(torch.zeros(1, 3, 8, 8))
    largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
    torch.testing.assert_close(layer._sigma().detach(), largest)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_game(name):
    """The student's term leaves the discriminator alone; its own term leaves the student alone."""
    method = make(name)
    student, teacher, labels = draw(method)
    weighted(method, method(student, teacher, labels)).backward()
    parameters = list(method.auxiliary().parameters())
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert not {id(p) for p in parameters} & {id(p) for p in method.extra_parameters()}
    before = student.logits.grad.clone()
    terms = method.auxiliary_forward(student.detach(), teacher, labels)
    assert terms.keys() == method.auxiliary_weights.keys()
    sum(method.auxiliary_weights[n] * term for n, term in terms.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert torch.equal(before, student.logits.grad)
    (group,) = method.auxiliary_optimizer(iter(parameters)).param_groups
    assert group["lr"] == 4e-4
    # SKD's own script trains its discriminator with SGD, the others with Adam.
    sgd = {"momentum": 0.9} if name == "skd" else {"betas": (0.9, 0.99)}
    assert sgd.items() <= group.items()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_both_sides_of_the_game_score_the_same_logits(name):
    """On a coarser grid than the teacher's too: the student is judged as it was told apart."""
    method = make(name)
    student, teacher, labels = draw(method, grid=(5, 6), teacher_grid=(10, 12))
    scored = []
    judge = next(m for m in method.modules() if isinstance(m, Discriminator))
    judge.register_forward_pre_hook(lambda _, inputs: scored.append(inputs[0].detach()))
    method(student, teacher, labels)
    method.auxiliary_forward(student.detach(), teacher, labels)
    torch.testing.assert_close(scored[0], scored[1])
    assert scored[0].shape[-2:] == (10, 12)


# What every method must hold to. A later method is held to it as soon as it is found.


class Recorded(Taps):
    """Taps that remember what was read of them, or tried to be."""

    def __init__(self, taps: Taps):
        self.__dict__.update(_maps=vars(taps), read=set())

    def __getattr__(self, name):
        self.read.add(name)
        return self._maps[name] if name in self._maps else super().__getattr__(name)


@pytest.mark.parametrize("name", NAMES)
def test_description(name):
    cls = find_method(name).cls
    assert all((cls.name, cls.title, cls.paper, cls.family, cls.__dict__["__doc__"]))
    assert cls.family != Method.family
    assert name == "none" or cls.taps
    assert all(weight > 0 for weight in {**cls.weights, **cls.auxiliary_weights}.values())
    for recipe in cls.recipes:
        assert recipe.source
        assert recipe.miou is None or 20 < recipe.miou < 90


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_it_declares(name):
    method = make(name)
    student, teacher, labels = draw(method)
    student, teacher = Recorded(student), Recorded(teacher)
    terms = method(student, teacher, labels)
    assert terms.keys() == method.weights.keys()
    if method.auxiliary() is not None:
        terms = method.auxiliary_forward(student, teacher, labels)
        assert terms.keys() == method.auxiliary_weights.keys()
    assert student.read == set(method.student_taps())
    assert teacher.read == set(method.read_of_teacher())


@pytest.mark.parametrize("name", [n for n in NAMES if "labels" in find_method(n).cls.taps])
def test_declared_labels_matter(name):
    method = make(name)
    student, teacher, labels = draw(method)
    values = []
    for one in (labels, torch.zeros_like(labels)):
        torch.manual_seed(3)
        fresh = copy.deepcopy(method)
        terms = fresh(student, teacher, one)
        if fresh.auxiliary() is not None:
            terms |= fresh.auxiliary_forward(student.detach(), teacher, one)
        values.append(torch.stack(list(terms.values())))
    assert not torch.equal(*values)


@pytest.mark.parametrize("name", DISTILLING)
def test_gradient_reaches_student_and_extras_only(name):
    method = make(name)
    student, teacher, labels = draw(method)
    untouched = copy.deepcopy((student.detach(), teacher))
    terms = method(student, teacher, labels)
    assert all(t.dtype == torch.float32 and t.shape == () for t in terms.values())
    weighted(method, terms).backward()
    for value in [*vars(student).values(), *method.extra_parameters()]:
        assert value.grad is not None
        assert value.grad.isfinite().all()
    assert all(value.grad.abs().max() > 0 for value in vars(student).values())
    for before, after in zip(untouched, (student, teacher), strict=True):
        assert all(torch.equal(m, getattr(after, tap)) for tap, m in vars(before).items())
    assert all(value.grad is None for value in vars(teacher).values())


@pytest.mark.parametrize("name", DISTILLING)
@pytest.mark.parametrize(
    "case",
    [
        {"images": 1},
        {"grid": (3, 11)},
        {"grid": (5, 6), "teacher_grid": (10, 12)},
        {"grid": (10, 12), "teacher_grid": (5, 7)},
        {"scale": 1e4},
        {"void": True},
    ],
    ids=["batch-1", "non-square", "coarser", "finer", "huge", "void"],
)
def test_finite(name, case):
    method = make(name)
    terms = assert_finite_with_gradients(method, *draw(method, **case))
    if "void" in case and "ifv" in terms:
        assert terms["ifv"] == 0


@pytest.mark.parametrize("name", DISTILLING)
def test_half_precision(name):
    """Under autocast within 2 %; from bfloat16 taps finite and float32."""
    method = make(name)
    student, teacher, labels = draw(method)
    torch.manual_seed(3)
    exact = copy.deepcopy(method)(student, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        rough = copy.deepcopy(method)(student, teacher, labels)
        taps = cast(student, torch.bfloat16), cast(teacher, torch.bfloat16)
        of_bf16 = method(*taps, labels)
    for term in exact:
        torch.testing.assert_close(rough[term], exact[term], rtol=0.02, atol=1e-4)
        assert of_bf16[term].dtype == torch.float32
        assert of_bf16[term].isfinite()


@pytest.mark.parametrize("name", DISTILLING)
def test_state_is_complete_and_draws_are_seeded(name):
    """A copy through state_dict computes the same next losses, under the same seed."""
    first, second = make(name, seed=0), make(name, seed=1)
    batch = draw(first)
    first(*batch)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    results = []
    for method in (first, second):
        torch.manual_seed(3)
        terms = method(*batch)
        if method.auxiliary() is not None:
            terms |= method.auxiliary_forward(batch[0].detach(), *batch[1:])
        results.append(terms)
    for term, value in results[0].items():
        assert torch.equal(value, results[1][term]), term


class StagedNet(nn.Module):
    """A network with every tap there is: c2 at stride 4, the others at stride 8."""

    align_corners = False

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


def real_step(name: str, *, initial_seed: int = 0, precision: str = "fp32") -> TrainStep:
    """Return the step of a method on networks with logits of 12 x 16; run seed 0."""
    torch.manual_seed(9)
    teacher = StagedNet(4)
    torch.manual_seed(initial_seed)
    student, method = StagedNet(2), find_method(name).cls()
    method.build(student.info, teacher.info if method.needs_teacher() else None)
    values = {"batch": 2, "crop": (96, 128), "learning_rate": 0.01, "precision": precision}
    return TrainStep(
        student=student,
        teacher=teacher if method.needs_teacher() else None,
        method=method,
        settings=StepSettings(**values),
        iterations=10,
        seed=0,
        device=torch.device("cpu"),
    )


def real_batch(index=0):
    return tiny_batch(index, (96, 128), 2)


def train(step, first, last):
    return [step(*real_batch(i), i) for i in range(first, last)]


def assert_same(a, b):
    """Compare nested dicts, lists and tensors bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def everything(step):
    state = step.state_dict()
    return {**state["student"], **{f"method.{n}": v for n, v in state["method"].items()}}


@pytest.mark.parametrize("name", NAMES)
def test_takes_a_real_step(name):
    step = real_step(name)
    method = step.method
    before = copy.deepcopy(method.state_dict())
    (losses,) = train(step, 0, 1)
    task = {"task_aux"} if method.replaces_task_loss else {"task", "task_aux"}
    assert {*task, *method.weights, *method.auxiliary_weights} == losses.keys()
    assert all(value.isfinite() for value in losses.values())
    changed = {n for n, v in method.state_dict().items() if not torch.equal(v, before[n])}
    gated = ("query", "key", "value")  # behind a gate that starts at 0
    weights = [n for n, _ in method.named_parameters() if n.endswith("weight")]
    assert {n for n in weights if n.split(".")[-2] not in gated} <= changed


@pytest.mark.parametrize("name", NAMES)
def test_is_given_no_more_than_it_declares(name):
    step = real_step(name)
    forward, given = step.method.forward, []

    def spy(student, teacher, labels):
        given.append((set(vars(student)), set(vars(teacher)), labels))
        return forward(student, teacher, labels)

    step.method.forward = spy
    train(step, 0, 1)
    ((student, teacher, labels),) = given
    assert student == set(step.method.student_taps())
    assert teacher == set(step.method.read_of_teacher())
    assert (labels is not None) == ("labels" in step.method.taps)


@pytest.mark.parametrize("name", [n for n in NAMES if find_method(n).cls.needs_teacher()])
def test_training_never_touches_the_teacher(name):
    step = real_step(name)
    before = copy.deepcopy(step.teacher.state_dict())
    train(step, 0, 2)
    assert_same(step.teacher.state_dict(), before)
    assert all(p.grad is None for p in step.teacher.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_training(name):
    first, second = real_step(name), real_step(name)
    assert_same(train(first, 0, 2), train(second, 0, 2))
    assert_same(everything(first), everything(second))


@pytest.mark.parametrize("name", NAMES)
def test_resumed_in_the_middle_it_is_the_same_training(name):
    whole, resumed = real_step(name), real_step(name, initial_seed=1)
    train(whole, 0, 2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert_same(train(whole, 2, 4), train(resumed, 2, 4))
    assert_same(everything(whole), everything(resumed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_stays_finite_in_half_precision(name, precision):
    step = real_step(name, precision=precision)
    for losses in train(step, 0, 2):
        assert all(value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in everything(step).values())


@pytest.mark.parametrize("name", NAMES)
def test_can_be_counted(name):
    """The FLOP counter gets through, the gradient penalty's second derivative included."""
    cls = find_method(name).cls
    flop = count_step(real_step(name), fake_tensors()).flop
    assert (flop.teacher > 0) == cls.needs_teacher()
    assert (flop.auxiliary > 0) == bool(cls.auxiliary_weights)


@pytest.mark.parametrize("name", NAMES)
def test_bad_settings_are_named(name):
    cls = find_method(name).cls
    with pytest.raises(UserError, match="unknown hyper-parameter 'temprature'"):
        cls(temprature=1.0)
    with pytest.raises(UserError, match="unknown weight 'nope'"):
        cls(weights={"nope": 1.0})
    for setting, hyper in cls.hyper.items():
        with pytest.raises(UserError, match=f"{setting} must be"):
            cls(**{setting: [hyper.default]})
        if hyper.type is str:
            with pytest.raises(UserError, match=f"unknown {setting} 'elephant'"):
                cls(**{setting: "elephant"})
        if setting == "temperature":
            with pytest.raises(UserError, match="temperature must be above 0"):
                cls(temperature=0.0)


def test_mse_of_cwd_has_no_temperature():
    with pytest.raises(UserError, match="temperature 1"):
        CWD(divergence="mse")
    assert CWD(divergence="mse", temperature=1.0).settings()["divergence"] == "mse"


def test_nearest_name_is_offered():
    with pytest.raises(UserError, match="did you mean 'element'"):
        IFVDPlain(kd_reduction="elements")


@pytest.mark.parametrize("module", method_modules())
def test_a_method_file_takes_only_methods_from_another_one(module):
    """Anything else that two files need is in a private module."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"kdprof.methods.{module}")))
    for node in ast.walk(tree):
        package, _, name = (getattr(node, "module", None) or "").rpartition(".")
        if package == "kdprof.methods" and not name.startswith("_"):
            taken = importlib.import_module(node.module)
            assert all(issubclass(getattr(taken, alias.name), Method) for alias in node.names)


# What a method's author, and a study that sets a method, are told.


class Own(Method):
    """A method of one's own."""

    name: str = "own"
    taps = ("logits",)
    weights = {"mine": 1.0}
    rate: float = 0.5
    count: int = 3
    sharp: bool = False


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sharp": "False"}, "sharp must be bool, not 'False'"),
        ({"sharp": 0}, "sharp must be bool, not 0"),
        ({"count": 2.0}, "count must be int, not 2.0"),
        ({"count": True}, "count must be int, not True"),
        ({"rate": True}, "rate must be float, not True"),
        ({"rate": None}, "rate must be float, not None"),
        ({"rat": 1.0}, "unknown hyper-parameter 'rat'; did you mean 'rate'?"),
        ({"taps": ("head",)}, "unknown hyper-parameter 'taps'"),
        ({"weights": {"mien": 1.0}}, "unknown weight 'mien'; did you mean 'mine'?"),
        ({"weights": {"mine": "2"}}, "the weight of mine must be a number, not '2'"),
        ({"weights": {"mine": True}}, "the weight of mine must be a number, not True"),
        ({"weights": {"mine": math.nan}}, "the weight of mine must be a number, not nan"),
        ({"weights": 2.0}, "weights must be a table of numbers, not 2.0"),
        ({"weights": ["mine"]}, "weights must be a table of numbers"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(setting, message):
    with pytest.raises(UserError) as raised:
        Own(**setting)
    (problem,) = raised.value.problems
    assert problem.startswith(f"method 'own': {message}")


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UserError) as raised:
        Own(weights={"a": 1.0, "mine": None}, rat=1.0, count="3")
    assert len(raised.value.problems) == 4


def test_an_integer_will_do_for_a_float():
    method = Own(rate=2, weights={"mine": 3})
    assert type(method.rate) is float
    assert method.settings() == {
        "rate": 2.0, "count": 3, "sharp": False, "weights": {"mine": 3}
    }  # fmt: skip


def test_a_setting_changes_one_object_only():
    Own(rate=2.0, weights={"mine": 9.0})
    assert Own().settings() == {
        "rate": 0.5, "count": 3, "sharp": False, "weights": {"mine": 1.0}
    }  # fmt: skip


def test_hyper_parameters_are_inherited_with_the_subclass_default():
    class Child(Own):
        count = 7

    assert Child().settings()["count"] == 7
    assert Child.hyper.keys() == Own.hyper.keys()
    assert Child.name == "child"


def test_the_class_contract_is_not_a_hyper_parameter():
    assert Own.hyper.keys() == {"rate", "count", "sharp"}
    assert Own.name == "own"


@pytest.mark.parametrize("hint", [int | None, tuple[str, ...], list])
def test_a_hyper_parameter_of_a_type_that_no_study_can_set_is_refused(hint):
    with pytest.raises(UserError, match="hyper-parameter 'layers' must be bool, float, int or str"):
        type("Odd", (Method,), {"__annotations__": {"layers": hint}, "layers": None})


@pytest.mark.parametrize("where", ["taps", "teacher_taps"])
def test_an_unknown_tap_is_refused_with_the_class(where):
    with pytest.raises(UserError, match="Bad: unknown tap 'heads'; did you mean 'head'"):
        type("Bad", (Method,), {where: ("logits", "heads")})


def test_reading_an_undeclared_tap_names_it():
    with pytest.raises(AttributeError, match="'head' was read but not declared"):
        _ = Taps(logits=torch.zeros(1)).head


def test_an_unknown_method_suggests_the_nearest():
    with pytest.raises(UserError, match="unknown method 'cwdd'; did you mean 'cwd'"):
        find_method("cwdd")


MINE = """
from __future__ import annotations
from kdprof.method import Method

class MyKD(Method):
    taps = ("logits",)
    weights = {"mine": 1.0}
    temperature: float = 2.0

    def forward(self, student, teacher, labels):
        return {"mine": (student.logits - teacher.logits).square().mean()}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)

    return write


@pytest.mark.parametrize("spec", ["./mine.py:MyKD", "mine.py:MyKD", "mine.py"])
def test_a_method_in_a_file_is_found(mine, spec):
    mine(MINE)
    found = find_method(spec)
    assert (found.cls.name, found.origin) == ("mykd", "mine.py")
    assert found.cls(temperature=3).settings() == {"temperature": 3.0, "weights": {"mine": 1.0}}
    assert find_method(spec).cls is found.cls


def test_a_file_may_use_the_name_of_a_built_in(mine):
    """Found all the same; that a study cannot hold both is said where it is resolved."""
    mine(MINE.replace("class MyKD(Method):", "class MyKD(Method):\n    name = 'cwd'"))
    assert find_method("mine.py:MyKD").cls.name == "cwd"
    assert find_method("cwd").cls is CWD


def test_imported_methods_are_not_the_files_own(mine):
    mine(MINE + "\nfrom kdprof.methods.kd import KD\n")
    assert find_method("mine.py").cls.__name__ == "MyKD"
    with pytest.raises(UserError, match="unknown method class 'KD'"):
        find_method("mine.py:KD")


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        (MINE, "gone.py:MyKD", r"method file gone\.py does not exist"),
        (MINE, "mine.py:MyKd", r"mine\.py: unknown method class 'MyKd'; did you mean 'MyKD'"),
        (
            MINE + "\nclass Two(Method): pass",
            "mine.py",
            r"holds several methods; write .*mine\.py:MyKD or .*mine\.py:Two",
        ),
        ("x = 1", "mine.py:MyKD", "unknown method class 'MyKD'; there are none"),
        ("1 / 0", "mine.py:MyKD", r"mine\.py cannot be imported: ZeroDivisionError"),
        ("import nowhere", "mine.py:MyKD", "cannot be imported: ModuleNotFoundError"),
        ("x = (", "mine.py:MyKD", "cannot be imported: SyntaxError"),
        (MINE.replace('"logits"', '"logit"'), "mine.py", "unknown tap 'logit'; did you mean"),
    ],
    ids=["no-file", "no-class", "which-class", "empty", "raises", "import", "syntax", "tap"],
)
def test_a_bad_file_is_one_line(mine, text, spec, message):
    mine(text)
    with pytest.raises(UserError, match=message) as raised:
        find_method(spec)
    assert len(str(raised.value).splitlines()) == 1


def test_a_mended_file_is_read_again(mine):
    mine("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        find_method("mine.py:MyKD")
    mine(MINE)
    assert find_method("mine.py:MyKD").cls.name == "mykd"
