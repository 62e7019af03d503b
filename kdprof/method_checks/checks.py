"""The checks: each returns the problems of a method, one per line, with cause and fix."""

from __future__ import annotations

import io
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kdprof.errors import UserError
from kdprof.method import IGNORE, NETWORK_TAPS, Method, Taps
from kdprof.method_checks.bench import (
    GRID,
    RUN_SEED,
    Bench,
    Inputs,
    Outcome,
    gap,
    random_batch,
    random_taps,
    same,
    seed_others,
    trained,
)

if TYPE_CHECKING:
    from kdprof.step import TrainStep

STEPS = 4
BF16_RELATIVE = 0.02
"""Eight binary digits: one rounding is up to 0.4 %, and an objective is a few of them deep."""
BF16_FLOOR = 1e-3
"""Of a weighted term. If two maps agree except for rounding, their term is rounding alone, for
which no relative bound holds; this much is negligible next to a cross-entropy (of order 1)."""
COMPILED_RELATIVE = 1e-4
COMPILED_FLOOR = 1e-7
OBJECTIVE_PHASES = ("objective", "objective_backward", "auxiliary")
GUARD = "guard logarithms, roots and divisions by 0"
_NETWORKS = ("student", "teacher")


class NotApplicable(Exception):
    """A check does not apply to a method; the message is the reason."""


class _ElsewhereError(Exception):
    """A method raised an error in another process; the message is one line."""


def taps(bench: Bench) -> list[str]:
    """Check that every declared tap is read, and no other tap."""
    method, inputs = bench.method(), bench.draw()
    student, teacher = (_Recorded(bench, who, getattr(inputs, who)) for who in _NETWORKS)
    try:
        terms = method(student, teacher, inputs.labels)
        if method.auxiliary() is not None:
            method.auxiliary_forward(student.detach(), teacher, inputs.labels)
    except (AttributeError, TypeError) as error:
        if inputs.labels is not None or "NoneType" not in str(error):
            raise
        return [f"labels are read in {_location(error)} but not declared: add 'labels' to taps"]
    problems = _undeclared(bench.cls, student.read, teacher.read)
    problems += _unread(bench.cls, student.read, teacher.read)
    if terms and not problems and _ignores_labels(bench, inputs):
        problems.append("labels are declared but change no term: remove them from taps")
    return problems


def _undeclared(cls: type[Method], student: set[str], teacher: set[str]) -> list[str]:
    theirs = "taps" if cls.teacher_taps is None else "teacher_taps"
    return [
        f"{who}.{tap} is read but not declared: add '{tap}' to {where}"
        for who, where, read, declared in (
            ("student", "taps", student, cls.student_taps()),
            ("teacher", theirs, teacher, cls.read_of_teacher()),
        )
        for tap in sorted(read.difference(declared))
    ]


def _unread(cls: type[Method], student: set[str], teacher: set[str]) -> list[str]:
    ours, theirs = set(cls.student_taps()) - student, set(cls.read_of_teacher()) - teacher
    problem = "is declared but not read, although every step computes it"
    if cls.teacher_taps is None:
        fixes = [(ours & theirs, "tap '{}'", "remove it from taps")]
        fixes += [(ours - theirs, "student.{}", "move it from taps to teacher_taps")]
        fixes += [(theirs - ours, "teacher.{}", "list only what is read in teacher_taps")]
    else:
        fixes = [(ours, "student.{}", "remove it from taps")]
        fixes += [(theirs, "teacher.{}", "remove it from teacher_taps")]
    return [
        f"{which.format(tap)} {problem}: {fix}"
        for unread, which, fix in fixes
        for tap in sorted(unread)
    ]


class _Recorded(Taps):
    """Taps that record which of them are read; every tap exists."""

    read: set[str]
    """Names of the taps that were read."""
    _maps: dict[str, Tensor]
    _origin: tuple[Bench, str]

    def __init__(self, bench: Bench, who: str, given: Taps, read: set[str] | None = None):
        generator = torch.Generator().manual_seed(1)
        images = next((len(v) for k, v in vars(given).items() if k != "classifier"), 2)
        every = random_taps(getattr(bench, who), NETWORK_TAPS, images, GRID, generator)
        self.__dict__.update(
            _maps={**vars(every), **vars(given)},
            read=set() if read is None else read,
            _origin=(bench, who),
        )

    def __getattr__(self, name: str) -> Tensor:
        maps = self.__dict__["_maps"]
        if name not in maps:
            return super().__getattr__(name)
        self.read.add(name)
        return maps[name]

    def detach(self) -> Taps:
        return _Recorded(*self._origin, Taps(**self._maps).detach(), self.read)


