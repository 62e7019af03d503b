"""What every built-in method must hold to, besides the method checks: in whole steps.

A new method is held to it as soon as its file is there."""

import ast
import copy
import importlib
import inspect

import pytest
import torch
from method_inputs import (
    DISTILLING,
    NAMES,
    cast,
    draw,
    finite_with_gradient,
    make,
    real_batch,
    real_step,
    weighted,
)

from kdprof.discovery import find_method, method_modules
from kdprof.errors import UserError
from kdprof.measure.counting.count import count_step, fake_tensors
from kdprof.measure.trace import StepTrace
from kdprof.method import Method, Taps
from kdprof.methods._common import GroupedMethod


@pytest.mark.parametrize("name", NAMES)
def test_description(name):
    cls = find_method(name).cls
    assert all((cls.name, cls.title, cls.paper, cls.family, cls.__dict__["__doc__"]))
    assert cls.family != Method.family
    assert name == "none" or cls.taps
    assert all(weight > 0 for weight in {**cls.weights, **cls.auxiliary_weights}.values())
    for recipe in cls.recipes:
        assert recipe.source
        assert recipe.miou is None or 20 < recipe.miou < 90


@pytest.mark.parametrize("name", DISTILLING)
def test_gradient_reaches_every_tap_and_extra(name):
    method = make(name)
    student, teacher, labels = draw(method)
    weighted(method, method(student, teacher, labels)).backward()
    assert all(value.grad.abs().max() > 0 for value in vars(student).values())
    assert all(value.grad is not None for value in method.extra_parameters())


@pytest.mark.parametrize("name", DISTILLING)
def test_huge_maps_are_finite(name):
    method = make(name)
    student, teacher, labels = draw(method, scale=1e4)
    terms = method(student, teacher, labels)
    finite_with_gradient(weighted(method, terms), *vars(student).values())


@pytest.mark.parametrize("name", DISTILLING)
def test_terms_of_half_precision_maps_are_float32(name):
    method = make(name)
    student, teacher, labels = draw(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(cast(student, torch.bfloat16), cast(teacher, torch.bfloat16), labels)
    assert {term.dtype for term in terms.values()} == {torch.float32}


def train(step, first, last):
    return [step(*real_batch(i), i) for i in range(first, last)]


def assert_same(a, b):
    """Compare nested dicts, lists and tensors bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def teacher_state(step):
    return {} if step.teacher is None else step.teacher.state_dict()


def everything(step):
    state = step.state_dict()
    return {**state["student"], **{f"method.{n}": v for n, v in state["method"].items()}}


@pytest.mark.parametrize("name", NAMES)
def test_takes_a_real_step(name):
    """Every term is there and finite, every weight moves; the method is given what it declares,
    the teacher is left as it was, and no operator waits for the device or is not counted."""
    step = real_step(name)
    method, given = step.method, []
    before, teacher = copy.deepcopy((method.state_dict(), teacher_state(step)))
    method.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    with StepTrace(step) as trace:
        losses = step(*real_batch(), 0, trace.mark)
    assert trace.synchronisations() == []
    assert not [o.name for o in trace.operations() if o.other_flop is None]

    task = {"task_aux"} if method.replaces_task_loss else {"task", "task_aux"}
    assert {*task, *method.weights, *method.auxiliary_weights} == losses.keys()
    assert all(value.isfinite() for value in losses.values())

    ((student_taps, teacher_taps, labels),) = given
    assert set(vars(student_taps)) == set(method.student_taps())
    assert set(vars(teacher_taps)) == set(method.read_of_teacher())
    assert (labels is not None) == ("labels" in method.taps)

    changed = {n for n, v in method.state_dict().items() if not torch.equal(v, before[n])}
    gated = ("query", "key", "value")  # behind a gate that starts at 0
    weights = [n for n, _ in method.named_parameters() if n.endswith("weight")]
    assert {n for n in weights if n.split(".")[-2] not in gated} <= changed
    assert_same(teacher_state(step), teacher)
    assert step.teacher is None or all(p.grad is None for p in step.teacher.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_stays_finite_in_half_precision(name, precision):
    step = real_step(name, precision=precision)
    for losses in train(step, 0, 2):
        assert all(value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in everything(step).values())


@pytest.mark.parametrize("name", NAMES)
def test_can_be_counted(name):
    """The FLOP counter gets through, the gradient penalty's second derivative included."""
    cls = find_method(name).cls
    flop = count_step(real_step(name), fake_tensors()).flop
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


GROUPED = [name for name in NAMES if issubclass(find_method(name).cls, GroupedMethod)]


def test_the_methods_that_couple_the_images_of_a_device():
    assert GROUPED == [
        "attnfd", "cirkd", "cirkd:memory", "cirkd:minibatch", "cirkdv2", "dist", "pkd", "skd",
        "skd:plain",
    ]  # fmt: skip


COUPLED_TERMS = {
    "attnfd": {"attnfd_c5", "attnfd_head"}, "cirkd:minibatch": {"batch"},
    "dist": {"intra", "aux_intra"}, "pkd": {"pkd"}, "skd:plain": {"kd"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "coupled"), COUPLED_TERMS.items())
def test_groups_are_the_shares_of_several_devices(name, coupled):
    """Terms and gradients: their means over the shares. tests/test_parallel.py has whole steps, of
    the methods with a memory too."""
    method, alone = make(name, images_per_group=2).eval(), make(name).eval()
    student, teacher, labels = draw(method, images=6)

    def outcome(method, part):
        taps = [Taps(**{k: v[part] for k, v in vars(t).items()}) for t in (student, teacher)]
        terms = method(*taps, None if labels is None else labels[part])
        wanted = [*vars(student).values(), *method.extra_parameters()]
        return terms, torch.autograd.grad(weighted(method, terms), wanted)

    together = outcome(method, slice(None))
    apart = [outcome(alone, slice(first, first + 2)) for first in (0, 2, 4)]
    for term, value in together[0].items():
        mean = torch.stack([terms[term] for terms, _ in apart]).mean()
        torch.testing.assert_close(value, mean)
    whole = alone(student, teacher, labels)
    assert {k for k, v in whole.items() if not torch.isclose(v, together[0][k])} == coupled
    for ours, *theirs in zip(together[1], *(g for _, g in apart), strict=True):
        torch.testing.assert_close(ours, sum(theirs) / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_unequal_size_are_refused_and_groups_are_told(name):
    with pytest.raises(UserError, match=r"images_per_group must be 0 .* or more, not -1"):
        make(name, images_per_group=-1)
    method = make(name, images_per_group=2)
    assert [note for note in method.notes if note.startswith("images_per_group = 2: ")]
    with pytest.raises(UserError, match="images_per_group = 2 must divide the 3 images of a dev"):
        method(*draw(method, images=3))


@pytest.mark.parametrize("module", method_modules())
def test_a_method_file_takes_only_methods_from_another_one(module):
    """Anything else that two files need is in a private module."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"kdprof.methods.{module}")))
    for node in ast.walk(tree):
        package, _, name = (getattr(node, "module", None) or "").rpartition(".")
        if package == "kdprof.methods" and not name.startswith("_"):
            taken = importlib.import_module(node.module)
            assert all(issubclass(getattr(taken, alias.name), Method) for alias in node.names)
