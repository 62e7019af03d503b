"""Batch norm folded into the convolutions before it, for a network that is not trained any more."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdprof.errors import KdprofError
from kdprof.method import NETWORK_TAPS, Taps
from kdprof.models.network import SegmentationNetwork

TRIED_SIZE = 64
"""Height and width of the image on which the two networks are compared."""
TOLERANCE = 1e-3
"""Allowed relative L2 between a tap of both. Rounding causes up to 1e-5, a wrong fold tenths."""


@torch.no_grad()
def folded(network: SegmentationNetwork) -> SegmentationNetwork:
    """Return a copy in evaluation mode whose batch norms are folded into the convolutions.

    A batch norm is folded if it is called once, on the output of a convolution that is called once:
    its running statistics and affine parameters become weight and bias (Jacob et al. 2018,
    arXiv:1712.05877, eq. 14). Other layers stay. The copy is for evaluation only, because its state
    has other names.

    Raises:
        KdprofError: the copy does not compute the same as the network, because another layer also
            reads the output of a folded convolution.
    """
    network = copy.deepcopy(network).eval()
    images = _random_image(network)
    expected, pairs = _watched(network, images)
    for convolution, norm in pairs:
        _replace(network, convolution, fuse_conv_bn_eval(convolution, norm))
        _replace(network, norm, _what_follows(norm))
    if not network.mean.is_meta:  # without values there is nothing to compare
        _compare(expected, network(images, NETWORK_TAPS), network.info.name)
    return network


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


def _compare(expected: Taps, found: Taps, name: str) -> None:
    for tap, wanted in vars(expected).items():
        difference = (getattr(found, tap) - wanted).norm() / wanted.norm().clamp(min=1e-12)
        if difference > TOLERANCE:
            raise KdprofError(
                f"{name}: with folded batch norm its '{tap}' differs by {difference:.1g}, because "
                "another layer also reads a convolution's output; set step.fold_teacher = false"
            )
