"""The Cost of a study's method: its TrainStep, in turn with the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdprof.data import is_drawn
from kdprof.device import versions
from kdprof.measure.clock import clock_of
from kdprof.measure.latency import Report
from kdprof.measure.session import Files, Surroundings, run_session
from kdprof.measure.subject import StudySubject
from kdprof.parallel import Ranks
from kdprof.records import REFERENCE, Cost
from kdprof.resolve import ResolvedStudy
from kdprof.study import Study

DRAWN = "images were drawn in place of the data set's files: loading them is not in these times"


def measure_method(
    study: Mapping[str, Any],
    name: str,
    files: Mapping[str, str | None],
    parent: int | None,
    report: Report,
    ranks: Ranks | None = None,
) -> Cost:
    """Measure one method of a study in this process, which is rank 0 where it has others. All
    arguments but the last two are JSON-able.

    Args:
        study: a dumped Study.
        name: of the method.
        files: fields of :class:`~kdprof.measure.session.Files`.
        parent: process that asked, which is no stranger on the device; None where it is this one.
    """
    resolved = ResolvedStudy(Study.model_validate(study), parent=parent, weights=False, ranks=ranks)
    return measure_here(
        resolved,
        name,
        Files.from_json(files),
        report,
    )


def measure_here(study: ResolvedStudy, name: str, files: Files, report: Report) -> Cost:
    """Measure one method of a resolved study in this process."""
    clock = clock_of(study.device)
    batches = study.batches(seed=0)
    resident = batches.batch(0, study.device)
    needs_teacher = study.methods[name].cls.needs_teacher()
    # The reference reads no teacher: only a method that does may have one in its memory.
    teacher = study.frozen(study.placed_teacher()) if needs_teacher else None
    step = study.step(name, teacher)
    subject = StudySubject(step, resident, batches, clock)

    def build_reference() -> StudySubject:
        return StudySubject(study.step(REFERENCE, None), resident, batches, clock)

    fields = run_session(
        subject,
        None if name == REFERENCE else build_reference,
        device=study.device,
        hardware=study.hardware,
        settings=study.study.measure,
        around=Surroundings(REFERENCE, study.study.step.precision),
        files=files,
        report=report,
    )
    fields["warnings"] += step.method.notes
    if is_drawn(study.study.data):
        fields["warnings"].append(DRAWN)
    return Cost(
        method=name,
        gpus=study.study.step.gpus,
        key=study.cost_key(name),
        settings=study.cost_settings(name),
        versions=versions(),
        **fields,
    )
