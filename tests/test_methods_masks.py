"""mgd, maskd, bpkd and fakd:isda against their equations in loops, and where each could break."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import CLASSES, draw, make, random, real_batch, real_step, rounded, seeded
from oracles_masks import AUXILIARY, ORACLES, class_covariance, edge_share
from torch import nn

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Taps
from kdprof.methods import bpkd, fakd
from kdprof.methods.bpkd import BPKD, edge_kl, edge_masks
from kdprof.methods.fakd import AugmentedKL, ClassStatistics, FAKDIsda
from kdprof.methods.kd import KD
from kdprof.methods.maskd import MasKD, ReceptiveTokens, masked_distance, masked_logits, overlap
from kdprof.methods.mgd import MGD, Generator, MGDFeature

NAMES = sorted(ORACLES)
CONFIGURATIONS = [
    ("mgd", {}),
    ("mgd", {"mask_ratio": 0.4, "temperature": 2.0}),
    ("mgd:feature", {}),
    ("maskd", {}),
    ("maskd", {"tokens": 1}),
    ("bpkd", {}),
    ("bpkd", {"edge_width": 3, "temperature": 2.5, "edge_factor": 1.0}),
    ("fakd:isda", {"ramp_iterations": 1}),
    ("fakd:isda", {"strength": 2.0, "ramp_iterations": 4}),
]
CASES = {
    "odd": {"images": 2, "grid": (3, 5), "scale": 2.0},
    "batch-1": {"images": 1, "grid": (4, 3)},
    "coarser": {"images": 1, "grid": (2, 3), "teacher_grid": (4, 5)},
    "finer": {"images": 1, "grid": (4, 4), "teacher_grid": (3, 2), "scale": 5.0},
    "void": {"images": 1, "grid": (3, 4), "void": True},
}
few = settings(max_examples=20, deadline=None, derandomize=True)
sides = st.tuples(st.integers(1, 4), st.integers(1, 4))


def gradients(method, terms, leaves):
    weights = {**method.weights, **method.auxiliary_weights}
    total = sum(weights[name] * term.double() for name, term in terms.items())
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
    pairs = zip(leaves, found, zeros, strict=True)
    return {name: (zero if g is None else g).double() for name, g, zero in pairs}


def assert_same_terms(method, ours, exact, leaves):
    """Terms within 1e-4 and gradients within 1e-3 of the loops in float64."""
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    found, expected = (gradients(method, terms, leaves) for terms in (ours, exact))
    largest = max(g.norm().item() for g in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm() + 1e-5 * largest, name


def assert_equation(method, batch):
    exact = seeded(ORACLES[method.name], *batch, method)
    assert exact.keys() == method.weights.keys()
    extras = {n: p for n, p in method.named_parameters() if not n.startswith("masks.")}
    assert_same_terms(method, seeded(method, *batch), exact, {**vars(batch[0]), **extras})


@few
@given(st.sampled_from(CONFIGURATIONS), st.integers(1, 2), sides, st.integers(0, 2**16))
def test_equation(configuration, images, grid, seed):
    name, hyper = configuration
    method = make(name, seed, **hyper)
    assert_equation(method, draw(method, images, grid, None, 3.0, seed))


@pytest.mark.parametrize(("name", "hyper"), CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation_of_every_setting(name, hyper, case):
    method = make(name, **hyper)
    assert_equation(method, draw(method, **case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_trains_the_tokens(case, tokens):
    method = make("maskd", tokens=tokens)
    nn.init.normal_(method.masks.tokens, std=0.5)
    batch = draw(method, **case)
    exact = AUXILIARY["maskd"](*batch, method)
    ours = method.auxiliary_forward(*batch)
    assert exact.keys() == method.auxiliary_weights.keys()
    assert_same_terms(method, ours, exact, dict(method.masks.named_parameters()))


# Numbers worked out by hand.


def test_a_rebuilt_feature_by_hand():
    """Kernels that double: 1 kept becomes 4, against 1 twice: 9 + 1, over two images."""
    generator = Generator(1, 1)
    for layer in (generator.rebuild[0], generator.rebuild[2]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.weight.data[0, 0, 1, 1] = 2.0
    features = torch.ones(2, 1, 1, 2)
    uniform = torch.tensor([[0.25, 0.26], [0.0, 0.99]]).reshape(2, 1, 1, 2)
    error = generator.error(features, features, uniform, 0.75)
    assert error.item() == pytest.approx((9 + 1 + 9 + 1) / 2)
    assert generator.error(features, features, uniform, 0.0).item() == pytest.approx(4 * 9 / 2)
    assert generator.error(features, features, uniform + 0.01, 1.0).item() == pytest.approx(2)


def test_three_of_four_positions_are_masked():
    method, seen = make("mgd:feature"), []
    method.generator.rebuild.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student, teacher, _ = draw(method, grid=(64, 64))
    method(student, teacher, None)
    method(student, teacher, None)
    masked = [(maps == 0).all(1) for maps in seen]
    assert not torch.equal(*masked)
    for maps, mask in zip(seen, masked, strict=True):
        assert mask.float().mean() == pytest.approx(0.75, abs=0.02)
        assert torch.equal((maps == 0).any(1), mask)


def test_masked_distance_by_hand():
    """Mask (1, .5), gaps (2, 4) and (0, 2): (4 + 4) / 1.5 and (0 + 1) / 1.5, half their mean."""
    gaps = torch.tensor([[2.0, 4.0], [0.0, 2.0]]).reshape(1, 2, 1, 2)
    mask = torch.tensor([1.0, 0.5]).reshape(1, 1, 1, 2)
    expected = 0.25 * (8 + 1) / 1.50001
    assert masked_distance(gaps, 0 * gaps, mask).item() == pytest.approx(expected)
    assert masked_distance(gaps, 0 * gaps, mask.repeat(1, 3, 1, 1)).item() == (
        pytest.approx(expected)
    )
    assert masked_distance(gaps, gaps, mask) == 0


def test_overlap_by_hand():
    """(1, 0) with itself 1, with (0, 1) 0, with (.5, .5) 2 * .5 / 1.5."""
    rows = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.5, 0.5]}

    def dice(*names):
        return overlap(torch.tensor([rows[n] for n in names]).reshape(1, -1, 1, 2)).item()

    assert dice("a", "a") == pytest.approx(1)
    assert dice("a", "b") == pytest.approx(0)
    assert dice("a", "b", "c") == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
    assert dice("c") == 0


def test_new_tokens_mask_one_half():
    tokens, logits = ReceptiveTokens(8, CLASSES), random((2, CLASSES, 3, 4))
    masks = tokens(logits)
    assert masks.shape == (2, 8, 3, 4)
    assert (masks - 0.5).abs().max() < 0.05
    torch.testing.assert_close(masked_logits(logits, masks), 4 * logits, rtol=0.05, atol=0)
    assert tokens.tokens.std().item() == pytest.approx(0.01, rel=0.5)


def test_edges_by_hand():
    """A border between columns 3 and 4, window 3: columns 3 and 4 are the edge of both classes;
    cells of 2 columns hold one of them each, cells of 4 one of four."""
    labels = torch.zeros(1, 4, 8, dtype=torch.long)
    labels[:, :, 4:] = 1
    share = edge_masks(labels, 3, 3, torch.Size((2, 4)))
    assert share[0, :2].tolist() == [[[0, 0.5, 0.5, 0]] * 2] * 2
    assert not share[0, 2].any()
    assert edge_masks(labels, 3, 3, torch.Size((1, 2)))[0, 0].tolist() == [[0.25, 0.25]]
    assert edge_masks(labels, 3, 1, torch.Size((2, 4))).max() == 0
    labels[:, :, 4:] = 255  # a border with void is an edge of the class beside it
    share = edge_masks(labels, 3, 3, torch.Size((2, 4)))
    assert share[0, 0].tolist() == [[0, 0.5, 0.5, 0]] * 2
    assert not share[0, 1:].any()


def test_edge_kl_by_hand():
    """Two classes at one edge position of two: q_T = (3/4, 1/4), q_S = (1/2, 1/2)."""
    teacher = torch.tensor([[math.log(3.0), 9.0], [0.0, -9.0]]).reshape(1, 2, 1, 2)
    edges = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = edge_kl(torch.zeros(1, 2, 1, 2), teacher, edges)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    both = edge_kl(torch.zeros(1, 2, 1, 2), teacher[..., :1].expand(-1, -1, -1, 2), edges * 0 + 1)
    assert both.item() == pytest.approx(expected, rel=1e-5)


def test_augmented_kl_by_hand():
    """Equal logits of two classes; the shift log 3 of the other class: log 4 - log 2."""
    shift = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])[None]
    half = torch.full((1, 2), 0.5).log()
    total = AugmentedKL.apply(torch.zeros(1, 2), half, shift, torch.tensor([0]))
    assert total.item() == pytest.approx(math.log(2.0), rel=1e-5)


# What the equations imply.


@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(1, 19)),
    sides,
    st.sampled_from([1, 3, 7]),
    st.integers(0, 2**16),
)
def test_edge_masks_are_dilation_minus_erosion(size, grid, width, seed):
    """With more classes than fit a word: of the last bits and first of the next, and void."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([0, 29, 30, 59, 60, 255])
    coarse = torch.randint(0, 6, (size[0], 3, 3), generator=generator)
    rows, columns = (torch.arange(s) * 3 // s for s in size[1:])
    labels = kinds[coarse[:, rows][:, :, columns]]
    share = edge_masks(labels, 61, width, torch.Size(grid))
    assert share.shape == (size[0], 61, *grid)
    for n in range(size[0]):
        for k in (0, 29, 30, 59, 60):
            expected = edge_share(labels[n], k, width, *grid)
            torch.testing.assert_close(share[n, k].double(), expected)
    unseen = [k for k in range(61) if k not in kinds.tolist()]
    assert not share[:, unseen].any()


def test_blocks_change_nothing(monkeypatch):
    edges, augmented = make("bpkd"), make("fakd:isda", ramp_iterations=1)
    results = []
    for size in (2**24, 1, 200):
        monkeypatch.setattr(bpkd, "BLOCK_ELEMENTS", size)
        monkeypatch.setattr(fakd, "BLOCK_ELEMENTS", size)
        for method in (edges, augmented):
            student, teacher, labels = draw(method)
            (*terms,) = copy.deepcopy(method)(student, teacher, labels).values()
            results.append(torch.autograd.grad(sum(terms), student.logits)[0])
    for whole, cut in zip(results[:2] * 2, results[2:], strict=True):
        torch.testing.assert_close(whole, cut)


def test_equal_networks_cost_nothing():
    logits, labels = random((2, CLASSES, 5, 7), 0, 3.0), torch.randint(0, CLASSES, (2, 20, 28))
    taps = Taps(logits=logits, aux=2 * logits)
    for method in (make("maskd"), make("bpkd")):
        for name, term in method(taps, copy.deepcopy(taps), labels).items():
            assert term.item() == pytest.approx(0, abs=1e-6), name
    # A bound of the augmented loss, not a distance: 0 only without augmentation.
    labels[:] = 255
    assert make("fakd:isda", ramp_iterations=1)(taps, taps, labels)["fakd"].abs() < 1e-6


def test_without_an_edge_bpkd_is_cwd():
    method = make("bpkd")
    student, teacher, labels = draw(method)
    labels[:] = 3
    terms = method(student, teacher, labels)
    assert terms["edge"] == 0
    torch.testing.assert_close(
        terms["body"], make("cwd", temperature=1.0)(student, teacher, None)["cwd"]
    )


def test_without_classes_fakd_is_kd():
    method = make("fakd:isda", ramp_iterations=1)
    student, teacher, labels = draw(method, void=True)
    expected = KD()(student, teacher, None)["kd"]
    torch.testing.assert_close(method(student, teacher, labels)["fakd"], expected)
    assert not method.statistics.count.any()


def test_strength_ramps():
    """The same statistics: a hundredth of the strength at the first of a hundred steps."""
    late, early = make("fakd:isda", ramp_iterations=1), make("fakd:isda", ramp_iterations=100)
    small = make("fakd:isda", ramp_iterations=1, strength=0.005)
    batch = draw(late)
    first = early(*batch)["fakd"]
    torch.testing.assert_close(first, small(*batch)["fakd"])
    early.step.fill_(99)
    for method in (late, early):
        method.statistics = ClassStatistics(CLASSES)
        method(*batch)
    assert (early.step, late.step) == (100, 1)
    torch.testing.assert_close(early(*batch), late(*batch))


def test_running_statistics_are_those_of_all_pixels():
    statistics, batches = ClassStatistics(3), []
    for seed, pixels in enumerate((5, 1, 40, 7)):
        rows = random((pixels, 3), seed, 2.0) + 100 * seed
        which = torch.randint(0, 2, (pixels,))  # class 2 never comes
        statistics.update(rows, nn.functional.one_hot(which, 3).float())
        batches.append((rows.double(), which))
    rows, which = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for k in (0, 1):
        of_class = rows[which == k]
        assert statistics.count[k] == len(of_class)
        torch.testing.assert_close(statistics.mean[k].double(), of_class.mean(0), rtol=1e-5, atol=0)
        exact = of_class.T.cov(correction=0)
        assert (statistics.covariance[k] - exact).norm() <= 1e-4 * exact.norm()
    assert not statistics.covariance[2].any()
    assert (statistics.spread() >= 0).all()


def test_the_variance_of_logits_is_that_of_features_seen_through_the_classifier():
    """What lets the method do without the classifier: (w_j - w_c)^T Sigma (w_j - w_c)."""
    weight, features = random((3, 6), 1), random((50, 6), 2)
    statistics = ClassStatistics(3)
    statistics.update(features @ weight.T, torch.eye(3)[torch.zeros(50, dtype=torch.long)])
    sigma = features.T.cov(correction=0)
    for c in range(3):
        for j in range(3):
            gap = weight[j] - weight[c]
            torch.testing.assert_close(statistics.spread()[0, c, j], gap @ sigma @ gap)


def test_fakd_bounds_the_expected_loss():
    """Jensen: the closed form is above the mean over many drawn logits, and near it if small."""
    for strength, slack in ((0.01, 0.02), (0.5, 1.0)):
        sigma = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.5], [0.0, 0.5, 0.7]])
        z, teacher = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.5])
        statistics = ClassStatistics(3)
        statistics.covariance[0] = sigma
        noise = random((20_000, 3), 1) @ torch.linalg.cholesky(sigma).T
        drawn = (z + strength**0.5 * noise).log_softmax(1)
        log_q = teacher.log_softmax(0)
        expected = (log_q.exp() * (log_q - drawn)).sum(1).mean()
        bound = AugmentedKL.apply(
            z[None], log_q[None], strength / 2 * statistics.spread(), torch.tensor([0])
        )
        assert 0 < bound - expected < slack * strength + 0.01


