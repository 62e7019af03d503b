"""Every built-in method passes the method checks; one that is broken in one way fails one check."""

import functools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdprof.cli import cli
from kdprof.discovery import builtin_methods, find_method
from kdprof.errors import UserError
from kdprof.method_checks import CHECKS, check_method
from kdprof.method_checks.bench import Bench
from kdprof.method_checks.checks import NotApplicable, left_alone
from kdprof.method_checks.two_ranks import in_two_processes

NAMES = sorted(name for name, found in builtin_methods().items() if found.origin == "built-in")
ALONE = [name for name in CHECKS if name != "ddp"]
WHOLE_BATCH = ("cirkd:minibatch", "dist", "pkd", "kd")

GOOD = """
import torch.nn.functional as F
from torch import nn
from kdprof.method import Method

class Good(Method):
    taps = ("head", "labels")
    weights = {"good": 1.0}

    def build(self, student, teacher):
        self.adaptor = nn.Conv2d(student.channels["head"], teacher.channels["head"], 1)

    def forward(self, student, teacher, labels):
        ours = F.interpolate(self.adaptor(student.head), teacher.head.shape[-2:]).float()
        valid = F.interpolate((labels != 255)[:, None].float(), ours.shape[-2:])
        error = (valid * (ours - teacher.head.float()).square().mean(1, keepdim=True)).sum()
        return {"good": error / valid.sum().clamp(min=1)}
"""

HEADER = """
import random
import sys
import time
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from kdprof.errors import UserError
from kdprof.method import Method

def kd(student, teacher):
    teacher = teacher.logits.float()
    ours = F.interpolate(student.logits.float(), teacher.shape[-2:])
    return F.mse_loss(ours, teacher)

class Plain(Method):
    taps = ("logits",)
    weights = {"kd": 1.0}

    def forward(self, student, teacher, labels):
        return {"kd": self.change(kd(student, teacher), student, teacher)}

    def change(self, term, student, teacher):
        return term
"""

BROKEN = {
    "Undeclared": ("taps", r"student\.head is read but not declared: add 'head' to taps"),
    "UndeclaredOfTeacher": ("taps", r"teacher\.c2 is read but not declared: add .* teacher_taps"),
    "UndeclaredLabels": ("taps", r"labels are read in .*broken\.py:\d+ .* add 'labels' to taps"),
    "Unread": ("taps", r"tap 'head' is declared but not read.*: remove it from taps"),
    "UnreadOfTeacher": ("taps", r"teacher\.head is declared but not read.*in teacher_taps"),
    "UnreadLabels": ("taps", r"labels are declared but change no term"),
    "NoWeight": ("gradient", r"term 'more' has no weight: add it to weights"),
    "NoTerm": ("gradient", r"weights has 'more', which is never returned"),
    "NoScalar": ("gradient", r"term 'kd' has the shape \(2,\): reduce it to a scalar"),
    "NotFinite": ("gradient", r"term 'kd' is inf"),
    "Detached": ("gradient", r"no gradient reaches a student tap"),
    "DeadExtra": ("gradient", r"no gradient reaches extra 'dead\.weight'"),
    "LateExtra": ("gradient", r"'late\.weight' is made after build.*: make it in build"),
    "ThroughTeacher": ("gradient", r"gradient flows to teacher\.logits"),
    "ChangesTeacher": ("gradient", r"teacher\.logits is changed in place: clone it first"),
    "OutsideBuffers": ("resume", r"resumed from a checkpoint, term 'kd' differs: .* buffers"),
    "LateBuffer": ("resume", r"its checkpoint cannot be loaded .*made in build"),
    "PythonRandom": ("determinism", r"term 'kd' differs .* draws from Python's random"),
    "NumpyRandom": ("determinism", r"term 'kd' differs .* draws from NumPy"),
    "Clock": ("determinism", r"term 'kd' differs .* draws from a clock"),
    "Seeds": ("determinism", r"it seeds torch's generator"),
    "AllVoid": ("void", r"where every label is 255, term 'kd' is nan: .*clamped to at least 1"),
    "Pairs": ("batch-1", r"with one image, term 'kd' is nan"),
    "Even": ("shapes", r"with a grid of 4x11 it stops in broken\.py:\d+ in change: The size .*"),
    "OneGrid": ("grids", r"with a coarser student it stops in .*; resize one network's maps"),
    "RoundedAway": ("bf16", r"under bf16 autocast term 'kd' is .* instead of .*float32"),
    "Overflows": ("bf16", r"under bf16 autocast term 'kd' is inf"),
    "GraphBreak": ("compile", r"torch.compile cannot trace all of it \(.* at broken\.py:\d+\)"),
    "Traced": ("compile", r"compiled, term 'kd' differs from that of the plain objective"),
    "Waits": ("synchronisation", r"aten\._local_scalar_dense in broken\.py:\d+ in change makes"),
    "Inverts": ("synchronisation", r"aten\._linalg_check_errors in broken\.py:\d+ in change"),
    "OwnState": ("ddp", r"the state of mean differs between processes: .* gather what is written"),
}
"""By class: the one check that fails, and what it says."""
ALSO = {"LateExtra": ["resume"]}
"""A checkpoint with a parameter that a fresh method lacks cannot be loaded."""

