"""Folders of results for tests of the page, and the numbers that are in them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from cost_records import PHASE_NAMES, alike, make_cost, ratio
from simulated_verdicts import Setting, simulate

from kdprof.records import Canary, Cost, Run, Spent
from kdprof.reports import table
from kdprof.reports.axes import available
from kdprof.reports.judge import judge
from kdprof.reports.results import Results, collect
from kdprof.reports.verdict import Verdict
from kdprof.store import Store

DEVICE = "NVIDIA H200"
TIMING = {"clock": "CUDA events", "warmup_steps": 8, "rounds": 12, "steps_per_round": 3,
          "end_to_end_blocks": 6, "stopped": "target of 1 % reached"}  # fmt: skip


def a_folder(
    root: Path,
    setting: Setting,
    names: dict[str, str] | None = None,
    *,
    teacher: bool = True,
    costs: bool = True,
    unreliable: Sequence[str] = (),
    drift: float = 0.0,
    energy: bool = False,
    device: str = DEVICE,
) -> Store:
    """Write a simulated study to a folder.

    Args:
        names: other names of the simulated methods ``m0``, ``m1``, ...
        drift: of the last seed, as a fraction of the planned seconds.
    """
    simulated = simulate(setting, np.random.default_rng(0))[0]
    named = {method: (names or {}).get(method, method) for method in simulated.methods()}
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root)
    store.study.write_text('data = "camvid:/d"\nstudent = "s"\nteacher = "t"\n[step]\nbatch = 8\n')
    for run in simulated.finished:
        off = 1 + drift * (run.seed == setting.seeds - 1)
        changes = {
            "method": named[run.method],
            "device": device,
            "flop": 1.3e12 * run.iterations_done,
            "energy_j": 600 * run.train_s.actual if energy else None,
            "cost_key": f"key-{run.method}" if costs else None,
            "train_s": Spent(planned=run.train_s.planned, actual=off * run.train_s.actual),
        }
        made = run.model_copy(update=changes)
        _write(store.run_folder(made.method, made.budget, made.seed).record, made)
    for place, (plain, name) in enumerate(named.items()):
        if costs:
            store.write_cost(a_cost(name, f"key-{plain}", place, reliable=name not in unreliable))
    if teacher:
        changes = {"kind": "teacher", "method": "none", "budget": "", "miou": 0.79}
        run = simulated.finished[0].model_copy(update=changes)
        _write(store.teacher_folder().record, run)
    return store


def _write(path: Path, run: Run) -> None:
    # As the store does, without waiting for the disk: there are hundreds.
    path.parent.mkdir(parents=True)
    path.write_text(run.model_dump_json(indent=2, by_alias=True))


def a_cost(method: str, key: str, place: int = 0, *, reliable: bool = True) -> Cost:
    """Return a Cost with phases; those of further places are dearer."""
    seconds = 0.09 * (1 + 0.13 * place)
    shares = np.random.default_rng(place).dirichlet(np.full(len(PHASE_NAMES), 3.0))
    return make_cost(
        method,
        seconds,
        key=key,
        device=DEVICE,
        latency_s=alike(seconds, low=0.99 * seconds, high=1.01 * seconds),
        ratio=ratio(1 + 0.13 * place, 0.01),
        phases_s={name: float(s) for name, s in zip(PHASE_NAMES, seconds * shares, strict=True)},
        canary=Canary(median_s=2e-4, drift=0.013, steady=True, samples_s=[2e-4] * 4),
        reliable=reliable,
        warnings=[] if reliable else ["the machine itself drifted by 23.4 % while measuring"],
        timing=TIMING,
        settings={"step": {"precision": "bf16"}},
        versions={"torch": "2.12.1"},
    )


def judged(store: Store) -> Verdict:
    """Return the verdict on a folder."""
    return judge(collect(store))


def numbers(store: Store, verdict: Verdict | None) -> np.ndarray:
    """Return every number of the records, of the table's rows and of the verdict, and the means
    over seeds that points of the curves have; sorted."""
    found = [v for cost in store.costs() for v in _leaves(cost.model_dump())]
    if verdict is not None:
        results = collect(store)
        found += [v for run in store.runs() for v in _run_numbers(run)]
        found += [v for row in table.rows(store) for v in _leaves(asdict(row))]
        found += list(_leaves(asdict(verdict)))
        found += list(_means(results))
        if results.teacher and results.teacher.miou is not None:
            found.append(100 * results.teacher.miou)
    return np.unique(np.array([*found, math.inf], dtype=float))


def _run_numbers(run: Run) -> list[float]:
    drift = run.train_s.drift()
    derived = [100 * run.miou] if run.miou is not None else []
    derived += [] if drift is None else [drift]
    return [*_leaves(run.model_dump()), *derived]


def _means(results: Results) -> Iterator[float]:
    for axis in available(results):
        for method in results.methods():
            for budget in results.budgets():
                group = results.group(method, budget)
                yield float(np.mean([axis.quantity(run) for run in group]))


def _leaves(value) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
