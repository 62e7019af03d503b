"""The device that the checks of a GPU run on, and why some of them cannot."""

import os

import pytest
import torch

ASKED = os.environ.get("KDPROF_TEST_DEVICE")
"""``cuda``: all checks, on the first GPU. ``cpu``: the same, as a check of the checks, without
those that only a GPU can pass. Not set: a few of them on the CPU, in an ordinary run of the
tests."""
if ASKED not in (None, "cpu", "cuda"):
    raise ValueError(f"KDPROF_TEST_DEVICE is cuda or cpu, not {ASKED!r}")
if ASKED == "cuda" and not torch.cuda.is_available():
    raise ValueError("KDPROF_TEST_DEVICE=cuda, but torch sees no CUDA GPU")
DEVICE = torch.device("cuda", 0) if ASKED == "cuda" else torch.device("cpu")
WHOLE = ASKED is not None
IS_GPU = DEVICE.type == "cuda"

if IS_GPU:
    # Before CUDA starts, which is when the first test uses it: see step.deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

needs_gpu = pytest.mark.skipif(
    not IS_GPU, reason="needs a GPU: KDPROF_TEST_DEVICE=cuda make test-gpu"
)
needs_whole = pytest.mark.skipif(
    not WHOLE, reason="takes long: KDPROF_TEST_DEVICE=cuda (or cpu) make test-gpu"
)


def some(names, few):
    """Return all names, or in an ordinary run of the tests a few of them."""
    return list(names) if WHOLE else [name for name in names if name in few]
