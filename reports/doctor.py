"""Table: what this machine has, and what is lost where something is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from kdprof.measure.doctor import Finding


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print findings, one per line."""
    table = Table("what", "found", "what is lost without it", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.costs)
    console.print(table)
