"""Each objective against its equation written out in loops, and what every method must hold to."""

import copy
import math

import pytest
import torch
from builders import TinyNet, tiny_batch, tiny_step
from hypothesis import given, settings
from hypothesis import strategies as st

from kdprof.errors import UserError
from kdprof.measure.count import count_step
from kdprof.method import NetworkInfo, Taps, builtin_methods, find_method
from kdprof.methods._discriminator import Adversary, Discriminator, SpectralConv
from kdprof.methods.cwd import CWD, CWDCirkd, CWDFeature
from kdprof.methods.fitnet import FitNet
from kdprof.methods.ifvd import IFVDPlain, intra_class_variation
from kdprof.methods.kd import KD, pixel_kl

CLASSES = 5
NAMES = sorted(name for name, found in builtin_methods().items() if found.origin == "built-in")
DISTILLING = [name for name in NAMES if find_method(name).cls.weights]
ADVERSARIAL = [name for name in NAMES if find_method(name).cls.auxiliary_weights]
few = settings(max_examples=15, deadline=None, derandomize=True)
shapes = st.tuples(*(st.integers(1, top) for top in (3, 4, 5, 5)))
seeds = st.integers(0, 2**16)
scales = st.sampled_from([0.1, 3.0, 40.0])
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
        shape = {tap: (images, info.channels[tap], *size) for tap in taps}
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


# The equations in loops, in float64.


