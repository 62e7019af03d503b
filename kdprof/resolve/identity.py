"""What a Cost and a run depend on: whether a stored one may be used again.

The rule and its reasons are in ``docs/identity.md``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kdprof.discovery import find_method
from kdprof.hardware.device import versions
from kdprof.models import is_adapted, parse_name, sources_of_network
from kdprof.models.names import NetworkName
from kdprof.models.weight_files import file_and_place
from kdprof.optimizer import sources_of_optimizer
from kdprof.resolve.study import ResolvedStudy
from kdprof.store import expanded
from kdprof.study import without_folder
from kdprof.user_files import content_hash, source_hash

PACKAGE = Path(__file__).parent.parent
STEP_CODE = (
    "step.py",
    "optimizer.py",
    "method.py",
    "models/*.py",
    "resized/*.py",
    "hardware/blocks.py",
)
"""The source files that every step uses, relative to the package."""
COUNTING_CODE = ("measure/counting/*.py",)
"""The source files that count a step's FLOP, relative to the package."""
TRAINING_CODE = (
    *STEP_CODE,
    "schedule.py",
    "evaluate.py",
    "step_feed.py",
    "data/augment.py",
    "data/batches.py",
    "data/files.py",
    "data/labels.py",
    "data/layouts.py",
    "data/own.py",
    "data/random_streams.py",
    "data/scenario.py",
    "data/synthetic.py",
    "train/loop.py",
    "train/trunk.py",
)
"""The source files that decide what is learned and how it is scored, relative to the package."""
NOT_IN_A_COST = {"cache_folder", "synthetic_val"}
"""Data settings that change no Cost: where decoded images lie, and what only evaluation reads."""
BY_CONTENT = (
    "student", "student_backbone_weights",
    "teacher", "teacher_backbone_weights", "teacher_weights",
)  # fmt: skip
"""Settings for which the identity of a run has the names and the content of files instead."""

# The identity of a Cost


def cost_settings(study: ResolvedStudy, name: str) -> dict[str, Any]:
    """Return everything in the study that changes the cost of a method's step."""
    entry, plain = study.methods[name], study.plain
    settings, scenario = plain.method_settings.get(name, {}), plain.scenario
    reads_teacher = entry.cls.needs_teacher()
    return {
        "student": _name_of(plain.student),
        "student_sources": sources_of_network(plain.student),
        "teacher": _name_of(study.teacher_name) if reads_teacher else None,
        "teacher_sources": sources_of_network(study.teacher_name) if reads_teacher else {},
        "data": study.data.kind,
        "placeholder_images": study.data.uses_placeholders,
        "file_sizes": study.data.file_sizes,
        "classes": study.data.num_classes("student"),
        "teacher_classes": study.data.num_classes("teacher") if reads_teacher else None,
        "scenario": scenario.model_dump(mode="json") if scenario else None,
        "data_settings": study.data_settings.model_dump(mode="json", exclude=NOT_IN_A_COST),
        "step": {
            **study.step.model_dump(mode="json"),
            "optimizer": without_folder(study.step.optimizer),
        },
        "optimizer_sources": sources_of_optimizer(study.step.optimizer),
        "method": entry.create(settings).settings(),
        "method_sources": entry.sources(),
    }


def cost_key(study: ResolvedStudy, name: str) -> str:
    """Return the hash under which the Cost of a method is stored."""
    content = [
        cost_settings(study, name),
        study.hardware.name,
        versions(),
        source_hash(PACKAGE, (*STEP_CODE, *COUNTING_CODE)),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _name_of(network: NetworkName | str) -> str:
    """Return the full name of a network; of a user's, the file's name and the function."""
    if isinstance(network, str) and is_adapted(network):
        return without_folder(network)
    return str(network if isinstance(network, NetworkName) else parse_name(network))


# The identity of a run


def run_identity(study: ResolvedStudy, method: str) -> dict[str, str]:
    """Return what the weights and scores of a method's run depend on, by name.

    Values are short texts, settings as JSON, or hashes that begin with ``sha256:``.
    """
    entry = study.methods[method]
    with_teacher = study.starts_as_teacher or entry.cls.needs_teacher()
    settings = entry.create(study.plain.method_settings.get(method, {})).settings()
    return {
        **_settings(study, () if with_teacher else ("teacher_training",)),
        **{f"{key} of the method": json.dumps(settings[key]) for key in sorted(settings)},
        **_named("of the method", entry.sources()),
        **_of_network(study, "student"),
        **(_of_network(study, "teacher") if with_teacher else {}),
        **_of_all(study),
    }


def teacher_identity(study: ResolvedStudy) -> dict[str, str]:
    """Return what the weights and scores of the study's teacher depend on, by name."""
    method = find_method(study.teacher_training.method)
    return {
        **_settings(study, ("training",)),
        **_named("of the method", method.sources()),
        **_of_network(study, "teacher"),
        **_of_all(study),
    }


def _settings(study: ResolvedStudy, without: Collection[str]) -> dict[str, str]:
    """Return the settings that results of one comparison share, by dotted name.

    Args:
        without: sections that do not count.
    """
    left_out = (*BY_CONTENT, *without)
    comparable = study.plain.comparable()
    return _flat({key: value for key, value in comparable.items() if key not in left_out})


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return the values in a table and in the tables in it as JSON, without those that are None."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{key}.")
        elif value is not None:
            found[f"{above}{key}"] = json.dumps(value)
    return found


def _of_all(study: ResolvedStudy) -> dict[str, str]:
    """Return what every run depends on: data, device, software."""
    return {
        **_named("of the optimiser", sources_of_optimizer(study.step.optimizer)),
        **study.data.content,
        "device": study.hardware.name,
        **{f"version of {name}": version for name, version in versions().items()},
        "code of kdprof": source_hash(PACKAGE, TRAINING_CODE),
    }


def _of_network(study: ResolvedStudy, role: str) -> dict[str, str]:
    """Return the identity of the student or teacher before it is trained: code and weights."""
    plain = study.plain
    network = plain.student if role == "student" else study.teacher_name
    backbone = getattr(plain, f"{role}_backbone_weights")
    found = {role: _name_of(network), f"backbone weights of the {role}": _weights(backbone)}
    if role == "teacher" and plain.teacher_weights is not None:
        found["weights of the teacher"] = _weights(plain.teacher_weights)
    return found | _named(f"of the {role}", sources_of_network(network))


def _weights(given: str) -> str:
    """Return the content of a file (and the place in it) or folder, or the name of published
    weights itself."""
    path, place = file_and_place(expanded(given))
    if not path.exists():
        return given
    return content_hash(path) + (f"#{place}" if place else "")


def _named(whose: str, sources: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{name if name.startswith('version of') else f'file {name}'} {whose}": value
        for name, value in sources.items()
    }


def of_all_methods(identity: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a run's identity in which all runs of a folder must be equal: not what
    belongs to its method, and not the teacher, which some methods do without."""
    return {name: one for name, one in identity.items() if not _is_own(name)}


def _is_own(name: str) -> bool:
    of_teacher = name == "teacher" or name.startswith("teacher_training.")
    return of_teacher or name.endswith((" of the method", " of the teacher"))


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """Return in words what differs between two identities: a stored one and this study's."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        before, now = there.get(name), here.get(name)
        if before == now:
            continue
        if before is None or now is None:
            found.append(f"{name} is {'not ' if now is None else ''}used now")
        elif now.startswith("sha256:") or before.startswith("sha256:"):
            found.append(f"{name} {'is missing' if now == 'absent' else 'has changed'}")
        else:
            found.append(f"{name} was {before}, is {now} here")
    return found
