"""How a study or a command names something in a user's file: ``FILE.py:NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kdprof.errors import UserError
from kdprof.store import expanded


class NamedInFile(NamedTuple):
    """A class or function of a user's file; ``name`` is empty where only the file is named."""

    path: Path
    name: str

    def check_exists(self, what: str, form: str = "FILE.py:FUNCTION") -> None:
        """Check that the file is there.

        Args:
            what: what names it, for the message: ``step.optimizer``.
            form: what to write there.

        Raises:
            UserError: it is not.
        """
        if not self.path.is_file():
            raise UserError(f"{what}: no file {self.path}; give {form}")


def named_in_file(text: str) -> NamedInFile | None:
    """Read ``FILE.py:NAME`` or ``FILE.py``; None if ``text`` names no Python file.

    Raises:
        UserError: the path begins with ``~NAME`` and there is no such account.
    """
    if text.endswith(".py"):
        return NamedInFile(expanded(text), "")
    path, _, name = text.rpartition(":")
    return NamedInFile(expanded(path), name) if path.endswith(".py") else None
