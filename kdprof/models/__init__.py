"""Segmentation networks by name (``pspnet-r18``, ``segformer-b0``, ...), and their weights.

Here a name becomes a network with taps. Nothing here knows data sets, objectives or training.
"""

from __future__ import annotations

import torch

from kdprof.models.adapted import (
    AdaptedNetwork,
    build_adapted,
    is_adapted,
    is_from_file,
    sources_of_network,
)
from kdprof.models.folding import folded
from kdprof.models.names import NetworkName, parse_name
from kdprof.models.network import SegmentationNetwork

__all__ = [
    "AdaptedNetwork",
    "AnyNetwork",
    "SegmentationNetwork",
    "build",
    "folded",
    "is_adapted",
    "is_from_file",
    "outlined",
    "parse_name",
    "sources_of_network",
]


AnyNetwork = SegmentationNetwork | AdaptedNetwork
"""A network of kdprof's own, or an adapted one."""


def build(
    name: str | NetworkName, num_classes: int, *, backbone_weights: str = "none"
) -> AnyNetwork:
    """Return the network called ``name`` in training mode, on the default device; an adapted one
    always on the CPU, because it may be a user's code, which may keep tensors of its own.

    The valid names are those of :func:`~kdprof.models.names.parse_name` and of
    :func:`~kdprof.models.adapted.build_adapted`.

    ``backbone_weights`` is ``none`` (random, reproducible under ``torch.manual_seed``),
    ``imagenet`` (downloaded at first use), or the path of a timm state dict (.pth or .safetensors)
    that must hold all of the backbone. The heads are always random.

    Raises:
        UserError: the name is unknown, timm cannot build the backbone at the output stride of the
            name, or the weights are unavailable or do not fit.
    """
    if isinstance(name, str) and is_adapted(name):
        with torch.device("cpu"):
            return build_adapted(name, num_classes, backbone_weights)
    name = parse_name(name) if isinstance(name, str) else name
    return SegmentationNetwork(name, num_classes, backbone_weights)


def outlined(name: str | NetworkName, num_classes: int) -> AnyNetwork:
    """Return the network called ``name`` for what is known of it (``info``, ``check_input``): its
    parameters have shapes, but no values where it can be built without.

    Raises:
        UserError: as :func:`build`.
    """
    try:
        with torch.device("meta"):
            return build(name, num_classes)
    except Exception:  # by backbone: some read numbers from tensors while they are built
        return build(name, num_classes)
