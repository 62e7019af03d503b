"""Compare the cost of each built-in objective with that of its equation written out.

    python benchmarks/objectives.py [--method ifvd] [--scale 1.0] [--out objectives.md]

Measures forward and backward time and peak memory of the terms of one step, for kdprof's method
("ours") and for the oracle that it is tested against ("literal": `oracles_*.py`, or the form on
whole maps in `whole_maps.py` if the oracle loops over positions), at batch 4 with logits of
19 x 64 x 128, features of 512 (student) and 2048 (teacher) channels and labels of 512 x 1024. The
networks, and what a second optimiser trains, are not included.

First both must agree on small inputs, or nothing is timed. Then each side runs in a separate
process, in float32, and their runs are interleaved, so that a ratio compares two runs close in
time. The literal is tried on grids of growing size and stopped at the limits; ratios are of the
largest grid that it can do, and the table also has our own cost at the full size.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from kdprof.discovery import builtin_methods, find_method
from kdprof.errors import KdprofError, UserError, unknown
from kdprof.hardware.cpu import CpuHardware
from kdprof.hardware.device import configure_backends, find_device, synchronize, versions
from kdprof.method import IGNORE, Method, NetworkInfo, Taps

GB = 1e9
Oracle = Callable[[Taps, Taps, Tensor | None, Method], dict[str, Tensor]]

LADDER = (16, 8, 4, 2, 1)
"""Divisors of the grid's sides, in the order in which an oracle is tried."""
LEAST_SIDE = 4
"""Shorter side of the smallest grid, which is run once before anything is measured."""
LEAST_PAIRS = 3
RELATIVE, ABSOLUTE, OF_GRADIENTS = 1e-4, 1e-6, 1e-3
"""How far the two sides may differ in a term (relative, absolute) and in a gradient."""
INFINITE = float("inf")
SPARE_BYTES = 2e9
"""Memory of the machine that a run leaves to other processes."""

AIMS = {"ifvd": 0.1, "ifvd:plain": 0.1, "ifvd:cirkd": 0.1}
"""Largest time ratio; 1 for all other methods."""
MEMORY_AIMS_GB = {"cirkd": 3.0, "cirkd:minibatch": 3.0, "cirkd:memory": 3.0, "cirkdv2": 3.0}
"""Largest peak memory of ours at the full size."""


# Inputs of both sides.


@dataclass(frozen=True)
class Sizes:
    """Shapes of the taps and labels of a step."""

    images: int = 4
    grid: tuple[int, int] = (64, 128)
    classes: int = 19
    old_classes: int = 15
    """Classes of the teacher of a class-incremental method."""
    label_stride: int = 8
    student: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of c2, c3, c4, c5 and head."""
    teacher: tuple[int, ...] = (256, 512, 1024, 2048, 2048)

    def divided(self, by: float) -> Sizes:
        """Return the same sizes with the sides of the grid divided."""
        height, width = (max(1, round(side / by)) for side in self.grid)
        return dataclasses.replace(self, grid=(height, width))

    def text(self) -> str:
        return f"{self.grid[0]}x{self.grid[1]}"

    def info(self, who: str, method: type[Method]) -> NetworkInfo:
        """Return the network that a method builds its extras for."""
        classes = self._classes(who, method)
        widths = dict(zip(("c2", "c3", "c4", "c5", "head"), getattr(self, who), strict=True))
        stride = dict.fromkeys((*widths, "logits", "aux"), self.label_stride)
        stride["c2"] = self.label_stride // 2
        channels = {**widths, "logits": classes, "aux": classes}
        return NetworkInfo(who, classes, channels, stride, background=method.incremental)

    def shape(self, who: str, tap: str, method: type[Method]) -> tuple[int, ...]:
        info = self.info(who, method)
        if tap == "classifier":
            return (info.num_classes, info.channels["head"], 1, 1)
        finer = self.label_stride // info.stride[tap]
        return (self.images, info.channels[tap], *(finer * side for side in self.grid))

    def _classes(self, who: str, method: type[Method]) -> int:
        return self.old_classes if who == "teacher" and method.incremental else self.classes


SMALL = Sizes(
    images=2,
    grid=(6, 9),
    classes=5,
    old_classes=3,
    label_stride=4,
    student=(4, 6, 8, 10, 6),
    teacher=(8, 10, 12, 16, 8),
)
"""Sizes at which the two sides must agree."""


@dataclass(frozen=True)
class Inputs:
    """One batch of a method; the student's taps are leaves."""

    student: Taps
    teacher: Taps
    labels: Tensor | None


