"""Files of weights. The content of a file shows what it is, and no key is ignored silently.

No code in a file is run: a pickle with anything except tensors and plain values is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdprof.errors import UserError
from kdprof.models.adapted import AdaptedNetwork, is_adapted
from kdprof.models.names import LAYOUTS, NetworkName, parse_name
from kdprof.models.network import SegmentationNetwork, width_of

OURS, MMSEG, CIRKD, TORCHVISION, TIMM = "kdprof", "mmsegmentation", "CIRKD", "torchvision", "timm"
ADAPTED = "the network's own"
"""The source of an adapted network's file: its keys are the network's own names."""
AUXILIARY = "auxiliary_head."
BLOCKS = {
    (2, 2, 2, 2, False): "r18",
    (3, 4, 6, 3, False): "r34",
    (3, 4, 6, 3, True): "r50",
    (3, 4, 23, 3, True): "r101",
}
"""Blocks per stage and whether they are bottlenecks -> the short name of the ResNet."""

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
    """

    path: Path
    source: str
    state: dict[str, Tensor]
    renamed: dict[str, str]
    name: NetworkName | None
    classes: tuple[str, ...] | None

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the decode head; None for an adapted network."""
        return None if self.source == ADAPTED else len(self.state["decode_head.conv_seg.weight"])

    @property
    def has_auxiliary(self) -> bool:
        """Whether the file has the auxiliary head; True for an adapted network."""
        return self.source == ADAPTED or any(key.startswith(AUXILIARY) for key in self.state)


@dataclass(frozen=True)
class Loaded:
    """The result of loading a file, key by key.

    Attributes:
        matched: keys of the network that were set.
        missing: keys of the network that the file lacks; only of an auxiliary head.
        left: keys of the file that the network lacks; only of an auxiliary head.
    """

    matched: list[str]
    missing: list[str]
    left: list[str]

    def summary(self) -> str:
        """Return the result in one line."""
        line = f"{len(self.matched)} entries loaded"
        if self.missing:
            line += f", the auxiliary head is not in the file ({len(self.missing)} stay random)"
        if self.left:
            line += f", the file's auxiliary head is left out ({len(self.left)})"
        return line


def read_weights(path: Path, *, adapted: bool = False) -> Weights:
    """Read a file of a segmentation network's weights.

    Args:
        adapted: whether they are for an :class:`AdaptedNetwork`, whose keys are never renamed.

    These files can be read, as torch writes them or as safetensors: mmsegmentation's checkpoints
    (``state_dict`` and ``meta``), CIRKD's bare state dicts, those of torchvision's
    ``deeplabv3_resnet50/101``, and kdprof's own checkpoints and exports.

    Raises:
        UserError: the file does not exist, is damaged, holds anything except tensors and plain
            values, or is none of these.
    """
    content, header = _content(path)
    state, classes = _state_of(content, path), _classes_of(content, header)
    if adapted:
        return Weights(path, ADAPTED, state, {key: key for key in state}, None, classes)
    source = _source_of(state, path)
    renamed = _renamed(state, source, path)
    ours = {key: state[theirs] for key, theirs in renamed.items()}
    if "decode_head.conv_seg.weight" not in ours:
        raise UserError(
            f"{path} has {source}'s keys, but no classifier of a pspnet or deeplabv3 head; its "
            f"keys are like {_some(state)}"
        )
    named = header.get("network")
    name = parse_name(named) if named else _name_of(ours, source, content)
    return Weights(path, source, ours, renamed, name, classes)


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
    if not _agrees(asked, found, wanted):
        problems.append(
            f"{weights.path} holds {weights.source}'s {_short(found)}, not {wanted}; "
            f"use {_short(found)}"
        )
    if problems:
        raise UserError(*problems)
    # No file states these two for certain.
    aligned = asked.aligned or found.aligned
    return replace(found, aligned=aligned, output_stride=asked.output_stride)


def _class_problems(weights: Weights, classes: tuple[str, ...]) -> list[str]:
    fix = "use weights that were trained on it"
    count = weights.num_classes or len(weights.classes or classes)
    if count != len(classes):
        return [f"{weights.path} has {count} classes, the data has {len(classes)}; {fix}"]
    if weights.classes is None or _plain(weights.classes) == _plain(classes):
        return []
    pairs = enumerate(zip(weights.classes, classes, strict=True))
    index, (theirs, ours) = next(p for p in pairs if _plain(p[1][:1]) != _plain(p[1][1:]))
    return [
        f"{weights.path} has its classes in another order: class {index} is '{theirs}' there, "
        f"'{ours}' in the data; {fix}"
    ]


def load_weights(network: SegmentationNetwork | AdaptedNetwork, weights: Weights) -> Loaded:
    """Set a network's state from a file, strictly except for an auxiliary head.

    Raises:
        UserError: an entry of the network is missing in the file, the file has an entry that the
            network lacks, or shapes differ. It names every problem.
    """
    module = network.module if isinstance(network, AdaptedNetwork) else network
    target, state = module.state_dict(), weights.state
    missing = sorted(target.keys() - state.keys())
    left = sorted(state.keys() - target.keys())
    matched = sorted(target.keys() & state.keys())
    optional = () if module is not network else (AUXILIARY,)
    problems = {
        "missing": [key for key in missing if not key.startswith(optional)],
        "unexpected": [weights.renamed[k] for k in left if not k.startswith(optional)],
        "of another shape": [
            f"{weights.renamed[k]} {tuple(state[k].shape)} for {tuple(target[k].shape)}"
            for k in matched
            if target[k].shape != state[k].shape
        ],
    }
    listed = [f"{what}: {_some(keys)}" for what, keys in problems.items() if keys]
    if listed:
        raise UserError(f"{weights.path} does not fit {network.info.name}: {'; '.join(listed)}")
    module.load_state_dict({**target, **{key: state[key] for key in matched}})
    return Loaded(matched, missing, left)


# The content of a file


def _content(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file, and the text in its header (safetensors only)."""
    if not path.is_file():
        raise UserError(f"no file {path}; give the path of a checkpoint")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise UserError(f"{path} is damaged ({bad} does not match its checksum); get it again")
    except zipfile.BadZipFile:
        pass  # torch's format before 1.6 is no zip; a truncated file fails below
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and end-of-file errors share no narrower base
        raise UserError(_unreadable(path, error)) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content, {}


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or half downloaded ({error}); get it again") from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if found := re.search(r"GLOBAL ([\w.]+)", reason) or re.search(r"global ([\w.]+)", reason):
        return (
            f"{path} holds more than tensors ({found.group(1)}), and kdprof runs no code from "
            "files; if you trust it, save only its state_dict again with torch.save"
        )
    if "Weights only" in reason or "Unsupported" in reason:
        return (
            f"{path} holds more than tensors, and kdprof runs no code from files; if you trust "
            "it, save only its state_dict again with torch.save"
        )
    return f"{path} is damaged, half downloaded or no checkpoint ({reason[:200]}); get it again"


