"""Text that neither controls a terminal nor changes the direction of what stands beside it."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of control and format characters, surrogates and separators of lines."""


def printable(text: str) -> str:
    """Return text in which such characters are spelled out: ``\\x1b``, ``\\u202e``."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in HIDDEN else c
        for c in text
    )
