"""The process of one piece: it does what a request asks for and writes the result.

A result is ``state`` (done or failed), ``reason`` and ``result``. What a piece finds (a check that
does not hold) is a result; failed is a piece that could not be carried out.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdprof.processes import explain, read_request
from kdprof.progress import Progress


def identify(device: str, data: str | None) -> dict[str, Any]:
    """Return what a reference depends on: device, versions, code, data; and the methods."""
    import hashlib

    import kdprof
    from kdprof import methods
    from kdprof.discovery import builtin_methods, source_hash
    from kdprof.hardware import hardware_of
    from kdprof.hardware.device import find_device, versions

    folders = [Path(module.__file__).resolve().parent for module in (kdprof, methods)]
    code = "".join(source_hash(folder, ("**/*.py",)) for folder in folders)
    files = [] if data is None else sorted(path for path in Path(data).rglob("*"))
    listing = "\n".join(f"{f.relative_to(data)} {f.stat().st_size}" for f in files if f.is_file())
    return {
        "device": hardware_of(find_device(device)).name,
        "place": str(find_device(device)),
        "versions": versions(),
        "code": hashlib.sha256(code.encode()).hexdigest()[:12],
        "data": None if data is None else hashlib.sha256(listing.encode()).hexdigest()[:12],
        "methods": [n for n, found in builtin_methods().items() if found.origin == "built-in"],
    }


def measure(
    source: str, overrides: dict[str, Any], measuring: dict[str, Any], out: str
) -> dict[str, str]:
    """Measure the methods of a study; return those that could not be measured, with the reason."""
    from kdprof.measure.profiles import Files
    from kdprof.workflow import Workflow

    workflow = Workflow.open(source, overrides, Path(out), Progress(None), measuring=measuring)
    return workflow.measure(Files(None, None), lambda path: None).failures


def teacher(source: str, overrides: dict[str, Any], out: str, costs: str) -> None:
    """Train the teacher of a study, with Costs that were measured in another folder."""
    from kdprof.store import Store
    from kdprof.workflow import Workflow

    for cost in Store(Path(costs)).costs():
        Store(Path(out)).write_cost(cost)
    workflow = Workflow.open(source, overrides, Path(out), Progress(None))
    workflow.prepare_jobs(workflow.study.methods, None)


def train(source: str, overrides: dict[str, Any], out: str) -> list[str]:
    """Train the runs of a study that are not finished; return the failures."""
    from kdprof.workflow import Workflow

    return Workflow.open(source, overrides, Path(out), Progress(None)).train().failures


def report(out: str, budgets: list[str]) -> dict[str, Any]:
    """Write everything that ``kdprof plot`` writes, and claims; return the sentences of the verdict
    and the outcome of each claim."""
    from kdprof.errors import KdprofError
    from kdprof.reports.claims import make_claim, write_claim
    from kdprof.reports.plot import write_all
    from kdprof.store import Store

    from .plan import statements

    store, claims = Store(Path(out)), {}
    verdict = write_all(store, formats=("png",)).verdict
    finished = {(run.method, run.budget) for run in store.runs() if run.finished}
    reached = [one for one in budgets if any(budget == one for _, budget in finished)]
    methods = sorted(name for name, budget in finished if reached and budget == reached[-1])
    for text in statements(methods, reached):
        try:
            claim = make_claim(store, text)
            write_claim(store, claim, None)
            claims[text] = f"{claim.outcome}: {claim.reason}"
        except KdprofError as error:
            claims[text] = f"not judged: {'; '.join(str(error).splitlines())}"
    return {"sentences": list(verdict.sentences) if verdict else [], "claims": claims}


def figures(out: str, target: str) -> list[str]:
    """Write the figures and the page of the cost report of the folder ``out`` into the folder
    ``target``; return the names of files."""
    from kdprof.reports import costs
    from kdprof.reports.figures.files import render
    from kdprof.store import Store, write_atomic

    store, names = Store(Path(out)), []
    pages = [path for path in costs.render(store) if path.suffix == ".md"]
    for path in [*render(store, None, formats=("png",)), *pages]:
        names.append(path.name)
        write_atomic(Path(target) / path.name, path.read_bytes())
    return names


def objective(name: str, device: str, scale: float) -> dict[str, Any]:
    """Compare a method's objective with its written-out form, both in this process."""
    import objectives
    import torch

    literals = objectives.load_literals(Path(objectives.__file__).parent)
    if name not in literals.oracles:
        return {"missing": True}
    wrong = [
        text for form in literals.checked(name) for text in objectives.disagreements(name, form)
    ]
    if wrong:
        return {"differs": wrong}
    comparison = objectives.Comparison(
        oracles=Path(objectives.__file__).parent,
        sizes=objectives.Sizes().divided(scale),
        device=device,
        threads=torch.get_num_threads(),
        repeats=5,
        limit_s=1.0,
        limit_bytes=24 * objectives.GB,
        in_process=True,
    )
    row = comparison.row(name)
    facts = objectives.facts(comparison, scale, objectives.find_device(device))
    return {"row": asdict(row), "facts": facts}


def check(name: str, **arguments: Any) -> dict[str, Any]:
    """Make one of the checks."""
    from reference_parts import checks

    return checks.CHECKS[name](**arguments)


WORK: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (identify, measure, teacher, train, report, figures, objective, check)
}


def main() -> None:
    """Do what the request asks for."""
    asked = read_request()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its own children end, too
    os.chdir(asked.content["folder"])
    try:
        result = WORK[asked.content["kind"]](**asked.content["arguments"])
    except Exception as error:
        asked.write_result({"state": "failed", "reason": explain(error)})
        raise
    asked.write_result({"state": "done", "result": result})


if __name__ == "__main__":
    main()
