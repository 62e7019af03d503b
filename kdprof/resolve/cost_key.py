"""The key of a Cost: a hash of everything in a study that changes the cost of a method's step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kdprof.discovery import source_hash
from kdprof.hardware.device import versions
from kdprof.models import is_adapted, parse_name, source_of
from kdprof.models.names import NetworkName
from kdprof.resolve.study import ResolvedStudy
from kdprof.study import own_optimizer

ENGINE = (
    "step.py",
    "optimizer.py",
    "method.py",
    "models/*.py",
    "resized/*.py",
    "hardware/blocks.py",
)
"""The source files that every step uses, relative to the package."""


def cost_settings(study: ResolvedStudy, name: str) -> dict[str, Any]:
    """Return everything in the study that changes the cost of a method's step."""
    entry, plain = study.methods[name], study.plain
    settings, scenario = plain.method_settings.get(name, {}), plain.scenario
    reads_teacher = entry.cls.needs_teacher()
    return {
        "student": _identity_of(plain.student),
        "teacher": _identity_of(study.teacher_name) if reads_teacher else None,
        "data": study.data.name,
        "placeholder_images": study.data.uses_placeholders,
        "classes": study.data.num_classes("student"),
        "teacher_classes": study.data.num_classes("teacher") if reads_teacher else None,
        "scenario": scenario.model_dump(mode="json") if scenario else None,
        "data_settings": study.data_settings.model_dump(mode="json", exclude={"cache_folder"}),
        "step": study.step.model_dump(mode="json"),
        "optimizer_sha256": _own_optimizer_sha256(study),
        "method": entry.cls(**settings).settings(),
        "method_source_sha256": entry.source_sha256,
    }


def cost_key(study: ResolvedStudy, name: str) -> str:
    """Return the hash under which the Cost of a method is stored."""
    content = [cost_settings(study, name), study.hardware.name, versions(), _engine_sha256()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _identity_of(network: NetworkName | str) -> str:
    """Return a network's full name, with a hash of its file if it is a user's network."""
    if not isinstance(network, str):
        return str(network)
    if (source := source_of(network)) is not None:
        return f"{network} {hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]}"
    return network if is_adapted(network) else str(parse_name(network))


def _own_optimizer_sha256(study: ResolvedStudy) -> str | None:
    """Return the hash of the file of a user's optimiser; None with one of kdprof's."""
    own = own_optimizer(study.step.optimizer)
    return hashlib.sha256(own[0].read_bytes()).hexdigest() if own else None


def _engine_sha256() -> str:
    return source_hash(Path(__file__).parent.parent, ENGINE)
