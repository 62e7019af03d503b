"""The optimisers of a step against plain tensor algebra, and what studies may say of them."""

import copy
import math
from pathlib import Path

import pytest
import torch
from builders import Alone, Mimic, tiny_batch, tiny_step
from small_study import price, small_study, train_small
from step_observer import observing, signal_at
from torch import nn

from kdprof.errors import UserError
from kdprof.measure.counting.count import count_step, fake_tensors
from kdprof.measure.trace import StepTrace
from kdprof.method import IGNORE, Network, NetworkInfo
from kdprof.models import build
from kdprof.optimizer import group_lines, parameter_groups
from kdprof.records import CurvePoint
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key
from kdprof.schedule import learning_rate_factor
from kdprof.store import Store, read_lines
from kdprof.study import StepSettings, load_study
from kdprof.train import checkpoint
from kdprof.train.loop import Interrupted

ADAMW = {
    "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99),
    "eps": 1e-3, "no_weight_decay": ["norms", "biases"], "learning_rate_factors": {"head": 10.0},
    "max_gradient_norm": 0.5, "warmup_iterations": 2, "warmup_start": 0.1, "poly_power": 1.0,
}  # fmt: skip


# Against plain tensor algebra


def gradients(student, teacher, method, images, labels):
    """One backward through everything, of the same loss as the step's."""
    taps = student(images, ["logits", "aux", "head"])
    with torch.no_grad():
        given = teacher(images, ["logits", "head"])
    terms = method(taps, given, None)
    loss = sum(method.weights[name] * term for name, term in terms.items())
    for logits, weight in ((taps.logits, 1.0), (taps.aux, 0.4)):
        large = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
        loss = loss + weight * nn.functional.cross_entropy(
            large, labels.long(), ignore_index=IGNORE
        )
    named = {f"student.{k}": v for k, v in student.named_parameters()}
    named |= {f"method.{k}": v for k, v in method.named_parameters()}
    return named, dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def norm_of(tensors) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def test_adamw_with_groups_clipping_and_warmup_is_the_plain_algebra_of_it():
    """Three steps: in the warm-up from a tenth of the rate, at its end, and in the decay."""
    step = tiny_step(Mimic, iterations=6, dropout=0.0, **ADAMW)
    student, teacher, method = map(copy.deepcopy, (step.student, step.teacher, step.method))
    beta1, beta2 = ADAMW["betas"]
    first, second, norms = {}, {}, []
    for number, rate in enumerate((0.001, 0.01, 0.01), 1):
        batch = tiny_batch(number)
        step(*batch, number - 1)
        named, grads = gradients(student, teacher, method, *batch)
        norms.append(norm_of(grads.values()))
        clip = min(1.0, 0.5 / (norms[-1] + 1e-6))
        with torch.no_grad():
            for name, p in named.items():
                g = clip * grads[name]
                lr = rate * (10 if "classifier" in name or "auxiliary" in name else 1)
                decays = not name.endswith("bias") and name != "student.stem.1.weight"
                p -= lr * 0.1 * p if decays else 0
                first[name] = beta1 * first.get(name, 0) + (1 - beta1) * g
                second[name] = beta2 * second.get(name, 0) + (1 - beta2) * g * g
                mean = first[name] / (1 - beta1**number)
                spread = (second[name] / (1 - beta2**number)).sqrt()
                p -= lr * mean / (spread + 1e-3)
    assert min(norms) > 0.5  # else nothing was clipped
    for name, expected in named.items():
        part, _, rest = name.partition(".")
        ours = getattr(step, part).get_parameter(rest)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_sgd_with_groups_is_sgd_on_each_part():
    """No group has another's rate or decay; without settings there is one group."""
    (whole,) = parameter_groups(tiny_step(Mimic).student, Mimic(), StepSettings())
    assert (whole.rate_factor, whole.weight_decay) == (1, 5e-4)
    step = tiny_step(Alone, no_weight_decay=["stem"], learning_rate_factors={"body": 3}, momentum=0)
    before = copy.deepcopy(step.student.state_dict())
    step.student.zero_grad()
    step(*tiny_batch(), 0)
    other = tiny_step(Alone, momentum=0, weight_decay=0.0)
    other(*tiny_batch(), 0)
    after, plain = step.student.state_dict(), other.student.state_dict()
    change = {name: after[name] - before[name] for name in before}
    wanted = {name: plain[name] - before[name] for name in before}
    torch.testing.assert_close(change["stem.0.weight"], wanted["stem.0.weight"])
    decay = 0.05 * 5e-4 * before["body.weight"]
    torch.testing.assert_close(change["body.weight"], 3 * (wanted["body.weight"] - decay))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_is_of_the_real_gradients_under_a_loss_scale(optimizer):
    """SGD moves by the rate times the clipped norm, whatever the scale; a skipped step leaves an
    optimiser as it was."""
    settings = {"momentum": 0.0} if optimizer == "sgd" else {}
    step = tiny_step(
        Alone, precision="fp16", max_gradient_norm=0.01, optimizer=optimizer, weight_decay=0.0,
        min_learning_rate=0.0, schedule="wsd", iterations=1000, **settings,
    )  # fmt: skip
    step._scaler._init_scale = 2.0**40
    before = copy.deepcopy(dict(step.student.named_parameters()))
    step(*tiny_batch(), 0)
    moved = [p - before[name] for name, p in step.student.named_parameters()]
    assert all(m.abs().max() == 0 for m in moved)  # the first scale overflows
    assert all((v == 0).all() for s in step._optimizer.state.values() for v in s.values())
    for iteration in range(1, 40):
        before = copy.deepcopy(dict(step.student.named_parameters()))
        step(*tiny_batch(), iteration)
        moved = [p.detach() - before[name] for name, p in step.student.named_parameters()]
        if any(m.abs().max() > 0 for m in moved):
            break
    assert step._scaler.get_scale() > 1
    if optimizer == "sgd":
        assert norm_of(moved) == pytest.approx(0.05 * 0.01, rel=1e-3)
    else:
        states = step._optimizer.state.values()
        assert norm_of(s["exp_avg"] for s in states) == pytest.approx(0.1 * 0.01, rel=1e-3)
        assert {s["step"].item() for s in states} == {1}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_adamw_is_the_same_adamw(precision):
    """Its moments and its step count come back."""
    runs = [tiny_step(precision=precision, **ADAMW) for _ in range(3)]
    for index in range(6):
        runs[0](*tiny_batch(index), index)
    for index in range(3):
        runs[1](*tiny_batch(index), index)
    runs[2].load_state_dict(copy.deepcopy(runs[1].state_dict()))
    for index in range(3, 6):
        runs[2](*tiny_batch(index), index)
    torch.testing.assert_close(runs[0].state_dict(), runs[2].state_dict(), rtol=0, atol=0)
    steps = {s["step"].item() for s in runs[2]._optimizer.state.values()}
    assert steps == {6} or precision == "fp16"


