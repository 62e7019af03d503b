"""Kill a training repeatedly, and compare its result with that of an uninterrupted training.

    python benchmarks/kills.py --kills 100

Each round trains one small run of a real study (teacher, evaluations, checkpoints, log) in a child
process that is killed with SIGKILL after a random time and started again; the last one after all
kills goes to its end. Its weights and its curve must equal, bit for bit, those of a run that was
never killed. The time of every other kill counts from the first file that the run writes: on a GPU,
start-up takes most of so small a training. The seed decides the times; the machine decides where in
the run they fall.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder, Store
from kdprof.study import Study, claim_folder, load_study, parse_assignments
from kdprof.train import checkpoint
from kdprof.train.runs import train

STUDY = {
    "student": "pspnet-test_resnet",
    "teacher": "pspnet-test_resnet",
    "device": "cpu",
    "methods": ["kd"],
    "budgets": ["24"],
    "step.batch": 2,
    "step.crop": [32, 48],
    "data_settings.synthetic_size": [40, 56],
    "data_settings.synthetic_train": 6,
    "data_settings.synthetic_val": 3,
    "teacher_training.iterations": 4,
    "evaluation.points": 4,
    "training.log_every": 2,
    "training.checkpoint_every_s": 0.05,
    "measure.least_rounds": 3,
    "measure.max_time_s": 0.01,
    "measure.in_process": True,
    "measure.steps": 1,
}


@dataclass
class Outcome:
    """Counts and seconds over all kills and trainings."""

    kills: int = 0
    rounds: int = 0
    differing: int = 0
    lost_s: float = 0.0
    useful_s: float = 0.0


@dataclass(frozen=True)
class Kill:
    """When a training is killed.

    Attributes:
        after_s: seconds after its start, or after the first change in ``folder`` if that is given.
    """

    after_s: float
    folder: Path | None = None


def _stamps(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as files:
        return {file.name: file.stat().st_mtime_ns for file in files}


def train_in_child(study: Study, out: Path, kill: Kill | None) -> bool:
    """Train in a forked child; return whether it ended by itself.

    This process must not have computed with torch: autograd refuses to run in the fork of a
    process in which it has run on threads.

    Raises:
        RuntimeError: the training failed without a kill.
    """
    child = os.fork()
    if child == 0:
        _train_and_leave(study, out)
    if kill is not None:
        _kill_later(child, kill)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("the training failed by itself; see its message above")
    return True


def _kill_later(child: int, kill: Kill) -> None:
    before = _stamps(kill.folder) if kill.folder else {}
    began = None if kill.folder else time.monotonic()
    while began is None or time.monotonic() < began + kill.after_s:
        if began is None and kill.folder and _stamps(kill.folder) != before:
            began = time.monotonic()
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _train_and_leave(study: Study, out: Path) -> None:
    code = 1
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        store = Store(out)
        claim_folder(store.study, study)
        summary = train(ResolvedStudy(study), store, Progress(None), control=False)
        code = 0 if not summary.failures else 1
        for failure in summary.failures:
            print(failure, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def result(folder: RunFolder) -> tuple[dict, list]:
    """Return the weights and the curve of a finished run."""
    curve = [(p.iteration, p.miou, p.losses) for p in folder.read_curve()]
    return checkpoint.read(folder.checkpoint)["step"], curve


def same(one: tuple[dict, list], other: tuple[dict, list]) -> bool:
    """Return whether two results agree bit for bit."""
    try:
        torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    except AssertionError:
        return False
    return one[1] == other[1]


def _with_costs(out: Path, name: str) -> Store:
    """Return a new folder of results with the Costs of the first training."""
    store = Store(out / name)
    for cost in Store(out / "first").costs():
        store.write_cost(cost)
    return store


def kill_again_and_again(out: Path, kills: int, seed: int, study: Study) -> Outcome:
    """Train again and again, with ``kills`` kills in total; each training is restarted to its end,
    the last one without further kills.

    All trainings but the first start with the Costs of the first: measuring takes longer than
    training, so most kills would hit it.
    """
    cell = study.methods[0], study.budgets[0], 0
    train_in_child(study, out / "first", None)
    wanted = result(Store(out / "first").run_folder(*cell))
    whole = _with_costs(out, "whole")
    began = time.monotonic()
    train_in_child(study, whole.root, None)
    whole_s = time.monotonic() - began
    trained_s = whole.run_folder(*cell).read_run().train_s.actual
    draw, found = random.Random(seed), Outcome()
    while found.kills < kills:
        store = _with_costs(out, f"round{found.rounds}")
        folder, ended = store.run_folder(*cell), False
        while found.kills < kills and not ended:
            start = Kill(draw.uniform(0, whole_s))
            kill = start if found.kills % 2 else Kill(draw.uniform(0, trained_s), folder.path)
            ended = train_in_child(study, store.root, kill)
            found.kills += not ended
        if not ended:
            train_in_child(study, store.root, None)
        run = folder.read_run()
        found.rounds += 1
        found.differing += not (run.finished and same(result(folder), wanted))
        found.lost_s += run.lost_s
        found.useful_s += run.train_s.actual
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    given = parser.parse_args()
    study = load_study(None, STUDY | parse_assignments(given.assignments))
    if study.step.deterministic:
        torch.use_deterministic_algorithms(True)  # imports for seconds; here, once for all children
    with tempfile.TemporaryDirectory() as folder:
        found = kill_again_and_again(Path(folder), given.kills, given.seed, study)
    print(
        f"{found.kills} kills over {found.rounds} trainings: {found.differing} differ from the one "
        f"that was never killed; {found.lost_s:.1f} s recorded as lost and "
        f"{found.useful_s:.1f} s of useful training"
    )
    sys.exit(1 if found.differing else 0)


if __name__ == "__main__":
    main()
