"""Backbones from timm: their four stages c2..c5, output stride and pretrained weights."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

from kdprof.errors import UserError, some, unknown
from kdprof.imports import quick_import
from kdprof.models.unwrapping import unwrapped
from kdprof.models.weight_files import open_weights

with quick_import():
    import timm
    from timm.models import FeatureInfo
    from timm.models.resnet import BasicBlock

Value = TypeVar("Value")
STAGES = ("c2", "c3", "c4", "c5")
OUTPUT_STRIDE = 8
"""Input pixels per position of c5, unless the network's name gives another stride."""
OUTPUT_STRIDES = (8, 16, 32)
_PROBES = ((136, 200), (128, 192))
"""Height and width of images with which a backbone's maps are inspected; the sides of the first are
no multiples of 16."""

FIX = "take another, such as resnet18c, resnet50c or mobilenetv2_100"

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18c": ("resnet18", {"stem_type": "deep", "stem_width": 32}),
    "resnet34c": ("resnet34", {"stem_type": "deep", "stem_width": 32}),
    "resnet18s": ("resnet18", {"stem_type": "deep", "stem_width": 64}),
    "resnet34s": ("resnet34", {"stem_type": "deep", "stem_width": 64}),
}
"""Backbones that timm can build but has no name for: kdprof's name -> timm's name and arguments. As
in timm's names of bottleneck networks, c is mmsegmentation's ResNetV1c and s is CIRKD's stem of
twice the width."""


OPENMMLAB = {
    "resnet18c": "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth",
}
"""ImageNet weights that timm lacks; mmsegmentation starts from them. Their digest is checked."""
_STEMS = {
    "stem.7.weight": (("stem.7.", "bn1."), ("stem.", "conv1.")),
    "conv3.weight": (
        ("conv1.", "conv1.0."),
        ("bn1.", "conv1.1."),
        ("conv2.", "conv1.3."),
        ("bn2.", "conv1.4."),
        ("conv3.", "conv1.6."),
        ("bn3.", "bn1."),
    ),
}
"""Names of deep stems in mmsegmentation's and CIRKD's ImageNet files: a key that only such a file
has -> the beginnings of its keys, and the same beginnings in timm."""
DILATED_TWICE = ("resnet18s", "resnet34s")
"""Backbones with basic blocks whose second 3x3 is dilated too, as in CIRKD and in timm itself."""


class Backbone(nn.Module):
    """A timm backbone that returns the maps of its last four stages.

    Attributes:
        channels: channels of each stage c2..c5.
        stride: input pixels per position of each stage c2..c5 (4, 8, 8, 8 for a ResNet at output
            stride 8).
        multiple: the sides of an image must be multiples of this number; 1 = every size.
        mean, std: normalisation of timm's weights, per RGB channel in 0..255.
        loaded: what was loaded from a file, in words; None without a file.
    """

    def __init__(self, name: str, weights: str = "none", output_stride: int = OUTPUT_STRIDE):
        super().__init__()
        self.net, arguments = _create(name, output_stride)
        self.loaded: str | None = None
        if weights == "imagenet":
            self.net = _create_pretrained(name, arguments)
        if name not in DILATED_TWICE:
            _undilate_second_convolutions(self.net)
        if weights not in ("none", "imagenet"):
            self.loaded = _load(self.net, name, weights)
        info, configuration = _feature_info(self.net), _pretrained_cfg(self.net)
        self.mean, self.std = (
            [255 * value for value in configuration[key]] for key in ("mean", "std")
        )
        self.channels = dict(zip(STAGES, info.channels(), strict=True))
        self.stride = dict(zip(STAGES, info.reduction(), strict=True))
        self.multiple, self._channels_last = 1, False
        if hasattr(self.net, "layer4"):
            layers = cast("dict[str, str]", self.net.return_layers)
            self._stage_of = dict(zip(layers, STAGES, strict=True))
        else:
            self._inspect_maps(name)

    def forward(self, x: Tensor, stages: Collection[str]) -> dict[str, Tensor]:
        """Return the maps of ``stages`` of normalised images, (N, 3, H, W).

        A ResNet is run no further than the deepest stage in ``stages``. Other backbones are run
        whole, because timm has no common way to stop them.
        """
        if not hasattr(self.net, "layer4"):
            maps = dict(zip(STAGES, self.net(x), strict=True))
            found = {stage: maps[stage] for stage in STAGES if stage in stages}
            if self._channels_last:
                return {stage: value.permute(0, 3, 1, 2) for stage, value in found.items()}
            return found
        maps = {}
        for name, module in self.net.named_children():
            if len(maps) == len(set(stages)):
                break
            x = module(x)
            if self._stage_of.get(name) in stages:
                maps[self._stage_of[name]] = x
        return maps

    @torch.no_grad()
    def _inspect_maps(self, name: str) -> None:
        """Set what timm does not say from the maps of one image, and check what it says.

        Raises:
            UserError: the backbone takes neither size of image, or the maps have other channels or
                strides than timm says.
        """
        training = self.net.training
        for size in _PROBES:
            try:
                maps = self.net.eval()(torch.zeros(1, 3, *size))
                break
            except Exception as error:  # by backbone: RuntimeError, AssertionError, ValueError
                self.multiple, refused = self.stride["c5"], error
        else:
            reason = " ".join(str(refused).split())[:120]
            raise UserError(f"backbone '{name}' takes images of some sizes only ({reason}); {FIX}")
        self.net.train(training)
        strides, widths = self.stride.values(), self.channels.values()
        shapes = [tuple(value.shape[1:]) for value in maps]
        self._channels_last = [shape[2] for shape in shapes] == list(widths)
        if self._channels_last:
            shapes = [(shape[2], *shape[:2]) for shape in shapes]
        for shape, width, stride in zip(shapes, widths, strides, strict=True):
            height, wide = (abs(size[i] - stride * shape[1 + i]) < stride for i in (0, 1))
            if shape[0] != width or not (height and wide):
                raise UserError(
                    f"backbone '{name}' gives a map of {shape} for an image of "
                    f"{size[0]}x{size[1]}, where timm says {width} channels at stride {stride}; "
                    f"{FIX}"
                )


