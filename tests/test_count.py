"""Matrix FLOP against formulas written by hand. 1 multiply-add = 2 FLOP."""

import copy
import weakref
from collections import Counter

import pytest
import torch
from builders import MY_METHOD, Alone, Mimic, TinyNet, tiny_step
from flop_oracle import torchs_counter
from method_inputs import NAMES, real_step
from small_study import small_study
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kdprof.measure.counting import count_study
from kdprof.measure.counting.count import Count, Uncountable, count_step, fake_tensors
from kdprof.measure.counting.counted_step import Parts
from kdprof.measure.counting.module_flop import modules_flop
from kdprof.measure.trace import StepTrace
from kdprof.method import Method, Taps
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.step import TrainStep


def flop_of(module: nn.Module, shape: tuple[int, ...], *, first: bool) -> tuple[int, int]:
    """Forward, and forward + backward; ``first``: the input itself needs no gradient."""
    counter = torchs_counter()
    x = torch.randn(shape, requires_grad=not first)
    with counter:
        out = module(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "multiply_adds"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 10), 2 * 8 * 10 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2), (1, 4, 9, 9), 4 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (1, 4, 8, 8), 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 1, bias=True), (1, 4, 5, 7), 5 * 7 * 6 * 4),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4), (1, 8, 6, 6), 6 * 6 * 12 * 2 * 9),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 25),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (1, 4, 5, 5), 5 * 5 * 4 * 6 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 5, 5), 5 * 5 * 4 * 3 * 4),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5),
    ],
)
def test_one_layer(module, shape, multiply_adds):
    assert flop_of(module, shape, first=False) == (2 * multiply_adds, 6 * multiply_adds)
    assert flop_of(copy.deepcopy(module), shape, first=True) == (
        2 * multiply_adds,
        4 * multiply_adds,
    )


def tiny_forward(width: int, positions: int) -> dict[str, int]:
    """Multiply-adds of TinyNet's layers per image."""
    return {
        "stem": positions * width * 3 * 9,
        "body": positions * 2 * width * width * 9,
        "classifier": positions * 3 * 2 * width,
        "auxiliary": positions * 3 * width,
    }


def test_whole_step_by_hand():
    """Student: every layer forward, twice backward, but the first layer's input needs no
    gradient. Teacher: forward only, without its auxiliary head. Adaptor: 12 -> 20 channels."""
    found = count_step(tiny_step(Mimic), fake_tensors()).flop
    positions = 4 * 4 * 5
    student, teacher = tiny_forward(6, positions), tiny_forward(10, positions)
    adapt = positions * 12 * 20
    assert found.student == 2 * sum(student.values())
    assert found.teacher == 2 * (sum(teacher.values()))
    assert found.objective == 2 * adapt
    assert found.backward == 2 * (2 * sum(student.values()) - student["stem"] + 2 * adapt)
    assert found.auxiliary == 0
    assert found.total == found.student + found.teacher + found.objective + found.backward


def test_student_alone_pays_no_teacher():
    found = count_step(tiny_step(Alone), fake_tensors()).flop
    assert (found.teacher, found.objective) == (0, 0)


def test_counting_neither_runs_nor_allocates():
    """A crop that would need terabytes is counted all the same, in proportion."""
    small = count_step(tiny_step(Alone, batch=2, crop=(64, 64)), fake_tensors())
    large = count_step(tiny_step(Alone, batch=2, crop=(65536, 65536)), fake_tensors())
    assert large.flop.total == pytest.approx(small.flop.total * 2**20)
    assert large.least_memory_bytes > 2**37


def test_a_count_names_every_operation():
    counted = count_step(tiny_step(Mimic), fake_tensors())
    assert sum(o.matrix_flop for o in counted.operations) == counted.flop.total
    assert {o.kind for o in counted.operations if o.phase == "optimizer"} == {"optimizer"}
    assert all(o.seconds is None for o in counted.operations)
    assert counted.synchronisations == []


def test_a_count_shares_the_objective_out_among_its_terms():
    """``logits``: sub, square, mean of 80 x 3 maps and nothing to multiply; ``head``: the adaptor,
    for whose weight and input the backward runs once each."""
    found = count_step(tiny_step(Mimic), fake_tensors()).terms
    adapt = 2 * 4 * 4 * 5 * 12 * 20
    assert (found["logits"].forward_flop, found["logits"].backward_flop) == (0, 0)
    assert (found["head"].forward_flop, found["head"].backward_flop) == (adapt, 2 * adapt)
    assert (found["logits"].weight, found["head"].weight) == (2.0, 0.5)
    assert found["logits"].forward_s is None


