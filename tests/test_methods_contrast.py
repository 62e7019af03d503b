"""af_dcd and reviewkd against their equations in loops, and where each could break."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import draw, make, random, rounded, seeded, set_block
from oracles_contrast import ORACLES
from torch import nn

from kdprof.errors import UserError
from kdprof.method import NetworkInfo, Taps
from kdprof.methods import af_dcd
from kdprof.methods.af_dcd import (
    AfDCD,
    AfDCDEnhanced,
    EnhancedProjector,
    PatchContrast,
    centre_mask,
    patch_vectors,
    random_mask,
)
from kdprof.methods.reviewkd import Fusion, ReviewKD, ReviewKDImageNet, hierarchical_context

NAMES = sorted(ORACLES)
SMALL = {"groups": 4, "contrast_temperature": 1.0}
CONFIGURATIONS = [
    ("af_dcd", {**SMALL, "pool": 2, "patch_height": 2, "patch_width": 1}),
    ("af_dcd", {**SMALL, "pool": 0, "patch_height": 2, "patch_width": 2, "temperature": 2.0}),
    ("af_dcd", {**SMALL, "pool": 0, "crop": 3, "patch_height": 1, "patch_width": 3}),
    ("af_dcd", {"groups": 16, "mask": "centre", "contrast_temperature": 0.3}),
    ("af_dcd", {"groups": 2, "pool": 0, "mask_ratio": 0.4, "contrast_temperature": 2.0}),
    ("af_dcd:enhanced", {**SMALL, "pool": 2}),
    ("reviewkd", {"middle": 3}),
    ("reviewkd", {"middle": 1}),
    ("reviewkd:imagenet", {"middle": 4}),
]
CASES = {
    "odd": {"images": 2, "grid": (3, 5), "scale": 1.0},
    "batch-1": {"images": 1, "grid": (4, 3)},
    "coarser": {"images": 1, "grid": (2, 3), "teacher_grid": (4, 5)},
    "finer": {"images": 1, "grid": (4, 4), "teacher_grid": (3, 2)},
}
few = settings(max_examples=12, deadline=None, derandomize=True)


def gradients(method, terms, leaves):
    # Each term as large as the others, whatever its weight: none hides another's error.
    total = sum(term.double() / (1 + term.detach().abs()) for term in terms.values())
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), found, strict=True)
    return {n: (torch.zeros_like(leaf) if g is None else g).double() for (n, leaf), g in pairs}


def assert_equation(method, batch):
    """Terms within 1e-4 and gradients within 1e-3 of the loops in float64."""
    exact = seeded(ORACLES[method.name], *batch, method)
    ours = seeded(method, *batch)
    assert ours.keys() == exact.keys() == method.weights.keys()
    for name, value in exact.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    leaves = {**vars(batch[0]), **dict(method.named_parameters())}
    found, expected = (gradients(method, terms, leaves) for terms in (ours, exact))
    largest = max(g.norm().item() for g in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm() + 1e-5 * largest, name


@few
@given(
    st.sampled_from(CONFIGURATIONS),
    st.integers(1, 2),
    st.tuples(st.integers(2, 5), st.integers(2, 4)),
    st.integers(0, 2**16),
)
def test_equation(configuration, images, grid, seed):
    name, hyper = configuration
    method = make(name, seed, **hyper)
    assert_equation(method, draw(method, images, grid, None, 1.0, seed))


@pytest.mark.parametrize(("name", "hyper"), CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation_of_every_setting(name, hyper, case):
    method = make(name, **hyper)
    assert_equation(method, draw(method, **case))


def test_stages_of_different_stride():
    """c2 twice as fine as the others: the residual is enlarged by nearest."""
    method = make("reviewkd", middle=2)
    student, teacher, _ = draw(method, images=2, grid=(3, 2))
    student.c2 = random((2, 2, 6, 5), 1).requires_grad_()
    teacher.c2 = random((2, 4, 6, 5), 2)
    assert_equation(method, (student, teacher, None))


# Numbers worked out by hand.


def vectors(*values):
    """One patch of one-channel vectors."""
    return torch.tensor(values)[None, :, None]


def test_contrast_by_hand():
    """Two groups at one position, each 1 from its own key and 3 from the other: log(1 + e^-2)."""
    anchors, keys = vectors(1.0, 3.0), vectors(0.0, 4.0)
    total = PatchContrast.apply(anchors, keys, 2, 1.0)
    assert total.item() == pytest.approx(2 * math.log(1 + math.exp(-2)), rel=1e-5)
    total = PatchContrast.apply(anchors, keys, 2, 0.5)
    assert total.item() == pytest.approx(2 * math.log(1 + math.exp(-4)), rel=1e-5)


def test_contrast_gradient_by_hand():
    """p = 1 / (1 + e^2) of the wrong key; 1 moves from 0 (+1) and towards 4 (+1): 2 p."""
    anchors = vectors(1.0, 3.0).requires_grad_()
    PatchContrast.apply(anchors, vectors(0.0, 4.0), 2, 1.0).backward()
    p = 1 / (1 + math.exp(2))
    assert anchors.grad.flatten().tolist() == pytest.approx([2 * p, -2 * p], rel=1e-5)


def test_the_same_group_elsewhere_is_no_negative():
    """Two positions, one group: nothing to be told from."""
    anchors = vectors(1.0, 3.0).requires_grad_()
    total = PatchContrast.apply(anchors, vectors(0.0, 4.0), 1, 1.0)
    assert total == 0
    (gradient,) = torch.autograd.grad(total, anchors)
    assert not gradient.any()


def test_patches_and_groups_by_hand():
    """Channel 10 c, row 100 y, column 1000 x; patches of 1 x 2; groups of 2 channels."""
    c, y, x = torch.meshgrid(*(torch.arange(n) for n in (4, 2, 5)), indexing="ij")
    features = (10 * c + 100 * y + 1000 * x).float()[None]
    found, positions = patch_vectors(features, 0, 0, (1, 2), 2)
    assert positions == 8  # the fifth column fills no patch
    assert found.shape == (4, 4, 2)
    assert found[0].tolist() == [[0, 10], [20, 30], [1000, 1010], [1020, 1030]]
    assert found[1, 0].tolist() == [2000, 2010]
    assert found[2, 0].tolist() == [100, 110]
    found, positions = patch_vectors(features, 2, 0, (4, 4), 4)
    assert (positions, found.shape) == (2, (1, 8, 1))
    assert found.flatten()[:4].tolist() == [1100, 1110, 1120, 1130]
    assert patch_vectors(features, 0, 3, (2, 2), 4)[1] == 4


def test_published_counts():
    """16 x 32 pooled positions are 32 patches of 256 vectors of 128; 1 positive, 240 negatives."""
    with torch.device("meta"):
        found, positions = patch_vectors(torch.empty(1, 2048, 64, 128), 4, 0, (4, 4), 16)
    assert (found.shape, positions) == ((32, 256, 128), 512)
    equal = torch.zeros(1, 256, 1)
    total = PatchContrast.apply(equal, equal, 16, 0.07)
    assert total.item() == pytest.approx(256 * math.log(241), rel=1e-5)


def test_masks():
    mask = centre_mask(torch.zeros(1, 2, 6, 9))
    assert mask.shape == (1, 1, 6, 9)
    assert not mask[..., 2:4, 3:6].any()
    assert mask.sum() == 54 - 6
    uniform = torch.tensor([0.0, 0.25, 0.26, 0.99])
    assert random_mask(uniform, 0.75).tolist() == [1, 1, 0, 0]


def test_fd_by_hand():
    """Kernels that double a kept 1 to 4, against 1: (9 + 1) / 1; the enhanced mean: (2 + 4) / 2."""
    for cls, made in ((AfDCD, 4.0), (AfDCDEnhanced, 3.0)):
        method = cls(groups=1, pool=0)
        method.build(*(NetworkInfo("n", 2, {"c5": 1}, {}) for _ in range(2)))
        for layer in method.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                centre = layer.weight.shape[2] // 2
                layer.weight.data[0, 0, centre, centre] = 2.0
        method.align.weight.data.fill_(1.0)
        if cls is AfDCDEnhanced:
            method.projector.second.weight.data.div_(2)
            method.projector.of_first.weight.data.div_(2)
        ones, mask = torch.ones(1, 1, 1, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
        fd, _ = method.feature_terms(ones, ones, mask)
        assert fd.item() == pytest.approx((made - 1) ** 2 + 1)


def test_hierarchical_context_by_hand():
    """Difference 1 in one of 4x4 positions: 1/16, of cells 1/16, 1/4 of (1/4)^2, (1/16)^2."""
    ours = torch.zeros(1, 1, 4, 4)
    ours[..., 0, 0] = 1.0
    expected = (1 / 16 + 1 / 2 / 16 + 1 / 4 / 64 + 1 / 8 / 256) / 1.875
    value = hierarchical_context(ours, torch.zeros(1, 1, 4, 4))
    assert value.item() == pytest.approx(expected)
    constant = hierarchical_context(torch.full((2, 3, 7, 5), 2.0), torch.zeros(2, 3, 7, 5))
    assert constant.item() == pytest.approx(4.0)
    assert hierarchical_context(ours, ours) == 0


@few
@given(st.tuples(*(st.integers(1, n) for n in (2, 3, 11, 13))), st.integers(0, 2**16))
def test_hierarchical_context_is_that_of_adaptive_pooling(shape, seed):
    ours, theirs = random(shape, seed), random(shape, seed + 1)
    expected = F.mse_loss(ours, theirs)
    for cells, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        pooled = (F.adaptive_avg_pool2d(maps, cells) for maps in (ours, theirs))
        expected = expected + weight * F.mse_loss(*pooled)
    torch.testing.assert_close(hierarchical_context(ours, theirs), expected / 1.875)


def test_fusion_is_the_concatenated_convolution():
    block = Fusion(2, 3, 4, fuses=True)
    stage, deeper = random((2, 2, 6, 5)), random((2, 3, 3, 2), 1)
    _, residual = block(stage, deeper)
    x = block.reduce(stage)
    up = F.interpolate(deeper, (6, 5), mode="nearest")
    gates = block.attend(torch.cat((x, up), 1)).sigmoid()
    torch.testing.assert_close(residual, x * gates[:, :1] + up * gates[:, 1:])


# What the equations imply, and how it is computed.


def test_blocks_change_nothing(monkeypatch):
    method, results = make("af_dcd", pool=0, patch_height=3), []
    student, teacher, _ = draw(method)
    for size in (2**24, 1, 40, 500, 3000):
        set_block(monkeypatch, size)
        term = seeded(method, student, teacher, None)["ctr"]
        results.append((term, *torch.autograd.grad(term, student.c5)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_no_block_is_larger_than_allowed(monkeypatch):
    largest, taken = 0, af_dcd._contrast

    def spy(anchors, keys, *rest):
        nonlocal largest
        largest = max(largest, anchors.numel() * keys.shape[1])
        return taken(anchors, keys, *rest)

    monkeypatch.setattr(af_dcd, "_contrast", spy)
    set_block(monkeypatch, 5000)
    anchors = random((7, 48, 3))
    PatchContrast.apply(anchors, anchors, 4, 1.0)
    assert 2000 < largest <= 5000


def test_the_contrast_is_least_where_features_are_the_teachers():
    teacher = random((3, 16, 4))
    own = PatchContrast.apply(teacher, teacher, 4, 0.07)
    assert 0 <= own < PatchContrast.apply(teacher + random((3, 16, 4), 1), teacher, 4, 0.07)


def test_ctr_is_a_mean_over_positions_and_images():
    method = make("af_dcd", pool=0, mask_ratio=0.0)
    student, teacher, _ = draw(method, images=1, grid=(4, 8))
    twice = [
        Taps(**{k: v.repeat(2, 1, 1, 2) for k, v in vars(t).items()}) for t in (student, teacher)
    ]
    method.projector = nn.Identity()  # no convolution, which would see over the seam
    (one, two) = (method(*taps, None)["ctr"] for taps in ((student, teacher), twice))
    torch.testing.assert_close(one, two)


# Where it could break.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps(name, dtype):
    """Under autocast, from half-precision maps: float32 terms near the loops', finite gradients."""
    method = make(name, middle=3) if "review" in name else make(name, contrast_temperature=1.0)
    student, teacher, _ = draw(method, grid=(3, 4), scale=2.0)
    student, teacher = rounded(student, dtype, leaves=True), rounded(teacher, dtype)
    expected = seeded(ORACLES[name], student, teacher, None, method)
    with torch.autocast("cpu", dtype=dtype):
        terms = seeded(method, student, teacher, None)
    for term, value in expected.items():
        assert terms[term].dtype == torch.float32
        assert terms[term].item() == pytest.approx(value.item(), rel=0.05, abs=1e-4), term
    found = torch.autograd.grad(
        sum(method.weights[n] * t for n, t in terms.items()), list(vars(student).values())
    )
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (5, 3)])
def test_extreme_maps(name, scale, grid):
    """Maps of zeros, huge maps and maps smaller than a window, a patch or a cell."""
    method = make(name)
    student, teacher, _ = draw(method, grid=grid, scale=scale)
    terms = method(student, teacher, None)
    assert all(term.isfinite() for term in terms.values())
    found = torch.autograd.grad(
        sum(method.weights[n] * t for n, t in terms.items()), list(vars(student).values())
    )
    assert all(g.isfinite().all() for g in found)