def _feature_info(net: nn.Module) -> FeatureInfo:
    """Return what timm says about the maps of an extractor."""
    return cast("FeatureInfo", net.feature_info)


def _pretrained_cfg(net: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of an extractor's weights."""
    return cast("dict[str, Any]", net.pretrained_cfg)


def check_name(name: str) -> None:
    """Check that a backbone exists.

    Raises:
        UserError: it does not. The message names the nearest valid name.
    """
    names = _all_names()
    if name in names:
        return
    short = ["r18", "r50", "r101"]
    close = difflib.get_close_matches(name, [*short, *names], n=1, cutoff=0.5)
    if close:
        raise UserError(unknown("backbone", name, close))
    raise UserError(f"{unknown('backbone', name, short)}, or a name of timm.list_models()")


@functools.cache
def _all_names() -> tuple[str, ...]:
    return *OWN, *timm.list_models()


def _timm_net(name: str, **arguments: Any) -> nn.Module:
    timm_name, own = OWN.get(name, (name, {}))
    return timm.create_model(
        timm_name, features_only=True, out_indices=(-4, -3, -2, -1), **own, **arguments
    )


def _create(name: str, output_stride: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return the timm feature extractor with an output stride, and its constructor's arguments.

    Raises:
        UserError: timm cannot build the backbone at this stride. It names the possible stride.
    """
    found = _built(name, output_stride=output_stride) or _built(name)
    if found is None:
        raise UserError(f"timm cannot build backbone '{name}' as a feature extractor; {FIX}")
    if _pretrained_cfg(found[0]).get("fixed_input_size"):
        found = _built(name, strict_img_size=False)
    if found is None:
        raise UserError(f"backbone '{name}' takes images of one size only; {FIX}")
    ends = _feature_info(found[0]).reduction()[-1]
    if ends == output_stride:
        return found
    fix = f"append -os{ends} to the network's name, or {FIX}" if ends in OUTPUT_STRIDES else FIX
    raise UserError(
        f"timm cannot build backbone '{name}' at output stride {output_stride}: it ends at {ends}; "
        f"{fix}"
    )


def _built(name: str, **arguments: Any) -> tuple[nn.Module, dict[str, Any]] | None:
    """Return the extractor with its arguments; None if timm refuses these arguments."""
    try:
        return _timm_net(name, **arguments), arguments
    except IndexError as error:
        raise UserError(f"backbone '{name}' has fewer than four stages; {FIX}") from error
    except (TypeError, AssertionError, ValueError, RuntimeError):
        return None


def _create_pretrained(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Return the extractor with ImageNet weights, timm's or mmsegmentation's.

    The caller has already built the backbone with these arguments.
    """
    if name in OPENMMLAB:
        return _create_openmmlab(name, arguments)
    if name in OWN or not timm.is_model_pretrained(name):
        raise UserError(
            f"timm has no ImageNet weights for '{name}'; give a timm state dict "
            "(.pth or .safetensors) as backbone weights, or 'none'"
        )
    try:
        return _timm_net(name, pretrained=True, **arguments)
    except Exception as error:  # the hub's network errors share no narrower base class
        source = timm.get_pretrained_cfg(name)
        assert source is not None, "timm.is_model_pretrained has found it"
        place = f"huggingface.co/{source.hf_hub_id}" if source.hf_hub_id else source.url
        raise UserError(
            f"the ImageNet weights of '{name}' could not be downloaded "
            f"({type(error).__name__}); get the .safetensors or .pth file of {place} "
            "and give its path as backbone weights"
        ) from error


def _create_openmmlab(name: str, arguments: dict[str, Any]) -> nn.Module:
    url = OPENMMLAB[name]
    try:
        state = load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except Exception as error:  # the network's errors share no narrower base class
        raise UserError(
            f"the ImageNet weights of '{name}' could not be downloaded ({type(error).__name__}); "
            f"get the file {url} and give its path as backbone weights"
        ) from error
    net = _timm_net(name, **arguments)
    _fill(net, name, state.get("state_dict", state), Path(url).name)
    return net


def _undilate_second_convolutions(net: nn.Module) -> None:
    """Undo timm's dilation of the second 3x3 of basic blocks, which mmsegmentation never dilates.

    Without this a ResNet-18 loads mmsegmentation's weights without an error, but its maps are wrong
    by half.
    """
    for module in net.modules():
        if isinstance(module, BasicBlock):
            module.conv2.dilation = module.conv2.padding = (1, 1)


def _load(net: nn.Module, name: str, given: str) -> str:
    """Load a timm state dict into ``net``, strictly except for the classifier, which ``net`` lacks.
    Return in words what was loaded.

    Raises:
        UserError: the file is missing, cannot be read, or does not fit the backbone.
    """
    choices = "give 'none', 'imagenet' or the path of a .pth or .safetensors file"
    file, target = open_weights(given, choices=choices), net.state_dict().keys()

    def fits(keys: Collection[str]) -> float:
        found = {_extractor_key(key, target) for key in _in_timms_names(dict.fromkeys(keys))}
        return len(found & target) / len(target)

    taken = unwrapped(file, fits)
    _fill(net, name, taken.state, file.path)
    return ", ".join(filter(None, [f"{file.path}: {len(target)} entries loaded", taken.told()]))


def _fill(net: nn.Module, name: str, state: dict[str, Tensor], path: Path | str) -> None:
    target = net.state_dict()
    state = {_extractor_key(key, target): value for key, value in _in_timms_names(state).items()}
    problems = _differences(state, target, name)
    if problems:
        raise UserError(
            f"{path} does not fit backbone '{name}': {'; '.join(problems)}; give the timm state "
            "dict of this architecture"
        )
    net.load_state_dict({key: state[key] for key in target})


def _in_timms_names(state: dict[str, Value]) -> dict[str, Value]:
    """Return a backbone's state with the names of its stem as in timm."""
    for typical, beginnings in _STEMS.items():
        if typical in state:
            return {_begun_like(key, beginnings): value for key, value in state.items()}
    return state


def _begun_like(key: str, beginnings: Iterable[tuple[str, str]]) -> str:
    found = next(((old, new) for old, new in beginnings if key.startswith(old)), ("", ""))
    return found[1] + key.removeprefix(found[0])


def _extractor_key(key: str, target: Collection[str]) -> str:
    """Return the name of a key in timm's extractor: some have ``stages_0.x`` for ``stages.0.x``."""
    flat = key.replace(".", "_", 1)
    return flat if key not in target and flat in target else key


def _differences(state: dict[str, Tensor], target: dict[str, Tensor], name: str) -> list[str]:
    """Return how ``state`` differs from ``target``; it may have the classifier in addition."""
    timm_name, arguments = OWN.get(name, (name, {}))
    whole = timm.create_model(timm_name, **arguments).state_dict()
    found = {
        "missing": target.keys() - state.keys(),
        "unexpected": state.keys() - target.keys() - whole.keys(),
        "of another shape": [
            key for key in target.keys() & state.keys() if target[key].shape != state[key].shape
        ],
    }
    return [f"{what}: {some(keys)}" for what, keys in found.items() if keys]
