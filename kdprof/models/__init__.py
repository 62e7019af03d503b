"""Segmentation networks by name: ``pspnet-r18``, ``deeplabv3-mobilenetv2_100``, ..."""

from __future__ import annotations

from kdprof.errors import UserError, unknown
from kdprof.models.backbone import ALIASES, check_name
from kdprof.models.folding import folded
from kdprof.models.network import HEADS, SegmentationNetwork

__all__ = ["SegmentationNetwork", "build", "folded", "parse_name"]


def parse_name(name: str) -> tuple[str, str]:
    """Return the head and the backbone of ``<head>-<backbone>``, aliases resolved.

    ``pspnet-r18`` gives ``("pspnet", "resnet18c")``. Heads: pspnet, deeplabv3. Backbones: every
    timm name, ``resnet18c``, ``resnet34c``, and the aliases r18, r50 and r101.

    Raises:
        UserError: there is no such head or backbone; names the nearest that there is.
    """
    head, _, backbone = name.partition("-")
    if head not in HEADS or not backbone:
        backbones = [backbone] if backbone else ALIASES
        raise UserError(unknown("network", name, [f"{h}-{b}" for h in HEADS for b in backbones]))
    backbone = ALIASES.get(backbone, backbone)
    check_name(backbone)
    return head, backbone


def build(name: str, num_classes: int, *, backbone_weights: str = "none") -> SegmentationNetwork:
    """Return the network called ``name`` on the default device, in training mode.

    ``backbone_weights`` is ``none`` (random, reproducible under ``torch.manual_seed``),
    ``imagenet`` (timm's, downloaded at first use), or the path of a timm state dict (.pth or
    .safetensors) that must hold all of the backbone. The heads are always random.

    Raises:
        UserError: unknown name, a backbone that timm cannot dilate to stride 8, or weights that
            are unavailable or do not fit.
    """
    head, backbone = parse_name(name)
    return SegmentationNetwork(head, backbone, num_classes, backbone_weights)
