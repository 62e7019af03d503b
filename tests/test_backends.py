"""Precisions and determinism: torch's global switches, and what no device can do."""

import os
import traceback
import warnings
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_inputs import NAMES, real_batch, real_step
from small_study import small_study
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.errors import UserError
from kdprof.hardware.device import (
    CUBLAS_WORKSPACES,
    autocast,
    check_precision,
    configure_backends,
    free_unused,
    require_repeatable_cublas,
)
from kdprof.launch.slurm import _without_device
from kdprof.measure import ceilings
from kdprof.measure.user_step import measure_steps
from kdprof.processes import explain
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_settings
from kdprof.step import PHASES

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _usual_switches():
    yield
    configure_backends(CPU, "fp32")


# Precision


@pytest.mark.parametrize(
    ("precision", "convolutions", "products"),
    [("fp32", False, False), ("tf32", True, False), ("bf16", True, True), ("fp16", True, True)],
)
def test_the_switches_of_both_interfaces_of_torch_agree(precision, convolutions, products):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of an interface that will go
        configure_backends(CPU, precision)
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (convolutions, products)
        assert (cudnn.conv.fp32_precision == "tf32") == convolutions
        assert (cudnn.rnn.fp32_precision == "tf32") == convolutions
        assert (matmul.fp32_precision == "tf32") == products
    assert autocast(CPU, precision).fast_dtype != torch.float32 or not products


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_without_autocast_tensors_are_float32(precision):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_device_without_tf32_is_refused(monkeypatch):
    capability = iter([(7, 5), (8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="this is a CPU; use --precision fp32"):
        check_precision(CPU, "tf32")
    with pytest.raises(UserError, match="Tesla T4 is older; use --precision fp32"):
        check_precision(GPU, "tf32")
    check_precision(GPU, "tf32")
    check_precision(GPU, "tf32")
    check_precision(CPU, "bf16")
    with pytest.raises(UserError, match="unknown precision 'tf23'; did you mean 'tf32'"):
        check_precision(CPU, "tf23")


def test_tf32_on_a_cpu_is_counted_but_not_run():
    study = small_study(step__precision="tf32")
    with pytest.raises(UserError, match="precision 'tf32' needs an NVIDIA GPU") as caught:
        ResolvedStudy(study)
    assert len(caught.value.problems) == 1
    counted = ResolvedStudy(study, weights=False, runs=False)
    assert cost_settings(counted, "none")["step"]["precision"] == "tf32"
    ResolvedStudy(_without_device(study))  # submitted from a machine without a GPU
    with pytest.raises(UserError, match="precision 'tf32' needs"):
        measure_steps({"mine": lambda: None}, device="cpu", precision="tf32")


# Determinism


def test_deterministic_studies_and_others_may_follow_each_other():
    for wanted in (True, False, True, False):
        ResolvedStudy(small_study(step__deterministic=wanted))
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert torch.backends.cudnn.deterministic == wanted
        assert torch.backends.cudnn.benchmark == (not wanted)


@pytest.mark.parametrize(
    ("found", "used", "problem"),
    [
        (None, False, None),
        (":4096:8", True, None),
        (":16:8", False, None),
        (None, True, "used CUDA already; start Python with CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        (":4096:2", False, "leave the variable out, or set CUBLAS_WORKSPACE_CONFIG=:4096:8"),
    ],
)
def test_cublas_repeats_only_with_its_own_workspaces(found, used, problem, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setenv(CUBLAS_WORKSPACES, found or "")
    if found is None:
        monkeypatch.delenv(CUBLAS_WORKSPACES)
    if problem is None:
        require_repeatable_cublas()
        assert os.environ[CUBLAS_WORKSPACES] == (found or ":4096:8")
    else:
        with pytest.raises(UserError, match=problem):
            require_repeatable_cublas()
        assert os.environ.get(CUBLAS_WORKSPACES) == found


def test_an_operator_that_cannot_repeat_is_named():
    """torch's text, from a layer of which it has no deterministic form on a CPU either."""
    torch.use_deterministic_algorithms(True)
    try:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    except RuntimeError as error:
        said = explain(error)
    assert said.startswith("put_ cannot repeat its results bit for bit")
    assert "leave step.deterministic out" in said
    assert "test_backends.py" in said


VARYING = (
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "avg_pool3d_backward",
    "max_pool3d_with_indices_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d",
    "max_unpool3d", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "reflection_pad3d_backward", "_ctc_loss_backward", "_embedding_bag_backward", "put_", "put",
    "histc", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "kthvalue", "median",
    "nanmedian", "nll_loss_forward", "upsample_bicubic2d_backward", "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
)  # fmt: skip
"""Operators that torch.use_deterministic_algorithms refuses on a GPU, see its documentation. Others
that it lists vary with their arguments only: :func:`varies`."""
NO_REDUCTION = 0
TORCH = str(Path(torch.__file__).parent)


def varies(name: str, arguments: tuple) -> bool:
    """Return whether an operator may return other bits in another run on a GPU."""
    if name in ("cumsum", "cumsum_"):
        return arguments[0].is_floating_point()
    if name == "bincount":
        return len(arguments) > 1 and arguments[1] is not None
    if name == "nll_loss2d_forward":
        return arguments[3] != NO_REDUCTION
    if name == "upsample_bilinear2d_backward":
        # F.interpolate takes another way on a GPU if asked for deterministic algorithms.
        return not _called_by_autograd()
    return name in VARYING


def _called_by_autograd() -> bool:
    """Return whether the code that dispatched the operator is the engine of backward."""
    here = Path(__file__).name
    frames = (frame.filename for frame in reversed(traceback.extract_stack()))
    inner = [name for name in frames if not name.endswith(here)]
    in_torch = takewhile(lambda name: TORCH in name, inner)
    return any(name.endswith("autograd/graph.py") for name in in_torch)


class Watched(TorchDispatchMode):
    """Notes the operators that vary, by the phase of the step."""

    def __init__(self):
        super().__init__()
        self.phase, self.found = 0, []

    def mark(self, phase):
        assert PHASES[self.phase] == phase
        self.phase += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        if varies(name, args):
            self.found.append((PHASES[self.phase], name))
        return func(*args, **(kwargs or {}))


def test_what_varies_is_noticed():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with Watched() as watched:
        F.adaptive_avg_pool2d(x, (3, 3)).sum().backward()
        F.cross_entropy(x, torch.zeros(2, 8, 8).long(), reduction="none").sum().backward()
        F.interpolate(x, (16, 16), mode="bilinear").sum().backward()
        torch.ones(3).long().cumsum(0)
        assert watched.found == [("data", "_adaptive_avg_pool2d_backward")]
        watched.found.clear()
        F.cross_entropy(x, torch.zeros(2, 8, 8).long())
        torch.ops.aten.upsample_bilinear2d_backward(x, (8, 8), (2, 3, 4, 4), False)
        torch.ones(3).cumsum(0)
    assert [name for _, name in watched.found] == [
        "nll_loss2d_forward", "upsample_bilinear2d_backward", "cumsum",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_built_in_method_uses_an_operator_that_varies(name):
    """The task loss has another form on a GPU, so its phase on a CPU says nothing."""
    step = real_step(name)
    with Watched() as watched:
        step(*real_batch(), 0, watched.mark)
    assert [(phase, op) for phase, op in watched.found if phase != "task_loss"] == []


# Memory that nothing uses


@pytest.mark.parametrize("version", ["with", "without"])
def test_workspaces_of_cublas_are_freed_before_the_cache(version, monkeypatch):
    """torch's function for them is private and may go away."""
    done = []
    calls = {
        "synchronize": lambda device: done.append("wait"),
        "empty_cache": lambda: done.append("cache"),
    }
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: done.append("workspaces"), raising=False)
    if version == "without":
        monkeypatch.delattr(torch._C, clear)
    free_unused(GPU)
    free_unused(CPU)
    assert done == ["wait", *(["workspaces"] if version == "with" else []), "cache"]


def test_the_ceilings_leave_nothing_behind(monkeypatch):
    freed = []
    monkeypatch.setattr(ceilings, "free_unused", freed.append)
    monkeypatch.setitem(ceilings._MATMUL_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
    ceilings.measure_ceilings(CPU, "fp32")
    assert freed == [CPU]
