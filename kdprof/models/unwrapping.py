"""The state dict in a file, taken out of what other projects wrap around it.

A state dict may lie under names (``state_dict``, ``model_ema``, ``step.student``), and its keys may
begin with those of wrappers (``module.``, ``model.``). No list of projects is needed: the right
place is the one whose keys are those of a network. Where two places fit, the averaged weights are
taken, which are those that the projects themselves load and report, or the file is refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdprof.errors import Problems, UserError, nearest, shortened, some
from kdprof.models.weight_files import STATE_DICT, WeightFile

DEPTH = 3
"""How many names may lie around a state dict, and how many before its keys."""
_WRAPPER = re.compile(r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch's own wrappers put into the keys of the part of a network that they wrap."""
_AVERAGED = {"ema", "swa", "avg", "average", "averaged"}
"""Words in names of weights that are means over iterations."""
COPIES = "ema_"
"""Beginning of the keys under which mmcv's EMAHook keeps other weights of the same network."""
USABLE = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip

Fits = Callable[[Collection[str]], float]
"""Returns how well keys fit a network: 0 not at all, 1 fully."""


@dataclass(frozen=True)
class StateDict:
    """A state dict in a file.

    Attributes:
        state: its tensors; ``prefix`` and torch's wrappers are taken off their keys.
        entries: everything that lies where it lies.
        path: the names around it.
        prefix: what its keys begin with in the file.
        copies: whether its parameters are those that mmcv's EMAHook keeps beside the network's.
        averaged: whether it was taken because it holds averaged weights.
        instead: the places of other weights of the same network.
    """

    state: dict[str, Tensor]
    entries: Mapping[Any, Any]
    path: tuple[str, ...]
    prefix: str = ""
    copies: bool = False
    averaged: bool = False
    instead: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it lies, as in ``FILE#PLACE``; empty if that is the file itself."""
        prefix = self.prefix.removesuffix(".")
        return ".".join(filter(None, [*self.path, prefix, COPIES if self.copies else ""]))

    @property
    def left(self) -> list[str]:
        """The entries beside it that are not part of it, by their keys in the file."""
        copies = {_copy_of(key) for key in self.state}
        keys = {str(key): _cleaned(str(key)) for key in self.entries}
        return [
            key
            for key, clean in keys.items()
            if not clean.startswith(self.prefix)
            or clean.removeprefix(self.prefix) not in self.state.keys() | copies
        ]

    def told(self) -> str:
        """Return in words what was taken and what was not; empty if that is the whole file."""
        wrappers = {found for key in self.entries for found in _WRAPPER.findall(str(key))}
        off = [
            f"`{shortened(name)}`"
            for name in (self.prefix, *sorted(f"{w}." for w in wrappers))
            if name
        ]
        kind = "averaged weights" if self.averaged else "weights"
        parts = [f"{kind} under `{shortened('.'.join(self.path))}`"] if self.path else []
        parts += [f"prefix {' and '.join(off)} taken off"] if off else []
        parts += [f"parameters from mmcv's `{COPIES}` entries"] if self.copies else []
        places = map(shortened, self.instead)
        parts += [f"others under `{place}` (FILE#{place} takes them)" for place in places]
        if left := self.left:
            parts.append(f"left out: {some(left)}")
        if self.state and not any(tensor.any() for tensor in self.state.values()):
            parts.append("all of them are 0")
        return ", ".join(parts)


def unwrapped(file: WeightFile, fits: Fits, infinite: Collection[str] = ()) -> StateDict:
    """Return the state dict in a file whose keys fit best; if none fits, the largest one.

    Args:
        infinite: keys of tensors that may hold infinities, such as masks.

    Raises:
        UserError: the file holds no tensors, nothing at the place that is asked for, or several
            state dicts that fit, and nothing tells which one is meant; or its tensors cannot be
            used as weights.
    """
    every = [one for path, held in _mappings(file.content) for one in _read(file, path, held)]
    if not every:
        held = some(str(key) for key in file.content) or "none"
        raise UserError(f"{file.path} holds no tensors; its keys are {held}; {STATE_DICT}")
    there = [one for one in every if _is_at(one, file.place)]
    if not there:
        known = [shortened(one.place) for one in every if one.place and fits(one.state)]
        fix = nearest(str(file.place), known)
        raise UserError(f"{file.path} has no weights at '{file.place}'; {fix}")
    chosen = _preferred(file, _best(there, fits))
    copies = replace(chosen, copies=True).place
    if not chosen.copies and any(one.copies and one.place == copies for one in every):
        chosen = replace(chosen, instead=(*chosen.instead, copies))
    _check_keys(file, chosen)
    _check_tensors(file, chosen.state, infinite)
    return chosen


