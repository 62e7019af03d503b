"""What a trace sees of a step, against numbers worked out by hand. 1 multiply-add = 2 FLOP."""

import inspect
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import Alone, Mimic, tiny_batch, tiny_step
from flop_oracle import torchs_counter
from method_inputs import real_batch, real_step
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kdprof.discovery import builtin_methods
from kdprof.measure import trace as tracing
from kdprof.measure.counting.count import count_step, fake_tensors
from kdprof.measure.counting.flop_formulas import ELEMENTWISE
from kdprof.measure.counting.operators import _classified
from kdprof.measure.trace import WHOLE, StepTrace
from kdprof.method import Method

FLOAT = 4
METHODS = sorted(builtin_methods())


def seen(work, **settings) -> dict:
    """The operations of a callable, by name without ``aten.``."""
    with StepTrace(work, **settings) as trace:
        work()
    return {o.name.removeprefix("aten."): o for o in trace.operations()}


def cost(operation) -> tuple:
    return (
        operation.matrix_flop,
        operation.other_flop,
        operation.bytes_read,
        operation.bytes_written,
    )


def traced(method_cls, **settings):
    step, batch = tiny_step(method_cls), tiny_batch()
    with StepTrace(step, **settings) as trace:
        step(*batch, 0, trace.mark)
    return step, trace


@pytest.mark.parametrize(
    ("name", "work", "expected"),
    [
        ("add", lambda: X + 1, (0, 60, 240, 240)),
        ("add", lambda: X + X[0], (0, 60, 240 + 40, 240)),
        ("mm", lambda: X @ X.T, (2 * 6 * 10 * 6, 0, 480, 36 * FLOAT)),
        ("mv", lambda: X.mv(X[0]), (120, 0, 240 + 40, 6 * FLOAT)),
        ("sum", lambda: X.sum(), (0, 60, 240, FLOAT)),
        ("sum", lambda: X[0].expand(7, 10).sum(), (0, 70, 40, FLOAT)),
        ("sum", lambda: X[0].unfold(0, 4, 1).sum(), (0, 28, 40, FLOAT)),
        ("sum", lambda: X[:, ::2].sum(), (0, 30, 120, FLOAT)),
        ("mean", lambda: X.mean(0), (0, 60, 240, 40)),
        ("_softmax", lambda: X.softmax(1), (0, 300, 240, 240)),
        ("add_", lambda: X.clone().add_(1), (0, 60, 240, 240)),
        ("clone", lambda: X.clone(), (0, 0, 240, 240)),
        ("copy_", lambda: torch.empty(6, 10).copy_(X), (0, 0, 240, 240)),
        ("fill_", lambda: torch.empty(6, 10).fill_(1), (0, 0, 0, 240)),
        ("zeros_like", lambda: torch.zeros_like(X), (0, 0, 0, 240)),
        ("bernoulli_", lambda: torch.empty(6, 10).bernoulli_(0.5), (0, 60, 0, 240)),
        ("cat", lambda: torch.cat([X, X]), (0, 0, 480, 480)),
        ("_to_copy", lambda: X.half(), (0, 0, 240, 120)),
        ("mul", lambda: torch.mul(X, 2, out=torch.empty(6, 10)), (0, 60, 240, 240)),
        ("index_select", lambda: X.index_select(0, WHICH), (0, 0, 80 + 16, 80)),
        ("index_add_", lambda: X.clone().index_add_(0, WHICH, X[:2]), (0, 20, 80 + 80 + 16, 80)),
        ("upsample_bilinear2d", lambda: resized(2), (0, 7 * 240, 240, 960)),
        ("max_pool2d_with_indices", lambda: F.max_pool2d(PICTURE, 2), (0, 60, 240, 60 + 120)),
        ("avg_pool2d", lambda: F.avg_pool2d(PICTURE, 2), (0, 60, 240, 60)),
        ("_foreach_mul_", lambda: torch._foreach_mul_([X, PICTURE], 1.0), (0, 120, 480, 480)),
    ],
)  # fmt: skip
def test_one_operator_by_hand(name, work, expected):
    assert cost(seen(work)[name]) == expected


X = torch.ones(6, 10)
WHICH = torch.tensor([4, 2])
PICTURE = torch.ones(1, 1, 6, 10)


