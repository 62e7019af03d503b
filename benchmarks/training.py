"""Measure the overhead of kdprof's training loop against a bare PyTorch loop with the same work.

    python benchmarks/training.py [--study camvid] [--data camvid:ROOT] [--set KEY=VALUE ...]

Prints ratios as a markdown table:

- seconds per iteration of `kdprof train` over those of the bare loop (aim: at most 1.02);
- the share of training time in which steps wait for data (aim: at most 0.02);
- seconds per image of evaluation over those of a training forward (aim: at most 1);
- MFU, if the device's peak is published;
- seconds of the teacher's forward alone with its options over those without them;
- seconds per iteration with an option of the step or the input over those without it.

The two sides of a ratio are interleaved, block by block; intervals are 95 % over the blocks.
Intervals are wide on a machine with other load. Loops are timed in steady state: each block starts
the loader and takes the batches that its processes had queued by then before its clock starts.
Blocks have as many iterations as take `--seconds`, unless `--iterations` says how many.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from kdprof.data import PREFETCHED, Batches
from kdprof.errors import UserError
from kdprof.evaluate import evaluate
from kdprof.hardware.device import (
    CUBLAS_WORKSPACES,
    REPEATABLE_WORKSPACES,
    configure_backends,
    synchronize,
)
from kdprof.measure.ceilings import published_peak
from kdprof.measure.trace import StepTrace
from kdprof.method import IGNORE, Method
from kdprof.models import SegmentationNetwork
from kdprof.progress import Advance, Progress
from kdprof.records import REFERENCE, Run, complete_sum
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.factory import MEASURED_ITERATIONS
from kdprof.stats.intervals import paired_ratio
from kdprof.step import TrainStep
from kdprof.step_feed import StepFeed
from kdprof.store import RunFolder
from kdprof.study import Study, TrainingSettings, load_study, parse_assignments
from kdprof.train.cells import Cell, new_run
from kdprof.train.loop import TrainingRun

Block = Callable[[], float]
"""Runs a block of work and returns its seconds."""
OPTIONS = {
    "channels_last": ({"step.channels_last": False}, {"step.channels_last": True}),
    "fold_teacher": ({"step.fold_teacher": False}, {"step.fold_teacher": True}),
    "deterministic": ({"step.deterministic": False}, {"step.deterministic": True}),
    "cache = memory": ({"data_settings.cache": "none"}, {"data_settings.cache": "memory"}),
    "workers = 2": ({"data_settings.workers": 0}, {"data_settings.workers": 2}),
    "tf32": ({"step.precision": "fp32"}, {"step.precision": "tf32"}),
    "bf16": ({"step.precision": "tf32"}, {"step.precision": "bf16"}),
    "compile = teacher": ({"step.compile": "none"}, {"step.compile": "teacher"}),
    "compile": ({"step.compile": "none"}, {"step.compile": "default"}),
    "cuda-graphs": ({"step.compile": "default"}, {"step.compile": "cuda-graphs"}),
}
"""Settings without and with each option."""
NEEDS_GPU = ("deterministic", "tf32", "bf16", "cuda-graphs")
TEACHERS = {
    "fold_teacher": {"step.fold_teacher": True},
    "compile = teacher": {"step.compile": "teacher"},
    "both": {"step.fold_teacher": True, "step.compile": "teacher"},
}
"""Options that change how the teacher is computed."""
STARTING = 2
"""Iterations of a block that are not timed, besides those whose batches were queued."""
TRIED = 8
"""Iterations of the block that says how many take the wanted seconds."""
NEVER_WAITED_FOR = TrainingSettings(checkpoint_every_s=1e9)


def parts(study: ResolvedStudy, name: str) -> tuple[TrainStep, SegmentationNetwork | None]:
    """Return a method's step, and the teacher it reads."""
    reads = study.methods[name].cls.needs_teacher()
    teacher = study.factory.frozen(study.factory.placed_teacher()) if reads else None
    return study.factory.step(name, teacher), teacher


