"""The forms without the map of resized logits against torch's own resize and cross-entropy."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from builders import Alone, tiny_step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.measure.counting.count import count_step, fake_tensors
from kdprof.measure.counting.operators import operator_of
from kdprof.measure.trace import StepTrace
from kdprof.resized import (
    bands,
    choice,
    resize_backward,
    resized_argmax,
    resized_cross_entropy,
    tiles,
)
from kdprof.resized.bands import banded_argmax, banded_cross_entropy
from kdprof.resized.bilinear import Axis
from kdprof.resized.choice import form_of
from kdprof.resized.cross_entropy import plain_cross_entropy
from kdprof.resized.prediction import plain_argmax

FORMATS = (torch.contiguous_format, torch.channels_last)
sides = st.integers(1, 9)
outputs = st.integers(1, 40)


def case(images, classes, low, high, void, seed=0, dtype=torch.float64):
    """Random logits and labels, of which a share is void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, *low, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (images, *high), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = 255
    return logits.to(dtype), labels


def value_and_gradient(loss, logits, *arguments):
    logits = logits.detach().requires_grad_()
    value = loss(logits, *arguments)
    return value.detach(), *torch.autograd.grad(value, logits)


@pytest.fixture
def always_bands(monkeypatch):
    monkeypatch.setattr(choice, "LEAST_ELEMENTS", 0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(bands, "BLOCK_ELEMENTS", 60)
    monkeypatch.setattr(bands, "BLOCK_COLUMNS", 7)
    monkeypatch.setattr(bands, "BAND_ROWS", 5)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), sides, sides, outputs, outputs,
    st.sampled_from([0, 0.3, 1]), st.booleans(), st.sampled_from(FORMATS), st.integers(0, 99),
)  # fmt: skip
def test_bands_are_the_plain_form(images, classes, h, w, high, wide, void, align, layout, seed):
    """Any stride, up and down, in float64; blocks are smaller than an image."""
    logits, labels = case(images, classes, (h, w), (high, wide), void, seed)
    logits = logits.to(memory_format=layout)
    wanted = value_and_gradient(plain_cross_entropy, logits, labels, align)
    found = banded_cross_entropy(logits, labels, align)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert found[1].stride() == logits.stride()
    found = banded_argmax(logits, (high, wide), align)
    assert torch.equal(found, plain_argmax(logits, (high, wide), align))


@pytest.mark.parametrize("align", [False, True])
def test_small_images_share_a_block(align, monkeypatch):
    sizes = []
    monkeypatch.setattr(bands, "BLOCK_ELEMENTS", 2 * 3 * 8 * 10)
    loss = bands._softmax_loss
    monkeypatch.setattr(
        bands, "_softmax_loss", lambda *args: (sizes.append(tuple(args[0].shape)), loss(*args))[1]
    )
    logits, labels = case(5, 3, (2, 3), (8, 10), 0.2)
    found = bands._cross_entropy(logits, labels, align)
    wanted = value_and_gradient(plain_cross_entropy, logits, labels, align)
    torch.testing.assert_close(found, wanted)
    assert sizes == [(2, 3, 80), (2, 3, 80), (1, 3, 80)]


@pytest.mark.usefixtures("always_bands")
def test_by_hand():
    """Two classes, logits 0 and z; half-pixel centres: the four pixels have z = 0, 1, 3 and 4."""
    logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 4.0]]]])
    labels = torch.tensor([[[1, 255, 0, 1]]])
    loss = lambda z: math.log(1 + math.exp(-z))  # noqa: E731
    assert resized_cross_entropy(logits, labels).item() == pytest.approx(
        loss(0.0) + loss(-3.0) + loss(4.0)
    )
    assert resized_argmax(logits, (1, 4)).tolist() == [[[0, 1, 1, 1]]]


@pytest.mark.usefixtures("always_bands")
@pytest.mark.parametrize("align", [False, True])
def test_gradient_by_finite_differences(align):
    logits, labels = case(2, 3, (2, 3), (5, 7), 0.2)
    loss = lambda z: resized_cross_entropy(z, labels, align)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.usefixtures("always_bands")
@pytest.mark.parametrize(
    ("dtype", "layout"), [*product((torch.float32, torch.bfloat16, torch.float16), FORMATS)]
)
def test_loss_in_float32_gradient_in_the_logits_own_type(dtype, layout):
    """The factor is applied in float32: 1e-5 times a gradient would vanish in float16."""
    logits, labels = case(2, 4, (4, 5), (32, 40), 0.1, dtype=dtype)
    logits = logits.to(memory_format=layout)
    scaled = lambda loss: lambda *args: 1e-5 * loss(*args) * 65536  # noqa: E731
    found, gradient = value_and_gradient(scaled(resized_cross_entropy), logits, labels, False)
    value, wanted = value_and_gradient(scaled(plain_cross_entropy), logits.double(), labels, False)
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    assert gradient.stride() == logits.stride()
    torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted.to(dtype), rtol=1e-2, atol=1e-4)


