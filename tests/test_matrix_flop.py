"""FLOP of every operator of torch with matrix work, by hand. 1 multiply-add = 2 FLOP."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401  # registers its operators
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from kdprof.measure.counting.count import fake_tensors
from kdprof.measure.counting.matrix_flop import (
    FORMULAS,
    LENGTHS,
    NESTED,
    NO_FORMULA,
    NO_PRODUCTS,
    SPARSE,
    UNKNOWN,
    name_of,
)
from kdprof.measure.counting.operators import operator_of
from kdprof.measure.trace import WHOLE, StepTrace

aten = torch.ops.aten


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def called(overload, *args, out=None, **kwargs):
    """FLOP of a call that does not happen: as an operator of a GPU has them."""
    return operator_of(overload).matrix(args, kwargs, out)


def traced(work) -> StepTrace:
    with StepTrace(None) as trace:
        work()
    return trace


def flop(work) -> float | None:
    """FLOP of what really runs."""
    return traced(work).matrix_flop().get(WHOLE, 0)


def why(work) -> dict[str, str]:
    found = traced(work).operations()
    return {o.name.removeprefix("aten."): o.uncounted for o in found if o.matrix_flop is None}


A, B = torch.ones(3, 5), torch.ones(5, 7)
BATCH_A, BATCH_B = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
MAPS = torch.ones(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("work", "multiply_adds"),
    [
        (lambda: A @ B, 3 * 5 * 7),
        (lambda: torch.addmm(torch.ones(7), A, B), 3 * 5 * 7),
        (lambda: torch.ones(3, 7).addmm_(A, B), 3 * 5 * 7),
        (lambda: torch._addmm_activation(torch.ones(7), A, B), 3 * 5 * 7),
        (lambda: BATCH_A @ BATCH_B, 2 * 3 * 5 * 7),
        (lambda: torch.baddbmm(torch.ones(7), BATCH_A, BATCH_B), 2 * 3 * 5 * 7),
        (lambda: torch.addbmm(torch.ones(7), BATCH_A, BATCH_B), 2 * 3 * 5 * 7),
        (lambda: A @ B[:, 0], 3 * 5),
        (lambda: A @ B[:, :1], 3 * 5),
        (lambda: torch.addmv(torch.ones(3), A, B[:, 0]), 3 * 5),
        (lambda: A[0] @ B[:, 0], 5),
        (lambda: torch.vdot(A[0], B[:, 0]), 5),
        (lambda: torch.addr(A, A[:, 0], A[0]), 3 * 5),
        (lambda: F.linear(BATCH_A, B.T), 2 * 3 * 5 * 7),
        (lambda: F.linear(A, B[:, 0]), 3 * 5),
        (lambda: A.cfloat() @ B.cfloat(), 4 * 3 * 5 * 7),
        (lambda: torch.einsum("bij,jk->bik", BATCH_A, B), 2 * 3 * 5 * 7),
        (lambda: torch.tensordot(BATCH_A, B, 1), 2 * 3 * 5 * 7),
        (lambda: torch.linalg.multi_dot([A, B, torch.ones(7, 2)]), 5 * 7 * 2 + 3 * 5 * 2),
        (lambda: torch._int_mm(torch.ones(32, 16).char(), torch.ones(16, 8).char()), 32 * 16 * 8),
        # y = x1 W x2, for each of 7 outputs: by the first index, then by the second.
        (lambda: F.bilinear(A, torch.ones(3, 6), torch.ones(7, 5, 6)), 3 * 7 * (5 * 6 + 6)),
        (lambda: torch.cdist(torch.ones(30, 4), torch.ones(40, 4)), 30 * 40 * (4 + 2)),
        (lambda: torch.cdist(torch.ones(20, 4), torch.ones(20, 4)), 0),
        (lambda: torch.cdist(torch.ones(30, 4), torch.ones(40, 4), p=1), 0),
        (lambda: F.affine_grid(torch.ones(2, 2, 3), [2, 1, 4, 5], False), 2 * 4 * 5 * 2 * 3),
        (lambda: torch.conv_tbc(torch.ones(9, 2, 4), torch.ones(3, 4, 6), torch.ones(6)),
         7 * 2 * 3 * 4 * 6),
        (lambda: F.conv1d(MAPS[0], torch.ones(5, 6, 3)), 4 * 6 * 5 * 6 * 3),
        (lambda: F.conv2d(MAPS, torch.ones(6, 2, 3, 3), groups=2), 2 * 4 * 6 * 6 * 2 * 9),
        (lambda: F.conv2d(MAPS, torch.ones(6, 4, 3, 3), dilation=2), 2 * 2 * 4 * 6 * 4 * 9),
        (lambda: F.conv2d(MAPS[0], torch.ones(6, 4, 3, 3)), 4 * 6 * 6 * 4 * 9),
        (lambda: F.conv3d(MAPS[:, None], torch.ones(3, 1, 2, 3, 3)), 2 * 3 * 4 * 6 * 3 * 18),
        (lambda: F.conv_transpose2d(MAPS, torch.ones(4, 3, 2, 2), stride=2), 2 * 48 * 4 * 3 * 4),
        (lambda: torch.ops.torchvision.deform_conv2d(
            MAPS, torch.ones(6, 4, 3, 3), torch.zeros(2, 18, 4, 6), torch.ones(2, 9, 4, 6),
            torch.zeros(6), 1, 1, 0, 0, 1, 1, 1, 1, True), 2 * 4 * 6 * 6 * 4 * 9),
    ],
)  # fmt: skip
def test_one_operator(work, multiply_adds):
    assert flop(work) == 2 * multiply_adds
    with torch.inference_mode():  # the operators that torch composes of others are seen themselves
        assert flop(work) == 2 * multiply_adds


X, W, Y = meta(2, 8, 9, 7), meta(12, 4, 3, 3), meta(2, 12, 9, 7)
"""A convolution in two groups."""
ONES = ([1, 1], [1, 1], [1, 1])
FORWARD = 2 * 2 * 12 * 9 * 7 * 4 * 9
SMALL, LARGE = meta(2, 8, 4, 4), meta(2, 6, 8, 8)
UP = meta(8, 6, 2, 2)
TRANSPOSED = 2 * 2 * 16 * 8 * 6 * 4
ROWS, FEW = meta(6, 32), meta(32, 16)


@pytest.mark.parametrize(
    ("overload", "args", "out", "expected"),
    [
        (aten.convolution.default, (X, W, None, *ONES, False, [0, 0], 2), Y, FORWARD),
        # torch's own formula takes the flag of cudnn's benchmark for that of a transposed one.
        (aten.cudnn_convolution.default, (X, W, *ONES, 2, True, False, True), Y, FORWARD),
        (aten.cudnn_convolution_relu.default, (X, W, None, *ONES, 2), Y, FORWARD),
        (aten.cudnn_convolution_add_relu.default, (X, W, Y, 1, None, *ONES, 2), Y, FORWARD),
        (aten.cudnn_convolution_transpose.default,
         (SMALL, UP, [0, 0], [0, 0], [2, 2], [1, 1], 1, True, False, True), LARGE, TRANSPOSED),
        (aten.miopen_convolution.default, (X, W, None, *ONES, 2, True, False), Y, FORWARD),
        (aten.miopen_convolution_transpose.default,
         (SMALL, UP, None, [0, 0], [0, 0], [2, 2], [1, 1], 1, True, False), LARGE, TRANSPOSED),
        (aten.mkldnn_convolution.default, (X, W, None, *ONES, 2), Y, FORWARD),
        (aten._slow_conv2d_forward.default, (X, W, [3, 3], None, *ONES[:2]), Y, FORWARD),
        (aten._conv_depthwise2d.default, (X, W, [3, 3], None, *ONES), Y, FORWARD),
        (aten.slow_conv_transpose2d.default, (SMALL, UP, [2, 2]), LARGE, TRANSPOSED),
        *[
            (aten.convolution_backward.default,
             (Y, X, W, None, *ONES, False, [0, 0], 2, mask), None, sum(mask[:2]) * FORWARD)
            for mask in ([True, True, True], [False, True, False], [True, False, True])
        ],
        (aten.convolution_backward.default,
         (LARGE, SMALL, UP, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1, [True, True, False]),
         None, 2 * TRANSPOSED),
        (aten._slow_conv2d_backward.output_mask,
         (Y, X, W, [3, 3], *ONES[:2], [True, True, False]), None, 2 * FORWARD),
        (torch.ops.torchvision._deform_conv2d_backward.default,
         (Y, X, W, X, X, X, *[1] * 8, True), None, 2 * FORWARD),
        (aten._scaled_mm.default, (ROWS, FEW, ROWS, ROWS), meta(6, 16), 2 * 6 * 32 * 16),
        (aten._weight_int4pack_mm.default, (ROWS, FEW, 32, FEW), meta(6, 16), 2 * 6 * 32 * 16),
        (aten._weight_int8pack_mm.default, (ROWS, FEW, FEW), meta(6, 16), 2 * 6 * 32 * 16),
        # Rows in groups, columns in groups, the shared dimension in groups, and a stack.
        (aten._grouped_mm.default, (ROWS, meta(2, 32, 16)), meta(6, 16), 2 * 6 * 32 * 16),
        (aten._grouped_mm.default, (meta(2, 6, 32), FEW), meta(6, 16), 2 * 6 * 32 * 16),
        (aten._grouped_mm.default, (ROWS, FEW), meta(2, 6, 16), 2 * 6 * 32 * 16),
        (aten._grouped_mm.default, (meta(2, 6, 32), meta(2, 32, 16)), meta(2, 6, 16),
         2 * 2 * 6 * 32 * 16),
        (aten.linear_backward.default, (ROWS, meta(6, 16), meta(16, 32), [True, False, True]), None,
         2 * 6 * 32 * 16),
        (aten.mkldnn_linear.default, (ROWS, meta(16, 32)), meta(6, 16), 2 * 6 * 32 * 16),
        (torch.ops.inductor._mm_plus_mm.default, (ROWS, FEW, ROWS, FEW), meta(6, 16),
         2 * 2 * 6 * 32 * 16),
    ],
)  # fmt: skip
def test_operators_of_other_devices(overload, args, out, expected):
    assert called(overload, *args, out=out) == expected


def test_packed_weights():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no fbgemm")
    quantized = lambda *shape, dtype=torch.quint8: torch.quantize_per_tensor(  # noqa: E731
        torch.ones(shape), 0.1, 0, dtype
    )
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        weight = quantized(6, 2, 3, 3, dtype=torch.qint8)
        ops = torch.ops.quantized
        packed = ops.conv2d_prepack(weight, None, [1, 1], [0, 0], [1, 1], 2)
        line = ops.linear_prepack(quantized(7, 5, dtype=torch.qint8), None)
        maps = quantized(2, 4, 6, 8)
        assert flop(lambda: ops.conv2d(maps, packed, 0.1, 0)) == 2 * 2 * 4 * 6 * 6 * 2 * 9
        assert flop(lambda: ops.linear(quantized(3, 5), line, 0.1, 0)) == 2 * 3 * 5 * 7
    finally:
        torch.backends.quantized.engine = before


# Attention: every form has the FLOP of the written-out one

Q, K, V = (2, 6, 10, 8), (2, 6, 14, 8), (2, 6, 14, 8)


def written_out(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def forward_and_backward(attend, shapes=(Q, K, V)) -> tuple[float, float]:
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    forward = flop(lambda: attend(*given))
    return forward, flop(lambda: attend(*given).sum().backward()) - forward


BY_HAND = (2 * 2 * 6 * 10 * 14 * 16, 2 * 2 * 2 * 6 * 10 * 14 * 16)
"""Two products of a map of 10 x 14 per head and image; then two for each of them."""


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_of_a_cpu_counts_as_the_written_out_form(backend, causal):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    assert forward_and_backward(attend) == forward_and_backward(written_out) == BY_HAND


def test_shared_heads_count_as_if_they_were_repeated():
    shapes = (2, 6, 10, 8), (2, 3, 14, 8), (2, 3, 14, 8)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def repeated(q, k, v):
        return written_out(q, *(x.repeat_interleave(2, 1) for x in (k, v)))

    assert forward_and_backward(attend, shapes) == forward_and_backward(repeated, shapes) == BY_HAND


HEADS_FIRST = [meta(*shape) for shape in (Q, K, V)]
HEADS_LAST = [x.transpose(1, 2) for x in HEADS_FIRST]
FUSED = {
    "_scaled_dot_product_flash_attention": HEADS_FIRST,
    "_scaled_dot_product_flash_attention_for_cpu": HEADS_FIRST,
    "_scaled_dot_product_efficient_attention": HEADS_FIRST,
    "_scaled_dot_product_cudnn_attention": HEADS_FIRST,
    "_scaled_dot_product_fused_attention_overrideable": HEADS_FIRST,
    "_cudnn_attention_forward": HEADS_FIRST,
    "_flash_attention_forward": HEADS_LAST,
    "_efficient_attention_forward": HEADS_LAST,
}


@pytest.mark.parametrize("name", FUSED)
def test_every_kernel_of_a_gpu_counts_as_the_written_out_form(name):
    parts = FUSED[name]
    forward = getattr(aten, name).default
    backward = getattr(aten, name.removesuffix("_forward") + "_backward").default
    assert called(forward, *parts) == BY_HAND[0]
    mask = {"grad_input_mask": [True, True, True, False]}
    masked = mask if "grad_input_mask" in str(backward._schema) else {}
    assert called(backward, parts[0], *parts, **masked) == BY_HAND[1]


def test_a_kernel_computes_the_gradients_that_it_is_asked_for():
    """That of the values is one product; those of queries and keys need that of the map."""
    backward = aten._scaled_dot_product_efficient_attention_backward.default
    for mask, products in (([False, False, True], 1), ([True, False, False], 2),
                           ([True, True, False], 3)):  # fmt: skip
        asked = called(backward, HEADS_FIRST[0], *HEADS_FIRST, grad_input_mask=[*mask, False])
        assert asked == products * BY_HAND[0] / 2


def test_packed_sequences_meet_their_own_keys_only():
    """Sequences of 3 and 5 positions, one after another: 3 x 3 and 5 x 5 pairs, not 8 x 8."""
    q, ends = torch.empty(8, 6, 4), torch.tensor([0, 3, 8])
    kernel = aten._flash_attention_forward.default
    assert called(kernel, q, q, q, ends, ends, 5, 5) == 2 * (9 + 25) * 6 * 8
    unknown = ends.to("meta")
    assert called(kernel, q, q, q, unknown, unknown, 5, 5) == LENGTHS


def test_packed_sequences_of_the_public_function():
    pytest.importorskip("torch.nn.attention.varlen")
    q, ends = torch.empty(8, 6, 4), torch.tensor([0, 3, 8])
    varlen = torch.ops.torch_attn._varlen_attn.default
    assert called(varlen, q, q, q, ends, None, 5, 5) == 2 * (9 + 25) * 6 * 8


def test_flex_attention_is_one_operator():
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q, k = torch.randn(2, 6, 16, 8), torch.randn(2, 3, 32, 8)
    with pytest.warns(UserWarning, match="without torch.compile"):
        trace = traced(lambda: flex_attention(q, k, k, enable_gqa=True))
    assert trace.matrix_flop() == {WHOLE: 2 * 2 * 6 * 16 * 32 * 16}


def test_what_a_checkpoint_computes_again_is_counted_again():
    """The step calls these operators twice; the recomputation of a fused backward is inside one."""
    q = torch.randn(Q, requires_grad=True)
    k, v = torch.randn(K, requires_grad=True), torch.randn(V, requires_grad=True)

    def again(use_reentrant):
        out = checkpoint(F.scaled_dot_product_attention, q, k, v, use_reentrant=use_reentrant)
        out.sum().backward()

    assert flop(lambda: again(False)) == flop(lambda: again(True)) == 2 * BY_HAND[0] + BY_HAND[1]


@pytest.mark.parametrize("fused", ["layer", "attention"])
def test_the_fused_inference_of_transformers_counts_as_their_training(fused):
    """The fast path of torch.nn is one operator, which a frozen teacher takes."""
    x = torch.randn(2, 6, 16)
    if fused == "layer":
        module = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        work, expected = (lambda: module(x)), 2 * 2 * 6 * (4 * 16 * 16 + 2 * 6 * 16 + 2 * 16 * 32)
    else:
        module = nn.MultiheadAttention(16, 4, batch_first=True)
        work, expected = (lambda: module(x, x, x)), 2 * 2 * 6 * (4 * 16 * 16 + 2 * 6 * 16)
    slow = flop(work)
    module.eval()
    with torch.no_grad():
        fast = traced(work)
    assert fast.matrix_flop()[WHOLE] == slow == expected
    assert len([o for o in fast.operations() if o.matrix_flop]) == 1


# Recurrent layers


def recurrent(gates: int, hidden: int = 7, inputs: int = 5) -> int:
    """Two layers in two directions, 11 steps of 3 sequences."""
    return 2 * 11 * 3 * gates * hidden * 2 * ((inputs + hidden) + (2 * hidden + hidden))


@pytest.mark.parametrize(("name", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(name, gates):
    """The LSTM of a CPU is one operator per layer and direction; the others are products. torch
    computes no gradient of a first state that is given, in the latter; in fused kernels it does."""
    layer = getattr(nn, name)(5, 7, num_layers=2, bidirectional=True)
    x = torch.randn(11, 3, 5, requires_grad=True)
    assert flop(lambda: layer(x)) == recurrent(gates)
    with fake_tensors(), StepTrace(None) as fakes:
        getattr(nn, name)(5, 7, num_layers=2, bidirectional=True)(torch.randn(11, 3, 5))
    assert fakes.matrix_flop()[WHOLE] == recurrent(gates)
    first_states = 0 if name == "LSTM" else 2 * 2 * 2 * 3 * gates * 7 * 7
    assert flop(lambda: layer(x)[0].sum().backward()) == 3 * recurrent(gates) - first_states


@pytest.mark.parametrize("kernel", ["_cudnn_rnn", "miopen_rnn"])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_kernels_of_a_gpu(kernel, packed):
    """A packed sequence has one row for each position."""
    rows = 23 if packed else 33
    x = meta(23, 5) if packed else meta(11, 3, 5)
    weights = [meta(*w) for size in (5, 5, 14, 14) for w in ((28, size), (28, 7), (28,), (28,))]
    forward, backward = getattr(aten, kernel), getattr(aten, f"{kernel}_backward")
    expected = recurrent(4) * rows // 33
    assert called(forward.default, x, weights, 4) == expected
    for wanted in (True, False):
        found = called(backward.default, x, weights, 4, output_mask=[True, False, False, wanted])
        assert found == expected * (1 + wanted)


# What has no formula


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.fft.rfft2(MAPS),
        lambda: torch.linalg.svd(A),
        lambda: torch.linalg.eigh(A @ A.T),
        lambda: torch.linalg.qr(A),
        lambda: torch.linalg.inv(torch.eye(3)),
        lambda: torch.linalg.solve(torch.eye(3), A),
        lambda: torch.linalg.cholesky(torch.eye(3)),
        lambda: torch.linalg.det(torch.eye(3)),
        lambda: torch.linalg.lu(A),
        lambda: torch.linalg.lstsq(torch.eye(3), A),
        lambda: torch.linalg.matrix_exp(torch.eye(3)),
        lambda: torch.linalg.pinv(A),
    ],
)
def test_what_depends_on_an_algorithm_has_no_flop(work):
    assert flop(work) is None
    assert all(
        reason.startswith("the FLOP depend on the algorithm") for reason in why(work).values()
    )


def test_sparse_and_nested_tensors_have_no_flop():
    sparse = torch.eye(3).to_sparse()
    for given in (sparse, sparse.to_sparse_csr()):
        assert why(lambda given=given: given @ A) == {"mm": SPARSE}
    nested = torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(4, 5)])
    assert why(lambda: F.linear(nested, B.T)) == {"linear": NESTED}


def test_the_values_of_a_jagged_tensor_are_counted_exactly():
    rows = torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(4, 5)], layout=torch.jagged)
    assert flop(lambda: F.linear(rows, B.T)) == 2 * 7 * 5 * 7


@pytest.fixture
def library():
    with torch.library._scoped_library("flop_test", "FRAGMENT") as made:
        made.define("attention(Tensor x) -> Tensor")
        made.impl("attention", torch.clone, "CompositeExplicitAutograd")
        made.define("composed(Tensor x) -> Tensor")
        made.impl("composed", lambda x: x @ x.mT, "CompositeImplicitAutograd")
        made.define("pointwise(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
        made.impl("pointwise", torch.clone, "CompositeExplicitAutograd")
        yield torch.ops.flop_test
    operator_of.cache_clear()


def test_an_operator_of_a_user_is_uncounted_unless_it_is_known(library):
    assert why(lambda: library.attention(A)) == {"flop_test.attention": UNKNOWN}
    assert flop(lambda: library.composed(A)) == 2 * 3 * 5 * 3
    assert flop(lambda: library.pointwise(A)) == 0


def test_a_user_can_register_a_formula(library):
    operator_of.cache_clear()
    packet = library.attention
    register_flop_formula(packet)(lambda x, out_shape=None, **kwargs: 10 * x[0])
    try:
        assert flop(lambda: library.attention(A)) == 30
    finally:
        del flop_registry[packet]


# All operators of this torch

MATRIX_WORDS = re.compile(
    r"mm$|mm_|_mv$|^mv$|conv\d?d?|attention|lstm|gru|rnn|(?<!bi)(?<!tri)(?<!upsample_)linear|matmul|bilinear$|"
    r"^v?dot$|vecdot|fft_|linalg|svd|cholesky|qr$|(?<!w)eigh|inverse|solve|^det$|einsum|kron|tensordot|"
    r"cdist|_euclidean|multi_head|encoder_layer|baddbmm|addbmm|_int_mm|int4pack_mm|int8pack_mm"
)
"""Names of matrix work, written without a look at those of the program."""
WITHOUT_PRODUCTS = NO_PRODUCTS | {
    "linalg_vector_norm", "mkldnn_reorder_conv2d_weight", "mkldnn_reorder_conv3d_weight",
    "_cudnn_rnn_flatten_weight", "static_runtime.flatten_copy", "linalg_diagonal",
}  # fmt: skip
ARRANGES = re.compile(r"prepack|unpack|pack_|reorder|convert|compress$")


def all_operators():
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        plain, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), plain)
        yield getattr(packet, overload or "default")


def test_every_operator_with_matrix_work_has_a_formula_or_a_mark():
    missing = set()
    for overload in all_operators():
        name, operator = name_of(overload), operator_of(overload)
        looks = MATRIX_WORDS.search(name.rpartition(".")[2])
        counted = operator.matrix is not None or operator.composite or operator.kind is None
        if looks and not counted and name not in WITHOUT_PRODUCTS and not ARRANGES.search(name):
            missing.add(name)
    assert not missing


def test_every_operator_that_torch_counts_has_a_formula_here():
    known = {str(packet).removeprefix("aten.") for packet in flop_registry}
    assert known <= FORMULAS.keys()


def test_every_formula_is_of_an_operator():
    """A misspelt name would be an operator that is not counted."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("this torch lacks operators of 2.12, which have formulas")
    names = {name_of(overload) for overload in all_operators()}
    missing = {name for name in FORMULAS if name not in names and "higher_order" not in name}
    assert not missing


