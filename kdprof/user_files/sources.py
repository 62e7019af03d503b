"""The files that the code of a user's file depends on, by content.

They are the file itself, the user's own modules that it imports, what is opened while it is
imported and called, and what it declares in ``reads``. Installed packages are known by their
versions.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kdprof.errors import UserError
from kdprof.store import expanded, file_sha256, short_hash, shortened_hash

PACKAGE_FOLDERS = ("site-packages", "dist-packages")
"""Files below a folder of one of these names belong to installed packages."""
COMPILED = "torchinductor_"
"""How the names of torch.compile's folders for temporary files begin."""
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev", "/etc", "/usr/share", "/run")
"""Files below these folders describe the machine, not the user's code."""
LIBRARIES_OWN = (
    "~/.config", "~/.netrc", "~/.triton", "~/.cache/matplotlib", "~/.cache/torch/kernels",
    "~/.cache/torch_extensions", "~/.cache/huggingface/token", "~/.cache/huggingface/stored_tokens",
)  # fmt: skip
"""What libraries keep for themselves: compiled code, caches, access tokens."""
LIBRARIES_VARIABLES = (
    "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "HF_TOKEN_PATH",
)  # fmt: skip
"""Variables of the environment that say where they keep it instead."""
ABSENT, UNREADABLE = "absent", "unreadable"
_KNOWN = frozenset({"kdprof", "torch", "timm", "triton"})
"""Packages whose versions are part of every identity."""


