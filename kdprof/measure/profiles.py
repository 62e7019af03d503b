"""Files for external viewers: a Chrome trace, and the CUDA allocator's history."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kdprof.errors import UserError
from kdprof.measure.subject import Subject
from kdprof.step import ignore_phase
from kdprof.store import replace_durably, slug


@dataclass(frozen=True)
class Files:
    """Files that a session also writes; None for those that were not requested."""

    trace: Path | None = None
    """A Chrome trace of two steps."""
    memory_timeline: Path | None = None
    """The CUDA allocator's history of two steps, for torch's viewer."""

    def to_json(self) -> dict[str, str]:
        """Return the requested files, JSON-serialisable."""
        return {key: str(path) for key, path in vars(self).items() if path is not None}

    @classmethod
    def from_json(cls, files: Mapping[str, str]) -> Files:
        """Return the Files that :meth:`to_json` describes."""
        return cls(**{key: Path(path) for key, path in files.items()})

    def of(self, name: str) -> Files:
        """Return the files of one of several steps, with its name in theirs."""
        return Files(
            *(path and path.with_stem(f"{path.stem}.{slug(name)}") for path in vars(self).values())
        )


def check_files(files: Files, device: torch.device) -> None:
    """Refuse files that cannot be written for this device.

    Raises:
        UserError: the CUDA allocator's history is requested on a CPU, or a folder does not exist.
    """
    problems = [
        f"the folder {path.parent} for {path.name} does not exist; create it first"
        for path in vars(files).values()
        if isinstance(path, Path) and not path.parent.is_dir()
    ]
    if files.memory_timeline is not None and device.type != "cuda":
        problems.append(
            "--memory-timeline writes the CUDA allocator's history, which a CPU does not have; "
            "leave it out"
        )
    if problems:
        raise UserError(*problems)


def write_files(subject: Subject, files: Files) -> None:
    """Write the requested files. Call it after the timing: profilers slow down later steps."""
    for path, write in ((files.trace, _write_trace), (files.memory_timeline, _write_timeline)):
        if path is not None:
            unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                write(subject, unfinished)
                replace_durably(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)


def _write_trace(subject: Subject, path: Path) -> None:
    """Write a Chrome trace of two steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            subject.run(ignore_phase)
    profiler.export_chrome_trace(str(path))


def _write_timeline(subject: Subject, path: Path) -> None:
    """Write the CUDA allocator's history over two steps, for torch's memory viewer."""
    torch.cuda.memory._record_memory_history(max_entries=200_000)
    try:
        for _ in range(2):
            subject.run(ignore_phase)
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