@pytest.mark.usefixtures("always_bands")
def test_autocast_changes_nothing():
    logits, labels = case(1, 4, (4, 5), (32, 40), 0.1, dtype=torch.float32)
    gradient = torch.randn(1, 4, 32, 40)

    def compute():
        return (
            resized_cross_entropy(logits, labels),
            resized_argmax(logits, (32, 40)),
            resize_backward(gradient, logits.shape[-2:]),
        )

    outside = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compute()
    assert all(map(torch.equal, outside, inside))


@pytest.mark.usefixtures("always_bands")
@pytest.mark.parametrize("depth", [50.0, 1e3, 1e6])
def test_far_apart_logits(depth):
    """In the middle between two corners no class is near its largest logit."""
    logits = torch.tensor([[[[0.0, -depth]], [[-depth, 0.0]], [[-depth, -depth]]]])
    labels = torch.tensor([[[0, 0, 1, 1, 0, 2, 0, 1]]])
    found = value_and_gradient(resized_cross_entropy, logits, labels)
    wanted = value_and_gradient(plain_cross_entropy, logits.double(), labels, False)
    torch.testing.assert_close([f.double() for f in found], list(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always_bands")
def test_void_alone_is_zero_with_zero_gradient():
    logits, labels = case(2, 3, (2, 2), (9, 9), 1)
    loss, gradient = value_and_gradient(resized_cross_entropy, logits, labels)
    assert loss == 0
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.usefixtures("always_bands")
def test_a_loss_that_is_not_finite_stays_so():
    logits, labels = case(1, 3, (2, 2), (9, 9), 0)
    logits[0, 1, 0, 0] = math.nan
    loss, gradient = value_and_gradient(resized_cross_entropy, logits, labels)
    assert loss.isnan()
    assert gradient.isnan().any()
    assert resized_argmax(logits, (9, 9)).max() < 3


@pytest.mark.usefixtures("always_bands")
@pytest.mark.parametrize("label", [3, 254, -1])
def test_a_label_that_is_no_class_is_an_error(label):
    logits, labels = case(1, 3, (2, 2), (9, 9), 0)
    labels[0, 4, 4] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        resized_cross_entropy(logits, labels)


@pytest.mark.usefixtures("always_bands")
def test_a_second_derivative_is_refused():
    logits, labels = case(1, 3, (2, 2), (9, 9), 0)
    loss = resized_cross_entropy(logits.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((2, 3, 4, 4), (1, 8, 8)), ((3, 4, 4), (3, 8, 8)), ((1, 3, 4, 4), (8, 8))],
)
def test_shapes_that_do_not_belong_together(logits, labels):
    with pytest.raises(ValueError, match=r"\(N, C, h, w\)"):
        resized_cross_entropy(torch.zeros(logits), torch.zeros(labels).long())


def test_labels_on_another_device():
    with pytest.raises(ValueError, match="labels on cpu"):
        resized_cross_entropy(torch.zeros(1, 3, 2, 2, device="meta"), torch.zeros(1, 4, 4).long())


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.booleans())
def test_weights_of_a_side_are_those_of_torch(low, high, align):
    axis = Axis.of(low, high, align)
    weights = axis.weights(torch.zeros((), dtype=torch.float64))
    identity = torch.eye(low, dtype=torch.float64)[None]
    wanted = F.interpolate(identity[:, :, None], (1, high), mode="bilinear", align_corners=align)
    torch.testing.assert_close(weights, wanted[0, :, 0].T, rtol=0, atol=1e-12)
    for start in range(0, high, 7):
        span = slice(start, min(start + 7, high))
        rest = weights[span].clone()
        rest[:, axis.read_by(span)] = 0
        assert torch.count_nonzero(rest) == 0


@settings(deadline=None)
@given(sides, sides, outputs, outputs, st.booleans(), st.sampled_from(FORMATS))
def test_resize_backward_is_that_of_torch(h, w, high, wide, align, layout):
    gradient = torch.randn(2, 3, high, wide, dtype=torch.float64).to(memory_format=layout)
    maps = torch.zeros(2, 3, h, w, dtype=torch.float64, requires_grad=True)
    resized = F.interpolate(maps, (high, wide), mode="bilinear", align_corners=align)
    (wanted,) = torch.autograd.grad(resized, maps, gradient)
    torch.testing.assert_close(resize_backward(gradient, maps.shape[-2:], align), wanted)


def test_resize_backward_of_many_bands():
    gradient = torch.randn(1, 2, 300, 9, dtype=torch.float64)
    wanted = torch.ops.aten.upsample_bilinear2d_backward(gradient, (300, 9), (1, 2, 37, 4), False)
    torch.testing.assert_close(resize_backward(gradient, torch.Size((37, 4))), wanted)


@pytest.mark.parametrize("classes", [3, 300])
def test_of_equal_logits_the_first_class_is_predicted(classes):
    logits = torch.zeros(1, classes, 2, 2)
    logits[:, 1:] = 5
    assert (banded_argmax(logits, (6, 6), False) == 1).all()
    logits[:, -1] = 6
    assert (banded_argmax(logits, (6, 6), False) == classes - 1).all()


