"""Folders of finished runs and Costs for tests of reports."""

import itertools
from pathlib import Path

from cost_records import make_cost, memory

from kdprof.records import Cost, Interval, Memory, Ratio, Run, Spent
from kdprof.store import Store, write_record

SIX = ("none", "kd", "cwd", "cirkd", "mgd", "af_dcd")
BUDGETS = ("5k@cwd", "10k@cwd", "40k@cwd")


def a_run(method="cwd", budget="40k@cwd", seed=0, miou=0.7, **changes) -> Run:
    values = {
        "method": method,
        "budget": budget,
        "seed": seed,
        "device": "NVIDIA H200",
        "iterations": 40_000,
        "iterations_done": 40_000,
        "miou": miou,
        "miou_per_class": None,
        "best_miou": miou,
        "train_s": Spent(planned=7200.0, actual=7200.0),
        "eval_s": 30.0,
        "checkpoint_s": 1.0,
        "flop": 1.8e17,
        "energy_j": None,
        "cost_key": "key",
        "finished": True,
        "versions": {},
    }
    values["schedule_iterations"] = (values | changes)["iterations"]
    return Run(**(values | changes))


def a_cost(method="cwd", latency=0.2, **changes) -> Cost:
    values = {
        "device": "NVIDIA H200",
        "key": "key",
        "latency_s": Interval(median=latency, low=0.99 * latency, high=1.02 * latency),
        "ratio": Ratio(median=latency / 0.1, low=latency / 0.11, high=latency / 0.09, to="none"),
        "phases_s": {"teacher_forward": 0.3 * latency, "objective": 0.7 * latency, "data": 0.0},
        "memory_bytes": allocated(3 * 2**30),
    }
    return make_cost(method, latency, **(values | changes))


def allocated(peak: int | None, process: int | None = None) -> Memory:
    return memory(peak_allocated=peak, process=process)


def a_store(root: Path, runs=(), stored_costs=(), teacher: float | None = 0.79) -> Store:
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root)
    store.study.write_text('data = "camvid:/d"\nstudent = "pspnet-r18"\nteacher = "pspnet-r101"\n')
    for run in runs:
        write_record(store.run_folder(run.method, run.budget, run.seed).record, run)
    for cost in stored_costs:
        store.write_cost(cost)
    if teacher is not None:
        record = a_run(
            "none", "", kind="teacher", miou=teacher, train_s=Spent(planned=None, actual=36_000.0)
        )
        write_record(store.teacher_folder().record, record)
    return store


def matrix(methods=SIX, budgets=BUDGETS, seeds=3) -> list[Run]:
    """Dearer methods are better per iteration, and get fewer of them."""
    found = []
    for (m, method), (b, budget), seed in itertools.product(
        enumerate(methods), enumerate(budgets), range(seeds)
    ):
        seconds = (900.0, 1800.0, 7200.0)[b]
        done = int(seconds / (0.1 + 0.02 * m))
        miou = 0.6 + 0.04 * b + 0.002 * (m * 7 % 5) + 0.003 * ((seed * 5 + m) % 3)
        spent = Spent(planned=seconds, actual=seconds * (1 + 0.002 * (seed - 1)))
        found.append(a_run(method, budget, seed, miou, iterations_done=done, train_s=spent))
    return found


def half_finished() -> list[Run]:
    return [
        run.model_copy(update={"finished": False, "miou": None, "iterations_done": 17})
        if run.budget == "40k@cwd" and (run.method in ("kd", "mgd") or run.seed == 2)
        else run
        for run in matrix()
    ]


def with_drift() -> list[Run]:
    runs = matrix()
    runs[4] = runs[4].model_copy(update={"train_s": Spent(planned=1800.0, actual=1890.0)})
    return runs


COSTS = [a_cost(method, 0.1 + 0.02 * place) for place, method in enumerate(SIX)]
STORES = {
    "one run": lambda root: a_store(root, [a_run(device="Some Model @ 2 GHz (2 threads)")]),
    "full": lambda root: a_store(root, matrix(), COSTS),
    "half-finished": lambda root: a_store(root, half_finished(), COSTS),
    "no teacher": lambda root: a_store(root, matrix(), COSTS, teacher=None),
    "drifted": lambda root: a_store(
        root, with_drift(), [*COSTS[:4], a_cost("mgd", reliable=False, warnings=["throttled"])]
    ),
}
