"""Segmentation heads: PSP, ASPP and the auxiliary FCN head, as in mmsegmentation, CIRKD and
torchvision.

Attribute names follow mmsegmentation's state dict (``psp_modules.0.1.conv.weight``,
``conv_seg.bias``, ...), so that a published checkpoint is imported by renaming keys. All
convolutions except the 1x1 classifiers have no bias and are followed by batch norm and ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1
PROJECT_DROPOUT = 0.5
PSP_BINS = (1, 2, 3, 6)
ASPP_RATES = (12, 24, 36)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU. The map keeps its size.

    Initialised like mmcv's layer of that name (Kaiming normal, fan out).
    """

    def __init__(self, channels: int, width: int, kernel: int, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            channels, width, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, width, h, w) activation of an (N, channels, h, w) map."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BinPool(nn.Module):
    """Average pooling to ``bins`` x ``bins`` cells.

    PyTorch's adaptive pooling has no deterministic backward on CUDA and raises if deterministic
    algorithms are required, and ONNX has no such pooling. Only in these two cases the same averages
    are computed as two matrix products.
    """

    def __init__(self, bins: int):
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, C, bins, bins) averages of an (N, C, h, w) map."""
        deterministic = x.is_cuda and torch.are_deterministic_algorithms_enabled()
        if deterministic or torch.onnx.is_in_onnx_export():
            return self.deterministic(x)
        return F.adaptive_avg_pool2d(x, self.bins)

    def deterministic(self, x: Tensor) -> Tensor:
        """Return the same averages from matrix products, accumulated in float32."""
        with torch.autocast(x.device.type, enabled=False):
            rows = _averaging(self.bins, int(x.shape[-2]), x.device)
            columns = _averaging(self.bins, int(x.shape[-1]), x.device)
            return (rows @ x.float() @ columns.T).to(x.dtype)


def _averaging(bins: int, size: int, device: torch.device) -> Tensor:
    """Return the (bins, size) matrix that averages each adaptive-pooling cell of a line."""
    cell = torch.arange(bins, device=device)[:, None]
    position = torch.arange(size, device=device)
    start = cell * size // bins
    end = ((cell + 1) * size + bins - 1) // bins
    return ((position >= start) & (position < end)).float() / (end - start)


def _classifier(width: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(width, num_classes, 1)
    assert conv.bias is not None  # nn.Conv2d has one by default
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


class DecodeHead(nn.Module):
    """A head that returns the input of its classifier ``conv_seg``; the network calls that."""

    conv_seg: nn.Conv2d


class PSPHead(DecodeHead):
    """Pyramid pooling head (Zhao et al., CVPR 2017, arXiv:1612.01105).

    [map, bins 1, 2, 3, 6] -> 3x3 convolution -> dropout per channel -> ``conv_seg``.
    """

    dropout_kind: type[nn.Module] = nn.Dropout2d

    def __init__(self, channels: int, width: int, num_classes: int, align_corners: bool):
        super().__init__()
        self.align_corners = align_corners
        branch = self.branch_width(channels, width)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(BinPool(bins), ConvModule(channels, branch, 1)) for bins in PSP_BINS
        )
        self.bottleneck = ConvModule(channels + len(PSP_BINS) * branch, width, 3)
        self.dropout = self.dropout_kind(DROPOUT)
        self.conv_seg = _classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, width, h, w) input of the classifier, after its dropout."""
        pyramid = [
            F.interpolate(
                branch(x), x.shape[-2:], mode="bilinear", align_corners=self.align_corners
            )
            for branch in self.psp_modules
        ]
        return self.dropout(self.bottleneck(torch.cat([x, *pyramid], dim=1)))

    @staticmethod
    def branch_width(channels: int, width: int) -> int:
        """Return the channels of each bin's branch."""
        return width


class CirkdPSPHead(PSPHead):
    """CIRKD's form of the PSP head: branches of a quarter of the channels, dropout per element."""

    dropout_kind = nn.Dropout

    @staticmethod
    def branch_width(channels: int, width: int) -> int:
        """Return the channels of each bin's branch."""
        return channels // 4


class ASPPHead(DecodeHead):
    """Atrous spatial pyramid pooling head of DeepLabV3 (Chen et al. 2017, arXiv:1706.05587).

    [image average, 1x1, 3x3 at rates 12, 24, 36] -> 3x3 convolution -> dropout per channel ->
    ``conv_seg``. ``align_corners`` is an argument of all heads and changes nothing here, because
    the only map that is resized has one position.
    """

    def __init__(self, channels: int, width: int, num_classes: int, align_corners: bool):
        super().__init__()
        self.image_pool = nn.Sequential(BinPool(1), ConvModule(channels, width, 1))
        self.aspp_modules = nn.ModuleList(
            [
                ConvModule(channels, width, 1),
                *(ConvModule(channels, width, 3, dilation=rate) for rate in ASPP_RATES),
            ]
        )
        self.bottleneck = ConvModule((2 + len(ASPP_RATES)) * width, width, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = _classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, width, h, w) input of the classifier, after its dropout."""
        average = self.image_pool(x).expand(-1, -1, *x.shape[-2:])
        branches = [branch(x) for branch in self.aspp_modules]
        return self.dropout(self.bottleneck(torch.cat([average, *branches], dim=1)))


class ProjectedASPPHead(DecodeHead):
    """The ASPP head of CIRKD and torchvision: [1x1, 3x3 at rates 12, 24, 36, image average] ->
    1x1 convolution -> dropout per element -> 3x3 convolution -> dropout -> ``conv_seg``.

    Args:
        dropout: probability of the dropout before the classifier; torchvision has none there.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_classes: int,
        align_corners: bool,
        dropout: float = DROPOUT,
    ):
        super().__init__()
        self.image_pool = nn.Sequential(BinPool(1), ConvModule(channels, width, 1))
        self.aspp_modules = nn.ModuleList(
            [
                ConvModule(channels, width, 1),
                *(ConvModule(channels, width, 3, dilation=rate) for rate in ASPP_RATES),
            ]
        )
        self.project = ConvModule((2 + len(ASPP_RATES)) * width, width, 1)
        self.project_dropout = nn.Dropout(PROJECT_DROPOUT)
        self.bottleneck = ConvModule(width, width, 3)
        self.dropout = nn.Dropout(dropout)
        self.conv_seg = _classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the (N, width, h, w) input of the classifier, after its dropout."""
        average = self.image_pool(x).expand(-1, -1, *x.shape[-2:])
        branches = [branch(x) for branch in self.aspp_modules]
        projected = self.project_dropout(self.project(torch.cat([*branches, average], dim=1)))
        return self.dropout(self.bottleneck(projected))


class TorchvisionASPPHead(ProjectedASPPHead):
    """torchvision's form of the ASPP head, without dropout before the classifier."""

    def __init__(self, channels: int, width: int, num_classes: int, align_corners: bool):
        super().__init__(channels, width, num_classes, align_corners, dropout=0.0)


class FCNHead(nn.Module):
    """Auxiliary head: 3x3 convolution -> dropout -> ``conv_seg``.

    Args:
        per_channel: True for dropout of whole channels, as in mmsegmentation; False for elements.
    """

    def __init__(self, channels: int, width: int, num_classes: int, per_channel: bool = True):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(channels, width, 3))
        self.dropout = nn.Dropout2d(DROPOUT) if per_channel else nn.Dropout(DROPOUT)
        self.conv_seg = _classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the auxiliary logits (N, num_classes, h, w) of an (N, channels, h, w) map."""
        return self.conv_seg(self.dropout(self.convs(x)))
