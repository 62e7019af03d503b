"""One run: the loop, its ledger, its curve, its checkpoints."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TypeVar

from torch import Tensor

from kdprof.data import Batches, SegmentationData
from kdprof.device import synchronize
from kdprof.errors import KdprofError
from kdprof.progress import Advance, Progress
from kdprof.records import CurvePoint, LedgerEntry, Run
from kdprof.step import TrainStep
from kdprof.store import RunFolder, append_line, write_atomic, write_record
from kdprof.study import EvaluationSettings
from kdprof.train import checkpoint
from kdprof.train.evaluate import evaluate, mean_iou

CHECKPOINT_EVERY_S = 600.0
AnyEntry = TypeVar("AnyEntry", CurvePoint, LedgerEntry)


class Interrupted(KdprofError):
    """The user or the system asked the run to stop; it was saved."""

    exit_code = 130


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps."""

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


class TrainingRun:
    """One training of a step to its end, from wherever its folder says it got to."""

    def __init__(
        self,
        folder: RunFolder,
        run: Run,
        step: TrainStep,
        batches: Batches,
        val_data: SegmentationData,
        settings: EvaluationSettings,
        flop_per_iteration: float | None,
        class_groups: Mapping[str, Collection[str]] = MappingProxyType({}),
    ):
        self.folder, self.run, self.step = folder, run, step
        self.batches, self.val_data, self.settings = batches, val_data, settings
        self.flop_per_iteration = flop_per_iteration
        self.class_groups = class_groups
        self.done = 0
        self.losses: dict[str, float] = {}
        """Unweighted terms of the last step that was waited for."""
        self.spent_s: Counter[str] = Counter()
        """Sums of the ledger, by kind of entry."""
        self._evaluated: set[int] = set()
        self._stop = StopSignal()
        points = settings.points
        self._stops = sorted({math.ceil(run.iterations * k / points) for k in range(1, points + 1)})

    def train(self, progress: Progress, label: str) -> Run:
        """Train to the end and return the finished record.

        Raises:
            Interrupted: a signal came; everything is saved.
            KdprofError: the loss is no longer finite, or no checkpoint can be read.
        """
        self._resume(progress)
        with (
            self._stop.watching(),
            progress.task(label, self.run.iterations, self.done) as advance,
        ):
            self._save_record()
            for stop in (s for s in self._stops if s not in self._evaluated):
                self._train_until(stop, advance)
                point = self._evaluate()
                self._checkpoint()
                progress.detail(f"{label}: {_told(point)}")
                self._leave_if_asked()
        return self.run

    def _resume(self, progress: Progress) -> None:
        state, damage = checkpoint.load(self.folder)
        if damage is not None:
            progress.say(f"{damage}; continuing from the one before")
        if state is not None:
            self.step.load_state_dict(state["step"])
            self.done = state["iteration"]
            self.losses = state["losses"]
            self.run = Run.model_validate(state["run"])
            self._evaluated = set(state["evaluated"])
        # An evaluation that the checkpoint does not know is made again, the one at its own
        # iteration too: its score is not in the record.
        curve = [p for p in self.folder.read_curve() if p.iteration in self._evaluated]
        self._forget(self.folder.curve, curve)
        for entry in self._forget(self.folder.ledger, self.folder.read_ledger()):
            self.spent_s[entry.kind] += entry.seconds

    def _forget(self, path: Path, entries: list[AnyEntry]) -> list[AnyEntry]:
        """Drop what was logged after the checkpoint: that work is done again."""
        kept = [entry for entry in entries if entry.iteration <= self.done]
        if path.exists():
            lines = [entry.model_dump_json(by_alias=True) + "\n" for entry in kept]
            write_atomic(path, "".join(lines))
        return kept

    def _train_until(self, stop: int, advance: Advance) -> None:
        """Train to an iteration; checkpoints and the stop signal interrupt between steps."""
        batches = self.batches.iterate(self.done, stop)
        losses: dict[str, Tensor] = {}
        synchronize(self.step.device)
        began = time.perf_counter()
        start = self.done
        try:
            for images, labels in batches:
                losses = self.step(images, labels, self.done)
                self.done += 1
                advance(1)
                due = time.perf_counter() - began > CHECKPOINT_EVERY_S
                if self._stop.raised or (due and self.done < stop):
                    self._book_training(began, losses)
                    self._checkpoint()
                    self._leave_if_asked()
                    began, start = time.perf_counter(), self.done
        finally:
            batches.close()
        if self.done > start:
            self._book_training(began, losses)

    def _book_training(self, began: float, losses: dict[str, Tensor]) -> None:
        synchronize(self.step.device)
        self._book("train", time.perf_counter() - began)
        self.losses = self._finite({name: float(value) for name, value in losses.items()})

    def _book(self, kind: str, seconds: float) -> None:
        self.spent_s[kind] += seconds
        entry = LedgerEntry(kind=kind, iteration=self.done, seconds=seconds)
        append_line(self.folder.ledger, entry)

    def _leave_if_asked(self) -> None:
        if self._stop.raised:
            raise Interrupted(
                f"stopped at iteration {self.done} of {self.run.iterations}, saved in "
                f"{self.folder.path}; run the same command again to continue"
            )

    def _finite(self, losses: dict[str, float]) -> dict[str, float]:
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise KdprofError(
                f"{self.run.method} {self.run.budget} seed {self.run.seed}: {', '.join(bad)} is "
                f"not finite at iteration {self.done}; lower step.learning_rate or use bf16"
            )
        return losses

    def _evaluate(self) -> CurvePoint:
        began = time.perf_counter()
        found = evaluate(
            self.step.student,
            self.val_data,
            self.step.device,
            batch=self.settings.batch,
            autocast=self.step.autocast(),
            decide=self.step.method.decide,
        )
        seconds = time.perf_counter() - began
        point = CurvePoint(
            iteration=self.done,
            train_s=self.spent_s["train"],
            miou=found.miou,
            losses=self.losses,
            learning_rate=self.step.learning_rate(self.done - 1),
        )
        append_line(self.folder.curve, point)
        self._evaluated.add(self.done)
        self._book("eval", seconds)
        per_class = dict(zip(self.val_data.class_names, found.per_class, strict=True))
        self.run = self.run.model_copy(
            update={
                "miou": found.miou,
                "miou_per_class": per_class,
                "miou_of": {
                    group: mean_iou(per_class[name] for name in names)
                    for group, names in self.class_groups.items()
                },
                "best_miou": max(found.miou, self.run.best_miou or 0.0),
            }
        )
        return point

    def _checkpoint(self) -> None:
        """Save everything, then the record; the time it takes is booked apart."""
        began = time.perf_counter()
        state = {
            "iteration": self.done,
            "losses": self.losses,
            "evaluated": sorted(self._evaluated),
            "run": self.run.model_dump(mode="json", by_alias=True),
            "step": self.step.state_dict(),
        }
        checkpoint.save(self.folder, state)
        self._book("checkpoint", time.perf_counter() - began)
        self._save_record()

    def _save_record(self) -> None:
        flop, spent_s = self.flop_per_iteration, self.spent_s
        self.run = self.run.model_copy(
            update={
                "iterations_done": self.done,
                "train_s": self.run.train_s.model_copy(update={"actual": spent_s["train"]}),
                "eval_s": spent_s["eval"],
                "checkpoint_s": spent_s["checkpoint"],
                "flop": None if flop is None else flop * self.done,
                "finished": self.run.iterations in self._evaluated,
            }
        )
        write_record(self.folder.record, self.run)


def _told(point: CurvePoint) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in point.losses.items())
    return f"iteration {point.iteration}: mIoU {100 * point.miou:.2f} %; {losses}"
