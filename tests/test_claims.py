"""Claims: read, judged, written, verified on a copied folder; and seeds added until they decide."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from simulated_verdicts import Setting, simulate

from kdprof.claims import Claim, parse_claim
from kdprof.cli import cli
from kdprof.decide import Plan, decide
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.records import ClaimRecord, Run
from kdprof.reports import judge
from kdprof.reports.claims import make_claim, verify, write_claim
from kdprof.reports.decisions import looks, outcome, why_no_gain, within_seeds
from kdprof.reports.results import Results, collect
from kdprof.store import Store, read_record, write_record
from kdprof.study import Study, load_study
from kdprof.workflow import Workflow

BUDGET = "4000@none"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Five methods at three budgets with three seeds, as files."""
    return stored(
        tmp_path / "out", simulate(Setting(5, 3, 3), np.random.default_rng(3))[0].finished
    )


def stored(root: Path, runs: Sequence[Run]) -> Store:
    made = Store(root)
    root.mkdir(parents=True, exist_ok=True)
    made.study.write_text(load_study(None, {"device": "cpu"}).to_toml())
    for run in runs:
        folder = made.run_folder(run.method, run.budget, run.seed)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_record(folder.record, run)
    return made


# Reading


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("a > b @ 40k@cwd", Claim("a", "b", ">", "40k@cwd", 0.0)),
        ("cwd:feature<kd @ 2h", Claim("cwd:feature", "kd", "<", "2h", 0.0)),
        ("a ~ b within 0.3 @ 5e17flop", Claim("a", "b", "~", "5e17flop", 0.3)),
        ("gain(a, b) > 1.2", Claim("a", "b", ">", None, 1.2)),
        ("gain( a,b ) < 0.9 on flop", Claim("a", "b", "<", None, 0.9, "flop")),
    ],
)
def test_a_claim_is_read_and_written_again(text, claim):
    assert parse_claim(text) == claim
    assert parse_claim(claim.text()) == claim


@pytest.mark.parametrize("factor", [1e-5, 1e6, 123456.789, 0.1 + 0.2, 3.0])
def test_no_digit_of_a_claim_is_lost(factor):
    claim = Claim("a", "b", ">", None, factor)
    assert parse_claim(claim.text()) == claim


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a > b", "malformed"),
        ("a = b @ 2h", "malformed"),
        ("a ~ b @ 2h", "needs 'within POINTS'"),
        ("a > b within 1 @ 2h", "'>' and '<' have none"),
        ("a > a @ 2h", "compares a with itself"),
        ("a > b @ 2parsec", "unknown unit"),
        ("a ~ b within 0 @ 2h", "must be above 0"),
        ("gain(a, b) > 0", "a finite factor above 0"),
        ("gain(a, b) > 1e309", "a finite factor above 0"),
        ("a ~ b within 1e309 @ 2h", "at most 100"),
        ("a ~ b within 101 @ 2h", "at most 100"),
        ("gain(a b) > 1", "malformed"),
    ],
)
def test_a_malformed_claim_is_refused_with_an_example_or_a_cause(text, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse_claim(text)


# Judging


@pytest.mark.parametrize(
    "name", ["..", "a/b", ".a", " ", "a\x1b", "a b", "a`b", "a%b", "\udcff", "x" * 201]
)
def test_a_claim_is_not_written_by_a_name_that_is_none(store, name):
    made = make_claim(store, f"m1 > m0 @ {BUDGET}")
    before = sorted(store.root.rglob("*"))
    with pytest.raises(UserError, match="must be a file name of letters"):
        write_claim(store, made, name)
    assert sorted(store.root.rglob("*")) == before


def test_outcomes_follow_the_interval(store):
    pair = next(p for p in judge.judge(collect(store)).pairs if p.budget == BUDGET and p.low > 0.01)
    better, worse = pair.first, pair.second
    assert make_claim(store, f"{better} > {worse} @ {BUDGET}").outcome == "supported"
    assert make_claim(store, f"{worse} < {better} @ {BUDGET}").outcome == "supported"
    assert make_claim(store, f"{better} < {worse} @ {BUDGET}").outcome == "contradicted"
    wide = f"{better} ~ {worse} within {pair.high + 0.1:.2f} @ {BUDGET}"
    assert make_claim(store, wide).outcome == "supported"
    narrow = f"{better} ~ {worse} within 0.001 @ {BUDGET}"
    assert make_claim(store, narrow).outcome == "contradicted"
    middle = f"{better} ~ {worse} within {pair.difference:.4f} @ {BUDGET}"
    assert make_claim(store, middle).outcome == "undecided"


def test_a_gain_is_claimed_on_an_axis(store):
    gains = judge.judge(collect(store)).gains
    known = next(g for g in gains if g.axis == "iterations" and g.low and g.high)
    base = f"gain({known.method}, {known.versus})"
    claimed = make_claim(store, f"{base} > {0.9 * known.low:.3f} on iterations")
    assert claimed.outcome == "supported"
    assert claimed.effect.value == pytest.approx(known.value)
    assert (
        make_claim(store, f"{base} > {1.1 * known.high:.3f} on iterations").outcome
        == "contradicted"
    )
    assert make_claim(store, f"{base} < {known.value:.3f} on iterations").outcome == "undecided"


def test_one_seed_decides_nothing(tmp_path):
    runs = simulate(Setting(3, 2, 1), np.random.default_rng(0))[0].finished
    found = make_claim(stored(tmp_path, runs), f"kd > none @ {BUDGET}")
    assert (found.outcome, found.reason) == (
        "undecided",
        "one seed, so no interval",
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("kdd > none @ 4000@none", "unknown trained method 'kdd'; did you mean 'kd'"),
        ("kd > none @ 400@none", "unknown trained budget '400@none'; did you mean '4000@none'"),
        ("gain(kd, none) > 1 on second", "unknown axis 'second'; did you mean 'seconds'"),
    ],
)
def test_names_that_the_folder_lacks_get_the_nearest_one(store, statement, message):
    with pytest.raises(UserError) as caught:
        make_claim(store, statement)
    assert message in str(caught.value)