# Which parameters


class TokenRmsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class NormFreeBlock(nn.Module):
    """No normalisation, as its name says."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


class EveryKind(Network):
    heads = ("head",)

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(2, 4))
        self.norm = nn.LayerNorm(4)
        self.rms = TokenRmsNorm()
        self.free = NormFreeBlock()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        self.info = NetworkInfo("every-kind", 2, {}, {})


POSITION, NORM = {"pos_embed"}, {"norm.weight", "norm.bias", "rms.scale", "head.1.weight",
                                 "head.1.bias"}  # fmt: skip
BIAS = {"norm.bias", "attention.in_proj_bias", "attention.out_proj.bias", "head.0.bias",
        "head.1.bias"}  # fmt: skip
BY_SELECTION = {
    "norms": NORM, "biases": BIAS, "position_embeddings": POSITION,
    "head": {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"},
    "out_proj": {"attention.out_proj.weight", "attention.out_proj.bias"},
    "free.gain": {"free.gain"},
}  # fmt: skip


@pytest.mark.parametrize(("selection", "expected"), BY_SELECTION.items(), ids=BY_SELECTION)
def test_a_selection_holds_these_parameters(selection, expected):
    groups = parameter_groups(EveryKind(), None, StepSettings(no_weight_decay=[selection]))
    (plain,) = (group for group in groups if group.weight_decay == 0)
    assert set(plain.names) == expected
    assert sum(len(group.names) for group in groups) == len(list(EveryKind().parameters()))


def test_extras_of_methods_are_selected_by_role_only():
    step = tiny_step(Mimic)
    settings = StepSettings(no_weight_decay=["biases", "body"], learning_rate_factors={"head": 2})
    groups = parameter_groups(step.student, step.method, settings)
    held = {(g.rate_factor, g.weight_decay): g.names for g in groups}
    assert held[1, 5e-4] == ["stem.0.weight", "stem.1.weight", "adapt.weight"]
    assert held[1, 0] == ["stem.1.bias", "body.weight", "body.bias", "adapt.bias"]
    assert held[2, 5e-4] == ["classifier.weight", "auxiliary.weight"]
    assert group_lines(step.student, settings)[2] == (
        "tiny: sgd, group 3 of 4: 2 tensors, 54 parameters, learning rate 0.02, weight decay 0.0005"
    )


def test_a_smaller_rate_for_segformer_than_for_its_head():
    pytest.importorskip("transformers")
    changes = {"student": "segformer-b0", "teacher": "pspnet-test_resnet", "step.aux_weight": 0.0}
    changes |= {f"step.{key}": value for key, value in ADAMW.items()}
    student = ResolvedStudy(small_study(**changes)).student_shapes
    groups = parameter_groups(student, None, StepSettings(**ADAMW))
    # 19 -> 8 classes of the synthetic data; the head of B0 has 256 channels (the paper's table 6).
    head = {g.weight_decay: g.count() for g in groups if g.rate_factor == 10}
    weights = (32 + 64 + 160 + 256) * 256 + 4 * 256 * 256 + 256 * student.info.num_classes
    assert head == {0.1: weights, 0.0: 4 * 256 + 2 * 256 + student.info.num_classes}


# What is refused

ELSE = "and step.optimizer is"
REFUSED = {
    "of another": ({"optimizer": "adamw", "momentum": 0.9},
                   f"step.momentum: a setting of 'sgd', {ELSE} 'adamw'; leave it out"),
    "of adamw": ({"betas": [0.9, 0.9]},
                 f"step.betas: a setting of 'adamw', {ELSE} 'sgd'; leave it out"),
    "of no own": ({"optimizer": "f.py:g", "eps": 0.1},
                  f"step.eps: a setting of 'adamw', {ELSE} 'f.py:g'; leave it out"),
    "unknown": ({"optimizer": "adam"},
                "step.optimizer: unknown optimizer 'adam'; did you mean 'adamw'?"),
    "no function": ({"optimizer": "f.py"},
                    "step.optimizer: unknown optimizer 'f.py'; valid: adamw, sgd"),
    "factor": ({"learning_rate_factors": {"head": 0}}, "step.learning_rate_factors.head: input"),
    "norm": ({"max_gradient_norm": 0}, "step.max_gradient_norm: input should be greater than 0"),
}  # fmt: skip


@pytest.mark.parametrize(("step", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_make_no_sense_are_refused(step, message):
    with pytest.raises(UserError) as refused:
        load_study(None, {f"step.{key}": value for key, value in step.items()})
    assert str(refused.value).startswith(f"study: {message}")


NOT_HELD = {
    "typo": ({"no_weight_decay": ["norm"]}, "has no parameter 'norm'; did you mean 'norms'?"),
    "role": ({"no_weight_decay": ["position_embeddings"]}, "has no position_embeddings; leave"),
    "twice": ({"learning_rate_factors": {"head": 10, "conv_seg": 2}},
              r"head and conv_seg both hold 4 parameters of .*, such as decode_head\.conv_seg"),
    "floor": ({"learning_rate": 5e-5}, "below step.min_learning_rate = 0.0001"),
    "file": ({"optimizer": "nowhere.py:build"}, "step.optimizer: no file nowhere.py"),
}  # fmt: skip


@pytest.mark.parametrize(("step", "message"), NOT_HELD.values(), ids=NOT_HELD)
def test_what_the_networks_do_not_have_is_refused_before_anything_runs(step, message):
    with pytest.raises(UserError, match=message):
        ResolvedStudy(small_study(**{f"step.{key}": value for key, value in step.items()}))


def test_a_users_network_says_what_its_head_is(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "from kdprof.models import AdaptedNetwork\n"
        "def make(heads, classes):\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, classes, 1))\n"
        "    maps = lambda net, images: {'logits': net(images)}\n"
        "    return AdaptedNetwork(net, maps, classes, heads=heads)\n"
        "silent, telling, wrong = (\n"
        "    lambda classes, heads=heads: make(heads, classes) for heads in ([], ['1'], ['head'])\n"
        ")\n"
    )
    settings = StepSettings(learning_rate_factors={"head": 10})
    groups = parameter_groups(build(f"{tmp_path}/net.py:telling", 5), None, settings)
    assert [(g.rate_factor, g.names) for g in groups] == [
        (1, ["module.0.weight", "module.0.bias"]),
        (10, ["module.1.weight", "module.1.bias"]),
    ]
    with pytest.raises(UserError, match="own does not say what its head is; name its modules"):
        parameter_groups(build(f"{tmp_path}/net.py:silent", 5), None, settings)
    with pytest.raises(UserError, match="own: unknown head 'head'; valid: 0, 1"):
        build(f"{tmp_path}/net.py:wrong", 5)


def test_the_teachers_rate_must_reach_the_floor_too():
    with pytest.raises(UserError, match=r"teacher_training\.learning_rate = 1e-05 is below"):
        ResolvedStudy(small_study(teacher_training__learning_rate=1e-5))


def test_a_training_that_is_all_warmup_is_refused(tmp_path):
    """It would never have the rate that the study states."""
    warmup = {"methods": ["none"], "step__warmup_iterations": 6}
    price_as_another_step(tmp_path / "run", small_study(**warmup))
    with pytest.raises(UserError, match="6 of none is 6 iterations, all of them warm-up"):
        train_small(tmp_path / "run", priced=False, **warmup)
    with pytest.raises(UserError, match=r"teacher_training\.iterations is 4 iterations, all"):
        train_small(tmp_path / "teacher", methods=["kd"], step__warmup_iterations=4, priced=False)


def test_every_optimizer_has_its_own_defaults():
    sgd, adamw = StepSettings(), StepSettings(optimizer="adamw")
    assert (sgd.learning_rate, sgd.momentum, sgd.betas, sgd.eps) == (0.01, 0.9, None, None)
    assert (adamw.learning_rate, adamw.weight_decay, adamw.min_learning_rate) == (6e-5, 0.01, 0.0)
    assert (adamw.momentum, adamw.betas, adamw.eps) == (None, (0.9, 0.999), 1e-8)
    written = small_study(**{f"step.{key}": value for key, value in ADAMW.items()})
    assert load_study(None, {"step": written.step.model_dump()}).step == written.step


# A user's own

OWN = """
import torch

