"""How a package that takes seconds to import is imported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = "wandb"
"""timm imports it where it is installed, for a script of its own, which takes half a second."""


@contextmanager
def quick_import() -> Iterator[None]:
    """Import in this context what stays until the process ends.

    The garbage collector does not run: what is imported is no garbage, and looking through it took
    a fifth of the time.
    """
    collects, hidden = gc.isenabled(), UNUSED not in sys.modules
    gc.disable()
    if hidden:
        sys.modules[UNUSED] = None  # type: ignore[assignment]  # Python's way to make it absent
    try:
        yield
    finally:
        if hidden:
            del sys.modules[UNUSED]
        if collects:
            gc.enable()
