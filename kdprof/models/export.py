"""A trained network as a file for other programs: safetensors, mmsegmentation's names, ONNX."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from kdprof.errors import UserError
from kdprof.hardware.device import installed_version
from kdprof.models import AdaptedNetwork, AnyNetwork
from kdprof.models.backbone import OUTPUT_STRIDE
from kdprof.models.weights import DEEP, RESNETS
from kdprof.store import write_atomic

FORMATS = (".safetensors", ".pth", ".onnx")
ONNX_TOLERANCE = 1e-4
"""Allowed relative L2 between torch's logits and ONNX Runtime's. Rounding causes about 1e-6."""
MMSEG_BACKBONES = {resnet + stem for resnet in RESNETS.values() for stem in ("", DEEP["mmseg"])}
"""mmsegmentation's ResNet and ResNetV1c."""
_MMSEG = (
    (r"^backbone\.net\.conv1\.(\d)", r"backbone.stem.\1"),
    (r"^backbone\.net\.bn1\.", "backbone.stem.7."),
    (r"^backbone\.net\.", "backbone."),
)
_MMSEG_PLAIN = ((r"^backbone\.net\.", "backbone."),)
"""The same rules for a backbone without a deep stem."""


def export(
    network: AnyNetwork,
    path: Path,
    classes: Sequence[str],
    crop: tuple[int, int],
) -> str:
    """Write a network in the format of the path's suffix; return what was written, in words.

    Args:
        classes: names of the classes in order, which are written into the file.
        crop: height and width of the image with which an ONNX file is traced and checked.

    Raises:
        UserError: the suffix is unknown, the format does not exist for this network, or a package
            is missing.
    """
    network = network.eval().cpu()
    if path.suffix == ".safetensors":
        write_atomic(path, _safetensors(network, classes))
        return "safetensors, with the network's name and classes"
    if path.suffix == ".pth":
        write_atomic(path, _mmsegmentation(network, classes))
        return "mmsegmentation's names"
    if path.suffix == ".onnx":
        found = _onnx(network, path, crop)
        return f"ONNX, uint8 RGB in, logits at the image's size out; {found}"
    raise UserError(f"{path}: export writes {', '.join(FORMATS)}, not '{path.suffix}'")


def _state(network: AnyNetwork) -> dict[str, Tensor]:
    """Return a network's state; entries that share memory, such as tied weights, as copies, because
    safetensors has no shared ones."""
    module = network.module if isinstance(network, AdaptedNetwork) else network
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in module.state_dict().items():
        entry = value.detach().contiguous()
        place = entry.untyped_storage().data_ptr()
        found[key] = entry.clone() if place in seen else entry
        seen.add(place)
    return found


def _safetensors(network: AnyNetwork, classes: Sequence[str]) -> bytes:
    header = {
        "format": "pt",
        "network": network.info.name,
        "classes": "\n".join(classes),
        "preprocessing": json.dumps(vars(network.preprocessing)),
    }
    return safetensors_bytes(_state(network), header)


def _mmsegmentation(network: AnyNetwork, classes: Sequence[str]) -> bytes:
    """Return a checkpoint of mmsegmentation.

    Raises:
        UserError: mmsegmentation does not compute this network. Keys alone do not show that: a
            backbone of timm's may have a ResNet's keys and other convolutions.
    """
    if (
        isinstance(network, AdaptedNetwork)
        or network.name.layout != "mmseg"
        or network.name.backbone not in MMSEG_BACKBONES
    ):
        raise UserError(
            f"mmsegmentation has no {network.info.name} with these keys; export .safetensors "
            "instead"
        )
    if network.name.output_stride != OUTPUT_STRIDE:
        raise UserError(
            f"mmsegmentation's PSPNet and DeepLabV3 end at stride {OUTPUT_STRIDE}, not at "
            f"{network.name.output_stride} as {network.info.name}; export .safetensors instead"
        )
    deep = "backbone.net.conv1.0.weight" in network.state_dict()
    rules = _MMSEG if deep else _MMSEG_PLAIN
    state = {_renamed(key, rules): value for key, value in _state(network).items()}
    meta = {
        "CLASSES": tuple(classes),
        "dataset_meta": {"classes": tuple(classes)},
        "config": f"dict(align_corners={network.align_corners})",
    }
    file = io.BytesIO()
    torch.save({"meta": meta, "state_dict": state}, file)
    return file.getvalue()


def _renamed(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        key, count = re.subn(pattern, replacement, key)
        if count:
            break
    return key


class _WholeImage(nn.Module):
    """A network that maps (N, 3, H, W) uint8 RGB to logits (N, C, H, W)."""

    def __init__(self, network: AnyNetwork):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images.float(), ["logits"]).logits
        align = self.network.align_corners
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=align)


def _onnx(network: AnyNetwork, path: Path, crop: tuple[int, int]) -> str:
    """Write an ONNX file, run it and the network on one image, and return how much they differ.

    Raises:
        UserError: onnx or onnxruntime is not installed, or the two differ.
    """
    missing = [name for name in ("onnx", "onnxruntime") if installed_version(name) == "none"]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}; pip install 'kdprof[onnx]'")
    import onnxruntime

    whole, file = _WholeImage(network).eval(), io.BytesIO()
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, *crop), generator=draw).to(torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole,
            (images,),
            file,  # type: ignore[arg-type]  # the exporter without dynamo writes to a buffer too
            input_names=["images"],
            output_names=["logits"],
            dynamo=False,  # one file, of any size
            opset_version=17,
        )
    content = file.getvalue()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = whole(images)
    apart = float((torch.from_numpy(found) - expected).norm() / expected.norm())
    if not apart <= ONNX_TOLERANCE:
        raise UserError(
            f"ONNX Runtime does not compute the same as torch (relative L2 {apart:.1g}); the file "
            "was not written"
        )
    write_atomic(path, content)
    return f"for {crop[0]}x{crop[1]}, relative L2 {apart:.1g} from torch in ONNX Runtime"
