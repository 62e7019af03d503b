"""The second part: the atlas of costs, every method at every setting, the most valuable first."""

from __future__ import annotations

from dataclasses import replace

from kdprof.records import Atlas, Cost
from kdprof.reports import atlas
from kdprof.reports.atlas_check import without_paths
from kdprof.store import Store, newest_by_method

from .base import Part
from .plan import Piece, in_order, is_variant

LEAST_METHOD_S = 0.2
"""The shortest time that a method is forecast to take."""


class Measuring(Part):
    """For each setting and precision a piece of its methods, of variants, and of energy."""

    name = "atlas"

    def _store(self, piece: Piece) -> Store:
        return Store(self.call.work / piece.folder)

    def _costs(self, piece: Piece) -> dict[str, Cost]:
        store = self._store(piece)
        return newest_by_method(store.costs()) if store.root.exists() else {}

    def _open(self, piece: Piece) -> list[str]:
        """Return the methods of a piece that are not measured, in order."""
        costs, names = self._costs(piece), self._names()
        if piece.what == "energy":
            return [name for name in names if name in costs and _lacks_energy(costs[name])]
        variants = piece.what == "variants"
        return [name for name in names if is_variant(name) == variants and name not in costs]

    def _names(self) -> list[str]:
        return in_order(self.call.size.methods or self.call.methods)

    def _needs_s(self, piece: Piece) -> float:
        size, waiting = self.call.size, self._open(piece)
        each = size.energy_s if piece.what == "energy" else self._method_s()
        return size.start_s + each * len(waiting) if waiting else 0.0

    def _method_s(self) -> float:
        """Return the seconds of a method: those of the pieces so far, or the forecast."""
        found = [
            (piece.seconds - self.call.size.start_s) / piece.result["measured"]
            for name, piece in self.call.state.record.pieces.items()
            if name.startswith("atlas ") and not name.endswith(" energy")
            if piece.result and piece.result["measured"]
        ]
        return max(found[-1], LEAST_METHOD_S) if found else self.call.size.method_s

    def forecast_s(self) -> float:
        return sum(self._needs_s(piece) for piece in self.call.size.pieces())

    def do(self, ends_s: float) -> None:
        self._write()  # what was measured by a call that was cut off
        for piece in self.call.size.pieces():
            waiting = self._open(piece)
            if not waiting:
                continue
            # A few methods of a setting are worth more than none: only its start must fit.
            if self._left_s(ends_s) < self.call.size.start_s + self._method_s():
                self._leave(piece, waiting)
                continue
            self._measure(piece, waiting, ends_s)
            self._write()
            if left := self._open(piece):
                self._leave(piece, left)

    def _leave(self, piece: Piece, waiting: list[str]) -> None:
        many = f"{len(waiting)} methods" if len(waiting) > 1 else waiting[0]
        failed = self._failures(piece)
        why = f"{many}, needs about {self._needs_s(piece):.0f} s"
        whole = self.call.state.record.pieces.get(piece.name)
        if failed.keys() >= set(waiting):
            why = "; ".join(f"{name} failed: {failed[name]}" for name in waiting)
        elif whole is not None and whole.state == "failed" and not failed:
            why = f"{many}, failed: {whole.reason}"
        self.call.leave(piece.name, why)

    def _measure(self, piece: Piece, waiting: list[str], ends_s: float) -> None:
        size = self.call.size
        overrides = {
            **piece.setting.changes,
            "step.precision": piece.precision,
            "device": self.call.device,
            "methods": waiting,
            # A study with a budget in joules measures energy in a window of its own.
            "budgets": ["1kJ"] if piece.what == "energy" else [],
        }
        arguments = {
            "source": piece.setting.preset,
            "overrides": overrides,
            "measuring": dict(size.measuring),
            "out": piece.folder,
        }
        # Nothing is written meanwhile: work of this process would disturb what is measured.
        found = self.call.runner.run(piece.name, "measure", arguments, self._left_s(ends_s))
        measured = len(waiting) - len(self._open(piece))
        failures = {} if found.result is None else found.result
        if found.state == "done" and failures.keys() & set(waiting):
            found = found.model_copy(update={"state": "failed", "reason": "of some methods"})
        texts = {name: without_paths(why) for name, why in failures.items()}
        result = {"measured": measured, "failures": texts}
        self.call.state.note(piece.name, found.model_copy(update={"result": result}))
        self._draw(piece)

    def _draw(self, piece: Piece) -> None:
        if self._costs(piece):
            arguments = {"out": piece.folder, "target": f"../{piece.folder}"}
            self.call.run(f"figures {piece.folder}", "figures", arguments, self.call.size.report_s)

    def _failures(self, piece: Piece) -> dict[str, str]:
        found = self.call.state.record.pieces.get(piece.name)
        return found.result["failures"] if found and found.result else {}

    def record(self) -> Atlas | None:
        """Return the atlas of what was measured so far; None if nothing was."""
        found = [
            self._setting(piece, list(costs.values()))
            for piece in self.call.size.pieces()
            if piece.what == "methods" and (costs := self._costs(piece))
        ]
        if not found:
            return None
        device, versions = self.call.state.record.identity["device"], self.call.versions
        return Atlas(kind="measured", device=device, versions=versions, settings=found)

    def _setting(self, piece: Piece, costs: list[Cost]) -> atlas.AtlasSetting:
        variants = replace(piece, what="variants")
        failed = {**self._failures(piece), **self._failures(variants)}
        there = {cost.method for cost in costs}
        missing = [name for name in self._names() if name not in there]
        reasons = {name: failed.get(name, "not reached in the time") for name in missing}
        return atlas.setting_of(piece.setting.name, costs, reasons)

    def _write(self) -> None:
        if (found := self.record()) is not None:
            atlas.write(self.call.folder, found)


def _lacks_energy(cost: Cost) -> bool:
    """Return True if a window of its own could tell the energy of a step."""
    return cost.energy_j is None and "--detail" in cost.unavailable.get("energy_j", "")
