"""StepTrace: what every operator of one step does, which loss term needs it, and where it waits.

A trace only observes: the traced step is the step that trains, on real tensors or fake ones.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from types import CodeType, FrameType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nested._internal.nested_tensor import NestedTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.hardware.device import synchronize
from kdprof.measure.counting.fakes import DEVICE
from kdprof.measure.counting.flop_formulas import tensors_in
from kdprof.measure.counting.operators import COMPOSITE, Operator, operator_of
from kdprof.records import Operation, OperationKind, TermCost, complete_sum
from kdprof.step import PHASES, TrainStep

WHOLE = "step"
"""The only phase of a step that marks no phases."""
FORWARD, BACKWARD = "objective", "objective_backward"
"""The phases whose work is divided among the terms."""
NO_NODES = (
    "this torch does not report which backward node runs: the terms' backward is divided like "
    "their forward"
)

_ROOTS = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))
_current_node = getattr(torch._C, "_current_autograd_node", None)

Events = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Synchronisation:
    """An operator that makes the host wait for a CUDA device."""

    operator: str
    """As torch calls it: ``aten._local_scalar_dense``, which is ``.item()``."""
    phase: str
    where: str
    """``file.py:12 in function``: the innermost line outside torch and kdprof's measuring."""
    calls: int


@dataclass(slots=True, eq=False)
class _Call:
    """One call of an operator: FLOP, bytes; ``took`` in seconds or as a pair of CUDA events.

    ``uncounted`` is the reason why the FLOP of matrix work are None.
    """

    name: str
    kind: OperationKind
    matrix_flop: float | None
    uncounted: str | None
    other_flop: float | None
    bytes_read: float
    bytes_written: float
    took: float | Events | None
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    """Storages; empty unless the data flow is followed."""
    terms: tuple[str, ...] = ()

    def seconds(self) -> float:
        """Return the seconds that it took; 0 if it was not timed."""
        if isinstance(self.took, tuple):
            return self.took[0].elapsed_time(self.took[1]) / 1e3
        return self.took or 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """What was traced of a part of a step: its calls, and the operators and places that wait."""

    calls: list[_Call]
    waits: list[tuple[str, str]]


