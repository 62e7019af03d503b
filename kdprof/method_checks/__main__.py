"""One of the two processes that kdprof.method_checks.two_ranks starts. Only digests leave it."""

from __future__ import annotations

import time
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from kdprof.discovery import find_method
from kdprof.distributed.data_parallel import CallableModule, data_parallel
from kdprof.method import Method
from kdprof.method_checks.bench import Bench, backward, trained
from kdprof.method_checks.checks import reason
from kdprof.method_checks.two_ranks import WORLD, RankReport
from kdprof.processes import read_request, send

PATIENCE_S = 30
"""How long one process waits for the other in a collective operation."""
RUNS = 2
"""Only the next forward reports a parameter that backward did not reach."""


def _report(spec: str, rank: int) -> RankReport:
    bench = Bench(find_method(spec))
    method = bench.method()
    auxiliary = method.auxiliary()
    objective = data_parallel(CallableModule(method), method.extra_parameters())
    if auxiliary is not None:
        judge = data_parallel(CallableModule(method, "auxiliary_forward"), auxiliary.parameters())
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
    """Return the buffers except those of norms, which differ between processes in training."""
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
    """Wait for the other process, which may be in a collective operation that must time out."""
    (folder / f"ready-{number}-{rank}").touch()
    deadline = time.monotonic() + 4 * PATIENCE_S
    while time.monotonic() < deadline:
        if all((folder / f"ready-{number}-{r}").exists() for r in range(WORLD)):
            return
        time.sleep(0.005)
    raise TimeoutError("the other process did not come")


def _one_method(spec: str, rank: int, folder: Path, number: int) -> RankReport:
    """Run a method in a separate process group, so that its failure does not affect others."""
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


def main() -> None:
    """Run each method and send its report."""
    torch.set_num_threads(1)
    asked = read_request()
    for number, spec in enumerate(asked.content["specs"]):
        send("report", _one_method(spec, asked.rank, asked.folder, number))


if __name__ == "__main__":
    main()
