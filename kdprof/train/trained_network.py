"""The network that a run trained, loaded from its folder."""

from __future__ import annotations

from kdprof.errors import UserError
from kdprof.models import AnyNetwork, build
from kdprof.store import RunFolder
from kdprof.train import checkpoint


def trained_network(folder: RunFolder, name: str) -> tuple[AnyNetwork, tuple[str, ...]]:
    """Return a finished run's network on the CPU, and its classes in order.

    Args:
        name: the network's name.

    Raises:
        UserError: the run is not finished, or it trained nothing (a teacher whose weights were
            given).
        KdprofError: its checkpoint is damaged.
    """
    run = folder.read_run()
    if run is None or not run.finished:
        raise UserError(f"{folder.path} has no finished run; train it to its end first")
    state, _ = checkpoint.load(folder)
    if state is None:
        raise UserError(f"{folder.path} trained no network: its weights were read from a file")
    classes = tuple(run.miou_per_class or ())
    network = build(name, len(classes))
    network.load_state_dict(state["step"]["student"])
    return network.eval(), classes
