"""Import users' Python files: methods, networks and training steps by the same rules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from kdprof.errors import UserError, nearest
from kdprof.user_files.sources import following


def import_file(path: Path) -> ModuleType:
    """Import a user's Python file, once per process.

    The file's folder is first on the import path while it is imported, as when the file itself is
    run, and last afterwards: functions that import later still find the modules next to it, and a
    user's ``queue.py`` does not replace the standard library's.

    Raises:
        UserError: the file raises an exception when it is imported, or would get the modules of
            another user's file in place of those next to it.
    """
    path = path.resolve()
    name = f"kdprof_user_{sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    _check_neighbours(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # typing.get_type_hints looks the module up by name
    try:
        with following(path), _folder_on_path(str(path.parent)):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _check_neighbours(path: Path) -> None:
    """Refuse a file if a module next to it has the name of one that is loaded from the folder of
    another user's file: Python would take the loaded one without a word."""
    folder = path.parent
    for own in sorted(folder.iterdir()):
        loaded = getattr(sys.modules.get(own.stem), "__file__", None)
        if own.suffix not in ("", ".py") or loaded is None:
            continue
        there = Path(loaded).parent if own.suffix else Path(loaded).parent.parent
        if there != folder and there in _folders:
            raise UserError(
                f"{own} has the name of {loaded}, which another file has imported; rename one of "
                "them: one process holds one module of a name"
            )
    _folders.add(folder)


_folders: set[Path] = set()
"""Folders of the users' files that were imported."""


@contextmanager
def _folder_on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


def import_function(path: Path, function: str) -> Callable[..., Any]:
    """Import a user's file and return one of its functions.

    Raises:
        UserError: the file cannot be imported, or does not have the function.
    """
    module = import_file(path)
    found = getattr(module, function, None)
    if callable(found):
        return found
    functions = [name for name, v in vars(module).items() if callable(v) and name[0] != "_"]
    raise UserError(f"{path} has no function '{function}'; {nearest(function, functions)}")