def test_steps_counted_under_one_mode_share_their_networks():
    mode, first, second = fake_tensors(), tiny_step(Mimic), tiny_step(Mimic)
    second.teacher = first.teacher
    alone = count_step(tiny_step(Mimic), fake_tensors())
    assert count_step(first, mode) == count_step(second, mode) == alone


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


class Following:
    """A second follower of what is saved for backward: bytes by storage, in one dictionary."""

    def __init__(self, ignored):
        self.ignored = {p.untyped_storage()._cdata for p in ignored}
        self.holders, self.now, self.peak = Counter(), 0, 0

    def pack(self, tensor):
        holder, storage = Holder(tensor), tensor.untyped_storage()
        if storage._cdata not in self.ignored:
            self.change(storage._cdata, storage.nbytes(), 1)
            weakref.finalize(holder, self.change, storage._cdata, storage.nbytes(), -1)
        return holder

    def change(self, key, size, by):
        before = self.holders[key] > 0
        self.holders[key] += by
        self.now += size * ((self.holders[key] > 0) - before)
        self.peak = max(self.peak, self.now)


def count_whole_step(step: TrainStep, mode) -> Count:
    """Count the plain step, every phase of it."""
    for module in (step.student, step.teacher, step.method):
        if module is not None:
            mode.replace_tensors(module)
    trained = [*step.student.parameters(), *step.method.parameters()]
    kept = list(step.teacher.parameters()) if step.teacher is not None else []
    parts = {key: getattr(step, key) for key in ("student", "teacher", "method", "settings")}
    crop, images = step.settings.crop, step.settings.batch
    with mode:
        plain = TrainStep(**parts, iterations=9, seed=0, device=torch.device("cpu"))
        batch = [torch.zeros(*s, *crop, dtype=torch.uint8) for s in ((images, 3), (images,))]
        if step.method.auxiliary_weights or step.settings.precision == "fp16":
            plain(*batch, 0)  # makes the state of the second optimiser, and the loss scale
        trace, following = StepTrace(plain), Following(trained)
        with trace, saved_tensors_hooks(following.pack, lambda holder: holder.tensor):
            plain(*batch, 1, trace.mark)
    trained_bytes, kept_bytes = (4 * sum(p.numel() for p in ps) for ps in (trained, kept))
    optimizers = [o for o in (plain._optimizer, plain._auxiliary_optimizer) if o is not None]
    state = [v for o in optimizers for s in o.state.values() for v in s.values() if v is not None]
    return Count(
        trace.operations(),
        trace.terms(step.method.weights),
        trace.synchronisations(),
        trained_bytes
        + kept_bytes
        + 4 * sum(v.numel() for v in state)
        + max(following.peak, trained_bytes),
    )


def without_terms(method: Method) -> Method:
    """Return a method with the same taps of the student, none of which a gradient reaches."""
    taps = {"taps": method.student_taps(), "teacher_taps": ()}
    return type("Idle", (Alone,), taps)()


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in NAMES), *((name, "fp16") for name in ("dkd", "maskd"))],
)
def test_shared_phases_are_those_of_the_whole_step(name, precision):
    """Also where a step takes over all that it shares, and where only its student's taps are the
    same but its gradients reach others."""
    mode, step = fake_tensors(), real_step(name, precision=precision)
    whole = count_whole_step(step, mode)
    count_step(Parts(step.student, None, without_terms(step.method), step.settings), mode)
    assert count_step(step, mode) == whole
    assert count_step(step, mode) == whole


