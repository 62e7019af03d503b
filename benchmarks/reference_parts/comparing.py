"""The third part: objectives that are dear here, against their equations written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdprof.records import AtlasCost
from kdprof.store import write_together

from .base import Call, Part
from .measuring import Measuring
from .plan import OBJECTIVE_SHARE

PHASES = ("objective", "objective_backward")


class Comparing(Part):
    """A piece for each objective above a share of its step, the largest share first."""

    name = "objectives"

    def __init__(self, call: Call, measured: Measuring):
        super().__init__(call)
        self._measured = measured

    def _dear(self) -> list[str]:
        """Return the methods to compare; the most expensive one if none is above the share."""
        atlas = self._measured.record()
        costs = atlas.settings[0].costs if atlas else []
        shares = {cost.method: _share(cost) for cost in costs}
        names = sorted((name for name in shares if shares[name] > 0), key=lambda n: -shares[n])
        dear = [name for name in names if shares[name] > OBJECTIVE_SHARE] or names[:1]
        return dear[: self.call.size.most_objectives]

    def _open(self) -> list[str]:
        done = self.call.state.is_done
        return [name for name in self._dear() if not done(f"objective {name}")]

    def forecast_s(self) -> float:
        if self._measured.record() is None:  # not known before the atlas
            return self.call.size.objective_s * min(6, self.call.size.most_objectives)
        return self.call.size.objective_s * len(self._open())

    def do(self, ends_s: float) -> None:
        size = self.call.size
        if self._measured.record() is None:
            self.call.leave("objectives", "the atlas, which tells the dear ones, is not measured")
        for name in self._open():
            piece = f"objective {name}"
            if not self._fits(piece, size.objective_s, ends_s):
                continue
            arguments = {"name": name, "device": self.call.device, "scale": size.objective_scale}
            # One that takes long must not use up the time of the others.
            self.call.run(
                piece, "objective", arguments, min(self._left_s(ends_s), 4 * size.objective_s)
            )
            self._write()

    def _write(self) -> None:
        found = {
            name.removeprefix("objective "): piece.result
            for name, piece in self.call.state.record.pieces.items()
            if name.startswith("objective ") and piece.state == "done"
        }
        if any("row" in result for result in found.values()):
            texts = _texts(found)
            write_together({self.call.folder / name: text for name, text in texts.items()})


def _texts(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of all comparisons so far."""
    from objectives import Report, Row  # here: it imports torch, which takes seconds

    compared = [result for result in found.values() if "row" in result]
    rows = [Row(**result["row"]) for result in compared]
    missing = [name for name, result in found.items() if "missing" in result]
    report = Report(compared[-1]["facts"], missing, rows)
    differing = [text for result in found.values() for text in result.get("differs", [])]
    apart = ["", "Not timed, because the two sides differ:", "", *(f"- {t}" for t in differing)]
    markdown = report.markdown() + ("\n".join(apart) + "\n") * bool(differing)
    return {"objectives.md": markdown, "objectives.json": report.json()}


def _share(cost: AtlasCost) -> float:
    """Return the share of a step that its objective takes, 0 if it is not known."""
    phases = cost.phases_s or {}
    whole = sum(phases.values())
    return sum(phases.get(name, 0.0) for name in PHASES) / whole if whole else 0.0
