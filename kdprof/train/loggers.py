"""External dashboards, which get the same scalars as a run's log.jsonl and curve.jsonl."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from kdprof.errors import UserError


class Logger(Protocol):
    """A receiver of a run's scalars."""

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Log scalars of one iteration."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path, label: str, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote after its checkpoint will be written again.
        again = iteration + 1 if iteration else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=again)

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A Weights & Biases run in ``wandb/`` of the run's folder; offline, unless WANDB_MODE is set.
    ``wandb sync`` uploads it."""

    def __init__(self, folder: Path, label: str, iteration: int):
        import wandb

        self._run = wandb.init(
            project="kdprof",
            name=label,
            dir=str(folder),
            # One id per results folder and run, so that a continued run stays one run there.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12],
            resume="allow",
            mode=None if "WANDB_MODE" in os.environ else "offline",  # None: wandb reads it
            reinit="create_new",
        )

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, str, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}
"""Loggers by the name of their package, which is also the extra that installs it."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        UserError: a logger's package is not installed; the message names them all.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            *(
                f"training.loggers: '{name}' is not installed; pip install 'kdprof[{name}]'"
                for name in missing
            )
        )


def open_loggers(names: Sequence[str], folder: Path, label: str, iteration: int) -> list[Logger]:
    """Return the loggers of one run.

    Args:
        folder: the run's folder.
        iteration: where the run begins or continues.
    """
    return [LOGGERS[name](folder, label, iteration) for name in names]