class Recomputing(TinyNet):
    """A network whose body is wide, and computes its activations again in the backward."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(6, 600, 1), nn.Conv2d(600, 12, 1)

    def forward(self, images, taps):
        c4 = self.stem((images.float() - 128) / 64)
        wide = lambda x: self.narrow(self.widen(x).relu()).relu()  # noqa: E731
        head = self.dropout(checkpoint(wide, c4, use_reentrant=True))
        made = {"c4": c4, "head": head, "logits": self.classifier(head), "aux": self.auxiliary(c4)}
        return Taps(**{tap: made[tap] for tap in taps})


def test_memory_of_what_is_computed_again_in_the_backward():
    step, mode = tiny_step(Mimic), fake_tensors()
    step.student = Recomputing()
    whole = count_whole_step(step, mode)
    assert count_step(step, mode) == whole
    assert count_step(step, mode) == whole
    assert whole.least_memory_bytes > 4 * 600 * 4 * 5 * 4  # the wide map


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"step.channels_last": True},
        {"step.compile": "default"},
        {"step.fold_teacher": True},
        {"step.precision": "bf16"},
        {"step.aux_weight": 0.0},
        {"teacher": "pspnet-mobilenetv2_050"},
        {"scenario": {"new": ["car", "person"]}},
    ],
    ids=str,
)
def test_networks_without_values_are_counted_like_real_ones(changes, monkeypatch):
    without_values = lambda counters, name: counters[0].count(name)  # noqa: E731
    monkeypatch.setattr(count_study, "_count", without_values)
    study = ResolvedStudy(small_study(methods=["kd", "at"], **changes))
    factory, mode = study.factory, fake_tensors()
    teacher = factory.frozen(factory.placed_teacher())
    for name, found in count_study.counts(study, ["none", "kd", "at"], Progress(None), "cpu"):
        assert found == count_step(factory.step(name, teacher), mode), name


def test_a_method_that_fails_leaves_the_others_counted(tmp_path):
    (tmp_path / "mine.py").write_text(
        MY_METHOD + "\n    def build(self, student, teacher):\n        raise ValueError('no')\n"
    )
    study = ResolvedStudy(small_study(methods=[f"{tmp_path}/mine.py:MyKD"]))
    found = dict(count_study.counts(study, ["mykd", "kd"], Progress(None), "cpu"))
    assert "ValueError: no" in str(found["mykd"])
    assert found["kd"].flop.teacher > 0


def test_a_users_constants_outlive_the_counting(tmp_path):
    """What a method keeps when it is built for counting, it has when it is built for training."""
    (tmp_path / "mine.py").write_text(
        "import functools, torch\n"
        "@functools.cache\n"
        "def ones():\n"
        "    return torch.ones(2)\n"
        f"{MY_METHOD}\n"
        "    def build(self, student, teacher):\n"
        "        self.scale = float(ones()[0])\n"
    )
    study = ResolvedStudy(small_study(methods=[f"{tmp_path}/mine.py:MyKD"]))
    for _ in range(2):
        found = dict(count_study.counts(study, ["mykd"], Progress(None), "cpu"))
        assert isinstance(found["mykd"], Count), found["mykd"]
        assert study.factory.method("mykd").scale == 1


# Recipes


def operators_on_fakes():
    """Yield calls of many kinds: views, in place, into given memory, several results, new memory
    of another layout."""
    draw = lambda *shape, **kind: torch.empty(*shape, **kind)  # noqa: E731
    last = draw(2, 6, 5, 4).to(memory_format=torch.channels_last)
    square, labels = draw(4, 4), torch.zeros(2, 5, 4, dtype=torch.int64)
    yield "view", lambda: square.view(2, 8)
    yield "view of a view", lambda: square[1:].t()[2:]
    yield "other rows", lambda: square[2:].t()[1:]
    yield "dtype", lambda: square.view(torch.int16)
    yield "complex", lambda: torch.view_as_real(draw(3, dtype=torch.complex64))
    yield "split", lambda: square.split([1, 3])
    yield "unbind", lambda: last.unbind(1)
    yield "strided", lambda: square.as_strided((2, 2), (4, 1), 3)
    yield "in place", lambda: square.mul_(2).add_(square)
    yield "same twice", lambda: square.addcmul_(draw(4, 4), draw(4, 4))
    yield "into", lambda: torch.addmm(square, square, draw(4, 4), out=draw(4, 4))
    yield "into a part", lambda: torch.mul(square[:2], square[2:], out=square[:2])
    yield "into itself", lambda: torch.mul(square, draw(4, 4), out=square)
    yield "not into itself", lambda: torch.mul(square, draw(4, 4), out=draw(4, 4))
    yield "convolution", lambda: torch.conv2d(last, draw(3, 6, 3, 3), draw(3), padding=1)
    yield (
        "norm",
        lambda: torch.batch_norm(last, draw(6), draw(6), draw(6), draw(6), True, 0.1, 1e-5, False),
    )
    yield "pool", lambda: torch.nn.functional.max_pool2d(last, 2, return_indices=True)
    yield "resize", lambda: torch.nn.functional.interpolate(last, (10, 9), mode="bilinear")
    yield "loss", lambda: torch.nn.functional.cross_entropy(last, labels)
    yield "gather", lambda: square[torch.zeros(3, dtype=torch.int64)]
    yield "sum", lambda: (square.sum(), square.sum(0, keepdim=True), last.mean((2, 3)))
    yield "types", lambda: (square * 2, square > 2, square.to(torch.float64), square // 2)
    yield "new", lambda: (torch.zeros_like(last), torch.arange(5), torch.rand(2, 3))
    yield "transposed in place", lambda: draw(3, 5).t_()
    yield "resized", lambda: draw(3, 5).resize_(7)
    yield "set", lambda: draw(4, 4).set_(square)
    yield "detached", lambda: last.detach()
    yield "constant", lambda: torch.tensor([1.0, 2.0]) + square[:, :2]


def described(value, known):
    """Everything that can be seen of a result: layouts, and whose memory it is."""
    if isinstance(value, list | tuple):
        return [described(item, known) for item in value]
    storage = value.untyped_storage()
    place = known.setdefault(storage._cdata, len(known))
    known[id(storage)] = storage  # alive, so that its address is its own
    layout = value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.device
    return layout, place, storage.nbytes(), value.requires_grad


def test_recipes_make_what_torchs_fake_kernels_make():
    """On every call: the first is torch's own, later ones are made."""
    kernels = FakeTensorMode(allow_non_fake_inputs=True)
    kernels.cache_enabled = False
    results = []
    for mode in (kernels, fake_tensors()):
        with mode:
            calls, known = list(operators_on_fakes()), {}
            results.append([(n, described(f(), known)) for _ in range(3) for n, f in calls])
    for (name, expected), (_, found) in zip(*results, strict=True):
        assert found == expected, name


