"""kd, cwd, fitnet and ifvd against their equations in float64, and identities of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import draw, exactly, make, weighted
from oracles_core import ORACLES, variation

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Taps
from kdprof.methods._divergences import channel_kl, pixel_kl
from kdprof.methods.cwd import CWD, CWDCirkd
from kdprof.methods.fitnet import FitNet
from kdprof.methods.ifvd import IFVDPlain, intra_class_variation
from kdprof.methods.kd import KD

few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.tuples(*(st.integers(1, top) for top in (3, 4, 5, 5)))
seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.1, 3.0, 40.0, 1e4])
temperatures = st.sampled_from([1.0, 2.5, 4.0])


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


def test_mse_of_cwd_has_no_temperature():
    with pytest.raises(UserError, match="temperature 1"):
        CWD(divergence="mse")
    assert CWD(divergence="mse", temperature=1.0).settings()["divergence"] == "mse"


def test_nearest_name_is_offered():
    with pytest.raises(UserError, match="did you mean 'element'"):
        IFVDPlain(kd_reduction="elements")