def draw_inputs(method: type[Method], sizes: Sizes, device: torch.device, seed: int = 0) -> Inputs:
    """Return random taps and labels; labels have patches of two positions, and a tenth is void."""
    generator = torch.Generator().manual_seed(seed)

    def taps(who: str, names: tuple[str, ...]) -> dict[str, Tensor]:
        shapes = {name: sizes.shape(who, name, method) for name in names}
        return {n: torch.randn(s, generator=generator).to(device) for n, s in shapes.items()}

    student = taps("student", method.student_taps())
    teacher = taps("teacher", method.read_of_teacher())
    labels = None
    if "labels" in method.taps:
        coarse = (sizes.images, *((side + 1) // 2 for side in sizes.grid))
        labels = torch.randint(0, sizes.classes, coarse, generator=generator)
        labels[torch.rand(coarse, generator=generator) < 0.1] = IGNORE
        for axis, side in enumerate(sizes.grid, 1):
            labels = labels.repeat_interleave(2 * sizes.label_stride, axis)
            labels = labels.narrow(axis, 0, sizes.label_stride * side)
        labels = labels.contiguous().to(device)
    leaves = {name: value.requires_grad_() for name, value in student.items()}
    return Inputs(Taps(**leaves), Taps(**teacher), labels)


def build(name: str, sizes: Sizes, device: torch.device) -> Method:
    """Return a method with its extras, as it is trained."""
    torch.manual_seed(0)
    method = find_method(name).cls()
    student, teacher = (sizes.info(who, type(method)) for who in ("student", "teacher"))
    method.build(student, teacher if method.needs_teacher() else None)
    return method.train().to(device)


@dataclass(frozen=True)
class Literals:
    """The forms that methods are compared with, by method."""

    oracles: Mapping[str, Oracle]
    whole_maps: Mapping[str, Oracle]

    def timed(self, name: str) -> Oracle:
        """Return the form that is timed: the one on whole maps if it exists."""
        return self.whole_maps.get(name) or self.oracles[name]

    def checked(self, name: str) -> list[Oracle]:
        """Return all forms, each of which must agree with the method."""
        return [forms[name] for forms in (self.oracles, self.whole_maps) if name in forms]


def load_literals(folder: Path) -> Literals:
    """Return the forms in `oracles_*.py` and `whole_maps.py` of a folder."""
    for path in (Path(__file__).resolve().parent, folder.resolve()):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    found: dict[str, Oracle] = {}
    for file in sorted(folder.glob("oracles_*.py")):
        oracles = importlib.import_module(file.stem).ORACLES
        twice = sorted(found.keys() & oracles.keys())
        if twice:
            raise UserError(
                f"{file.name}: another file also has an oracle of {', '.join(twice)}; remove one"
            )
        found |= oracles
    whole = folder / "whole_maps.py"
    return Literals(found, importlib.import_module(whole.stem).WHOLE_MAPS if whole.exists() else {})


# Do both sides agree?


def loss_of(
    terms: Mapping[str, Tensor], method: Method, leaves: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Run backward of the weighted terms and return the gradients."""
    total = sum(method.weights[name] * term for name, term in terms.items())
    return torch.autograd.grad(total, leaves, allow_unused=True)


def leaves_of(method: Method, student: Taps) -> list[Tensor]:
    """Return the tensors with gradients: the student's taps and the parameters of the extras."""
    return [*vars(student).values(), *(p for p in method.extra_parameters() if p.requires_grad)]


def disagreements(name: str, oracle: Oracle) -> Iterator[str]:
    """Yield a line for each term and gradient in which the two sides differ, on small inputs."""
    device = torch.device("cpu")
    method = build(name, SMALL, device)
    inputs = draw_inputs(type(method), SMALL, device)
    taps = inputs.student, inputs.teacher, inputs.labels
    results = []
    # Each side has its own copy of the method, because memories and statistics change.
    for mine, compute in ((copy.deepcopy(method), None), (copy.deepcopy(method), oracle)):
        torch.manual_seed(1)
        terms = compute(*taps, mine) if compute else mine(*taps)
        slopes = loss_of(terms, mine, leaves_of(mine, inputs.student))
        results.append(({k: v.item() for k, v in terms.items()}, slopes))
    (ours, our_slopes), (literal, slopes) = results
    if ours.keys() != literal.keys():
        yield f"{name}: the terms are {sorted(ours)}, the oracle's {sorted(literal)}"
        return
    for term, value in literal.items():
        if not abs(ours[term] - value) <= RELATIVE * abs(value) + ABSOLUTE:
            yield f"{name}: the term '{term}' is {ours[term]:.7g}, the oracle's {value:.7g}"
    lengths = [0.0 if g is None else g.norm().item() for g in slopes]
    for i, (mine, theirs) in enumerate(zip(our_slopes, slopes, strict=True)):
        zero = torch.zeros(())
        gap = (zero if mine is None else mine) - (zero if theirs is None else theirs)
        # A gradient that is zero by cancellation is compared with the largest gradient.
        if not gap.norm().item() <= OF_GRADIENTS * lengths[i] + 1e-2 * OF_GRADIENTS * max(lengths):
            yield f"{name}: gradient {i} is {gap.norm().item():.3g} off, of {lengths[i]:.3g}"


def missing_oracles(oracles: Mapping[str, Oracle]) -> list[str]:
    """Return the built-in methods with terms that have no oracle."""
    return [name for name in distilling() if name not in oracles]


def distilling() -> list[str]:
    """Return the built-in methods that have terms."""
    found = builtin_methods()
    return sorted(n for n, f in found.items() if f.origin == "built-in" and f.cls.weights)


# One side, in a separate process.


@dataclass(frozen=True)
class Task:
    """What a process runs."""

    name: str
    literal: bool
    oracles: Path
    sizes: Sizes
    device: str
    threads: int
    limit_s: float = INFINITE
    limit_bytes: float = INFINITE


@dataclass(frozen=True)
class Reply:
    """The answer to one request."""

    seconds: float = 0.0
    bytes: int | None = None
    terms: dict[str, float] = field(default_factory=dict)


@contextmanager
def in_single_precision() -> Iterator[None]:
    """Make oracles that ask for float64 compute in float32, like the methods."""
    kept = torch.float64, Tensor.double
    torch.float64, Tensor.double = torch.float32, Tensor.float
    try:
        yield
    finally:
        torch.float64, Tensor.double = kept


class Objective:
    """One side of a comparison, at one size at a time."""

    def __init__(self, task: Task):
        self.device, self.sizes = find_device(task.device), task.sizes
        self._limit_bytes = task.limit_bytes
        configure_backends(self.device, "fp32")
        self.method = build(task.name, task.sizes, self.device)
        oracle = load_literals(task.oracles).timed(task.name) if task.literal else None
        self._compute = self._literal(oracle) if oracle else self.method

    def _literal(self, oracle: Oracle) -> Callable[..., dict[str, Tensor]]:
        def compute(*taps: Any) -> dict[str, Tensor]:
            with in_single_precision():
                return oracle(*taps, self.method)

        return compute

    def make(self, by: float) -> Reply:
        """Create the inputs of a size and return the memory in use."""
        self.inputs = None
        sizes = self.sizes.divided(by)
        self.inputs = draw_inputs(type(self.method), sizes, self.device)
        self.leaves = leaves_of(self.method, self.inputs.student)
        trim()
        held = held_bytes(self.device)
        if self.device.type == "cuda" and self._limit_bytes < INFINITE:
            share = (held + self._limit_bytes) / torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)
        return Reply(bytes=held)

    def run(self, seed: int) -> Reply:
        """Run forward and backward once."""
        inputs = self.inputs
        torch.manual_seed(seed)
        synchronize(self.device)
        began = time.perf_counter()
        terms = self._compute(inputs.student, inputs.teacher, inputs.labels)
        gradients = loss_of(terms, self.method, self.leaves)
        synchronize(self.device)
        seconds = time.perf_counter() - began
        del gradients
        return Reply(seconds, None, {name: float(term.detach()) for name, term in terms.items()})

    def run_for_peak(self, seed: int) -> Reply:
        """Run once and return the peak of memory above what was in use before."""
        trim()
        before, sure = held_bytes(self.device), reset_peak(self.device)
        earlier = peak_bytes(self.device)
        with freed_at_once():
            reply = self.run(seed)
        peak = peak_bytes(self.device)
        # If the peak cannot be reset, it belongs to this run only if it exceeds the earlier peak.
        known = sure or peak > earlier
        return dataclasses.replace(reply, bytes=peak - before if known else None)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Make the C library (glibc) return every freed tensor to the system.

    Otherwise it keeps some, by a rule that depends on what ran before, and the rule would decide
    the peaks of small tensors. Afterwards it keeps what it would keep in a long run.
    """
    threshold, trimming = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(threshold, 2**16)
    try:
        yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(threshold, 2**25)
            ctypes.CDLL(None).mallopt(trimming, 2**26)


def trim() -> None:
    """Return freed memory to the system: what the allocator keeps would hide the next peak."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def held_bytes(device: torch.device) -> int:
    """Return the memory in use: the CUDA allocator's, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes(os.getpid()) or peak_bytes(device)


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process; 0 if the system does not report it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> float:
    """Return the memory that the machine has left; infinite if the system does not report it."""
    # kdprof.measure has this too, but its imports would delay each of many processes.
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return INFINITE


def reset_peak(device: torch.device) -> bool:
    """Reset the peak, and return whether that was possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Return the highest memory in use since the reset, or since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(pipe: Any, task: Task) -> None:
    """Answer requests (name of a method of Objective, argument) until None arrives."""
    torch.set_num_threads(task.threads)
    try:
        objective = Objective(task)
        pipe.send(Reply())
        for request, argument in iter(pipe.recv, None):
            pipe.send(getattr(objective, request)(argument))
    except torch.OutOfMemoryError:
        pipe.send(f"> {task.limit_bytes / GB:.1f} GB")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Stopped(Exception):
    """Raised when the oracle reaches a limit or fails; the message says which."""


class Side:
    """The process of one side, controlled by the process that compares."""

    def __init__(self, task: Task):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task), daemon=True)
        self._task, self._device, self._held = task, find_device(task.device), 0
        self._process.start()
        theirs.close()

    def __enter__(self) -> Side:
        try:
            self._answer(limited=False)
            # Loading libraries and starting threads is not part of any run's cost.
            self.make(min(self._task.sizes.grid) / LEAST_SIDE)
            self.run(0)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def make(self, by: float) -> None:
        self._held = self._ask("make", by).bytes or 0

    def run(self, seed: int) -> Reply:
        return self._ask("run", seed)

    def run_for_peak(self, seed: int) -> Reply:
        return self._ask("run_for_peak", seed)

    def _ask(self, request: str, argument: float) -> Reply:
        self._pipe.send((request, argument))
        return self._answer(limited=request != "make")

    def _answer(self, limited: bool) -> Reply:
        deadline = time.monotonic() + self._task.limit_s
        while not self._pipe.poll(0.02):
            if limited:
                self._check_memory()
            if limited and time.monotonic() > deadline:
                self._fail(f"> {self._task.limit_s:g} s")
        try:
            reply = self._pipe.recv()
        except EOFError:
            self._process.join()
            self._fail(f"the process ended, exit code {self._process.exitcode}")
        if not isinstance(reply, Reply):
            self._fail(reply)
        return reply

    def _check_memory(self) -> None:
        """Stop a run on the CPU that exceeds the memory limit; on a GPU the allocator does so."""
        if self._device.type != "cpu":
            return
        taken = resident_bytes(self._process.pid) - self._held
        if taken > self._task.limit_bytes:
            self._fail(f"> {self._task.limit_bytes / GB:.1f} GB")
        if available_bytes() < SPARE_BYTES:
            self._fail(f"> {taken / GB:.1f} GB, all free memory of the machine")

    def _fail(self, reason: str) -> NoReturn:
        """End the process; an oracle may fail, but a method may not."""
        self.close()
        if self._task.literal:
            raise Stopped(reason)
        raise KdprofError(f"{self._task.name}: the method itself could not be run: {reason}")

    def close(self) -> None:
        if self._process.is_alive():
            with suppress(OSError):
                self._pipe.send(None)
            self._process.join(0.2)
            self._process.kill()
        self._process.join()