def _ignores_labels(bench: Bench, inputs: Inputs) -> bool:
    """Return whether labels are declared but other labels give the same terms."""
    if inputs.labels is None:
        return False
    others = inputs._replace(labels=torch.zeros_like(inputs.labels))
    first, second = bench.plain.all_terms(), bench.run(others).all_terms()
    return all(same(first[name], second[name]) for name in first)


def gradient(bench: Bench) -> list[str]:
    """Check that terms are finite scalars with weights, and that their gradient reaches the student
    and every extra parameter, but nothing of the teacher."""
    method, inputs = bench.method(), bench.draw()
    parameters = set(trained(method))
    teacher = Taps(**{tap: value.clone() for tap, value in vars(inputs.teacher).items()})
    labels = None if inputs.labels is None else inputs.labels.clone()
    outcome = bench.run(Inputs(inputs.student, teacher, labels), method)
    problems = _unweighted("weights", outcome.terms, method.weights)
    problems += _unweighted("auxiliary_weights", outcome.auxiliary, method.auxiliary_weights)
    problems += _no_scalars(outcome.all_terms())
    problems += _unreached(outcome)
    problems += [
        f"the parameter '{name}' is made after build, so no optimiser holds it: make it in build"
        for name in set(trained(method)) - parameters
    ]
    for tap, value in vars(teacher).items():
        if value.requires_grad:
            problems.append(f"gradient flows to teacher.{tap}: never let it require a gradient")
        if not same(value.detach(), getattr(inputs.teacher, tap)):
            problems.append(f"teacher.{tap} is changed in place: clone it first")
    if labels is not None and not same(labels, inputs.labels):
        problems.append("labels are changed in place: clone them first")
    return problems or _not_finite(outcome)


def _unweighted(where: str, terms: dict[str, Tensor], weights: Any) -> list[str]:
    problems = [f"term '{k}' has no weight: add it to {where}" for k in terms if k not in weights]
    return problems + [
        f"{where} has '{k}', which is never returned: return it or remove it"
        for k in weights
        if k not in terms
    ]


def _no_scalars(terms: dict[str, Tensor]) -> list[str]:
    return [
        f"term '{name}' has the shape {tuple(term.shape)}: reduce it to a scalar"
        for name, term in terms.items()
        if term.shape
    ]


def _unreached(outcome: Outcome) -> list[str]:
    if not outcome.all_terms():
        return []
    student = {k: g for k, g in outcome.gradients.items() if k.startswith("student")}
    problems = []
    if student and all(g is None or not g.any() for g in student.values()):
        problems.append(
            "no gradient reaches a student tap: compute a term from one, without detach or no_grad"
        )
    return problems + [
        f"no gradient reaches {name}: use it in a term, or make it a buffer"
        for name, g in outcome.gradients.items()
        if g is None and name not in student
    ]


def _newly_infinite(bench: Bench, outcome: Outcome, when: str, fix: str = GUARD) -> list[str]:
    """Return the problems of values that are not finite here but are on harmless inputs."""
    if _not_finite(bench.plain):
        raise NotApplicable("it is not finite on harmless inputs either")
    return _not_finite(outcome, when, fix)


def _not_finite(outcome: Outcome, when: str = "", fix: str = GUARD) -> list[str]:
    """Return a problem for each term that is not finite, or else for each such gradient."""
    problems = [
        f"{when}term '{name}' is {term.item() if not term.shape else 'not finite'}: {fix}"
        for name, term in outcome.all_terms().items()
        if not term.isfinite().all()
    ]
    return problems or [
        f"{when}the gradient of {name} is not finite: {fix}"
        for name, g in outcome.gradients.items()
        if g is not None and not g.isfinite().all()
    ]


def determinism(bench: Bench) -> list[str]:
    """Check that runs with one seed of torch's generator are the same to the last bit."""
    inputs, first = bench.draw(), bench.plain
    if first.seed != RUN_SEED:
        return ["it seeds torch's generator, which only the step may do: remove that"]
    if _differing(first, bench.run(inputs, of_python=1, of_numpy=1)) is None:
        return []
    causes = {
        (0, 0): "draws from a clock, the system or the state that other runs left",
        (1, 0): "draws from Python's random, which no run seeds",
        (0, 1): "draws from NumPy, which no run seeds",
    }
    for (of_python, of_numpy), cause in causes.items():
        name = _differing(first, bench.run(inputs, of_python=of_python, of_numpy=of_numpy))
        if name is not None:
            return [f"{name} differs between two runs of one seed: it {cause}; use torch.rand"]
    return []


def _differing(one: Outcome, other: Outcome) -> str | None:
    """Return the first value in which two runs differ."""
    expected, values = one.values(), other.values()
    return next((name for name in expected if not same(expected[name], values.get(name))), None)


