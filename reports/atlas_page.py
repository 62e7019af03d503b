"""What an iteration of each method costs: docs/atlas.md and the README's table, made from the
records in reports/reference alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdprof.errors import KdprofError
from kdprof.records import REFERENCE, Atlas, AtlasCost, FirstReading
from kdprof.store import read_record

from .atlas import (
    CONVERTED,
    cost_grid,
    counted_grid,
    facts,
    ordered,
    setting_parts,
    setting_title,
)
from .atlas_check import read_atlas
from .text import MISSING, Grid, figures, markdown_text

REGENERATE = "python benchmarks/atlas_pages.py"
COUNT_AGAIN = f"{REGENERATE} --count"
COUNTED, READING = "counted", "first-reading-h200/steps.json"
"""Folder of the counted atlas, and file of the first reading, in the folder of references."""
BEGIN, END = f"<!-- made by {REGENERATE} -->", "<!-- end of what is made -->"

HOW_TO_READ = f"""\
# Atlas: what does an iteration of each method cost?

Generated from the records in [reports/reference](../reports/reference) by
`{REGENERATE}`; edit those, or `reports/atlas_page.py`, not this page.

## How to read it

- A **step** is one optimisation step as `kdprof train` runs it, with the batch already on the
  device: teacher, student, task loss, objective, backward, optimiser. Loading data, evaluation and
  checkpoints are not part of it. [measuring.md](measuring.md) has the rules.
- **TFLOP** are those of convolutions and matrix products; 1 multiply-add = 2 FLOP. **moved** is
  what all operators read and write, caches left aside; **operators** are those that a step starts.
- Ratios to the student alone are called **/ {REFERENCE}**: **TFLOP / {REFERENCE}** and **moved /
  {REFERENCE}** compare work, not time.
"""
HOW_TO_READ_COUNTS = """\
- **Counted** figures are no measurement: they say how much work a step has, not how long it takes.
  A step with 8 times the FLOP is not 8 times as slow: bytes and starting operators take time, too.
"""
HOW_TO_READ_TIMES = f"""\
- **/ {REFERENCE}** at a time is the ratio of seconds, measured in turns with {REFERENCE}, with its
  95 % interval. It carries over to another device better than milliseconds do, but it is not a
  constant of the method: it depends on networks, crop, batch and precision.
- **{CONVERTED}**: the iterations that take as long. A method that gets fewer must be better per
  iteration by as much as the missing ones would have brought.
- **memory** is the peak of the allocator over a step; **energy** is the device's counter over a
  step, idle power included. A dash has its reason in the notes.
- **†** marks an unreliable measurement; the notes say why.
"""


@dataclass(frozen=True)
class References:
    """The records that are shown.

    Attributes:
        measured: atlases by the folder of their device.
    """

    measured: Mapping[str, Atlas]
    counted: Atlas
    reading: FirstReading | None


def read_references(folder: Path) -> References:
    """Read every atlas in a folder of references.

    Raises:
        UserError: a record cannot be read, or is not fit to be shown, see
            :func:`kdprof.reports.atlas_check.problems`.
    """
    found = {path.parent.name: read_atlas(path) for path in sorted(folder.glob("*/atlas.json"))}
    reading = folder / READING
    return References(
        {name: atlas for name, atlas in found.items() if atlas.kind == "measured"},
        found[COUNTED],
        read_record(reading, FirstReading) if reading.exists() else None,
    )


def page(references: References) -> str:
    """Return docs/atlas.md."""
    parts = [HOW_TO_READ + (HOW_TO_READ_TIMES if references.measured else "") + HOW_TO_READ_COUNTS]
    if not references.measured:
        parts.append("No GPU's atlas is in the repository yet; until then, steps are counted.\n")
    for folder, atlas in references.measured.items():
        parts += _device(folder, atlas)
    parts += _counted(references.counted)
    if references.reading is not None:
        parts += _reading(references.reading)
    return "\n".join(parts)


def _device(folder: str, atlas: Atlas) -> list[str]:
    link = f"[{folder}](../reports/reference/{folder}/atlas.md)"
    parts = [f"## {markdown_text(atlas.device or folder)}", f"{facts(atlas)} Phases: {link}."]
    for setting in atlas.settings:
        parts += setting_parts(setting, level=3, phases=False)
    return [f"{part}\n" for part in parts]


def _counted(atlas: Atlas) -> list[str]:
    parts = ["## Counted, not run", f"{facts(atlas)} Made by `{COUNT_AGAIN}`."]
    for setting in atlas.settings:
        parts += setting_parts(setting, level=3, phases=False)
    return [f"{part}\n" for part in parts]


def _reading(reading: FirstReading) -> list[str]:
    rows = [
        [name, f"{1e3 * seconds:.1f}"]
        for name, seconds in sorted(reading.step_s.items(), key=lambda item: item[1])
    ]
    grid = Grid("", ("method", "step (ms)"), rows)
    title = f"## First reading by a plain script: {markdown_text(reading.device)}"
    where = f"{reading.setting}, {reading.precision}. {reading.note}"
    return [f"{part}\n" for part in (title, markdown_text(where), grid.markdown())]


def readme_table(references: References) -> str:
    """Return the README's table: the main setting of the first measured device, else counts. It
    leaves out variants, which docs/atlas.md has."""
    measured = next(iter(references.measured.values()), None)
    atlas = measured or references.counted
    setting = atlas.settings[0]
    costs = [cost for cost in ordered(setting.costs) if ":" not in cost.method]
    if measured is not None:
        grid, what = cost_grid(costs).without_empty(), f"Measured on {measured.device}"
    else:
        grid, what = _with_reading(costs, references.reading), "**Counted, not run**, for a GPU"
    lines = [f"{what}. {setting_title(setting)}.", grid.markdown()]
    if measured is None and references.reading is not None:
        lines.append(f"{references.reading.device}: {references.reading.note}")
    return "\n\n".join(markdown_text(part) if "\n" not in part else part for part in lines)


def _with_reading(costs: Sequence[AtlasCost], reading: FirstReading | None) -> Grid:
    grid = counted_grid(costs)
    if reading is None:
        return grid
    seconds = [reading.step_s.get(cost.method) for cost in costs]
    cells = [MISSING if one is None else figures(1e3 * one) for one in seconds]
    rows = [[*row, cell] for row, cell in zip(grid.rows, cells, strict=True)]
    return Grid("", [*grid.header, f"{reading.device}, earlier version: ms"], rows)


def with_table(readme: str, table: str) -> str:
    """Return the README with its table replaced.

    Raises:
        KdprofError: the marks around the table are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise KdprofError(f"README.md lacks '{BEGIN}' or '{END}'; put both where the table belongs")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