# The command line, in processes


def kdprof(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run kdprof in a process that cannot import torch."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ImportError('torch is not installed')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from kdprof.cli import main; main()"
    )
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_a_claim_is_verified_on_a_copied_folder_without_torch_and_a_changed_digit_is_caught(store):
    out = store.root
    made = kdprof("claim", f"m0 > kd @ {BUDGET}", "gain(m0, kd) > 1.1", "--out", str(out), cwd=out)
    assert made.returncode == 0, made.stderr
    names = [f"m0-gt-kd-{BUDGET}", "gain-m0-kd-gt-1.1"]
    for name in names:
        assert {p.suffix for p in (out / "claims").glob(f"{name}.*")} == {".json", ".md", ".tex"}
    copy = out.parent / "copy"
    shutil.copytree(out, copy)
    files = [f"claims/{name}.json" for name in names]
    same = kdprof("verify", *files, cwd=copy)
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("confirmed") == 2

    run = copy / "runs" / "m0" / BUDGET / "1" / "run.json"
    text = run.read_text()
    place = text.index('"miou": 0.') + len('"miou": 0.') + 3
    run.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    changed = kdprof("verify", *files, cwd=copy)
    assert changed.returncode == 1
    assert changed.stdout.count(f"runs/m0/{BUDGET}/1/run.json has changed") == 2
    assert "effect.value" in changed.stdout


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda folder, claim: claim.write_text("{"), 2, "no ClaimRecord record"),
        (lambda folder, claim: claim.unlink(), 2, "is no file"),
        (lambda folder, claim: (folder / "study.toml").unlink(), 2, "holds no study"),
        (
            lambda folder, claim: claim.write_text(
                claim.read_text().replace('"contradicted"', '"supported"')
            ),
            1,
            "outcome: ",
        ),
        (lambda folder, claim: shutil.rmtree(folder / "runs/kd" / BUDGET / "0"), 1, "is missing"),
        (lambda folder, claim: shutil.rmtree(folder / "runs/kd" / BUDGET), 1, "cannot be computed"),
    ],
)  # fmt: skip
def test_verify_says_what_is_wrong(store, damage, code, message):
    path = store.claims / f"m0-gt-kd-{BUDGET}.json"
    runner = CliRunner()
    statement = f"m0 > kd @ {BUDGET}"
    assert runner.invoke(cli, ["claim", statement, "--out", str(store.root)]).exit_code == 0
    damage(store.root, path)
    done = runner.invoke(cli, ["verify", str(path)])
    text = f"{done.output} {done.exception}"
    assert message in text
    assert (getattr(done.exception, "exit_code", done.exit_code) or done.exit_code) == code


