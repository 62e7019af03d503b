"""torch's own FLOP counter, with formulas written here for what it lacks or counts differently."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _convolution_backward(
    grad, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask, **kwargs
):
    """torch's ignores groups in the gradient of the weight."""
    positions = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * positions * math.prod(w) * sum(mask[:2])


def _attention(q, k, v, *args, **kwargs):
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward(grad, q, k, v, *args, **kwargs):
    """torch's counts the map that the kernel computes again."""
    return 2 * _attention(q, k, v)


def _vector(x, y, **kwargs):
    return 2 * math.prod(x)


def _outer(added, x, y, **kwargs):
    return 2 * math.prod(added)


CORRECTED = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.dot: _vector,
    aten.mv: _vector,
    aten.addr: _outer,
}


def torchs_counter() -> FlopCounterMode:
    """The counter, which prints nothing."""
    return FlopCounterMode(display=False, custom_mapping=CORRECTED)
