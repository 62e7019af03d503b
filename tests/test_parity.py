"""Every loss against numbers that its authors' own code produced."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_case import Case
from parity_map import TERMS

DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "parity"
FOLDER = Path(os.environ.get("KDPROF_PARITY", DEFAULT))
FILES = sorted(FOLDER.glob("*.npz"))
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def loss_of(path: Path) -> str:
    with np.load(path, allow_pickle=False) as file:
        return str(file["meta.loss"])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance, in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@pytest.mark.skipif(
    not FOLDER.exists() and "KDPROF_PARITY" not in os.environ,
    reason=f"no folder {FOLDER}; set KDPROF_PARITY",
)
def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parity(path):
    check_parity(path, torch.device("cpu"))


def check_parity(path: Path, device: torch.device) -> None:
    """Compare outputs, gradients and the state after the step with those of a file."""
    case, loss = Case(path, device), loss_of(path)
    assert loss in TERMS, f"no method of kdprof has the loss '{loss}'"
    with device:  # where modules are built, too
        outcome = TERMS[loss](case)
    expected = case.expected("out.")
    assert outcome.outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(outcome.outputs[name].detach(), value) <= VALUE_TOLERANCE, name
    cotangents = case.expected("cot.")
    one = torch.ones((), device=device)
    total = sum((cotangents.get(n, one) * v).sum() for n, v in outcome.outputs.items())
    gradients = case.expected("grad.")
    assert gradients.keys() == outcome.gradients_of.keys()
    found = torch.autograd.grad(total, [outcome.gradients_of[n] for n in gradients])
    for (name, value), ours in zip(gradients.items(), found, strict=True):
        assert distance(ours, value) <= GRADIENT_TOLERANCE, name
    state = case.expected("state_after.")
    assert state.keys() == outcome.state.keys()
    for name, value in state.items():
        assert distance(outcome.state[name], value) <= VALUE_TOLERANCE, name