def test_a_claim_has_what_a_reader_must_know(store):
    record = make_claim(store, f"m0 > kd @ {BUDGET}", confidence=0.9)
    assert record.seeds == {"m0": 3, "kd": 3}
    assert record.devices == ["simulated"]
    assert "the teacher's training" in record.not_counted
    assert record.files.keys() >= {"study.toml", f"runs/m0/{BUDGET}/2/run.json"}
    assert record.unavailable["cost_ratio"]
    assert record.effect.low < record.effect.value < record.effect.high
    narrow = make_claim(store, f"m0 > kd @ {BUDGET}", confidence=0.99)
    assert narrow.effect.low < record.effect.low


def test_a_record_that_was_trained_later_is_named(store):
    path = store.claims / "c.json"
    write_record(path, make_claim(store, f"m0 > kd @ {BUDGET}"))
    run = store.runs()[0]
    write_record_in(store, run.model_copy(update={"seed": 9}))
    assert [p for p in verify(path).problems if "is new" in p]


def write_record_in(store: Store, run: Run) -> None:
    folder = store.run_folder(run.method, run.budget, run.seed)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_record(folder.record, run)


REFERENCE = Path(__file__).parent.parent / "reports" / "reference" / "camvid-cpu"


def test_the_reference_of_this_repository_is_verified_and_a_digit_of_it_guarded(tmp_path):
    copy = tmp_path / "camvid-cpu"
    shutil.copytree(REFERENCE, copy)
    claims = sorted((copy / "claims").glob("*.json"))
    assert len(claims) >= 5
    assert {path.name: verify(path).problems for path in claims} == {p.name: [] for p in claims}
    run = copy / "runs" / "kd" / "480@cwd" / "0" / "run.json"
    text = run.read_text()
    place = text.index('"miou": 0.') + len('"miou": 0.') + 4
    run.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    found = verify(copy / "claims" / "none-gt-kd-480@cwd.json").problems
    assert "runs/kd/480@cwd/0/run.json has changed" in found
    assert any(problem.startswith("effect.value") for problem in found)


# Seeds until decided


def results_of(first: Sequence[float], second: Sequence[float], budget: str = "2h") -> Results:
    template = simulate(Setting(3, 1, 1), np.random.default_rng(0))[0].finished[0]
    runs = [
        template.model_copy(
            update={"method": name, "budget": budget, "seed": seed, "miou": m / 100}
        )
        for name, values in (("a", first), ("b", second))
        for seed, m in enumerate(values)
    ]
    return Results(runs, [], None, {"step": {"batch": 8}}, [])


def test_looks_end_when_the_claim_is_decided():
    first = [71.0, 71.1, 70.9, 71.0, 71.05, 71.0, 71.0, 71.0]
    results = results_of(first, [70.0] * 8)
    claim = parse_claim("a > b @ 2h")
    found = looks(claim, results, 0.95, 12)
    assert len(found) < 7
    assert outcome(claim, found[-1]) == "supported"
    assert [look.seeds for look in found] == list(range(2, len(found) + 2))
    assert len(looks(claim, results, 0.95, 3)) == 2
    assert outcome(parse_claim("a < b @ 2h"), found[-1]) == "contradicted"
    same = parse_claim("a ~ b within 5 @ 2h")
    assert outcome(same, looks(same, results, 0.95, 12)[-1]) == "supported"


def test_a_gain_is_decided_by_the_curves_of_each_seed():
    study = simulate(Setting(3, 3, 4, noise=0.01), np.random.default_rng(0))[0]
    (known,) = [
        g for g in judge.judge(study).gains
        if (g.method, g.versus, g.axis) == ("m0", "kd", "iterations")
    ]  # fmt: skip
    below = within_seeds(
        parse_claim(f"gain(m0, kd) > {0.9 * known.value:.3f} on iterations"), study
    )
    above = within_seeds(
        parse_claim(f"gain(m0, kd) > {1.1 * known.value:.3f} on iterations"), study
    )
    assert len(below) == 4
    assert min(below) > 0 > max(above)


