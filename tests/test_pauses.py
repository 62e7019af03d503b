"""Time in which a process is stopped does not count; load and Python's lock are no stops."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kdprof import pauses
from kdprof.errors import KdprofError


def stopped(code: str, *, after_s: float, for_s: float) -> dict[str, float]:
    """What a process prints that is stopped after it said it is ready."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(after_s)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(for_s)
        os.kill(process.pid, signal.SIGCONT)
        out = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return dict(zip(("ran", "paused", "passed"), map(float, out.split()), strict=True))


WORK = """
import time
from kdprof import pauses
began, paused, passed = pauses.running_s(), pauses.paused_s(), time.perf_counter()
print("ready", flush=True)
{work}
ran = pauses.running_s() - began
print(ran, pauses.paused_s() - paused, time.perf_counter() - passed)
"""


@pytest.mark.parametrize(
    "work", ["time.sleep(3.5)", "while time.perf_counter() - passed < 3.5: sum(range(1000))"]
)
def test_a_stopped_process_does_not_run(work):
    found = stopped(WORK.format(work=work), after_s=0.5, for_s=2.0)
    assert found["paused"] == pytest.approx(2.0, abs=0.4)
    assert found["ran"] == pytest.approx(found["passed"] - found["paused"], abs=0.1)


@pytest.mark.parametrize(
    ("gap_s", "wakes", "delayed_s", "was"),
    [(8.0, 2, 0.01, True), (2.4, 459, 0.03, False), (2.0, 1, 1.9, False), (1.5, 2, 0.0, True)],
    ids=["stopped", "Python's lock", "no processor", "no schedstat"],
)
def test_what_counts_as_stopped(gap_s, wakes, delayed_s, was):
    assert pauses._was_stopped(gap_s, wakes, delayed_s) is was


def test_a_suspended_machine_pauses_the_process_though_its_clock_stood_still(monkeypatch):
    before, ran = pauses.paused_s(), pauses.running_s()
    began_s = pauses._since_boot_s()
    monkeypatch.setattr(pauses, "_since_boot_s", lambda: began_s + 30.0)
    assert pauses.paused_s() == pytest.approx(before + 30.0, abs=0.1)
    assert pauses.paused_s() == pauses.paused_s()
    assert pauses.running_s() - ran < 1.0


def test_work_during_which_it_was_stopped_is_done_again(monkeypatch):
    moments = iter([0.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr(pauses, "paused_s", lambda: next(moments))
    results = iter(["stopped", "whole"])
    assert pauses.unpaused(lambda: next(results)) == "whole"
    ever = iter(range(100))
    monkeypatch.setattr(pauses, "paused_s", lambda: next(ever))
    with pytest.raises(KdprofError, match="stopped in 5 measurements in a row"):
        pauses.unpaused(lambda: None)


def test_a_forked_process_watches_anew():
    pauses.running_s()
    pid = os.fork()
    if not pid:
        os._exit(0 if pauses._watch is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
