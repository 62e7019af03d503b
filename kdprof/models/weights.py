"""The weights of segmentation networks in the names of several projects, as kdprof's.

The content of a file shows whose names it has, and no key is ignored silently.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdprof.errors import Problems, UserError, shortened, some
from kdprof.models.adapted import IMAGENET, AdaptedNetwork, is_adapted
from kdprof.models.names import LAYOUTS, NetworkName, parse_name
from kdprof.models.network import Preprocessing, SegmentationNetwork, width_of
from kdprof.models.unwrapping import unwrapped
from kdprof.models.weight_files import WeightFile

OURS, MMSEG, CIRKD, TORCHVISION, TIMM = "kdprof", "mmsegmentation", "CIRKD", "torchvision", "timm"
ADAPTED = "the network's own"
"""The source of an adapted network's file: its keys are the network's own names."""
AUXILIARY = "auxiliary_head."
RESNETS = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}
"""Blocks per stage and whether they are bottlenecks -> the ResNet with a plain stem."""
DEEP = {"mmseg": "c", "cirkd": "s"}
"""What is appended to its name for the deep stem of a layout."""

_MMSEG = (
    (r"^backbone\.stem\.7\.", "backbone.net.bn1."),
    (r"^backbone\.stem\.", "backbone.net.conv1."),
    (r"^backbone\.(conv1|bn1|layer\d)\.", r"backbone.net.\1."),
)
_CIRKD = (
    (r"^pretrained\.conv1\.", "backbone.net.conv1.0."),
    (r"^pretrained\.bn1\.", "backbone.net.conv1.1."),
    (r"^pretrained\.conv2\.", "backbone.net.conv1.3."),
    (r"^pretrained\.bn2\.", "backbone.net.conv1.4."),
    (r"^pretrained\.conv3\.", "backbone.net.conv1.6."),
    (r"^pretrained\.bn3\.", "backbone.net.bn1."),
    (r"^pretrained\.", "backbone.net."),
    (r"^head\.psp\.conv1\.", "decode_head.psp_modules.0.1."),
    (r"^head\.psp\.conv2\.", "decode_head.psp_modules.1.1."),
    (r"^head\.psp\.conv3\.", "decode_head.psp_modules.2.1."),
    (r"^head\.psp\.conv4\.", "decode_head.psp_modules.3.1."),
    (r"^head\.aspp\.b0\.", "decode_head.aspp_modules.0."),
    (r"^head\.aspp\.b([123])\.block\.", r"decode_head.aspp_modules.\1."),
    (r"^head\.aspp\.b4\.gap\.1\.", "decode_head.image_pool.1.0."),
    (r"^head\.aspp\.b4\.gap\.2\.", "decode_head.image_pool.1.1."),
    (r"^head\.aspp\.project\.", "decode_head.project."),
    (r"^head\.classifier\.", "decode_head.conv_seg."),
    (r"^head\.block\.4\.", "decode_head.conv_seg."),
    (r"^head\.block\.", "decode_head.bottleneck."),
    (r"^auxlayer\.block\.4\.", f"{AUXILIARY}conv_seg."),
    (r"^auxlayer\.block\.", f"{AUXILIARY}convs.0."),
)
_TORCHVISION = (
    (r"^backbone\.", "backbone.net."),
    (r"^classifier\.0\.convs\.4\.1\.", "decode_head.image_pool.1.0."),
    (r"^classifier\.0\.convs\.4\.2\.", "decode_head.image_pool.1.1."),
    (r"^classifier\.0\.convs\.", "decode_head.aspp_modules."),
    (r"^classifier\.0\.project\.", "decode_head.project."),
    (r"^classifier\.4\.", "decode_head.conv_seg."),
    (r"^classifier\.1\.", "decode_head.bottleneck.0."),
    (r"^classifier\.2\.", "decode_head.bottleneck.1."),
    (r"^aux_classifier\.4\.", f"{AUXILIARY}conv_seg."),
    (r"^aux_classifier\.", f"{AUXILIARY}convs.0."),
)
_PAIRS = (
    (r"^(decode_head\.(?:psp_modules\.\d\.1|image_pool\.1|aspp_modules\.\d|project|bottleneck)|"
     r"auxiliary_head\.convs\.0)\.0\.", r"\1.conv."),
    (r"^(decode_head\.(?:psp_modules\.\d\.1|image_pool\.1|aspp_modules\.\d|project|bottleneck)|"
     r"auxiliary_head\.convs\.0)\.1\.", r"\1.bn."),
)  # fmt: skip
"""CIRKD and torchvision number a convolution and its batch norm, kdprof names them."""
_RULES = {
    OURS: (),
    MMSEG: _MMSEG,
    CIRKD: _CIRKD + _PAIRS,
    TORCHVISION: _TORCHVISION + _PAIRS,
}
_TOLD_BY = (
    "decode_head.psp_modules.0.1.conv.weight",
    "decode_head.aspp_modules.0.conv.weight",
)
"""The first branch of a pspnet's and of a deeplabv3's head."""
_LAYOUT_OF = {MMSEG: "mmseg", CIRKD: "cirkd", TORCHVISION: "torchvision"}


@dataclass(frozen=True)
class Weights:
    """The weights in a file, with the keys of :class:`SegmentationNetwork`'s state; for an adapted
    network, with the keys of its module's state.

    Attributes:
        source: the project whose keys the file has.
        renamed: the file's key for each key of ``state``.
        name: the network; None if the file does not say (a checkpoint of kdprof's own).
        classes: names in the file's order; None if the file does not say.
        taken: what of the file was taken, in words; empty if that is all of it.
    """

    path: Path
    source: str
    state: dict[str, Tensor]
    renamed: dict[str, str]
    name: NetworkName | None
    classes: tuple[str, ...] | None
    taken: str = ""

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the decode head; None for an adapted network."""
        return None if self.source == ADAPTED else len(self.state["decode_head.conv_seg.weight"])

    @property
    def has_auxiliary(self) -> bool:
        """Whether the file has the auxiliary head; True for an adapted network."""
        return self.source == ADAPTED or any(key.startswith(AUXILIARY) for key in self.state)

    def told(self) -> str:
        """Return in words whose names the file has and what of it was taken."""
        return ", ".join(filter(None, [f"{self.source} names", self.taken]))


@dataclass(frozen=True)
class Loaded:
    """The result of loading a file, key by key.

    Attributes:
        matched: keys of the network that were set.
        missing: keys of the network that the file lacks; only of an auxiliary head.
        left: keys of the file that the network lacks; only of an auxiliary head.
        converted: how many values were converted, by type, with whether that is exact.
    """

    matched: list[str]
    missing: list[str]
    left: list[str]
    converted: Mapping[str, int]

    def summary(self) -> str:
        """Return the result in one line."""
        line = f"{len(self.matched)} entries loaded"
        line += "".join(f", {count} of them from {kind}" for kind, count in self.converted.items())
        if self.missing:
            line += f", the auxiliary head is not in the file ({len(self.missing)} stay random)"
        if self.left:
            line += f", the file's auxiliary head is left out ({len(self.left)})"
        return line


def read_weights(file: WeightFile, network: AdaptedNetwork | None = None) -> Weights:
    """Return the weights of a segmentation network in a file.

    These are known, however they are wrapped (see :mod:`kdprof.models.unwrapping`):
    mmsegmentation's checkpoints, CIRKD's, those of torchvision's ``deeplabv3_resnet50/101``, and
    kdprof's own checkpoints and exports.

    Args:
        network: the one that they are for, if it is an adapted one: its keys are never renamed.

    Raises:
        UserError: the file holds no such weights, or unusable ones, or an adapted network's that
            were trained on images of another normalisation.
    """
    classes = _classes_of(file)
    if network is not None:
        _check_preprocessing(file, network)
        return _of_adapted(file, network.module, classes)
    taken = unwrapped(file, lambda keys: _source_of(keys) is not None)
    source = _source_of(taken.state)
    if source is None:
        raise UserError(_unknown(file.path, taken.state))
    renamed = _renamed(taken.state, source, file.path)
    ours = {key: taken.state[theirs] for key, theirs in renamed.items()}
    _check_classifier(file.path, source, ours)
    named = file.header.get("network")
    name = _named(file.path, named) if named else _name_of(ours, source, file)
    return Weights(file.path, source, ours, renamed, name, classes, taken.told())


def _of_adapted(file: WeightFile, module: nn.Module, classes: tuple[str, ...] | None) -> Weights:
    wanted = module.state_dict().keys()
    masks = {key for key, _ in module.named_buffers() if not key.endswith(("_mean", "_var"))}

    def fits(keys: Collection[str]) -> float:
        return len(wanted & set(keys)) / len(wanted | set(keys))

    taken = unwrapped(file, fits, masks)
    same = {key: key for key in taken.state}
    return Weights(file.path, ADAPTED, taken.state, same, None, classes, taken.told())


def _check_preprocessing(file: WeightFile, network: AdaptedNetwork) -> None:
    """Refuse weights for images of another normalisation than a network's. A file that does not
    state it is taken, unless kdprof may have normalised otherwise when it wrote the file."""
    name, own, stated = network.info.name, network.preprocessing, _preprocessing_of(file)
    mend = "use a network of your own with the mean and std it was trained with (docs/own-model.md)"
    if stated is not None and not stated.agrees(own):
        raise UserError(
            f"{file.path} was trained on images normalised with {stated}, {name} normalises them "
            f"with {own}; {mend}"
        )
    timms = name.startswith("smp-") and "-tu-" in name and not own.agrees(IMAGENET)
    if stated is None and timms and ("network" in file.header or _is_checkpoint(file)):
        raise UserError(
            f"{file.path} does not say how its images were normalised, and earlier versions of "
            f"kdprof normalised those of {name} with {IMAGENET}, not with {own}; train it again, "
            f"or {mend}"
        )


def _preprocessing_of(file: WeightFile) -> Preprocessing | None:
    """Return the normalisation of images that an export or a checkpoint of kdprof states.

    Raises:
        UserError: what stands in its place is none.
    """
    stated = file.header.get("preprocessing")
    if stated is None and _is_checkpoint(file):
        stated = file.content.get("preprocessing")
    if stated is None:
        return None
    try:
        told = json.loads(stated) if isinstance(stated, str) else stated
        mean, std = (tuple(map(float, told[key])) for key in ("mean", "std"))
        if len(mean) == len(std) == 3:
            return Preprocessing(mean, std, bool(told["bgr"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # refused below
    raise UserError(
        f"{file.path}: its 'preprocessing' is {some([repr(stated)])}, no mean and std; export it "
        "again, or save it without this entry"
    )


def _is_checkpoint(file: WeightFile) -> bool:
    """Return whether a file is a checkpoint of kdprof's own."""
    step = file.content.get("step")
    return isinstance(step, Mapping) and "student" in step


def _check_classifier(path: Path, source: str, state: Mapping[str, Tensor]) -> None:
    """Refuse weights without the layers by which a network is told, or with odd ones."""
    heads = [key for key in _TOLD_BY if key in state]
    layers = ("decode_head.conv_seg.weight", "decode_head.bottleneck.conv.weight", *heads[:1])
    if heads and all(key in state and state[key].ndim == 4 for key in layers):
        return
    raise UserError(
        f"{path} has {source}'s keys, but no classifier of a pspnet or deeplabv3 head; its keys "
        f"are like {some(state)}"
    )


def _named(path: Path, name: str) -> NetworkName:
    """Return the network that a file's header names."""
    try:
        return parse_name(shortened(name))
    except UserError as error:
        raise UserError(f"{path}: its header: {error}") from None


def check_weights(weights: Weights, wanted: str, classes: tuple[str, ...]) -> NetworkName | str:
    """Return the full name of the network in a file, if it is the wanted one.

    The architecture of an adapted network is checked only by :func:`load_weights`.

    Args:
        wanted: a network's name; if it has no layout, the file's layout and width are used.
        classes: the classes of the data, in order.

    Raises:
        UserError: the file holds another network, another number of classes, or another order of
            the classes.
    """
    problems = _class_problems(weights, classes)
    if is_adapted(wanted):
        if problems:
            raise UserError(*problems)
        return wanted
    asked = parse_name(wanted)
    found = weights.name or asked
    stated = weights.source == OURS
    if not _agrees(asked, found, wanted) or (stated and not _as_stated(asked, found)):
        problems.append(
            f"{weights.path} holds {weights.source}'s {_short(found)}, not {wanted}; "
            f"use {_short(found)}"
        )
    if problems:
        raise UserError(*problems)
    # Only the header of an export of kdprof's states these two for certain.
    aligned = asked.aligned or found.aligned
    return replace(found, aligned=aligned, output_stride=asked.output_stride)


def _class_problems(weights: Weights, classes: tuple[str, ...]) -> list[str]:
    fix = "use weights that were trained on it"
    count = weights.num_classes or len(weights.classes or classes)
    if count != len(classes):
        return [f"{weights.path} has {count} classes, the data has {len(classes)}; {fix}"]
    if weights.classes is None or _plain(weights.classes) == _plain(classes):
        return []
    if (named := len(weights.classes)) != count:
        return [
            f"{weights.path} names {named} classes and has {count}; correct its CLASSES or leave "
            "them out"
        ]
    pairs = enumerate(zip(weights.classes, classes, strict=True))
    index, (theirs, ours) = next(p for p in pairs if _plain(p[1][:1]) != _plain(p[1][1:]))
    return [
        f"{weights.path} has its classes in another order: class {index} is "
        f"'{shortened(theirs)}' there, '{ours}' in the data; {fix}"
    ]


def misfits(network: SegmentationNetwork | AdaptedNetwork, weights: Weights) -> list[str]:
    """Return why weights do not fit a network, which may be without values: every entry that is
    missing, unexpected, of another shape or of another type, in one line. An auxiliary head may be
    missing or left out."""
    target, state, of_head = _state_of(network), weights.state, _optional(network)
    matched = target.keys() & state.keys()
    problems = {
        "missing": [k for k in target.keys() - state.keys() if not k.startswith(of_head)],
        "unexpected": [
            weights.renamed[k] for k in state.keys() - target.keys() if not k.startswith(of_head)
        ],
        "of another shape": [
            f"{weights.renamed[k]} {tuple(state[k].shape)} for {tuple(target[k].shape)}"
            for k in matched
            if target[k].shape != state[k].shape
        ],
        "of another type": [
            f"{weights.renamed[k]} {_type(state[k])} for {_type(target[k])}"
            for k in matched
            if not _converts(state[k], target[k].dtype)
        ],
        "out of the range of its type": [
            f"{weights.renamed[k]} {_type(state[k])} for {_type(target[k])}"
            for k in matched
            if state[k].is_floating_point() and not _in_range(state[k], target[k].dtype)
        ],
    }
    listed = [f"{what}: {some(keys)}" for what, keys in problems.items() if keys]
    if not listed:
        return []
    return [f"{weights.path} does not fit {network.info.name}: {'; '.join(listed)}"]


def load_weights(network: SegmentationNetwork | AdaptedNetwork, weights: Weights) -> Loaded:
    """Set a network's state from a file, strictly except for an auxiliary head.

    Raises:
        UserError: the weights do not fit, see :func:`misfits`.
    """
    Problems(misfits(network, weights)).refuse()
    target, state = _state_of(network), weights.state
    matched = sorted(target.keys() & state.keys())
    module = network.module if isinstance(network, AdaptedNetwork) else network
    module.load_state_dict({**target, **{key: state[key] for key in matched}})
    return Loaded(
        matched,
        missing=sorted(target.keys() - state.keys()),
        left=sorted(state.keys() - target.keys()),
        converted=Counter(
            f"{_type(state[key])} ({'exact' if state[key].element_size() < 8 else 'rounded'})"
            for key in matched
            if state[key].is_floating_point() and state[key].dtype != target[key].dtype
        ),
    )


def _state_of(network: SegmentationNetwork | AdaptedNetwork) -> dict[str, Tensor]:
    return (network.module if isinstance(network, AdaptedNetwork) else network).state_dict()


def _optional(network: SegmentationNetwork | AdaptedNetwork) -> tuple[str, ...]:
    """Return the beginnings of keys that a file may lack or have in addition."""
    return () if isinstance(network, AdaptedNetwork) else (AUXILIARY,)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _converts(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor may be converted: between floating-point types, or to integers or
    booleans without loss, as averaging leaves counts of batches as float32."""
    if tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point):
        return True
    return not dtype.is_floating_point and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _in_range(tensor: Tensor, dtype: torch.dtype) -> bool:
    if tensor.element_size() <= dtype.itemsize or not dtype.is_floating_point:
        return True
    return torch.equal(tensor.to(dtype).isfinite(), tensor.isfinite())


# The content of a file


def _source_of(keys: Collection[str]) -> str | None:
    """Return the project whose names keys have; None if kdprof does not know it."""
    starts = {
        OURS: ("backbone.net.",),
        CIRKD: ("pretrained.", "head."),
        TORCHVISION: ("backbone.conv1", "classifier.0."),
        MMSEG: ("backbone.", "decode_head."),
    }
    for source, needed in starts.items():
        if all(any(key.startswith(start) for key in keys) for start in needed):
            return source
    return None


def _unknown(path: Path, keys: Collection[str]) -> str:
    if any(re.match(r"(conv1|layer1|stem|blocks|stages|conv_stem)[._]", key) for key in keys):
        return (
            f"{path} holds only a backbone ({TIMM}'s names); give it as "
            "--student-backbone-weights, or as teacher_backbone_weights in the study"
        )
    return (
        f"{path} has no segmentation network that kdprof knows ({MMSEG}, {CIRKD}, {TORCHVISION} "
        f"or its own); its keys are like {some(keys)}"
    )


def _renamed(state: Mapping[str, Tensor], source: str, path: Path) -> dict[str, str]:
    """Return the file's key for each key of kdprof."""
    found: dict[str, str] = {}
    for theirs in state:
        key = theirs
        for pattern, replacement in _RULES[source]:
            key = re.sub(pattern, replacement, key)
        if key in found:
            both = f"'{shortened(found[key])}' and '{shortened(theirs)}'"
            raise UserError(f"{path}: {both} are one entry; remove one")
        found[key] = theirs
    return found


def _name_of(state: Mapping[str, Tensor], source: str, file: WeightFile) -> NetworkName | None:
    """Return the network that a state belongs to, from its keys and shapes."""
    if source == OURS:
        return None
    layout = _LAYOUT_OF[source]
    head = "pspnet" if _TOLD_BY[0] in state else "deeplabv3"
    aligned = layout == "mmseg" and _says_aligned(file.content)
    name = NetworkName(head, _resnet(state, layout), layout, aligned=aligned)
    width = len(state["decode_head.bottleneck.conv.weight"])
    channels = next(state[key].shape[1] for key in _TOLD_BY if key in state)
    return name if width == width_of(name, channels) else replace(name, width=width)


def _resnet(state: Mapping[str, Tensor], layout: str) -> str:
    places = {m.groups() for key in state if (m := re.search(r"\.net\.layer(\d)\.(\d+)\.", key))}
    blocks = [sum(stage == str(number) for stage, _ in places) for number in (1, 2, 3, 4)]
    bottleneck = "backbone.net.layer1.0.conv3.weight" in state
    known = RESNETS.get((*blocks, bottleneck))
    if known is None:
        return f"resnet with {blocks} blocks"
    return known + (DEEP.get(layout, "") if "backbone.net.conv1.0.weight" in state else "")


def _says_aligned(content: Mapping[str, Any]) -> bool:
    """Return align_corners in the configuration inside mmsegmentation's file."""
    meta = content.get("meta")
    config = meta.get("config", meta.get("cfg", "")) if isinstance(meta, Mapping) else ""
    return re.search(r"align_corners['\"]?\s*[=:]\s*True", str(config)) is not None


def _classes_of(file: WeightFile) -> tuple[str, ...] | None:
    """Return the names of the classes that a file states.

    Raises:
        UserError: what stands in their place is no list of names.
    """
    if "classes" in file.header:
        return tuple(file.header["classes"].split("\n"))
    meta = file.content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    described = meta.get("dataset_meta")
    key, classes = "meta.CLASSES", meta.get("CLASSES")
    if isinstance(described, Mapping) and "classes" in described:
        key, classes = "meta.dataset_meta.classes", described["classes"]
    if classes is None:
        return None
    if isinstance(classes, list | tuple) and classes and all(isinstance(c, str) for c in classes):
        return tuple(classes)
    raise UserError(
        f"{file.path}: {key} is {some([repr(classes)])}, no list of names; save the file with the "
        "names, or without this entry"
    )


def _agrees(asked: NetworkName, found: NetworkName, wanted: str) -> bool:
    """Return whether a file's network is the one asked for. A short name fits any layout."""
    if asked.head != found.head or (asked.width and asked.width != found.width):
        return False
    if asked.layout == found.layout:
        return asked.backbone == found.backbone
    by_layout = {wanted.partition("-")[0]} & set(LAYOUTS)
    short = wanted.split("-")[1]
    return not by_layout and LAYOUTS[found.layout].get(short) == found.backbone


def _as_stated(asked: NetworkName, found: NetworkName) -> bool:
    """Return whether a network has the output stride that a file states, and no other resizes."""
    return asked.output_stride == found.output_stride and asked.aligned <= found.aligned


def _short(name: NetworkName) -> str:
    shorts = {full: short for short, full in LAYOUTS[name.layout].items()}
    return str(replace(name, backbone=shorts.get(name.backbone, name.backbone)))


def _plain(classes: Iterable[str]) -> list[str]:
    """Return names without what is written in several ways: capitals, spaces, hyphens."""
    return ["".join(filter(str.isalnum, name.casefold())) or name for name in classes]