def build(groups, settings):
    return torch.optim.AdamW(groups, betas=(0.8, 0.99), eps=1e-3)

def lacks(groups, settings):
    return torch.optim.SGD(groups[0]["params"][1:], lr=1.0)

def nothing(groups, settings):
    return None
"""


def test_a_users_optimizer_is_trained_like_any(tmp_path):
    """torch's AdamW of small operators is kdprof's fused one up to rounding."""
    (tmp_path / "own.py").write_text(OWN)
    of_adamw = {key: value for key, value in ADAMW.items() if key not in ("betas", "eps")}
    own = {**of_adamw, "optimizer": f"{tmp_path}/own.py:build"}
    steps = [tiny_step(Mimic, dropout=0.0, **settings) for settings in (ADAMW, own)]
    for index in range(3):
        for step in steps:
            step(*tiny_batch(index), index)
    assert not steps[1]._optimizer.defaults["fused"]
    for ours, theirs in zip(*(step.student.parameters() for step in steps), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_the_page_about_optimizers_is_true(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    recipe, code = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("toml", "python"))
    (tmp_path / "recipe.toml").write_text(recipe)
    step = load_study(str(tmp_path / "recipe.toml"), {}).step
    assert learning_rate_factor(step, 0, 160_000) == 1e-6
    assert learning_rate_factor(step, 1499, 160_000) == 1
    assert learning_rate_factor(step, 1500 + 158_500 // 2, 160_000) == 0.5
    (tmp_path / "mine.py").write_text(code)
    step = tiny_step(Alone, optimizer=f"{tmp_path}/mine.py:build_optimizer")
    assert type(step._optimizer) is torch.optim.NAdam
    step(*tiny_batch(), 0)
    assert step._optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("lacks", "its optimizer lacks 1 of 9 parameters and has 0 others"),
        ("nothing", "returned a NoneType; return a torch.optim.Optimizer"),
    ],
)
def test_a_users_optimizer_must_have_all_parameters(tmp_path, function, message):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError, match=message):
        tiny_step(Alone, optimizer=f"{tmp_path}/own.py:{function}")


def test_the_file_of_a_users_optimizer_is_part_of_the_identity(tmp_path):
    keys = []
    for number, text in enumerate((OWN, OWN, OWN + "# changed\n")):
        file = tmp_path / str(number) / "own.py"
        file.parent.mkdir()
        file.write_text(text)
        study = ResolvedStudy(small_study(step__optimizer=f"{file}:build"))
        keys.append(cost_key(study, "none"))
    keys.append(cost_key(ResolvedStudy(small_study()), "none"))
    assert keys[0] == keys[1]
    assert len({*keys}) == 3


# Counted and measured


def least_bytes(**settings) -> int:
    return count_step(tiny_step(Alone, **settings), fake_tensors()).least_memory_bytes


def test_the_state_of_the_optimizer_is_in_the_memory_of_a_step(tmp_path):
    """SGD keeps a momentum per parameter, or nothing; AdamW two, and a step count per tensor."""
    (tmp_path / "own.py").write_text(OWN)
    parameters = list(tiny_step(Alone).student.parameters())
    values, tensors = 4 * sum(p.numel() for p in parameters), 4 * len(parameters)
    without = least_bytes(momentum=0.0)
    assert least_bytes() - without == values
    assert least_bytes(optimizer="adamw") - without == 2 * values + tensors
    assert least_bytes(optimizer=f"{tmp_path}/own.py:build") - without == 2 * values + tensors


def test_adamw_reads_four_tensors_and_writes_three():
    """Per value: 13 FLOP, one more where it decays. Another operator raises the step counts."""
    step = tiny_step(Alone, optimizer="adamw", no_weight_decay=["biases"])
    biases = sum(p.numel() for n, p in step.student.named_parameters() if n.endswith("bias"))
    values = sum(p.numel() for p in step.student.parameters())
    (fused,) = (o for o in count_step(step, fake_tensors()).operations if "fused" in o.name)
    counts = 4 * len(list(step.student.parameters()))
    assert (fused.calls, fused.kind, fused.phase) == (2, "optimizer", "optimizer")
    assert fused.other_flop == 14 * values - biases
    assert (fused.bytes_read, fused.bytes_written) == (16 * values + counts, 12 * values)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_counted_step_is_the_run_step_with_clipping_and_groups(precision):
    def work(operations):
        return {
            (o.phase, o.name): (o.calls, o.other_flop, o.bytes_read, o.bytes_written)
            for o in operations
            if o.phase == "optimizer"
        }

    step = tiny_step(Mimic, precision=precision, **ADAMW)
    step(*tiny_batch(), 0)
    with StepTrace(step) as trace:
        step(*tiny_batch(), 1, trace.mark)
    found = work(trace.operations())
    again = tiny_step(Mimic, precision=precision, **ADAMW)
    assert found == work(count_step(again, fake_tensors()).operations)
    assert found["optimizer", "aten._fused_adamw_"][0] == 4
    values = sum(p.numel() for m in (step.student, step.method) for p in m.parameters())
    assert found["optimizer", "aten._foreach_norm"][1] == 2 * values
    assert found["optimizer", "aten._foreach_mul_"][1:] == (values, 4 * values + 4, 4 * values)
    assert trace.synchronisations() == []


# Trained


SEGFORMER = {
    "teacher": "pspnet-test_resnet", "methods": ["none"], "budgets": ["5"],
    "step.crop": [32, 32], "step.aux_weight": 0.0, "evaluation.points": 1,
    "step.optimizer": "adamw", "step.no_weight_decay": ["norms", "biases"],
    "step.learning_rate_factors": {"head": 10.0}, "step.max_gradient_norm": 1.0,
    "step.warmup_iterations": 2, "step.warmup_start": 1e-6, "step.poly_power": 1.0,
}  # fmt: skip
SMALLER = """
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from kdprof.models import AdaptedNetwork


