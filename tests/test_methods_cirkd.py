"""CIRKD and CIRKDv2 against their equations written out, and how their memories behave."""

import copy
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import real_batch, real_step, set_block
from oracles_cirkd import ORACLES, enqueue, gcn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdprof.discovery import find_method
from kdprof.errors import UserError
from kdprof.measure.trace import StepTrace
from kdprof.method import NetworkInfo, Taps
from kdprof.methods import _memory, _relations, cirkdv2
from kdprof.methods._common import membership

CLASSES = 3
CHANNELS = {"student": 6, "teacher": 8}
SMALL = {"pixel_memory": 20, "region_memory": 3, "pixel_contrast": 10, "region_contrast": 5,
         "pixel_updates": 4}  # fmt: skip
SMALL_V2 = {**SMALL, "channel_memory": 30, "channel_contrast": 9, "channel_updates": 7,
            "channel_positions": 12}  # fmt: skip
SETTINGS = {"cirkd": SMALL, "cirkd:memory": SMALL, "cirkd:minibatch": {}, "cirkdv2": SMALL_V2}
few = settings(max_examples=8, deadline=None, derandomize=True)
names = pytest.mark.parametrize("name", sorted(SETTINGS))


def info(who):
    return NetworkInfo(who, CLASSES, {"head": CHANNELS[who], "logits": CLASSES}, {})


def make(name, seed=0, **changes):
    torch.manual_seed(seed)
    method = find_method(name).cls(**{**SETTINGS[name], **changes})
    method.build(info("student"), info("teacher"))
    return method.train()


def draw(images=2, grid=(5, 6), teacher_grid=None, seed=0, present=CLASSES, dtype=torch.float32):
    """Return student taps (leaves), teacher taps and labels; ``present`` classes, 0: all void."""
    generator = torch.Generator().manual_seed(seed)

    def taps(who, size):
        shapes = {"head": (images, CHANNELS[who], *size), "logits": (images, CLASSES, *size)}
        return {k: torch.randn(s, generator=generator, dtype=dtype) for k, s in shapes.items()}

    student, teacher = taps("student", grid), taps("teacher", teacher_grid or grid)
    height, width = teacher_grid or grid
    size = (images, 2 * height, 3 * width)
    labels = torch.randint(0, max(present, 1), size, generator=generator)
    labels[torch.rand(size, generator=generator) < (0.2 if present else 1.0)] = 255
    return Taps(**{k: v.requires_grad_() for k, v in student.items()}), Taps(**teacher), labels


def run(compute, method, batch, seed=3):
    """Return terms, and gradients of student and extras, under a seed."""
    torch.manual_seed(seed)
    terms = compute(*batch)
    total = sum(method.weights[k] * v for k, v in terms.items())
    wanted = [*vars(batch[0]).values(), *method.parameters()]
    return terms, torch.autograd.grad(total, wanted)


def exact(batch):
    """Return the batch in float64, with leaves of its own."""
    student, teacher, labels = batch
    student = {k: v.detach().double().requires_grad_() for k, v in vars(student).items()}
    return Taps(**student), Taps(**{k: v.double() for k, v in vars(teacher).items()}), labels


def assert_near(ours, theirs, rel=2e-4, absolute=2e-6):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rel, atol=absolute)