def test_masks_are_drawn_anew_and_seeded():
    random_ones, fixed = make("af_dcd"), make("af_dcd", mask="centre")
    batch = draw(fixed)
    assert seeded(random_ones, *batch)["fd"] == seeded(random_ones, *batch)["fd"]
    assert random_ones(*batch)["fd"] != random_ones(*batch)["fd"]
    assert fixed(*batch)["fd"] == fixed(*batch)["fd"]


# Extras and settings.


def test_what_is_trained():
    """From R18 to R101: Af-DCD 77 M parameters, enhanced 152 M; ReviewKD 9 M."""
    channels = dict(zip(("c2", "c3", "c4", "c5"), (64, 128, 256, 512), strict=True))
    wide = {tap: 4 * c for tap, c in channels.items()}
    infos = NetworkInfo("R18", 19, channels, {}), NetworkInfo("R101", 19, wide, {})
    square = 9 * 2048**2 + 2048
    align = 512 * 2048 + 2048
    fused = sum(c * 256 + 9 * 256 * 4 * c + 2 * 256 + 2 * 4 * c for c in channels.values())
    gates = 3 * (2 * 512 + 2)
    expected = {
        AfDCD: align + 2 * square,
        AfDCDEnhanced: align + 4 * square,
        ReviewKD: fused + gates,
    }
    for cls, count in expected.items():
        with torch.device("meta"):
            method = cls()
            method.build(*infos)
        assert sum(p.numel() for p in method.extra_parameters()) == count
    assert method.fusions["c5"].attend is None


