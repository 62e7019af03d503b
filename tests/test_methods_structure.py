"""skd and dsd against their equations in loops, and where each could break."""

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
    set_block,
    weighted,
)
from oracles_structure import AUXILIARY, ORACLES, pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.errors import UserError
from kdprof.method import Taps
from kdprof.methods import skd
from kdprof.methods.dsd import DSD, class_gap, residual_gap
from kdprof.methods.skd import SKD, pairwise_local, pairwise_whole, pool, similarity_gap, unit_nodes

NAMES = sorted(ORACLES)
CONFIGURATIONS = [
    ("skd", {}),
    ("skd:plain", {}),
    ("skd:plain", {"scale": 0.3, "pooling": "average"}),
    ("skd:plain", {"scale": 1.0, "kd_reduction": "pixel"}),
    ("skd:cirkd", {}),
    ("skd:cirkd", {"window": 1, "temperature": 2.5}),
    ("dsd", {}),
    ("dsd", {"temperature": 1.0, "power": 4}),
    ("dsd:no_aux", {}),
]
few = settings(max_examples=20, deadline=None, derandomize=True)
grids = st.tuples(st.integers(1, 6), st.integers(2, 6))


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


@pytest.mark.parametrize("name", sorted(AUXILIARY))
@pytest.mark.parametrize("grid", [(9, 7), (65, 66)], ids=["padded", "published"])
def test_equation_of_the_discriminator(name, grid):
    """Its terms and the gradients of its parameters, with the gates of attention open."""
    method = make(name)
    for parameter in method.auxiliary().parameters():
        if parameter.shape == (1,):
            torch.nn.init.constant_(parameter, 0.7)
    student, teacher, _ = draw(method, grid=grid, teacher_grid=(grid[0] + 1, grid[1]))
    torch.manual_seed(3)
    expected = AUXILIARY[name](student.detach(), teacher, None, method)
    torch.manual_seed(3)
    terms = method.auxiliary_forward(student.detach(), teacher, None)
    assert terms.keys() == expected.keys() == method.auxiliary_weights.keys()
    parameters = [p for p in method.auxiliary().parameters() if p.ndim > 1]
    found = []
    for of in (terms, expected):
        total = sum(method.auxiliary_weights[n] * value.double() for n, value in of.items())
        found.append(torch.autograd.grad(total, parameters))
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), term
    largest = max(g.norm().item() for g in found[1])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5 * largest


# Numbers worked out by hand.