def test_known_calls_run_no_fake_kernel(monkeypatch):
    """But those that say more than shapes, or keep a value."""
    mode, ran = fake_tensors(), []
    kernel = type(mode).dispatch
    monkeypatch.setattr(type(mode), "dispatch", lambda *a, **k: ran.append(a[1]) or kernel(*a, **k))
    with mode:
        calls = dict(operators_on_fakes())
        needed = {name: (call(), ran.clear(), call(), len(ran))[-1] for name, call in calls.items()}
    assert {name for name, kernels in needed.items() if kernels} == {
        "dtype", "complex", "strided", "in place", "into itself", "transposed in place", "resized",
        "set", "constant",
    }  # fmt: skip


class Reads(Method):
    """Needs values; ``how`` says which."""

    taps = ("logits",)
    weights = {"a": 1.0}
    how = staticmethod(lambda logits: logits)

    def forward(self, student, teacher, labels):
        return {"a": self.how(student.logits).mean()}


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        ("aten._local_scalar_dense", lambda logits: logits * logits.sum().item()),
        ("aten._local_scalar_dense", lambda logits: logits if logits.sum() > 0 else -logits),
        ("aten.nonzero", lambda logits: logits.gt(0).nonzero() * logits.sum()),
        ("aten.index", lambda logits: logits[logits > 0]),
        ("aten.masked_select", lambda logits: logits.masked_select(logits > 0)),
        ("numpy", lambda logits: logits * float(logits.detach().numpy().sum())),
    ],
)
def test_what_needs_values_is_no_work_for_fakes(asked, how, monkeypatch):
    monkeypatch.setattr(Reads, "how", staticmethod(how))
    with pytest.raises(Uncountable) as caught:
        count_step(tiny_step(Reads), fake_tensors())
    line = how.__code__.co_firstlineno
    message = str(caught.value)
    assert "method 'reads'" in message
    assert asked in message
    assert f"test_count.py:{line} in <lambda>" in message
    assert "counted when it runs" in message
    assert "\n" not in message
    assert Reads.forward(tiny_step(Reads).method, Taps(logits=torch.ones(1, 3, 2, 2)), None, None)


@pytest.mark.parametrize("how", [lambda logits: logits @ logits[:, :1], lambda logits: logits.oops])
def test_a_mistake_in_a_method_is_shown_as_it_is(how, monkeypatch):
    monkeypatch.setattr(Reads, "how", staticmethod(how))
    with pytest.raises((RuntimeError, AttributeError)):
        count_step(tiny_step(Reads), fake_tensors())


def test_step_and_fvcore_agree_on_the_forward():
    """Two counters that share no code: fvcore's convolution multiply-adds, doubled, are torch's."""
    step = tiny_step(Alone)
    found = modules_flop(step.student, 4, (16, 20), taps=("logits", "aux"))
    assert found["total"] == count_step(tiny_step(Alone), fake_tensors()).flop.student


def test_modules_by_hand():
    step = tiny_step(Alone, dropout=0.5)
    before = copy.deepcopy(step.student.state_dict())
    step.student.stem.eval()
    modes = [module.training for module in step.student.modules()]
    found = modules_flop(step.student, 4, (16, 20), taps=("logits", "aux"))
    layers = {name: 2 * flop for name, flop in tiny_forward(6, 4 * 4 * 5).items()}
    assert found == {**layers, "stem.0": layers["stem"], "total": sum(layers.values())}
    assert "auxiliary" not in modules_flop(step.student, 4, (16, 20))
    assert [module.training for module in step.student.modules()] == modes
    torch.testing.assert_close(before, step.student.state_dict(), rtol=0, atol=0)
