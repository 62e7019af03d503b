"""Where method names are looked up: built-in files, installed packages, a user's own file."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kdprof.errors import UserError, unknown
from kdprof.method import Method
from kdprof.user_files import import_file


@dataclass(frozen=True)
class MethodEntry:
    """A method class and where it came from."""

    cls: type[Method]
    origin: str
    """built-in, an entry point's distribution, or the path of a file."""
    source_sha256: str = field(repr=False, default="")


def method_modules() -> list[str]:
    """Return the names of the built-in method files, without importing them."""
    package = importlib.import_module("kdprof.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")


def builtin_methods() -> dict[str, MethodEntry]:
    """Import every built-in and installed (entry point ``kdprof.methods``) method, by name."""
    found: dict[str, MethodEntry] = {}
    for module in method_modules():
        for method in _methods_in(importlib.import_module(f"kdprof.methods.{module}"), "built-in"):
            found[method.cls.name] = method
    for point in entry_points(group="kdprof.methods"):
        cls = point.load()
        if cls.name in found:
            raise UserError(
                f"the installed method '{cls.name}' ({point.value}) has the name of another; "
                "rename its class attribute 'name'"
            )
        found[cls.name] = MethodEntry(cls, point.value, _source_hash(sys.modules[cls.__module__]))
    return found


def find_method(spec: str) -> MethodEntry:
    """Return the method that ``spec`` names: ``cwd``, ``cwd:feature`` or ``./mine.py:MyKD``.

    Raises:
        UserError: there is no such method, or the file cannot be loaded.
    """
    path, colon, cls_name = spec.rpartition(":")
    if path.endswith(".py") or spec.endswith(".py"):
        return _method_from_file(Path(path if colon and path else spec), cls_name if path else "")
    methods = builtin_methods()
    if spec not in methods:
        raise UserError(unknown("method", spec, methods))
    return methods[spec]


def _methods_in(module: Any, origin: str) -> list[MethodEntry]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    return [MethodEntry(cls, origin, _source_hash(module)) for cls in classes]


def _source_hash(module: Any) -> str:
    """Return the hash of the code that a method is made of.

    Built-in methods share parts, so all their files count; of any other, its own file.
    """
    path = Path(module.__file__)
    builtin = module.__name__.startswith("kdprof.methods.")
    return source_hash(path.parent, ("*.py",) if builtin else (path.name,))


def source_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return the hash of the files in ``folder`` that match any of the patterns."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _method_from_file(path: Path, cls_name: str) -> MethodEntry:
    if not path.is_file():
        raise UserError(f"no method file {path}; give FILE.py:ClassName")
    module = import_file(path)
    found = {method.cls.__name__: method for method in _methods_in(module, str(path))}
    if not cls_name and len(found) == 1:
        return next(iter(found.values()))
    if found and not cls_name:
        written = " or ".join(f"{path}:{name}" for name in found)
        raise UserError(f"{path} has several methods; write {written}")
    if cls_name not in found:
        raise UserError(f"{path}: {unknown('method class', cls_name, found)}")
    return found[cls_name]