def resized(scale):
    return F.interpolate(PICTURE, scale_factor=scale, mode="bilinear")


def test_batch_norm_costs_less_in_evaluation_mode():
    picture, norm = torch.ones(2, 3, 4, 4), nn.BatchNorm2d(3, affine=False)
    assert seen(lambda: norm.train()(picture))["native_batch_norm"].other_flop == 6 * 96
    assert seen(lambda: norm.eval()(picture))["native_batch_norm"].other_flop == 2 * 96


def test_views_allocations_and_detaching_are_no_operations():
    def work():
        x = X.view(3, 20).T[1:].unsqueeze(0).expand(2, -1, -1).detach()
        torch.empty_like(x), x.squeeze_(), x.unbind(), x.chunk(2), torch.empty(3), X.split(2)

    assert seen(work) == {}


def test_copies_behind_a_view_are_seen():
    assert set(seen(lambda: X.T.reshape(-1))) == {"clone"}


def test_fused_sgd_reads_parameter_gradient_and_momentum_and_writes_back_what_changes():
    """The gradient is written only where a loss scale is divided out of it."""
    parameter = nn.Parameter(torch.ones(6, 10))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    parameter.grad = torch.ones(6, 10)
    optimizer.step()
    found = seen(optimizer.step)["_fused_sgd_"]
    assert cost(found) == (0, 6 * 60, 3 * 240, 2 * 240)
    assert found.kind == "optimizer"


def test_an_optimizer_of_small_operators_is_all_optimizer():
    parameter = nn.Parameter(torch.ones(6, 10))
    optimizer = torch.optim.Adam([parameter], 0.1)
    parameter.grad = torch.ones(6, 10)
    with StepTrace(optimizer.step) as trace:
        optimizer.step()
        parameter.detach().mul_(2)
    kinds = {(o.name, o.kind) for o in trace.operations()}
    assert ("aten.mul_", "elementwise") in kinds
    assert {kind for name, kind in kinds if name != "aten.mul_"} == {"optimizer"}
    assert trace.synchronisations() == []  # its step count lies on the host by design


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("matrix", lambda: F.conv2d(PICTURE, PICTURE)),
        ("matrix", lambda: torch.bmm(PICTURE[0], PICTURE[0].mT)),
        ("elementwise", lambda: X.relu()),
        ("elementwise", lambda: torch.where(X > 0, X, X)),
        ("elementwise", lambda: torch.maximum(X, X)),
        ("elementwise", lambda: X.sigmoid()),
        ("reduction", lambda: X.amax(1)),
        ("reduction", lambda: X.logsumexp(1)),
        ("reduction", lambda: X.std()),
        ("reduction", lambda: X.norm()),
        ("reduction", lambda: F.mse_loss(X, X)),
        ("softmax", lambda: X.log_softmax(1)),
        ("normalisation", lambda: F.layer_norm(X, [10])),
        ("normalisation", lambda: F.group_norm(PICTURE, 1)),
        ("resize", lambda: F.interpolate(PICTURE, scale_factor=2)),
        ("pooling", lambda: F.adaptive_avg_pool2d(PICTURE, 2)),
        ("gather", lambda: X[WHICH]),
        ("gather", lambda: X.gather(0, torch.zeros(1, 10, dtype=torch.long))),
        ("gather", lambda: F.nll_loss(X, torch.zeros(6, dtype=torch.long))),
        ("copy", lambda: torch.stack([X, X])),
        ("copy", lambda: F.pad(X, (1, 1))),
        ("uncounted", lambda: torch.linalg.svd(X)),
        ("uncounted", lambda: torch.fft.rfft(X)),
    ],
)
def test_kinds(kind, work):
    found = seen(work)
    assert kind in {o.kind for o in found.values()}
    assert all((o.other_flop is None) == (o.kind == "uncounted") for o in found.values())
    assert all(o.bytes_written > 0 for o in found.values() if o.name != "aten._linalg_check_errors")


class Untagged:
    """An operator of an older torch, which does not say that it is elementwise."""

    tags = ()


@pytest.mark.parametrize("name", ["leaky_relu", "leaky_relu_", "elu", "hardtanh_", "selu"])
def test_kinds_do_not_depend_on_the_tags_of_a_version(name):
    assert _classified(Untagged(), name) == ("elementwise", ELEMENTWISE)


