"""Segmentation networks by name: ``pspnet-r18``, ``deeplabv3-mobilenetv2_100``, ..."""

from __future__ import annotations

from kdprof.models.folding import folded
from kdprof.models.names import NetworkName, parse_name
from kdprof.models.network import SegmentationNetwork

__all__ = ["SegmentationNetwork", "build", "folded", "parse_name"]


def build(
    name: str | NetworkName, num_classes: int, *, backbone_weights: str = "none"
) -> SegmentationNetwork:
    """Return the network called ``name`` on the default device, in training mode.

    ``backbone_weights`` is ``none`` (random, reproducible under ``torch.manual_seed``),
    ``imagenet`` (timm's, downloaded at first use), or the path of a timm state dict (.pth or
    .safetensors) that must hold all of the backbone. The heads are always random.

    Raises:
        UserError: unknown name, a backbone that timm cannot dilate to stride 8, or weights that
            are unavailable or do not fit.
    """
    name = parse_name(name) if isinstance(name, str) else name
    return SegmentationNetwork(name, num_classes, backbone_weights)
