"""What only a GPU can show, in minutes: ``KDPROF_TEST_DEVICE=cuda make test-gpu``.

With ``KDPROF_TEST_DEVICE=cpu`` the same checks run on the CPU, as a check of this file; an ordinary
run of the tests takes a few of them.
"""

import itertools
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from devices import DEVICE, IS_GPU, needs_gpu, needs_whole, some
from method_inputs import NAMES, real_batch, real_step
from processes import kdprof
from small_study import small_study, small_toml
from test_parity import FILES, check_parity
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof import measure_steps
from kdprof.hardware import hardware_of
from kdprof.hardware.device import (
    DTYPES,
    autocast,
    configure_backends,
    placed,
    synchronize,
)
from kdprof.measure.ceilings import measure_ceilings, published_peak
from kdprof.measure.memory import empty_allocators
from kdprof.method import NETWORK_TAPS
from kdprof.models import build, folded
from kdprof.models.fused import FusedBlock
from kdprof.records import Cost
from kdprof.resolve import ResolvedStudy
from kdprof.store import Store

pytestmark = pytest.mark.gpu
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]
FEW = ("kd", "dkd")
KILLS = Path(__file__).parents[1] / "benchmarks" / "kills.py"
MOST_OVERFLOWS = 20
"""Steps of a fresh loss scale of fp16 that may overflow before one is taken."""


@pytest.fixture(autouse=True)
def _exact():
    configure_backends(DEVICE, "fp32")
    yield
    configure_backends(DEVICE, "fp32")


@contextmanager
def no_synchronisation():
    """Make torch raise an error where the host waits for the GPU."""
    if IS_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("default")


def batch(index=0):
    return [t.pin_memory() if IS_GPU else t for t in real_batch(index)]


def state_of(step) -> dict[str, torch.Tensor]:
    """Return copies of all tensors of the student and of the method's extras."""
    state = step.state_dict()
    named = {**state["student"], **{f"method.{n}": v for n, v in state["method"].items()}}
    return {name: value.detach().clone() for name, value in named.items()}


def assert_same_bits(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# The numbers


@pytest.mark.parametrize("path", some(FILES, FILES[:1]), ids=lambda path: path.stem)
def test_parity(path):
    check_parity(path, DEVICE)


def without_dropout(step):
    for module in itertools.chain(step.student.modules(), step.method.modules()):
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return step


class DrawnOnCpu(TorchDispatchMode):
    """Random numbers of the CPU's generator on every device: those of a GPU's are others."""

    FACTORIES = ("rand", "randn", "randint", "randperm")
    LIKE = ("rand_like", "randn_like", "randint_like", "bernoulli", "multinomial")
    IN_PLACE = ("uniform_", "normal_", "bernoulli_", "random_", "exponential_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], dict(kwargs or {})
        here = lambda value: value.cpu() if isinstance(value, torch.Tensor) else value  # noqa: E731
        if name in self.FACTORIES:
            device = kwargs.pop("device", None) or torch.get_default_device()
            return func(*args, **kwargs, device="cpu").to(device)
        if name in self.LIKE:
            kwargs.pop("device", None)
            return func(*map(here, args), **kwargs).to(args[0].device)
        if name in self.IN_PLACE:
            return args[0].copy_(func(*map(here, args), **kwargs))
        return func(*args, **kwargs)


def one_step(name: str, device: torch.device):
    """Return the losses of a step and by how much it moved every tensor, on the CPU."""
    step = without_dropout(real_step(name, device=device))
    before = state_of(step)
    with DrawnOnCpu():
        losses = step(*real_batch(), 0)
    moved = {name: (value - before[name]).double().cpu() for name, value in state_of(step).items()}
    return {name: value.item() for name, value in losses.items()}, moved


@pytest.mark.parametrize("name", some(NAMES, FEW))
def test_a_step_in_fp32_is_that_of_a_cpu(name):
    """But for rounding, which may also decide which of two equal pixels is drawn."""
    (losses, moved), (wanted, expected) = (
        one_step(name, device) for device in (DEVICE, torch.device("cpu"))
    )
    assert losses == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for tensor, value in expected.items():
        assert (moved[tensor] - value).norm() <= 0.02 * value.norm() + 0.002 * whole, tensor


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "convolutions", "products"), [("fp32", False, False), ("tf32", True, False)]
)
def test_what_uses_tf32(precision, convolutions, products):
    """TF32 rounds to 10 bits: an error of some 3e-4, a thousand times that of float32."""
    configure_backends(DEVICE, precision)
    x, w = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)

    def error(function, *given):
        exact = function(*(value.double() for value in given))
        found = function(*(value.to(DEVICE) for value in given)).double().cpu()
        return ((found - exact).norm() / exact.norm()).item()

    assert (error(nn.functional.conv2d, x, w) > 2e-5) == convolutions
    assert (error(torch.matmul, x, x) > 2e-5) == products


