"""A command run by a group of processes, one per GPU, under torchrun's agent.

The agent restarts the whole group when one of its processes crashes. An orderly end must not look
like a crash, whatever its exit code: rank 0 writes the code into a file and exits with 0.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdprof.distributed.ranks import LostContact, Place, Ranks
from kdprof.errors import KdprofError, UserError
from kdprof.hardware.device import find_device
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.follow import follow
from kdprof.store import write_atomic
from kdprof.study import Study
from kdprof.train.runs import Summary
from kdprof.workflow import Workflow

OUTCOME = "KDPROF_OUTCOME"
"""Environment variable that names the file for rank 0's exit code."""
RESTARTS = 10
"""How often a group is restarted."""
INTERRUPTED = 130
Result = TypeVar("Result")


def run_group(arguments: Sequence[str], processes: int) -> int:
    """Run this Python with ``arguments`` in every process of a group; return rank 0's exit code.

    The processes have the environment of this one, with torchrun's variables, and its standard
    streams. SIGINT and SIGTERM are passed on to them.

    Raises:
        KdprofError: the group crashed after its last restart.
    """
    # If it is not set, torchrun's agent sets 1; but another number of threads is another device.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # Not the machine's name, which need not resolve: torchrun would wait without a word.
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=RESTARTS,
    )
    with tempfile.TemporaryDirectory(prefix="kdprof-") as folder:
        outcome = Path(folder) / "outcome"
        os.environ[OUTCOME] = str(outcome)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException:
            return _code(outcome, INTERRUPTED)
        except ChildFailedError as error:
            raise KdprofError(
                f"a process of the {processes} crashed {RESTARTS + 1} times: "
                f"{_last_line(error)}; its output is above; the training is saved up to the last "
                "checkpoint"
            ) from error
        finally:
            del os.environ[OUTCOME]
        return _code(outcome, 1)


def _code(outcome: Path, otherwise: int) -> int:
    return int(outcome.read_text()) if outcome.exists() else otherwise


def _last_line(error: ChildFailedError) -> str:
    rank, failure = error.get_first_failure()
    return f"rank {rank} with exit code {failure.exitcode}"


def in_group(study: Study, lead: Callable[[Ranks | None], Result]) -> Result | None:
    """Call ``lead``, alone or as rank 0 of the study's group.

    Args:
        lead: called with the group, or with None if there is no group.

    Returns:
        The result of ``lead``; None on the other ranks, which follow rank 0 until it ends.

    Raises:
        UserError: ``step.gpus`` is not the number of processes that torchrun started.
    """
    place = Place.from_environment()
    processes = 1 if place is None else place.size
    if processes != study.step.gpus:
        raise UserError(
            f"torchrun started {processes} processes, the study has step.gpus = {study.step.gpus}; "
            f"use --gpus {processes}, or let kdprof start torchrun"
        )
    if place is None or place.size == 1:
        return lead(None)
    ranks = Ranks(place, find_device(study.device).type)
    if not ranks.leads:
        # Rank 0 knows whether the controls are trained, and checks what only they need.
        follow(ranks, lambda: ResolvedStudy(study, ranks=ranks, control=False))
        return None
    with _ending(ranks):
        return lead(ranks)


def train_in_group(workflow: Workflow, arguments: Sequence[str]) -> Summary | int | None:
    """Train a study in this process, or in as many processes as it has GPUs.

    Args:
        arguments: arguments for Python that make the same call in another process.

    Returns:
        The summary; the exit code of a group that was started; None in a process that follows
        rank 0.
    """
    study = workflow.study
    if study.step.gpus > 1 and Place.from_environment() is None:
        return run_group(arguments, study.step.gpus)
    return in_group(study, workflow.train)


@contextmanager
def _ending(ranks: Ranks) -> Iterator[None]:
    """End the group in order after the body, unless the body lost contact to another rank."""
    try:
        yield
    except LostContact:
        raise
    except Exception:
        ranks.end()
        raise
    ranks.end()


def leave(code: int) -> NoReturn:
    """Exit with a code; rank 0 of a group writes it into a file and exits with 0, see above."""
    outcome = os.environ.get(OUTCOME) if os.environ.get("RANK") == "0" else None
    if outcome is not None and code != LostContact.exit_code:
        write_atomic(Path(outcome), str(code))
        sys.exit(0)
    sys.exit(code)