class Here:
    """A side in this process: it starts at once, but a run of the oracle cannot be cut off. One
    that took longer than the limit is its last; its memory is limited by a GPU's allocator only."""

    def __init__(self, task: Task):
        self._task, self._objective = task, Objective(task)

    def __enter__(self) -> Here:
        self.make(min(self._task.sizes.grid) / LEAST_SIDE)
        # Without a limit: a GPU's first run loads its libraries and kernels.
        self._objective.run(0)
        return self

    def __exit__(self, *_: Any) -> None:
        device = self._objective.device
        del self._objective
        trim()
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    def make(self, by: float) -> None:
        self._ask("make", by)

    def run(self, seed: int) -> Reply:
        return self._ask("run", seed)

    def run_for_peak(self, seed: int) -> Reply:
        return self._ask("run_for_peak", seed)

    def _ask(self, request: str, argument: float) -> Reply:
        try:
            reply = getattr(self._objective, request)(argument)
        except torch.OutOfMemoryError as error:
            if not self._task.literal:
                raise
            raise Stopped(f"> {self._task.limit_bytes / GB:.1f} GB") from error
        if reply.seconds > self._task.limit_s:
            raise Stopped(f"> {self._task.limit_s:g} s")
        return reply


# The comparison of one method.


@dataclass
class Row:
    """Measurements of a method: sizes of the grid, seconds of forward + backward."""

    method: str
    full_size: str
    ours_full_s: list[float] = field(default_factory=list)
    ours_full_bytes: int | None = None
    form: str = ""
    """Form of the literal: the oracle, or its form on whole maps."""
    size: str | None = None
    """Largest grid that the oracle can do; None if it cannot do the smallest."""
    ours_s: list[float] = field(default_factory=list)
    literal_s: list[float] = field(default_factory=list)
    """Interleaved with ``ours_s``: each pair is close in time."""
    ours_bytes: int | None = None
    literal_bytes: int | None = None
    stopped: str | None = None
    """Why the oracle was not run at the full size."""
    furthest_terms: float | None = None
    """Largest relative difference of a term at the size compared, both in float32."""

    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours_s, self.literal_s, strict=True)]

    def memory_ratio(self) -> float | None:
        if not self.ours_bytes or not self.literal_bytes:
            return None
        return self.ours_bytes / self.literal_bytes


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison, and its steps for one method."""

    oracles: Path
    sizes: Sizes
    device: str
    threads: int
    repeats: int
    limit_s: float
    limit_bytes: float
    in_process: bool = False
    """True to run both sides in this process, one after the other."""

    def row(self, name: str) -> Row:
        """Measure both sides of a method."""
        row = Row(name, self.sizes.text())
        row.form = "whole maps" if name in load_literals(self.oracles).whole_maps else "oracle"
        ladder = [by for by in LADDER if min(self.sizes.divided(by).grid) >= LEAST_SIDE] or [1]
        divisors = self._possible(name, ladder, row)
        while divisors and row.size is None:
            by = divisors.pop()
            try:
                self._pairs(name, by, row)
            except Stopped as reason:
                row.stopped = self._stop(by, reason)
                row.ours_s.clear()
                row.literal_s.clear()
        if row.size == row.full_size:
            row.ours_full_s, row.ours_full_bytes = list(row.ours_s), row.ours_bytes
        else:
            self._ours_alone(name, row)
        return row

    def _possible(self, name: str, ladder: list[int], row: Row) -> list[int]:
        """Return the divisors at which the oracle stays within the limits, the largest first."""
        if len(ladder) == 1:
            return ladder
        possible: list[int] = []
        by = ladder[0]
        try:
            with self._literal(name) as literal:
                for by in ladder:
                    literal.make(by)
                    literal.run(0)
                    possible.append(by)
        except Stopped as reason:
            row.stopped = self._stop(by, reason)
        return possible

    def _pairs(self, name: str, by: int, row: Row) -> None:
        """Measure ours and the literal, interleaved."""
        with self._ours(name) as ours, self._literal(name) as literal:
            sides = ours, literal
            peaks = []
            for side in sides:
                side.make(by)
                peaks.append(side.run_for_peak(0))
            row.furthest_terms = furthest(*(p.terms for p in peaks))
            began = time.monotonic()
            for turn in range(max(self.repeats, 1)):
                order = sides if turn % 2 == 0 else sides[::-1]
                seconds = {side: side.run(turn).seconds for side in order}
                row.ours_s.append(seconds[ours])
                row.literal_s.append(seconds[literal])
                if turn + 1 >= LEAST_PAIRS and time.monotonic() - began > self.limit_s:
                    break
        row.ours_bytes, row.literal_bytes = (p.bytes for p in peaks)
        row.size = self.sizes.divided(by).text()

    def _ours_alone(self, name: str, row: Row) -> None:
        with self._ours(name) as ours:
            ours.make(1)
            row.ours_full_bytes = ours.run_for_peak(0).bytes
            began = time.monotonic()
            for turn in range(self.repeats):
                row.ours_full_s.append(ours.run(turn).seconds)
                if time.monotonic() - began > self.limit_s:
                    break

    def _stop(self, by: int, reason: Stopped) -> str:
        return f"{reason} at {self.sizes.divided(by).text()}"

    def _ours(self, name: str) -> Side | Here:
        return self._side(self._task(name))

    def _literal(self, name: str) -> Side | Here:
        limits = {"limit_s": self.limit_s, "limit_bytes": self.limit_bytes}
        return self._side(dataclasses.replace(self._task(name), literal=True, **limits))

    def _side(self, task: Task) -> Side | Here:
        return Here(task) if self.in_process else Side(task)

    def _task(self, name: str) -> Task:
        return Task(name, False, self.oracles, self.sizes, self.device, self.threads)


def furthest(ours: Mapping[str, float], literal: Mapping[str, float]) -> float:
    """Return the largest relative difference of a term."""
    return max(abs(ours[k] - v) / max(abs(v), ABSOLUTE) for k, v in literal.items())


# Output.

COLUMNS = (
    "method", "ours s", "literal s", "time ratio [low-high]", "ours GB", "literal GB",
    "memory ratio", "size compared", "literal is", "ours s, full", "ours GB, full",
    "literal at full size",
)  # fmt: skip


def three(value: float | None) -> str:
    """Return a number with three significant digits."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def gigabytes(count: int | None) -> float | None:
    return None if count is None else count / GB


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    ratios = row.ratios()
    spread = f" [{three(min(ratios))}-{three(max(ratios))}]" if ratios else ""
    return [
        row.method,
        three(median(row.ours_s)),
        three(median(row.literal_s)),
        three(median(ratios)) + spread,
        three(gigabytes(row.ours_bytes)),
        three(gigabytes(row.literal_bytes)),
        three(row.memory_ratio()),
        row.size or "none",
        row.form,
        three(median(row.ours_full_s)),
        three(gigabytes(row.ours_full_bytes)),
        f"stopped: {row.stopped}" if row.stopped else "ran",
    ]


