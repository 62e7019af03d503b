"""The study's teacher: trained once, or read from a file of weights and scored once."""

from __future__ import annotations

from kdprof.errors import KdprofError
from kdprof.evaluate import evaluate
from kdprof.hardware.device import autocast
from kdprof.models import AnyNetwork
from kdprof.pauses import running_s
from kdprof.progress import Progress
from kdprof.records import Run
from kdprof.resolve import ResolvedStudy
from kdprof.step_feed import StepFeed
from kdprof.store import RunFolder, Store, write_record
from kdprof.train import checkpoint
from kdprof.train.cells import Cell, new_run
from kdprof.train.loop import TrainingRun, Validation, outcome
from kdprof.train.trained_network import fill


def trained_teacher(study: ResolvedStudy, store: Store, progress: Progress) -> AnyNetwork:
    """Return the study's teacher as steps read it: trained on the first call, loaded later.

    Its cost is in its own record and counts in no method's budget.

    Raises:
        KdprofError: its training failed before the processes restarted, or its weights are damaged.
    """
    folder = store.teacher_folder()
    if (published := study.factory.published_teacher()) is not None:
        network, loaded = published
        if not _is_finished(folder.read_run()):
            with folder.lock():
                miou = _score_teacher(study, folder, network)
            progress.say(f"teacher: {loaded}; mIoU {100 * miou:.2f} %")
        return study.factory.frozen(network)
    if not _is_finished(folder.read_run()):
        with folder.lock():
            run = folder.read_run()
            if study.ranks and study.ranks.restarts and run is not None and run.failure:
                raise KdprofError(f"teacher: {run.failure.reason}")
            if not _is_finished(run):
                return study.factory.frozen(_train_teacher(study, folder, run, progress))
    return study.factory.frozen(_read_teacher(study, folder))


def _cell(study: ResolvedStudy, iterations: int) -> Cell:
    return Cell.teacher(study.teacher_training.method, iterations)


def _is_finished(run: Run | None) -> bool:
    return run is not None and run.finished


def _train_teacher(
    study: ResolvedStudy, folder: RunFolder, run: Run | None, progress: Progress
) -> AnyNetwork:
    study.factory.forget_steps()
    step = study.factory.teacher_step()
    training = TrainingRun(
        folder=folder,
        run=run or new_run(study, _cell(study, study.teacher_training.iterations), None),
        feed=StepFeed(step, study.factory.batches(0, "teacher")),
        settings=study.training,
        validation=Validation.of(study, "teacher"),
        meter=study.hardware.energy_meter(),
    )
    progress.say(f"teacher: {outcome(training.train(progress, 'teacher'))}")
    assert isinstance(step.student, AnyNetwork), "the factory built it"
    return step.student


def _score_teacher(study: ResolvedStudy, folder: RunFolder, network: AnyNetwork) -> float:
    """Write the record of a teacher whose weights were given, and return its mIoU."""
    began, data = running_s(), study.data.val("teacher")
    found = evaluate(
        network,
        data,
        study.device,
        batch=study.evaluation.batch,
        autocast=autocast(study.device, "fp32"),
        views=study.data.views,
        absent_classes=study.evaluation.absent_classes,
        advance=lambda images: folder.renew_lease(),
    )
    run = new_run(study, _cell(study, 0), None)
    scores = {
        "miou": found.miou,
        "best_miou": found.miou,
        "miou_per_class": dict(zip(data.class_names, found.per_class, strict=True)),
        "eval_s": running_s() - began,
        "finished": True,
    }
    write_record(folder.record, run.model_copy(update=scores))
    return found.miou


def _read_teacher(study: ResolvedStudy, folder: RunFolder) -> AnyNetwork:
    """Return the trained teacher.

    Raises:
        KdprofError: its weights are missing, damaged or of another iteration.
    """
    state, damage = checkpoint.load(folder)
    run = folder.read_run()
    iterations = None if run is None else run.iterations
    reached = None if state is None else state.get("iteration")
    if state is None or damage is not None or reached != iterations:
        other = f"{folder.checkpoint} is of iteration {reached}, the teacher has {iterations}"
        cause = damage or (f"{folder.checkpoint} is gone" if state is None else other)
        raise KdprofError(f"{cause}; delete {folder.path} to train the teacher again")
    teacher = study.factory.placed_teacher()
    fill(teacher, folder, state)
    return teacher
