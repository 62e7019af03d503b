"""A GPU's autocast on fakes of a CPU, against torch's own on fakes of a GPU: their types and
operators. Such fakes need no GPU, but have no backward without one."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from method_inputs import NAMES, real_step
from small_study import small_study
from torch import nn
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from kdprof.errors import KdprofError
from kdprof.hardware.blocks import counted_for
from kdprof.measure.counting import count_study
from kdprof.measure.counting.fakes import CountingMode
from kdprof.measure.counting.gpu_autocast import RULES, autocast_of, listed
from kdprof.measure.trace import StepTrace
from kdprof.method import Taps
from kdprof.models import build
from kdprof.progress import Progress
from kdprof.resized import tiles
from kdprof.resolve import ResolvedStudy


def gpus_fakes_work() -> bool:
    """Return whether operators run on fakes of a GPU here. Some versions of torch ask CUDA for a
    device, and a torch without CUDA has none to ask."""
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    with FakeTensorMode():
        image, vector = torch.zeros(1, 1, 3, 3, **kind), torch.zeros(3, **kind)
        try:
            F.conv2d(image, image)
            image[0, 0].mv(vector)
        except RuntimeError:
            return False
    return True


against_a_gpus_fakes = pytest.mark.skipif(
    not gpus_fakes_work(), reason="fakes of a GPU do not work with this torch"
)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setattr(tiles, "why_no_triton", lambda: None)


@contextmanager
def torchs_autocast(dtype: torch.dtype):
    """Autocast of a GPU, which ``torch.autocast`` refuses without one."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@contextmanager
def kdprofs_autocast(dtype: torch.dtype):
    with autocast_of("cuda"), torch.autocast("cpu", dtype):
        yield


SIDES = {"cpu": kdprofs_autocast, "cuda": torchs_autocast}
"""How a GPU's autocast works on fakes of each device."""


def work(run, device: str, dtype: torch.dtype, mode=None) -> tuple[list, object]:
    """The operators of a call, with calls and bytes, and the types and shapes of its result."""
    trace = StepTrace(None)
    written_out = sdpa_kernel(SDPBackend.MATH)  # which attention is fast, each device decides
    with mode or CountingMode(), counted_for("cuda"), SIDES[device](dtype), written_out, trace:
        out = run(device)
    found = [(o.name, o.calls, o.bytes_read, o.bytes_written) for o in trace.operations()]
    return found, tree_map_only(torch.Tensor, lambda t: (t.dtype, t.shape), out)