def test_pairwise_by_hand():
    """Two nodes, cosine c against 0: L = 2 c^2 / 4. At (1, 0), (1, 1): c = 1 / sqrt(2)."""
    student = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 1, 2).requires_grad_()
    teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0]]).reshape(1, 2, 1, 2)
    # A constant length keeps what CIRKD's form projects out along the node.
    for term, first, second in (
        (pairwise_whole(student, teacher, 0.5), (0.5, 0.5), (0.5, 0.0)),
        (pairwise_local(student, teacher, 1), (0.0, 0.5), (0.25, -0.25)),
    ):
        assert term.item() == pytest.approx(0.25, rel=1e-5)
        (gradient,) = torch.autograd.grad(term, student)
        expected = torch.tensor([first, second]).T.reshape(1, 2, 1, 2)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "nodes"), [((65, 65), (3, 3)), ((64, 128), (2, 2)), ((9, 7), (3, 3)), ((1, 5), (1, 3))]
)
def test_nodes_of_the_original(grid, nodes):
    window = tuple(max(1, side // 2) for side in grid)
    assert pool(torch.zeros(1, 2, *grid), window).shape[-2:] == nodes


def test_pixel_similarity_by_hand():
    """Energies (1, 0) then (0, 1): residual (-1, 1) / sqrt(2); the teacher's the other way."""
    first, second = (torch.tensor(v).reshape(1, 1, 1, 2) for v in ((3.0, 0.0), (0.0, -2.0)))
    assert residual_gap([first, second], [second, first]).item() == pytest.approx(2)
    # A third map like the first: residuals r, 0, -r of the pairs.
    value = residual_gap([first, second, first], [second, first, second])
    assert value.item() == pytest.approx(4 / 3)


def test_class_similarity_by_hand():
    """One class over two pooled positions: (1/2, 1/2) gives 1/2, (3/4, 1/4) gives 5/8."""
    student = torch.zeros(1, 1, 2, 4)
    teacher = student.clone()
    teacher[..., :2] = 4 * math.log(3)
    assert class_gap(student, teacher, 4.0).item() == pytest.approx(1 / 64, rel=1e-5)
    # Cut windows divide by what is inside: the same two positions from 1 x 3.
    assert class_gap(student[:, :, :1, :3], teacher[:, :, :1, :3]).item() == pytest.approx(
        1 / 64, rel=1e-5
    )


# Identities.


def test_equal_networks_cost_nothing():
    taps = Taps(**{tap: random((2, 4, 9, 7), i) for i, tap in enumerate(("aux", "head", "logits"))})
    for term in DSD()(taps, copy.deepcopy(taps), None).values():
        assert term == 0
    features = taps.head.requires_grad_()
    for term in (pairwise_whole, pairwise_local):
        loss = term(features, features.detach().clone())
        assert loss == 0
        assert not torch.autograd.grad(loss, features)[0].any()


def test_pairwise_reads_cosines_only():
    """A rotation of the channels and positive factors of the nodes change nothing."""
    student, teacher = random((2, 4, 6, 8)), random((2, 5, 6, 8), 1)
    rotation = torch.linalg.qr(random((4, 4), 2)).Q
    turned = torch.einsum("oc,nchw->nohw", rotation, student)
    torch.testing.assert_close(
        pairwise_local(turned, teacher, 1), pairwise_local(student, teacher, 1)
    )
    scaled = student * (0.1 + random((2, 1, 6, 8), 3).abs())
    torch.testing.assert_close(
        pairwise_local(scaled, teacher, 1), pairwise_local(student, teacher, 1)
    )


def test_without_an_auxiliary_head_two_of_three_pairs_count():
    logits, head = ([random((2, c, 5, 6), i) for i in (c, c + 1)] for c in (3, 6))
    taps = [Taps(head=h, logits=z) for h, z in zip(head, logits, strict=True)]
    pair = [[t.head, t.logits] for t in taps]
    value = make("dsd:no_aux")(*taps, None)["psd"]
    torch.testing.assert_close(value, residual_gap(*pair) * 2 / 3)


# The similarity maps that are never whole.


WAYS = {
    "blocks": {"GRAM_GAIN": math.inf, "LEAST_ROWS": 3},
    "one-block": {"GRAM_GAIN": math.inf},
    "channels": {"GRAM_GAIN": 0, "LEAST_ROWS": 3},
}


def take(way: str, monkeypatch) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(skd, name, value)
    if way != "one-block":
        set_block(monkeypatch, 1)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_gap(monkeypatch, way):
    take(way, monkeypatch)
    student, teacher = (unit_nodes(random((2, c, 5, 4), c), False) for c in (3, 5))
    for ours in (student, 0.5 * student + 0.1, teacher[:, :3].abs()):
        ours = ours.clone().requires_grad_()
        loss = similarity_gap(ours, teacher)
        exact = ours.detach().double().requires_grad_()
        gap = exact.mT @ exact - teacher.double().mT @ teacher.double()
        expected = gap.square().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = torch.autograd.grad(3 * loss, ours)[0], torch.autograd.grad(3 * expected, exact)
        torch.testing.assert_close(gradients[0], gradients[1][0].float(), rtol=1e-4, atol=1e-7)
    precise = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: similarity_gap(s, teacher.double()), precise)
    with torch.no_grad():
        torch.testing.assert_close(similarity_gap(ours, teacher), loss.detach())
    assert similarity_gap(student, student).item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_features_that_nearly_agree(monkeypatch, way):
    """Cosines near 1 that differ by 1e-3: what three large sums in float32 would not tell."""
    take(way, monkeypatch)
    student = 1 + random((1, 6, 8, 8), 0, 0.03)
    teacher = 1 + random((1, 9, 8, 8), 1, 0.03)
    loss = pairwise_local(student, teacher, 1)
    exact = pairwise(student.double(), teacher.double(), (1, 1), "max", fixed=False)
    assert exact < 1e-5
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return made


@pytest.mark.parametrize("gain", [0, math.inf], ids=["channels", "blocks"])
def test_no_map_of_all_pairs_is_held(monkeypatch, gain):
    set_block(monkeypatch, 2**14)
    monkeypatch.setattr(skd, "GRAM_GAIN", gain)
    student, teacher = random((2, 2, 32, 32)).requires_grad_(), random((2, 3, 32, 32), 1)
    with Largest() as largest:
        pairwise_local(student, teacher, 1).backward()
    assert largest.elements <= 2 * 128 * 1024


def test_the_way_is_chosen_by_size():
    def ways(ours, theirs, nodes):
        maps = torch.empty(1, ours, nodes, device="meta"), torch.empty(1, theirs, 1, device="meta")
        return skd._channels_are_cheaper(*maps)

    assert not ways(512, 2048, 2048)
    assert not ways(128, 512, 2048)
    assert ways(256, 768, 16_384)
    assert not ways(512, 512, 4)


# Where it could break.


@pytest.mark.parametrize("term", [pairwise_whole, pairwise_local], ids=["whole", "local"])
def test_dead_features_pass_no_gradient(term):
    alive = random((2, 4, 6, 8), 1)
    for value in (0.0, 1e-12):
        dead = torch.full((2, 3, 6, 8), value, requires_grad=True)
        (gradient,) = finite_with_gradient(term(dead, alive), dead)
        assert not gradient.any()
    half_dead = random((2, 3, 6, 8))
    half_dead[:, :, :, :4] = 0
    half_dead.requires_grad_()
    (gradient,) = finite_with_gradient(term(half_dead, alive), half_dead)
    assert gradient.abs().max() < 10
    assert gradient.any()


def test_equal_attention_has_no_residual():
    """Two maps of one energy up to a factor: what is left is rounding, not a direction."""
    features = random((2, 4, 6, 8)).requires_grad_()
    others = [random((2, c, 6, 8), c) for c in (3, 5)]
    loss = residual_gap([features, 3 * features.detach()], others)
    (gradient,) = finite_with_gradient(loss, features)
    assert loss.item() == pytest.approx(1 / 48, rel=1e-5)  # the teacher's residual alone
    assert not gradient.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 4)], ids=str)
