"""Every loss against numbers that its authors' own code produced."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from parity_case import Case
from parity_map import NOT_YET, TERMS

DEFAULT = Path(__file__).resolve().parent.parent.parent / "shared" / "parity"
FOLDER = Path(os.environ.get("KDPROF_PARITY", DEFAULT))
FILES = sorted(FOLDER.glob("*.npz"))
VALUE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def loss_of(path: Path) -> str:
    with np.load(path, allow_pickle=False) as file:
        return str(file["meta.loss"])


LOSSES = {path: loss_of(path) for path in FILES}
WAITING = set() if os.environ.get("KDPROF_PARITY_ALL") else NOT_YET
"""With the variable set, a loss that kdprof does not have fails instead of waiting."""


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance, in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


@pytest.mark.skipif(not FILES, reason=f"no parity files in {FOLDER}; set KDPROF_PARITY")
def test_every_file_is_either_tested_or_known_to_wait():
    unknown = {path.name for path, loss in LOSSES.items() if loss not in {*TERMS, *NOT_YET}}
    assert not unknown


@pytest.mark.parametrize(
    "path", [p for p in FILES if LOSSES[p] not in WAITING], ids=lambda path: path.stem
)
def test_parity(path):
    case = Case(path)
    outcome = TERMS[LOSSES[path]](case)
    expected = case.expected("out.")
    assert outcome.outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(outcome.outputs[name].detach(), value) <= VALUE_TOLERANCE, name
    cotangents = case.expected("cot.")
    total = sum((cotangents.get(n, torch.ones(())) * v).sum() for n, v in outcome.outputs.items())
    gradients = case.expected("grad.")
    assert gradients.keys() == outcome.gradients_of.keys()
    found = torch.autograd.grad(total, [outcome.gradients_of[n] for n in gradients])
    for (name, value), ours in zip(gradients.items(), found, strict=True):
        assert distance(ours, value) <= GRADIENT_TOLERANCE, name
    state = case.expected("state_after.")
    assert state.keys() == outcome.state.keys()
    for name, value in state.items():
        assert distance(outcome.state[name], value) <= VALUE_TOLERANCE, name
