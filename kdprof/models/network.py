"""A segmentation network: preprocessing, a timm backbone, heads, and the taps for methods."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdprof.errors import unknown
from kdprof.method import NETWORK_TAPS, Network, NetworkInfo, Taps
from kdprof.models.backbone import Backbone
from kdprof.models.heads import (
    ASPPHead,
    CirkdPSPHead,
    DecodeHead,
    FCNHead,
    ProjectedASPPHead,
    PSPHead,
    TorchvisionASPPHead,
)
from kdprof.models.names import NetworkName

HEADS: Mapping[tuple[str, str], type[DecodeHead]] = {
    ("mmseg", "pspnet"): PSPHead,
    ("mmseg", "deeplabv3"): ASPPHead,
    ("cirkd", "pspnet"): CirkdPSPHead,
    ("cirkd", "deeplabv3"): ProjectedASPPHead,
    ("torchvision", "deeplabv3"): TorchvisionASPPHead,
}


@dataclass(frozen=True)
class Preprocessing:
    """The normalisation of images before the backbone. It belongs to the weights.

    Attributes:
        mean, std: per channel in 0..255, in the order of the network's channels.
        bgr: whether that order is blue, green, red.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False

    def agrees(self, other: Preprocessing) -> bool:
        """Return whether both are the same, up to the rounding of what packages state."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return self.bgr == other.bgr and all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)

    def __str__(self) -> str:
        return f"mean {self.mean} and std {self.std}" + (" (BGR)" if self.bgr else "")


CIRKD_PREPROCESSING = Preprocessing((104.00698793, 116.66876762, 122.67891434), (1, 1, 1), bgr=True)
"""The preprocessing in CIRKD's code: Caffe's means, no division."""


def width_of(name: NetworkName, channels: int) -> int:
    """Return the width of the decode head: that in the name, or the default of the layout.

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
        name: the parts of its name.
        preprocessing: the normalisation of images, of the layout or of the backbone.
        info: name, classes, and the channels and stride of each tap.
        multiple: the sides of an image must be multiples of this number; 1 = every size.
        align_corners: bilinear mode of every resize of this network's maps; the task loss and the
            evaluation resize the logits with it.
    """

    heads = ("decode_head", "auxiliary_head")
    mean: Tensor
    std: Tensor

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
        """Return exactly the taps in ``taps`` (of :data:`kdprof.method.NETWORK_TAPS`).

        ``images`` are RGB, (N, 3, H, W), uint8 or float in 0..255. Each map is (N, C, h, w) with C
        and the stride as in :attr:`info`; logits are not resized. Heads and later stages of a
        ResNet that no tap needs are not computed (other backbones are run whole).

        Raises:
            ValueError: a tap does not exist.
        """
        for tap in taps:
            if tap not in NETWORK_TAPS:
                raise ValueError(unknown("tap", tap, NETWORK_TAPS))
        if self.preprocessing.bgr:
            images = images.flip(1)
        return self.read((images - self.mean) / self.std, taps)

    def read(self, normalised: Tensor, taps: Collection[str]) -> Taps:
        """Return the taps like :meth:`forward`, for images that are normalised already."""
        stages = {READ_BY.get(tap, tap) for tap in taps if tap != "classifier"}
        maps = self.backbone(normalised, stages)
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
        """Take the weights of a network of the same architecture that has only the first classes.

        The weights of the other classes are copied from its background, class 0, if it has one,
        because these classes were part of it until now. Otherwise they stay as they are.
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
        """Return in one line why this network cannot take such a batch; None if it can.

        ``batch`` is per device, ``crop`` is (H, W) in pixels. Both heads average the whole image to
        one position, where a batch of one has a single value per channel. Batch norm cannot train
        on that, whatever the size of the crop.
        """
        position = self.info.stride["head"]
        if training and min(crop) < position:
            return (
                f"a crop of {crop[0]}x{crop[1]} is smaller than one position of the head; "
                f"use at least {position}x{position}"
            )
        if any(side % self.multiple for side in crop):
            return (
                f"{self.info.name} takes images whose sides are multiples of "
                f"{self.multiple}, not {crop[0]}x{crop[1]}; use another size or network"
            )
        if training and batch == 1:
            return (
                f"{self.info.name} cannot train on batch 1: its pooling over the whole image "
                "leaves batch norm one value per channel; use at least 2 images per device"
            )
        return None