def test_align_is_there_between_equals():
    method = AfDCD(groups=4)
    method.build(*(NetworkInfo("n", 2, {"c5": 8}, {}) for _ in range(2)))
    assert method.align.weight.shape == (8, 8, 1, 1)


def test_enhanced_projector_is_a_chain_with_two_ends():
    projector, x = EnhancedProjector(3), random((1, 3, 4, 5))
    a = F.relu(projector.first(x))
    b = F.relu(projector.second(a))
    expected = torch.stack((projector.of_first(a), projector.of_second(b))).mean(0)
    torch.testing.assert_close(projector(x), expected)


def test_weights_and_taps_are_the_published_ones():
    assert AfDCD.weights == AfDCDEnhanced.weights == {"fd": 2e-6, "ctr": 0.005, "kd": 1.0}
    assert AfDCD.taps == ("c5", "logits")
    by_data = {r.dataset: r.weights for r in AfDCD.recipes if r.student == "DeepLabV3-R18"}
    assert by_data["ADE20K"] == {"fd": 1e-6, "ctr": 0.04, "kd": 0.5}
    assert by_data["COCO-Stuff"] == {"fd": 5e-6, "kd": 0.5}
    assert (ReviewKD.weights, ReviewKDImageNet.weights) == ({"reviewkd": 1.2}, {"reviewkd": 1.0})
    assert (ReviewKD().middle, ReviewKDImageNet().middle) == (256, 512)
    assert not ReviewKD.recipes


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (AfDCD, {"mask_ratio": 1.5}, "mask_ratio must be from 0 to 1, not 1.5"),
        (AfDCD, {"contrast_temperature": 0.0}, "contrast_temperature must be above 0"),
        (AfDCD, {"groups": 0}, "groups must be above 0"),
        (AfDCD, {"patch_width": 0}, "patch_width must be above 0"),
        (AfDCD, {"pool": -1}, "pool must be 0 \\(off\\) or above, not -1"),
        (AfDCDEnhanced, {"crop": -1}, "crop must be 0 \\(off\\) or above"),
        (ReviewKD, {"middle": 0}, "middle must be above 0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(cls, setting, message):
    with pytest.raises(UserError, match=message):
        cls(**setting)


def test_groups_that_do_not_divide_the_channels_are_named():
    method = AfDCD(groups=5)
    with pytest.raises(UserError, match="groups must divide the 8 channels of c5 of big"):
        method.build(NetworkInfo("n", 2, {"c5": 8}, {}), NetworkInfo("big", 2, {"c5": 8}, {}))
