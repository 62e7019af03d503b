"""The Triton kernels against the plain form: on a GPU, or interpreted on a CPU.

Triton decides when it is imported whether it interprets, so without a GPU the cases run in a
process of their own, which is this file again.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from kdprof.resized import cross_entropy, prediction, resized_argmax, resized_cross_entropy, tiles
from kdprof.resized.cross_entropy import plain_cross_entropy
from kdprof.resized.prediction import plain_argmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED or not CUDA else "cuda")
kernels_run = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="runs within test_interpreted")
on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")

CASES = {
    "two groups of classes": (1, 9, (1, 2), (3, 4), True, torch.float64, 0.2),
    "two strips of cells": (1, 2, (1, 9), (1, 12), False, torch.float64, 0.2),
    "a cell of several tiles": (1, 2, (1, 1), (11, 13), False, torch.float64, 0.2),
    "reduced": (2, 3, (3, 2), (2, 1), False, torch.float64, 0.0),
    "rows": (1, 2, (3, 1), (7, 1), True, torch.float64, 0.0),
    "bfloat16": (1, 3, (2, 2), (4, 4), False, torch.bfloat16, 0.2),
    "void": (1, 2, (1, 2), (2, 3), False, torch.float64, 1.0),
}


def draw(images, classes, low, high, dtype, void):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(images, classes, *low, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (images, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = 255
    logits = logits.to(DEVICE, dtype, memory_format=torch.channels_last)
    return logits.requires_grad_(), labels.to(DEVICE)


@pytest.fixture
def by_kernels(monkeypatch):
    """Run the kernels on any device."""
    for module in (cross_entropy, prediction):
        monkeypatch.setattr(module, "form_of", lambda logits, size: "tiles")


@pytest.mark.gpu
@kernels_run
@pytest.mark.usefixtures("by_kernels")
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_plain_form(name):
    images, classes, low, high, align, dtype, void = CASES[name]
    logits, labels = draw(images, classes, low, high, dtype, void)
    loss = resized_cross_entropy(logits, labels, align)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    wanted = plain_cross_entropy(exact, labels, align)
    (slope,) = torch.autograd.grad(wanted, exact)
    within = (
        {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    )
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, **within)
    assert (gradient.dtype, gradient.stride()) == (dtype, logits.stride())
    assert torch.equal(
        resized_argmax(logits.detach(), high, align), plain_argmax(exact.detach(), high, align)
    )


@pytest.mark.gpu
@kernels_run
def test_a_label_that_is_no_class_makes_the_loss_nan():
    logits, labels = draw(1, 2, (1, 2), (2, 3), torch.float64, 0)
    for label in (2, -1):
        labels[0, 1, 1] = label
        assert tiles.tiled_cross_entropy(logits.detach(), labels, False)[0].isnan()


@pytest.mark.gpu
@kernels_run
def test_operators_keep_torch_s_contract():
    logits, labels = draw(1, 2, (1, 2), (2, 3), torch.float32, 0.2)
    logits = logits.detach()
    # The other checks of opcheck run the kernels many times and look at gradients, which these
    # operators do not have.
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(tiles.tiled_cross_entropy, (logits, labels, False), test_utils=utils)
    _, norm = tiles.tiled_cross_entropy(logits, labels, False)
    arguments = logits, labels, norm, False
    torch.library.opcheck(tiles.tiled_cross_entropy_backward, arguments, test_utils=utils)


@pytest.mark.skipif(INTERPRETED or CUDA, reason="the other tests run the kernels")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_interpreted():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-q",
            "-p",
            "no:xdist",
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("the interpreter of this Triton does not run with this NumPy (2.5 or newer)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES) + 2} passed" in done.stdout


@pytest.mark.skipif(INTERPRETED or CUDA, reason="for a machine without a GPU")
def test_why_there_are_no_tiles_is_said(monkeypatch):
    monkeypatch.setattr(tiles, "_why_not", tiles._NOT_TRIED)
    reason = tiles.why_no_triton()
    assert reason not in (None, tiles._NOT_TRIED)
    monkeypatch.setattr(tiles, "find_spec", None)  # it is not tried again
    assert tiles.why_no_triton() == reason


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [19, 150])
def test_on_a_gpu_at_the_size_of_a_step(classes, dtype):
    """Right to rounding, the same bits twice, and far less memory than the map."""
    assert tiles.why_no_triton() is None
    logits, labels = draw(2, classes, (64, 128), (512, 1024), dtype, 0.1)
    exact = logits.detach().double().requires_grad_()
    wanted = plain_cross_entropy(exact, labels, False)
    (slope,) = torch.autograd.grad(wanted, exact)
    found = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = resized_cross_entropy(logits, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss, logits)))
        used = torch.cuda.max_memory_allocated() - before
    assert used < 0.3 * 4 * classes * labels.numel()
    assert all(map(torch.equal, *found))
    torch.testing.assert_close(found[0][0].double(), wanted, rtol=1e-5, atol=0)
    rough = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0][1].double(), slope, rtol=rough, atol=rough)
    logits, size = logits.detach(), tuple(labels.shape[-2:])
    differs = resized_argmax(logits, size) != plain_argmax(logits, size, False)
    assert differs.double().mean() < 1e-5


@pytest.mark.gpu
@on_a_gpu
def test_the_kernels_never_wait():
    logits, labels = draw(2, 19, (16, 32), (128, 256), torch.bfloat16, 0.1)
    resized_cross_entropy(logits, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        resized_cross_entropy(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