def test_fakd_equation_after_a_step():
    """The second step's statistics hold both batches."""
    method = make("fakd:isda", ramp_iterations=2)
    method(*draw(method, grid=(3, 4), scale=2.0, seed=1))
    batch = draw(method, grid=(3, 4), scale=2.0, seed=2)
    assert class_covariance([], 0, method).any()
    assert_equation(method, batch)


# Where it could break.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("void", [False, True])
def test_half_precision_maps(name, dtype, void):
    """Under autocast on large maps: float32 terms, finite gradients; no extras: the equation."""
    method = make(name)
    scale = 30.0 if name.startswith("mgd") else 1e4
    student, teacher, labels = draw(method, grid=(3, 4), scale=scale, void=void)
    student, teacher = rounded(student, dtype, leaves=True), rounded(teacher, dtype)
    expected = seeded(ORACLES[name], student, teacher, labels, method)
    with torch.autocast("cpu", dtype=dtype):
        terms = seeded(method, student, teacher, labels)
        if method.auxiliary() is not None:
            extra = method.auxiliary_forward(student, teacher, labels)
            assert all(t.dtype == torch.float32 and t.isfinite() for t in extra.values())
    assert all(term.dtype == torch.float32 for term in terms.values())
    tolerance = 0.05 if name.startswith("mgd") else 1e-3
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=tolerance, abs=1e-5), term
    total = sum(method.weights[n] * t for n, t in terms.items())
    found = torch.autograd.grad(total, list(vars(student).values()))
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_one_pixel_one_position(name):
    method = make(name)
    for grid in ((1, 1), (3, 4)):
        student, teacher, labels = draw(method, images=1, grid=grid)
        if labels is not None:
            labels[:] = 255
            labels[0, 2, 2] = 3
        terms = method(student, teacher, labels)
        total = sum(method.weights[n] * t for n, t in terms.items())
        assert total.isfinite()
        found = torch.autograd.grad(total, list(vars(student).values()))
        assert all(g.isfinite().all() for g in found)


