"""A parity file: what it holds, and how a module is filled with its parameters."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdprof.method import NetworkInfo


@dataclass
class Case:
    """A parity file: inputs as leaves, expected outputs and gradients, on a device."""

    path: Path
    device: torch.device
    arrays: dict[str, np.ndarray] = field(init=False)
    leaves: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        with np.load(self.path, allow_pickle=False) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.leaves = {
            name: self.tensor(name).requires_grad_(f"grad.{name}" in self.arrays)
            for name in self.arrays
            if "." not in name or name.startswith("param.")
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name])).to(self.device)

    def hp(self, name: str):
        return self.arrays[f"hp.{name}"].item()

    def maps(self, kind: str) -> tuple[Tensor, Tensor]:
        return self[f"{kind}_S"], self[f"{kind}_T"]

    def expected(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.arrays
            if name.startswith(prefix)
        }


@dataclass
class Outcome:
    outputs: dict[str, Tensor]
    gradients_of: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)


def inputs(case: Case, *extra: tuple[str, Tensor]) -> dict[str, Tensor]:
    return {**{n: t for n, t in case.leaves.items() if t.requires_grad}, **dict(extra)}


def info(case: Case, who: str) -> NetworkInfo:
    channels = case[f"feat_{who}"].shape[1]
    return NetworkInfo(who, 0, {"head": channels}, {})


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a leaf of the file in the place of a parameter, so that it receives the gradient."""
    *path, last = name.split(".")
    owner = module.get_submodule(".".join(path))
    if last in owner._parameters:
        del owner._parameters[last]
        setattr(owner, last, value)
    else:
        owner._buffers[last] = value.detach()


def install(module: nn.Module, case: Case, names: dict[str, str]) -> nn.Module:
    """Fill a module with the file's parameters; ``names``: file's name -> ours, prefixes too."""
    for key, leaf in case.leaves.items():
        if key.startswith("param."):
            theirs = key.removeprefix("param.")
            set_parameter(module, names[theirs], leaf)
    return module.train(case.hp("module_mode") == "train")
