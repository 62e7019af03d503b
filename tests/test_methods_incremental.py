"""ilt and dkd against their equations in loops, and where each could break."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import exactly, network, rounded, weighted
from oracles_incremental import ORACLES
from small_study import small_study
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.measure.trace import StepTrace
from kdprof.method import IGNORE, NetworkInfo, Taps
from kdprof.methods import dkd
from kdprof.methods.dkd import DKD, DKDFirst, labelled, one_vs_all, sigmoids, split_logits
from kdprof.methods.ilt import ILT, ILTFeature, padded_cross_entropy
from kdprof.resolve import ResolvedStudy

NAMES = sorted(ORACLES)
CLASSES = 5
SETTINGS = {"added": (3, True), "no-background": (3, False), "same": (CLASSES, False)}
"""Classes of the teacher and whether there is a background; the student has 5."""
few = settings(max_examples=20, deadline=None, derandomize=True)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))


def info(width: int, classes: int, background: bool) -> NetworkInfo:
    return replace(network(width), num_classes=classes, background=background)


def make(name, setting="added", seed=0, **hyper):
    torch.manual_seed(seed)
    old, background = SETTINGS[setting]
    method = find_method(name).cls(**hyper)
    student, teacher = info(2, CLASSES, background), info(4, old, background)
    method.build(student, teacher if method.needs_teacher() else None)
    return method.train()


def draw(
    method, setting="added", images=2, grid=(5, 4), teacher_grid=None, scale=1.0, seed=0, void=0.2
):
    """Return random student taps (leaves), teacher taps and labels of all classes."""
    generator = torch.Generator().manual_seed(seed)

    def taps(network, classes, names, size):
        shapes = {
            tap: (images, network.channels[tap], *size) for tap in names if tap in ("c5", "head")
        }
        shapes["logits"] = (images, classes, *size)
        shapes["classifier"] = (classes, network.channels["head"], 1, 1)
        return Taps(**{tap: scale * torch.randn(shapes[tap], generator=generator) for tap in names})

    student = taps(network(2), CLASSES, method.student_taps(), grid)
    teacher = taps(network(4), SETTINGS[setting][0], method.read_of_teacher(), teacher_grid or grid)
    for value in vars(student).values():
        value.requires_grad_()
    size = (images, 3 * grid[0] + 1, 2 * grid[1] + 3)
    labels = torch.randint(0, CLASSES, size, generator=generator)
    labels[torch.rand(size, generator=generator) < void] = IGNORE
    return student, teacher, labels if "labels" in method.taps else None


def assert_equation(method, student, teacher, labels):
    """Terms and gradients, of extras too, within 1e-4 of the loops in float64."""
    expected = ORACLES[method.name](exactly(student), exactly(teacher), labels, method)
    terms = method(student, teacher, labels)
    assert terms.keys() == expected.keys() == method.weights.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    leaves = [*vars(student).values(), *method.parameters()]
    ours, exact = (torch.autograd.grad(weighted(method, t), leaves) for t in (terms, expected))
    largest = max(g.norm().item() for g in exact)
    for value, wanted in zip(ours, exact, strict=True):
        assert (value - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * largest


@few
@given(
    st.sampled_from(NAMES),
    st.sampled_from(sorted(SETTINGS)),
    st.integers(1, 3),
    grids,
    st.one_of(st.none(), grids),
    st.integers(0, 2**16),
    st.sampled_from([0.3, 3.0, 30.0]),
)
def test_equation(name, setting, images, grid, teacher_grid, seed, scale):
    method = make(name, setting, seed)
    assert_equation(method, *draw(method, setting, images, grid, teacher_grid, scale, seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "case",
    [
        {"images": 3, "scale": 2.0},
        {"images": 1, "grid": (3, 7)},
        {"grid": (3, 4), "teacher_grid": (6, 7)},
        {"grid": (6, 5), "teacher_grid": (3, 4)},
        {"void": 1.0},
    ],
    ids=["odd", "batch-1", "coarser", "finer", "void"],
)
def test_equation_in_every_setting(name, setting, case):
    method = make(name, setting)
    assert_equation(method, *draw(method, setting, **case))


@pytest.mark.parametrize("name", ["dkd", "dkd:first"])
def test_equation_at_the_weight_of_ade(name):
    method = make(name, positive_weight=35.0)
    assert_equation(method, *draw(method))


# Numbers worked out by hand.


def test_ilt_by_hand():
    """Two old classes, one new. At logits of 0 it is log 3; what is not old does not count."""
    student, teacher = torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 1, 4)
    labels = torch.tensor([[[0, 1, 2, IGNORE]]])
    assert padded_cross_entropy(student, teacher, labels).item() == pytest.approx(math.log(3))
    # q = (3/4, 1/4), p = (1/2, 1/4, 1/4): 3/4 log 2 + 1/4 log 4.
    teacher[0, 0, 0, 0] = math.log(3)
    student[0, 0, 0, 0] = math.log(2)
    student[0, :, 0, 2:] = 77.0
    expected = (1.25 * math.log(2) + math.log(3)) / 2
    assert padded_cross_entropy(student, teacher, labels).item() == pytest.approx(expected)
    assert padded_cross_entropy(student, teacher, labels.clamp(min=2)) == 0


def test_ilt_gradient_by_hand():
    """p - q over all classes: what new classes take from old ones is given back."""
    student = torch.zeros(1, 4, 1, 1, requires_grad=True)
    loss = padded_cross_entropy(student, torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1).long())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([-0.25, -0.25, 0.25, 0.25]))


def test_bce_by_hand():
    """Three pixels, one positive of weight 4: log 2 (1 + 1 + 4) / 3 of one class, log 2 of none."""
    logits = torch.zeros(1, 2, 1, 3, requires_grad=True)
    labels = torch.tensor([[[7, IGNORE, 0]]])
    loss = one_vs_all(logits, labelled(labels, 6, 2), positive_weight=4.0)
    assert loss.item() == pytest.approx(3 * math.log(2))
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([[1, 1, 1], [-4, 1, 1]]) / 6
    torch.testing.assert_close(gradient[0, :, 0], expected)
    loss = one_vs_all(logits, sigmoids(torch.full((1, 2, 1, 1), math.log(3)), (1, 3)))
    assert loss.item() == pytest.approx(2 * math.log(2))
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.full_like(logits, -0.25 / 3))


def test_signs_by_hand():
    """Feature (1, 2), weights (3, -5): 3 and -10."""
    head = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    parts = split_logits(head, torch.tensor([3.0, -5.0]).reshape(1, 2, 1, 1))
    assert [part.item() for part in parts] == [3, -10]


def test_background_where_no_sigmoid_is_above_a_half():
    logits = torch.tensor([[9.0, -1.0, -2.0], [-9.0, 0.1, -1.0], [9.0, 0.1, 0.2]])[:, :, None, None]
    for method in (make("dkd"), make("dkd:first")):
        assert method.decide(logits).argmax(1).flatten().tolist() == [0, 1, 2]
    assert make("dkd", "no-background").decide(logits) is logits
    assert make("ilt").decide(logits) is logits


# Identities.


def test_signs_sum_to_the_logits_without_bias():
    generator = torch.Generator().manual_seed(0)
    head, classifier = (torch.randn(s, generator=generator) for s in ((2, 6, 4, 3), (5, 6, 1, 1)))
    whole = nn.functional.conv2d(head, classifier)
    torch.testing.assert_close(sum(split_logits(head, classifier)), whole)


def test_equal_networks_pass_no_gradient():
    """Soft targets cost their entropy, which is least where the student agrees."""
    method = make("dkd", "same")
    student, _, labels = draw(method, "same")
    terms = method(
        student, Taps(**{t: v.detach().clone() for t, v in vars(student).items()}), labels
    )
    for name in ("kd", "dkd_positive", "dkd_negative"):
        leaves = list(vars(student).values())
        found = torch.autograd.grad(terms[name], leaves, allow_unused=True, retain_graph=True)
        assert all(g.abs().max() < 1e-7 for g in found if g is not None), name
    logits = student.logits.detach().requires_grad_()
    loss = padded_cross_entropy(logits, logits.detach(), labels.clamp(max=CLASSES - 1))
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-7
    features = Taps(c5=torch.randn(2, 3, 4, 5))
    same = ILTFeature()
    same.build(*(NetworkInfo("n", 3, {"c5": 3}, {}),) * 2)
    assert same(features, features, None)["ilt_feature"] == 0
    assert not list(same.parameters())


def test_old_classes_learn_of_the_teacher_and_new_ones_of_the_labels():
    method = make("dkd")
    student, teacher, labels = draw(method)
    terms = method(student, teacher, labels)

    def channels(*names):
        found = torch.autograd.grad(
            sum(terms[n] for n in names), student.logits, retain_graph=True, allow_unused=True
        )[0]
        return [] if found is None else found.abs().amax((0, 2, 3)).nonzero().flatten().tolist()

    assert channels("mbce") == [3, 4]
    assert channels("kd") == [1, 2]
    assert channels("dkd_positive", "dkd_negative", "ac") == []
    split = terms["dkd_positive"] + terms["dkd_negative"]
    (gradient,) = torch.autograd.grad(split, student.classifier, retain_graph=True)
    assert gradient.abs().amax((1, 2, 3)).nonzero().flatten().tolist() == [1, 2]
    (head,) = torch.autograd.grad(terms["ac"], student.head, allow_unused=True)
    assert head is None


def test_the_background_of_the_first_step_is_never_positive():
    method = make("dkd:first")
    student, _, labels = draw(method)
    assert method.weights == {"mbce": 1.0}
    (gradient,) = torch.autograd.grad(method(student, Taps(), labels)["mbce"], student.logits)
    assert (gradient[:, 0] > 0).all()


# The maps that are never whole.


@pytest.mark.parametrize("elements", [1, 700, 2**24])
def test_blocks_change_nothing(monkeypatch, elements):
    method = make("dkd")
    batch = draw(method)
    whole = method(*batch)
    expected = torch.autograd.grad(weighted(method, whole), list(vars(batch[0]).values()))
    monkeypatch.setattr(dkd, "BLOCK_ELEMENTS", elements)
    terms = method(*batch)
    found = torch.autograd.grad(weighted(method, terms), list(vars(batch[0]).values()))
    for name, value in whole.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [1.0, 35.0, torch.tensor([0.5, 17.0, 35.0]).double()], ids=str)
def test_gradient_made_in_the_forward_pass(monkeypatch, weight):
    monkeypatch.setattr(dkd, "BLOCK_ELEMENTS", 1)
    logits = torch.randn(2, 3, 3, 2, dtype=torch.double, requires_grad=True)
    target = labelled(torch.randint(0, 4, (2, 5, 4)), 1, 3)
    size = torch.Size((5, 4))

    def loss(z):
        return dkd._OneVsAll.apply(z, target, size, weight)

    assert torch.autograd.gradcheck(loss, logits)
    with torch.no_grad():
        torch.testing.assert_close(loss(logits), loss(logits.detach()))


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return made


def test_no_map_of_all_classes_is_held(monkeypatch):
    monkeypatch.setattr(dkd, "BLOCK_ELEMENTS", 2 * 64 * 64)
    student, teacher = torch.randn(1, 40, 8, 8, requires_grad=True), torch.randn(1, 40, 8, 8)
    size = torch.Size((64, 64))
    with Largest() as largest:
        loss = one_vs_all(student, sigmoids(teacher, size), size)
        (loss + one_vs_all(student, labelled(torch.zeros(1, 64, 64), 0, 40), size)).backward()
    assert largest.elements == 2 * 64 * 64


# Where it could break.


def finite_with_gradient(method, terms, student):
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values()), terms
    found = torch.autograd.grad(weighted(method, terms), list(vars(student).values()))
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("labels", ["void", "background", "one-new", "all"])
def test_labels_of_every_kind(name, setting, labels):
    method = make(name, setting)
    student, teacher, drawn = draw(method, setting, images=1, grid=(3, 5))
    constant = {"void": IGNORE, "background": 0, "one-new": 4}
    if drawn is not None and labels in constant:
        drawn = torch.full_like(drawn, constant[labels])
    terms = method(student, teacher, drawn)
    finite_with_gradient(method, terms, student)
    new = labels in ("void", "one-new") and not (setting == "same" and labels == "one-new")
    if name == "ilt":
        assert (terms["ilt"] == 0) == new


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(name, dtype):
    """Under autocast on maps as large as float16 holds: float32 terms, the equation's value."""
    method = make(name)
    student, teacher, labels = draw(method, scale=1e4)
    student, teacher = rounded(student, dtype, leaves=True), rounded(teacher, dtype)
    expected = ORACLES[name](exactly(student), exactly(teacher), labels, method)
    with torch.autocast("cpu", dtype=dtype):
        terms = method(student, teacher, labels)
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    rel = 2e-2 if name == "ilt:feature" else 1e-3  # its adaptor runs in half precision
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=rel), term


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_reaches_student_and_extras_and_never_the_teacher(name, setting):
    method = make(name, setting)
    student, teacher, labels = draw(method, setting)
    weighted(method, method(student, teacher, labels)).backward()
    for value in (*vars(student).values(), *method.extra_parameters()):
        assert value.grad.abs().max() > 0
    assert all(value.grad is None for value in vars(teacher).values())


