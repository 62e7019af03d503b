"""A network that is not trained any more: batch norm folded into the convolutions before it, and
these fused with what follows."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdprof.errors import KdprofError
from kdprof.method import NETWORK_TAPS, Taps
from kdprof.models.fused import fuse
from kdprof.models.network import SegmentationNetwork

TRIED_SIZE = 64
"""Height and width of the image on which the two networks are compared."""
TOLERANCES = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Allowed relative L2 between a tap of both, by the data type of the computation. Rounding causes
up to 1e-5 in float32, up to 1e-3 with TF32; a wrong fold tenths or a value that is not finite."""


@torch.no_grad()
def folded(network: SegmentationNetwork, dtype: torch.dtype) -> SegmentationNetwork:
    """Return a copy in evaluation mode whose batch norms are folded into the convolutions, which
    are then fused with bias, addition and ReLU, see :mod:`kdprof.models.fused`.

    A batch norm is folded if it is called once, on the output of a convolution that is called once:
    its running statistics and affine parameters become weight and bias (Jacob et al. 2018,
    arXiv:1712.05877, eq. 14). Other layers stay. The copy is for evaluation only, because its state
    has other names.

    Args:
        dtype: of the computation: float32, or that of the autocast under which the copy runs.

    Raises:
        KdprofError: the copy does not compute the same as the network, because another layer also
            reads the output of a folded convolution, or the device cannot compute it.
    """
    network = copy.deepcopy(network).eval()
    images = _random_image(network)
    expected, pairs = _watched(network, images)
    for convolution, norm in pairs:
        _replace(network, convolution, fuse_conv_bn_eval(convolution, norm))
        _replace(network, norm, _what_follows(norm))
    if network.mean.is_meta:  # without values there is nothing to compare
        fuse(network, dtype)
        return network
    _compare(expected, network(images, NETWORK_TAPS), network.info.name, torch.float32)
    fuse(network, dtype)
    _compare(expected, _run(network, images, dtype), network.info.name, dtype)
    return network


def _run(network: SegmentationNetwork, images: Tensor, dtype: torch.dtype) -> Taps:
    """Return the taps of the fused network.

    Raises:
        KdprofError: the device cannot compute it.
    """
    autocast = torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32)
    try:
        with autocast:
            return network(images, NETWORK_TAPS)
    except RuntimeError as error:  # cuDNN has no kernel
        reason = str(error).strip().partition("\n")[0]
        raise KdprofError(
            f"{network.info.name}: its convolutions cannot be fused with ReLU here ({reason}); set "
            "step.fold_teacher = false"
        ) from error


def _random_image(network: SegmentationNetwork) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, TRIED_SIZE, TRIED_SIZE), generator=draw)
    return images.to(torch.uint8).to(network.mean.device)


def _watched(
    network: SegmentationNetwork, images: Tensor
) -> tuple[Taps, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """Return the network's taps, and its convolutions with the batch norm after each."""
    calls: Counter[nn.Module] = Counter()
    made: list[tuple[Tensor, nn.Conv2d]] = []  # kept alive, so that no address is reused
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            made.append((out, module))
        elif isinstance(module, nn.BatchNorm2d):
            pairs.extend((conv, module) for tensor, conv in made if tensor is given[0])

    watched = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(watch) for module in watched]
    taps = network(images, NETWORK_TAPS)
    for hook in hooks:
        hook.remove()
    return taps, [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _what_follows(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what remains of a folded batch norm: timm's batch norms contain the activation."""
    if hasattr(norm, "act"):
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.Identity()


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in network.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def _compare(expected: Taps, found: Taps, name: str, dtype: torch.dtype) -> None:
    for tap, wanted in vars(expected).items():
        given = getattr(found, tap).float()
        difference = (given - wanted).norm() / wanted.norm().clamp(min=1e-12)
        if not difference <= TOLERANCES[dtype]:  # NaN, too
            raise KdprofError(
                f"{name}: with folded batch norm its '{tap}' differs by {difference:.1g}, because "
                "another layer also reads a convolution's output, or a fused kernel is wrong; set "
                "step.fold_teacher = false"
            )