def resume(bench: Bench) -> list[str]:
    """Check that a run saved after two of four steps and continued elsewhere stays the same."""
    _needs_terms(bench)
    straight, resumed = bench.step(), bench.step(seed=2)
    for i in range(STEPS // 2):
        _take(straight, i)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    fix = "keep what must outlive a step in parameters or buffers, all made in build"
    try:
        resumed.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        return [f"its checkpoint cannot be loaded ({_first_line(error)}): {fix}"]
    for i in range(STEPS // 2, STEPS):
        one, other = _take(straight, i), _take(resumed, i)
        differing = [name for name in one if not same(one[name], other[name])]
        if differing and determinism(bench):
            raise NotApplicable("no two runs of it agree")
        if differing:
            return [f"resumed from a checkpoint, term '{differing[0]}' differs: {fix}"]
    return _differing_state(straight.state_dict(), resumed.state_dict(), fix)


def _take(step: TrainStep, iteration: int) -> dict[str, Tensor]:
    seed_others(iteration, iteration)
    return step(*random_batch(iteration), iteration)


def _differing_state(one: dict[str, Any], other: dict[str, Any], fix: str) -> list[str]:
    differing = [
        f"{part} '{name}'"
        for part in ("method", "student")
        for name, value in one[part].items()
        if not same(value, other[part][name])
    ]
    return [f"resumed from a checkpoint, {name} differs: {fix}" for name in differing[:1]]


def void(bench: Bench) -> list[str]:
    """Check that terms and gradients are finite if every label is to be ignored."""
    if "labels" not in bench.cls.taps:
        raise NotApplicable("it reads no labels")
    outcome = bench.run(bench.draw(void=True))
    fix = "divide by the number of valid pixels clamped to at least 1"
    return _newly_infinite(bench, outcome, f"where every label is {IGNORE}, ", fix)


def batch_1(bench: Bench) -> list[str]:
    """Check that a batch of one image works, unless batch norm or the method itself refuses it."""
    try:
        return _of_shape(bench, "one image", images=1)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise NotApplicable("its batch norm needs several values per channel") from None
        raise


def shapes(bench: Bench) -> list[str]:
    """Check that grids need not be square or even, and need not divide the crop."""
    for h, w in ((4, 11), (13, 5)):
        problems = _of_shape(bench, f"a grid of {h}x{w}", grid=(h, w), ragged=True)
        if problems:
            return problems
    return []


def grids(bench: Bench) -> list[str]:
    """Check that student and teacher may have grids of different size."""
    _needs_terms(bench)
    if not bench.cls.needs_teacher():
        raise NotApplicable("it reads no teacher")
    cases = {"a coarser student": ((4, 6), (8, 12)), "a finer student": ((8, 12), (6, 10))}
    for name, (ours, theirs) in cases.items():
        problems = _of_shape(bench, name, grid=ours, teacher_grid=theirs)
        if problems:
            return problems
    return []


def _of_shape(bench: Bench, name: str, **shape: Any) -> list[str]:
    """Return the problems on inputs of some shape; a method may refuse them with a UserError."""
    _needs_terms(bench)
    try:
        return _newly_infinite(bench, bench.run(bench.draw(**shape)), f"with {name}, ")
    except UserError as error:
        raise NotApplicable(f"it refuses {name}: {_first_line(error)}") from None
    except RuntimeError as error:
        fix = "resize one network's maps to the other's" if "teacher_grid" in shape else ""
        fix = fix or "take sizes from the tensors"
        return [f"with {name} it stops in {_location(error)}: {_first_line(error)}; {fix}"]


def bf16(bench: Bench) -> list[str]:
    """Check that under bf16 autocast, on bf16 taps, terms are finite and close to float32's."""
    _needs_terms(bench)
    half, whole = _rounded(bench.draw())
    exact, rough = bench.run(whole), bench.run(half, bf16=True)
    weights = {**bench.method().weights, **bench.method().auxiliary_weights}
    fix = "compute this part in float32"
    problems = _newly_infinite(bench, rough, "under bf16 autocast ", fix)
    if problems:
        return problems
    for name, term in exact.all_terms().items():
        value, found = term.item(), rough.all_terms()[name].item()
        weight = abs(weights.get(name, 1.0))
        if weight * abs(found - value) > BF16_RELATIVE * weight * abs(value) + BF16_FLOOR:
            problems.append(
                f"under bf16 autocast term '{name}' is {found:.4g} instead of {value:.4g}: compute "
                "sums and differences in float32 (.float(), or autocast off)"
            )
    return problems


def _rounded(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Return the inputs as bf16, which a network under autocast returns, and the same numbers as
    float32: so only the objective's own rounding is compared, not that of its inputs."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        student, teacher = (
            Taps(**{k: v.bfloat16().to(dtype) for k, v in vars(maps).items()})
            for maps in inputs[:2]
        )
        found.append(inputs._replace(student=student, teacher=teacher))
    return found[0], found[1]


def compiled(bench: Bench) -> list[str]:
    """Check that torch.compile traces the whole objective, and that the result is the same."""
    _needs_terms(bench)
    if bench.cls.graph_breaks:
        raise NotApplicable(bench.cls.graph_breaks)
    inputs, method, eager = bench.draw(), bench.method(), bench.plain
    torch._dynamo.reset()
    try:
        # Traced, not turned into machine code: that would need a C++ compiler.
        call = torch.compile(method, fullgraph=True, dynamic=False, backend="eager")
        traced = bench.run(inputs, method, call=call)
    except torch._dynamo.exc.TorchDynamoException as error:
        return [
            f"torch.compile cannot trace all of it ({_first_line(error)}{_traced_line(error)}): "
            "rewrite that part, or give the reason for it in graph_breaks"
        ]
    finally:
        torch._dynamo.reset()
    values = traced.values()
    differing = [name for name, value in eager.values().items() if not _near(value, values[name])]
    return [
        f"compiled, {name} differs from that of the plain objective: do not keep state in Python"
        for name in differing[:1]
    ]


def _near(value: Any, other: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return same(value, other)
    bound = COMPILED_RELATIVE * value.double().norm().item() + COMPILED_FLOOR
    return same(value, other) or gap(value, other) <= bound


def _traced_line(error: BaseException) -> str:
    """Return `` at file.py:12``, the innermost line outside torch that torch.compile names."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    own = [(Path(file), line) for file, line in lines if "torch" not in Path(file).parts]
    return f" at {own[-1][0].name}:{own[-1][1]}" if own else ""


def synchronisation(bench: Bench) -> list[str]:
    """Check that nothing makes the host wait for a GPU, which would then become idle."""
    from kdprof.measure.trace import StepTrace

    _needs_terms(bench)
    step = bench.step()
    with StepTrace(step) as trace:
        step(*random_batch(0), 0, trace.mark)
    return [
        f"{found.operator} in {found.where} makes the host wait for a GPU: use an operator whose "
        "result and shape stay on the device (torch.where, sums with masks)"
        for found in trace.synchronisations()
        if found.phase in OBJECTIVE_PHASES
    ]


def ddp(bench: Bench) -> list[str]:
    """Check that extras and state stay equal in two processes under DistributedDataParallel."""
    _needs_terms(bench)
    one, other = bench.ranks["0"], bench.ranks["1"]
    unable = one.get("unable") or other.get("unable")
    if unable:
        raise NotApplicable(f"two processes cannot connect here ({unable})")
    failed = [report["error"] for report in (one, other) if "error" in report]
    if failed:
        # If one process fails, the other waits for it in vain.
        cause = min(failed, key=lambda text: "Timed out" in text)
        raise _ElsewhereError(f"in one of two processes: {cause}")
    problems = [
        f"the gradient of {name} differs between processes: average it over the processes"
        for name, value in one["gradients"].items()
        if value != other["gradients"][name]
    ]
    differing = [name for name, value in one["state"].items() if value != other["state"][name]]
    if differing:
        problems.append(
            f"the state of {', '.join(differing)} differs between processes: where "
            "torch.distributed is initialised, gather what is written to it over all processes"
        )
    return problems


CHECKS: dict[str, Callable[[Bench], list[str]]] = {
    "taps": taps,
    "gradient": gradient,
    "determinism": determinism,
    "resume": resume,
    "void": void,
    "batch-1": batch_1,
    "shapes": shapes,
    "grids": grids,
    "bf16": bf16,
    "compile": compiled,
    "synchronisation": synchronisation,
    "ddp": ddp,
}
"""All checks, in the order in which they run: a check comes after those that it builds on."""


def _needs_terms(bench: Bench) -> None:
    if not bench.cls.weights and not bench.cls.auxiliary_weights:
        raise NotApplicable("it has no terms")


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if it has no text."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def reason(error: BaseException) -> str:
    """Return why a check could not be run, in one line."""
    if isinstance(error, UserError):
        return f"it refuses small networks: {_first_line(error)}"
    if isinstance(error, _ElsewhereError):
        return str(error)
    return f"{type(error).__name__} in {_location(error)}: {_first_line(error)}"


def _location(error: BaseException) -> str:
    # Imported here: for the two processes, the import takes longer than all their work.
    from kdprof.measure.trace import location_of

    return location_of(error)


@contextmanager
def left_alone() -> Iterator[None]:
    """Restore all global state that a check or the checked method may change."""
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