def test_masks_that_close_and_masks_that_open():
    """Huge logits make masks of 0 and 1 everywhere: finite, and 0 where nothing is seen."""
    method = make("maskd")
    student, teacher, labels = draw(method, scale=1.0)
    for sign in (-1.0, 1.0):
        method.masks.tokens.data.fill_(sign * 1e4)
        taps = Taps(logits=teacher.logits.abs() + 1, aux=teacher.aux)
        terms = {**method(student, taps, labels), **method.auxiliary_forward(student, taps, labels)}
        assert all(term.isfinite() for term in terms.values())
        assert (terms["maskd"] == 0) == (sign < 0)
        assert terms["overlap"].item() == pytest.approx(max(0.0, sign))


def test_tokens_learn_from_their_own_terms_only():
    method = make("maskd")
    student, teacher, labels = draw(method)
    sum(method(student, teacher, labels).values()).backward()
    assert method.extra_parameters() == []
    assert method.masks.tokens.grad is None
    student_gradient = student.logits.grad.clone()
    sum(method.auxiliary_forward(student, teacher, labels).values()).backward()
    assert method.masks.tokens.grad.abs().max() > 0
    assert torch.equal(student.logits.grad, student_gradient)


def test_the_tokens_optimiser_is_the_published_one():
    method = make("maskd")
    assert method.auxiliary_decays
    (group,) = method.auxiliary_optimizer(method.auxiliary().parameters()).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-3)
    assert [tuple(p.shape) for p in group["params"]] == [(8, CLASSES)]


