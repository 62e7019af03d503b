"""Methods in two processes, wrapped as data-parallel training wraps them.

``python -m kdprof.contract.ranks RANK FOLDER SPEC...`` is one of the two. Only digests leave it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from kdprof.contract.bench import Bench, backward, trained
from kdprof.contract.checks import reason
from kdprof.method import Found, Method, find_method
from kdprof.parallel import Call, data_parallel

WORLD = 2
PATIENCE_S = 30
"""How long one process waits for the other in a collective."""
LIMIT_S = 600
RUNS = 2
"""A parameter that backward did not reach is only noticed by the next forward."""

Report = dict[str, Any]
"""Of one method in one process: terms, digests of gradients and state, or an error."""


def in_two_processes(methods: Iterable[Found]) -> dict[str, dict[str, Report]]:
    """Run methods in two processes; return by method and rank ("0", "1") what each found."""
    methods = list(methods)
    if not dist.is_available():
        unable = {"unable": "this torch has no torch.distributed"}
        return {found.cls.name: {str(rank): unable for rank in range(WORLD)} for found in methods}
    specs = [_spec(found) for found in methods]
    with tempfile.TemporaryDirectory(prefix="kdprof-") as folder:
        environment = {**_loopback(), **os.environ, "OMP_NUM_THREADS": "1"}
        # -P: a user's queue.py in this folder is not the library's.
        command = [sys.executable, "-P", "-m", "kdprof.contract.ranks"]
        errors = [(Path(folder) / f"errors-{rank}").open("wb") for rank in range(WORLD)]
        workers = [
            subprocess.Popen(
                [*command, str(rank), folder, *specs],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors[rank],
            )
            for rank in range(WORLD)
        ]
        _wait(workers)
        for file in errors:
            file.close()
        reports = [_read(Path(folder), rank) for rank in range(WORLD)]
    return {
        found.cls.name: {str(rank): reports[rank][number] for rank in range(WORLD)}
        for number, found in enumerate(methods)
    }


def _loopback() -> dict[str, str]:
    """Return the setting that keeps gloo on this machine, where the name of the way is known."""
    try:
        names = {name for _, name in socket.if_nameindex()}
    except OSError:
        return {}
    name = next((name for name in ("lo", "lo0") if name in names), None)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name}


def _wait(workers: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + LIMIT_S
    try:
        for worker in workers:
            worker.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


class _Missing(dict):
    """The reports of a process that ended before it wrote them."""

    def __missing__(self, number: int) -> Report:
        return {"error": f"the process ended early: {self['why']}"}


def _read(folder: Path, rank: int) -> Mapping[int, Report]:
    lines = folder / f"reports-{rank}"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    words = (folder / f"errors-{rank}").read_text(errors="replace").split("\n")
    why = next((line for line in reversed(words) if line.strip()), "no message")
    return _Missing(enumerate(found), why=why)


def _spec(found: Found) -> str:
    """Return what names a method in another process."""
    if found.origin.endswith(".py"):
        return f"{Path(found.origin).resolve()}:{found.cls.__name__}"
    return found.cls.name


# Within one of the two.


def _report(spec: str, rank: int) -> Report:
    bench = Bench(find_method(spec))
    method = bench.method()
    auxiliary = method.auxiliary()
    objective = data_parallel(Call(method), method.extra_parameters())
    if auxiliary is not None:
        judge = data_parallel(Call(method, "auxiliary_forward"), auxiliary.parameters())
    for run in range(RUNS):
        method.zero_grad()
        student, teacher, labels = bench.draw(seed=WORLD * run + rank)
        for value in vars(student).values():
            value.requires_grad_()
        torch.manual_seed(WORLD * run + rank)
        terms = objective(student, teacher, labels)
        backward(terms, method.weights)
        if auxiliary is not None:
            backward(judge(student.detach(), teacher, labels), method.auxiliary_weights)
    gradients = {f"extra '{name}'": p.grad for name, p in trained(method).items()}
    return {
        "terms": {name: term.item() for name, term in terms.items()},
        "gradients": {name: _digest(value) for name, value in gradients.items()},
        "state": {name: _digest(value) for name, value in _shared_state(method).items()},
    }


def _shared_state(method: Method) -> dict[str, Tensor]:
    """Return the buffers but those of norms, which are each process's own in such training."""
    own = {
        f"{place}.{name}" if place else name
        for place, module in method.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers()
    }
    return {name: value for name, value in method.named_buffers() if name not in own}


def _digest(value: Tensor | None) -> str:
    if value is None:
        return "none"
    return sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


def _meet(folder: Path, number: int, rank: int) -> None:
    """Wait until the other process is here, too: it may be in a collective that must time out."""
    (folder / f"ready-{number}-{rank}").touch()
    deadline = time.monotonic() + 4 * PATIENCE_S
    while time.monotonic() < deadline:
        if all((folder / f"ready-{number}-{r}").exists() for r in range(WORLD)):
            return
        time.sleep(0.005)
    raise TimeoutError("the other process did not come")


def _one_method(spec: str, rank: int, folder: Path, number: int) -> Report:
    """Run a method in a process group of its own, so that one that fails spoils no other."""
    _meet(folder, number, rank)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / f'group-{number}'}",
            rank=rank,
            world_size=WORLD,
            timeout=timedelta(seconds=PATIENCE_S),
        )
    except Exception as error:  # no network, a name that cannot be resolved, ...
        return {"unable": " ".join(str(error).split())}
    try:
        return _report(spec, rank)
    except Exception as error:  # whatever a method raises is a finding
        return {"error": reason(error)}
    finally:
        dist.destroy_process_group()


def _main(rank: int, folder: Path, specs: list[str]) -> None:
    torch.set_num_threads(1)
    with (folder / f"reports-{rank}").open("w") as file:
        for number, spec in enumerate(specs):
            print(json.dumps(_one_method(spec, rank, folder, number)), file=file, flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