BROKEN_TEXT = """
class Undeclared(Plain):
    def change(self, term, student, teacher):
        return term + student.head.float().square().mean()

class UndeclaredOfTeacher(Plain):
    teacher_taps = ("logits",)
    def change(self, term, student, teacher):
        return term + teacher.c2.float().mean()

class UndeclaredLabels(Plain):
    def forward(self, student, teacher, labels):
        return {"kd": kd(student, teacher) * labels.float().mean()}

class Unread(Plain):
    taps = ("logits", "head")

class UnreadOfTeacher(Plain):
    taps = ("logits", "head")
    def change(self, term, student, teacher):
        return term + student.head.float().square().mean()

class UnreadLabels(Plain):
    taps = ("logits", "labels")

class NoWeight(Plain):
    def forward(self, student, teacher, labels):
        return {"kd": kd(student, teacher), "more": student.logits.float().mean()}

class NoTerm(Plain):
    weights = {"kd": 1.0, "more": 1.0}

class NoScalar(Plain):
    def change(self, term, student, teacher):
        return term.expand(2)

class NotFinite(Plain):
    def change(self, term, student, teacher):
        return term / 0

class Detached(Plain):
    def change(self, term, student, teacher):
        return term.detach()

class DeadExtra(Plain):
    def build(self, student, teacher):
        self.dead = nn.Linear(2, 3, bias=False)

class LateExtra(Plain):
    graph_breaks = "makes a parameter"
    def change(self, term, student, teacher):
        if not hasattr(self, "late"):
            self.late = nn.Linear(1, 1, bias=False)
        return term + self.late.weight.square().sum()

class ThroughTeacher(Plain):
    graph_breaks = "asks the teacher for a gradient"
    def change(self, term, student, teacher):
        return term + kd(student, type("T", (), {"logits": teacher.logits.requires_grad_()}))

class ChangesTeacher(Plain):
    def forward(self, student, teacher, labels):
        teacher.logits.clamp_(max=0.5)
        return {"kd": kd(student, teacher)}

class OutsideBuffers(Plain):
    seen = 1
    def change(self, term, student, teacher):
        self.seen += 1
        return term * self.seen

class LateBuffer(Plain):
    graph_breaks = "makes a buffer"
    def change(self, term, student, teacher):
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(()))
        return term * self.late

class PythonRandom(Plain):
    graph_breaks = "draws from Python's random"
    def change(self, term, student, teacher):
        return term * random.random()

class NumpyRandom(Plain):
    graph_breaks = "draws from NumPy"
    def change(self, term, student, teacher):
        return term * float(np.random.rand())

class Clock(Plain):
    graph_breaks = "reads a clock"
    def change(self, term, student, teacher):
        return term * (1 + time.perf_counter_ns() % 1000 * 1e-6)

class Seeds(Plain):
    graph_breaks = "seeds"
    def change(self, term, student, teacher):
        torch.manual_seed(0)
        return term * torch.rand(())

class AllVoid(Plain):
    taps = ("logits", "labels")
    def forward(self, student, teacher, labels):
        return {"kd": kd(student, teacher) * (labels == 1).sum() / (labels != 255).sum()}

class Pairs(Plain):
    def change(self, term, student, teacher):
        return term + student.logits.float().std(0).mean()

class Even(Plain):
    def change(self, term, student, teacher):
        half = F.interpolate(F.avg_pool2d(teacher.logits.float(), 2), scale_factor=2)
        return term + (teacher.logits - half).mean()

class OneGrid(Plain):
    def change(self, term, student, teacher):
        return (student.logits.float() - teacher.logits).square().mean()

class RoundedAway(Plain):
    def change(self, term, student, teacher):
        return (1000 + student.logits - 1000).float().square().mean()

class Overflows(Plain):
    def change(self, term, student, teacher):
        return term * (student.logits.dtype.itemsize * 25.0 * torch.ones(()) - 50).reciprocal()

class GraphBreak(Plain):
    def change(self, term, student, teacher):
        torch._dynamo.graph_break()
        return term

class Traced(Plain):
    def change(self, term, student, teacher):
        return term * (2 if torch.compiler.is_compiling() else 1)

class Waits(Plain):
    graph_breaks = "reads a number on the host"
    def change(self, term, student, teacher):
        return term * (1 + abs(term.item()))

class Inverts(Plain):
    def change(self, term, student, teacher):
        return term * torch.linalg.inv(torch.eye(2, device=term.device)).sum()

class OwnState(Plain):
    def build(self, student, teacher):
        self.register_buffer("mean", torch.zeros(()))
    def change(self, term, student, teacher):
        self.mean.lerp_(teacher.logits.float().mean(), 0.1)
        return term + self.mean

class Refuses(Plain):
    def change(self, term, student, teacher):
        if len(student.logits) == 1:
            raise UserError("method 'refuses' needs pairs of images")
        return term

class Picky(Plain):
    def build(self, student, teacher):
        raise UserError("method 'picky' needs 300 channels")
"""


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """Methods in users' files, by class."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "good.py").write_text(GOOD)
    (folder / "broken.py").write_text(HEADER + BROKEN_TEXT)
    names = ["Good", *BROKEN, "Refuses", "Picky"]
    return {n: find_method(f"{folder}/{'good' if n == 'Good' else 'broken'}.py:{n}") for n in names}


@functools.lru_cache(maxsize=2)
def bench(name: str) -> Bench:
    """Return the bench of a built-in method, whose extras are drawn once for several checks."""
    return Bench(find_method(name))


def by_check(found, names=ALONE):
    return {verdict.name: verdict for verdict in check_method(found, names)}


def not_applicable(name: str, check: str) -> str | None:
    """Return the one reason for which a check may say nothing about a built-in method."""
    cls = find_method(name).cls
    if check == "void" and "labels" not in cls.taps:
        return "it reads no labels"
    if name == "none" and check not in ("taps", "gradient", "determinism"):
        return "it has no terms"
    if check == "grids" and not cls.needs_teacher():
        return "it reads no teacher"
    return None


COMPILING_IS_SLOW = [
    pytest.param(one, marks=pytest.mark.slow) if one == "compile" else one for one in ALONE
]


@pytest.mark.parametrize("check", COMPILING_IS_SLOW)
@pytest.mark.parametrize("name", NAMES)
def test_built_in(name, check):
    expected = not_applicable(name, check)
    with left_alone():
        if expected is None:
            assert not CHECKS[check](bench(name))
            return
        with pytest.raises(NotApplicable, match=expected):
            CHECKS[check](bench(name))


@pytest.mark.slow
def test_in_two_processes(users):
    """All of them in one pair: starting it takes longer than what they do."""
    theirs = ("Good", "Undeclared", "OwnState", "Picky", "PythonRandom")
    methods = [*(find_method(name) for name in NAMES), *(users[name] for name in theirs)]
    found = in_two_processes(methods)
    wrong, passed_over = {}, set()
    for method in methods:
        try:
            wrong[method.cls.__name__] = CHECKS["ddp"](Bench(method, found[method.cls.name]))
        except NotApplicable:
            passed_over.add(method.cls.name)
        except Exception as error:
            wrong[method.cls.__name__] = [str(error)]
    assert passed_over == {"none"}  # it has no terms
    told = {name: problems for name, problems in wrong.items() if problems}
    (problem,) = told.pop("OwnState")
    assert re.search(BROKEN["OwnState"][1], problem)
    assert told.keys() == {"Undeclared", "Picky"}, told
    assert "needs 300 channels" in told["Picky"][0]
    for name in WHOLE_BATCH:
        for rank in range(2):
            terms = alone(name, seed=2 + rank)
            assert found[name][str(rank)]["terms"] == pytest.approx(terms, rel=1e-5), name


def alone(name, seed):
    """Return the terms of what a rank was given in its second run, in this process."""
    one = bench(name)
    method, inputs = one.method(), one.draw(seed=seed)
    torch.manual_seed(seed)
    return {term: value.item() for term, value in method(*inputs).items()}


def test_a_good_method_passes(users):
    verdicts = by_check(users["Good"])
    assert {name: v.message for name, v in verdicts.items() if v.outcome != "ok"} == {}


@pytest.mark.parametrize("name", [name for name in BROKEN if BROKEN[name][0] != "ddp"])
def test_a_broken_method_fails_one_check(users, name):
    check, message = BROKEN[name]
    # torch.compile takes longer than all others together: only where it is what is broken.
    names = [one for one in ALONE if one != "compile" or check == "compile"]
    verdicts = by_check(users[name], names)
    failed = [v.name for v in verdicts.values() if v.outcome == "failed"]
    assert failed == [check, *ALSO.get(name, ())], verdicts
    assert re.search(message, verdicts[check].message), verdicts[check].message
    assert len(verdicts[check].message.splitlines()) == 1


def test_state_of_its_own_is_fine_in_one_process(users):
    assert all(v.outcome != "failed" for v in by_check(users["OwnState"]).values())


def test_a_method_may_say_why_it_breaks_the_graph(users):
    verdict = by_check(users["Waits"], ["compile"])["compile"]
    assert verdict.outcome == "skipped"
    assert verdict.message == "not applicable: reads a number on the host"


def test_a_method_may_refuse_a_batch_of_one(users):
    verdict = by_check(users["Refuses"], ["batch-1"])["batch-1"]
    assert verdict.outcome == "skipped"
    assert "needs pairs of images" in verdict.message


def test_a_method_that_cannot_be_built_fails_once(users):
    first, *others = by_check(users["Picky"]).values()
    assert first.outcome == "failed"
    assert "refuses small networks: method 'picky' needs 300 channels" in first.message
    assert {v.outcome for v in others} == {"skipped"}


def test_what_is_wrong_first_is_said_once(users):
    """An undeclared tap stops every other check, too."""
    verdicts = by_check(users["Undeclared"])
    assert verdicts["gradient"].message.startswith("fix what failed above first: AttributeError")
    alone = by_check(users["Undeclared"], ["gradient"])["gradient"]
    assert alone.outcome == "failed"
    assert "'head' was read but not declared" in alone.message


def test_an_unknown_check_is_refused():
    with pytest.raises(UserError, match="unknown check 'taps2'; did you mean 'taps'"):
        check_method(find_method("kd"), ["taps2"])


def test_checks_keep_their_order():
    assert [v.name for v in check_method(find_method("kd"), ["bf16", "taps"])] == ["taps", "bf16"]


def test_global_state_is_left_alone(users):
    def state():
        return (
            random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(),
        )  # fmt: skip

    before = state()
    for name in ("Seeds", "PythonRandom", "NumpyRandom"):
        by_check(users[name])
    assert state() == before


def test_command_on_a_users_file(users, monkeypatch):
    """With the two processes of its check; from the file's own folder."""
    path = Path(users["Good"].origin)
    monkeypatch.chdir(path.parent)
    done = CliRunner().invoke(cli, ["methods", f"./{path.name}:Good", "--check"])
    assert done.exit_code == 0, done.output
    assert "ddp              ok" in done.output