def _mappings(
    held: Mapping[Any, Any], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Yield each mapping that holds tensors, once, with the names around it."""
    seen = set() if seen is None else seen
    if id(held) in seen:
        return
    seen.add(id(held))
    if any(_tensor(value) is not None for value in held.values()):
        yield path, held
    for key, value in held.items():
        if len(path) < DEPTH and isinstance(key, str) and isinstance(value, Mapping):
            yield from _mappings(value, (*path, key), seen)


def _tensor(value: Any) -> Tensor | None:
    """Return a tensor, or an array of numbers as a tensor; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None


def _read(file: WeightFile, path: tuple[str, ...], held: Mapping[Any, Any]) -> Iterator[StateDict]:
    """Yield what a mapping may be read as: with each beginning of its keys as a prefix, without and
    with mmcv's copies.

    Raises:
        UserError: two keys differ only in torch's wrappers.
    """
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in held.items():
        if not isinstance(key, str) or (tensor := _tensor(value)) is None:
            continue
        clean = _cleaned(key)
        if clean in groups[""]:
            raise UserError(
                f"{file.path} has '{shortened(clean)}' twice, in a wrapper of torch and without; "
                "remove one"
            )
        for depth in range(min(clean.count("."), DEPTH) + 1):
            names = clean.split(".", depth)
            prefix = clean.removesuffix(names[-1])
            groups[prefix][names[-1]] = tensor
    for prefix, state in (groups or {"": {}}).items():
        pairs = {key: _copy_of(key) for key in state if _copy_of(key) in state}
        own = {key: state[key] for key in state.keys() - pairs.values()} if pairs else state
        yield StateDict(own, held, path, prefix)
        if pairs:
            yield StateDict(state, held, path, prefix)
            copied = {key: state[pairs.get(key, key)] for key in own}
            yield StateDict(copied, held, path, prefix, copies=True)


def _cleaned(key: str) -> str:
    return _WRAPPER.sub("", key)


def _copy_of(key: str) -> str:
    """Return the key under which mmcv's EMAHook keeps a second value of a parameter."""
    return COPIES + key.replace(".", "_")


def _is_at(one: StateDict, place: str | None) -> bool:
    """Return whether a state dict lies at or below a place. Copies are taken only if they are asked
    for."""
    if one.copies:
        return one.place == place
    return place is None or one.place == place or one.place.startswith(f"{place}.")


def _best(there: Sequence[StateDict], fits: Fits) -> list[StateDict]:
    """Return the state dicts that fit best, of each mapping the ones with the shortest prefix."""
    scores = [fits(one.state) for one in there]
    top = max(scores)
    if not top:
        return [max(there, key=lambda one: len(one.state))]
    fitting: dict[str, StateDict] = {}
    for score, one in zip(scores, there, strict=True):
        if score == top:
            fitting.setdefault(one.place, one)  # that without mmcv's copies comes first
    shortest: dict[tuple[str, ...], int] = {}
    for one in fitting.values():
        depth = one.prefix.count(".")
        shortest[one.path] = min(depth, shortest.get(one.path, depth))
    return [one for one in fitting.values() if one.prefix.count(".") == shortest[one.path]]


def _preferred(file: WeightFile, found: Sequence[StateDict]) -> StateDict:
    """Return the only state dict, or the averaged one of two.

    Raises:
        UserError: nothing tells which one is meant.
    """
    if len(found) == 1:
        return found[0]
    averaged = [one for one in found if _is_averaged(one, file.content)]
    if len(found) == 2 and len(averaged) == 1:
        (other,) = (one for one in found if one is not averaged[0])
        return replace(averaged[0], averaged=True, instead=(other.place,))
    places = [one.place for one in found]
    raise UserError(
        f"{file.path} holds weights under {some(places)}, which fit equally; say which, as in "
        f"{file.path}#{shortened(places[0] or places[-1])}"
    )


def _is_averaged(one: StateDict, content: Mapping[Any, Any]) -> bool:
    """Return whether weights are averaged ones, by the names around them.

    Two projects exchange the two before they write them, so that ``state_dict`` holds the averaged
    ones: mmengine's EMAHook (``before_save_checkpoint``), whose ``ema_state_dict`` counts
    ``steps``, and Lightning's WeightAveraging (``on_save_checkpoint``).
    """
    others = content.get("ema_state_dict")
    if "current_model_state" in content or (isinstance(others, Mapping) and "steps" in others):
        return one.path == ("state_dict",)
    return not _AVERAGED.isdisjoint(re.split(r"[._]", one.place))


def _check_keys(file: WeightFile, one: StateDict) -> None:
    odd = [repr(key) for key in one.entries if not isinstance(key, str)]
    if odd:
        where = f" under `{shortened(one.place)}`" if one.place else ""
        raise UserError(
            f"{file.path}: {len(odd)} keys{where} are no text ({some(odd)}); {STATE_DICT}"
        )


def _check_tensors(
    file: WeightFile, state: Mapping[str, Tensor], infinite: Collection[str]
) -> None:
    """Refuse tensors that cannot be weights.

    Raises:
        UserError: names each kind of such tensors.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for key, tensor in state.items():
        if (why := _unusable(key, tensor, key in infinite)) is not None:
            found[why].append(key)
    Problems(
        f"{file.path}: {len(keys)} of {len(state)} tensors {what} ({some(keys)}); {mend}"
        for (what, mend), keys in found.items()
    ).refuse()


def _unusable(key: str, tensor: Tensor, may_be_infinite: bool) -> tuple[str, str] | None:
    """Return why a tensor cannot be used, and the mend; None if it can. Its values are looked at
    only if they are all in the file: a view of few values may have a shape of any size."""
    diverged = "use weights of a training that did not diverge"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"are no plain tensors but {type(tensor).__name__}s", "save plain ones"
    if tensor.is_meta:
        return "have no values (device 'meta')", "save them from a CPU or GPU"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "are sparse or nested", "save them with .to_dense()"
    if tensor.is_quantized:
        return "are quantised", "save them with .dequantize()"
    if tensor.dtype not in USABLE:
        return f"are {str(tensor.dtype).removeprefix('torch.')}", "save them with .float()"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "have more elements than values (expanded)", "save them with .contiguous()"
    if tensor.isnan().any():
        return "hold NaN", diverged
    if tensor.isinf().any() and not may_be_infinite:
        return "hold infinities", diverged
    if key.endswith("running_var") and (tensor < 0).any():
        return "are variances below 0", "get the file again"
    return None