def given(device: str, half: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors in single, half and double precision."""
    made = {"s": torch.float32, "h": half, "d": torch.float64}
    return {k: torch.zeros(2, 4, 8, 8, dtype=dtype, device=device) for k, dtype in made.items()}


CALLS = {
    "conv": lambda s, h, d: F.conv2d(s, s.new_zeros(4, 4, 3, 3), h.new_zeros(4)),
    "conv same": lambda s, h, d: F.conv2d(s, s.new_zeros(4, 4, 3, 3), padding="same"),
    "transposed": lambda s, h, d: F.conv_transpose2d(s, s.new_zeros(4, 4, 3, 3)),
    "linear": lambda s, h, d: F.linear(s, s.new_zeros(5, 8), s.new_zeros(5)),
    "matmul": lambda s, h, d: s @ h.mT,
    "double": lambda s, h, d: d @ d,
    "bmm": lambda s, h, d: torch.bmm(s.flatten(2), h.flatten(2).mT),
    "baddbmm": lambda s, h, d: torch.baddbmm(s[0], s[0], s[0]),
    "einsum": lambda s, h, d: torch.einsum("nchw,ncab->nhwab", s, s),
    "mv": lambda s, h, d: s[0, 0].mv(s[0, 0, 0]),
    "addr": lambda s, h, d: torch.addr(s[0, 0], h[0, 0, 0], s[0, 0, 0], alpha=-1),
    "attention": lambda s, h, d: F.scaled_dot_product_attention(s, h, s),
    "prelu": lambda s, h, d: F.prelu(s, s.new_zeros(4)),
    "softmax": lambda s, h, d: (h.softmax(1), h.softmax(1, dtype=torch.float64), s.softmax(1)),
    "log-softmax": lambda s, h, d: F.log_softmax(h, dim=1),
    "sum": lambda s, h, d: (h.sum(), h.sum((2, 3)), h.sum(1, dtype=h.dtype), h.long().sum()),
    "mean": lambda s, h, d: h.mean(1),
    "cumsum": lambda s, h, d: h.cumsum(1),
    "prod": lambda s, h, d: h.prod(1),
    "norm": lambda s, h, d: (h.norm(), h.norm(dim=1), torch.linalg.vector_norm(h, dim=1)),
    "overloads of norm": lambda s, h, d: (
        torch.ops.aten.norm.Scalar(h),
        torch.ops.aten.norm.ScalarOpt_dim(h, 2, [1]),
        torch.ops.aten.norm.ScalarOpt_dim(d, None, [1], True),
    ),
    "normalize": lambda s, h, d: F.normalize(h, dim=1),
    "cosine": lambda s, h, d: F.cosine_similarity(h, s),
    "layer norm": lambda s, h, d: F.layer_norm(h, (8,), s.new_ones(8), s.new_zeros(8)),
    "group norm": lambda s, h, d: F.group_norm(h, 2),
    "batch norm": lambda s, h, d: F.batch_norm(h, None, None, training=True),
    "bilinear": lambda s, h, d: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "bicubic": lambda s, h, d: F.interpolate(h, scale_factor=2, mode="bicubic"),
    "nearest": lambda s, h, d: F.interpolate(h, scale_factor=2),
    "pooling": lambda s, h, d: (F.avg_pool2d(h, 2), F.adaptive_avg_pool2d(h, 4)),
    "pow": lambda s, h, d: (h**2, 2**h, h.square(), h**h),
    "exp": lambda s, h, d: (h.exp(), h.log(), h.log1p(), h.reciprocal(), h.rsqrt(), h.exp_()),
    "plain": lambda s, h, d: (h + 1, h * s, h.sqrt(), h.sigmoid(), F.relu(h), F.gelu(h)),
    "softplus": lambda s, h, d: F.softplus(h),
    "logsumexp": lambda s, h, d: h.logsumexp(1),
    "cat": lambda s, h, d: (torch.cat([h, s]), torch.cat([h, h]), torch.stack([h, s])),
    "padding": lambda s, h, d: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "losses": lambda s, h, d: (
        F.mse_loss(h, h),
        F.l1_loss(h, h, reduction="sum"),
        F.smooth_l1_loss(h, s),
        F.huber_loss(h, h),
        F.kl_div(h, h, reduction="sum"),
        F.kl_div(h, s, reduction="batchmean", log_target=True),
        F.binary_cross_entropy_with_logits(h, h),
    ),
    "cross-entropy": lambda s, h, d: F.cross_entropy(h, h[:, 0].long(), ignore_index=255),
    "soft labels": lambda s, h, d: F.cross_entropy(h, h),
    "distances": lambda s, h, d: (torch.cdist(h[0], h[0]), F.pairwise_distance(h, h)),
    "widest": lambda s, h, d: (
        torch.addcmul(h, h, h),
        torch.addcmul(h, s, h),
        torch.atan2(h, s),
        F.grid_sample(h, h[..., :2], "nearest", align_corners=True),
        F.grid_sample(s, h[..., :2], "nearest", align_corners=True),
        torch.tensordot(h, s, dims=([1], [1])),
        h.scatter_add(0, h.long(), h),
        h.index_put((h.long()[0, 0, 0],), h),
        F.bilinear(h, h, h.new_zeros(3, 8, 8)),
    ),
    "matrices": lambda s, h, d: (torch.linalg.multi_dot([s[0, 0]] * 3), torch.linalg.svdvals(s)),
    "without autocast": lambda s, h, d: _without(s.device.type, lambda: (h.softmax(1), s @ s)),
}  # fmt: skip


def _without(device, run):
    with torch.autocast(device, enabled=False):
        return run()


@against_a_gpus_fakes
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_one_call_is_cast_as_on_a_gpu(name, dtype):
    found, expected = (
        work(lambda device: CALLS[name](**given(device, dtype)), device, dtype) for device in SIDES
    )
    assert found[1] == expected[1]
    assert without_batch_norms(found[0]) == without_batch_norms(expected[0])


def without_batch_norms(rows: list) -> tuple[list, int]:
    """Leave out batch norms, for which a GPU has other kernels, and return their number, too."""
    rest = [row for row in rows if "batch_norm" not in row[0]]
    return rest, sum(row[1] for row in rows if row not in rest)


def fakes_on(device: str, mode: CountingMode, *modules: nn.Module | None) -> None:
    """Replace the tensors of modules by fakes."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    for module in (part for root in modules if root is not None for part in root.modules()):
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is None:
                    continue
                fake = FakeTensor(mode, value.detach().to("meta"), place)
                trained = value.requires_grad
                values[name] = nn.Parameter(fake, trained) if name in module._parameters else fake


def forwards(step, device: str, dtype: torch.dtype):
    """What a step's networks and its objective do before the backward."""
    mode, method = CountingMode(), step.method
    fakes_on(device, mode, step.student, step.teacher, method)
    height, width = step.settings.crop

    def run(device):
        images = torch.zeros(2, 3, height, width, dtype=torch.uint8, device=device)
        labels = torch.zeros(2, height, width, dtype=torch.int64, device=device)
        student = step.student(images, method.student_taps())
        with torch.no_grad():
            teacher = step.teacher(images, method.read_of_teacher()) if step.teacher else Taps()
        return method(student, teacher, labels if "labels" in method.taps else None)

    return work(run, device, dtype, mode)


@against_a_gpus_fakes
@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_cast_as_on_a_gpu(name):
    (found, terms), (expected, gpus_terms) = (
        forwards(real_step(name, precision="bf16"), device, torch.bfloat16) for device in SIDES
    )
    assert terms == gpus_terms
    assert without_batch_norms(found) == without_batch_norms(expected)


@against_a_gpus_fakes
@pytest.mark.parametrize("name", ["pspnet-resnet18", "deeplabv3-resnet18", "segformer-b0"])
def test_networks_are_cast_as_on_a_gpu(name):
    def run(device):
        mode, network = CountingMode(), build(name, 19).eval()  # dropout is one operator on a GPU
        fakes_on(device, mode, network)

        def forward(device):
            images = torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device=device)
            return vars(
                network(images, ["logits", "aux"][: 2 if "aux" in network.info.channels else 1])
            )

        return work(forward, device, torch.bfloat16, mode)

    (found, maps), (expected, gpus_maps) = (run(device) for device in SIDES)
    assert maps == gpus_maps
    assert without_batch_norms(found) == without_batch_norms(expected)