@pytest.mark.parametrize("width", [80, 200])
def test_command(users, monkeypatch, width):
    monkeypatch.delitem(CHECKS, "ddp")
    monkeypatch.setenv("COLUMNS", str(width))
    path = users["Good"].origin
    good = CliRunner().invoke(cli, ["methods", f"{path}:Good", "--check"])
    assert good.exit_code == 0
    assert "synchronisation  ok" in good.output
    broken = path.replace("good", "broken")
    bad = CliRunner().invoke(cli, ["methods", f"{broken}:NoWeight", "--check"])
    assert bad.exit_code == 1
    assert "term 'more' has no weight" in bad.output
    assert bad.output.rstrip().endswith("failed: gradient")
    assert max(len(line) for line in (good.output + bad.output).splitlines()) <= width


def test_command_for_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in CHECKS.keys() - {"taps", "void"}:
        monkeypatch.delitem(CHECKS, name)
    done = CliRunner().invoke(cli, ["methods", "--check"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert [line.split()[0] for line in lines] == list(builtin_methods())
    assert "kd                 ok      1 ok, 1 skipped" in lines


def test_check_and_markdown_do_not_go_together():
    done = CliRunner().invoke(cli, ["methods", "--check", "--markdown"])
    assert isinstance(done.exception, UserError)
