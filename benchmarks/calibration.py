"""Check the measurement: A/A tests and injected delays, on simulated machines and on this one.

    python benchmarks/calibration.py [--repeats 400] [--real-repeats 30]

A/A: a step compared with itself must be called different in at most 5 % of the repeats. Injected
delays: a step that takes 2, 5 or 20 % longer must be estimated as that much longer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from simulated import MACHINES, QuietHardware, measure_simulated, quiet

from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import CpuClock
from kdprof.measure.latency import Session, Stopwatch, time_interleaved
from kdprof.measure.user_step import CallableSubject
from kdprof.stats.intervals import Numbers, paired_ratio
from kdprof.study import MeasureSettings

DELAYS = (0.02, 0.05, 0.20)
BASE_S = 0.01
"""Latency of the step that is delayed."""


@dataclass(frozen=True)
class Repeats:
    """Intervals of one ratio from repeated measurements, and the true ratio."""

    truth: float
    intervals: list[Numbers]
    rounds: list[int]

    def missed(self) -> float:
        """Return the share of intervals that do not contain the truth; it should be 5 %."""
        return float(np.mean([not low <= self.truth <= high for _, low, high in self.intervals]))

    def called_different(self) -> float:
        """Return the share of intervals that exclude 1."""
        return float(np.mean([not low <= 1 <= high for _, low, high in self.intervals]))

    def error_points(self) -> float:
        """Return the typical error of the estimate, percentage points."""
        errors = [abs(median - self.truth) for median, _, _ in self.intervals]
        return 100 * float(np.median(errors))

    def width_points(self) -> float:
        """Return the typical width of an interval, percentage points."""
        return 100 * float(np.median([high - low for _, low, high in self.intervals]))


def _ratio(session: Session) -> Numbers:
    return paired_ratio(*(samples.rounds for samples in session.samples))


def simulated(machine: str, delay: float, repeats: int, **settings: float) -> Repeats:
    """Measure a step delayed by a fraction of its time, on fresh simulated machines."""
    found = []
    for seed in range(repeats):
        noise = MACHINES[machine](np.random.default_rng(seed))
        latencies = {"delayed": BASE_S * (1 + delay), "base": BASE_S}
        session, _ = measure_simulated(latencies, noise, **settings)
        found.append((_ratio(session), session.rounds))
    return Repeats(1 + delay, [ratio for ratio, _ in found], [rounds for _, rounds in found])


def on_a_quiet_clock(delay: float) -> float:
    """Return the estimated ratio on a machine without noise."""
    session, _ = measure_simulated({"delayed": BASE_S * (1 + delay), "base": BASE_S}, quiet())
    return _ratio(session)[0]


def _spin(seconds: float) -> None:
    """Keep the core busy for some time; its clock would fall if it slept."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def _real_step(delay_s: float) -> Callable[[], None]:
    """Return a training step of a small convolution net, with a delay of known length."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 24, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(24, 8, 3, padding=1)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    images = torch.randn(4, 3, 96, 96)

    def step() -> None:
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        _spin(delay_s)

    return step


def real(delay: float, repeats: int, max_time_s: float) -> Repeats:
    """Measure a real step with a delay injected, on this machine's clock.

    The delay is a fraction of the base step, which is timed right before each repeat; the truth is
    as exact as that timing.
    """
    clock, settings = CpuClock(), MeasureSettings(max_time_s=max_time_s, precision_target=0.01)
    found, truths = [], []
    for _ in range(repeats):
        base = _real_step(0.0)
        delay_s = delay * _median_s(base)
        subjects = CallableSubject("delayed", _real_step(delay_s)), CallableSubject("base", base)
        session = time_interleaved(
            [Stopwatch(subject, clock, QuietHardware()) for subject in subjects],
            settings,
            clock=clock,
            canary=CanaryKernel(torch.device("cpu"), clock),
        )
        median, low, high = _ratio(session)
        # The true ratio follows from the base step's own latency in the same rounds.
        own = float(np.median([np.median(block) for block in session.samples[-1].rounds]))
        truth = 1 + delay_s / own
        truths.append(truth)
        found.append((tuple(v / truth * (1 + delay) for v in (median, low, high)), session.rounds))
    return Repeats(1 + delay, [ratio for ratio, _ in found], [rounds for _, rounds in found])


def _median_s(step: Callable[[], None], count: int = 20) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def lines(repeats: int, real_repeats: int, max_time_s: float) -> Iterator[str]:
    """Yield the table line by line."""
    yield f"{'machine':12} {'injected':>8} {'called different':>17} {'truth missed':>13}" + (
        f" {'error':>8} {'interval':>9} {'rounds':>7}"
    )
    for delay in DELAYS:
        estimate = 100 * (on_a_quiet_clock(delay) - 1)
        yield f"{'quiet':12} {delay:8.0%} {'':17} {'':13} {estimate - 100 * delay:5.2f} pp"
    cases = [(machine, repeats) for machine in MACHINES] + [("this one", real_repeats)]
    for machine, count in cases:
        for delay in (0.0, *DELAYS):
            made = (
                real(delay, count, max_time_s)
                if machine == "this one"
                else simulated(machine, delay, count, max_time_s=10)
            )
            yield (
                f"{machine:12} {delay:8.0%} {made.called_different():17.1%} {made.missed():13.1%}"
                f" {made.error_points():5.2f} pp {made.width_points():6.2f} pp"
                f" {np.median(made.rounds):7.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--real-repeats", type=int, default=30)
    parser.add_argument("--max-time", type=float, default=4.0, help="seconds per real measurement")
    given = parser.parse_args()
    for line in lines(given.repeats, given.real_repeats, given.max_time):
        print(line, flush=True)


if __name__ == "__main__":
    main()
