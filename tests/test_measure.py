"""`kdprof measure`: whole Costs, bad steps, other people's steps, baselines."""

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import MY_METHOD
from processes import kdprof
from small_study import small_study, small_toml

import kdprof as package
from kdprof import cli
from kdprof.errors import UserError
from kdprof.measure import measure
from kdprof.measure.cost import hidden_cost
from kdprof.measure.isolation import Failure, MeasureRequest, run_isolated
from kdprof.measure.turns import PlannedTraining, TrainingPlan, Turns
from kdprof.processes import explain, last_words
from kdprof.progress import Progress
from kdprof.records import Cost
from kdprof.resolve import ResolvedStudy
from kdprof.store import read_record
from kdprof.study import MeasureSettings, Study
from kdprof.train.prepare import _rough, training_plan

BAD = '''
import os, signal
import torch
from kdprof.method import Method


class Raises(Method):
    taps = ("logits",)
    weights = {"x": 1.0}

    def forward(self, student, teacher, labels):
        raise ValueError("no such luck")


class Nan(Method):
    taps = ("logits",)
    weights = {"x": 1.0}

    def forward(self, student, teacher, labels):
        return {"x": student.logits.mean() * float("nan")}


class Leaks(Method):
    taps = ("logits",)
    weights = {"x": 1.0}
    kept = []

    def forward(self, student, teacher, labels):
        self.kept.append(torch.ones(2**20))
        return {"x": student.logits.mean()}


class Greedy(Method):
    taps = ("logits",)
    weights = {"x": 1.0}

    def forward(self, student, teacher, labels):
        return {"x": student.logits.mean() + torch.ones(2**50).mean()}


class Killed(Method):
    taps = ("logits",)
    weights = {"x": 1.0}
    calls = 0

    def forward(self, student, teacher, labels):
        self.calls += 1
        if self.calls > 3 and not isinstance(student.logits, torch._subclasses.FakeTensor):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": student.logits.mean()}


class Peeks(Method):
    """Synchronises, and pays for a term of weight 0."""

    taps = ("logits",)
    weights = {"x": 1.0, "idle": 0.0}

    def forward(self, student, teacher, labels):
        mean = student.logits.mean()
        if mean.item() > 1e9:
            print("never")
        return {"x": mean, "idle": (student.logits - teacher.logits).square().mean()}
'''


def study_of(folder: Path, *names: str, **changes) -> Study:
    (folder / "bad.py").write_text(BAD)
    return small_study(methods=[f"{folder}/bad.py:{name}" for name in names], **changes)


def measured(folder: Path, *names: str, **changes):
    resolved = ResolvedStudy(study_of(folder, *names, **changes))
    return measure(resolved, resolved.method_names(control=False), Progress(None))


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    """Costs of a small study, measured in this process."""
    resolved = ResolvedStudy(small_study(methods=["none", "kd", "fitnet", "ifvd"]))
    found = measure(resolved, ["none", "kd", "fitnet", "ifvd"], Progress(None))
    assert found.failures == {}
    return {cost.method: cost for cost in found.costs}


@pytest.fixture(scope="module")
def detailed() -> dict[str, Cost]:
    """The same with the seconds of single operators."""
    study = small_study(methods=["none", "fitnet"], measure__detail=True)
    found = measure(ResolvedStudy(study), ["none", "fitnet"], Progress(None))
    return {cost.method: cost for cost in found.costs}


def test_a_cost_says_when_it_was_measured_and_its_key_does_not_depend_on_it(costs):
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for cost in costs.values():
        assert cost.measured_at <= now
        assert "measured_at" not in cost.settings


def test_every_part_of_a_cost_is_there_or_says_why_not(costs):
    for cost in costs.values():
        fields = cost.model_dump()
        absent = {name for name, value in fields.items() if value is None}
        explained = {name.partition(".")[0] for name in cost.unavailable}
        assert absent <= explained | {"energy"}, cost.method
        assert Cost.model_validate_json(cost.model_dump_json(by_alias=True)) == cost