GAIN = "gain(m0, kd) > 1.2 on iterations"


def test_a_gain_of_curves_that_fall_with_compute_is_not_decided(tmp_path):
    study = simulate(Setting(3, 3, 4, noise=0.01), np.random.default_rng(0))[0]
    falling = [run.model_copy(update={"miou": 1 - (run.miou or 0.0)}) for run in study.finished]
    why, finally_ = why_no_gain(parse_claim(GAIN), replace(study, finished=falling), 0.95)
    assert why.startswith("accuracy of m0 and kd does not rise with compute, so there is no gain")
    assert finally_
    with pytest.raises(UserError, match="no gain of m0 over kd: accuracy of m0 and kd does not"):
        make_claim(stored(tmp_path, falling), GAIN)


def test_a_gain_waits_for_seeds_that_show_that_accuracy_rises():
    """Noise of five points hides the rise between budgets, which more seeds would show."""
    quiet, noisy = (
        simulate(Setting(3, 3, 4, noise=noise), np.random.default_rng(0))[0]
        for noise in (0.01, 5.0)
    )
    assert why_no_gain(parse_claim(GAIN), quiet, 0.95) == ("", False)
    why, finally_ = why_no_gain(parse_claim(GAIN), noisy, 0.95)
    assert "may not rise with compute, by these seeds" in why
    assert not finally_
    assert why_no_gain(parse_claim("m0 > kd @ 10k@kd"), noisy, 0.95) == ("", False)


def test_equal_scores_end_a_claim_about_a_gain():
    """Their slope is 0 without an error, so that no seed would change it."""
    study = simulate(Setting(3, 3, 4, noise=0.01), np.random.default_rng(0))[0]
    equal = [run.model_copy(update={"miou": 0.7}) for run in study.finished]
    _, finally_ = why_no_gain(parse_claim(GAIN), replace(study, finished=equal), 0.95)
    assert finally_


class Trainer:
    """Writes the runs that a study asks for, with known differences between methods."""

    def __init__(self, store: Store, points: dict[str, float], noise: float):
        self.store, self.points, self.noise = store, points, noise
        self.studies: list[Study] = []
        self.template = simulate(Setting(3, 1, 1), np.random.default_rng(0))[0].finished[0]

    def __call__(self, workflow: Workflow) -> list[str]:
        study = workflow.study
        self.studies.append(study)
        for method in study.methods:
            for budget in study.budgets:
                for seed in range(study.seeds):
                    rng = np.random.default_rng([seed, len(method), ord(method[0])])
                    miou = 60 + self.points[method] + self.noise * rng.standard_normal()
                    change = {"method": method, "budget": budget, "seed": seed, "miou": miou / 100}
                    write_record_in(self.store, self.template.model_copy(update=change))
        return []


def a_workflow(root: Path) -> Workflow:
    store = stored(root, [])
    return Workflow(load_study(None, {"device": "cpu"}), store, Progress(None), control=False)


def test_decide_adds_seeds_to_undecided_claims_only_and_stores_what_it_saved(tmp_path):
    workflow = a_workflow(tmp_path)
    trainer = Trainer(workflow.store, {"cwd": 5.0, "kd": 0.0, "fitnet": 0.05}, noise=0.5)
    claims = [parse_claim("cwd > kd @ 2h"), parse_claim("fitnet > kd @ 2h")]
    decisions, failures = decide(workflow, Plan(claims, (), 0.95, 8), trainer)
    assert failures == []
    clear, close = decisions
    assert (clear.statement, clear.outcome) == ("cwd > kd @ 2h", "supported")
    assert 2 < clear.seeds < 8
    # kd was trained for the other claim, too: only runs of cwd were saved.
    assert clear.saved_runs == 8 - clear.seeds
    assert clear.saved_s == pytest.approx(clear.saved_runs * trainer.template.train_s.actual)
    assert (close.outcome, close.seeds, close.saved_runs) == ("undecided", 8, 0)
    assert {tuple(study.methods) for study in trainer.studies} == {("cwd", "kd"), ("fitnet", "kd")}
    assert [s.seeds for s in trainer.studies if "fitnet" in s.methods] == list(range(4, 9))
    assert max(s.seeds for s in trainer.studies if "cwd" in s.methods) == clear.seeds
    assert load_study(str(workflow.store.study), {}).seeds == 1
    assert sorted(workflow.store.decisions(), key=lambda d: d.statement) == decisions