def _state_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file's content, without the prefix of data-parallel training."""
    found = content
    for keys in (("step", "student"), ("state_dict",), ("model",), ("model_state",)):
        inner: Any = content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and inner:
            found = inner
            break
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors; its keys are {_some(map(str, content))}")
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        short = key.removeprefix("module.")
        if short in plain:
            raise UserError(f"{path} has '{short}' twice, with and without 'module.'; remove one")
        plain[short] = value
    return plain


def _source_of(state: Mapping[str, Tensor], path: Path) -> str:
    starts = {
        OURS: ("backbone.net.",),
        CIRKD: ("pretrained.", "head."),
        TORCHVISION: ("backbone.conv1", "classifier.0."),
        MMSEG: ("backbone.", "decode_head."),
    }
    for source, needed in starts.items():
        if all(any(key.startswith(start) for key in state) for start in needed):
            return source
    if any(re.match(r"(conv1|layer1|stem|blocks|stages|conv_stem)[._]", key) for key in state):
        raise UserError(
            f"{path} holds only a backbone ({TIMM}'s names); give it as --backbone-weights, or as "
            "teacher_backbone_weights in the study"
        )
    raise UserError(
        f"{path} has no segmentation network that kdprof knows ({MMSEG}, {CIRKD}, {TORCHVISION} "
        f"or its own); its keys are like {_some(state)}"
    )