def test_a_single_position_or_row(name, grid):
    method = make(name)
    student, teacher, _ = draw(method, images=2, grid=grid)  # a norm of one value has no spread
    terms = method(student, teacher, None)
    finite_with_gradient(weighted(method, terms), *vars(student).values())
    if grid == (1, 1):
        alone = {"pairwise", "psd", "csd"} & terms.keys()
        assert all(terms[n].item() == pytest.approx(0, abs=1e-9) for n in alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(name, dtype):
    """Under autocast on maps as large as float16 holds: float32 terms, the equation's value."""
    method = make(name)
    student, teacher, _ = draw(method, scale=1e4)
    student, teacher = rounded(student, dtype, leaves=True), rounded(teacher, dtype)
    expected = ORACLES[name](student, teacher, None, method)
    with torch.autocast("cpu", dtype=dtype):
        terms = method(student, teacher, None)
    assert all(term.dtype == torch.float32 for term in terms.values())
    finite_with_gradient(weighted(method, terms), *vars(student).values())
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-6), term


# Extras and settings.


def test_optimisers_of_the_discriminator():
    """SGD in the authors' code, Adam in CIRKD's; only the first decays with the student's."""
    official, cirkd = make("skd"), make("skd:cirkd")
    optimisers = [m.auxiliary_optimizer(m.auxiliary().parameters()) for m in (official, cirkd)]
    assert [type(o) for o in optimisers] == [torch.optim.SGD, torch.optim.Adam]
    sgd, adam = (o.param_groups[0] for o in optimisers)
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (4e-4, 0.9, 5e-4)
    assert (adam["lr"], adam["betas"]) == (4e-4, (0.9, 0.99))
    assert (official.auxiliary_decays, cirkd.auxiliary_decays) == (True, False)
    assert (official.adversarial, cirkd.adversarial) == ("wgan-gp", "hinge")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": 0.0}, "scale must be above 0"),
        ({"scale": 1.5}, "scale must be at most 1"),
        ({"pooling": "averag"}, "did you mean 'average'"),
        ({"kd_reduction": "pixels"}, "did you mean 'pixel'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        SKD(**setting)


@pytest.mark.parametrize("name", ["skd:cirkd", "dsd"])
def test_wrong_windows_and_powers_are_named(name):
    setting = "window" if name == "skd:cirkd" else "power"
    with pytest.raises(UserError, match=f"{setting} must be above 0"):
        make(name, **{setting: 0})
