import copy
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import Alone, tiny_batch, tiny_step
from small_study import small_study
from torch import nn

from kdprof import step as step_module
from kdprof.errors import KdprofError, UserError
from kdprof.method import Method
from kdprof.resolve import ResolvedStudy
from kdprof.resolve import study as resolved_study
from kdprof.schedule import decay_start, learning_rate_factor
from kdprof.step import PHASES, TrainStep, missing_compiler, step_seed, task_loss
from kdprof.study import StepSettings


def test_task_loss_by_hand():
    """Two pixels at label size: -log softmax, averaged over the valid one only."""
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])
    labels = torch.tensor([[[0, 255]]])
    assert task_loss(logits, labels).item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_task_loss_of_void_is_zero_with_zero_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = task_loss(logits, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("align_corners", [False, True])
def test_task_loss_against_torch(align_corners):
    logits, labels = torch.randn(2, 4, 5, 7), torch.randint(0, 4, (2, 19, 23))
    labels[0, :5] = 255
    resized = F.interpolate(logits, (19, 23), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(resized, labels, ignore_index=255)
    torch.testing.assert_close(task_loss(logits, labels, align_corners), expected)


def test_schedules_by_hand():
    poly = StepSettings(learning_rate=0.1, min_learning_rate=0.01, poly_power=0.5)
    assert learning_rate_factor(poly, 0, 100) == 1
    assert learning_rate_factor(poly, 75, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    cosine = StepSettings(learning_rate=0.1, min_learning_rate=0.0, schedule="cosine")
    assert learning_rate_factor(cosine, 50, 100) == pytest.approx(0.5)
    warm = StepSettings(learning_rate=0.1, min_learning_rate=0.0, warmup_iterations=4)
    assert [learning_rate_factor(warm, i, 14) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate_factor(warm, 4, 14) == 1
    assert learning_rate_factor(warm, 9, 14) == pytest.approx(0.5**0.9)
    # mmsegmentation's LinearLR from 0.1 in iteration 0 to 1 in iteration 3, then PolyLR.
    warm = warm.model_copy(update={"warmup_start": 0.1})
    found = [learning_rate_factor(warm, i, 14) for i in (0, 1, 2, 3, 4, 9)]
    assert found == pytest.approx([0.1, 0.4, 0.7, 1.0, 1.0, 0.5**0.9])
    assert learning_rate_factor(warm, 3.5, 14) == 1  # a run that follows its clock
    wsd = StepSettings(learning_rate=0.1, min_learning_rate=0.0, schedule="wsd", decay_fraction=0.4)
    assert decay_start(wsd, 20) == 12
    assert [learning_rate_factor(wsd, i, 20) for i in (0, 12, 14, 18)] == [
        1.0, 1.0, 0.5, pytest.approx(1 - 0.75**0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", ["poly", "cosine", "wsd"])
def test_a_schedule_falls_from_the_base_rate_to_its_floor_and_stays(schedule):
    found = StepSettings(learning_rate=0.1, min_learning_rate=0.01, schedule=schedule)
    rates = [learning_rate_factor(found, i / 4, 30) for i in range(160)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[120:] == [pytest.approx(0.1)] * 40


def test_cut_graph_gives_the_gradients_of_one_backward():
    """Oracle: the same losses summed and differentiated in one go."""
    step = tiny_step(momentum=0.0, weight_decay=0.0, dropout=0.0)
    student, method = copy.deepcopy(step.student), copy.deepcopy(step.method)
    images, labels = tiny_batch()
    taps = student(images, ["logits", "aux", "head"])
    teacher = step.teacher(images, ["logits", "head"])
    terms = method(taps, teacher, None)
    total = task_loss(taps.logits, labels.long()) + 0.4 * task_loss(taps.aux, labels.long())
    total = total + 2.0 * terms["logits"] + 0.5 * terms["head"]
    expected = torch.autograd.grad(total, [*student.parameters(), *method.parameters()])
    before = [p.detach().clone() for p in [*step.student.parameters(), *step.method.parameters()]]
    losses = step(images, labels, 0)
    after = [*step.student.parameters(), *step.method.parameters()]
    for gradient, old, new in zip(expected, before, after, strict=True):
        torch.testing.assert_close(old - 0.05 * gradient, new.detach())
    assert losses.keys() == {"task", "task_aux", "logits", "head"}
    assert losses["logits"].item() == pytest.approx(terms["logits"].item())


def test_phases_come_in_order_and_once():
    seen = []
    tiny_step()(*tiny_batch(), 0, seen.append)
    assert tuple(seen) == PHASES


def test_student_alone_runs_no_teacher():
    step = tiny_step(Alone)
    assert step.teacher is None
    assert step(*tiny_batch(), 0).keys() == {"task", "task_aux"}


def test_auxiliary_head_is_neither_run_nor_paid_at_weight_zero():
    step = tiny_step(Alone, aux_weight=0.0)
    assert step(*tiny_batch(), 0).keys() == {"task"}
    assert step.student.auxiliary.weight.grad is None


def test_teacher_never_changes():
    step = tiny_step()
    before = copy.deepcopy(step.teacher.state_dict())
    for i in range(3):
        step(*tiny_batch(i), i)
    after = step.teacher.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert step.teacher.runs == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss(precision):
    step = tiny_step(Alone, precision=precision, iterations=40)
    losses = [step(*tiny_batch(0), i)["task"].item() for i in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(math.isfinite, losses))


def test_overflow_in_the_first_step_leaves_the_momentum_clean():
    """A fresh fp16 loss scale overflows at once; that step must only be skipped."""
    step = tiny_step(precision="fp16", iterations=40)
    before = copy.deepcopy(step.student.state_dict())
    step._scaler._init_scale = 2.0**40
    step(*tiny_batch(), 0)
    torch.testing.assert_close(
        step.student.classifier.weight, before["classifier.weight"], rtol=0, atol=0
    )
    step.student.load_state_dict(before)
    for i in range(40):
        step(*tiny_batch(), i)
    assert all(p.abs().max() < 10 for p in step.student.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_training_is_the_same_training(precision):
    """Dropout, momentum, extras and loss scale all come back."""
    straight = tiny_step(precision=precision)
    for i in range(6):
        straight(*tiny_batch(i), i)
    first = tiny_step(precision=precision)
    for i in range(3):
        first(*tiny_batch(i), i)
    second = tiny_step(precision=precision, seed=0)
    nn.init.zeros_(second.student.body.weight)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i in range(3, 6):
        second(*tiny_batch(i), i)
    torch.testing.assert_close(
        straight.state_dict()["student"], second.state_dict()["student"], rtol=0, atol=0
    )
    torch.testing.assert_close(
        straight.state_dict()["method"], second.state_dict()["method"], rtol=0, atol=0
    )


def test_draws_depend_on_seed_and_iteration_only():
    assert step_seed(0, 1) == step_seed(0, 1)
    assert len({step_seed(s, i) for s in range(5) for i in range(50)}) == 250


class Unweighted(Alone):
    """Forgot a weight."""

    taps = ("logits",)
    weights = {"mse": 1.0}

    def forward(self, student, teacher, labels):
        return {"msee": student.logits.mean()}


def test_term_without_weight_is_named():
    with pytest.raises(KdprofError, match=r"without a weight.*'msee'; did you mean 'mse'"):
        tiny_step(Unweighted)(*tiny_batch(), 0)


class Adversary(Method):
    """A discriminator that tells student logits from teacher logits."""

    taps = ("logits", "labels")
    weights = {"adv": 0.1}
    auxiliary_weights = {"d": 0.5}
    auxiliary_decays = True

    def build(self, student, teacher):
        self.judge = nn.Conv2d(student.num_classes, 1, 1)

    def auxiliary(self):
        return self.judge

    def auxiliary_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=0.2)

    def forward(self, student, teacher, labels):
        assert labels.dtype == torch.int64
        weight, bias = self.judge.weight.detach(), self.judge.bias.detach()
        return {"adv": -F.conv2d(student.logits, weight, bias).mean()}

    def auxiliary_forward(self, student, teacher, labels):
        assert not student.logits.requires_grad
        return {"d": self.judge(student.logits).mean() - self.judge(teacher.logits).mean()}


def test_auxiliary_optimizer_takes_its_own_step():
    """By hand: d = w . (mean student - mean teacher), so w moves against that difference."""
    step = tiny_step(Adversary, min_learning_rate=0.0, dropout=0.0)
    images, labels = tiny_batch()
    student, teacher = copy.deepcopy(step.student), step.teacher
    before = step.method.judge.weight.detach().clone()
    gap = student(images, ["logits"]).logits.mean((0, 2, 3)) - teacher(
        images, ["logits"]
    ).logits.mean((0, 2, 3))
    losses = step(images, labels, 10)
    rate = 0.2 * learning_rate_factor(step.settings, 10, step.iterations)
    expected = before - rate * 0.5 * gap.view_as(before)
    torch.testing.assert_close(step.method.judge.weight, expected, rtol=1e-4, atol=1e-6)
    assert "d" in losses
    students = {id(p) for g in step._optimizer.param_groups for p in g["params"]}
    assert not students & {id(p) for p in step.method.judge.parameters()}


def test_adversary_state_comes_back():
    first, second = tiny_step(Adversary), tiny_step(Adversary)
    first(*tiny_batch(), 0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.method.judge.weight, second.method.judge.weight)


@pytest.mark.parametrize(("device", "asked"), [("cuda", ["why", "compile"]), ("cpu", ["compile"])])
def test_whether_triton_works_is_known_before_a_gpus_step_is_compiled(device, asked, monkeypatch):
    """torch.compile cannot trace how it is found out."""
    done = []
    monkeypatch.setattr(step_module, "why_no_triton", lambda: done.append("why"))
    monkeypatch.setattr(torch, "compile", lambda module, **options: done.append("compile"))
    settings = SimpleNamespace(compile="default")
    step = SimpleNamespace(settings=settings, device=torch.device(device))
    TrainStep._compiled(step, nn.Identity())
    assert done == asked


@pytest.mark.parametrize("reason", [None, "RuntimeError: Failed to find C compiler."])
def test_a_gpu_compiles_if_triton_works(reason, monkeypatch):
    """A C++ compiler, which a CPU needs, is not asked for; the GPU that is asked is the step's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(step_module, "why_no_triton", lambda: reason)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    device = torch.device("cuda", 1)
    words = f"Triton, which does not work here ({reason})" if reason else None
    assert (missing_compiler(device), asked) == (words, [device])


def test_a_cpu_compiles_with_a_compiler_of_cpp(monkeypatch):
    found = {"clang++"}
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    assert missing_compiler(torch.device("cpu")) is None
    found.clear()
    assert missing_compiler(torch.device("cpu")) == "a C++ compiler, such as g++"
    monkeypatch.setenv("CXX", "mine")
    found.add("mine")
    assert missing_compiler(torch.device("cpu")) is None


@pytest.mark.parametrize(("compiled", "refused"), [("none", False), ("teacher", True)])
def test_a_compiler_that_is_missing_is_refused_where_it_is_needed(compiled, refused, monkeypatch):
    why = "Triton, which does not work here (RuntimeError: Failed to find C compiler.)"
    monkeypatch.setattr(resolved_study, "missing_compiler", lambda device: why)
    study = small_study(step__compile=compiled)
    if not refused:
        ResolvedStudy(study)
        return
    with pytest.raises(UserError, match=r"step\.compile needs Triton, which does not") as e:
        ResolvedStudy(study)
    assert str(e.value).endswith("install it or use 'none'")