def test_operators_of_a_later_torch_are_not_taken_for_free():
    with torch.library._scoped_library("aten", "FRAGMENT") as made:
        for name in ("_paged_attention_v3", "fused_matmul_gelu", "sorted_by_key"):
            made.define(f"{name}(Tensor x) -> Tensor")
            made.impl(name, torch.clone, "CompositeExplicitAutograd")
        assert why(lambda: aten._paged_attention_v3(A)) == {"_paged_attention_v3": NO_FORMULA}
        assert why(lambda: aten.fused_matmul_gelu(A)) == {"fused_matmul_gelu": NO_FORMULA}
        assert flop(lambda: aten.sorted_by_key(A)) == 0
    operator_of.cache_clear()


# Nothing counts twice


@pytest.mark.parametrize(
    "work",
    [
        lambda: F.linear(A, B.T, torch.ones(7)),
        lambda: F.conv2d(MAPS, torch.ones(6, 4, 1, 1)),
        lambda: nn.LSTM(5, 7)(BATCH_A),
        lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 4, 8)] * 3),
        lambda: torch.einsum("ij,jk->ik", A, B),
    ],
)
def test_composed_operators_are_counted_once(work):
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            found = [o for o in traced(work).operations() if o.matrix_flop]
        assert [o.calls for o in found] == [1]