def test_tokens_are_trained_and_their_terms_fall():
    step = real_step("maskd")
    before = step.method.masks.tokens.detach().clone()
    losses = [step(*real_batch(0), i) for i in range(6)]
    assert not torch.equal(before, step.method.masks.tokens)
    first, last = (
        sum(float(r[n]) for n in MasKD.auxiliary_weights) for r in losses[:: len(losses) - 1]
    )
    assert last < first


# Extras and settings.


def test_what_mgd_trains():
    """77 M parameters from R18 to R101: A 1.05 M, the generator 75.5 M; no A between equals."""
    with torch.device("meta"):
        counts = {n: p.numel() for n, p in Generator(512, 2048).named_parameters()}
        same = [n for n, _ in Generator(64, 64).named_parameters()]
    assert sum(v for n, v in counts.items() if n.startswith("align")) == 512 * 2048 + 2048
    assert sum(v for n, v in counts.items() if n.startswith("rebuild")) == 2 * (9 * 2048**2 + 2048)
    assert all(n.startswith("rebuild") for n in same)


def test_what_the_others_keep():
    infos = [NetworkInfo("n", 19, {"logits": 19}, {})] * 2
    for cls, parameters in ((MasKD, 8 * 19), (BPKD, 0), (FAKDIsda, 0)):
        method = cls()
        method.build(*infos)
        assert sum(p.numel() for p in method.parameters()) == parameters
        assert sum(p.numel() for p in method.extra_parameters()) == 0
    names = ["step", "statistics.count", "statistics.mean", "statistics.covariance"]
    assert sorted(method.state_dict()) == sorted(names)


