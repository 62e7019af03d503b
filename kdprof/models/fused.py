"""Convolutions with what follows them in one operator, for a network that is not trained any more.

At output stride 8 a teacher spends most of its forward on reading and writing maps: for the bias,
the addition of a residual and ReLU, each in a kernel of its own. cuDNN does them before it writes
the result of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from kdprof.models.heads import ConvModule
from kdprof.models.network import SegmentationNetwork

GRANULE = 8
"""cuDNN's kernels for tensor cores take channels in multiples of this; with others the fused
operator can be many times slower than the separate ones."""
COMPUTED = ("conv1", "conv2", "conv3", "downsample")
"""What a residual block computes, besides ReLU and the addition."""


class FusedConvolution(nn.Module):
    """ReLU of a convolution with bias and, optionally, of a map that is added to it.

    On a GPU it is one operator of cuDNN; elsewhere, if the step is compiled (the compiler fuses by
    itself) or if operators must be deterministic, separate ones that compute the same.

    Args:
        convolution: its weights are copied, in ``dtype``.
        dtype: of the computation and of the result, as under autocast.
    """

    def __init__(self, convolution: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        bias = convolution.bias
        if bias is None:
            bias = convolution.weight.new_zeros(convolution.out_channels)
        self.weight = nn.Parameter(convolution.weight.detach().to(dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        padding = convolution.padding
        assert isinstance(padding, tuple), "no network here pads by name"
        self.geometry = (
            list(convolution.stride), list(padding), list(convolution.dilation), convolution.groups
        )  # fmt: skip
        counts = (convolution.in_channels, convolution.out_channels)
        self._suits = convolution.groups == 1 and not any(count % GRANULE for count in counts)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the (N, width, h', w') map of an (N, channels, H, W) map; ``added`` has its
        shape."""
        x = x.to(self.weight.dtype)
        if self._suits and _one_operator(x):
            if added is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
            return torch.cudnn_convolution_add_relu(
                x, self.weight, added.to(x.dtype), 1.0, self.bias, *self.geometry
            )
        out = F.conv2d(x, self.weight, self.bias, *self.geometry)
        if added is not None:
            out += added
        return F.relu_(out)


def _one_operator(x: Tensor) -> bool:
    plain = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    return x.is_cuda and not plain


class FusedBlock(nn.Module):
    """A residual block of timm's ResNets after the fold of its batch norms."""

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype):
        super().__init__()
        *inner, last = _convolutions(block)
        self.shortcut = block.downsample
        if self.shortcut is not None:
            _move_bias(self.shortcut, last)
        self.inner = nn.Sequential(*(FusedConvolution(one, dtype) for one in inner))
        self.last = FusedConvolution(last, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's (N, C, h', w') map of an (N, channels, h, w) map."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.last(self.inner(x), shortcut)


def _convolutions(block: BasicBlock | Bottleneck) -> list[nn.Conv2d]:
    return [block.conv1, block.conv2, *([block.conv3] if isinstance(block, Bottleneck) else [])]


def _move_bias(shortcut: nn.Module, last: nn.Conv2d) -> None:
    """Add the shortcut's bias to that of the convolution that it is added to: one map less to be
    read and written."""
    *_, convolution = (m for m in shortcut.modules() if isinstance(m, nn.Conv2d))
    assert last.bias is not None, "a folded convolution has one"
    if convolution.bias is not None:
        last.bias += convolution.bias
        convolution.bias = None


def fuse(network: SegmentationNetwork, dtype: torch.dtype) -> None:
    """Replace, in place, the convolutions of a folded network that ReLU follows.

    Those are timm's residual blocks and stems of ResNets, and kdprof's heads. What has another form
    stays.

    Args:
        dtype: of the computation, see :class:`FusedConvolution`.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ConvModule) and isinstance(child.bn, nn.Identity):
                setattr(parent, name, FusedConvolution(child.conv, dtype))
            elif isinstance(child, BasicBlock | Bottleneck) and _is_plain(child):
                setattr(parent, name, FusedBlock(child, dtype))
    net = network.backbone.net
    if hasattr(net, "layer4"):
        _fuse_stem(net, dtype)


def _is_plain(block: BasicBlock | Bottleneck) -> bool:
    """Return whether a block consists of convolutions, ReLU and the addition only."""
    others = {n: part for n, part in block.named_children() if n not in COMPUTED}
    return all(
        isinstance(part, nn.ReLU if name.startswith("act") else nn.Identity)
        for name, part in others.items()
    )


def _fuse_stem(net: nn.Module, dtype: torch.dtype) -> None:
    """Fuse the convolutions before the first pooling: each is followed by its folded norm and by
    ReLU, and the last one of a deep stem is in another module than these."""
    before: tuple[nn.Module, str, nn.Conv2d] | None = None
    for parent, name, child in _in_order(net, until="maxpool"):
        if isinstance(child, nn.Conv2d):
            before = parent, name, child
        elif type(child) is nn.ReLU and before is not None:
            owner, key, convolution = before
            setattr(owner, key, FusedConvolution(convolution, dtype))
            setattr(parent, name, nn.Identity())
            before = None
        elif not isinstance(child, nn.Identity):
            before = None


def _in_order(net: nn.Module, until: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the layers of a chain of modules with their parents and names, in the order of their
    calls."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in net.named_children():
        if name == until:
            break
        if isinstance(child, nn.Sequential):
            found += _in_order(child, until)
        else:
            found.append((net, name, child))
    return found