def test_operators_of_inference_mode_are_watched_inside():
    with torch.inference_mode():
        found = seen(lambda: F.linear(X, X))
    assert found["mm"].matrix_flop == 2 * 6 * 10 * 6


def test_a_step_that_is_a_plain_function_is_one_phase():
    """Forward, then both gradients of 3 x 3 convolution 2 -> 4 on 8 x 8, without padding."""
    conv, images = nn.Conv2d(2, 4, 3, bias=False), torch.ones(1, 2, 8, 8, requires_grad=True)

    def step():
        conv(images).sum().backward()

    with StepTrace(step) as trace:
        step()
    forward = 2 * 36 * 4 * 2 * 9
    assert trace.matrix_flop() == {WHOLE: 3 * forward}
    x, w, y = 128 * FLOAT, 72 * FLOAT, 144 * FLOAT
    found = {o.name: o for o in trace.operations()}
    assert cost(found["aten.convolution"]) == (forward, 0, x + w, y)
    # The gradient of a sum is one number, expanded: it is stored once.
    assert cost(found["aten.convolution_backward"]) == (2 * forward, 0, FLOAT + x + w, x + w)
    assert trace.terms({}) == {}


def test_phases_add_up():
    _, trace = traced(Mimic)
    operations = trace.operations()
    assert list(trace.matrix_flop()) == [
        "data", "teacher_forward", "student_forward", "task_loss", "objective",
        "objective_backward", "student_backward", "optimizer",
    ]  # fmt: skip
    assert sum(o.matrix_flop for o in operations) == sum(trace.matrix_flop().values()) > 0
    assert {o.kind for o in operations if o.phase == "optimizer"} == {"optimizer"}
    assert all(o.seconds is None for o in operations)


