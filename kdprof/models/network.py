"""A segmentation network: preprocessing, a timm backbone, a head, and the taps methods read."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from kdprof.errors import unknown
from kdprof.method import NETWORK_TAPS, NetworkInfo, Taps
from kdprof.models.backbone import OUTPUT_STRIDE, Backbone
from kdprof.models.heads import ASPPHead, FCNHead, PSPHead

HEADS = {"pspnet": PSPHead, "deeplabv3": ASPPHead}
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Of ImageNet, per RGB channel in 0..255, as mmsegmentation and timm have them."""

READ_BY = {"logits": "c5", "head": "c5", "aux": "c4"}
"""The backbone stage that each tap behind the backbone is computed from."""


class SegmentationNetwork(nn.Module):
    """A backbone with a decode head on c5 and an auxiliary FCN head on c4.

    The head is 512 channels wide and the auxiliary head 256, or 128 and 64 on a backbone whose c5
    has at most 512 channels (mmsegmentation's R101 and R18 configurations).

    Attributes:
        info: name, classes, and the channels and stride of each tap.
        align_corners: bilinear mode of every resize of this network's maps; the task loss and the
            evaluation resize the logits with it.
    """

    align_corners = False

    def __init__(self, head: str, backbone: str, num_classes: int, backbone_weights: str = "none"):
        super().__init__()
        self.backbone = Backbone(backbone, backbone_weights)
        channels, stride = self.backbone.channels, self.backbone.stride
        width = 512 if channels["c5"] > 512 else 128
        self.decode_head = HEADS[head](channels["c5"], width, num_classes, self.align_corners)
        self.auxiliary_head = FCNHead(channels["c4"], width // 2, num_classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.info = NetworkInfo(
            name=f"{head}-{backbone}",
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
        stages = {READ_BY.get(tap, tap) for tap in taps if tap != "classifier"}
        maps = self.backbone((images - self.mean) / self.std, stages)
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
        if min(crop) < OUTPUT_STRIDE:
            return (
                f"a crop of {crop[0]}x{crop[1]} is smaller than one position of the head; "
                f"use at least {OUTPUT_STRIDE}x{OUTPUT_STRIDE}"
            )
        if training and batch == 1:
            return (
                f"{self.info.name} cannot train on batch 1: its pooling over the whole picture "
                "leaves batch norm one value per channel; use at least 2 pictures per device"
            )
        return None