def softmax(values, temperature):
    top = max(values)
    powers = [math.exp((v - top) / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def kl(teacher, student, temperature):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pixels(maps):
    """Yield (image, row, column) of an (N, C, h, w) tensor."""
    n, _, h, w = maps.shape
    return [(i, y, x) for i in range(n) for y in range(h) for x in range(w)]


def slow_kd(student, teacher, temperature):
    total = 0.0
    for i, y, x in pixels(teacher):
        total += kl(teacher[i, :, y, x].tolist(), student[i, :, y, x].tolist(), temperature)
    return temperature**2 * total / len(pixels(teacher))


def slow_cwd(student, teacher, temperature, channels=None):
    n, c = teacher.shape[:2]
    total = 0.0
    for i in range(n):
        for k in range(c):
            total += kl(
                teacher[i, k].flatten().tolist(), student[i, k].flatten().tolist(), temperature
            )
    return temperature**2 * total / (n * (channels or c))


def slow_adapt(weight, maps):
    n, _, h, w = maps.shape
    mapped = torch.zeros(n, len(weight), h, w, dtype=torch.float64)
    for i, y, x in pixels(maps):
        for k in range(len(weight)):
            mapped[i, k, y, x] = sum(
                weight[k, c, 0, 0].item() * maps[i, c, y, x].item() for c in range(maps.shape[1])
            )
    return mapped


def slow_mse(ours, theirs):
    pairs = zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / theirs.numel()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def slow_cosines(features, labels, num_classes):
    """Return {pixel: cosine to the mean feature of its class in its image}, void left out."""
    n, channels, h, w = features.shape
    height, width = labels.shape[1:]
    cosines = {}
    for i in range(n):
        members = {}
        for y in range(h):
            for x in range(w):
                label = labels[i, y * height // h, x * width // w].item()
                if label < num_classes:
                    members.setdefault(label, []).append((y, x))
        for places in members.values():
            vectors = [features[i, :, y, x].tolist() for y, x in places]
            mean = [sum(v[c] for v in vectors) / (len(vectors) + 1e-6) for c in range(channels)]
            for (y, x), v in zip(places, vectors, strict=True):
                lengths = max(math.hypot(*v), 1e-8) * max(math.hypot(*mean), 1e-8)
                cosines[i, y, x] = dot(v, mean) / lengths
    return cosines


def slow_ifv(student, teacher, labels, num_classes):
    ours = slow_cosines(student, labels, num_classes)
    theirs = slow_cosines(teacher, labels, num_classes)
    return sum((ours[at] - theirs[at]) ** 2 for at in ours) / len(pixels(teacher))


def two_maps(shape, seed, scale, teacher_channels=None):
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    other = (n, teacher_channels or c, h, w)
    return tuple(scale * torch.randn(s, generator=generator) for s in (shape, other))


def close(value, expected):
    return value.item() == pytest.approx(expected, rel=2e-4, abs=2e-6)


@few
@given(shapes, seeds, scales, temperatures)
def test_kd_equation(shape, seed, scale, temperature):
    student, teacher = two_maps(shape, seed, scale)
    terms = KD(temperature=temperature)(Taps(logits=student), Taps(logits=teacher), None)
    assert close(terms["kd"], slow_kd(student.double(), teacher.double(), temperature))


@few
@given(shapes, seeds, scales, temperatures)
def test_cwd_equation(shape, seed, scale, temperature):
    student, teacher = two_maps(shape, seed, scale)
    terms = CWD(temperature=temperature)(Taps(logits=student), Taps(logits=teacher), None)
    assert close(terms["cwd"], slow_cwd(student.double(), teacher.double(), temperature))


@few
@given(shapes, seeds, scales)
def test_fitnet_equation(shape, seed, scale):
    torch.manual_seed(seed)
    student, teacher = two_maps(shape, seed, scale, teacher_channels=3)
    method = FitNet()
    infos = [NetworkInfo("n", 2, {"head": m.shape[1]}, {}) for m in (student, teacher)]
    method.build(*infos)
    logits = torch.zeros(1, 2, 1, 1)
    taps = (Taps(head=m, logits=logits) for m in (student, teacher))
    adapted = slow_adapt(method.adaptor.weight, student.double())
    assert close(method(*taps, None)["fitnet"], slow_mse(adapted, teacher.double()))


def test_cwd_feature_equations():
    """Both feature variants; CIRKD's divides by the student's channels."""
    student, teacher = two_maps((2, 2, 3, 5), 1, 2.0, teacher_channels=4)
    infos = [NetworkInfo("n", 2, {"head": m.shape[1]}, {}) for m in (student, teacher)]
    logits = torch.zeros(2, 2, 3, 5)
    taps = [Taps(head=m, logits=logits) for m in (student, teacher)]
    cirkd, feature = CWDCirkd(temperature=2.0), CWDFeature(temperature=2.0)
    cirkd.build(*infos)
    feature.build(*infos)
    adapted = slow_adapt(cirkd.adaptor.weight, student.double())
    expected = slow_cwd(adapted, teacher.double(), 2.0, channels=2)
    assert close(cirkd(*taps, None)["cwd_feature"], expected)
    adapted = slow_adapt(feature.adaptor[0].weight, student.double())
    mean = adapted.mean((0, 2, 3), keepdim=True)
    spread = (adapted.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    adapted = ((adapted - mean) / spread).clamp(min=0)
    assert close(feature(*taps, None)["cwd_feature"], slow_cwd(adapted, teacher.double(), 2.0))


@few
@given(shapes, seeds, st.sampled_from([0.1, 3.0]), st.integers(1, 3), st.integers(1, 4))
def test_ifv_equation(shape, seed, scale, factor, present):
    """Any number of classes present, one among them; void and ids out of range."""
    student, teacher = two_maps(shape, seed, scale, teacher_channels=3)
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0], factor * shape[2] + 1, factor * shape[3])
    labels = torch.randint(0, present, size, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.2] = 255
    labels[torch.rand(size, generator=generator) < 0.1] = 4  # not a class
    value = intra_class_variation(student, teacher, labels, 4)
    assert close(value, slow_ifv(student.double(), teacher.double(), labels, 4))


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
    taps = Taps(logits=student), Taps(logits=teacher)
    for method, shift in ((KD(), per_pixel), (CWD(), per_channel)):
        (plain,) = method(*taps, None).values()
        (shifted,) = method(Taps(logits=student + shift), taps[1], None).values()
        torch.testing.assert_close(shifted, plain)


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
    assert judge(torch.randn(1, 19, 64, 128)).shape == (1, 1, 1, 5)
    assert judge(torch.randn(1, 19, 9, 70)).shape == (1, 1, 1, 1)


def test_padding_is_told_once():
    adversary, notes = Adversary(CLASSES, "hinge"), []
    for grid in ((64, 64), (9, 70), (9, 70)):
        adversary.generator_loss(torch.randn(2, CLASSES, *grid), notes)
    (note,) = notes
    assert "9x70" in note


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
    assert (group["lr"], group["betas"]) == (4e-4, (0.9, 0.99))


# What every method must hold to.


class Recorded(Taps):
    """Taps that remember what was read of them."""

    def __init__(self, taps: Taps):
        self.__dict__.update(_maps=vars(taps), read=set())

    def __getattr__(self, name):
        if name not in self._maps:
            return super().__getattr__(name)
        self.read.add(name)
        return self._maps[name]


@pytest.mark.parametrize("name", NAMES)
def test_description(name):
    cls = find_method(name).cls
    assert all((cls.name, cls.title, cls.paper, cls.family, cls.__doc__))
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
    assert student.read == set(method.student_taps())
    assert teacher.read == set(method.read_of_teacher())


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
    exact = copy.deepcopy(method)(student, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
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


on_tiny = pytest.mark.parametrize(
    "name", [n for n in NAMES if set(find_method(n).cls.student_taps()) <= {"logits", "head", "c4"}]
)


@on_tiny
def test_takes_a_real_step(name):
    step = tiny_step(find_method(name).cls)
    method = step.method
    before = copy.deepcopy(method.state_dict())
    losses = step(*tiny_batch(), 0)
    assert {"task", "task_aux", *method.weights, *method.auxiliary_weights} == losses.keys()
    assert all(value.isfinite() for value in losses.values())
    changed = {n for n, v in method.state_dict().items() if not torch.equal(v, before[n])}
    gated = ("query", "key", "value")  # behind a gate that starts at 0
    weights = [n for n, _ in method.named_parameters() if n.endswith("weight")]
    assert {n for n in weights if n.split(".")[-2] not in gated} <= changed


@on_tiny
def test_stays_finite_in_float16(name):
    step = tiny_step(find_method(name).cls, precision="fp16")
    for i in range(2):
        assert all(value.isfinite() for value in step(*tiny_batch(i), i).values())
    state = [*step.student.state_dict().values(), *step.method.state_dict().values()]
    assert all(value.isfinite().all() for value in state)


@on_tiny
def test_can_be_counted(name):
    """The FLOP counter gets through, the gradient penalty's second derivative included."""
    cls = find_method(name).cls
    flop = count_step(lambda: tiny_step(cls), 2, (16, 20)).flop
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


def test_tiny_network_matches_the_contract():
    """These tests' own network has the taps that the real step above relies on."""
    assert {"logits", "head", "c4"} <= TinyNet().info.channels.keys()
