"""The section of curves: accuracy against compute."""

from __future__ import annotations

import math

import numpy as np

from kdprof.records import Run

from .. import table
from ..axes import Axis
from ..figures.curves import spread
from ..results import Results, drifted, final_miou
from ..text import Estimate, flagged
from . import charts
from .content import Content, Section, amount, switched
from .markup import tag


def curve_section(content: Content) -> Section | None:
    """Return the curves on every axis of compute; None if no run is finished."""
    results = content.results
    if results is None:
        return None
    rows = {(row.method, row.budget): row for row in content.rows}
    teacher = results.teacher
    miou = None if teacher is None or teacher.miou is None else 100 * teacher.miou
    panels = {}
    for axis in content.axes:
        lines = _lines(results, axis, rows)
        chart = charts.curves(lines, content.looks, miou, axis.label)
        panels[axis.name] = (f"equal {axis.compute}", tag("figure", chart))
    best = results.budgets()[-1]
    order = sorted(
        results.methods(), key=lambda method: _key_order(rows.get((method, best)), method)
    )
    unreliable = {cost.method for cost in results.unreliable()}
    names = {method: flagged(method, method in unreliable) for method in order}
    side = tag("div", charts.key(names, content.looks), class_="side")
    chart = tag("div", *switched("curves", panels), class_="wide")
    return Section(
        "curves",
        "Curves",
        "Accuracy against compute",
        [
            tag("div", chart, side, class_="beside"),
            tag("p", _curve_caption(results), class_="soft"),
        ],
    )


def _key_order(row: table.Row | None, method: str) -> tuple[float, str]:
    return (math.inf if row is None else -row.miou_percent.value, method)


def _curve_caption(results: Results) -> str:
    parts = ["Markers are moved sideways so that all are visible."]
    if len({run.seed for run in results.finished}) > 1:
        parts.append(
            "Bars: 95 % intervals by Student's t over seeds, or smallest to largest of two seeds; "
            "dots: single runs."
        )
    if any(drifted(run) for run in results.finished):
        parts.append("Hollow: seconds more than 2 % off plan.")
    if results.teacher is None or results.teacher.miou is None:
        parts.append("No teacher run in this folder, so no line for it.")
    return " ".join(parts)


def _lines(
    results: Results, axis: Axis, rows: dict[tuple[str, str], table.Row]
) -> dict[str, list[charts.Point]]:
    found = {}
    for method in results.methods():
        points = [
            _point(rows[method, budget], results.group(method, budget), axis)
            for budget in results.budgets()
            if (method, budget) in rows
        ]
        found[method] = sorted(points, key=lambda point: point.x)
    return found


def _point(row: table.Row, group: list[Run], axis: Axis) -> charts.Point:
    known = [(x, 100 * final_miou(run)) for run in group if (x := axis.of(run)) is not None]
    x, miou = float(np.mean([x for x, _ in known])), row.miou_percent.value
    low, high = spread([y for _, y in known])[1:] if len(known) > 1 else (None, None)
    spent = x * axis.unit
    lines = [
        f"{row.method}, {row.budget}",
        f"mIoU {Estimate(miou, low, high).text(2)} %",
        f"{amount(axis, spent)}, {_seeds(row.seeds)}",
    ]
    lines += [f"seconds off plan: {row.drift_by_seed}"] if row.drifted else []
    lines += ["planned with an unreliable cost"] if row.reliable is False else []
    return charts.Point(x, miou, low, high, known, row.drifted, "\n".join(lines),
                        (miou, low, high, spent))  # fmt: skip


def _seeds(number: int) -> str:
    return f"{number} seed" if number == 1 else f"{number} seeds"