def set_switches(study: ResolvedStudy) -> None:
    """Give torch's global switches back to a study: the other side of a ratio may have others."""
    step = study.step
    configure_backends(study.device, step.precision, deterministic=step.deterministic)


def untimed(batches: Batches) -> int:
    """Return with how many iterations a block begins before it is timed."""
    return STARTING + PREFETCHED * batches.workers


class Stopwatch(Progress):
    """Times the iterations of a run but for the first ones.

    Attributes:
        seconds, waited_s: of those iterations, and of it those in which the step waited for data.
    """

    def __init__(self, feed: StepFeed, first: int, iterations: int):
        super().__init__(None)
        self.feed, self.first, self.last = feed, first, first + iterations
        self.seconds = self.waited_s = 0.0

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Watch the iterations."""
        count = done

        def advance(more: int) -> None:
            nonlocal count
            count += more
            if count in (self.first, self.last):
                sign = -1 if count == self.first else 1
                synchronize(self.feed.step.device)
                self.seconds += sign * time.perf_counter()
                self.waited_s += sign * self.feed.waited_s

        yield advance


class OurLoop:
    """The loop of `kdprof train`: one run per block, without evaluations and checkpoints in it."""

    def __init__(self, study: ResolvedStudy, name: str, iterations: int, folder: Path):
        self.study, self.name, self.iterations, self.folder = study, name, iterations, folder
        self.step, _ = parts(study, name)
        self.batches = study.factory.batches(seed=0)
        self.blocks = itertools.count()
        self.waited_s = self.trained_s = 0.0

    def __call__(self) -> float:
        set_switches(self.study)
        folder = RunFolder(self.folder / str(next(self.blocks)))
        first = untimed(self.batches)
        ends = dict.fromkeys(("iterations", "low", "high", "span"), first + self.iterations)
        run: Run = new_run(self.study, Cell(method=self.name, budget="all", **ends), None)
        feed = StepFeed(self.step, self.batches)
        watch = Stopwatch(feed, first, self.iterations)
        training = TrainingRun(folder=folder, run=run, feed=feed, settings=NEVER_WAITED_FOR)
        with folder.lock():
            training.train(watch, "")
        self.waited_s += watch.waited_s
        self.trained_s += watch.seconds
        return watch.seconds


class BareLoop:
    """The loop of a plain script: the same networks, objective, images and optimiser."""

    def __init__(self, study: ResolvedStudy, name: str, iterations: int):
        settings = study.step
        if (
            settings.precision == "fp16"
            or study.methods[name].cls.auxiliary is not Method.auxiliary
        ):
            raise UserError("the bare loop has no loss scaler and no second optimiser")
        step, self.teacher = parts(study, name)
        self.study, self.student, self.method = study, step.student, step.method
        self.device = step.device
        self.autocast, self.settings, self.iterations = step.autocast, settings, iterations
        self.batches: Batches = study.factory.batches(seed=0)
        self.parameters = [*self.student.parameters(), *self.method.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def __call__(self) -> float:
        set_switches(self.study)
        first, began = untimed(self.batches), 0.0
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(first + self.iterations),
            num_workers=self.batches.workers,
            pin_memory=self.device.type == "cuda",
        )
        for iteration, gathered in enumerate(loader):
            if iteration == first:
                synchronize(self.device)
                began = time.perf_counter()
            images, labels = self.batches.augmentation.apply(gathered.to(self.device))
            for group in self.optimizer.param_groups:
                left = 1 - iteration / MEASURED_ITERATIONS
                group["lr"] = self.settings.learning_rate * left**self.settings.poly_power
            self.loss(images, labels.long()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return time.perf_counter() - began

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            found = self.student(images, [*{"logits", "aux", *self.method.student_taps()}])
            seen = None
            if self.teacher is not None:
                with torch.no_grad():
                    seen = self.teacher(images, self.method.read_of_teacher())
            terms = self.method(found, seen, labels)
        loss = self.cross_entropy(found.logits, labels)
        loss = loss + self.settings.aux_weight * self.cross_entropy(found.aux, labels)
        return loss + sum(self.method.weights[name] * term for name, term in terms.items())

    @staticmethod
    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
        return F.cross_entropy(resized, labels, ignore_index=IGNORE)


def ratio(above: Block, below: Block, blocks: int) -> tuple[float, float, float]:
    """Return the ratio of seconds of two interleaved blocks, with its 95 % interval."""
    above(), below()  # chooses kernels and allocates memory
    rounds: tuple[list[list[float]], list[list[float]]] = ([], [])
    for number in range(blocks):
        sides = [(rounds[0], above), (rounds[1], below)]
        for found, block in sides if number % 2 else reversed(sides):
            found.append([block()])
    return paired_ratio(*rounds)


def applies(option: str, study: ResolvedStudy, compiling: bool) -> bool:
    """Return whether an option is possible on this device, and requested."""
    if option in NEEDS_GPU and study.device.type != "cuda":
        return False
    if option in ("tf32", "bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False  # before Ampere there is neither
    compiles = option in ("both", "cuda-graphs") or option.startswith("compile")
    return compiling or not compiles


class TeacherForward:
    """The forward of a step's teacher on one resident batch, ``repeats`` times per block."""

    def __init__(self, study: ResolvedStudy, name: str, repeats: int):
        self.study, self.repeats = study, repeats
        self.step, _ = parts(study, name)
        images, _ = study.factory.batches(seed=0).batch(0, study.device)
        layout = torch.channels_last if study.step.channels_last else torch.contiguous_format
        self.images = images.contiguous(memory_format=layout)

    def __call__(self) -> float:
        set_switches(self.study)
        synchronize(self.study.device)
        began = time.perf_counter()
        for _ in range(self.repeats):
            self.step.teacher_taps(self.images)
        synchronize(self.study.device)
        return (time.perf_counter() - began) / self.repeats


