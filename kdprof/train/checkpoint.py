"""Checkpoints: written completely or not at all, verified before use; the previous one is kept.

The file has torch's own zip format, so ``torch.load(..., weights_only=True)`` opens it. It is read
as every file of weights is: its CRC-32 per entry, which torch does not verify, is verified.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kdprof.errors import KdprofError
from kdprof.models.weight_files import NoWeights, open_weights
from kdprof.store import RunFolder, naming, replace_durably


def save(folder: RunFolder, state: dict[str, Any]) -> None:
    """Write a checkpoint; the previous one stays as ``checkpoint.previous.pt``.

    After the first one, a crash at any moment leaves at least one whole checkpoint.
    """
    temporary = _written(folder.checkpoint, state)
    if folder.checkpoint.exists():
        replace_durably(folder.checkpoint, folder.previous_checkpoint)
    replace_durably(temporary, folder.checkpoint)


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a single checkpoint file, completely or not at all."""
    replace_durably(_written(path, state), path)


def _written(path: Path, state: dict[str, Any]) -> Path:
    temporary = path.with_suffix(".tmp")
    try:
        with naming(temporary), temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise
    return temporary


def recover(folder: RunFolder) -> tuple[dict[str, Any] | None, str | None]:
    """Do what :func:`load` does, and replace a damaged checkpoint by the whole previous one:
    otherwise the next save would move the damaged one over it."""
    state, damage = load(folder)
    if damage is not None:
        replace_durably(folder.previous_checkpoint, folder.checkpoint)
    return state, damage


def load(folder: RunFolder) -> tuple[dict[str, Any] | None, str | None]:
    """Return the newest whole checkpoint of a run, on the CPU, and what was wrong with a newer one.

    Returns:
        (None, None) if nothing was saved yet.

    Raises:
        KdprofError: checkpoints exist, but all of them are damaged.
    """
    damaged = []
    for path in (folder.checkpoint, folder.previous_checkpoint):
        if not path.exists():
            continue
        try:
            state = read(path)
        except KdprofError as error:
            damaged.append(str(error))
            continue
        return state, damaged[0] if damaged else None
    if damaged:
        raise KdprofError(f"{damaged[0]}; no whole one is left, delete {folder.path} to start over")
    return None, None


def read(path: Path) -> dict[str, Any]:
    """Read one checkpoint file. Never runs code from it.

    Raises:
        KdprofError: the file is damaged: truncated or changed.
    """
    try:
        return open_weights(path).content
    except NoWeights as error:
        raise KdprofError(f"{path} is damaged (it {error.what})") from None