def test_casts_by_hand():
    """A map of 96 numbers of 2 bytes is copied to 4 bytes and resized to 384 numbers, or only
    resized; a sum only returns another type."""

    def run():
        half = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
        with StepTrace(None) as trace:
            F.interpolate(half, scale_factor=2, mode="bilinear")
            half.sum()
        names = {o.name.removeprefix("aten."): o for o in trace.operations()}
        return {name: (o.bytes_read, o.bytes_written) for name, o in names.items()}

    with CountingMode(), torch.autocast("cpu", torch.bfloat16):
        with autocast_of("cpu"):
            on_a_cpu = run()
        with autocast_of("cuda"):
            on_a_gpu = run()
    resize = "upsample_bilinear2d"
    assert on_a_cpu == {resize: (192, 768), "sum": (192, 2)}
    assert on_a_gpu == {"_to_copy": (192, 384), resize: (384, 1536), "sum": (192, 4)}


def test_a_parameter_is_cast_once_for_all_its_uses():
    weight = nn.Parameter(torch.zeros(8, 8))
    with CountingMode(), kdprofs_autocast(torch.bfloat16), StepTrace(None) as trace:
        F.linear(F.linear(torch.zeros(2, 8), weight), weight)
    (copies,) = (o for o in trace.operations() if o.name == "aten._to_copy")
    assert (copies.calls, copies.bytes_written) == (2, 2 * (2 * 8 + 8 * 8))


def test_what_a_gpu_refuses_is_refused():
    half, refused = torch.zeros(3), "refuses binary_cross_entropy under autocast on a GPU"
    with kdprofs_autocast(torch.bfloat16), pytest.raises(RuntimeError, match=refused):
        F.binary_cross_entropy(half, half)


def test_every_operator_that_torch_casts_has_a_rule():
    """A new version of torch may have more."""
    assert {name.partition(".")[0] for name in listed(DispatchKey.AutocastCUDA)} <= RULES.keys()


def test_an_operator_without_a_rule_cannot_be_counted(monkeypatch):
    monkeypatch.delitem(RULES, "softmax")
    why = r"does not know .* torch .* runs aten.softmax.int on"
    with kdprofs_autocast(torch.bfloat16), pytest.raises(KdprofError, match=why):
        torch.zeros(3).softmax(0)


def types_on_a_cpu() -> list[torch.dtype]:
    half, whole = torch.ones(2, 4, 4, dtype=torch.bfloat16), torch.ones(2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        calls = half.softmax(1), half.exp(), whole @ whole, torch.cat([half, whole]), half.sum()
        return [made.dtype for made in calls] + [F.mse_loss(half, half).dtype]


def fail_on_a_gpu():
    with autocast_of("cuda"):
        assert types_on_a_cpu()[0] == torch.float32
        raise ZeroDivisionError


def test_real_steps_keep_the_autocast_of_a_cpu():
    before, known = types_on_a_cpu(), listed(DispatchKey.AutocastCPU)
    assert before == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16, torch.float32]
    with pytest.raises(ZeroDivisionError):
        fail_on_a_gpu()
    assert (types_on_a_cpu(), listed(DispatchKey.AutocastCPU)) == (before, known)


def test_a_study_is_counted_with_a_gpus_autocast():
    study = ResolvedStudy(small_study(step__precision="bf16", step__crop=(256, 256)))
    (cost,) = count_study.count_costs(study, ["kd"], Progress(None)).costs
    (on_a_cpu,) = dict(count_study.counts(study, ["kd"], Progress(None), "cpu")).values()

    def resizes(operations):
        return {
            o.phase: o.bytes_written for o in operations if o.name == "aten.upsample_bilinear2d"
        }

    gpus, cpus = resizes(cost.operations), resizes(on_a_cpu.operations)
    assert gpus["student_forward"] == 2 * cpus["student_forward"] > 0
    assert cost.flop == on_a_cpu.flop
    assert types_on_a_cpu()[0] == torch.bfloat16


def test_nothing_is_printed(recwarn, capfd):
    torch.set_warn_always(True)  # and not once in a process
    try:
        with autocast_of("cuda"):
            pass
    finally:
        torch.set_warn_always(False)
    assert ([*recwarn], capfd.readouterr()) == ([], ("", ""))
