"""at, dist, pkd, nfd and attnfd against their equations in loops, and where each could break."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import (
    EQUATION_CASES,
    assert_equation,
    draw,
    finite_with_gradient,
    make,
    random,
    rounded,
)
from oracles_relations import ORACLES
from torch import nn

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Taps
from kdprof.methods._standardise import standardise
from kdprof.methods.at import AT, attention_gap
from kdprof.methods.attnfd import CBAM, AttnFD, direction_gap, fix
from kdprof.methods.dist import DIST, relations
from kdprof.methods.nfd import NFD
from kdprof.methods.pkd import PKD

NAMES = sorted(ORACLES)
CONFIGURATIONS = [
    ("at", {}),
    ("at", {"power": 3, "temperature": 2.5}),
    ("dist", {}),
    ("dist", {"temperature": 4.0}),
    ("dist", {"intra_over": "images"}),
    ("pkd", {}),
    ("pkd", {"resized": "teacher"}),
    ("nfd", {}),
    ("nfd", {"form": "norm"}),
    ("attnfd", {}),
    ("attnfd", {"teacher_attention": "plain", "reduction_ratio": 2}),
    ("attnfd", {"train_channel_gate": True}),
]
few = settings(max_examples=20, deadline=None, derandomize=True)
grids = st.tuples(st.integers(2, 6), st.integers(2, 6))


def built(method, student_channels, teacher_channels):
    infos = [
        NetworkInfo("n", 2, {"head": c, "c5": c}, {}) for c in (student_channels, teacher_channels)
    ]
    method.build(*infos)
    return method


@few
@given(
    st.sampled_from(CONFIGURATIONS),
    st.integers(1, 3),
    grids,
    st.one_of(st.none(), grids),
    st.integers(0, 2**16),
    st.sampled_from([0.3, 3.0]),
)
def test_equation(configuration, images, grid, teacher_grid, seed, scale):
    name, hyper = configuration
    method = make(name, seed, **hyper)
    student, teacher, _ = draw(method, images, grid, teacher_grid, scale, seed)
    assert_equation(ORACLES[name], method, student, teacher)


@pytest.mark.parametrize(("name", "hyper"), CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("case", EQUATION_CASES.values(), ids=EQUATION_CASES)
def test_equation_of_every_setting(name, hyper, case):
    method = make(name, **hyper)
    student, teacher, _ = draw(method, **case)
    assert_equation(ORACLES[name], method, student, teacher)


# Numbers worked out by hand.


def test_at_by_hand():
    """Energies (9, 16) and (1, 0): unit maps (9, 16) / sqrt(337) and (1, 0)."""
    student = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    teacher = torch.tensor([2.0, 0.0]).reshape(1, 1, 1, 2)
    expected = 1 - 9 / math.sqrt(337)
    assert attention_gap(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert attention_gap(student.repeat(2, 3, 1, 1), teacher.repeat(2, 5, 1, 1)).item() == (
        pytest.approx(expected, rel=1e-6)
    )


def test_the_largest_attention_gap_is_two_over_the_positions():
    student, teacher = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    student[:, :, 0, 0], teacher[:, :, 3, 3] = 1.0, 2.0
    assert attention_gap(student, teacher).item() == pytest.approx(2 / 20)


def test_dist_by_hand():
    """Two classes, two pixels: a correlation of two values is the sign of agreement.

    p of class 0 falls from .9 to .2 in the student and from .8 to .6 in the teacher: over pixels
    both agree, r = 1; over classes the second pixel disagrees, r = (1 - 1) / 2.
    """

    def logits(*first):
        return torch.tensor([first, [1 - p for p in first]]).log().reshape(1, 2, 1, 2)

    student, teacher = logits(0.9, 0.2), logits(0.8, 0.6)
    inter, intra = relations(student, teacher)
    assert inter.item() == pytest.approx(1, abs=1e-5)
    assert intra.item() == pytest.approx(0, abs=1e-5)
    inter, intra = relations(2 * student, 2 * teacher, temperature=2.0)
    assert inter.item() == pytest.approx(4, abs=1e-5)
    assert intra.item() == pytest.approx(0, abs=1e-5)
    # One image has no spread over images: r = 0.
    assert relations(student, teacher, intra_over="images")[1].item() == 1
    as_images = (z.permute(3, 1, 2, 0) for z in (student, teacher))
    assert relations(*as_images, intra_over="images")[1].item() == pytest.approx(0, abs=1e-5)


def test_pkd_and_nfd_by_hand():
    """(0, 2, 4) against (4, 2, 0), r = -1. PKD: scores (-1, 0, 1), half of 8 / 3. NFD:
    population scores (-1, 0, 1) sqrt(3 / 2): 2 (1 - r) = 4, and sqrt(12) / 3 as a norm."""
    student = torch.tensor([0.0, 2.0, 4.0]).reshape(1, 1, 1, 3)
    taps = Taps(head=student), Taps(head=student.flip(3))
    assert built(PKD(), 1, 1)(*taps, None)["pkd"].item() == pytest.approx(4 / 3, rel=1e-5)
    assert built(NFD(), 1, 1)(*taps, None)["nfd"].item() == pytest.approx(4, rel=1e-5)
    norm = built(NFD(form="norm"), 1, 1)(*taps, None)["nfd"]
    assert norm.item() == pytest.approx(math.sqrt(12) / 3, rel=1e-5)


def test_direction_gap_by_hand():
    """(3, 4) against (4, 3): cos = 24 / 25, over N = 2 images."""
    student = torch.tensor([3.0, 4.0]).reshape(2, 1, 1, 1)
    assert direction_gap(student, student.flip(0)).item() == pytest.approx(0.04, rel=1e-5)


def test_plain_attention_by_hand():
    """x = 1: both pools 1, gate s(2), then max + mean = 2 s(2)."""
    sigmoid = torch.tensor(2.0).sigmoid()
    value = CBAM(1, learned=False)(torch.ones(1, 1, 1, 1)).item()
    assert value == pytest.approx((sigmoid * (2 * sigmoid).sigmoid()).item())
    assert not list(CBAM(8, learned=False).parameters())


# Identities.


def test_equal_networks_cost_nothing():
    features, logits = random((2, 4, 5, 7)), random((2, 4, 5, 7), 1, 3.0)
    taps = Taps(head=features, logits=logits, aux=2 * logits, c5=features)
    adapting = [built(method, 4, 4) for method in (PKD(), NFD(), NFD(form="norm"))]
    for method in (AT(), DIST(), *adapting):
        for name, term in method(taps, copy.deepcopy(taps), None).items():
            assert term.item() == pytest.approx(0, abs=1e-5), name
    assert direction_gap(features, features.clone()).abs() < 1e-6


def test_attention_does_not_depend_on_scale():
    student, teacher = random((2, 3, 5, 7)), random((2, 6, 5, 7), 1)
    plain = attention_gap(student, teacher)
    for scale in (1e-15, 1e-6, 1e4, 1e15):
        torch.testing.assert_close(attention_gap(scale * student, teacher), plain)
        torch.testing.assert_close(attention_gap(student, scale * teacher), plain)
    for scale in (1e-3, 1e6):
        torch.testing.assert_close(
            direction_gap(scale * student, teacher[:, :3]), direction_gap(student, teacher[:, :3])
        )


@pytest.mark.parametrize("cls", [PKD, NFD])
def test_an_affine_map_of_a_channel_does_not_matter(cls):
    student, teacher = random((2, 4, 5, 7)), random((2, 4, 5, 7), 1)
    method = built(cls(), 4, 4)
    assert isinstance(method.adaptor, nn.Identity)
    scale, shift = torch.tensor([0.5, 1.0, 3.0, 20.0]), torch.tensor([-3.0, 0.0, 1.0, 30.0])
    moved = student * scale[:, None, None] + shift[:, None, None]
    (plain,) = method(Taps(head=student), Taps(head=teacher), None).values()
    (after,) = method(Taps(head=moved), Taps(head=teacher), None).values()
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=0)


def test_pkd_and_nfd_are_pearson():
    student, teacher = random((1, 3, 4, 5)), random((1, 3, 4, 5), 1)
    pairs = torch.stack((student, teacher), 2)[0].flatten(2)
    r = [torch.corrcoef(pair)[0, 1] for pair in pairs]
    distance = 1 - torch.stack(r).mean().item()
    taps = Taps(head=student), Taps(head=teacher)
    assert built(PKD(), 3, 3)(*taps, None)["pkd"].item() == pytest.approx(0.95 * distance, rel=1e-5)
    assert built(NFD(), 3, 3)(*taps, None)["nfd"].item() == pytest.approx(2 * distance, rel=1e-5)


def test_dist_reads_relations_only():
    """A constant added to all classes of a pixel changes nothing."""
    student, teacher = random((2, 4, 5, 7), 0, 3.0), random((2, 4, 5, 7), 1, 3.0)
    moved = relations(student + random((2, 1, 5, 7), 2), teacher)
    torch.testing.assert_close(moved, relations(student, teacher))


# Where it could break.


def test_features_without_a_direction():
    """Dead features and constant channels: finite, and no gradient where there is no direction."""
    alive = random((2, 4, 5, 7), 1)
    for value in (0.0, 1e4):
        dead = torch.full((2, 4, 5, 7), value, requires_grad=True)
        (at_gradient,) = finite_with_gradient(attention_gap(dead, alive), dead)
        assert value or not at_gradient.any()
        (gap_gradient,) = finite_with_gradient(direction_gap(dead, alive), dead)
        assert value or not gap_gradient.any()
        for method in (built(PKD(), 4, 4), built(NFD(), 4, 4)):
            (loss,) = method(Taps(head=dead), Taps(head=alive), None).values()
            (gradient,) = finite_with_gradient(loss, dead)
            assert not gradient.any()
            (zero,) = method(Taps(head=dead), Taps(head=dead.detach()), None).values()
            assert zero == 0
    assert attention_gap(torch.zeros(1, 2, 3, 3), torch.zeros(1, 5, 3, 3)) == 0


def test_uniform_and_certain_probabilities():
    """Constant p correlates with nothing, as published: the loss is 1 even for equal networks."""
    flat = torch.zeros(2, 4, 5, 7, requires_grad=True)
    assert [t.item() for t in relations(flat, flat.detach())] == [1, 1]
    for term in relations(flat, random((2, 4, 5, 7))):
        finite_with_gradient(term, flat)
    certain = (1e4 * random((2, 4, 5, 7), 1)).requires_grad_()
    for teacher in (certain.detach(), -certain.detach(), torch.zeros(2, 4, 5, 7)):
        for over in ("pixels", "images"):
            for term in relations(certain, teacher, intra_over=over):
                finite_with_gradient(term, certain)


def test_standardising_a_mean_far_above_the_spread():
    """What a fused f * scale - mean * scale would lose: the digits of a nearly constant channel."""
    fine = random((2, 3, 4, 5), 0, 1.0).double()
    far = (fine + 4096).float()
    ours = standardise(far, (0, 2, 3), 1).double()
    exact = far.double() - far.double().mean((0, 2, 3), keepdim=True)
    exact = exact / (exact.square().sum((0, 2, 3), keepdim=True) / 39).sqrt()
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["at", "dist", "pkd", "nfd"])
def test_a_single_position(name):
    method = make(name)
    student, teacher, _ = draw(method, images=1, grid=(1, 1))
    terms = method(student, teacher, None)
    weighted = sum(method.weights[n] * t for n, t in terms.items())
    finite_with_gradient(weighted, *vars(student).values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(name, dtype):
    """Under autocast on maps as large as float16 holds: float32 terms, finite gradients."""
    method = make(name)
    student, teacher, _ = draw(method, scale=1e4)
    student, teacher = rounded(student, dtype, leaves=True), rounded(teacher, dtype)
    with torch.autocast("cpu", dtype=dtype):
        terms = method(student, teacher, None)
    assert all(term.dtype == torch.float32 for term in terms.values())
    weighted = sum(method.weights[n] * t for n, t in terms.items())
    finite_with_gradient(weighted, *vars(student).values())
    if name in ("at", "dist"):  # no adaptor: the equation on the rounded maps
        expected = ORACLES[name](student, teacher, None, method)
        for term, value in expected.items():
            assert terms[term].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6)


# Extras and settings.


def test_pkd_and_nfd_adapt_only_where_channels_differ():
    for cls in (PKD, NFD):
        assert not list(built(cls(), 4, 4).parameters())
        (weight,) = built(cls(), 4, 6).parameters()
        assert weight.shape == (6, 4, 1, 1)


def test_what_attnfd_trains():
    """Spatial gates and connectors; with the switch the student's MLPs; of the teacher nothing."""
    fixed, trained = built(AttnFD(), 32, 64), built(AttnFD(train_channel_gate=True), 32, 64)
    owners = {n.split(".")[0] for n, _ in fixed.named_parameters()}
    assert owners == {"student_blocks", "connectors"}
    names = {n for n, _ in fixed.named_parameters()}
    more = {n for n, _ in trained.named_parameters()} - names
    assert len(more) == 8
    assert all(".mlp." in n for n in more)
    assert fixed.state_dict().keys() == trained.state_dict().keys()
    assert fixed.student_blocks["c5"].mlp[0].weight.shape == (2, 32)
    assert fixed.teacher_blocks["c5"].mlp[0].weight.shape == (4, 64)


