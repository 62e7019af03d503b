"""What a record must be before it is shown as a reference: whole, reliable, and without anybody's
paths or names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from kdprof.errors import UserError
from kdprof.records import REFERENCE, Atlas, AtlasSetting
from kdprof.store import read_record, read_text

LEAST_VERSIONS = ("kdprof", "python", "torch")
MOST_UNRELIABLE = 0.5
"""A setting of which a larger share of methods is unreliable says nothing about a device."""
CHECKED = {".json", ".jsonl", ".toml", ".md", ".csv", ".html", ".tex"}
"""Endings of the files in which paths and names are looked for."""

_PATH = re.compile(r"(?<![\w.~/<-])~?(?:/[\w.+@-]+){2,}|\b[A-Za-z]:(?:\\+[\w.+@-]+)+")
_SYSTEM = ("/sys/", "/proc/", "/dev/")
"""Folders that are the same on every machine of a kind."""
_ADDRESS = re.compile(r"[\w.+-]+@(?![\w-]+\.(?:json|md|tex)\b)[\w-]+\.[a-z]{2,}")
"""Not the name of a claim's file, such as cwd-gt-kd-40k@cwd.json."""


_PICTURE = re.compile(r"data:[\w/+.;-]+;base64,[\w+/=]+")
"""A picture in a page."""


def without_paths(text: str) -> str:
    """Return text in which only the last part is left of every path."""
    return _PATH.sub(
        lambda found: found[0] if _is_common(found[0]) else re.split(r"[/\\]", found[0])[-1], text
    )


def private_words(text: str, names: Collection[str] = ()) -> list[str]:
    """Return the paths and e-mail addresses in a text, and which of some names, each once."""
    text = _PICTURE.sub("", text)
    paths = [found[0] for found in _PATH.finditer(text) if not _is_common(found[0])]
    named = [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)]
    return list(dict.fromkeys([*paths, *_ADDRESS.findall(text), *named]))


def _is_common(path: str) -> bool:
    return path.startswith(_SYSTEM)


def read_atlas(path: Path) -> Atlas:
    """Read an atlas that is to be shown as a reference.

    Raises:
        UserError: it cannot be read, or :func:`problems` finds any.
    """
    atlas = read_record(path, Atlas)
    found = problems(atlas)
    if found:
        raise UserError(*(f"{path}: {problem}" for problem in found))
    return atlas


def problems(atlas: Atlas) -> list[str]:
    """Return why an atlas cannot be a reference, each reason with its mend."""
    return [
        *_of_origin(atlas),
        *(
            f"{setting.name}, {setting.precision}: {problem}"
            for setting in atlas.settings
            for problem in (*_of_setting(setting), *_of_kind(atlas, setting))
        ),
        *(
            f"holds '{word}', which names a place or a person; leave it out"
            for word in private_words(atlas.model_dump_json())
        ),
    ]


def _of_origin(atlas: Atlas) -> Iterator[str]:
    lacking = [name for name in LEAST_VERSIONS if not atlas.versions.get(name)]
    if lacking:
        yield f"lacks the version of {', '.join(lacking)}; make it again with this kdprof"
    if not atlas.settings:
        yield "holds no setting; measure one"
    if (atlas.kind == "measured") != (atlas.device is not None):
        yield "a measured atlas names its device, and a counted one has none; make it again"
    places = [(setting.name, setting.precision) for setting in atlas.settings]
    for name, precision in sorted({place for place in places if places.count(place) > 1}):
        yield f"has {name}, {precision} twice; remove one"


def _of_setting(setting: AtlasSetting) -> Iterator[str]:
    names = [cost.method for cost in setting.costs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"'{name}' stands there twice; remove one"
    if REFERENCE not in names:
        yield f"'{REFERENCE}', which the ratios refer to, is missing; measure it"
    for cost in setting.costs:
        if not cost.reliable and not cost.warnings:
            yield f"'{cost.method}' is unreliable without a reason; measure it again"
    unreliable = [cost.method for cost in setting.costs if not cost.reliable]
    if unreliable and len(unreliable) > MOST_UNRELIABLE * len(names):
        yield (
            f"{len(unreliable)} of {len(names)} methods are unreliable; measure again when the "
            "machine is quiet"
        )


def _of_kind(atlas: Atlas, setting: AtlasSetting) -> Iterator[str]:
    for cost in setting.costs:
        lacking = [name for name in _needed(atlas) if getattr(cost, name) is None]
        if lacking:
            yield f"'{cost.method}' has no {', '.join(lacking)}; measure it again"
        if atlas.kind == "counted" and cost.latency_s is not None:
            yield f"'{cost.method}' has seconds, though nothing ran; make the atlas again"


def _needed(atlas: Atlas) -> tuple[str, ...]:
    return ("latency_s", "ratio") if atlas.kind == "measured" else ("flop", "bytes_moved")


def check_folder(
    folder: Path, *, names: Collection[str] = (), without: Collection[str] = ()
) -> list[str]:
    """Return what keeps a device's folder out of the reference: places and names in its files, and
    an atlas with problems.

    Args:
        names: of people and machines that must not stand in a file.
        without: folders in it that are not part of the reference.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix in CHECKED and name.parts[0] not in without:
            words = private_words(read_text(path), names)
            found += [f"{name} holds '{word}', which names a place or a person" for word in words]
    if (folder / "atlas.json").is_file():
        found += problems(read_record(folder / "atlas.json", Atlas))
    return found