def test_the_phases_are_the_step(costs):
    for cost in costs.values():
        assert sum(cost.phases_s.values()) == pytest.approx(cost.latency_s.median, rel=0.02)
        share = cost.phases_s["teacher_forward"] / cost.latency_s.median
        assert (share > 0.004) == (cost.method != "none")


def test_a_record_says_where_its_own_time_went(costs):
    stages = [cost.timing["stages_s"] for cost in costs.values()]
    assert list(costs) == ["none", "kd", "fitnet", "ifvd"]
    assert {"start-up", "ceilings"} <= stages[0].keys()
    for own in stages:
        assert {"networks", "memory", "timed rounds", "end-to-end"} <= own.keys()
        assert all(seconds > 0 for seconds in own.values())
        assert "energy" not in own
    assert "ceilings" not in {name for own in stages[1:] for name in own}, "measured once"


def test_single_operators_are_timed_on_request_only(costs):
    for cost in costs.values():
        assert {o.seconds for o in cost.operations} == {None}
        assert cost.unavailable["operations.seconds"] == "not requested (--detail)"


def test_operators_share_out_the_phases(detailed):
    for cost in detailed.values():
        assert "operations.seconds" not in cost.unavailable
        for phase, seconds in cost.phases_s.items():
            own = [o.seconds for o in cost.operations if o.phase == phase]
            if own:
                assert sum(own) == pytest.approx(seconds, rel=1e-6)


def test_terms_share_out_the_objective(detailed):
    fitnet = detailed["fitnet"]
    assert set(fitnet.terms) == {"fitnet", "kd"}
    forward = sum(term.forward_s for term in fitnet.terms.values())
    backward = sum(term.backward_s for term in fitnet.terms.values())
    assert 0.5 * fitnet.phases_s["objective"] < forward <= 1.001 * fitnet.phases_s["objective"]
    assert 0 < backward <= 1.001 * fitnet.phases_s["objective_backward"]
    assert detailed["none"].terms == {}


def test_the_reference_is_one(costs):
    none = costs["none"]
    assert (none.ratio.median, none.ratio.low, none.ratio.high) == (1.0, 1.0, 1.0)
    assert none.hidden_cost == pytest.approx(0)
    assert none.samples_s == none.reference_samples_s
    for cost in costs.values():
        assert cost.ratio.to == "none"
        assert len(cost.samples_s) == len(cost.reference_samples_s) == cost.timing["rounds"]


def test_flop_are_those_of_counting_without_running(costs):
    from kdprof.measure.counting.count_study import count_costs

    resolved = ResolvedStudy(small_study(methods=["none", "kd", "fitnet", "ifvd"]))
    for counted in count_costs(resolved, list(costs), Progress(None)).costs:
        measured = costs[counted.method]
        assert measured.flop == counted.flop
        # The count is that of a GPU, whose task loss has another form.
        here, there = (
            [o for o in c.operations if o.phase != "task_loss"] for c in (measured, counted)
        )
        assert here == there


def test_hidden_cost_by_hand():
    """Twice the FLOP in five times the time: 60 % of it is not the FLOP's."""
    assert hidden_cost(2e9, 1e9, 5.0) == pytest.approx(0.6)
    assert hidden_cost(1e9, 1e9, 1.0) == 0
    assert hidden_cost(3e9, 1e9, 2.0) == pytest.approx(-0.5)
    assert hidden_cost(1.0, 0.0, 2.0) is None


def test_bad_steps_are_reported_and_spoil_nothing(tmp_path):
    found = measured(tmp_path, "Raises", "Nan", "Greedy", "Leaks")
    assert set(found.failures) == {"raises", "nan", "greedy"}
    assert re.search(r"raised ValueError: no such luck \(.*bad.py:12\)", found.failures["raises"])
    assert "not finite" in found.failures["nan"]
    assert "ran out of memory" in found.failures["greedy"]
    assert "lower --batch or --crop" in found.failures["greedy"]
    (leaks,) = found.costs
    assert not leaks.reliable
    assert any(re.match(r"leaks [34](\.\d)? MiB with every step", w) for w in leaks.warnings)


