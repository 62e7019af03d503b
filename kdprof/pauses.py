"""Seconds in which this process could run: time in which it was stopped does not count.

A process is stopped by Ctrl-Z, SIGSTOP, a frozen container or a paused virtual machine, and the
monotonic clock goes on. A thread that wakes ten times a second sees it: it wakes late, although it
had neither to wait for a processor nor for Python's lock. A suspended machine stops the monotonic
clock itself; the clock that goes on tells for how long. Steps of the calendar's clock change none
of these clocks.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kdprof.errors import KdprofError

Result = TypeVar("Result")

BEAT_S = 0.1
"""How often the thread wakes; a stop is known up to half of it."""
LEAST_S = 1.0
"""The shortest stop that is noticed: a busy machine may delay a thread for less."""
LOCK_WAKES_PER_S = 50.0
"""A thread that waits for Python's lock wakes every 5 ms to ask for it; a stopped one never."""
TRIES = 5
"""How often work is repeated during which the process was stopped."""

_WHO = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class PauseWatch:
    """Notices when this process is stopped, from its creation on."""

    def __init__(self) -> None:
        self._stopped_s = 0.0
        self._beat = time.perf_counter()
        self._suspended_before_s = self._suspended_s = _since_boot_s()
        self._beaten = threading.Condition()
        threading.Thread(target=self._watch, daemon=True, name="kdprof-pauses").start()

    def _watch(self) -> None:
        while True:
            wakes, delayed_s = resource.getrusage(_WHO).ru_nvcsw, _delayed_s()
            began = time.perf_counter()
            time.sleep(BEAT_S)
            gap_s = time.perf_counter() - began
            stopped = gap_s >= LEAST_S + BEAT_S and _was_stopped(
                gap_s, resource.getrusage(_WHO).ru_nvcsw - wakes, _delayed_s() - delayed_s
            )
            with self._beaten:
                self._stopped_s += gap_s - BEAT_S / 2 if stopped else 0.0
                self._beat = time.perf_counter()
                self._beaten.notify_all()

    def stopped_s(self) -> float:
        """Return how long the monotonic clock went on while this process was stopped."""
        with self._beaten:
            if time.perf_counter() - self._beat > LEAST_S:
                self._beaten.wait(2 * BEAT_S)  # it continued just now: the thread tells why
            return self._stopped_s

    def paused_s(self) -> float:
        """Return how long this process was stopped, or the machine suspended."""
        now_s = _since_boot_s()
        if now_s - self._suspended_s >= LEAST_S:  # else only the time between two clocks' readings
            self._suspended_s = now_s
        return self.stopped_s() + self._suspended_s - self._suspended_before_s


def _was_stopped(gap_s: float, wakes: int, delayed_s: float) -> bool:
    """Return whether a thread that slept too long was stopped: it neither asked for Python's lock
    nor waited for a processor."""
    return wakes < LOCK_WAKES_PER_S * gap_s and delayed_s < gap_s / 2


def _delayed_s() -> float:
    """Return how long this thread has waited for a processor; 0 where the kernel does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        return int(file.read_text().split()[1]) / 1e9
    return 0.0


def _since_boot_s() -> float:
    """Return how long the machine was suspended since it started."""
    return time.clock_gettime(_BOOT) - time.clock_gettime(time.CLOCK_MONOTONIC)


_watch: PauseWatch | None = None


def _this() -> PauseWatch:
    global _watch
    if _watch is None:
        _watch = PauseWatch()
    return _watch


def _forget() -> None:
    """Watch anew in a forked process, which has no other threads."""
    global _watch
    _watch = None


os.register_at_fork(after_in_child=_forget)


def running_s() -> float:
    """Return a clock's seconds that stand still while this process is stopped.

    Only differences mean something. The first call begins to watch.
    """
    return time.perf_counter() - stopped_s()


def stopped_s() -> float:
    """Return for how many seconds of the monotonic clock this process was stopped so far."""
    return _this().stopped_s()


def paused_s() -> float:
    """Return for how many seconds this process was stopped, or the machine suspended, so far."""
    return _this().paused_s()


def unpaused(work: Callable[[], Result]) -> Result:
    """Return the result of work during which this process was not stopped; repeat it if it was.

    Raises:
        KdprofError: it was stopped every time.
    """
    for _ in range(TRIES):
        before = paused_s()
        result = work()
        if paused_s() == before:
            return result
    raise KdprofError(
        f"this process was stopped in {TRIES} measurements in a row; measure where it can run"
    )