def build(classes):
    config = SegformerConfig(
        num_labels=classes, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8,
    )
    network = SegformerForSemanticSegmentation(config)
    maps = lambda module, images: {"logits": module(images).logits}
    return AdaptedNetwork(network, maps, classes, heads=["decode_head"])
"""
"""A SegFormer of one block per stage."""


def price_as_another_step(out, study) -> None:
    """Write the Cost of a small PSPNet as that of the study's own step, which takes long to
    measure: what it costs does not matter here."""
    price(out / "other", small_study(methods=["none"]))
    cost = next(cost for cost in Store(out / "other").costs() if cost.method == "none")
    key = cost_key(ResolvedStudy(study), "none")
    Store(out).write_cost(cost.model_copy(update={"key": key}))


@pytest.mark.parametrize("size", ["smaller", pytest.param("b0", marks=pytest.mark.slow)])
def test_segformer_stopped_and_continued_is_the_uninterrupted_one_bit_for_bit(tmp_path, size):
    pytest.importorskip("transformers")
    (tmp_path / "smaller.py").write_text(SMALLER)
    student = "segformer-b0" if size == "b0" else f"{tmp_path}/smaller.py:build"
    changes = {"student": student, **SEGFORMER}
    out = {name: tmp_path / name for name in ("whole", "parts")}
    for folder in out.values():
        price_as_another_step(folder, small_study(**changes))
    train_small(out["whole"], priced=False, **changes)
    with observing(5, before=signal_at(2)), pytest.raises(Interrupted):
        train_small(out["parts"], priced=False, **changes)
    folders = [Store(folder).run_folder("none", "5", 0) for folder in out.values()]
    assert folders[1].read_run().iterations_done == 3
    train_small(out["parts"], priced=False, **changes)
    whole, parts = (checkpoint.load(folder)[0]["step"] for folder in folders)
    torch.testing.assert_close(whole, parts, rtol=0, atol=0)
    state = parts["optimizer"]["state"]
    assert {value["step"].item() for value in state.values()} == {5}
    assert len(parts["optimizer"]["param_groups"]) == 4
    (last,) = (line.learning_rate for line in read_lines(folders[1].curve, CurvePoint))
    assert last == pytest.approx(6e-5 / 3)
