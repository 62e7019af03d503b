"""Writes all figures that the records of a folder allow."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from kdprof.errors import UserError, unknown
from kdprof.records import Cost
from kdprof.store import Store, different_devices, newest_by_method

from ..axes import ORDERED_BY, axis
from ..results import Results, collect
from ..verdict import Verdict
from . import cost_bars, curves, flips, gains, memory_bars, schedules
from .looks import Look, folder_looks
from .sheet import FORMATS, PAGE, check, save

if TYPE_CHECKING:
    from kdprof.published import ConvertedSchedule


NAMES = ("curves", "flips", "gain", "cost", "memory")
"""Names of the figures that :func:`render` may write, without suffix."""


def render(
    store: Store,
    verdict: Verdict | None,
    *,
    x: str = "seconds",
    formats: Sequence[str] = FORMATS,
    width_mm: float = PAGE,
    methods: Collection[str] = (),
) -> list[Path]:
    """Write the figures into ``reports/`` and return the files; equal records give equal bytes.

    ``curves`` is made from runs, ``cost`` and ``memory`` from Costs of one device; ``gain`` needs a
    known gain, ``flips`` an amount of compute that all curves reach.

    Args:
        verdict: on all runs of the folder; None if it has no finished run, then only Costs are
            drawn.
        x: the axis of compute, of :data:`kdprof.reports.axes.AXES`. Gains and flips, which do not
            know GPU-hours, show seconds instead; flips compare iterations with it.
        methods: only these are drawn, in the colours that they have among all.

    Raises:
        UserError: an argument is not valid, it is not known which Cost of a method is the newest,
            or there is nothing to draw because the Costs come from different devices.
    """
    check(formats, width_mm)
    costs = store.costs()
    looks = folder_looks(store.runs(), costs)
    trained = {run.method for run in store.runs()}
    valid = trained | {cost.method for cost in costs}
    if wrong := [name for name in methods if name not in valid]:
        raise UserError(*(unknown("method", name, valid) for name in wrong))
    chosen = set(methods) or valid
    newest = newest_by_method(costs)
    figures = {}
    if verdict is not None:
        every = collect(store)
        results, names = _only(every, chosen), every.flagged_names()
        if results.finished:
            figures = _of_runs(results, _among(verdict, chosen), looks, names, x, width_mm)
    if why := different_devices(newest.values()):
        if not figures:
            raise UserError(f"{store.root}: {why}; measure all methods on one")
    else:
        shown = [cost for cost in newest.values() if cost.method in chosen]
        figures |= _of_costs(shown, looks, width_mm)
    return [
        path
        for name, figure in figures.items()
        for path in save(figure, store.reports / name, formats)
    ]


def render_schedules(
    store: Store,
    found: Sequence[ConvertedSchedule],
    *,
    formats: Sequence[str] = FORMATS,
    width_mm: float = PAGE,
) -> list[Path]:
    """Write ``reports/schedules.*`` from what ``kdprof convert --published`` converted. It is no
    part of :func:`render`, because only the methods' classes know the schedules, and those need
    torch.

    Raises:
        UserError: an argument is not valid, or no schedule could be converted.
    """
    check(formats, width_mm)
    looks = folder_looks(store.runs(), store.costs())
    costs = list(store.latest_costs().values())
    figure = schedules.draw(found, costs, looks, width_mm=width_mm)
    return save(figure, store.reports / "schedules", formats)


def _of_runs(
    results: Results,
    verdict: Verdict,
    looks: dict[str, Look],
    names: dict[str, str],
    x: str,
    width: float,
) -> dict[str, Figure]:
    figures = {"curves": curves.draw(results, looks, verdict.gains, x=x, width_mm=width)}
    known = {standing.axis for standing in verdict.standings}
    compared = x if x in known - {ORDERED_BY, "samples"} else "seconds"
    if {ORDERED_BY, compared} <= known and len(results.methods()) > 1:
        ends = axis(results, ORDERED_BY), axis(results, compared)
        figures["flips"] = flips.draw(verdict, ends, looks, names, width_mm=width)
    gained = x if any(gain.axis == x for gain in verdict.gains) else "seconds"
    if any(gain.axis == gained and gain.value is not None for gain in verdict.gains):
        each = axis(results, gained)
        figures["gain"] = gains.draw(verdict.gains, each, looks, names, width_mm=width)
    return figures


def _of_costs(costs: list[Cost], looks: dict[str, Look], width: float) -> dict[str, Figure]:
    figures = {}
    if any(cost.latency_s for cost in costs):
        figures["cost"] = cost_bars.draw(costs, looks, width_mm=width)
    if memory_bars.drawable(costs):
        figures["memory"] = memory_bars.draw(costs, looks, width_mm=width)
    return figures


def _only(results: Results, chosen: Collection[str]) -> Results:
    """Return the results of some methods."""
    return replace(
        results,
        finished=[run for run in results.finished if run.method in chosen],
        left_out=[run for run in results.left_out if run.method in chosen],
    )


def _among(verdict: Verdict, chosen: Collection[str]) -> Verdict:
    """Return the verdict on some methods; gains keep their controls."""
    return replace(
        verdict,
        gains=[gain for gain in verdict.gains if gain.method in chosen],
        standings=[
            replace(s, miou_percent={m: v for m, v in s.miou_percent.items() if m in chosen})
            for s in verdict.standings
        ],
        flips=[flip for flip in verdict.flips if {flip.first, flip.second} <= set(chosen)],
    )
