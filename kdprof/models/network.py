"""A segmentation network: preprocessing, a timm backbone, a head, and the taps methods read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdprof.errors import unknown
from kdprof.method import NETWORK_TAPS, Network, NetworkInfo, Taps
from kdprof.models.backbone import Backbone
from kdprof.models.heads import (
    ASPPHead,
    CirkdPSPHead,
    FCNHead,
    ProjectedASPPHead,
    PSPHead,
    TorchvisionASPPHead,
)
from kdprof.models.names import NetworkName

HEADS = {
    ("mmseg", "pspnet"): PSPHead,
    ("mmseg", "deeplabv3"): ASPPHead,
    ("cirkd", "pspnet"): CirkdPSPHead,
    ("cirkd", "deeplabv3"): ProjectedASPPHead,
    ("torchvision", "deeplabv3"): TorchvisionASPPHead,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a network does to a picture first. It belongs to the weights.

    Attributes:
        mean, std: per channel in 0..255, in the network's own order.
        bgr: whether that order is blue, green, red.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False


CIRKD_PREPROCESSING = Preprocessing((104.00698793, 116.66876762, 122.67891434), (1, 1, 1), bgr=True)
"""CIRKD's data sets: Caffe's means, no division."""


def width_of(name: NetworkName, channels: int) -> int:
    """Return the width of the decode head: the name's, or the layout's own.

    mmsegmentation: 128 on a c5 of at most 512 channels, else 512. CIRKD as of 2025: 512 for
    DeepLabV3, 128 and 256 for PSPNet. torchvision: 256.
    """
    if name.width is not None:
        return name.width
    large = channels > 512
    if name.layout == "mmseg":
        return 512 if large else 128
    if name.layout == "torchvision":
        return 256
    return 512 if name.head == "deeplabv3" else 256 if large else 128


READ_BY = {"logits": "c5", "head": "c5", "aux": "c4"}
"""The backbone stage that each tap behind the backbone is computed from."""


class SegmentationNetwork(Network):
    """A backbone with a decode head on c5 and an auxiliary FCN head on c4.

    Attributes:
        name: its name.
        preprocessing: what pictures are normalised with: the layout's, or the backbone's.
        info: name, classes, and the channels and stride of each tap.
        multiple: of which the sides of a picture must be multiples; 1 = it takes every size.
        align_corners: bilinear mode of every resize of this network's maps; the task loss and the
            evaluation resize the logits with it.
    """

    def __init__(self, name: NetworkName, num_classes: int, backbone_weights: str = "none"):
        super().__init__()
        self.name, mmseg = name, name.layout == "mmseg"
        self.align_corners = name.aligned or name.layout == "cirkd"
        self.backbone = Backbone(name.backbone, backbone_weights, name.output_stride)
        self.multiple = self.backbone.multiple
        channels, stride = self.backbone.channels, self.backbone.stride
        width = width_of(name, channels["c5"])
        head = HEADS[name.layout, name.head]
        self.decode_head = head(channels["c5"], width, num_classes, self.align_corners)
        auxiliary = width_of(replace(name, width=None), channels["c5"]) // 2 if mmseg else None
        self.auxiliary_head = FCNHead(
            channels["c4"], auxiliary or channels["c4"] // 4, num_classes, per_channel=mmseg
        )
        own = Preprocessing(tuple(self.backbone.mean), tuple(self.backbone.std))
        self.preprocessing = CIRKD_PREPROCESSING if name.layout == "cirkd" else own
        for key in ("mean", "std"):
            values = torch.tensor(getattr(self.preprocessing, key), dtype=torch.float32)
            self.register_buffer(key, values.view(1, 3, 1, 1), persistent=False)
        self.info = NetworkInfo(
            name=str(name),
            num_classes=num_classes,
            channels={"logits": num_classes, "aux": num_classes, "head": width, **channels},
            stride={**{tap: stride[stage] for tap, stage in READ_BY.items()}, **stride},
        )

    def forward(self, images: Tensor, taps: Collection[str]) -> Taps:
        """Return exactly what ``taps`` names (of :data:`kdprof.method.NETWORK_TAPS`).

        ``images`` are RGB, (N, 3, H, W), uint8 or float in 0..255. Each map is (N, C, h, w) with C
        and the stride as in :attr:`info`; logits are not resized. No head, and no later stage of a
        ResNet, is computed that no tap reads (other backbones are run whole).

        Raises:
            ValueError: a tap that no network has.
        """
        for tap in taps:
            if tap not in NETWORK_TAPS:
                raise ValueError(unknown("tap", tap, NETWORK_TAPS))
        pictures = images.flip(1) if self.preprocessing.bgr else images
        return self.read((pictures - self.mean) / self.std, taps)

    def read(self, pictures: Tensor, taps: Collection[str]) -> Taps:
        """Return what :meth:`forward` does, of normalised pictures in the network's own order."""
        stages = {READ_BY.get(tap, tap) for tap in taps if tap != "classifier"}
        maps = self.backbone(pictures, stages)
        found = {tap: maps[tap] for tap in taps if tap in maps}
        if "aux" in taps:
            found["aux"] = self.auxiliary_head(maps["c4"])
        if "head" in taps or "logits" in taps:
            head = self.decode_head(maps["c5"])
            if "head" in taps:
                found["head"] = head
            if "logits" in taps:
                found["logits"] = self.decode_head.conv_seg(head)
        if "classifier" in taps:
            found["classifier"] = self.decode_head.conv_seg.weight
        return Taps(**found)

    @torch.no_grad()
    def inherit(self, smaller: SegmentationNetwork, *, background: bool) -> None:
        """Become a network of the same architecture that knows only this one's first classes.

        The classes it lacks start as its background, class 0, where it has one (they were part of
        it until now); else they stay as they are.
        """
        theirs = smaller.state_dict()
        for name, mine in self.state_dict().items():
            known = theirs[name]
            if known.shape == mine.shape:
                mine.copy_(known)
                continue
            mine[: len(known)] = known
            if background:
                mine[len(known) :] = known[:1]

    def check_input(self, batch: int, crop: tuple[int, int], training: bool) -> str | None:
        """Say in one line what keeps this network from taking such a batch; None if nothing does.

        ``batch`` is per device, ``crop`` is (H, W) in pixels. Both heads average the whole picture
        to one position, and batch norm cannot train on the single value per channel that a batch of
        one leaves there, however large the crop.
        """
        position = self.info.stride["head"]
        if min(crop) < position:
            return (
                f"a crop of {crop[0]}x{crop[1]} is smaller than one position of the head; "
                f"use at least {position}x{position}"
            )
        if any(side % self.multiple for side in crop):
            return (
                f"{self.info.name} takes pictures whose sides are multiples of "
                f"{self.multiple}, not {crop[0]}x{crop[1]}; take another size or network"
            )
        if training and batch == 1:
            return (
                f"{self.info.name} cannot train on batch 1: its pooling over the whole picture "
                "leaves batch norm one value per channel; use at least 2 pictures per device"
            )
        return None