def missed_aims(row: Row) -> Iterator[str]:
    """Yield a line for each aim that a method misses."""
    time_ratio, most = median(row.ratios()), AIMS.get(row.method, 1.0)
    if time_ratio is not None and time_ratio > most:
        unsure = "; the range includes it" if min(row.ratios()) <= most else ""
        yield f"{row.method}: time ratio {three(time_ratio)}, aim at most {most:g}{unsure}"
    memory_ratio = row.memory_ratio()
    if memory_ratio is not None and memory_ratio > 1:
        yield f"{row.method}: memory ratio {three(memory_ratio)}, aim at most 1"
    peak, most = gigabytes(row.ours_full_bytes), MEMORY_AIMS_GB.get(row.method)
    if peak is not None and most is not None and peak > most:
        yield f"{row.method}: {three(peak)} GB at {row.full_size}, aim below {most:g}"


def facts(comparison: Comparison, scale: float, device: torch.device) -> dict[str, str]:
    """Return the conditions that the numbers depend on."""
    sizes, cuda = comparison.sizes, device.type == "cuda"
    labels = "x".join(str(sizes.label_stride * side) for side in sizes.grid)
    made = {
        "device": torch.cuda.get_device_name(device) if cuda else CpuHardware().name,
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "threads": str(comparison.threads),
        "sizes": f"batch {sizes.images}, {sizes.classes} classes, grid {sizes.text()}, features "
        f"{sizes.student[-1]} (student) and {sizes.teacher[-1]} (teacher), labels {labels}",
        "precision": "float32 on both sides",
        "memory": "peak above the memory that the inputs and the extras (adaptors, memories) take: "
        + ("the CUDA allocator's" if cuda else "the process's resident set"),
        "repeats": f"{comparison.repeats} pairs; {LEAST_PAIRS} if the time limit is reached",
        "limits of the literal": f"{comparison.limit_s:g} s a run, "
        f"{comparison.limit_bytes / GB:g} GB, and the free memory of the machine",
    }
    if scale != 1:
        made["scale"] = f"sides of the grid divided by {scale:g}: NOT the published size"
    if not cuda and hasattr(os, "getloadavg"):
        load = " ".join(f"{value:.1f}" for value in os.getloadavg())
        made["noise"] = f"shared cores; load average {load} (1, 5, 15 min) at the end"
    return made