def test_seconds_are_those_of_the_step():
    step, batch = tiny_step(Mimic), tiny_batch()
    step(*batch, 0)
    began = time.perf_counter()
    with StepTrace(step, timed=True) as trace:
        step(*batch, 1, trace.mark)
    whole = time.perf_counter() - began
    operations, terms = trace.operations(), trace.terms(step.method.weights)
    assert all(o.seconds > 0 for o in operations)
    assert sum(o.seconds for o in operations) < whole
    shared = sum(t.forward_s + t.backward_s for t in terms.values())
    parts = [o.seconds for o in operations if o.phase.startswith("objective")]
    assert 0.5 * sum(parts) < shared <= sum(parts) * (1 + 1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_real_steps_fake_steps_and_torchs_counter_agree(name):
    """Every operator of every built-in method: calls, FLOP and bytes, by phase."""
    step, batch = real_step(name), real_batch()
    counter = torchs_counter()
    with counter:
        step(*batch, 0)
    with StepTrace(step) as trace:
        step(*batch, 1, trace.mark)
    counted = count_step(real_step(name), fake_tensors())
    assert counter.get_total_flops() == sum(trace.matrix_flop().values()) == counted.flop.total
    found = {(o.phase, o.name, o.kind): cost(o) for o in trace.operations()}
    assert {(o.phase, o.name, o.kind): cost(o) for o in counted.operations} == found
    assert trace.terms(step.method.weights) == counted.terms
    assert "uncounted" not in {kind for _, _, kind in found}
    assert trace.synchronisations() == counted.synchronisations == []


@pytest.mark.parametrize("name", ["cwd", "ifvd"])
def test_half_precision_fakes_differ_by_saved_statistics_only(name):
    """torch's fakes keep batch norm's saved statistics in the half precision of the map."""
    step, batch = real_step(name, precision="bf16"), real_batch()
    step(*batch, 0)
    with StepTrace(step) as trace:
        step(*batch, 1, trace.mark)
    counted = count_step(real_step(name, precision="bf16"), fake_tensors()).operations
    fakes = {(o.phase, o.name, o.kind): cost(o) for o in counted}
    for operation in trace.operations():
        fake = fakes.pop((operation.phase, operation.name, operation.kind))
        close = 0.05 if operation.kind == "normalisation" else 0
        assert fake == pytest.approx(cost(operation), rel=close)
    assert not fakes


class Two(Method):
    """Two terms on one trunk; ``b`` is three times as wide behind it and has no weight."""

    taps = ("logits",)
    weights = {"a": 2.0, "b": 0.0}

    def build(self, student, teacher):
        self.trunk = nn.Conv2d(3, 4, 1, bias=False)
        self.heads = nn.ModuleDict({n: nn.Conv2d(4, w, 1, bias=False) for n, w in SIZES.items()})

    def forward(self, student, teacher, labels):
        shared = self.trunk(student.logits)
        return {name: self.heads[name](shared).square().mean() for name in SIZES}


SIZES = {"a": 2, "b": 6}
POSITIONS = 4 * 4 * 5
"""Batch times the logits' grid of a tiny step."""


def test_terms_share_what_both_need_and_own_the_rest():
    step, trace = traced(Two)
    found = trace.terms(step.method.weights)
    trunk = 2 * POSITIONS * 3 * 4
    for name, width in SIZES.items():
        own = 2 * POSITIONS * 4 * width
        assert found[name].weight == Two.weights[name]
        assert found[name].forward_flop == trunk / 2 + own
        assert found[name].backward_flop == 2 * (trunk / 2 + own)
    total = trace.matrix_flop()
    assert sum(t.forward_flop for t in found.values()) == total["objective"]
    assert sum(t.backward_flop for t in found.values()) == total["objective_backward"]


class Wide(Method):
    """Nothing is shared, and ``b`` has exactly three times the elements of ``a``."""

    taps = ("logits",)
    weights = {"a": 1.0, "b": 1.0}

    def forward(self, student, teacher, labels):
        small = student.logits.detach().clone().requires_grad_()
        large = student.logits.detach().repeat(1, 3, 1, 1).requires_grad_()
        return {"a": small.exp().mul(2).relu().sum(), "b": large.exp().mul(2).relu().sum()}


def test_bytes_of_a_term_grow_with_its_elements():
    """Forward: clone 2, or repeat 1 + 3; exp 2, mul 2, relu 2, sum 1 and a number. Backward: relu 2
    and the sum's expanded gradient, which is a number; mul 2; exp 3."""
    step, trace = traced(Wide)
    found = trace.terms(step.method.weights)
    elements, numbers = POSITIONS * 3, 2
    rest = 2 + 2 + 2 + 1 + 2 + 2 + 3
    assert found["a"].bytes_moved == FLOAT * ((2 + rest) * elements + numbers)
    assert found["b"].bytes_moved == FLOAT * ((1 + 3 + 3 * rest) * elements + numbers)


class Twins(Method):
    """The same work twice, through temporaries that are freed: addresses are used again."""

    taps = ("logits",)
    weights = {"a": 1.0, "b": 1.0}

    def forward(self, student, teacher, labels):
        return {name: self.term(student.logits) for name in self.weights}

    def term(self, logits):
        with torch.no_grad():
            scale = logits
            for _ in range(5):
                scale = torch.empty_like(scale).copy_(scale * 2)
        return (logits * scale).add_(1).transpose(0, 1).sum()


def test_reused_addresses_mix_no_terms():
    step, trace = traced(Twins)
    found = trace.terms(step.method.weights)
    # Adding the two gradients up belongs to the backward that comes second.
    added = 3 * POSITIONS * 3 * FLOAT
    assert found["a"].bytes_moved - added == found["b"].bytes_moved
    assert [c for c in trace._calls["objective"] if len(c.terms) != 1] == []


class Recomputed(Method):
    """A term whose convolution runs again in the backward, for the exponential behind it."""

    taps = ("logits",)
    weights = {"a": 1.0, "b": 1.0}
    reentrant = True

    def build(self, student, teacher):
        self.conv = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, student, teacher, labels):
        made = checkpoint(self.twice, student.logits, use_reentrant=self.reentrant)
        return {"a": made.mean(), "b": student.logits.square().mean()}

    def twice(self, logits):
        return self.conv(logits).exp()


class RecomputedByHooks(Recomputed):
    reentrant = False


