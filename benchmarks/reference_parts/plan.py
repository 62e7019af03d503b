"""What the reference consists of, how long it is thought to take, and how the minutes are divided.

Nothing here needs torch: the process that divides the time must not touch the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kdprof.records import ATLAS_METHOD, CONTROL, REFERENCE

MAIN_SETTING = "cityscapes-pspnet-r18"
FIRST = (REFERENCE, CONTROL, ATLAS_METHOD)
"""The methods that every other one is compared with; they are measured first."""
BUDGETS_S = (0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 90, 120, 180, 240, 300)
MULTIPLES = (1, 2, 4)
"""Of the smallest budget: the budgets of the study, which share trunks (wsd)."""
DECAY = 0.2
"""The part of a run over which the learning rate falls, which runs do not share."""
LEAST_ITERATIONS = 5
"""Iterations of the dearest method under the smallest budget."""
TEACHER_SHARE = 0.15
"""Of the study's time, for training the teacher."""
TEACHER_STEPS = 3.0
"""A training step of the teacher takes about so many of its forwards."""
OBJECTIVE_SHARE = 0.05
"""Objectives that take a larger share of a step are compared with their written-out form."""


@dataclass(frozen=True)
class Setting:
    """A published setting of the atlas: a preset, and what differs from it."""

    name: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One measurement of the atlas, at a setting and a precision.

    Attributes:
        what: the methods; their variants; or the energy of both, where the timed blocks were too
            short for the energy counter: they are measured again, with a window for it.
    """

    setting: Setting
    precision: str
    what: Literal["methods", "variants", "energy"]

    @property
    def folder(self) -> str:
        return f"{self.setting.name}-{self.precision}"

    @property
    def name(self) -> str:
        return f"atlas {self.folder} {self.what}"


@dataclass(frozen=True)
class Size:
    """A size of the whole reference: the real one, or one that runs on two CPU cores.

    Attributes:
        shares: of the minutes that each part gets at most; the study gets what is left.
        start_s, method_s, energy_s, check_s, objective_s, run_s, report_s: forecasts of the start
            of a process with its networks, of one method, of one method with its energy, of each
            check, of one objective, of a run but for its training and its evaluation, and of the
            report.
        evaluation_s: forecast of a run's evaluation, until the teacher's shows it.
        least_s: nothing is begun for less time than this.
        closing_s: kept for the last files and for processes to end.
        methods: of the atlas; empty = all that there are.
        largest_smallest_s, most_teacher_iterations: limits of the study, however much time there
            is: of its smallest budget, and of its teacher's training.
        least_teacher_iterations: with time for fewer, the study waits for the next call.
        measuring: how long each method is measured, as keys of a study.
    """

    settings: Sequence[Setting]
    precisions: Sequence[str]
    methods: Sequence[str]
    shares: Mapping[str, float]
    start_s: float
    method_s: float
    energy_s: float
    check_s: Mapping[str, float]
    objective_s: float
    objective_scale: float
    most_objectives: int
    run_s: float
    evaluation_s: float
    report_s: float
    least_s: float
    closing_s: float
    measuring: Mapping[str, Any]
    study: str
    study_changes: Mapping[str, Any]
    study_methods: Sequence[str]
    largest_smallest_s: float
    most_teacher_iterations: int
    least_teacher_iterations: int
    planned_seeds: int
    most_seeds: int

    def pieces(self) -> list[Piece]:
        """Return the pieces of the atlas, the most valuable first: methods of every setting, then
        variants, then what a step's energy is."""
        return [
            Piece(setting, precision, what)
            for what in ("methods", "variants", "energy")
            for precision in self.precisions
            for setting in self.settings
        ]


