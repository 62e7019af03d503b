"""A real study that trains in seconds."""

from pathlib import Path

from kdprof.budget import parse_budget
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store
from kdprof.study import Study, claim_folder, load_study
from kdprof.train.prepare import prepare
from kdprof.train.runs import Summary, train

SMALL = {
    "student": "pspnet-test_resnet",
    "teacher": "pspnet-test_resnet",
    "device": "cpu",
    "methods": ["none", "kd"],
    "budgets": ["6"],
    "step.batch": 2,
    "step.crop": [32, 48],
    "data_settings.synthetic_size": [40, 56],
    "data_settings.synthetic_train": 6,
    "data_settings.synthetic_val": 3,
    "teacher_training.iterations": 4,
    "evaluation.points": 2,
    "measure.least_rounds": 3,
    "measure.max_time_s": 0.01,
    "measure.in_process": True,
    "measure.steps": 1,
}


PRICES = Path()
"""A results folder for all tests of a session; set by conftest.py."""


def small_study(**changes) -> Study:
    return load_study(None, {**SMALL, **{k.replace("__", "."): v for k, v in changes.items()}})


def small_toml(folder: Path, **changes) -> Path:
    path = folder / "small.toml"
    path.write_text(small_study(**changes).to_toml())
    return path


def price(out: Path, study: Study) -> None:
    """Put the Costs of a study into a results folder, as ``kdprof measure`` would.

    Each is measured once in a session of tests: that takes ten times as long as these trainings.
    """
    resolved, kept = ResolvedStudy(study), Store(PRICES)
    budgets = [parse_budget(text).method for text in study.budgets]
    names = list(dict.fromkeys([*resolved.method_names(control=True), *filter(None, budgets)]))
    for name, cost in prepare(resolved, kept, names, Progress(None)).costs.items():
        if not Store(out).cost_path(name, cost.key).exists():
            Store(out).write_cost(cost)


def train_small(out: Path, *, control=False, priced=True, **changes) -> Summary:
    """Train the small study, at Costs that are there already if ``priced``."""
    study, store = small_study(**changes), Store(out)
    if priced:
        price(out, study)
    resolved = ResolvedStudy(study)
    claim_folder(store.study, study)
    return train(resolved, store, Progress(None), control=control)