def test_weights_and_taps_are_the_published_ones():
    assert MGD.weights == {"mgd": 2e-5, "cwd": 3.0}
    assert MGDFeature.weights == {"mgd": 2e-5}
    assert MasKD.weights == {"maskd": 1.0, "maskd_aux": 0.4}
    assert BPKD.weights == {"edge": 50.0, "body": 20.0}
    assert MGDFeature.taps == ("c5",)
    assert not FAKDIsda.recipes
    for text in (FAKDIsda.title, FAKDIsda.paper, FAKDIsda.__doc__.lower()):
        assert "unofficial" in text


@pytest.mark.parametrize("name", ["maskd", "fakd:isda"])
def test_what_a_reader_of_costs_must_know_is_noted(name):
    (note,) = make(name).notes
    assert note.startswith(name)


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (MGD, {"mask_ratio": 1.5}, "mask_ratio must be from 0 to 1, not 1.5"),
        (MGDFeature, {"mask_ratio": -0.1}, "mask_ratio must be from 0 to 1"),
        (MGD, {"temperature": 0.0}, "temperature must be above 0"),
        (MasKD, {"tokens": 0}, "tokens must be above 0"),
        (BPKD, {"edge_width": 4}, "edge_width must be odd, not 4"),
        (BPKD, {"edge_width": 0}, "edge_width must be above 0"),
        (BPKD, {"edge_factor": -1.0}, "edge_factor must be above 0"),
        (FAKDIsda, {"strength": 0.0}, "strength must be above 0"),
        (FAKDIsda, {"ramp_iterations": 0}, "ramp_iterations must be above 0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(cls, setting, message):
    with pytest.raises(UserError, match=message):
        cls(**setting)