def content_hash(path: Path) -> str:
    """Return the hash of a file's content, ``sha256:`` and 16 digits; ``absent`` if there is none,
    ``unreadable`` if it may not be read or is no regular file.

    The hash of a folder is that of the names and contents of all files below it.
    """
    try:
        if path.is_dir():
            below = sorted(one for one in path.rglob("*") if one.is_file())
            listed = [f"{one.relative_to(path).as_posix()} {content_hash(one)}" for one in below]
            return short_hash("\n".join(listed))
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return UNREADABLE
        return _hash_of(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except OSError:
        return UNREADABLE


@functools.cache
def _hash_of(path: Path, size: int, modified_ns: int, changed_ns: int) -> str:
    """Return a file's hash; a file of the same size and times is read once per process."""
    return shortened_hash(file_sha256(path))


@functools.cache
def source_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return the hash of the files in ``folder`` that match any of the patterns, as they were when
    this process first asked: it runs the code of that time."""
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    return short_hash(b"".join(file.read_bytes() for file in files))


def sources_of(module: ModuleType) -> dict[str, str]:
    """Return the hashes of the files that a module depends on, by name.

    Names do not depend on where the files lie: those of modules are made from what they are
    imported as, others are relative to the module's folder. Code has the hashes of the time at
    which this process first asked, because that code runs; other files are read again.

    Args:
        module: of a user's file that was imported by :func:`kdprof.user_files.import_file`, or of
            an installed package.

    Raises:
        UserError: a file that ``reads`` names does not exist.
    """
    assert module.__file__ is not None
    path, package = Path(module.__file__).resolve(), module.__package__ or ""
    code = _code_files(path, package)
    found = {name: _hash_of_code(file) for name, (file, _) in code.items()}
    _asked.add(path)
    own = {file for file, _ in code.values()}
    opened = [read for file in (path, *sorted(own - {path})) for read in _opened.get(file, ())]
    others = [
        file for file in dict.fromkeys([*opened, *_declared(module, path)]) if file not in own
    ]
    imported = {name for file, inside in code.values() for name in _imports_of(file, inside)}
    return {**found, **_versions_of(frozenset(imported)), **_hashes_of(others, path.parent)}


def ask_again() -> None:
    """Let users' files read new files again: another study begins, and its results are not looked
    for yet."""
    _asked.clear()


def _hashes_of(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """Return the hashes of files that no import names; files of one name have one hash."""
    found: dict[str, list[str]] = {}
    for file in files:
        inside = file.is_relative_to(folder)
        name = file.relative_to(folder).as_posix() if inside else file.name
        hash_of = _hash_of_code if file.suffix == ".py" else content_hash
        found.setdefault(name, []).append(hash_of(file))
    return {
        name: hashes[0] if len(hashes) == 1 else short_hash("".join(sorted(hashes)))
        for name, hashes in found.items()
    }


# Modules


@functools.cache
def _hash_of_code(file: Path) -> str:
    return content_hash(file)


@functools.cache
def _versions_of(imported: frozenset[str]) -> dict[str, str]:
    """Return the versions of the installed packages among the modules that files import, and the
    hash of kdprof's own methods if they build on these."""
    names = {_top(name) for name in imported} - _KNOWN - sys.stdlib_module_names
    versions = {f"version of {name}": version_of(name) for name in sorted(names)}
    found = {name: version for name, version in versions.items() if version is not None}
    if any(name.startswith("kdprof.methods") for name in imported):
        (folder,) = _folders_of("kdprof.methods")
        found["kdprof's methods"] = source_hash(Path(folder), ("*.py",))
    return found


def _folders_of(package: str) -> Sequence[str]:
    """Return where the modules of a package lie, without importing them."""
    spec = importlib.util.find_spec(package)
    return (spec and spec.submodule_search_locations) or ()


@functools.cache
def _code_files(path: Path, package: str) -> dict[str, tuple[Path, str]]:
    """Return the user's own modules that a file imports, itself first, each with the package that
    it is in, by names such as ``package/module.py``.

    Import statements are read, not run: one inside a function counts, too.
    """
    found, files = {path.name: (path, package)}, {path}
    seen: set[str] = set()
    root, waiting = _package_root(path), sorted(_imports_of(path, package))
    while waiting:
        name = waiting.pop()
        if name in seen or _top(name) == "kdprof":
            continue
        seen.add(name)
        file = _file_of(name)
        if file is None or not _is_own(file, root) or file in files:
            continue
        files.add(file)
        is_package = file.name.startswith("__init__.")
        inside = name if is_package else name.rpartition(".")[0]
        found["/".join([*filter(None, inside.split(".")), file.name])] = (file, inside)
        waiting += sorted(_imports_of(file, inside))
    return found


@functools.cache
def _imports_of(file: Path, package: str) -> frozenset[str]:
    """Return the names of the modules that a file may import, with all packages above them; none of
    an extension module, or of a file that Python could not import itself."""
    try:
        tree = ast.parse(file.read_bytes()) if file.suffix == ".py" else ast.Module([], [])
    except (SyntaxError, ValueError, OSError):
        return frozenset()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    parents = {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}
    return frozenset(name for name in names | parents if name.strip("."))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _file_of(name: str) -> Path | None:
    """Return the file of a module without importing it; None if it is none, or has no file."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        return Path(file).resolve() if file else None
    spec = _spec_of(name)
    return Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None


def _spec_of(name: str) -> importlib.machinery.ModuleSpec | None:
    parent, dot, _ = name.rpartition(".")
    try:
        if not dot:
            return importlib.util.find_spec(name)
        above = _spec_of(parent)
        folders = above.submodule_search_locations if above else None
        return importlib.machinery.PathFinder.find_spec(name, folders) if folders else None
    except (ImportError, ValueError):  # of a module without a spec, such as __main__
        return None


def _package_root(path: Path) -> Path | None:
    """Return the folder of the installed package that a file belongs to; None for users' files."""
    above = (folder for folder in path.parents if folder.parent.name in PACKAGE_FOLDERS)
    return next(above, None)


def _is_own(file: Path, package: Path | None = None) -> bool:
    """Return whether a file is a user's own, or belongs to the named package."""
    if package is not None and file.is_relative_to(package):
        return True
    if any(part in PACKAGE_FOLDERS or part.startswith(COMPILED) for part in file.parts):
        return False
    return not any(file.is_relative_to(one) for one in _not_own())


@functools.cache
def _not_own() -> tuple[Path, ...]:
    """Return the folders of Python itself, of kdprof and of the system."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    packages = ("kdprof", "kdprof.methods", "kdprof.reports")
    ours = [place for package in packages for place in _folders_of(package)]
    caches = [os.path.expanduser(one) for one in LIBRARIES_OWN]  # noqa: PTH111 - no account needed
    caches += [os.environ[name] for name in LIBRARIES_VARIABLES if os.environ.get(name)]
    return tuple(Path(one).resolve() for one in (*python, *ours, *SYSTEM_FOLDERS, *caches))


def version_of(name: str) -> str | None:
    """Return the version of an installed package by the name it is imported as; None if a module of
    this name is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    if (file := _file_of(name)) is None or _is_own(file):
        return None
    distributions = importlib.metadata.packages_distributions().get(name, [])
    return " ".join(importlib.metadata.version(one) for one in distributions) or None


# Files that are read


@dataclass
class _Seen:
    """A file that was opened, and for which of the user's files.

    Attributes:
        reader: the module whose code was being imported; None if a function of the user's ran.
        read: it was opened for reading at least once.
        written: it was opened for writing at least once.
    """

    reader: Path | None
    read: bool = False
    written: bool = False


_opened: dict[Path, dict[Path, None]] = {}
"""The files that were read, by the user's file that needed them."""
_asked: set[Path] = set()
"""The users' files whose sources are part of an identity already."""
_following: list[dict[Path, _Seen]] = []
"""The files opened so far, for each context of :func:`following`."""
_hooked: list[bool] = []


@contextmanager
def following(module_file: Path) -> Iterator[None]:
    """Note the files that are opened for reading in this context: a user's file depends on them.

    What a module reads while it is imported belongs to that module, and so to every file that
    imports it.

    Raises:
        UserError: one of them is new, and what the file depends on was asked for before.
    """
    path = module_file.resolve()
    if not _hooked:
        sys.addaudithook(_note)  # it cannot be removed again
        _hooked.append(True)
    _following.append({})
    try:
        yield
    finally:
        seen = _following.pop()
    for file, one in _needed(seen, path.parent).items():
        known = _opened.setdefault(one.reader or path, {})
        if file not in known and path in _asked and file.suffix != ".py":
            raise UserError(
                f"{path} reads {file} after its results were looked for; declare it in the file: "
                f"reads = ({os.path.relpath(file, path.parent)!r},)"
            )
        known[file] = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Note a file that Python opens; an audit hook."""
    if event != "open" or not _following or not isinstance(arguments[0], (str, bytes)):
        return
    written = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)) if arguments[2] else False
    file = Path(os.fsdecode(arguments[0])).absolute()
    for seen in _following:
        one = seen.setdefault(file, _Seen(_importing()))
        one.read, one.written = one.read or not written, one.written or written


def _importing() -> Path | None:
    """Return the user's own module whose code is being imported; None if there is none."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        is_module = code.co_name == "<module>" and code.co_filename.endswith(".py")
        if is_module and _is_own(file := Path(code.co_filename).resolve()):
            return None if frame.f_globals.get("__name__") == "__main__" else file
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _needed(seen: dict[Path, _Seen], folder: Path) -> dict[Path, _Seen]:
    """Return the user's own files among those that were opened.

    A file that was made is one if it is still there, because the next process finds it. What is
    made in a folder for temporary files, or is gone from it, is none; nor is a compiled module
    without its source.
    """
    pythons = {*sys.path, getattr(sys.modules["__main__"], "__file__", None)}
    temporary, found = Path(tempfile.gettempdir()).resolve(), {}
    for name, one in seen.items():
        if not one.read or str(name) in pythons:
            continue
        file = _source(name.resolve())
        gone = not file.exists()
        passing = file.is_relative_to(temporary) and not file.is_relative_to(folder)
        if one.written and (gone or passing):
            continue
        if gone and (passing or name.suffix == ".pyc"):
            continue
        if _is_own(file) and not file.is_dir():
            found[file] = one
    return found


def _source(file: Path) -> Path:
    """Return the source of a compiled module, and any other file itself."""
    if file.suffix != ".pyc":
        return file
    try:
        return Path(importlib.util.source_from_cache(str(file)))
    except ValueError:
        return file


def _declared(module: ModuleType, path: Path) -> list[Path]:
    """Return the files and folders that the ``reads`` of a user's file names.

    Raises:
        UserError: it is not a tuple of texts, or a file does not exist.
    """
    reads = getattr(module, "reads", ())
    if not isinstance(reads, (tuple, list)) or not all(isinstance(one, str) for one in reads):
        raise UserError(f"{path}: reads must be a tuple of files, such as ('start.pth',)")
    files = [(path.parent / expanded(one)).resolve() for one in reads]
    if missing := [file for file in files if not file.exists()]:
        raise UserError(f"{path} declares that it reads {missing[0]}, which does not exist")
    return files
