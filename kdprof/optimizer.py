"""The optimiser of a training step: its parameter groups, and how it is built from the settings.

Fused everywhere: an optimiser of small operators takes longer, and without fusion a loss scaler
makes the host wait for the device. Nothing is left to torch's own choice, so the settings say what
runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kdprof.errors import Problems, UserError, nearest
from kdprof.method import Method, Network
from kdprof.study import StepSettings, own_optimizer
from kdprof.user_files import following, import_file, import_function, sources_of

NORMS, BIASES, POSITIONS, HEAD = "norms", "biases", "position_embeddings", "head"
SELECTIONS = (NORMS, BIASES, POSITIONS, HEAD)
"""Parameters that a study can name by their role. norms: of layers whose class is a normalisation
by its name; biases: of norms, too; position_embeddings: and tables of relative positions; head:
everything behind the backbone."""
_NORM_CLASS = re.compile(r"\wNorm(?![a-z])")
_POSITION_NAMES = ("pos_embed", "position_embed", "rel_pos", "relative_position",
                   "attention_bias", "pos_block")  # fmt: skip
"""Parts of the names that timm, transformers and mmsegmentation give to position embeddings."""


@dataclass(frozen=True)
class _Parameter:
    """A trained parameter, with what a selection can ask about it.

    Attributes:
        name: with dots; the method's own have none of the network's names.
        of_network: False for the extras of a method, of which only roles are known.
    """

    value: nn.Parameter
    name: str
    in_norm: bool
    in_head: bool
    of_network: bool

    def is_selected(self, selection: str) -> bool:
        """Return whether a selection of the study holds this parameter."""
        if selection == NORMS:
            return self.in_norm
        if selection == BIASES:
            last = self.name.rpartition(".")[2]
            return last == "bias" or last.endswith("_bias")
        if selection == POSITIONS:
            return any(part in self.name for part in _POSITION_NAMES)
        if selection == HEAD:
            return self.in_head
        return self.of_network and f".{selection}." in f".{self.name}."


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate and one weight decay."""

    rate_factor: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def count(self) -> int:
        """Return the number of values in its parameters."""
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(
    network: Network, method: Method | None, settings: StepSettings
) -> list[ParameterGroup]:
    """Return the groups of what a step trains, in the order of their first parameters.

    Args:
        network: the trained network.
        method: its extras are trained too; only the selections by role apply to them, because names
            belong to the network. None = without extras.

    Raises:
        UserError: a selection holds no parameter of the network, or a parameter would have two
            learning rates; reports all problems.
    """
    parameters = [*_parameters_of(network, network.parameters(), network)]
    _check_selections(network, parameters, settings)
    if method is not None:
        parameters += _parameters_of(method, method.extra_parameters(), None)
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for parameter in parameters:
        plain = any(map(parameter.is_selected, settings.no_weight_decay))
        decay = 0.0 if plain else settings.weight_decay
        key = (_rate_factor(parameter, settings.learning_rate_factors), decay)
        group = groups.setdefault(key, ParameterGroup(*key))
        group.names.append(parameter.name)
        group.parameters.append(parameter.value)
    return list(groups.values())


def _parameters_of(
    module: nn.Module, wanted: Iterable[nn.Parameter], network: Network | None
) -> Iterator[_Parameter]:
    owners: dict[int, tuple[str, str]] = {}
    for path, owner in module.named_modules():
        for name, value in owner.named_parameters(recurse=False):
            kind = type(owner).__name__
            owners.setdefault(id(value), (f"{path}.{name}".removeprefix("."), kind))
    heads = tuple(f"{head}." for head in network.heads) if network is not None else ()
    for value in wanted:
        name, kind = owners.get(id(value), ("", ""))  # a method may train what it does not register
        yield _Parameter(
            value=value,
            name=name,
            in_norm=_NORM_CLASS.search(kind) is not None,
            in_head=name.startswith(heads),
            of_network=network is not None,
        )


def _check_selections(
    network: Network, parameters: Sequence[_Parameter], settings: StepSettings
) -> None:
    """Refuse selections without a parameter, and two learning rates of one parameter."""
    problems = Problems()
    for key in ("no_weight_decay", "learning_rate_factors"):
        for selection in getattr(settings, key):
            if not any(parameter.is_selected(selection) for parameter in parameters):
                reason = _no_parameter(network, parameters, selection)
                problems.append(f"step.{key}: {network.info.name} {reason}")
    problems += _two_rates(network, parameters, settings.learning_rate_factors)
    problems.refuse()


def _no_parameter(network: Network, parameters: Sequence[_Parameter], selection: str) -> str:
    if selection == HEAD:
        return "does not say what its head is; name its modules, or give AdaptedNetwork its heads"
    if selection in SELECTIONS:
        return f"has no {selection}; leave them out"
    parts = {part for p in parameters for part in p.name.split(".") if not part.isdigit()}
    return f"has no parameter '{selection}'; {nearest(selection, parts | {*SELECTIONS})}"


