"""Network names: ``pspnet-r18``, ``cirkd-deeplabv3-r101-w256``, ``deeplabv3-pvt_v2_b0-os32``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdprof.errors import UserError, unknown
from kdprof.models.backbone import OUTPUT_STRIDE, OUTPUT_STRIDES, check_name

LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "mmseg": {"r18": "resnet18c", "r50": "resnet50c", "r101": "resnet101c"},
    "cirkd": {"r18": "resnet18s", "r50": "resnet50s", "r101": "resnet101s"},
    "torchvision": {"r50": "resnet50", "r101": "resnet101"},
}
"""The projects whose details a network can have, and the backbones of their short names."""
DEFAULT_LAYOUT = "mmseg"
HEADS = {
    "mmseg": ("pspnet", "deeplabv3"),
    "cirkd": ("pspnet", "deeplabv3"),
    "torchvision": ("deeplabv3",),
}


@dataclass(frozen=True)
class NetworkName:
    """The parts of a network's name.

    Attributes:
        layout: one of :data:`LAYOUTS`.
        backbone: full name in :mod:`kdprof.models.backbone`, not an alias.
        width: channels of the map before the classifier; None = the default of the layout.
        aligned: whether every resize of maps has ``align_corners=True``, as in mmsegmentation's
            configurations of 769x769; CIRKD's layout always has it.
        output_stride: input pixels per position of the backbone's last map. The same weights fit
            every stride.
    """

    head: str
    backbone: str
    layout: str = DEFAULT_LAYOUT
    width: int | None = None
    aligned: bool = False
    output_stride: int = OUTPUT_STRIDE

    def __str__(self) -> str:
        """Return the name from which :func:`parse_name` makes an equal object."""
        parts = [] if self.layout == DEFAULT_LAYOUT else [self.layout]
        parts += [self.head, self.backbone]
        parts += [f"w{self.width}"] if self.width else []
        parts += [f"os{self.output_stride}"] if self.output_stride != OUTPUT_STRIDE else []
        return "-".join([*parts, *(["aligned"] if self.aligned else [])])


def parse_name(name: str) -> NetworkName:
    """Return the parts of ``[LAYOUT-]HEAD-BACKBONE[-wWIDTH][-osSTRIDE][-aligned]``.

    Layouts: mmseg (the default), cirkd, torchvision. Heads: pspnet, deeplabv3. Backbones: every
    timm name, ``resnet18c``, ``resnet18s``, ..., and the aliases r18, r50 and r101, whose meaning
    depends on the layout. Output strides: 8 (the default), 16, 32.

    Raises:
        UserError: the layout, head or backbone does not exist, with the nearest name that does; or
            the layout does not have the option.
    """
    layout, _, rest = name.partition("-")
    if layout not in LAYOUTS:
        layout, rest = DEFAULT_LAYOUT, name
    head, _, rest = rest.partition("-")
    rest, aligned = re.subn(r"-aligned$", "", rest)
    rest, output_stride = _number_after("os", rest)
    rest, width = _number_after("w", rest)
    if head not in HEADS[layout] or not rest:
        raise UserError(unknown("network", name, _examples(layout, rest)))
    if layout == "cirkd" and aligned:
        raise UserError(f"network '{name}': CIRKD's layout is always aligned; leave '-aligned' out")
    if layout == "torchvision" and aligned:
        raise UserError(f"network '{name}': torchvision's is never aligned; leave '-aligned' out")
    if output_stride not in (None, *OUTPUT_STRIDES):
        raise UserError(f"network '{name}': there is no -os{output_stride}; use -os8, -os16, -os32")
    backbone = LAYOUTS[layout].get(rest, rest)
    check_name(backbone)
    return NetworkName(head, backbone, layout, width, bool(aligned), output_stride or OUTPUT_STRIDE)


def published_name(name: str) -> str:
    """Return a network's name as papers write it, in lower case: ``pspnet-r18``.

    Layout, width and stride are left out. An adapted network keeps its name.
    """
    try:
        found = parse_name(name)
    except UserError:
        return name.casefold()
    short = {full: alias for alias, full in LAYOUTS[found.layout].items()}
    return f"{found.head}-{short.get(found.backbone, found.backbone)}".casefold()


def published_pair(teacher: str | None, student: str) -> str:
    """Return ``teacher -> student`` as papers write it, in lower case; without a teacher, only the
    student."""
    names = [published_name(name) for name in (teacher, student) if name]
    return " -> ".join(names)


def _number_after(letters: str, name: str) -> tuple[str, int | None]:
    """Return a name without ``-<letters>N`` at its end, and N; None if it has no such end."""
    found = re.search(rf"-{letters}(\d+)$", name)
    return (name[: found.start()], int(found.group(1))) if found else (name, None)


def _examples(layout: str, backbone: str) -> list[str]:
    prefix = "" if layout == DEFAULT_LAYOUT else f"{layout}-"
    backbones = [backbone] if backbone else list(LAYOUTS[layout])
    return [f"{prefix}{head}-{b}" for head in HEADS[layout] for b in backbones]
