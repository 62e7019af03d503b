"""The step's options that change how it is computed and not what: folding and compiling."""

import functools

import pytest
import torch
from processes import kdprof
from small_study import small_study, small_toml
from torch import nn

from kdprof.errors import KdprofError, UserError
from kdprof.measure.counting.matrix_flop import matrix_formula
from kdprof.measure.trace import StepTrace
from kdprof.method import NETWORK_TAPS
from kdprof.models import build, folded, fused
from kdprof.models.fused import FusedBlock, FusedConvolution
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key

aten = torch.ops.aten
LOOK = torch.randint(0, 256, (2, 3, 72, 96), generator=torch.Generator().manual_seed(3))
IMAGES = LOOK.to(torch.uint8)


def trained(name: str) -> nn.Module:
    """A network whose batch norms do something."""
    torch.manual_seed(5)
    network = build(name, 7).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.3)
    return network


@pytest.mark.parametrize(
    "name",
    ["pspnet-test_resnet", "deeplabv3-r18", "pspnet-mobilenetv2_100", "pspnet-convnext_atto"],
)
def test_a_folded_network_computes_the_same(name):
    network = trained(name)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    copy = folded(network, torch.float32)
    with torch.no_grad():
        wanted, found = network(IMAGES, NETWORK_TAPS), copy(IMAGES, NETWORK_TAPS)
    for tap, value in vars(wanted).items():
        assert (getattr(found, tap) - value).norm() <= 1e-4 * value.norm(), tap
    assert not [m for m in copy.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_network_computes_in_the_wanted_precision(dtype):
    network = trained("pspnet-test_resnet")
    copy = folded(network, dtype)
    with torch.no_grad():
        exact = network(IMAGES, NETWORK_TAPS)
        with torch.autocast("cpu", dtype=dtype):
            wanted, found = network(IMAGES, NETWORK_TAPS), copy(IMAGES, NETWORK_TAPS)
    for tap, value in vars(wanted).items():
        assert getattr(found, tap).dtype == value.dtype, tap
        true, given = getattr(exact, tap), getattr(found, tap).float()
        rounding = (value.float() - true).norm()
        assert (given - true).norm() <= 2 * rounding + 1e-4 * true.norm(), tap


def test_what_relu_follows_is_one_operator():
    """Of a ResNet with PSP head: three of the stem, those of blocks (one has three, the others
    two), both heads, four bins."""
    copy = folded(trained("pspnet-test_resnet"), torch.float32)
    net = copy.backbone.net
    assert isinstance(net.act1, nn.Identity)
    blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    assert all(isinstance(block, FusedBlock) for block in blocks)
    convolutions = [m for m in copy.modules() if isinstance(m, FusedConvolution)]
    assert len(convolutions) == 3 + (3 + 2 * 3) + 2 + 4
    assert not [m for m in copy.modules() if isinstance(m, nn.ReLU)]
    shortcuts = [block.shortcut for block in blocks if block.shortcut is not None]
    assert shortcuts
    assert all(shortcut[1].bias is None for shortcut in shortcuts)
    with_more = trained("pspnet-test_resnet")
    with_more.backbone.net.layer1[0].drop_path = nn.Dropout(0.0)
    kept = folded(with_more, torch.float32).backbone.net
    assert not isinstance(kept.layer1[0], FusedBlock)
    assert isinstance(kept.layer2[0], FusedBlock)


def test_the_operators_of_cudnn_are_asked_for_the_same(monkeypatch):
    """With convolutions of the CPU in their place; those of 3 channels are not fused."""
    asked = []

    def relu(x, weight, bias, *geometry):
        asked.append("relu")
        assert geometry[3] == 1
        return nn.functional.conv2d(x, weight, bias, *geometry).relu()

    def add_relu(x, weight, added, alpha, bias, *geometry):
        asked.append("add_relu")
        return (nn.functional.conv2d(x, weight, bias, *geometry) + alpha * added).relu()

    network = trained("pspnet-test_resnet")
    monkeypatch.setattr(fused, "_one_operator", lambda x: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    copy = folded(network, torch.float32)
    asked.clear()
    with torch.no_grad():
        wanted, found = network(IMAGES, NETWORK_TAPS), copy(IMAGES, NETWORK_TAPS)
    assert asked.count("add_relu") == 4  # blocks
    assert asked.count("relu") == 2 + (2 + 3) + 2 + 4
    for tap, value in vars(wanted).items():
        assert (getattr(found, tap) - value).norm() <= 1e-4 * value.norm(), tap


def without_engine(*given):
    raise RuntimeError("GET was unable to find an engine to execute this computation")


def nan_of(x, weight, third, *rest):
    """Of either kernel: the third argument is the bias, or the map that is added."""
    if third.ndim == 4:
        return third * float("nan")
    return nn.functional.conv2d(x, weight, third, *rest) * float("nan")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(nan_of, "differs by nan"), (without_engine, r"find an engine.*fold_teacher = false")],
)
def test_a_wrong_kernel_is_not_used(monkeypatch, kernel, said):
    monkeypatch.setattr(fused, "_one_operator", lambda x: True)
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, kernel)
    with pytest.raises(KdprofError, match=said):
        folded(trained("pspnet-test_resnet"), torch.float32)


