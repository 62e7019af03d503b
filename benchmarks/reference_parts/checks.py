"""The checks of a device: what it has, and whether its numbers are right and repeat.

Each returns ``outcome`` (passed, failed or not checked) and ``lines``, which name no place.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kdprof.hardware import hardware_of
from kdprof.hardware.device import configure_backends, find_device, synchronize
from kdprof.processes import explain
from kdprof.reports.atlas_check import without_paths

from .checking import PASSED

BENCHMARKS = Path(__file__).resolve().parent.parent
TESTS = BENCHMARKS.parent / "tests"
NAMING = {"host name", "account", "home folder", "temporary folder"}
"""Findings of the doctor that name a person or a machine."""
PARITY_FILES = 10
STEPS = 3
"""Before a step is watched: caches fill, kernels are chosen."""
Check = dict[str, Any]


def _found(outcome: str, lines: Sequence[str]) -> Check:
    return {"outcome": outcome, "lines": [without_paths(line) for line in lines]}


def doctor(device: str) -> Check:
    """What the machine has; what is missing is no failure."""
    from kdprof.measure.doctor import findings

    where = find_device(device)
    rows = [row for row in findings(where, hardware_of(where)) if row.what not in NAMING]
    lines = [f"{row.what}: {row.found}" + (f" ({row.costs})" * bool(row.costs)) for row in rows]
    return _found(PASSED, lines)


def resume(device: str, kills: int) -> Check:
    """A run that is killed and started again must end with the same bits."""
    program = [sys.executable, str(BENCHMARKS / "kills.py"), "--kills", str(kills), "--seed", "1"]
    options = ["--set", f"device={device}"]
    options += ["--set", "step.deterministic=true"] if device.startswith("cuda") else []
    # It forks: if this process is asked to end, all of them must.
    with subprocess.Popen(
        [*program, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return _found("failed" if process.returncode else PASSED, said.strip().splitlines()[-1:])


def synchronisation(device: str, methods: list[str], precision: str) -> Check:
    """No step may make the host wait for the device: torch raises an error where one does. On a
    CPU, which never waits, the operators that would are looked for."""
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import load_study

    small = {
        "student": "pspnet-test_resnet",
        "teacher": "pspnet-test_resnet",
        "device": device,
        "methods": methods,
        "step.batch": 2,
        "step.crop": [64, 96],
        "step.precision": precision,
        "data_settings.synthetic_size": [72, 104],
        "data_settings.synthetic_train": 4,
    }
    study = ResolvedStudy(load_study(None, small))
    configure_backends(study.device, precision)
    lines = []
    for name in methods:
        try:
            lines += [f"{name}: {wait}" for wait in _waits(study, name)]
        except Exception as error:
            lines.append(f"{name}: {explain(error)}")
    return _found("failed" if lines else PASSED, lines or [f"{len(methods)} methods"])


def _waits(study: Any, name: str) -> Iterator[str]:
    from kdprof.measure.trace import StepTrace

    factory = study.factory
    reads = study.methods[name].cls.needs_teacher()
    step = factory.step(name, factory.frozen(factory.placed_teacher()) if reads else None)
    images, labels = factory.batches(0).batch(0, study.device)
    for index in range(STEPS):
        step(images, labels, index)
    synchronize(study.device)
    if study.device.type == "cuda":
        with _errors_at_waits():
            step(images, labels, STEPS)
        return
    with StepTrace(step) as trace:
        step(images, labels, STEPS, trace.mark)
    for wait in trace.synchronisations():
        yield f"{wait.operator} in {wait.phase} at {wait.where}"


@contextmanager
def _errors_at_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parity(device: str) -> Check:
    """Terms and gradients of ten of the files that authors' own code produced, on the device."""
    sys.path.insert(0, str(TESTS))
    try:
        tests = importlib.import_module("test_parity")
    except ImportError as error:
        return _found("not checked", [f"the tests cannot be imported: {error}"])
    if not tests.FILES:
        return _found("not checked", ["no folder with files of parity; name it in KDPROF_PARITY"])
    where = find_device(device)
    configure_backends(where, "fp32")
    step = max(1, len(tests.FILES) // PARITY_FILES)
    chosen, lines = tests.FILES[::step][:PARITY_FILES], []
    for path in chosen:
        try:
            tests.check_parity(path, where)
        except Exception as error:
            lines.append(f"{path.stem}: {type(error).__name__}: {' '.join(str(error).split())}")
    return _found("failed" if lines else PASSED, lines or [f"{len(chosen)} files"])


CHECKS: dict[str, Callable[..., Check]] = {
    function.__name__: function for function in (doctor, synchronisation, parity, resume)
}
