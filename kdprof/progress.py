"""Progress bars with time left on a terminal; nothing when piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]


class Progress:
    """Shows the progress of long work. ``Progress(None)`` shows nothing."""

    def __init__(self, console: Console | None, *, verbose: bool = False):
        self.console, self.verbose = console, verbose

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Show a bar while the body runs; the body calls ``advance(n)`` after n units."""
        if self.console is None or not self.console.is_terminal:
            yield lambda n: None
            return
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            auto_refresh=False,  # a refreshing thread would take time from what is measured
        )

        def advance(count: int) -> None:
            bar.update(task, advance=count, refresh=True)

        with bar:
            task = bar.add_task(label, total=total, completed=done)
            bar.refresh()
            yield advance

    def say(self, text: str) -> None:
        """Print one line, above any bar."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)

    def detail(self, text: str) -> None:
        """Print one line if the output is verbose."""
        if self.verbose:
            self.say(text)