# Every method's step


class Gradients:
    """The norm of every gradient of a step's parameters, as its optimiser receives it."""

    def __init__(self, step):
        self.norms: dict[str, torch.Tensor] = {}
        parts = {"": step.student, "method.": step.method}
        for prefix, part in parts.items():
            for name, parameter in part.named_parameters():
                parameter.register_post_accumulate_grad_hook(self._note(prefix + name))

    def _note(self, name):
        return lambda parameter: self.norms.__setitem__(name, parameter.grad.float().norm())

    def are_finite(self) -> bool:
        return bool(torch.stack(list(self.norms.values())).isfinite().all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", some(NAMES, FEW))
def test_a_step_is_finite_trains_and_never_waits(name, precision):
    configure_backends(DEVICE, precision)
    step, given = real_step(name, precision=precision, device=DEVICE), batch()
    gradients = Gradients(step)
    for index in range(MOST_OVERFLOWS):
        losses = step(*given, index)
        assert all(value.isfinite() for value in losses.values())
        if gradients.are_finite():
            break
    assert gradients.are_finite()
    assert index == 0 or precision == "fp16"
    for weight, parameter in step.student.named_parameters():
        assert parameter.ndim == 1 or gradients.norms[weight] > 0, weight
    with no_synchronisation():
        losses = step(*given, index + 1)
    assert all(value.isfinite() for value in losses.values())
    assert all(value.isfinite().all() for value in state_of(step).values())


NETWORKS = {
    "pspnet": ("pspnet-r18", "pspnet-test_resnet"),
    "deeplabv3": ("cirkd-deeplabv3-r18", "deeplabv3-r18"),
    "segformer": ("segformer-b0", "pspnet-test_resnet"),
}
"""Student and teacher."""


def study_on(device: torch.device, **changes) -> ResolvedStudy:
    return ResolvedStudy(small_study(device=str(device), **changes))


def step_and_batches(study: ResolvedStudy, name: str = "kd"):
    """Return the step of a method, and batches on its device."""
    teacher = study.factory.frozen(study.factory.placed_teacher())
    batches = study.factory.batches(0)
    return study.factory.step(name, teacher), [batches.batch(i, study.device) for i in range(3)]


@pytest.mark.parametrize("precision", some(["fp32", "bf16"], ["bf16"]))
@pytest.mark.parametrize("heads", some(NETWORKS, ["pspnet"]))
def test_real_networks_never_wait_and_repeat_bit_for_bit(heads, precision):
    if heads == "segformer":
        pytest.importorskip("transformers")
    student, teacher = NETWORKS[heads]
    changes = {"step__precision": precision, "step__crop": [64, 96], "step__deterministic": True}
    changes["step__aux_weight"] = 0.0 if heads == "segformer" else 0.4
    ends = []
    for _ in range(2):
        study = study_on(DEVICE, student=student, teacher=teacher, **changes)
        step, batches = step_and_batches(study)
        for index, (images, labels) in enumerate(batches):
            losses = step(images, labels, index)
        assert all(value.isfinite() for value in losses.values())
        with no_synchronisation():
            step(images, labels, 3)
        ends.append(state_of(step))
    assert_same_bits(*ends)


# Deterministic steps


def through_a_file(state, path: Path):
    torch.save(state, path)
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", some(NAMES, FEW))
def test_deterministic_steps_repeat_and_continue_bit_for_bit(name, precision, tmp_path):
    """Twice from the start, and once from the state after the second step."""
    configure_backends(DEVICE, precision, deterministic=True)
    ends = []
    for _ in range(2):
        step = real_step(name, precision=precision, device=DEVICE)
        for index in range(4):
            if index == 2:
                kept = through_a_file(step.state_dict(), tmp_path / "state.pt")
            step(*batch(index), index)
        ends.append(state_of(step))
    resumed = real_step(name, precision=precision, device=DEVICE, initial_seed=7)
    resumed.load_state_dict(kept)
    for index in range(2, 4):
        resumed(*batch(index), index)
    assert_same_bits(*ends)
    assert_same_bits(ends[0], state_of(resumed))


@needs_whole
def test_killed_trainings_end_bit_for_bit_the_same():
    """Processes that are killed with SIGKILL at random moments, and started again."""
    options = ["--kills", "3", "--seed", "1", "--set", f"device={DEVICE.type}"]
    options += ["--set", "step.deterministic=true"]
    done = subprocess.run(
        [sys.executable, KILLS, *options], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differ" in done.stdout


# Options of the step


class Operators(TorchDispatchMode):
    """Counts the operators of a forward by name."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@needs_whole
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["pspnet-r18", "cirkd-deeplabv3-r50"])
def test_a_folded_teacher_sees_the_same_with_fused_operators(name, precision):
    """Its taps are as near to those in float32 as the taps of the plain one are."""
    torch.manual_seed(2)
    network = placed(build(name, 19).eval(), DEVICE, channels_last=True)
    taps = [tap for tap in NETWORK_TAPS if tap != "classifier"]
    images = torch.randint(0, 256, (2, 3, 96, 160), dtype=torch.uint8, device=DEVICE)
    with torch.no_grad():
        exact = network(images, taps)
        configure_backends(DEVICE, precision)
        copy = folded(network, DTYPES[precision])
        with autocast(DEVICE, precision):
            plain = network(images, taps)
            with Operators() as operators:
                found = copy(images, taps)
    for tap in taps:
        true, ours = getattr(exact, tap), getattr(found, tap).float()
        rounding = (getattr(plain, tap).float() - true).norm()
        assert (ours - true).norm() <= 2 * rounding + 1e-4 * true.norm(), tap
    blocks = sum(isinstance(module, FusedBlock) for module in copy.modules())
    assert operators.calls["cudnn_convolution_add_relu"] == (blocks if IS_GPU else 0)
    assert operators.calls["cudnn_convolution_relu"] >= (blocks if IS_GPU else 0)
    assert operators.calls["relu_"] <= (1 if IS_GPU else 10**6)  # of the three channels of images


@needs_gpu
@pytest.mark.parametrize("name", ["kd", "cirkd"])
@pytest.mark.parametrize("compiled", ["teacher", "default", "cuda-graphs"])
def test_compiled_steps_compute_the_same(compiled, name):
    """Every one of them: a graph that is replayed must not read what the next one overwrites."""
    found = {}
    for option in ("none", compiled):
        changes = {"step__compile": option, "step__fold_teacher": True}
        study = study_on(DEVICE, methods=["none", name], **changes)
        step, batches = step_and_batches(study, name)
        step = without_dropout(step)
        found[option] = [step(*batches[index % 3], index) for index in range(6)]
    for plain, other in zip(*found.values(), strict=True):
        values = ({name: value.item() for name, value in one.items()} for one in (other, plain))
        assert next(values) == pytest.approx(next(values), rel=2e-3)


# What is measured


def test_the_energy_counter_counts():
    meter = hardware_of(DEVICE).energy_meter()
    if meter.reason is not None:
        pytest.skip(f"no energy counter: {meter.reason}")
    step, given = real_step("kd", device=DEVICE), batch()
    began, joules = time.perf_counter(), meter.read_j()
    for index in itertools.count():
        step(*given, index)
        if time.perf_counter() - began > 1:
            break
    synchronize(DEVICE)
    watts = (meter.read_j() - joules) / (time.perf_counter() - began)
    assert 1 < watts < 2000


@needs_gpu
@pytest.mark.alone
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_no_gpu_is_faster_than_its_vendor_says(precision):
    peak = published_peak(torch.cuda.get_device_name(DEVICE), precision)
    found = measure_ceilings(DEVICE, precision)
    assert peak is None or 0.3 * peak < found.matmul_flop_per_s < 1.02 * peak
    exact = found.exact_matmul_flop_per_s
    assert exact is None or exact < 0.7 * found.matmul_flop_per_s


MEASURED = ("kd", "fitnet", "ifvd")


def measured(folder: Path, *options: str) -> dict[str, Cost]:
    """Return the Costs of the command with these options, by method."""
    folder.mkdir()
    study = small_toml(folder, device=DEVICE.type, measure__in_process=False, step__crop=[128, 256])
    names = itertools.chain.from_iterable(("--method", name) for name in MEASURED)
    done = kdprof("measure", "--study", study, "--out", folder / "out", *names, *options)
    assert done.returncode == 0, done.stderr
    return {cost.method: cost for cost in Store(folder / "out").costs()}


@needs_gpu
def test_the_memory_of_a_step_is_that_of_its_own_tensors():
    """Neither the canary's matrix nor the workspaces of the products that are the ceilings."""
    kept = torch.zeros(2**20, device=DEVICE)
    empty_allocators(DEVICE)  # of other tests
    held_bytes = torch.cuda.memory_allocated(DEVICE)

    def step():
        torch.add(kept, 1)

    for _ in range(2):
        cost = measure_steps({"mine": step}, device=str(DEVICE), max_time_s=0.1)["mine"]
        assert cost.memory_bytes.peak_allocated - held_bytes == kept.numel() * 4


@needs_whole
def test_memory_of_methods_measured_together_is_each_method_s_own(tmp_path):
    """As in a process for each method."""
    together, apart = measured(tmp_path / "a"), measured(tmp_path / "b", "--isolated")
    assert together.keys() == apart.keys() >= set(MEASURED)
    for name, cost in together.items():
        one, other = cost.memory_bytes, apart[name].memory_bytes
        if IS_GPU:  # what cuDNN needs for its work differs with the algorithm that it chooses
            assert one.peak_allocated == pytest.approx(other.peak_allocated, rel=0.02), name
        else:
            assert one.process == pytest.approx(other.process, rel=0.1), name
