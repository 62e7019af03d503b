"""Methods by name: from built-in files, installed packages and users' files."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kdprof.errors import UserError, shortened, unknown
from kdprof.method import Method
from kdprof.user_files import (
    NamedInFile,
    following,
    import_file,
    named_in_file,
    source_hash,
    sources_of,
)

BUILT_IN = "built-in"


@dataclass(frozen=True)
class MethodEntry:
    """A method class and where it came from."""

    cls: type[Method]
    origin: str
    """``built-in``, the value of an entry point (``package:Class``), or the path of a file."""

    @property
    def is_builtin(self) -> bool:
        """True if it is one of kdprof's own."""
        return self.origin == BUILT_IN

    def create(self, settings: Mapping[str, Any]) -> Method:
        """Return a method with these settings; what a user's reads meanwhile is noted.

        Raises:
            UserError: a setting does not exist or has a wrong value.
        """
        with self.followed():
            return self.cls(**settings)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Note the files that a user's method opens in this context, as its sources."""
        with nullcontext() if self.is_builtin else following(self._file):
            yield

    def sources(self) -> dict[str, str]:
        """Return the hashes of the files that it depends on, by name.

        Built-in methods share modules, so all their files are one entry.
        """
        if self.is_builtin:
            return {BUILT_IN: source_hash(self._file.parent, ("*.py",))}
        return sources_of(sys.modules[self.cls.__module__])

    @property
    def _file(self) -> Path:
        file = sys.modules[self.cls.__module__].__file__
        assert file is not None, "a class of a file"
        return Path(file)


def method_modules() -> list[str]:
    """Return the names of the built-in method files, without importing them."""
    package = importlib.import_module("kdprof.methods")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")


def builtin_methods() -> Mapping[str, MethodEntry]:
    """Import and return all built-in and installed methods (entry point ``kdprof.methods``), by
    name. Installed ones that cannot be used are left out, and said once on stderr."""
    return _found()[0]


@functools.cache
def _found() -> tuple[Mapping[str, MethodEntry], Mapping[str, UserError]]:
    """Return the methods that can be used, and why each of the other installed ones cannot."""
    found: dict[str, MethodEntry] = {}
    broken: dict[str, UserError] = {}
    clashing: dict[str, UserError] = {}
    for module in method_modules():
        for method in _methods_in(importlib.import_module(f"kdprof.methods.{module}"), BUILT_IN):
            found[method.cls.name] = method
    for point in entry_points(group="kdprof.methods"):
        try:
            cls = _installed(point)
        except UserError as error:
            broken[point.name] = error
            continue
        if cls.name in found:
            clashing[cls.name] = UserError(
                f"{_told(point)} has the name '{cls.name}' of another method; change its class "
                "attribute 'name', or uninstall it"
            )
            continue
        found[cls.name] = MethodEntry(cls, point.value)
    for refusal in (*broken.values(), *clashing.values()):
        sys.stderr.write(f"kdprof: {refusal}\n")
    # A package that cannot be loaded takes no name away from a method that can be used.
    lost = {name: error for name, error in broken.items() if name not in found}
    return MappingProxyType(found), {**lost, **clashing}


def _installed(point: EntryPoint) -> type[Method]:
    """Return the class of an entry point.

    Raises:
        UserError: it cannot be loaded, or is no method.
    """
    try:
        cls = point.load()
    except Exception as error:  # the package's code: any
        reason = shortened(" ".join(str(error).split()))
        raise UserError(
            f"{_told(point)} cannot be loaded: {type(error).__name__}: {reason}; mend or uninstall "
            "it"
        ) from error
    if isinstance(cls, type) and issubclass(cls, Method) and cls is not Method:
        return cls
    raise UserError(
        f"{_told(point)} is no subclass of kdprof.method.Method; mend its entry point, or "
        "uninstall it"
    )


def _told(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "an unknown package"
    return shortened(f"the installed method '{point.name}' ({point.value} of {package})")


def find_method(spec: str) -> MethodEntry:
    """Return the method that ``spec`` names: ``cwd``, ``cwd:feature`` or ``./mine.py:MyKD``.

    Raises:
        UserError: ``spec`` names no method, or the file or the installed package cannot be loaded.
    """
    if (own := named_in_file(spec)) is not None:
        return _method_from_file(own)
    methods, unusable = _found()
    if spec in unusable:
        raise unusable[spec]
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
    return [MethodEntry(cls, origin) for cls in classes]


def _method_from_file(own: NamedInFile) -> MethodEntry:
    own.check_exists("method", "FILE.py:ClassName")
    path, cls_name = own
    module = import_file(path)
    found = {method.cls.__name__: method for method in _methods_in(module, str(path))}
    if not cls_name and len(found) == 1:
        return next(iter(found.values()))
    if found and not cls_name:
        written = " or ".join(f"{path}:{name}" for name in found)
        raise UserError(f"{path} holds several methods; write {written}")
    if cls_name not in found:
        raise UserError(f"{path}: {unknown('method class', cls_name, found)}")
    return found[cls_name]