def _renamed(state: Mapping[str, Tensor], source: str, path: Path) -> dict[str, str]:
    """Return the file's key for each key of kdprof."""
    found: dict[str, str] = {}
    for theirs in state:
        key = theirs
        for pattern, replacement in _RULES[source]:
            key = re.sub(pattern, replacement, key)
        if key in found:
            raise UserError(f"{path}: '{found[key]}' and '{theirs}' are one entry; remove one")
        found[key] = theirs
    return found


def _name_of(state: Mapping[str, Tensor], source: str, content: Any) -> NetworkName | None:
    """Return the network that a state belongs to, from its keys and shapes."""
    if source == OURS:
        return None
    layout = _LAYOUT_OF[source]
    head = "pspnet" if "decode_head.psp_modules.0.1.conv.weight" in state else "deeplabv3"
    short = _resnet(state)
    deep = "backbone.net.conv1.0.weight" in state
    aliases = LAYOUTS[layout] if deep else LAYOUTS["torchvision"]
    aligned = layout == "mmseg" and _says_aligned(content)
    name = NetworkName(head, aliases.get(short, short), layout, aligned=aligned)
    branch = "psp_modules.0.1" if head == "pspnet" else "aspp_modules.0"
    width = len(state["decode_head.bottleneck.conv.weight"])
    channels = state[f"decode_head.{branch}.conv.weight"].shape[1]
    return name if width == width_of(name, channels) else replace(name, width=width)


def _resnet(state: Mapping[str, Tensor]) -> str:
    places = {m.groups() for key in state if (m := re.search(r"\.net\.layer(\d)\.(\d+)\.", key))}
    blocks = [sum(stage == str(number) for stage, _ in places) for number in (1, 2, 3, 4)]
    bottleneck = "backbone.net.layer1.0.conv3.weight" in state
    return BLOCKS.get((*blocks, bottleneck), f"resnet with {blocks} blocks")


def _says_aligned(content: Mapping[str, Any]) -> bool:
    """Return align_corners in the configuration inside mmsegmentation's file."""
    meta = content.get("meta")
    config = meta.get("config", meta.get("cfg", "")) if isinstance(meta, Mapping) else ""
    return re.search(r"align_corners['\"]?\s*[=:]\s*True", str(config)) is not None


def _classes_of(content: Mapping[str, Any], header: Mapping[str, str]) -> tuple[str, ...] | None:
    if "classes" in header:
        return tuple(header["classes"].split("\n"))
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    described = meta.get("dataset_meta")
    classes = described.get("classes") if isinstance(described, Mapping) else meta.get("CLASSES")
    return tuple(map(str, classes)) if classes else None


def _agrees(asked: NetworkName, found: NetworkName, wanted: str) -> bool:
    """Return whether a file's network is the one asked for. A short name fits any layout."""
    if asked.head != found.head or (asked.width and asked.width != found.width):
        return False
    if asked.layout == found.layout:
        return asked.backbone == found.backbone
    by_layout = {wanted.partition("-")[0]} & set(LAYOUTS)
    short = wanted.split("-")[1]
    return not by_layout and LAYOUTS[found.layout].get(short) == found.backbone


def _short(name: NetworkName) -> str:
    shorts = {full: short for short, full in LAYOUTS[name.layout].items()}
    return str(replace(name, backbone=shorts.get(name.backbone, name.backbone)))


def _plain(classes: Iterable[str]) -> list[str]:
    return [re.sub(r"[^a-z0-9]", "", name.lower()) for name in classes]


def _some(keys: Iterable[str], shown: int = 3) -> str:
    names = sorted(keys)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