def test_what_is_paid_for_nothing_and_what_waits_is_found(tmp_path):
    (cost,) = measured(tmp_path, "Peeks").costs
    paid = [
        w for w in cost.warnings if w.startswith("computed although its weight is 0: term 'idle'")
    ]
    waits = [w for w in cost.warnings if w.startswith("synchronises the device")]
    assert len(paid) == 1
    (line,) = waits
    number = BAD.splitlines().index("        if mean.item() > 1e9:") + 1
    assert f"bad.py:{number}" in line
    assert "1 x per step" in line


@pytest.mark.slow
def test_a_crash_costs_one_method(tmp_path):
    """As a user sees it: the process is killed, and started again for the rest; exit code 1. A
    method that leaks is measured, and the next one has a new process."""
    (tmp_path / "bad.py").write_text(BAD)
    study = small_toml(tmp_path, budgets=[], methods=["kd"], measure__in_process=False)
    done = kdprof(
        "measure", "--study", study, "--out", "out", "-v", "--method", "./bad.py:Killed",
        "--method", "./bad.py:Leaks", "--method", "kd", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kdprof: method 'killed': its process was killed")
    costs = {
        cost.method: cost
        for path in (tmp_path / "out" / "costs").iterdir()
        if (cost := read_record(path, Cost))
    }
    assert {name: cost.timing["process_restarted_after"] for name, cost in costs.items()} == {
        "none": None,
        "leaks": "killed failed",
        "kd": "leaks leaks memory",
    }
    assert re.search(r"^kd: \d+ rounds; .* s: (.* s, )?start-up", done.stderr, re.MULTILINE)
    assert costs["kd"].ratio.median > 0.5


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    """Networks, momentum and tensors that other methods need or leave are not in it: a third of
    what a step of these networks holds would be seen."""
    changes = {
        "data": "camvid",  # without files, so that nothing is loaded
        "student": "pspnet-r18",
        "step.aux_weight": 0.0,
        "measure.in_process": False,
    }
    sizes = []
    for names in (["fitnet", "kd"], ["kd"]):
        study = ResolvedStudy(small_study(methods=names, **changes))
        costs = {cost.method: cost for cost in measure(study, names, Progress(None)).costs}
        sizes.append(costs["kd"].memory_bytes.process)
    assert sizes[0] == pytest.approx(sizes[1], abs=64 * 2**20)


class TakesTurns:
    """Readings of a simulated bench, whose methods' widths fall by half at each further visit."""

    spoiled, iteration_s, first_s = None, None, 0.0

    def __init__(self, **widths):
        self.widths, self.visits, self.limits = widths, [], []

    def visit(self, name, on_round, limit):
        self.limits.append(limit(0.1))
        self.iteration_s = 0.5
        if name in self.visits:
            self.widths[name] /= 2
        self.visits.append(name)

    def reference_iteration_s(self):
        return self.iteration_s

    def readings_of(self, name):
        taken = SimpleNamespace(taken_s=self.visits.count(name))
        least = {"least_visit_s": 0.5, "first_s": self.first_s}
        return SimpleNamespace(width=self.widths[name], timed=taken, **least)

    def take(self, names, settings, planned=None, **others):
        ignored = {"on_round": lambda name: None, "ended": lambda cost: None}
        Turns(self, settings, planned, **ignored, **others).take(names)


def test_time_that_is_left_goes_to_the_widest():
    """Three methods share a total: each is measured once, then the widest again and again."""
    bench = TakesTurns(a=0.2, b=0.5, c=0.001)
    bench.take("abc", MeasureSettings(precision_target=0.1, total_time_s=1000))
    assert "".join(bench.visits) == "abc" + "bb" + "ab"
    assert bench.limits[:3] == pytest.approx([1000 / 3, 1000 / 2, 1000], rel=0.01)
    assert bench.widths == {"a": 0.1, "b": 0.0625, "c": 0.001}


def test_no_method_is_visited_again_for_its_first_steps_only():
    """A compiler's, for example, which would take all of the time that is left."""
    settings = MeasureSettings(precision_target=0.1, total_time_s=100)
    for first_s, visits in ((50, "aa"), (120, "a")):
        bench = TakesTurns(a=0.2)
        bench.first_s = first_s
        bench.take("a", settings)
        assert "".join(bench.visits) == visits


def test_a_process_leaves_time_to_those_after_it():
    bench = TakesTurns(a=0.2)
    bench.take("a", MeasureSettings(precision_target=0.1, total_time_s=90), others=2)
    assert bench.visits == ["a"]
    assert bench.limits == pytest.approx([30], rel=0.01)


def test_no_method_is_measured_longer_than_allowed():
    bench = TakesTurns(a=0.2)
    bench.take("a", MeasureSettings(precision_target=0.01, total_time_s=1000, max_time_s=3))
    assert bench.visits == ["a"] * 3


def test_training_limits_measuring_to_a_tenth_of_its_time():
    """Before the first iteration is known, its method's own step says how long one takes."""
    bench = TakesTurns(none=0.0, kd=0.0)
    bench.take(["none", "kd"], MeasureSettings(), PlannedTraining(seconds=40, iterations=120))
    tenths = [(40 + 120 * 0.1) / 10, (40 + 120 * 0.5) / 10]
    assert bench.limits == pytest.approx([tenths[0] / 2, tenths[1]], abs=0.1)


def test_a_plan_of_training_counts_every_run_and_the_teacher():
    """Runs under 6@kd cost what kd does; those under 12 images are six iterations of their own."""
    study = small_study(methods=["none", "kd"], budgets=["6@kd", "2s", "12sample"], seeds=3)
    plan = training_plan(ResolvedStudy(study), ["none", "kd"])
    assert plan.seconds == 3 * 2 * 2
    assert plan.iterations == {"none": 3 * 6, "kd": 3 * (2 * 6 + 6)}
    found = plan.in_reference_iterations({"none": 1.0, "kd": 2.5}, teacher_ratio=4.0)
    assert found == PlannedTraining(12, 18 + 54 * 2.5 + 4 * 4.0)
    assert found.lasts_s(0.5) == 12 + 0.5 * found.iterations
    energy = small_study(methods=["none"], budgets=["6", "5e12flop"])
    assert training_plan(ResolvedStudy(energy), ["none"]) is None


def test_a_cost_of_a_short_training_is_measured_again_for_a_long_one(costs):
    """Not if a person set its time, if it is precise, or if little more time is allowed now."""
    study = ResolvedStudy(small_study(methods=["none"], measure__max_time_s=60))
    taken = {"taken_s": 1.0, "most_s": 1.0, "total_time_s": None, "ratio_width": 0.5}

    def rough(planned_s, **timing):
        cost = costs["none"].model_copy(update={"timing": taken | timing})
        return _rough(study, {"none": cost}, TrainingPlan(planned_s, {}, 0))

    assert rough(1000) == ["none"]
    assert rough(30) == []
    assert rough(1000, ratio_width=0.001) == []
    assert rough(1000, most_s=None) == []
    assert rough(1000, total_time_s=5.0) == []


def test_a_child_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Failure, match="died with status 1"):
        raise Failure(run_isolated(MeasureRequest("methods", {}), print).failure)