def assert_equals_oracle(name, method, batch):
    slow = copy.deepcopy(method).double()
    terms, gradients = run(method, method, batch)
    literal = exact(batch)
    expected, slopes = run(lambda *b: ORACLES[name](*b, slow), slow, literal)
    assert terms.keys() == expected.keys() == method.weights.keys()
    for term, value in expected.items():
        assert_near(terms[term], value)
    for ours, theirs in zip(gradients, slopes, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5
    for ours, theirs in zip(method.buffers(), slow.buffers(), strict=True):
        assert_near(ours, theirs, absolute=1e-5)


# The equations.


@names
@few
@given(
    st.integers(1, 3), st.integers(2, 6), st.integers(2, 7), st.integers(0, 2**16),
    st.integers(0, CLASSES), st.booleans(), st.sampled_from([(0.1, 1.0), (0.5, 2.0)]),
)  # fmt: skip
def test_equation(name, images, height, width, seed, present, own, temperatures):
    """Any number of classes present; pointers anywhere, so that pushes reach the end."""
    changes = {}
    if name != "cirkd:minibatch":
        contrast, divergence = temperatures
        changes = {"own_pixels": own, "contrast_temperature": contrast,
                   "contrast_kd_temperature": divergence}  # fmt: skip
    method = make(name, seed, **changes)
    for part in method.modules():
        if isinstance(part, _memory.RingQueues):
            part.pointers.random_(0, part.size)
    if name == "cirkdv2":
        height += 4  # one average is too few for batch norm
    batch = draw(images, (height, width), seed=seed, present=present)
    assert_equals_oracle(name, method, batch)


@names
@pytest.mark.parametrize("grids", [((3, 4), (6, 7)), ((7, 6), (5, 3))])
def test_equation_on_different_grids(name, grids):
    assert_equals_oracle(name, make(name), draw(2, *grids))


def test_equation_after_several_steps():
    method = make("cirkdv2")
    slow = copy.deepcopy(method).double()
    for seed in range(4):
        batch = draw(3, seed=seed)
        terms, _ = run(method, method, batch, seed)
        expected, _ = run(lambda *b: ORACLES["cirkdv2"](*b, slow), slow, exact(batch), seed)
        assert all((terms[k] - v).abs() <= 1e-4 * v.abs() + 1e-6 for k, v in expected.items())


@pytest.mark.parametrize("window", [2, 3])
def test_pooling_comes_first(window):
    student, teacher = torch.randn(2, 4, 7, 9), torch.randn(2, 5, 7, 9)
    pooled = [F.avg_pool2d(f, window, ceil_mode=True) for f in (student, teacher)]
    assert_near(
        _relations.mini_batch_kl(student, teacher, 0.1, window),
        _relations.mini_batch_kl(*pooled, 0.1),
    )


# Numbers worked out by hand.


def test_batch_term_by_hand():
    """Teacher positions at right angles, student's all alike: log 2 minus an entropy."""
    teacher = torch.tensor([[2.0, 0.0], [0.0, 5.0]])[None, :, None]  # positions e1, e2
    student = torch.full((1, 3, 1, 2), 0.7)
    for temperature in (1.0, 0.5):
        p = math.exp(1 / temperature) / (math.exp(1 / temperature) + 1)
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        value = _relations.mini_batch_kl(student, teacher, temperature)
        assert value.item() == pytest.approx(math.log(2) - entropy, rel=1e-5)


def test_a_second_image_adds_the_pairs_across():
    """Two equal images are as one; a second one that the student sees alike adds pairs of 0."""
    one = torch.randn(1, 4, 3, 3), torch.randn(1, 5, 3, 3)
    twice = [torch.cat([f, f]) for f in one]
    assert_near(_relations.mini_batch_kl(*twice, 0.1), _relations.mini_batch_kl(*one, 0.1))
    flat = [torch.cat([f, torch.ones_like(f)]) for f in one]
    within = _relations.mini_batch_kl(*one, 0.1)
    across = _relations.mini_batch_kl(*flat, 0.1)
    # From each position of the first to the equal ones of the second, and back: of four pairs, the
    # first image's own counts 1/4, (1, 2) and (2, 2) are uniform in both networks.
    ours, theirs = (F.normalize(f[0].flatten(1), dim=0) for f in one)
    back = [
        (F.normalize(torch.ones(len(f)), dim=0) @ f / 0.1).log_softmax(0) for f in (ours, theirs)
    ]
    expected = within / 4 + F.kl_div(*back, log_target=True, reduction="sum") / 4
    assert_near(across, expected)


def test_memory_term_by_hand():
    """One valid position of two; keys e1, e2; the void one does not count."""
    memory = _memory.ClassMemory((2, 2), 2, 1, 1, 1)
    theirs, ours = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    members = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    p = math.exp(1) / (math.exp(1) + 1)  # T T' = 1
    expected = 2**2 * (2 * p - 1)  # T'^2 (p - q) (log p - log q), which is 1 apart
    value = memory.relation(ours, theirs, members, torch.eye(2), 0.5, 2.0)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_ring_by_hand():
    """Slots 0..4; at 3, two vectors reach the end: the last two slots, pointer 0."""
    queue = _memory.RingQueues(2, 5, 1)
    queue.rows.zero_()
    queue.pointers.copy_(torch.tensor([3, 0]))
    values = torch.arange(1.0, 9.0).view(2, 2, 2, 1)  # turn, queue, vector
    queue.push(values, torch.tensor([[2, 1], [1, 0]]))
    assert queue.contents()[..., 0].tolist() == [[5, 0, 0, 1, 2], [3, 0, 0, 0, 0]]
    assert queue.pointers.tolist() == [1, 1]
    queue.push(values, torch.tensor([[2, 2], [2, 2]]))
    # First queue: 1, 2 at 1; 5, 6 would end at 5: last two. Second: 3, 4 at 1, then the same.
    assert queue.contents()[..., 0].tolist() == [[5, 1, 2, 5, 6], [3, 3, 4, 7, 8]]
    assert queue.pointers.tolist() == [0, 0]
    assert queue.rows[-1] == 0


@few
@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_ring_is_the_loop(seed, turns, size, most):
    """Also where a step writes a slot several times and passes the end again and again."""
    most = min(most, size)
    generator = torch.Generator().manual_seed(seed)
    queue = _memory.RingQueues(3, size, 2)
    queue.pointers.random_(0, size, generator=generator)
    slow = copy.deepcopy(queue)
    values = torch.randn(turns, 3, most, 2, generator=generator)
    counts = torch.randint(0, most + 1, (turns, 3), generator=generator)
    queue.push(values, counts)
    for turn in range(turns):
        for label in range(3):
            if counts[turn, label]:
                enqueue(slow, label, values[turn, label, : counts[turn, label]])
    assert torch.equal(queue.rows, slow.rows)
    assert torch.equal(queue.pointers, slow.pointers)


# What is stored.


def test_draws_are_different_and_every_subset_is_as_likely():
    torch.manual_seed(0)
    drawn = _memory.distinct(torch.full((6000,), 5), 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert ((drawn >= 0) & (drawn < 5)).all()
    subsets = drawn.min(1).values * 5 + drawn.max(1).values
    frequencies = subsets.bincount()
    frequencies = frequencies[frequencies > 0]
    assert len(frequencies) == 10
    assert ((frequencies - 600).abs() < 6 * 600**0.5).all()


def test_of_few_all_are_drawn():
    drawn = _memory.distinct(torch.tensor([0, 1, 3, 4]), 4)
    for count, row in zip((0, 1, 3, 4), drawn.tolist(), strict=True):
        assert sorted(row[:count]) == list(range(count))


@few
@given(st.integers(1, 20), st.integers(0, 2**16))
def test_draws_are_those_of_the_loop(number, seed):
    """Floyd's algorithm, one draw after the other."""
    torch.manual_seed(seed)
    counts = torch.randint(0, 40, (3, 5))
    torch.manual_seed(seed)
    drawn = _memory.distinct(counts, number)
    torch.manual_seed(seed)
    draws = torch.rand(3, 5, number)
    for row, count, uniform in zip(
        drawn.view(15, -1).tolist(), counts.flatten().tolist(), draws.view(15, -1), strict=True
    ):
        chosen: list[int] = []
        for highest in range(max(count - number, 0), max(count - number, 0) + number):
            pick = min(int(uniform[len(chosen)] * (highest + 1)), highest)
            chosen.append(highest if pick in chosen else pick)
        assert row == chosen


def test_positions_of_ranks():
    labels = torch.tensor([[2, 0, 255, 0, 2, 2], [1, 1, 1, 255, 255, 1]])
    members = membership(labels[:, None], torch.Size((1, 6)), 3)
    ranks = torch.tensor([[[1, 0], [0, 0], [2, 1]], [[0, 0], [3, 2], [0, 0]]])
    found = _memory.positions_of_ranks(members, ranks)
    assert found[0, 0].tolist() == [3, 1]
    assert found[0, 2].tolist() == [5, 4]
    assert found[1, 1].tolist() == [5, 2]


@pytest.mark.parametrize("own", [False, True])
def test_stored_pixels(own):
    """The published code stores the image's first pixels under every class; its own on request."""
    method = make("cirkd:memory", own_pixels=own)
    student, teacher, _ = draw(1, (4, 4))
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, 2:] = 1
    before = method.memory.pixels.contents().clone()
    method(student, teacher, labels)
    units = F.normalize(teacher.head[0].flatten(1), dim=0).T
    stored = method.memory.pixels.contents()
    for label, first in ((0, 0), (1, 8 if own else 0)):
        near = torch.cdist(stored[label, :4], units) < 1e-3
        assert near.any(1).all()
        assert near.nonzero()[:, 1].unique().numel() == 4
        assert not near[:, :first].any()
        assert not near[:, first + 8 :].any()
    assert torch.equal(stored[2], before[2])
    assert torch.equal(stored[:, 4:], before[:, 4:])
    assert method.memory.pixels.pointers.tolist() == [4, 4, 0]
    assert method.memory.regions.pointers.tolist() == [1, 1, 0]
    assert_near(method.memory.regions.contents()[1, 0], F.normalize(units[8:].mean(0), dim=0))


def test_void_stores_nothing_and_costs_nothing():
    method = make("cirkd")
    before = {n: b.clone() for n, b in method.memory.state_dict().items() if "projection" not in n}
    batch = draw(present=0)
    terms, gradients = run(method, method, batch)
    assert terms["pixel"] == terms["region"] == 0
    assert all(g.isfinite().all() for g in gradients)
    after = method.memory.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_batch_is_among_the_keys():
    """Region of the one class present, in a memory of one slot: the teacher's similarity to it."""
    method = make("cirkd:memory", region_memory=1)
    student, teacher, labels = draw(1, present=1)
    method(student, teacher, labels)
    units = F.normalize(teacher.head[0].flatten(1), dim=0).T
    here = F.interpolate(labels[:, None].float(), (5, 6)).flatten() == 0
    assert_near(method.memory.regions.keys(1)[0], F.normalize(units[here].mean(0), dim=0))


def _push_in_a_rank(rank, folder, seed, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}", rank=rank, world_size=2)
    memory, channels, units, members, ranks, order = _batch_of_two(seed)
    mine = slice(2 * rank, 2 * rank + 2)
    memory.update(units[mine], members[mine], ranks[mine])
    channels.update(units[mine], order)
    given = copy.deepcopy(channels.queue.rows), channels.queue.pointers.clone()
    torch.manual_seed(rank)
    channels.update(units[mine])
    found.put((rank, [b.numpy() for b in (*memory.buffers(), *given, channels.queue.rows)]))
    dist.destroy_process_group()


def _batch_of_two(seed):
    torch.manual_seed(seed)
    memory = _memory.ClassMemory((4, 5), CLASSES, 9, 3, 4)
    channels = cirkdv2.ChannelMemory((4, 5), 20, 5, 11)
    units = F.normalize(torch.randn(4, 12, 5), dim=2)
    members = F.one_hot(torch.randint(0, CLASSES, (4, 12)), CLASSES).float()
    ranks = _memory.distinct(members.sum(1).long(), 4)
    return memory, channels, units, members, ranks, torch.randperm(4 * 12)


@pytest.mark.skipif(
    not dist.is_available() or "fork" not in multiprocessing.get_all_start_methods(),
    reason="needs torch.distributed and fork",
)
def test_two_ranks_store_what_one_would(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    arguments = [(rank, tmp_path / "meeting", 5, found) for rank in range(2)]
    workers = [context.Process(target=_push_in_a_rank, args=a, daemon=True) for a in arguments]
    for worker in workers:
        worker.start()
    results = dict(found.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    memory, channels, units, members, ranks, order = _batch_of_two(5)
    memory.update(units, members, ranks)
    channels.update(units, order)
    expected = [*memory.buffers(), channels.queue.rows, channels.queue.pointers]
    for rank in range(2):
        for ours, alone in zip(results[rank][:-1], expected, strict=True):
            assert_near(torch.from_numpy(ours), alone, rel=1e-6, absolute=1e-6)
    assert (results[0][-1] == results[1][-1]).all()  # though each has a seed of its own


# In blocks.


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operator made, and how many maps of that size."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize(("images", "side"), [(2, 16), (6, 8)], ids=["rows", "pairs"])
def test_no_similarity_map_is_whole(monkeypatch, images, side):
    """Of maps of 512 and 384 positions; one of two images is too large for a block, or is not."""
    monkeypatch.setattr(_relations, "LEAST_ROWS", 8)
    set_block(monkeypatch, 2**13)
    student = torch.randn(images, 4, side, side, requires_grad=True)
    teacher = torch.randn(images, 5, side, side)
    with LargestResult() as largest:
        _relations.mini_batch_kl(student, teacher, 0.1).backward()
    # A block of pairs is one allocation for both networks.
    assert largest.elements <= 2**13 * (1 if side == 16 else 2) < (images * side**2) ** 2 / 8


def test_no_attention_map_is_whole():
    module, x = cirkdv2.GraphModule(4), torch.randn(2, 4, 16, 16, requires_grad=True)
    with LargestResult() as largest:
        module(x).sum().backward()
    assert largest.elements <= 2 * 2 * 4 * 256 < 256**2


@few
@given(st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 2**16))
def test_blocks_do_not_matter(rows, images, keyed, seed):
    """Any block size, the last block smaller: value and gradient of the whole map."""
    generator = torch.Generator().manual_seed(seed)
    made = {"generator": generator, "dtype": torch.float64}
    student = torch.randn(5 * images, 3, **made).requires_grad_()
    teacher, keys = torch.randn(5 * images, 3, **made), torch.randn(7, 3, **made)
    weights = torch.rand(5 * images, **made)
    setting = {"keys": keys, "weights": weights} if keyed else {"parts": images}
    results = []
    for least in (rows, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_relations, "LEAST_ROWS", least)
            set_block(patch, 1)
            value = _relations.relation_kl(student, teacher, 0.7, **setting)
        results.append((value.detach(), *torch.autograd.grad(value, student)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("keyed", [False, True])
def test_gradient_of_a_relation(keyed):
    torch.manual_seed(0)
    student, teacher, keys = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    setting = {"keys": keys, "weights": torch.rand(6).double()} if keyed else {"parts": 2}
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: 3 * _relations.relation_kl(s, teacher, 0.5, **setting), [student]
    )
    with torch.no_grad():
        assert _relations.relation_kl(student, teacher, 0.5, **setting) > 0


def test_attention_is_that_of_the_graph_module():
    module, x = cirkdv2.GraphModule(6), torch.randn(2, 6, 5, 7, requires_grad=True)
    slope = torch.randn(2, 6, 5, 7)
    wanted = [x, *module.parameters()]
    ours = module(x), *torch.autograd.grad((module(x) * slope).sum(), wanted)
    literal = gcn(module, x), *torch.autograd.grad((gcn(module, x) * slope).sum(), wanted)
    for one, other in zip(ours, literal, strict=True):
        assert_near(one, other, rel=1e-3, absolute=1e-4)


# Robustness.


@names
@pytest.mark.parametrize(
    "change",
    [
        {"images": 1},
        {"grid": (3, 11)},
        {"grid": (3, 4), "teacher_grid": (6, 7)},
        {"grid": (6, 7), "teacher_grid": (3, 4)},
        {"present": 0},
        {"present": 1},
        {"scale": 1e6},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_finite(name, change):
    """A dead position (scale 0) has no direction, and no gradient as if it were tiny."""
    student, teacher, labels = draw(**{k: v for k, v in change.items() if k != "scale"})
    scale = change.get("scale", 1.0)
    for tap in (*vars(student).values(), *vars(teacher).values()):
        tap.detach().mul_(scale)
    method = make(name)
    terms, gradients = run(method, method, (student, teacher, labels))
    assert all(t.isfinite() and t.dtype == torch.float32 for t in terms.values())
    assert all(g.isfinite().all() and g.abs().max() < 1e6 for g in gradients)


@names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(name, dtype):
    """From half-precision taps under autocast: near the equation for the same rounded taps."""
    batch = draw(dtype=torch.float32)
    rounded = [Taps(**{k: v.detach().to(dtype) for k, v in vars(t).items()}) for t in batch[:2]]
    method = make(name)
    slow = copy.deepcopy(method).double()
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=dtype):
        terms = method(*rounded, batch[2])
    torch.manual_seed(3)
    exactly = [Taps(**{k: v.double() for k, v in vars(t).items()}) for t in rounded]
    expected = ORACLES[name](*exactly, batch[2], slow)
    for term, value in expected.items():
        assert terms[term].dtype == torch.float32
        assert_near(terms[term], value, rel=0.05, absolute=1e-3)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_equal_features_have_equal_relations(temperature):
    features = torch.randn(2, 6, 5, 7, requires_grad=True)
    value = _relations.mini_batch_kl(features, features.detach().clone(), temperature)
    assert value == 0
    assert torch.autograd.grad(value, features)[0].abs().max() < 1e-6
    units = F.normalize(torch.randn(4, 3, 9), dim=2)
    assert _relations.batch_relation(units, units.clone(), temperature) == 0


@names
def test_gradients_reach_student_and_extras_and_never_the_teacher(name):
    method = make(name)
    terms = method(*draw())
    sum(method.weights[k] * v for k, v in terms.items()).backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    student, teacher, labels = draw()
    teacher.head.requires_grad_()
    terms = method(student, teacher, labels)
    relations = {"batch", "pixel", "region", "channel", "channel_memory"} & terms.keys()
    sum(terms[k] for k in relations).backward()
    assert student.head.grad.any()
    assert teacher.head.grad is None
    assert not any(b.requires_grad for b in method.buffers())


# Cost.


def test_a_relation_costs_four_products_and_all_are_the_terms_own():
    """384 positions, 6 and 12 channels: both similarities, then two products for the gradient,
    within the objective's forward; nothing is computed again."""
    step = real_step("cirkd:minibatch")
    with StepTrace(step) as trace:
        step(*real_batch(), 0, trace.mark)
    cost = trace.terms(step.method.weights)["batch"]
    assert cost.forward_flop == 2 * 384**2 * (6 + 12 + 6 + 6)
    assert cost.backward_flop == 0


# Settings.


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("cirkd", {"pooling": -1}, "pooling must be 0 or more"),
        ("cirkd", {"contrast_temperature": 0.0}, "contrast_temperature must be above 0"),
        ("cirkd", {"batch_temperature": 0.0}, "batch_temperature must be above 0"),
        ("cirkd:memory", {"pixel_memory": 3}, r"pixel_updates \(4\) must not be above"),
        ("cirkd:memory", {"region_memory": 0}, "region_memory must be above 0"),
        ("cirkdv2", {"channel_memory": 5}, r"channel_updates \(7\) must not be above"),
    ],
)
def test_wrong_settings(name, setting, message):
    with pytest.raises(UserError, match=message):
        make(name, **setting)


def test_a_grid_too_large_for_the_channel_memory_says_what_to_set():
    method = make("cirkdv2")
    method(*draw(grid=(12, 16)))
    with pytest.raises(UserError, match=r"16 positions .* \(12\): set it to 16"):
        method(*draw(grid=(16, 16)))


def test_without_fitnet_there_is_no_graph_module():
    method = make("cirkdv2", weights={"fitnet": 0.0})
    assert not list(method.gcn.parameters())
    assert set(method(*draw())) == set(method.weights)


def test_notes_tell_of_memory_and_of_a_single_image():
    method = make("cirkd")
    method(*draw(2))
    (note,) = method.notes
    assert "69 vectors of 8 channels" in note
    for _ in range(2):
        method(*draw(1))
    assert len(method.notes) == 2
    assert "one image in a group" in method.notes[1]


def test_published_sizes():
    """Cityscapes: 216 and 54 slots of each class; 4104 and 1026 keys."""
    method = find_method("cirkd").cls()
    assert [n // 19 + 1 for n in (method.pixel_contrast, method.region_contrast)] == [216, 54]
    queue = _memory.RingQueues(19, 300, 2)
    assert queue.keys(216).shape == (4104, 2)
    assert method.weights == {"kd": 1.0, "batch": 1.0, "pixel": 0.1, "region": 0.1}
