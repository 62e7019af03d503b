"""Have something done before or after the steps of a training, such as a signal sent."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kdprof.step import TrainStep

Observer = Callable[[TrainStep, int], None]
"""Called with the step and the number of the iteration, from 0."""


@contextmanager
def observing(
    iterations: int | None = None,
    *,
    before: Observer | None = None,
    after: Observer | None = None,
) -> Iterator[None]:
    """Within the block, call observers around each step.

    Args:
        iterations: only of runs of this length, which tells them from the teacher's training and
            from measuring; None: of all.
    """
    real = TrainStep.__call__

    def observed(step, images, labels, iteration, *rest, **keywords):
        mine = iterations in (None, step.iterations)
        if mine and before:
            before(step, iteration)
        losses = real(step, images, labels, iteration, *rest, **keywords)
        if mine and after:
            after(step, iteration)
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", observed)
        yield


def signal_at(iteration: int, number: int = signal.SIGTERM) -> Observer:
    """Return an observer that sends this process a signal at an iteration."""

    def send(step: TrainStep, now: int) -> None:
        if now == iteration:
            os.kill(os.getpid(), number)

    return send


def stopped_at(iteration: int, seconds: float) -> Observer:
    """Return an observer that has this process stopped for some seconds at an iteration."""

    def stop(step: TrainStep, now: int) -> None:
        if now == iteration:
            me = os.getpid()
            subprocess.Popen(["sh", "-c", f"kill -STOP {me}; sleep {seconds}; kill -CONT {me}"])
            time.sleep(0.5)  # until the shell has run

    return stop