def teacher_rows(
    study: Study, name: str, seconds: float, blocks: int, compiling: bool
) -> Iterator[str]:
    """Yield the seconds of the teacher's forward, and the ratio of those with each option."""
    without = changed(study, {"step.fold_teacher": False, "step.compile": "none"})
    plain = TeacherForward(ResolvedStudy(without), name, 1)
    plain()
    plain.repeats = max(1, math.ceil(seconds / 4 / plain()))
    yield f"| the teacher's forward, ms | {1e3 * plain():.1f} | |"
    for option, values in TEACHERS.items():
        if applies(option, plain.study, compiling):
            other = ResolvedStudy(changed(without, values))
            found = ratio(TeacherForward(other, name, plain.repeats), plain, blocks)
            yield row(f"the teacher's forward, with {option} / without", found, "< 1")


def gains(
    study: Study, name: str, iterations: int, blocks: int, compiling: bool, folder: Path
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Yield each option with the ratio of our loop's seconds with it to those without it."""
    for option, (without, with_it) in OPTIONS.items():
        if not applies(option, ResolvedStudy(study), compiling):
            continue
        sides = [
            OurLoop(ResolvedStudy(changed(study, values)), name, iterations, folder / option / side)
            for side, values in (("with", with_it), ("without", without))
        ]
        yield option, ratio(*sides, blocks)


def changed(study: Study, values: dict) -> Study:
    """Return the study with changed settings."""
    plain = {
        key: value for key, value in study.model_dump(mode="json").items() if value is not None
    }
    for key, value in values.items():
        section, field = key.split(".")
        plain[section] = plain[section] | {field: value}
    return Study.model_validate(plain)


def evaluation_ratio(study: ResolvedStudy, blocks: int) -> tuple[float, float, float]:
    """Return seconds per image of evaluation over those of a training forward."""
    step, data = study.factory.step(REFERENCE, None), study.data.val("student")
    size = study.evaluation.batch
    images = torch.stack([data[index][0] for index in range(min(size, len(data)))])
    images = images.to(study.device)

    def evaluating() -> float:
        began = time.perf_counter()
        evaluate(step.student, data, study.device, batch=size, autocast=step.autocast())
        synchronize(study.device)
        return (time.perf_counter() - began) / len(data)

    def forward() -> float:
        repeats = max(1, len(data) // len(images))
        network: nn.Module = step.student.train()
        synchronize(study.device)
        began = time.perf_counter()
        for _ in range(repeats):
            with step.autocast():
                network(images, ["logits", "aux"])
        synchronize(study.device)
        return (time.perf_counter() - began) / (repeats * len(images))

    return ratio(evaluating, forward, blocks)


def utilisation(loop: OurLoop) -> float | None:
    """Return the share of the device's published peak that one block of our loop reaches; None if
    no peak is known, or not all FLOP are counted."""
    study = loop.study
    peak = published_peak(study.hardware.name, study.step.precision)
    if peak is None:
        return None
    set_switches(study)
    with StepTrace(loop.step) as trace:
        loop.step(*loop.batches.batch(0, study.device), 0, trace.mark)
    flop = complete_sum(trace.matrix_flop().values())
    return None if flop is None else flop * loop.iterations / loop() / peak


def row(what: str, found: tuple[float, float, float], aim: str) -> str:
    """Return a line of the table."""
    return f"| {what} | {found[0]:.3f} [{found[1]:.3f}-{found[2]:.3f}] | {aim} |"


def title(study: ResolvedStudy, given: argparse.Namespace) -> str:
    """Return what was run on which device, and the head of the table."""
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return (
        f"{given.method} of {given.study} in {study.step.precision} on {study.hardware.name}, "
        f"{threads}; {given.blocks} blocks of {given.iterations} iterations\n\n"
        "| ratio | found [95 %] | aim |\n| --- | --- | --- |"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--data")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--iterations", type=int, help="per block; else as many as take --seconds")
    parser.add_argument("--seconds", type=float, default=2.0, help="per block")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="takes minutes on a CPU")
    return parser.parse_args()


def enough(ours: OurLoop, seconds: float) -> int:
    """Return how many iterations take these seconds; at least four times as many as are queued,
    because those at the end of a block find their batches ready."""
    ours.iterations = TRIED
    ours()
    wanted = math.ceil(seconds / (ours() / TRIED))
    ours.waited_s = ours.trained_s = 0.0
    return max(wanted, 4 * PREFETCHED * ours.batches.workers)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    os.environ.setdefault(CUBLAS_WORKSPACES, REPEATABLE_WORKSPACES[0])  # for `deterministic`
    overrides = parse_assignments(given.assignments) | ({"data": given.data} if given.data else {})
    study = load_study(given.study, overrides)
    resolved = ResolvedStudy(study)
    with tempfile.TemporaryDirectory() as folder:
        ours = OurLoop(resolved, given.method, 0, Path(folder) / "ours")
        given.iterations = given.iterations or enough(ours, given.seconds)
        ours.iterations = given.iterations
        bare = BareLoop(resolved, given.method, given.iterations)
        found = ratio(ours, bare, given.blocks)
        print(title(resolved, given))
        print(row("our loop / bare loop", found, "<= 1.02"))
        print(f"| data wait / training | {ours.waited_s / ours.trained_s:.3f} | <= 0.02 |")
        print(row("evaluation / forward", evaluation_ratio(resolved, given.blocks), "<= 1"))
        share = utilisation(ours)
        print(f"| MFU | {'no published peak' if share is None else f'{share:.3f}'} | |", flush=True)
        alone = study, given.method, given.seconds, given.blocks, given.compile
        for line in teacher_rows(*alone) if ours.step.teacher is not None else ():
            print(line, flush=True)
        wanted = study, given.method, given.iterations, given.blocks, given.compile, Path(folder)
        for option, gain in gains(*wanted):
            print(row(f"with {option} / without", gain, "< 1"), flush=True)


if __name__ == "__main__":
    main()