def test_what_a_dying_child_said_is_passed_on():
    assert "killed, most often by the system for lack of memory" in last_words(-9, "")
    assert last_words(-11, "a\nSegmentation fault\n").endswith("signal 11: Segmentation fault")


def test_out_of_memory_is_explained():
    told = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"))
    assert told.startswith("it ran out of memory")


STEPS = """
import torch

def _step(width):
    net = torch.nn.Linear(width, width)
    x = torch.randn(64, width)
    def step():
        loss = net(x).square().mean()
        loss.backward()
        net.zero_grad()
        return loss.detach()
    return step

def small(): return _step(64)
def large(): return _step(512)
def broken(): return _step("wide")
def empty(): return None
"""


def test_callables_are_measured_with_the_same_statistics(tmp_path):
    found = {}
    exec(STEPS, found)
    costs = package.measure_steps(
        {"small": found["small"](), "large": found["large"]()},
        device="cpu",
        max_time_s=0.05,
    )
    large = costs["large"]
    assert large.ratio.to == "small"
    assert large.ratio.low > 1
    # Forward once, backward for the weight only: the input needs no gradient.
    assert large.flop.total == 2 * 2 * 64 * 512 * 512
    assert large.flop.student is None
    assert large.phases_s is None
    assert large.unavailable["phases_s"] == "a callable step is one phase"
    assert large.bytes_moved > 4 * 512 * 512
    assert len(large.samples_s) >= 10
    with pytest.raises(UserError, match="did you mean 'small'"):
        package.measure_steps({"small": found["small"]()}, reference="smal")
    with pytest.raises(Failure, match="raised ZeroDivisionError"):
        package.measure_steps({"bad": lambda: 1 / 0}, device="cpu")


