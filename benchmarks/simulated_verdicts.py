"""Are verdicts right? Simulated studies whose true gains, differences and ranks are known.

A study has methods x budgets x seeds. The true mIoU of a method is one concave curve of the log of
its effective iterations; a method has a cost per iteration (its budget in seconds buys fewer
iterations) and a gain (an iteration of it counts as several). Noise has an effect of the seed that
all methods share, and a part of each run, which under a trunk is correlated between budgets.
Everything is judged by :func:`kdprof.reports.judge.judge`, from records like those on disk.

    python benchmarks/simulated_verdicts.py --studies 1000

    python benchmarks/simulated_verdicts.py --decide 10000

The first prints the table of docs/verdicts.md: how often intervals contain the truth (aim: 93 to
97 %) and how often a rank flip is called that is none (aim: at most 5 %); it takes about 25 minutes
on one core. The second prints how often ``kdprof decide`` is wrong (aim: at most 5 %), and how many
seeds it needs.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import numpy as np

from kdprof.records import Run, Spent
from kdprof.reports.judge import judge
from kdprof.reports.results import Results
from kdprof.reports.verdict import Verdict
from kdprof.reports.verdict_text import SURE
from kdprof.stats.intervals import mean_interval
from kdprof.stats.sequential import EFFECT_SCALE, confidence_sequence

FIRST_ITERATIONS = 2000
SECONDS = 0.1
"""Of one iteration of the cheapest method."""


@dataclass(frozen=True)
class Setting:
    """What a group of simulated studies has in common."""

    methods: int = 5
    budgets: int = 3
    seeds: int = 3
    noise: float = 0.4
    """Standard deviation of a run, percentage points."""
    seed_effect: float = 0.2
    """Standard deviation of what all methods share under one seed and budget."""
    trunk: bool = False
    """True if the budgets of a method and seed share a trunk: their noise has correlation 0.6."""
    uneven: float = 1.0
    """Ratio of the largest to the smallest standard deviation among methods."""
    equal: bool = False
    """True if all methods have the same curve over seconds: every order is chance."""

    def text(self) -> str:
        """Return the setting as the first cell of a row of the table."""
        extra = [f"noise {self.noise:g}"] if self.noise != Setting.noise else []
        extra += ["trunk"] if self.trunk else []
        extra += [f"noise differs {self.uneven:g}x"] if self.uneven > 1 else []
        extra += ["all methods equal"] if self.equal else []
        sizes = f"{self.methods} x {self.budgets} x {self.seeds}"
        return ", ".join([sizes, *extra])


SETTINGS = (
    Setting(3, 2, 2),
    Setting(3, 3, 3),
    Setting(3, 4, 5),
    Setting(5, 3, 3, noise=1.0),
    Setting(8, 3, 3),
    Setting(8, 4, 2, trunk=True),
    Setting(5, 4, 5, trunk=True),
    Setting(20, 2, 2),
    Setting(20, 4, 3, trunk=True),
    Setting(5, 3, 3, equal=True),
    Setting(5, 3, 5, uneven=3.0),
)


@dataclass(frozen=True)
class Truth:
    """The curves behind a simulated study."""

    gains: dict[str, float]
    """Effective iterations per iteration."""
    costs: dict[str, float]
    """Seconds per iteration."""

    def miou(self, method: str, iterations: float) -> float:
        """Return the true mIoU after some iterations, percentage points."""
        effective = self.gains[method] * iterations / FIRST_ITERATIONS
        return 78.0 - 10.0 * effective**-0.4

    def at(self, axis: str, method: str, amount: float) -> float:
        """Return the true mIoU at an amount of iterations or seconds."""
        per = self.costs[method] if axis == "seconds" else 1.0
        return self.miou(method, amount / per)

    def gain(self, axis: str, method: str, versus: str) -> float:
        """Return the true compute-equivalent gain."""
        found = self.gains[method] / self.gains[versus]
        return found * self.costs[versus] / self.costs[method] if axis == "seconds" else found


def simulate(setting: Setting, rng: np.random.Generator) -> tuple[Results, Truth]:
    """Return the runs of one study, as they would be read from disk, and the truth."""
    names = ["kd", "none", *(f"m{i}" for i in range(setting.methods - 2))]
    costs = SECONDS * np.exp(rng.uniform(0, 1.0, len(names)))
    gains = costs / SECONDS if setting.equal else np.exp(rng.normal(0, 0.4, len(names)))
    truth = Truth(dict(zip(names, gains, strict=True)), dict(zip(names, costs, strict=True)))
    spread = setting.noise * np.geomspace(1, setting.uneven, len(names))
    shape = (setting.budgets, setting.seeds)
    shared = setting.seed_effect * rng.standard_normal(shape)
    runs = [
        _run(truth, method, budget, seed, error, trunk=setting.trunk)
        for method, deviation in zip(names, spread, strict=True)
        for (budget, seed), error in np.ndenumerate(shared + deviation * _errors(setting, rng))
    ]
    return Results(runs, [], None, {"step": {"batch": 8}}, []), truth


def _errors(setting: Setting, rng: np.random.Generator) -> np.ndarray:
    """Return errors of variance 1 of one method, budgets x seeds."""
    own = rng.standard_normal((setting.budgets, setting.seeds))
    if not setting.trunk:
        return own
    return math.sqrt(0.6) * rng.standard_normal(setting.seeds) + math.sqrt(0.4) * own


def _run(truth: Truth, method: str, budget: int, seed: int, error: float, *, trunk: bool) -> Run:
    seconds = FIRST_ITERATIONS * SECONDS * 2**budget
    iterations = round(seconds / truth.costs[method])
    seconds = iterations * truth.costs[method]
    miou = (truth.miou(method, iterations) + error) / 100
    return Run(
        method=method,
        budget=f"{FIRST_ITERATIONS * 2**budget}@none",
        seed=seed,
        device="simulated",
        iterations=iterations,
        schedule_iterations=iterations,
        iterations_done=iterations,
        miou=miou,
        miou_per_class=None,
        best_miou=miou,
        train_s=Spent(planned=seconds, actual=seconds),
        trunk_s=0.5 * seconds if trunk else 0.0,
        eval_s=0.0,
        checkpoint_s=0.0,
        flop=None,
        energy_j=None,
        cost_key=None,
        finished=True,
        versions={},
    )  # fmt: skip


@dataclass
class Score:
    """Counts of right answers: hits and trials of each kind."""

    pairs: tuple[int, int] = (0, 0)
    together: tuple[int, int] = (0, 0)
    gains: tuple[int, int] = (0, 0)
    flips: tuple[int, int] = (0, 0)
    """Flips called that are none, out of all pairs."""
    studies: tuple[int, int] = (0, 0)
    """Studies with at least one such flip."""

    def add(self, kind: str, hits: int, trials: int) -> None:
        """Add hits and trials of a kind."""
        before = getattr(self, kind)
        setattr(self, kind, (before[0] + hits, before[1] + trials))


def score(verdict: Verdict, truth: Truth, results: Results, score: Score) -> None:
    """Compare a verdict with the truth."""
    contained = {}
    for pair in verdict.pairs:
        runs = [results.group(name, pair.budget)[0] for name in (pair.first, pair.second)]
        true = np.subtract(*(truth.miou(run.method, run.iterations) for run in runs))
        assert pair.low is not None
        assert pair.high is not None
        score.add("pairs", pair.low <= true <= pair.high, 1)
        assert pair.simultaneous_low is not None
        assert pair.simultaneous_high is not None
        inside = pair.simultaneous_low <= true <= pair.simultaneous_high
        contained[pair.budget] = contained.get(pair.budget, True) and inside
    score.add("together", sum(contained.values()), len(contained))
    for gain in verdict.gains:
        if gain.value is None or gain.axis not in ("iterations", "seconds"):
            continue
        true = truth.gain(gain.axis, gain.method, gain.versus)
        above = gain.low is None or gain.low <= true
        below = gain.high is None or true <= gain.high
        score.add("gains", above and below, 1)
    _score_flips(verdict, truth, score)


def _score_flips(verdict: Verdict, truth: Truth, score: Score) -> None:
    at = {standing.axis: standing.at for standing in verdict.standings}
    false = 0
    for flip in verdict.flips:
        if (flip.probability or 0) < SURE:
            continue
        gaps = [
            truth.at(axis, flip.first, at[axis]) - truth.at(axis, flip.second, at[axis])
            for axis in flip.axes
        ]
        false += not (gaps[0] > 1e-9 and gaps[1] < -1e-9)
    methods = len(verdict.standings[0].miou_percent) if verdict.standings else 0
    score.add("flips", false, methods * (methods - 1) // 2)
    score.add("studies", false > 0, 1)


def run(setting: Setting, studies: int) -> Score:
    """Judge some studies of a setting."""
    rng = np.random.default_rng(0)
    found = Score()
    for _ in range(studies):
        results, truth = simulate(setting, rng)
        score(judge(results), truth, results, found)
    return found


def row(setting: Setting, found: Score) -> str:
    """Return a row of the table: shares in percent."""
    cells = [
        f"{100 * hits / trials:.1f}" if trials else "-"
        for hits, trials in (found.pairs, found.together, found.gains, found.flips, found.studies)
    ]
    return f"| {setting.text()} | " + " | ".join(cells) + " |"


# Sequential decisions

EFFECTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
"""True differences in standard deviations of the difference within a seed."""
MAX_SEEDS = 12


@dataclass
class Decided:
    """How simulated sequential comparisons of one true difference ended."""

    wrong: int = 0
    right: int = 0
    seeds: int = 0
    fixed_right: int = 0
    """How often the ordinary t-test with all seeds is right."""


def decide(effect: float, studies: int, scale: float, confidence: float = 0.95) -> Decided:
    """Decide whether A is better than B, looking after every seed, in simulated studies.

    With a true difference of 0 every decision is wrong.
    """
    rng = np.random.default_rng(0)
    found = Decided()
    for differences in effect + rng.standard_normal((studies, MAX_SEEDS)):
        for count in range(2, MAX_SEEDS + 1):
            low, high = confidence_sequence(differences[:count], confidence, scale=scale)
            if low > 0 or high < 0:
                found.right += low > 0 and effect > 0
                found.wrong += high < 0 or effect == 0
                break
        found.seeds += count
        fixed_low, *_ = mean_interval_of(differences)
        found.fixed_right += effect > 0 and fixed_low > 0
    return found


def mean_interval_of(differences: np.ndarray) -> tuple[float, float]:
    """Return the ends of the ordinary 95 % interval of the mean."""
    _, low, high = mean_interval(differences)
    assert low is not None
    assert high is not None
    return low, high


def print_decisions(studies: int, scale: float) -> None:
    """Print the table of sequential decisions."""
    print("| true difference / sd | wrong % | decided rightly % | mean seeds | all 12 seeds: % |")
    print("| --: | --: | --: | --: | --: |")
    for effect in EFFECTS:
        found = decide(effect, studies, scale)
        shares = [100 * n / studies for n in (found.wrong, found.right, found.fixed_right)]
        print(
            f"| {effect:g} | {shares[0]:.1f} | {shares[1]:.1f} | {found.seeds / studies:.1f} "
            f"| {shares[2]:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--noise", type=float, help="of all settings, percentage points")
    parser.add_argument("--decide", type=int, metavar="STUDIES", help="sequential decisions")
    parser.add_argument("--scale", type=float, default=EFFECT_SCALE, help="prior of --decide")
    given = parser.parse_args()
    if given.decide:
        print_decisions(given.decide, given.scale)
        return
    print(
        "| methods x budgets x seeds | pair | all pairs | gain | false flips | studies with one |"
    )
    print("| :-- | --: | --: | --: | --: | --: |")
    for setting in SETTINGS:
        chosen = setting if given.noise is None else replace(setting, noise=given.noise)
        print(row(chosen, run(chosen, given.studies)), flush=True)


if __name__ == "__main__":
    main()
