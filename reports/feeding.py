"""Table: how fast each part of the input is, and whether it keeps up with the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from kdprof.measure.feeding import Feeding


def print_feeding(feeding: Feeding, console: Console) -> None:
    """Print how fast each part of the input is, and whether it keeps up with the step."""
    rows = {
        "decoding": (feeding.decoding, "one core"),
        "a cache on disk": (feeding.reading, "read and checked, all cores"),
        "lookup, cached": (feeding.lookup_cached, "one loader process, cache in memory"),
        "lookup": (feeding.lookup, f'one loader process, data_settings.cache = "{feeding.cache}"'),
        "augmentation": (feeding.augmentation, "on the step's device"),
        "the loader": (feeding.loader, f"all of it, data_settings.workers = {feeding.workers}"),
        "the step": (feeding.step, "without distillation, the hardest to feed"),
    }
    table = Table("input", "images/s", "how", box=None, pad_edge=False)
    for what, (rate, how) in rows.items():
        table.add_row(what, f"{rate:.4g}", how)
    console.print()
    console.print(table)
    console.print(feeding.verdict(), highlight=False, soft_wrap=True)