def run_here(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["kdprof", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_steps_of_files(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(STEPS)
    options = ["--device", "cpu", "--max-time", "0.05", "--in-process", "--out", tmp_path / "out"]
    steps = ["--step", tmp_path / "mine.py:small", "--step", tmp_path / "mine.py:large"]
    code, out, err = run_here(capsys, monkeypatch, "measure", *steps, *options)
    assert code == 0, err
    assert "mine.large" in out
    (file,) = (tmp_path / "out" / "steps").glob("mine.large-*.json")
    assert read_record(file, Cost).ratio.to == "mine.small"
    for step, message in (
        ("mine.py:larg", "did you mean 'large'?"),
        ("mine.py", "write FILE.py:FUNCTION"),
        ("no.py:x", "no.py; give FILE.py:FUNCTION"),
        ("mine.py:empty", "must return a callable"),
    ):
        code, _, err = run_here(capsys, monkeypatch, "measure", "--step", tmp_path / step, *options)
        assert code == 2, err
        assert message in err
    code, _, err = run_here(
        capsys, monkeypatch, "measure", "--step", tmp_path / "mine.py:broken", *options
    )
    assert code == 1
    assert "step 'mine.broken': the step raised TypeError" in err
    code, _, err = run_here(capsys, monkeypatch, "measure", *steps, "--batch", 3, *options)
    assert code == 2
    assert "--batch cannot apply" in err


def test_baseline_and_compare(capsys, monkeypatch, tmp_path):
    study, out = small_toml(tmp_path, budgets=[], methods=["none"]), tmp_path / "out"
    arguments = ["measure", "--study", study, "--out", out, "-q"]
    code, *_ = run_here(capsys, monkeypatch, *arguments)
    assert code == 0
    (stored,) = (out / "costs").iterdir()
    before = json.loads(stored.read_text())
    for factor, expected in ((100.0, 0), (0.01, 3)):
        changed = {**before, "canary": None}
        changed["samples_s"] = [[s * factor for s in r] for r in before["samples_s"]]
        changed["latency_s"] = {k: v * factor for k, v in before["latency_s"].items()}
        (tmp_path / "then.json").write_text(json.dumps(changed))
        code, _, err = run_here(
            capsys, monkeypatch, *arguments, "--baseline", tmp_path / "then.json"
        )
        assert code == expected, err
    assert "slower than the baseline: none" in err
    code, printed, _ = run_here(capsys, monkeypatch, "compare", tmp_path / "then.json", out)
    assert code == 0
    assert "slower" in printed
    code, _, err = run_here(
        capsys, monkeypatch, *arguments, "--baseline", tmp_path / "nothing.json"
    )
    assert code == 2


def test_a_chrome_trace_is_written(capsys, monkeypatch, tmp_path):
    study = small_toml(tmp_path, budgets=[], methods=["none"])
    options = ["--study", study, "--out", tmp_path / "out", "-q"]
    code, _, err = run_here(
        capsys, monkeypatch, "measure", *options, "--trace", tmp_path / "trace.json"
    )
    assert code == 0, err
    names = {
        e.get("name") for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert any("convolution" in str(name) for name in names)
    code, _, err = run_here(
        capsys, monkeypatch, "measure", *options, "--memory-timeline", tmp_path / "m.pickle"
    )
    assert code == 2
    assert "a CPU does not have" in err


@pytest.mark.slow
def test_one_reference_cost_per_folder(capsys, monkeypatch, tmp_path):
    """Measuring one more method leaves the reference's Cost, and plans made with it, alone."""
    study, out = small_toml(tmp_path, budgets=[], methods=["kd"]), tmp_path / "out"
    run_here(capsys, monkeypatch, "measure", "--study", study, "--out", out, "-q")
    before = {path.name: path.read_text() for path in (out / "costs").iterdir()}
    assert {name.split("-")[0] for name in before} == {"none", "kd"}
    run_here(capsys, monkeypatch, "measure", "--out", out, "--method", "fitnet", "-q")
    after = {path.name: path.read_text() for path in (out / "costs").iterdir()}
    assert len(after) >= 3
    assert all(after[name] == text for name, text in before.items() if name.startswith("none"))


def test_steps_of_one_name_are_refused(capsys, monkeypatch, tmp_path):
    """They would be compared with themselves."""
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.py").write_text(STEPS)
    code, _, err = run_here(
        capsys, monkeypatch, "measure", "--device", "cpu", "--out", tmp_path / "out",
        "--step", tmp_path / "old" / "train.py:small", "--step", tmp_path / "new/train.py:small",
    )  # fmt: skip
    assert code == 2
    assert "two steps are called train.small" in err


def test_other_steps_survive_a_bad_one():
    found = {}
    exec(STEPS, found)
    with pytest.raises(Failure, match="step 'bad': the step raised ZeroDivisionError") as error:
        package.measure_steps(
            {"good": found["small"](), "bad": lambda: 1 / 0}, device="cpu", max_time_s=0.01
        )
    assert error.value.costs["good"].latency_s.median > 0
    assert error.value.costs["good"].unavailable["mfu"] == "the step's precision was not given"


def test_a_steps_trace(capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(STEPS)
    code, out, err = run_here(
        capsys, monkeypatch, "measure", "--device", "cpu", "--out", tmp_path / "out", "--step",
        tmp_path / "mine.py:small", "--trace", tmp_path / "trace.json", "--in-process",
        "--max-time", "0.01",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "steps.md" in out
    assert "mine.small" in (tmp_path / "out" / "reports" / "steps.md").read_text()


def test_flags_of_one_call_are_not_the_folders(capsys, monkeypatch, tmp_path):
    study, out = small_toml(tmp_path, budgets=[], measure__in_process=False), tmp_path / "out"
    code, _, err = run_here(
        capsys, monkeypatch, "measure", "--study", study, "--method", "none", "--out", out, "-q",
        "--in-process", "--max-time", "0.01", "--precision-target", "0.5",
    )  # fmt: skip
    assert code == 0, err
    written = (out / "study.toml").read_text()
    assert "in_process = false" in written
    assert "precision_target = 0.01" in written


def test_one_method_that_cannot_fit_does_not_spoil_the_others(tmp_path, monkeypatch):
    from kdprof.measure.counting import count_study as module

    resolved = ResolvedStudy(small_study(methods=["none", "ifvd"]))
    needs = {name: made.least_memory_bytes for name, made in module.counts(
        resolved, ["none", "ifvd"], Progress(None), "cpu")}  # fmt: skip
    assert needs["none"] < needs["ifvd"]
    monkeypatch.setattr(module, "available_bytes", lambda device: needs["ifvd"] - 1)
    kept = []
    found = measure(resolved, ["none", "ifvd"], Progress(None), keep=kept.append)
    assert "GiB free; lower --crop or --batch" in found.failures["ifvd"]
    assert [cost.method for cost in kept] == ["none"]
    monkeypatch.setattr(module, "available_bytes", lambda device: 1)
    with pytest.raises(UserError) as error:
        measure(resolved, ["none", "ifvd"], Progress(None))
    assert len(error.value.problems) == 2


def test_what_a_method_prints_is_not_among_the_records(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text(
        MY_METHOD.replace("        return {", "        print('hello from mine')\n        return {")
    )
    study = small_toml(tmp_path, budgets=[], methods=[f"{tmp_path}/mine.py:MyKD"])
    for flags in ([], ["--count-only"]):
        code, out, err = run_here(
            capsys, monkeypatch, "measure", "--study", study, "--out", tmp_path / "out", "--json",
            *flags,
        )  # fmt: skip
        assert code == 0, err
        assert {cost["method"] for cost in json.loads(out)} == {"none", "mykd"}
        assert "hello from mine" in err