@pytest.mark.parametrize("method", [Recomputed, RecomputedByHooks])
def test_recomputing_belongs_to_the_term_that_asks_for_it(method):
    step, trace = traced(method)
    found = trace.terms(step.method.weights)
    forward = 2 * POSITIONS * 3 * 4
    assert (found["a"].forward_flop, found["a"].backward_flop) == (forward, 3 * forward)
    assert (found["b"].forward_flop, found["b"].backward_flop) == (0, 0)


class Slope(torch.autograd.Function):
    """x^T x summed; forward computes the gradient too, which no operator of the value needs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward((2 * x) @ torch.ones(x.shape[1], x.shape[1]))
        return (x.T @ x).sum()

    @staticmethod
    def backward(ctx, slope):
        (gradient,) = ctx.saved_tensors
        return slope * gradient


class SlopeInForward(Method):
    """Term ``a`` is a :class:`Slope`; ``b`` is another one, of three times the columns."""

    taps = ("logits",)
    weights = {"a": 1.0, "b": 1.0}

    def forward(self, student, teacher, labels):
        rows = student.logits.permute(0, 2, 3, 1).flatten(0, 2)
        return {"a": self.term(rows), "b": self.term(rows.repeat(1, 3))}

    def term(self, rows):
        return Slope.apply(rows)


class SlopeCheckpointed(SlopeInForward):
    def term(self, rows):
        return checkpoint(Slope.apply, rows, use_reentrant=False)


class SlopeBehindHooks(SlopeInForward):
    """Saved tensors are packed into something that is no tensor, and unpacked once, in backward."""

    def build(self, student, teacher):
        self.unpacked = 0

    def term(self, rows):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: [t], self.unpack):
            return Slope.apply(rows)

    def unpack(self, packed):
        assert torch._C._current_graph_task_id() != -1
        self.unpacked += 1
        return packed[0]


@pytest.mark.parametrize("method", [SlopeInForward, SlopeCheckpointed, SlopeBehindHooks])
def test_a_gradient_that_a_function_makes_in_forward_belongs_to_its_term(method):
    """Two products of (P x C) and (C x C) for each term: the value's and the gradient's."""
    step, trace = traced(method)
    found = trace.terms(step.method.weights)
    again = method is SlopeCheckpointed
    for name, columns in (("a", 3), ("b", 9)):
        work = 2 * 2 * POSITIONS * columns**2
        assert found[name].forward_flop == work
        assert found[name].backward_flop == again * work
    assert [c.name for c in trace._calls["objective"] if len(c.terms) != 1] == []
    assert getattr(step.method, "unpacked", 2) == 2
    assert count_step(tiny_step(method), fake_tensors()).terms == found


def test_the_trace_leaves_torchs_functions_as_they_were():
    before = torch.autograd.function.FunctionCtx.save_for_backward
    traced(SlopeInForward)
    assert torch.autograd.function.FunctionCtx.save_for_backward is before


class Wasteful(Method):
    """Computes what no term needs, and a term without gradient."""

    taps = ("logits",)
    weights = {"a": 1.0, "constant": 1.0}

    def forward(self, student, teacher, labels):
        logits = student.logits
        logits.flatten(1) @ logits.flatten(1).mT
        return {"a": logits.square().mean(), "constant": logits.detach().exp().mean()}


def test_what_no_term_needs_is_nobodys():
    step, trace = traced(Wasteful, timed=True)
    found = trace.terms(step.method.weights)
    assert trace.matrix_flop()["objective"] > 0
    assert all(term.forward_flop == 0 for term in found.values())
    assert found["constant"].backward_s == 0 < found["constant"].forward_s
    spent = [o.seconds for o in trace.operations() if o.phase == "objective"]
    assert sum(term.forward_s for term in found.values()) < sum(spent)
    assert trace.note is None


def test_without_torchs_private_function_the_backward_is_shared_like_the_forward(monkeypatch):
    monkeypatch.setattr(tracing, "_current_node", None)
    step, trace = traced(Two)
    found = trace.terms(step.method.weights)
    ratio = found["b"].forward_flop / found["a"].forward_flop
    assert found["b"].backward_flop == pytest.approx(ratio * found["a"].backward_flop)
    total = sum(term.backward_flop for term in found.values())
    assert total == pytest.approx(trace.matrix_flop()["objective_backward"])
    assert "divided like" in trace.note


def test_no_terms_without_a_method_that_returns_any():
    step, trace = traced(Alone)
    assert trace.terms(step.method.weights) == {}


class Waiting(Method):
    """Everything that makes a device's host wait, and what only looks like it."""

    taps = ("logits",)
    weights = {"a": 1.0}

    def forward(self, student, teacher, labels):
        flat = student.logits.flatten()
        flat.sum().item()  # waits: aten._local_scalar_dense
        if flat.mean() > 1e9:  # waits: aten._local_scalar_dense
            raise AssertionError
        mask = flat.detach() > 0
        mask.nonzero()  # waits: aten.nonzero
        flat[mask]  # waits: aten.index
        flat.masked_select(mask)  # waits: aten.masked_select
        mask.unique()  # waits: aten._unique2
        torch.where(mask)  # waits: aten.nonzero
        flat[:3].repeat_interleave(torch.tensor([1, 2, 3]))  # waits: aten.repeat_interleave
        flat.clone()[mask] = flat[mask]  # waits: aten.index, aten.index_put_
        flat[:3].repeat_interleave(torch.tensor([1, 2, 3]), output_size=6)
        flat.detach().clone()[mask] = 0.0
        flat[mask.long()].masked_fill(mask, 0.0)
        return {"a": flat.sum()}


