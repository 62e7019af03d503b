"""Steps of a study, counted without running them: their work, and whether they fit in memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from kdprof.errors import UserError
from kdprof.hardware.blocks import counted_for
from kdprof.measure.cost import counted_cost
from kdprof.measure.counting.count import Count, count_step, fake_tensors
from kdprof.measure.counting.counted_step import Parts
from kdprof.measure.counting.fakes import CPU
from kdprof.measure.counting.gpu_autocast import autocast_of
from kdprof.measure.counting.module_flop import modules_flop
from kdprof.measure.isolation import Failure
from kdprof.measure.memory import available_bytes
from kdprof.measure.study_step import identity_of
from kdprof.method import Network
from kdprof.processes import explain
from kdprof.progress import Progress
from kdprof.records import Cost, CountedCost
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.factory import Factory

AnyCost = TypeVar("AnyCost", bound=Cost)

COUNTED_FOR = "cuda"
"""The kind of device whose blocks, kernels and autocast a step is counted with. A count is made to
plan work on GPUs, mostly on a machine that has none; a step on a CPU is traced where it is
measured."""


@dataclass
class Measured(Generic[AnyCost]):
    """The Costs of several methods, and the methods that failed."""

    costs: list[AnyCost] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Methods that could not be measured, with the reason."""

    def summary(self) -> str:
        """Return the failures, one line each."""
        return "\n".join(f"method '{name}': {why}" for name, why in self.failures.items())


def count_costs(
    study: ResolvedStudy, names: Sequence[str], progress: Progress, *, modules: bool = False
) -> Measured[CountedCost]:
    """Count each named method's step without running it: no device is needed.

    The Costs have no latency and no memory, but the reason; no budget can be converted with them.

    Args:
        modules: also count the networks' modules with fvcore, which takes seconds.
    """
    measured: Measured[CountedCost] = Measured()
    by_module = _modules_of(study) if modules else None
    for name, made in counts(study, names, progress, COUNTED_FOR):
        if isinstance(made, Failure):
            measured.failures[name] = str(made)
        else:
            identity = identity_of(study, name)
            measured.costs.append(counted_cost(identity, made.operations, made.terms, by_module))
    return measured


def _modules_of(study: ResolvedStudy) -> dict[str, dict[str, float]]:
    step, factory = study.step, Factory(study, weights=False, ranks=None, device=CPU)
    taps = ("logits", "aux") if step.aux_weight else ("logits",)
    return {
        "student": modules_flop(factory.student(0), step.share, step.crop, taps=taps),
        "teacher": modules_flop(factory.teacher(), step.share, step.crop),
    }


def counts(
    study: ResolvedStudy, names: Sequence[str], progress: Progress, device_type: str
) -> Iterator[tuple[str, Count | Failure]]:
    """Yield each name with the count of its step at the study's full size, or why there is none.

    Neither device nor memory is needed, and nothing runs. One teacher and one student serve all
    methods, and what their steps have in common is counted once. In a group of ranks any one of
    them may count: the others take no part.

    Args:
        device_type: type of the device whose sizes of blocks and autocast are counted.
    """
    # Nothing is initialised on the meta device. What fails there is tried on the CPU: some
    # backbones ask for values while they are built.
    counters = [_Counter(study, torch.device("meta")), _Counter(study, CPU)]
    with progress.task("counting FLOP", len(names)) as advance:
        for name in names:
            # Only records go to standard output; what a user's method prints does not.
            with redirect_stdout(sys.stderr), counted_for(device_type), autocast_of(device_type):
                made = _count(counters, name)
            yield name, made
            advance(1)


def _count(counters: Sequence[_Counter], name: str) -> Count | Failure:
    for counter in counters:
        try:
            return counter.count(name)
        except (Exception, SystemExit) as error:
            failure = Failure(explain(error))
    return failure


class _Counter:
    """Counts steps of networks and methods that are built on a device, with random weights; those
    of users always on the CPU, because they may keep tensors that later steps use."""

    def __init__(self, study: ResolvedStudy, device: torch.device):
        self._study, self._device, self._mode = study, device, fake_tensors()
        self._factory = Factory(study, weights=False, ranks=None, device=device)

    def count(self, name: str) -> Count:
        with self._device if self._study.methods[name].origin == "built-in" else CPU:
            method = self._factory.method(name)
        with self._device:
            student, teacher = self._student, self._teacher if method.needs_teacher() else None
        return count_step(Parts(student, teacher, method, self._study.step), self._mode)

    @functools.cached_property
    def _student(self) -> Network:
        return self._factory.placed_student(0)

    @functools.cached_property
    def _teacher(self) -> Network:
        return self._factory.frozen(self._factory.placed_teacher())


def too_large(
    study: ResolvedStudy, names: Sequence[str], counted: Mapping[str, Count | Failure]
) -> dict[str, str]:
    """Return the methods whose steps cannot fit into memory, with the reason, before any runs.

    A step that cannot be counted on fake tensors is let through: running it will show.

    Args:
        counted: the results of :func:`counts`.

    Raises:
        UserError: no method's step fits into memory, so the study's sizes are the cause.
    """
    step, free = study.step, available_bytes(study.device)
    if free is None:
        return {}
    found = {
        name: f"a step with batch {step.share} and crop {step.crop[0]}x{step.crop[1]} needs at "
        f"least {made.least_memory_bytes / 2**30:.1f} GiB, {study.device} has "
        f"{free / 2**30:.1f} GiB free; lower --crop or --batch"
        for name in names
        if isinstance(made := counted[name], Count) and made.least_memory_bytes > free
    }
    if found and len(found) == len(names):
        raise UserError(*Measured[Cost](failures=found).summary().splitlines())
    return found