def test_notes_tell_what_is_not_published_and_what_is_nothing():
    assert "the 1x1 adaptor" in make("ilt:feature").notes[0]
    assert "without a background" in make("ilt", "no-background").notes[0]
    assert not make("ilt").notes
    assert not make("ilt", "same").notes


def test_settings_of_the_authors():
    assert DKD().settings()["positive_weight"] == 1
    assert DKDFirst().settings()["positive_weight"] == 2
    assert ILT().settings() == {"weights": {"ilt": 1.0}}
    assert ILTFeature().settings() == {"weights": {"ilt_feature": 50.0}}
    with pytest.raises(UserError, match="positive_weight must be above 0"):
        DKD(positive_weight=0.0)


# Whole steps.


SCENARIO = {
    "scenario__new": ["car", "person"],
    "teacher_training__method": "dkd:first",
    "methods": ["dkd", "ilt", "ilt:feature"],
}


@pytest.fixture(scope="module")
def resolved():
    return ResolvedStudy(small_study(**SCENARIO))


def assert_trains_without_waiting(step, batch):
    before = step.student.decode_head.conv_seg.weight.detach().clone()
    with StepTrace(step) as trace:
        losses = step(*batch, 0, trace.mark)
    assert trace.synchronisations() == []
    assert all(value.isfinite() for value in losses.values())
    assert ("task" in losses) != step.method.replaces_task_loss
    return (step.student.decode_head.conv_seg.weight - before).abs().amax((1, 2, 3))


@pytest.mark.parametrize("name", ["dkd", "ilt", "ilt:feature"])
def test_a_step_that_adds_classes_never_waits_for_the_device(resolved, name):
    step = resolved.factory.step(name, resolved.factory.placed_teacher())
    moved = assert_trains_without_waiting(step, resolved.factory.batches(0).batch(0))
    assert (moved[1:] > 0).all()


def test_the_first_step_never_waits_for_the_device(resolved):
    step = resolved.factory.teacher_step()
    assert step.method.name == "dkd:first"
    moved = assert_trains_without_waiting(step, resolved.factory.batches(0, "teacher").batch(0))
    assert (moved > 0).all()
