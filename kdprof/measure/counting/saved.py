"""The bytes that the graphs of a step save for backward."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kdprof.measure.trace import storage_key


@dataclass(frozen=True)
class Saved:
    """What is saved at one moment.

    Attributes:
        holders: how many graphs hold each storage.
        sizes: bytes of each storage.
        packed: the storage of each tensor that was saved until now, in order.
        tensors: those that are still saved; while they live, no other storage gets their key.
    """

    holders: Counter[int]
    sizes: dict[int, int]
    peak_bytes: int
    packed: list[int]
    tensors: list[Tensor]


class _Held:
    """A saved tensor, which lives as long as the graph keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class SavedForBackward:
    """Follows what graphs save for backward. Views of one storage count once.

    Args:
        parameters: what is in memory anyway and is not counted.

    Attributes:
        now_bytes, peak_bytes: what is saved, and the most that was.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = {storage_key(p) for p in parameters}
        self._holders: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._packed: list[tuple[weakref.ref[_Held], int]] = []
        self.now_bytes = self.peak_bytes = 0

    def hooks(self) -> AbstractContextManager[None]:
        """Return the context whose graphs are followed."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> _Held:
        held, key = _Held(tensor), storage_key(tensor)
        if key in self._parameters:
            return held
        self._packed.append((weakref.ref(held, lambda _: self.release(key)), key))
        self._holders[key] += 1
        if self._holders[key] == 1:
            self._sizes[key] = tensor.untyped_storage().nbytes()
            self.now_bytes += self._sizes[key]
            self.rise_to(self.now_bytes)
        return held

    def release(self, key: int) -> None:
        """Forget that a graph holds a storage."""
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self.now_bytes -= self._sizes[key]

    def rise_to(self, size: int) -> None:
        """Record that so many bytes were saved at a time."""
        self.peak_bytes = max(self.peak_bytes, size)

    def held(self) -> set[int]:
        """Return which of the tensors that were saved, by their number, still are."""
        return {number for number, (held, _) in enumerate(self._packed) if held() is not None}

    def state(self) -> Saved:
        """Return what is saved now."""
        alive = [held() for held, _ in self._packed]
        return Saved(
            holders=Counter(self._holders),
            sizes=dict(self._sizes),
            peak_bytes=self.peak_bytes,
            packed=[key for _, key in self._packed],
            tensors=[held.tensor for held in alive if held is not None],
        )

    def restore(self, state: Saved) -> None:
        """Continue where another step was that has done the same until now."""
        self._holders, self._sizes = Counter(state.holders), dict(state.sizes)
        self.now_bytes = sum(state.sizes[key] for key, count in state.holders.items() if count)
        self.peak_bytes = state.peak_bytes


def _unpack(held: _Held) -> Tensor:
    return held.tensor
