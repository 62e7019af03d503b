"""Measure what marking the phases of a step costs: a step with marks against one without.

    python benchmarks/overhead.py [--study quickstart] [--method cwd] [--max-time 60]

Both are interleaved in one process, as in `kdprof measure`; the ratio must stay below 1.01. The
study is a preset or a TOML file. The sum of the phases is compared with the step without marks.
"""

from __future__ import annotations

import argparse

import numpy as np

from kdprof.measure.canary import CanaryKernel
from kdprof.measure.clock import Clock, Stamps, clock_of
from kdprof.measure.latency import Stopwatch, time_interleaved
from kdprof.measure.study_step import StudySubject
from kdprof.resolve import ResolvedStudy
from kdprof.stats.intervals import drift_of, paired_ratio, relative_width
from kdprof.step import PHASES, Mark, ignore_phase
from kdprof.step_feed import StepFeed
from kdprof.study import MeasureSettings, load_study


class Unmarked(StudySubject):
    """The same step without marks of its phases."""

    phases = ()

    def run(self, mark: Mark) -> dict:
        return super().run(ignore_phase)


def subjects(study: ResolvedStudy, name: str) -> list[StudySubject]:
    """Return the step of a method twice: with marks and without."""
    factory = study.factory
    batches = factory.batches(seed=0)
    resident = batches.batch(0, study.device)
    found = []
    for kind, label in ((StudySubject, "marked"), (Unmarked, "unmarked")):
        reads_teacher = study.methods[name].cls.needs_teacher()
        teacher = factory.placed_teacher() if reads_teacher else None
        feed = StepFeed(factory.step(name, teacher), batches, resident)
        subject = kind(feed, loads=False)
        subject.name = label
        found.append(subject)
    return found


def marks_s(clock: Clock, repeats: int = 2000) -> float:
    """Return the host's seconds that the marks add to one step."""
    began = clock.now()
    for _ in range(repeats):
        stamps: Stamps = [("", clock.stamp())]
        for phase in PHASES:
            stamps.append((phase, clock.stamp()))
    return (clock.now() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--method", default="cwd")
    parser.add_argument("--max-time", type=float, default=60.0)
    parser.add_argument("--precision-target", type=float, default=0.005)
    given = parser.parse_args()
    study = ResolvedStudy(load_study(given.study, {}))
    settings = MeasureSettings(
        max_time_s=given.max_time, precision_target=given.precision_target, steps=3
    )
    clock = clock_of(study.device)
    session = time_interleaved(
        [Stopwatch(s, clock, study.hardware) for s in subjects(study, given.method)],
        settings,
        clock=clock,
        canary=CanaryKernel(study.device, clock),
    )
    marked, unmarked = session.samples
    ratio = paired_ratio(marked.rounds, unmarked.rounds)
    sums = [sum(phases.values()) for block in marked.blocks for phases in block.phases_s]
    drift, steady = drift_of(session.canary_s, settings.precision_target)
    alone = float(np.median(np.concatenate(unmarked.rounds)))
    print(f"{given.method} of {given.study} on {study.hardware.name}, {session.rounds} rounds")
    print(f"step, marked / unmarked: {ratio[0]:.4f} [{ratio[1]:.4f}-{ratio[2]:.4f}], aim < 1.01")
    print(f"interval {relative_width(ratio):.2%} wide; {session.stopped}")
    added = marks_s(clock)
    print(f"the marks alone: {1e6 * added:.1f} us of host time per step, {added / alone:.4%} of it")
    print(f"sum of the phases / unmarked step: {np.median(sums) / alone:.4f}, aim 0.98-1.02")
    print(f"canary drifted {drift:.1%} ({'steady' if steady else 'NOT steady'})")


if __name__ == "__main__":
    main()