FULL = Size(
    settings=(
        Setting(MAIN_SETTING, MAIN_SETTING),
        Setting("cityscapes-deeplabv3-r18", "cityscapes-deeplabv3-r18"),
        Setting("ade20k-pspnet-r18", "ade20k-pspnet-r18"),
        Setting("voc-deeplabv3-r18", "voc-deeplabv3-r18"),
        Setting(
            "cityscapes-deeplabv3-mobilenetv2",
            "cityscapes-deeplabv3-r18",
            {"student": "deeplabv3-mobilenetv2_100", "step.batch": 16},
        ),
    ),
    precisions=("bf16", "tf32"),
    methods=(),
    shares={"checks": 1 / 12, "atlas": 4 / 12, "objectives": 1 / 12},
    start_s=30.0,
    method_s=5.0,
    energy_s=8.0,
    check_s={"doctor": 8.0, "parity": 12.0, "synchronisation": 20.0, "resume": 30.0},
    objective_s=10.0,
    objective_scale=1.0,
    most_objectives=40,
    run_s=1.0,
    evaluation_s=1.5,
    report_s=20.0,
    least_s=8.0,
    closing_s=8.0,
    measuring={"measure.least_rounds": 5, "measure.max_time_s": 4.0},
    study="camvid-pspnet-r18",
    study_changes={
        "student": "pspnet-r18",
        "teacher": "pspnet-r101",
        "step.precision": "bf16",
        # Runs are short: loader processes would take long to start, and each to decode for itself.
        "data_settings.cache": "disk",
        "data_settings.cache_folder": "cache",
        "data_settings.workers": 0,
        "data_settings.synthetic_size": [360, 480],
        "data_settings.synthetic_train": 367,
        "data_settings.synthetic_val": 101,
        "evaluation.batch": 16,
    },
    study_methods=("none", "kd", "fitnet", "cwd", "cirkd", "af_dcd"),
    largest_smallest_s=300.0,
    most_teacher_iterations=40_000,
    least_teacher_iterations=100,
    planned_seeds=2,
    most_seeds=5,
)
TINY = Size(
    settings=(
        Setting(
            "tiny",
            "quickstart",
            {
                "student": "pspnet-test_resnet",
                "teacher": "pspnet-test_resnet",
                "step.batch": 2,
                "step.crop": [32, 48],
                "data_settings.synthetic_size": [40, 56],
                "data_settings.synthetic_train": 6,
            },
        ),
    ),
    precisions=("fp32",),
    methods=("none", "kd", "cwd", "cwd:feature"),
    shares={"checks": 0.4, "atlas": 0.2, "objectives": 0.15},
    start_s=6.0,
    method_s=2.5,
    energy_s=6.0,
    check_s={"doctor": 6.0, "parity": 5.0, "synchronisation": 6.0, "resume": 25.0},
    objective_s=7.0,
    objective_scale=16.0,
    most_objectives=1,
    run_s=0.1,
    evaluation_s=0.2,
    report_s=10.0,
    least_s=2.0,
    closing_s=4.0,
    measuring={"measure.least_rounds": 3, "measure.max_time_s": 0.3, "measure.steps": 2},
    study="quickstart",
    study_changes={
        "student": "pspnet-test_resnet",
        "teacher": "pspnet-test_resnet",
        "step.batch": 2,
        "step.crop": [32, 48],
        "data_settings.cache": "disk",
        "data_settings.cache_folder": "cache",
        "data_settings.synthetic_size": [40, 56],
        "data_settings.synthetic_train": 12,
        "data_settings.synthetic_val": 4,
    },
    study_methods=("none", "kd", "cwd"),
    largest_smallest_s=0.5,
    most_teacher_iterations=20,
    least_teacher_iterations=2,
    planned_seeds=2,
    most_seeds=2,
)


def is_variant(method: str) -> bool:
    return ":" in method


def in_order(methods: Sequence[str]) -> list[str]:
    """Return methods as they are measured: controls, then every method, then their variants."""
    rest = sorted(set(methods) - set(FIRST), key=lambda name: (is_variant(name), name))
    return [name for name in FIRST if name in methods] + rest


def limits_s(left_s: float, forecasts_s: Mapping[str, float], size: Size) -> dict[str, float]:
    """Divide the seconds that are left among the parts.

    A part with nothing to do gets nothing. The others get their share at most; the study gets the
    rest, and what the study does not need goes to the atlas.
    """
    limits = {
        part: min(share * left_s, left_s) if forecasts_s[part] else 0.0
        for part, share in size.shares.items()
    }
    # What a part surely does not need is left to the study.
    limits = {part: min(limit, 2 * forecasts_s[part]) for part, limit in limits.items()}
    rest = left_s - sum(limits.values())
    limits["study"] = min(rest, 1.25 * forecasts_s["study"])
    if forecasts_s["atlas"]:
        limits["atlas"] += rest - limits["study"]
    return limits


def seed_s(smallest_s: float, methods: int, run_s: float) -> float:
    """Return about how long one seed of all methods takes: a trunk, and a branch per budget.

    Args:
        run_s: of a trunk or branch, but for its training.
    """
    longest, together = max(MULTIPLES), sum(MULTIPLES)
    trained = smallest_s * ((1 - DECAY) * longest + DECAY * together)
    return methods * (trained + (len(MULTIPLES) + 1) * run_s)


def plan_teacher(available_s: float, teacher_forward_s: float, size: Size) -> int:
    """Return the teacher's iterations; fewer than the size's least are too few to begin with.

    Args:
        available_s: for the teacher and all seeds.
    """
    possible = round(TEACHER_SHARE * available_s / (TEACHER_STEPS * teacher_forward_s))
    return min(possible, size.most_teacher_iterations)


def plan_budgets(
    available_s: float, iteration_s: Mapping[str, float], run_s: float, size: Size
) -> list[str]:
    """Return the largest budgets of which the planned seeds fit into the time.

    Args:
        available_s: for all seeds.
        iteration_s: seconds of an iteration of each method.
        run_s: of a run, but for its training.
    """
    least_s = LEAST_ITERATIONS * max(iteration_s.values())
    each_s = available_s / size.planned_seeds
    possible = [one for one in BUDGETS_S if one >= least_s] or [float(round(least_s + 1))]
    fitting = [
        one
        for one in possible
        if seed_s(one, len(iteration_s), run_s) <= each_s and one <= size.largest_smallest_s
    ]
    smallest = max(fitting, default=possible[0])
    return [f"{factor * smallest:g}s" for factor in MULTIPLES]


def statements(methods: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """Return the claims that are made about what was trained: every method against kd, under the
    largest budget, and what cwd saves.

    Args:
        methods: those that finished the largest budget.
        budgets: the smallest first.
    """
    if CONTROL not in methods:
        return []
    claims = [f"{name} > {CONTROL} @ {budgets[-1]}" for name in methods if name != CONTROL]
    gained = ATLAS_METHOD in methods and len(budgets) > 1
    return [*claims, *([f"gain({ATLAS_METHOD}, {CONTROL}) > 1"] if gained else [])]