class _Allocations(TorchDispatchMode):
    """The largest tensor that operators make, and the most bytes that they hold at a time."""

    def __init__(self):
        super().__init__()
        self.largest_bytes = self.peak_bytes = 0
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._live.values()))
        return out


def allocations(run, *arguments):
    with _Allocations() as found:
        run(*arguments)
    return found


@pytest.mark.parametrize(("classes", "size"), [(19, (512, 1024)), (150, (256, 512))])
def test_memory(classes, size):
    """At most 0.3 of the plain form's peak, and no tensor near the size of the map. The plain
    form's peak is that of its forward alone, which is less than the whole."""
    logits, labels = case(1, classes, (64, 128), size, 0.1, dtype=torch.float32)
    map_bytes = 4 * classes * math.prod(size)
    plain = allocations(plain_cross_entropy, logits, labels, False)
    assert plain.largest_bytes == map_bytes
    ours = allocations(bands._cross_entropy, logits, labels, False)
    assert ours.largest_bytes <= max(4 * bands.BLOCK_ELEMENTS, 8 * labels.numel())
    assert ours.peak_bytes < 0.3 * plain.peak_bytes
    assert allocations(bands.banded_argmax, logits, size, False).peak_bytes < map_bytes


def test_what_is_saved_for_backward_has_the_logits_size():
    logits, labels = case(2, 5, (64, 64), (512, 512), 0.1, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], id):
        resized_cross_entropy(logits.requires_grad_(), labels)
    assert saved == [logits.shape]


@pytest.mark.parametrize(
    ("shape", "size", "form"),
    [
        ((1, 19, 64, 128), (512, 1024), "bands"),
        ((2, 150, 64, 64), (512, 512), "bands"),
        ((4, 3, 4, 5), (16, 20), "plain"),
        ((1, 19, 512, 1024), (512, 1024), "plain"),
        ((1, 19, 1024, 1024), (512, 1024), "plain"),
    ],
)
def test_which_form_runs_on_a_cpu(shape, size, form):
    assert form_of(torch.empty(shape), size) == form


@pytest.mark.parametrize(
    ("reason", "size", "form"),
    [(None, (8, 8), "tiles"), ("no triton", (8, 8), "plain"), (None, (2, 2), "plain")],
)
def test_which_form_runs_on_a_gpu(reason, size, form, monkeypatch):
    monkeypatch.setattr(tiles, "why_no_triton", lambda: reason)
    logits = SimpleNamespace(device=torch.device("cuda"), shape=torch.Size((1, 3, 2, 2)))
    assert form_of(logits, size) == form


def test_logits_of_the_labels_size_are_their_own_map():
    logits, labels = case(2, 3, (6, 7), (6, 7), 0.2)
    wanted = value_and_gradient(
        lambda z: F.cross_entropy(z, labels, ignore_index=255, reduction="sum"), logits
    )
    found = value_and_gradient(resized_cross_entropy, logits, labels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("small_blocks")
def test_operators_keep_torch_s_contract():
    """Schema, fake kernel, aliasing: what counting and torch.compile rely on."""
    logits, labels = case(2, 3, (3, 4), (9, 10), 0.2)
    arguments = logits.to(memory_format=torch.channels_last), labels, True
    torch.library.opcheck(banded_cross_entropy, arguments)
    gradient = torch.randn(1, 2, 9, 8)
    torch.library.opcheck(torch.ops.kdprof.resize_bilinear_backward, (gradient, 3, 3, False))


def test_a_count_has_the_task_loss_as_one_operator():
    """Logits (4 bytes) and labels (8) are read, the gradient (4) and the loss (4) are written."""
    counted = count_step(tiny_step(Alone, batch=2, crop=(256, 256)), fake_tensors())
    found = [o for o in counted.operations if o.name == "kdprof.banded_cross_entropy"]
    assert [(o.phase, o.calls, o.kind) for o in found] == [("task_loss", 2, "softmax")]
    (both,) = found
    pixels, logits = 2 * 256 * 256, 2 * 3 * 64 * 64
    assert both.matrix_flop == 0
    assert both.bytes_read == 2 * (4 * logits + 8 * pixels)
    assert both.bytes_written == 2 * (4 * logits + 4)
    assert "uncounted" not in {o.kind for o in counted.operations}
    assert both.other_flop == 2 * plain_flop((2, 3, 64, 64), (2, 256, 256))


def plain_flop(logits, labels):
    """Count the arithmetic of torch's operators, without the sums of terms."""
    logits = torch.zeros(logits, requires_grad=True)
    with StepTrace(None) as trace:
        plain_cross_entropy(logits, torch.zeros(labels).long(), False).backward()
    kinds = {"resize", "softmax", "gather"}
    return sum(o.other_flop for o in trace.operations() if o.kind in kinds)


def test_the_kernels_operators_share_the_same_arithmetic():
    logits, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 16, 16).long()
    names = "tiled_cross_entropy", "tiled_cross_entropy_backward"
    work = [
        operator_of(getattr(torch.ops.kdprof, name).default).work((logits, labels), {}, None)
        for name in names
    ]
    assert sum(w.other_flop for w in work) == plain_flop((2, 3, 4, 4), (2, 16, 16))