def _two_rates(
    network: Network, parameters: Iterable[_Parameter], factors: Mapping[str, float]
) -> Iterator[str]:
    """Yield the pairs of selections that give one parameter two learning rates."""
    for one, other in combinations(factors, 2):
        both = [p.name for p in parameters if p.is_selected(one) and p.is_selected(other)]
        if both and factors[one] != factors[other]:
            yield (
                f"step.learning_rate_factors: {one} and {other} both hold {len(both)} parameters "
                f"of {network.info.name}, such as {both[0]}; give them one factor"
            )


def _rate_factor(parameter: _Parameter, factors: Mapping[str, float]) -> float:
    return next((factor for s, factor in factors.items() if parameter.is_selected(s)), 1.0)


def group_lines(network: Network, settings: StepSettings) -> list[str]:
    """Return what each parameter group of a network is, one line each; extras of methods are not
    in them."""
    groups = parameter_groups(network, None, settings)
    return [
        f"{network.info.name}: {settings.optimizer}, group {number} of {len(groups)}: "
        f"{len(group.parameters)} tensors, {group.count():,} parameters, learning rate "
        f"{group.rate_factor * settings.learning_rate:g}, weight decay {group.weight_decay:g}"
        for number, group in enumerate(groups, 1)
    ]


def build_optimizer(groups: Sequence[ParameterGroup], settings: StepSettings) -> Optimizer:
    """Return the optimiser of a step, each group at its own base rate.

    Raises:
        UserError: a user's function does not return an optimiser of exactly these parameters.
    """
    given: list[dict[str, Any]] = [
        {
            "params": group.parameters,
            "lr": group.rate_factor * settings.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    if settings.optimizer == "sgd":
        assert settings.momentum is not None, "filled in by the settings"
        return _with_state(torch.optim.SGD(given, momentum=settings.momentum, fused=True))
    if settings.optimizer == "adamw":
        assert settings.betas is not None, "filled in by the settings"
        assert settings.eps is not None, "filled in by the settings"
        return _with_state(
            torch.optim.AdamW(given, betas=settings.betas, eps=settings.eps, fused=True)
        )
    named = [{**one, "param_names": group.names} for one, group in zip(given, groups, strict=True)]
    return _own(named, settings)


def _with_state(optimizer: Optimizer) -> Optimizer:
    """Make now the state that the first step would make.

    Fused SGD allocates its buffers uninitialised then, and leaves them so when that step overflows,
    which under a fresh fp16 loss scale it usually does. With its state an optimiser does the same
    in every step, and needs all its memory from the beginning.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            elif group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _own(given: list[dict[str, Any]], settings: StepSettings) -> Optimizer:
    """Return the optimiser of a user's function."""
    wanted = {id(p) for group in given for p in group["params"]}
    own = own_optimizer(settings.optimizer)
    assert own is not None, "the caller asked"
    build = find_function(settings.optimizer)
    with following(own[0]):
        optimizer = build(given, settings)
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"{settings.optimizer} returned a {type(optimizer).__name__}; return a "
            "torch.optim.Optimizer, see docs/training.md"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held != wanted:
        raise UserError(
            f"{settings.optimizer}: its optimizer lacks {len(wanted - held)} of {len(wanted)} "
            f"parameters and has {len(held - wanted)} others; give it all that the groups hold"
        )
    return optimizer


def find_function(optimizer: str) -> Callable[..., Any]:
    """Return the function of ``FILE.py:FUNCTION``.

    Raises:
        UserError: the file or the function does not exist, or the file cannot be imported.
    """
    own = own_optimizer(optimizer)
    assert own is not None, "the settings refuse other names"
    own.check_exists("step.optimizer")
    return import_function(*own)


def sources_of_optimizer(optimizer: str) -> dict[str, str]:
    """Return the hashes of the files that a user's optimiser depends on, by name; else none."""
    own = own_optimizer(optimizer)
    return sources_of(import_file(own.path)) if own else {}


def state_per_value(settings: StepSettings) -> int | None:
    """Return how many values the optimiser keeps for each trained one; None with a user's."""
    if own_optimizer(settings.optimizer):
        return None
    return 2 if settings.optimizer == "adamw" else int(bool(settings.momentum))


def state_bytes(*optimizers: Optimizer | None) -> int:
    """Return the size of the state that optimisers hold now."""
    states = (s for optimizer in optimizers if optimizer for s in optimizer.state.values())
    values = (value for state in states for value in state.values())
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def clip_gradients(optimizer: Optimizer, most: float) -> None:
    """Scale all gradients down to the norm ``most`` together, if theirs is larger; the host does
    not wait for the device.

    As torch.nn.utils.clip_grad_norm_: gradients that are not finite stay so.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, most, foreach=True)
