"""The network that a run trained, loaded from its folder."""

from __future__ import annotations

from typing import Any

from kdprof.errors import UserError
from kdprof.models import AdaptedNetwork, AnyNetwork, build
from kdprof.models.weight_files import WeightFile
from kdprof.models.weights import load_weights, read_weights
from kdprof.records import Run
from kdprof.store import RunFolder
from kdprof.train import checkpoint


def trained_network(
    folder: RunFolder, name: str, given: str | None = None
) -> tuple[AnyNetwork, tuple[str, ...]]:
    """Return a finished run's network on the CPU, and its classes in order.

    Args:
        name: the network's name.
        given: the file of weights that the study gives for this network instead of training it.

    Raises:
        UserError: nothing was trained there, or not to its end; or the weights do not fit the
            network, because a file of it was changed since.
        KdprofError: its checkpoint is damaged.
    """
    run = folder.read_run()
    if given is not None:
        raise UserError(
            f"{folder.path}: the study trains no network there, it reads {given}; use that"
        )
    if run is None or not run.finished:
        raise UserError(f"{folder.path}: {_unfinished(run)}")
    state, _ = checkpoint.load(folder)
    if state is None:
        raise UserError(
            f"{folder.checkpoint} is gone; delete {folder.path} and give the command that trained "
            "it again"
        )
    classes = tuple(run.miou_per_class or ())
    network = build(name, len(classes))
    fill(network, folder, state)
    return network.eval(), classes


def fill(network: AnyNetwork, folder: RunFolder, state: dict[str, Any]) -> None:
    """Set a network's weights from the state in a run's checkpoint.

    Raises:
        UserError: they do not fit, because a file of the network was changed since.
    """
    file = WeightFile(folder.checkpoint, "step.student", state, {})
    adapted = network if isinstance(network, AdaptedNetwork) else None
    load_weights(network, read_weights(file, adapted))


def _unfinished(run: Run | None) -> str:
    """Return why there is no trained network, and what to do."""
    if run is None:
        return "nothing was trained there yet; run 'kdprof train' first"
    if run.failure is not None:
        return f"{run.label()} failed ({run.failure.reason}); run 'kdprof train' again"
    return f"{run.label()} is not trained to its end; give its 'kdprof train' command again"