class _Flow:
    """The numbers of storages. A new output gets a fresh number even if the allocator reuses an
    address; views and in-place writes keep the number of their storage."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._fresh = itertools.count()

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage."""
        key = storage_key(tensor)
        if key not in self._numbers:
            self._numbers[key] = next(self._fresh)
        return self._numbers[key]

    def through(
        self, operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> tuple[frozenset[int], frozenset[int]]:
        """Return the storages that a call read and wrote."""
        given = tensors_in([*args, *kwargs.values()])
        # This operator brings a constant into the graph: its address may be reused, too.
        known = set() if operator.name == "aten.lift_fresh" else {storage_key(t) for t in given}
        reads = frozenset(self.number(t) for t in given)
        made = tensors_in(out)
        for tensor in made:
            if storage_key(tensor) not in known:
                self._numbers[storage_key(tensor)] = next(self._fresh)
        places = dict([*enumerate(args), *kwargs.items()])
        made += tensors_in([places[place] for place in operator.written if place in places])
        return reads, frozenset(self.number(t) for t in made)


def storage_key(tensor: Tensor) -> int:
    """Return a key of a tensor's storage, unique while it lives; fakes have no address."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return id(tensor)


def _timed_on_host(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, float]:
    began = time.perf_counter()
    out = func(*args, **kwargs)
    return out, time.perf_counter() - began


def _timed_on_stream(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Events]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = func(*args, **kwargs)
    end.record()
    return out, (start, end)


def _untimed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, None]:
    return func(*args, **kwargs), None


class StepTrace(TorchDispatchMode):
    """Traces one step: ``with StepTrace(step) as trace: step(images, labels, i, trace.mark)``.

    Args:
        step: a TrainStep; any other callable (or None) is one phase, :data:`WHOLE`, without terms.
        timed: time every operator, with the host's clock or, on ``device`` CUDA, with events that
            are read after the step.
        device: where the step runs; if not given, a TrainStep's own device or else the CPU.

    Views, allocations and shape queries launch no kernel and move no bytes, so they are no
    operations. Operators that torch composes of others are traced as those others.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled under a trace, and each guard takes microseconds

    def __init__(
        self,
        step: Callable[..., Any] | None,
        *,
        timed: bool = False,
        device: torch.device | None = None,
    ):
        super().__init__()
        self._method = step.method if isinstance(step, TrainStep) else None
        self._timed = timed
        home = step.device if isinstance(step, TrainStep) else torch.device("cpu")
        self._device = device or home
        clock = _timed_on_stream if self._device.type == "cuda" else _timed_on_host
        self._run = clock if timed else _untimed
        self._phase = PHASES[0] if self._method is not None else WHOLE
        self._calls: dict[str, list[_Call]] = {}
        self._pending: list[_Call] = []
        self._waits: list[tuple[str, str, str]] = []
        self._pending_waits: list[tuple[str, str]] = []
        self._flow = _Flow()
        self._term_storages: dict[str, frozenset[int]] = {}
        self._saved: WeakKeyDictionary[FunctionCtx, frozenset[int]] = WeakKeyDictionary()
        self._node_terms: dict[int, tuple[str, ...]] = {}
        self._nodes: list[Any] = []
        self._running_terms: tuple[str, ...] = ()
        self._optimizer: Optimizer | None = None
        self._exit = ExitStack()
        self._shared = False

    def __enter__(self) -> StepTrace:
        before = register_optimizer_step_pre_hook(self._enter_optimizer)
        after = register_optimizer_step_post_hook(self._leave_optimizer)
        for handle in (before, after):
            self._exit.callback(handle.remove)
        if self._method is not None:
            handle = self._method.register_forward_hook(self._record_terms)
            self._exit.callback(handle.remove)
            self._exit.enter_context(self._recording_saves())
        # A compiled kernel does the work of several operators, so it could not be traced.
        self._exit.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._exit.close()
        self._close(self._phase)
        self._forget_graph()

    @contextmanager
    def _tracing_inside(self) -> Iterator[None]:
        """Trace inside an operator, too: torch disables a mode while it dispatches."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @contextmanager
    def _recording_saves(self) -> Iterator[None]:
        """Record the storages that the objective's custom autograd Functions save for backward.

        They are recorded when ``save_for_backward`` is called. Reading them from the graph later
        would call the hooks of :class:`torch.autograd.graph.saved_tensors_hooks`, and those of
        activation checkpointing compute the forward again.
        """
        save = FunctionCtx.save_for_backward

        def save_and_record(ctx: FunctionCtx, *tensors: Tensor | None) -> None:
            save(ctx, *tensors)  # type: ignore[arg-type]  # torch's stub lacks None
            if self._phase == FORWARD:
                numbers = (self._flow.number(t) for t in tensors if t is not None)
                self._saved[ctx] = frozenset(numbers)

        # torch has no hook for this.
        FunctionCtx.save_for_backward = save_and_record  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            FunctionCtx.save_for_backward = save  # type: ignore[method-assign]

    def mark(self, phase: str) -> None:
        """End a phase; the step takes this method as its ``mark``."""
        self._close(phase)
        if phase == BACKWARD:
            self._forget_graph()
        if phase in PHASES:
            self._phase = PHASES[(PHASES.index(phase) + 1) % len(PHASES)]

    def take(self) -> Part:
        """Return what was traced since the last mark, and forget it."""
        part = Part(self._pending, self._pending_waits)
        self._pending, self._pending_waits = [], []
        return part

    def add(self, part: Part) -> None:
        """Record what was traced elsewhere as if it ran now. It must be neither of the objective
        nor of its backward, whose calls belong to terms."""
        self._pending += part.calls
        self._pending_waits += part.waits

    def _close(self, phase: str) -> None:
        if self._pending:
            self._calls.setdefault(phase, []).extend(self._pending)
        self._waits += [(name, phase, where) for name, where in self._pending_waits]
        self._pending, self._pending_waits, self._optimizer = [], [], None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and record its work."""
        if func is DEVICE:
            return args[0].fake_device  # only fakes ask, several times per operator
        kwargs = kwargs or {}
        operator = operator_of(func)
        if operator.kind is None:
            out = func(*args, **kwargs)
            if self._phase == FORWARD:
                self._flow.through(operator, args, kwargs, out)
            return out
        if any(issubclass(kind, NestedTensor) for kind in types):
            return NotImplemented  # it comes back with one tensor of all its sequences
        # Nested tensors have kernels of their own, in place of those that call other operators.
        if operator.composite and not any(t.is_nested for t in tensors_in(args)):
            with self._tracing_inside():
                return func._op_dk(COMPOSITE, *args, **kwargs)
        if operator.waits is not None:
            self._record_wait(operator, args, kwargs)
        out, took = self._run(func, args, kwargs)
        self._record(operator, args, kwargs, out, took)
        return out

    def _record(
        self,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Any,
        took: float | Events | None,
    ) -> None:
        assert operator.kind is not None
        work = operator.work(args, kwargs, out)
        kind = operator.kind if work.uncounted is None else "uncounted"
        call = _Call(operator.name, self._kind(kind), *work, took)
        if self._phase == FORWARD:
            call.reads, call.writes = self._flow.through(operator, args, kwargs, out)
        elif self._phase == BACKWARD:
            call.terms = self._terms_of_node()
        self._pending.append(call)

    def _kind(self, kind: OperationKind) -> OperationKind:
        """Return ``optimizer`` for any operator of an optimiser's step but those of matrix products
        and those without a formula; else the operator's kind."""
        if self._optimizer is None or kind in ("matrix", "uncounted"):
            return kind
        return "optimizer"

    def _enter_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        self._optimizer = optimizer

    def _leave_optimizer(self, *_: Any) -> None:
        self._optimizer = None

    def _record_wait(
        self, operator: Operator, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        assert operator.waits is not None
        if not operator.waits(args, kwargs):
            return
        if not operator.transfers and self._on_host(args):
            return
        self._pending_waits.append((operator.name, _location(sys._getframe())))

    def _on_host(self, args: tuple[Any, ...]) -> bool:
        """Return whether a call only uses host memory, even if the step runs on a device."""
        if self._optimizer is not None and _is_step_count(self._optimizer, args[0]):
            return True
        on_device = self._device.type != "cpu"
        return on_device and all(t.device.type == "cpu" for t in tensors_in(args))

    def _record_terms(self, method: Any, args: Any, terms: Any) -> None:
        """Record each term's storages and the nodes of its graph, when the method returns them.

        The storages are the term's own and those that the Functions of its graph saved for
        backward: a Function may compute its gradient in the forward.
        """
        if self._phase != FORWARD or not isinstance(terms, Mapping):
            return
        owners: dict[int, list[str]] = {}
        for name, term in terms.items():
            if not isinstance(term, Tensor):
                continue
            nodes = _reachable(term.grad_fn)
            functions = [node for node in nodes if isinstance(node, FunctionCtx)]
            saved = (self._saved.get(function, frozenset()) for function in functions)
            self._term_storages[name] = frozenset({self._flow.number(term)}.union(*saved))
            self._nodes += nodes  # kept alive, so that their ids stay unique
            for node in nodes:
                owners.setdefault(id(node), []).append(name)
        self._node_terms = {node: tuple(names) for node, names in owners.items()}

    def _forget_graph(self) -> None:
        self._nodes, self._node_terms, self._running_terms = [], {}, ()

    def _terms_of_node(self) -> tuple[str, ...]:
        """Return the terms whose graph holds the running backward node.

        A node that is in no term's graph belongs to a graph that runs inside a known node
        (reentrant checkpointing), or to the weighted sum of the terms, which precedes any known
        node.
        """
        node = _current_node() if _current_node is not None else None
        if node is None:
            return ()
        self._running_terms = self._node_terms.get(id(node), self._running_terms)
        return self._running_terms

    def _share_out(self) -> None:
        """Assign the calls of the objective to their terms, on the first call only."""
        if self._shared:
            return
        self._shared = True
        forward = self._calls.get(FORWARD, [])
        for name, storages in self._term_storages.items():
            for call in _slice(forward, storages):
                call.terms += (name,)
        if self.note is not None:
            for call in self._calls.get(BACKWARD, []):
                call.terms = ()

    @property
    def note(self) -> str | None:
        """What limits the accuracy of the terms' shares with this torch; None if nothing does."""
        return NO_NODES if _current_node is None and self._term_storages else None

    def matrix_flop(self) -> dict[str, float | None]:
        """Return the matrix FLOP of each phase that has any operator, in order; None where an
        operator has matrix work that is not counted."""
        phases = self._calls.items()
        return {p: complete_sum(call.matrix_flop for call in calls) for p, calls in phases}

    def operations(self) -> list[Operation]:
        """Return the operations, one per phase, operator and kind (an operator has another kind
        inside an optimiser's step), in order of first appearance.

        ``seconds`` are the operators' own, by the clock of this trace; None unless it was timed.
        """
        self._wait_for_events()
        grouped: dict[tuple[str, str, OperationKind], list[_Call]] = {}
        for phase, calls in self._calls.items():
            for call in calls:
                grouped.setdefault((phase, call.name, call.kind), []).append(call)
        return [self._operation(*key, calls) for key, calls in grouped.items()]

    def _operation(
        self, phase: str, name: str, kind: OperationKind, calls: list[_Call]
    ) -> Operation:
        return Operation(
            phase=phase,
            name=name,
            kind=kind,
            calls=len(calls),
            matrix_flop=complete_sum(call.matrix_flop for call in calls),
            uncounted=next((call.uncounted for call in calls if call.uncounted), None),
            other_flop=complete_sum(call.other_flop for call in calls),
            bytes_read=sum(call.bytes_read for call in calls),
            bytes_written=sum(call.bytes_written for call in calls),
            seconds=sum(call.seconds() for call in calls) if self._timed else None,
        )

    def terms(self, weights: Mapping[str, float]) -> dict[str, TermCost]:
        """Return the cost of each term that the method returned, whatever its weight.

        A term's forward is every operator of the objective that computed the term or a tensor
        that a custom autograd Function of its graph saved for backward; its backward is every
        operator that ran for its graph, down to the student's outputs. Operators of several terms
        are divided equally. The result is empty if the step has no method.
        """
        self._share_out()
        self._wait_for_events()
        forward = _Shares(self._calls.get(FORWARD, ()))
        backward = _Shares(self._calls.get(BACKWARD, ()))
        if self.note is not None:
            backward = backward.like(forward, self._term_storages)
        return {
            name: TermCost(
                weight=weights[name],
                forward_flop=forward.flop_of(name),
                backward_flop=backward.flop_of(name),
                bytes_moved=forward.bytes[name] + backward.bytes[name],
                forward_s=forward.seconds[name] if self._timed else None,
                backward_s=backward.seconds[name] if self._timed else None,
            )
            for name in self._term_storages
        }

    def synchronisations(self) -> list[Synchronisation]:
        """Return the operators that make the host wait for a CUDA device. A step on a CPU shows
        them too, except copies between host and device."""
        pending = [(name, self._phase, where) for name, where in self._pending_waits]
        found = Counter(self._waits + pending)
        return [Synchronisation(*key, calls) for key, calls in found.items()]

    def _wait_for_events(self) -> None:
        if self._timed:
            synchronize(self._device)


class _Shares:
    """FLOP, bytes and seconds of calls by term; a call of several terms is divided equally.

    Attributes:
        incomplete: terms with matrix work that is not counted.
    """

    def __init__(self, calls: Iterable[_Call]):
        self.incomplete: set[str] = set()
        self.misses_calls = False
        self.flop: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.totals = [0.0, 0.0, 0.0]
        for call in calls:
            amounts = call.matrix_flop or 0.0, call.bytes_read + call.bytes_written, call.seconds()
            if call.matrix_flop is None:
                self.incomplete.update(call.terms)
                self.misses_calls = True
            self.totals = [sum(pair) for pair in zip(self.totals, amounts, strict=True)]
            for name in call.terms:
                self._add(name, [amount / len(call.terms) for amount in amounts])

    def flop_of(self, name: str) -> float | None:
        """Return the matrix FLOP of a term; None if some are not counted."""
        return None if name in self.incomplete else self.flop[name]

    def _add(self, name: str, amounts: Iterable[float]) -> None:
        for counter, amount in zip((self.flop, self.bytes, self.seconds), amounts, strict=True):
            counter[name] += amount

    def like(self, other: _Shares, names: Iterable[str]) -> _Shares:
        """Return these totals divided in proportion to another's shares."""
        made, names = _Shares(()), list(names)
        for name in names:
            given = (other.flop, other.bytes, other.seconds)
            parts = [_part(shares, name, len(names)) for shares in given]
            made._add(name, [part * total for part, total in zip(parts, self.totals, strict=True)])
        made.incomplete = set(names) if self.misses_calls else set(other.incomplete)
        return made


def _part(shares: Mapping[str, float], name: str, terms: int) -> float:
    """Return the fraction of a term; the same for each term if all shares are 0."""
    total = sum(shares.values())
    return shares[name] / total if total else 1 / terms


def _slice(calls: list[_Call], storages: frozenset[int]) -> list[_Call]:
    """Return the calls that computed what the storages hold after the last call."""
    needed, found = set(storages), []
    for call in reversed(calls):
        if not needed.isdisjoint(call.writes):
            needed |= call.reads
            found.append(call)
    return found


def _reachable(root: Any) -> list[Any]:
    """Return the autograd nodes of a graph, each once."""
    found: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in found:
            continue
        found[id(node)] = node
        waiting += [following for following, _ in node.next_functions]
    return list(found.values())


def _is_step_count(optimizer: Optimizer, tensor: Any) -> bool:
    """Return whether this is the step count that torch keeps on the host for an optimiser that is
    neither fused nor capturable: reading it does not wait, though it looks like any scalar."""
    on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
    return not on_device and any(s.get("step") is tensor for s in optimizer.state.values())


def _location(frame: FrameType | None) -> str:
    """Return ``file.py:12 in function`` of the innermost frame outside torch and kdprof.measure."""
    while frame is not None and frame.f_code.co_filename.startswith(_ROOTS):
        frame = frame.f_back
    if frame is not None:
        return _line(frame.f_code, frame.f_lineno)
    # The backward of a device runs in a separate thread of autograd.
    node = _current_node() if _current_node is not None else None
    return f"backward of {node.name()}" if node is not None else "unknown"


def location_of(error: BaseException) -> str:
    """Return ``file.py:12 in function`` of the user's line that an error came from."""
    lines = [
        _line(frame.f_code, line)
        for frame, line in walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_ROOTS)
    ]
    return lines[-1] if lines else "unknown"


def _line(code: CodeType, line: int) -> str:
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}"