def test_fused_operators_have_the_flop_of_their_convolution():
    x, w = torch.empty(2, 16, 9, 7, device="meta"), torch.empty(24, 16, 3, 3, device="meta")
    out, ones = torch.empty(2, 24, 9, 7, device="meta"), ((1, 1), (1, 1), (1, 1))
    calls = {
        aten.convolution: (x, w, None, *ones, False, (0, 0), 1),
        aten.cudnn_convolution_relu: (x, w, None, *ones, 1),
        aten.cudnn_convolution_add_relu: (x, w, out, 1.0, None, *ones, 1),
    }
    for packet, args in calls.items():
        assert matrix_formula(packet.default)(args, {}, out) == 2 * 2 * 9 * 7 * 24 * 16 * 9


def test_the_teacher_alone_can_be_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **how: compiled.append(module) or module)
    step, _ = steps("kd", **{"step.compile": "teacher"})
    assert compiled == [step.teacher]


def test_a_convolution_that_is_read_beside_its_norm_is_told():
    network = trained("pspnet-test_resnet")

    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            conv = self.inner.conv(x)
            return self.inner.bn(conv).relu() + conv

    network.auxiliary_head.convs[0] = Both(network.auxiliary_head.convs[0])
    with pytest.raises(KdprofError, match=r"'aux' differs .* step.fold_teacher = false"):
        folded(network, torch.float32)


def steps(method: str, **changes):
    study = ResolvedStudy(small_study(methods=[method], **changes))
    step = study.factory.step(method, study.factory.frozen(study.factory.placed_teacher()))
    batches = study.factory.batches(0)
    found = [step(*batches.batch(index), index) for index in range(3)]
    return step, found


def test_a_folded_teacher_teaches_the_same():
    plain, wanted = steps("kd")
    folding, found = steps("kd", **{"step.fold_teacher": True})
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.teacher.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folding.teacher.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_compiled_step_computes_the_same_and_is_traced_as_it_would_be_plain(monkeypatch):
    """Traced, not turned into machine code: that takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, wanted = steps("kd")
    compiled, found = steps("kd", **{"step.compile": "default"})
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert compiled.state_dict()["student"].keys() == plain.state_dict()["student"].keys()
    traced = [operators(step) for step in (plain, compiled)]
    assert traced[0] == traced[1]


def operators(step):
    images, labels = torch.zeros(2, 3, 32, 48).byte(), torch.zeros(2, 32, 48).byte()
    with StepTrace(step) as trace:
        step(images, labels, 0, trace.mark)
    return [(o.phase, o.name, o.calls, o.matrix_flop) for o in trace.operations()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step.compile": "cuda-graphs"}, "needs a CUDA device, this is cpu; use 'default'"),
        (
            {"step.fold_teacher": True, "scenario": {"new": ["car"]}},
            'scenario.initialise = "fresh"',
        ),
    ],
)
def test_an_option_without_use_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ResolvedStudy(small_study(**changes))


def test_compiling_without_a_compiler_is_refused_in_one_line(tmp_path):
    study = small_toml(tmp_path, **{"step.compile": "default"})
    out = tmp_path / "out"
    done = kdprof("train", "--study", study, "--out", out, PATH=str(tmp_path), CXX="none")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs a C++ compiler, such as g++; install it or use 'none'" in done.stderr


def test_the_options_have_costs_of_their_own():
    options = {"step.fold_teacher": True, "step.compile": "default", "step.deterministic": True}
    changes = [{}, *({key: value} for key, value in options.items())]
    keys = {cost_key(ResolvedStudy(small_study(**change)), "kd") for change in changes}
    assert len(keys) == 4
