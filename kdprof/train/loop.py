"""One run: the training loop with its ledger, log, curve and checkpoints."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdprof.data import ENDLESS, SegmentationData
from kdprof.data.scenario import Role
from kdprof.distributed.ranks import lost_contact
from kdprof.errors import KdprofError
from kdprof.evaluate import WHOLE, Views, evaluate, mean_iou
from kdprof.hardware.base import EnergyMeter
from kdprof.hardware.device import synchronize
from kdprof.models import AnyNetwork
from kdprof.pauses import paused_s, running_s
from kdprof.progress import Advance, Progress
from kdprof.records import Cost, CurvePoint, Failure, LogLine, Run
from kdprof.resolve import ResolvedStudy
from kdprof.step_feed import StepFeed
from kdprof.store import Lost, RunFolder, append_line, read_lines, write_atomic, write_record
from kdprof.study import TrainingSettings
from kdprof.train import checkpoint
from kdprof.train.ledger import Ledger
from kdprof.train.loggers import Logger, open_loggers
from kdprof.train.pace import Spending, pace_of
from kdprof.train.trunk import Trunk

STARTUP_ITERATIONS = 2
"""The first steps of a process, in which torch compiles and searches for algorithms."""
STEPS_AHEAD = 2
"""Steps that the host may be ahead of the device if the clock ends the run."""
AnyLine = TypeVar("AnyLine", CurvePoint, LogLine)


class Interrupted(KdprofError):
    """The user or the system stopped the run; it was saved."""

    exit_code = 130


class NotFinite(KdprofError):
    """A loss term is NaN or infinite."""

    def __init__(self, message: str, iteration: int, term: str):
        super().__init__(message)
        self.iteration, self.term = iteration, term


class StopSignal:
    """A flag that SIGINT and SIGTERM set and that the loop reads between steps."""

    def __init__(self) -> None:
        self.raised = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch the signals while the body runs."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)


@dataclass(frozen=True)
class Validation:
    """The data that a run is scored on, and how often.

    Attributes:
        points: evaluations per run.
        class_groups: groups of classes over which mIoU is also reported.
    """

    data: SegmentationData
    batch: int
    points: int
    class_groups: Mapping[str, Collection[str]]
    views: Views = WHOLE

    @classmethod
    def of(cls, study: ResolvedStudy, role: Role) -> Validation:
        """Return the validation of one of a study's networks."""
        evaluation, groups = study.evaluation, {}
        if role == "student" and study.scenario:
            groups = study.scenario.groups()
        data = study.data.val(role)
        return cls(data, evaluation.batch, evaluation.points, groups, study.data.views)