def test_fixing_a_module_keeps_its_values():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before, x = copy.deepcopy(module.state_dict()), torch.randn(4, 3)
    value = copy.deepcopy(module)(x)
    fix(module)
    assert not list(module.parameters())
    assert torch.equal(module(x), value)
    assert module.state_dict().keys() == before.keys()


def test_attention_keeps_the_type_and_bounds_the_map():
    block = CBAM(32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = random((2, 32, 5, 7), 0, 100.0).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            y = block(x)
        assert y.dtype == dtype
        assert (y.abs() <= x.abs()).all()


def test_weights_and_taps_are_the_published_ones():
    assert AT.weights == {"at": 10_000.0, "kd": 1.0}
    assert DIST.weights == {"inter": 1.0, "intra": 1.0, "aux_inter": 0.4, "aux_intra": 0.4}
    assert PKD.weights == {"pkd": 10.0}
    assert AttnFD.weights == {"attnfd_c5": 2.0, "attnfd_head": 2.0}
    assert all("labels" not in cls.taps for cls in (AT, DIST, PKD, NFD, AttnFD))


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (AT, {"power": 0}, "power must be above 0"),
        (DIST, {"intra_over": "image"}, "did you mean 'images'"),
        (PKD, {"resized": "students"}, "did you mean 'student'"),
        (NFD, {"form": "norms"}, "did you mean 'norm'"),
        (AttnFD, {"reduction_ratio": 0}, "reduction_ratio must be above 0"),
        (AttnFD, {"teacher_attention": "plane"}, "did you mean 'plain'"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(cls, setting, message):
    with pytest.raises(UserError, match=message):
        cls(**setting)