def test_a_stopped_comparison_is_named_wherever_its_runs_are_compared(tmp_path):
    workflow = a_workflow(tmp_path)
    trainer = Trainer(workflow.store, {"cwd": 5.0, "kd": 0.0}, noise=0.5)
    decide(workflow, Plan([parse_claim("cwd > kd @ 2h")], (), 0.95, 8), trainer)
    note = "Seeds were added until 'cwd > kd @ 2h' was decided"
    results = collect(workflow.store)
    assert any(note in line for line in judge.judge(results).notes)
    claim = make_claim(workflow.store, "cwd > kd @ 2h")
    assert any(note in line for line in claim.notes)
    assert any(path.startswith("decisions/") for path in claim.files)


def test_an_interrupted_comparison_is_not_hidden(tmp_path):
    workflow = a_workflow(tmp_path)
    trainer = Trainer(workflow.store, {"cwd": 0.1, "kd": 0.0}, noise=0.5)

    def interrupted(made: Workflow) -> list[str]:
        if made.study.seeds == 6:
            raise KeyboardInterrupt
        return trainer(made)

    with pytest.raises(KeyboardInterrupt):
        decide(workflow, Plan([parse_claim("cwd > kd @ 2h")], (), 0.95, 8), interrupted)
    (stored_decision,) = workflow.store.decisions()
    assert (stored_decision.outcome, stored_decision.seeds) == ("undecided", 5)


def test_decide_ends_with_the_failures_of_the_training(tmp_path):
    workflow = a_workflow(tmp_path)
    plan = Plan([parse_claim("cwd > kd @ 2h")], (), 0.95, 8)
    (decision,), failures = decide(workflow, plan, lambda made: ["cwd 2h seed 0: not finite"])
    assert failures == ["cwd 2h seed 0: not finite"]
    assert decision.outcome == "undecided"


@pytest.mark.parametrize("trained", [False, True])
def test_a_refused_study_leaves_no_decision(tmp_path, trained):
    """Nothing was compared, so no report may say that seeds were added until it was decided."""
    made = simulate(Setting(2, 1, 2), np.random.default_rng(3))[0].finished if trained else []
    workflow = a_workflow(tmp_path / "study")
    store = stored(tmp_path / "out", made)
    before = sorted(store.root.rglob("*"))

    def refuse(made: Workflow) -> list[str]:
        assert made.store.decisions()
        raise UserError("device 'nosuch' is not known")

    plan = Plan([parse_claim("kd > none @ 2h")], (), 0.95, 4)
    with pytest.raises(UserError, match="nosuch"):
        decide(replace(workflow, store=store), plan, refuse)
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize("number", [3, 4])
def test_fewer_seeds_than_can_decide_are_refused(tmp_path, number):
    plan = Plan([parse_claim("cwd > kd @ 2h")], (), 0.95, number)
    trainer = Trainer(Store(tmp_path), {"cwd": 30.0, "kd": 0.0}, noise=0.1)
    if number == 4:
        assert decide(a_workflow(tmp_path), plan, trainer)[0][0].outcome == "supported"
        return
    with pytest.raises(UserError, match="fewer than 4 seeds"):
        decide(a_workflow(tmp_path), plan, trainer)


def test_decide_refuses_all_that_it_cannot_decide_at_once(tmp_path):
    plan = Plan([parse_claim("gain(cwd, kdd) > 1.2 on second")], (), 1.5, 1)
    with pytest.raises(UserError) as caught:
        decide(a_workflow(tmp_path), plan, lambda made: [])
    assert len(caught.value.problems) == 4


def test_the_record_of_a_claim_is_read_back(store, tmp_path):
    record = make_claim(store, f"m0 > kd @ {BUDGET}")
    path = tmp_path / "claim.json"
    write_record(path, record)
    assert read_record(path, ClaimRecord) == record
    assert json.loads(path.read_text())["schema"] == 1