@dataclass(kw_only=True)
class TrainingRun:
    """One training of a step to its end, from the state that its folder has.

    Attributes:
        run: the record, which has the plan; the results are added to it.
        validation: None for a trunk, which is never scored.
        cost: of the run's method; None for the teacher.
        meter: the device's energy counter.
        trunk: where the run begins if its folder is empty.
        marks: iterations at which the state is kept for branches; only a trunk has them.
        done: iterations made.
        losses: unweighted terms of the last step that the host has waited for.
    """

    folder: RunFolder
    run: Run
    feed: StepFeed
    settings: TrainingSettings
    validation: Validation | None = None
    cost: Cost | None = None
    meter: EnergyMeter | None = None
    trunk: Trunk | None = None
    marks: Collection[int] = ()

    def __post_init__(self) -> None:
        self.step, self.done = self.feed.step, 0
        self.losses: dict[str, float] = {}
        self._marks = set(self.marks)
        self._evaluated: set[int] = set()
        self._reached = 0
        """The last stop that was processed, in planned iterations."""
        self._waited_before_s = 0.0
        """Data waits of earlier processes."""
        self._paused_s = paused_s()
        self._loggers: list[Logger] = []
        self._stop = StopSignal()
        self._stretch = _Stretch(self.meter)
        self._waiting: list[dict[str, Tensor]] = []
        """Loss terms of the stretch's steps, on the device."""
        self._startup_left = STARTUP_ITERATIONS

    def train(self, progress: Progress, label: str, left: str = "") -> Run:
        """Train to the end and return the finished record.

        Args:
            label: its name in messages and in the progress bar.
            left: what the progress bar adds about the runs that follow.

        Raises:
            Interrupted: a signal was received; everything is saved.
            NotFinite: a loss is no longer finite.
            Lost: this process was stopped for so long that another one has taken the run, and may
                have finished it; nothing was saved since.
            KdprofError: no checkpoint can be read.
        """
        self._resume(progress)
        self.pace = pace_of(self.run, self.cost, Spending(self._spent_s, self._spent_j))
        with (
            self._stop.watching(),
            progress.task(label + left, self.run.iterations, self.done) as advance,
        ):
            self._save_record()
            self._open_loggers()
            # Endless: a run that exceeds its plan would otherwise run out of batches.
            last = self.run.iterations if self.pace.is_counted else ENDLESS
            self.feed.begin(self.done, last)
            try:
                for stop in self._stops():
                    self._train_until(stop, advance)
                    self._at_stop(stop, progress, label)
                    self._leave_if_asked()
            except (Interrupted, Lost):
                raise
            except Exception as error:
                if not lost_contact(error):
                    with suppress(Lost):
                        self._fail(error)
                if not isinstance(error, NotFinite):
                    self.step.lead.give_up(error)
                raise
            finally:
                self.feed.close()
                self._close_loggers()
        return self.run

    def _stops(self) -> list[int]:
        """Return the stops that are left, where training pauses, in planned iterations."""
        stops = self._marks | {self.run.iterations}
        if self.validation is not None:
            points = self.validation.points
            stops |= {math.ceil(self.run.iterations * k / points) for k in range(1, points + 1)}
        return sorted(stop for stop in stops if stop > self._reached)

    def _at_stop(self, stop: int, progress: Progress, label: str) -> None:
        if self.validation is not None:
            point = self._evaluate(self.validation)
            progress.detail(f"{label}: {_summary(point)}")
        self._reached = stop
        if self.done in self._marks:
            # First: a crash before the checkpoint leads here again, one after it does not.
            with self._booked("checkpoint"):
                self.folder.renew_lease()
                checkpoint.write(self.folder.mark(self.done), self._state())
        self._checkpoint()

    # Resuming

    def _resume(self, progress: Progress) -> None:
        state, damage = checkpoint.recover(self.folder)
        if damage is not None:
            progress.say(f"{damage}; continuing from the previous checkpoint")
        if state is not None:
            self._restore(state)
            planned = self.run
            self.run = Run.model_validate(state["run"])
            self.run = self.run.model_copy(
                update={"concurrent_runs": _most(planned.concurrent_runs, self.run.concurrent_runs)}
            )
            if self._marks:  # a trunk may grow; any other run keeps its length
                planned_s = planned.train_s.planned
                changes = {
                    "iterations": planned.iterations,
                    "schedule_iterations": planned.schedule_iterations,
                    "train_s": self.run.train_s.model_copy(update={"planned": planned_s}),
                    "finished": False,
                }
                self.run = self.run.model_copy(update=changes)
            self._evaluated, self._reached = set(state["evaluated"]), state["reached"]
        self.ledger = Ledger(self.folder.ledger)
        self.ledger.rewind(self.done, self._evaluated)
        # A score that is not in the checkpoint is not in the record either: it is computed again.
        self._keep(self.folder.curve, CurvePoint, lambda p: p.iteration in self._evaluated)
        self._keep(self.folder.log, LogLine, lambda line: line.iteration <= self.done)
        if state is None and self.trunk is not None:
            self._branch_off(self.trunk)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.step.load_state_dict(state["step"])
        self.done, self.losses = state["iteration"], state["losses"]
        self._waited_before_s = state["waited_s"]

    def _branch_off(self, trunk: Trunk) -> None:
        state = checkpoint.read(trunk.state)
        self._restore(state)
        self._reached = self.done
        if not self.ledger.spent_s["trunk"]:  # booked already before a crash
            spent = Run.model_validate(state["run"])
            self.ledger.book("trunk", 0, spent.train_s.actual, spent.energy_j)

    @staticmethod
    def _keep(path: Path, kind: type[AnyLine], wanted: Any) -> None:
        """Keep the wanted lines of a file; the others will be written again."""
        lines = read_lines(path, kind)
        kept = [line for line in lines if wanted(line)]
        if path.exists():
            text = "".join(line.model_dump_json(by_alias=True) + "\n" for line in kept)
            write_atomic(path, text)

    # The loop

    def _train_until(self, stop: int, advance: Advance) -> None:
        """Train to a stop; the log, checkpoints and the stop signal interrupt between steps."""
        throttle = None if self.pace.is_counted else _Throttle(self.step.device)
        synchronize(self.step.device)
        self._stretch.begin()
        saved_at = running_s()
        while not self.pace.reached(stop, self.done):
            position = self.pace.position(self.done)
            self._waiting.append(self.feed.advance(self.done, position=position))
            self.done += 1
            advance(1)
            if throttle is not None:
                throttle.wait()
            if len(self._waiting) in (self._startup_left, self.settings.log_every):
                self._book_training()
            due = running_s() - saved_at > self.settings.checkpoint_every_s
            if self._stop.raised or (due and not self.pace.reached(stop, self.done)):
                self._book_training()
                self._checkpoint()
                self._leave_if_asked()
                saved_at = running_s()
                self._stretch.begin()
        self._book_training()
        self._stretch.pause()

    def _book_training(self) -> None:
        """Book the training since the last call, and write a line of the log.

        This is the only place where the host waits for the device.
        """
        if not self._waiting:
            return
        synchronize(self.step.device)
        seconds, joules = self._stretch.seconds(), self._stretch.joules()
        self.folder.renew_lease()  # before anything is written
        share = self._training_share(seconds)
        self.ledger.book("train", self.done, share * seconds, _part(joules, share))
        self._book_pauses()
        if share < 1:
            rest = 1 - share
            self.ledger.book("startup", self.done, rest * seconds, _part(joules, rest))
        self._startup_left = max(0, self._startup_left - len(self._waiting))
        self.losses = self._finite()
        self._waiting.clear()
        self._log()
        self._stretch.begin()

    def _book_pauses(self) -> None:
        """Book for how long this process was stopped since the last call: no training time."""
        before, self._paused_s = self._paused_s, paused_s()
        if self._paused_s > before:
            self.ledger.book("paused", self.done, self._paused_s - before)

    def _training_share(self, seconds: float) -> float:
        """Return the share of the stretch that is training; the rest is start-up.

        In the first steps of a process, it is what exceeds their planned seconds. Its joules are
        divided as its seconds are: the counter does not tell what they were used for.
        """
        planned_s = self.run.train_s.planned
        if not self._startup_left or self.run.startup == "counted" or not planned_s:
            return 1.0
        steps_s = len(self._waiting) * planned_s / self.run.iterations
        return 1.0 if seconds <= steps_s else steps_s / seconds

    def _finite(self) -> dict[str, float]:
        """Return the last step's terms.

        Raises:
            NotFinite: a term of any waiting step is not finite.
        """
        names = list(self._waiting[-1])
        rows = torch.stack([torch.stack([step[name] for name in names]) for step in self._waiting])
        values = rows.double().cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            iteration, term = self.done - len(self._waiting) + row, names[column]
            raise NotFinite(
                f"{self.run.label()}: {term} is "
                f"{values[row, column]:g} at iteration {iteration}; lower step.learning_rate or "
                "use bf16",
                iteration,
                term,
            )
        return dict(zip(names, values[-1].tolist(), strict=True))

    # What counts now is what will be booked: else start-up would spend the budget until then.

    def _spent_s(self) -> float:
        seconds = self._stretch.seconds()
        return self.ledger.useful_s() + self._training_share(seconds) * seconds

    def _spent_j(self) -> float:
        share = self._training_share(self._stretch.seconds())
        return (self.ledger.energy_j() or 0.0) + share * (self._stretch.joules() or 0.0)

    # Work that does not count as training time

    @contextmanager
    def _booked(self, kind: str) -> Iterator[None]:
        began = running_s()
        yield
        self.ledger.book(kind, self.done, running_s() - began)
        self._book_pauses()

    def _open_loggers(self) -> None:
        with self._booked("logging"):
            names = self.settings.loggers
            self._loggers = open_loggers(names, self.folder.path, self.run.label(), self.done)

    def _close_loggers(self) -> None:
        for logger in self._loggers:
            logger.close()

    def _send_to_loggers(self, scalars: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.add(self.done, scalars)

    def _log(self) -> None:
        with self._booked("logging"):
            line = LogLine(
                iteration=self.done,
                train_s=self.ledger.useful_s(),
                losses=self.losses,
                learning_rate=self._learning_rate(),
            )
            append_line(self.folder.log, line)
            losses = {f"loss/{name}": value for name, value in self.losses.items()}
            rest = {"learning_rate": line.learning_rate, "train_s": line.train_s}
            self._send_to_loggers(losses | rest)

    def _learning_rate(self) -> float:
        return self.step.learning_rate(self.pace.position(self.done - 1))

    def _leave_if_asked(self) -> None:
        if self._stop.raised and not self.run.finished:
            raise Interrupted(
                f"stopped at iteration {self.done} of {self.run.iterations}, saved in "
                f"{self.folder.path}; run the same command again to continue"
            )

    def _evaluate(self, validation: Validation) -> CurvePoint:
        with self._booked("eval"):
            found = evaluate(
                self.step.student,
                validation.data,
                self.step.device,
                batch=validation.batch,
                autocast=self.step.autocast(),
                decide=self.step.method.decide if self.step.method.decides() else None,
                views=validation.views,
                absent_classes=self.run.absent_classes,
                advance=lambda images: self.folder.renew_lease(),
            )
            point = CurvePoint(
                iteration=self.done,
                train_s=self.ledger.useful_s(),
                miou=found.miou,
                losses=self.losses,
                learning_rate=self._learning_rate(),
            )
            append_line(self.folder.curve, point)
        with self._booked("logging"):
            self._send_to_loggers({"miou": found.miou})
        self._evaluated.add(self.done)
        per_class = dict(zip(validation.data.class_names, found.per_class, strict=True))
        self.run = self.run.model_copy(
            update={
                "miou": found.miou,
                "miou_per_class": per_class,
                "miou_of": {
                    group: mean_iou(per_class[name] for name in names)
                    for group, names in validation.class_groups.items()
                },
                "best_miou": max(found.miou, self.run.best_miou or 0.0),
            }
        )
        return point

    def _state(self) -> dict[str, Any]:
        student = self.step.student
        assert isinstance(student, AnyNetwork), "the factory built it"
        return {
            "preprocessing": vars(student.preprocessing),
            "iteration": self.done,
            "reached": self._reached,
            "waited_s": self._waited_before_s + self.feed.waited_s,
            "losses": self.losses,
            "evaluated": sorted(self._evaluated),
            "run": self._record().model_dump(mode="json", by_alias=True),
            "step": self.step.state_dict(),
        }

    def _checkpoint(self) -> None:
        """Save everything, then the record; its time is booked separately."""
        with self._booked("checkpoint"):
            self.folder.renew_lease()
            checkpoint.save(self.folder, self._state())
        self._save_record()

    def _record(self) -> Run:
        """Return the record as of now."""
        spent_s, each = self.ledger.spent_s, self.cost and self.cost.flop_per_iteration()
        energy_j = self.ledger.energy_j()
        unavailable = dict(self.run.unavailable)
        if self.cost is not None and each is None:
            unavailable["flop"] = self.cost.why_no_flop()
        if energy_j is not None:
            unavailable.pop("energy_j", None)
        return self.run.model_copy(
            update={
                "iterations_done": self.done,
                "train_s": self.run.train_s.model_copy(update={"actual": self.ledger.useful_s()}),
                "trunk_s": spent_s["trunk"],
                "startup_s": spent_s["startup"],
                "eval_s": spent_s["eval"],
                "checkpoint_s": spent_s["checkpoint"],
                "logging_s": spent_s["logging"],
                "data_wait_s": self._waited_before_s + self.feed.waited_s,
                "lost_s": spent_s["lost"],
                "paused_s": spent_s["paused"],
                "flop": each * self.done if each else None,
                "energy_j": energy_j,
                "unavailable": unavailable,
                "finished": self._reached >= self.run.iterations,
                "failure": None,
            }
        )

    def _save_record(self) -> None:
        self.run = self._record()
        write_record(self.folder.record, self.run)

    def _fail(self, error: Exception) -> None:
        """Write into the record why the run ended; the checkpoint does not change.

        Raises:
            Lost: the record is another process's now.
        """
        self.folder.renew_lease()
        saved = None
        with suppress(KdprofError):
            state, _ = checkpoint.load(self.folder)
            saved = state and state["iteration"]
        iteration, term = self.done, None
        if isinstance(error, NotFinite):
            iteration, term = error.iteration, error.term
        failure = Failure(
            iteration=iteration,
            term=term,
            reason=" ".join(str(error).split()) or type(error).__name__,
            checkpoint_iteration=saved,
        )
        self.run = self._record().model_copy(update={"failure": failure})
        with suppress(OSError):  # a full disk may be the reason; the error itself is still raised
            write_record(self.folder.record, self.run)


class _Stretch:
    """A stretch of training, measured by the clock and by the device's energy counter."""

    def __init__(self, meter: EnergyMeter | None):
        self.meter = meter
        self._began: float | None = None
        self._joules: float | None = None

    def begin(self) -> None:
        self._joules = self.meter.read_j() if self.meter else None
        self._began = running_s()

    def pause(self) -> None:
        self._began, self._joules = None, None

    def seconds(self) -> float:
        return 0.0 if self._began is None else running_s() - self._began

    def joules(self) -> float | None:
        now = self.meter.read_j() if self.meter else None
        return None if now is None or self._joules is None else now - self._joules


class _Throttle:
    """Keeps the host at most a few steps ahead of the device, without draining the device."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._events: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """Record a step that was queued; wait for the one :data:`STEPS_AHEAD` before it."""
        if not self._cuda:
            return
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            self._events.popleft().synchronize()


def _part(amount: float | None, share: float) -> float | None:
    return None if amount is None else share * amount


def _most(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


def _summary(point: CurvePoint) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in point.losses.items())
    return f"iteration {point.iteration}: mIoU {100 * point.miou:.2f} %; {losses}"


def _over(run: Run) -> str:
    """Return which classes an mIoU leaves out, for a message."""
    scored = run.classes_scored()
    if scored is None or scored[0] == scored[1]:
        return ""
    return f" over {scored[0]} of {scored[1]} classes"


def outcome(run: Run) -> str:
    """Return the score and the time of a finished run, in one line."""
    drift = run.train_s.drift()
    deviation = "" if drift is None else f" ({drift:+.1%} of plan)"
    paused = f"; it was stopped for {run.paused_s:.1f} s, off the clock" if run.paused_s else ""
    return (
        f"mIoU {100 * (run.miou or 0):.2f} %{_over(run)} after {run.iterations_done} iterations, "
        f"{run.train_s.actual:.1f} s{deviation}{paused}"
    )