@dataclass
class Report:
    """All results so far."""

    facts: dict[str, str]
    missing: list[str]
    rows: list[Row] = field(default_factory=list)

    def markdown(self) -> str:
        """Return header, table, and the missed aims."""
        lines = ["# Objectives against their equations written out", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        if self.missing:
            lines.append(f"- missing, without an oracle: {', '.join(self.missing)}")
        table = [list(COLUMNS), ["---"] * len(COLUMNS)]
        table += [cells(row) for row in sorted(self.rows, key=lambda row: row.method)]
        lines += ["", *(f"| {' | '.join(line)} |" for line in table), ""]
        missed = [text for row in self.rows for text in missed_aims(row)]
        lines += (
            ["Aims missed:", "", *(f"- {text}" for text in missed)]
            if missed
            else ["No aim is missed."]
        )
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        rows = [
            {**dataclasses.asdict(row), "ratios": row.ratios(), "memory_ratio": row.memory_ratio()}
            for row in self.rows
        ]
        return json.dumps({**dataclasses.asdict(self), "rows": rows}, indent=1) + "\n"

    def write(self, file: Path | None) -> None:
        """Write FILE.md and FILE.json."""
        if file:
            file.with_suffix(".md").write_text(self.markdown())
            file.with_suffix(".json").write_text(self.json())


def chosen(wanted: list[str] | None, oracles: Mapping[str, Oracle]) -> list[str]:
    """Return the methods to compare, sorted."""
    for name in wanted or ():
        if name not in distilling():
            raise UserError(unknown("method", name, distilling()))
    return sorted(name for name in wanted or distilling() if name in oracles)


def run(given: argparse.Namespace) -> None:
    literals, device = load_literals(given.oracles), find_device(given.device)
    names = chosen(given.method, literals.oracles)
    problems = [
        text
        for name in names
        for form in literals.checked(name)
        for text in disagreements(name, form)
    ]
    if problems:
        raise UserError("nothing is timed because the two sides differ", *problems)
    comparison = Comparison(
        given.oracles,
        Sizes().divided(given.scale),
        str(device),
        given.threads,
        given.repeats,
        given.time_limit,
        given.memory_limit * GB,
    )
    missing = missing_oracles(literals.oracles)
    missing = [name for name in missing if not given.method or name in given.method]
    report = Report(facts(comparison, given.scale, device), missing)
    for number, name in enumerate(names, 1):
        print(f"{number}/{len(names)} {name}", file=sys.stderr, flush=True)
        report.rows.append(comparison.row(name))
        report.facts = facts(comparison, given.scale, device)
        report.write(given.out)
    print(report.markdown(), end="")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", action="append", help="a built-in method; may be repeated")
    parser.add_argument("--scale", type=float, default=1.0, help="divisor of the grid's sides")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds per run of an oracle"
    )
    parser.add_argument("--memory-limit", type=float, default=12.0, help="GB per run of an oracle")
    parser.add_argument("--out", type=Path, help="FILE: write FILE.md and FILE.json")
    parser.add_argument(
        "--oracles", type=Path, default=Path(__file__).parent, help="folder of oracles_*.py"
    )
    try:
        run(parser.parse_args())
    except KdprofError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