def lines_that_wait() -> dict[tuple[str, int], int]:
    lines, first = inspect.getsourcelines(Waiting.forward)
    found = {}
    for number, line in enumerate(lines, first):
        for operator in line.partition("# waits: ")[2].split(","):
            if operator.strip():
                found[operator.strip(), number] = 1
    return found


def test_waits_are_found_with_their_lines():
    _, trace = traced(Waiting)
    found = {}
    for wait in trace.synchronisations():
        assert wait.phase == "objective"
        file, _, rest = wait.where.partition(":")
        line, _, function = rest.partition(" in ")
        assert (file, function) == ("test_trace.py", "forward")
        found[wait.operator, int(line)] = wait.calls
    assert found == lines_that_wait()


class Scaled(torch.autograd.Function):
    """Waits in its backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


class WaitingBackward(Method):
    taps = ("logits",)
    weights = {"a": 1.0}

    def forward(self, student, teacher, labels):
        return {"a": Scaled.apply(student.logits).mean()}


def test_waits_of_a_backward_are_found():
    (wait,) = traced(WaitingBackward)[1].synchronisations()
    assert (wait.operator, wait.phase) == ("aten._local_scalar_dense", "objective_backward")
    assert wait.where.startswith("test_trace.py:")
    assert wait.where.endswith(" in backward")


def test_blocking_copies_between_host_and_device_wait():
    """Fakes have a device without there being one."""
    with fake_tensors():
        here = torch.zeros(3)
        with StepTrace(print, device=torch.device("cuda")) as trace:
            there = here.to("cuda")
            there = here.to("cuda", non_blocking=True)
            here = there.cpu()
            here.copy_(there)
            there.copy_(there * 2)
            here.sum() + here.half()
    assert [w.operator for w in trace.synchronisations()] == [
        "aten._to_copy", "aten._to_copy", "aten.copy_",
    ]  # fmt: skip


def test_mobilenet_backward_is_twice_its_forward():
    """torch's own counter, which forgets the groups of a depthwise weight gradient, says 20.4."""
    with fake_tensors():
        network = timm.create_model("mobilenetv2_100", pretrained=False)
        images = torch.zeros(1, 3, 224, 224)
        with StepTrace(network) as forward:
            network(images)
        with StepTrace(network) as step, FlopCounterMode(display=False) as uncorrected:
            network(images).sum().backward()
    flop = forward.matrix_flop()[WHOLE]
    assert step.matrix_flop()[WHOLE] / flop == pytest.approx(2.96, abs=0.01)
    assert uncorrected.get_total_flops() / flop == pytest.approx(20.4, abs=0.1)


def test_the_trace_leaves_the_step_as_it_was():
    watched, alone = tiny_step(Mimic), tiny_step(Mimic)
    for i in range(2):
        batch = tiny_batch(i)
        with StepTrace(watched, timed=True) as trace:
            terms = watched(*batch, i, trace.mark)
        torch.testing.assert_close(terms, alone(*batch, i), rtol=0, atol=0)
    assert not watched.method._forward_hooks
