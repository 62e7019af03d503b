"""Files of weights, opened without running code from them; what is none is named in one line."""

from __future__ import annotations

import os
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from kdprof.errors import UserError, some
from kdprof.store import check_regular, expanded

BEGINNING = 512
"""Bytes by which the kind of a file is told."""
REASON = 200
"""Characters of the message of a library in an error."""
AGAIN = "get it again"
STATE_DICT = "save its state_dict() with torch.save"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
"""The end of the names of Hugging Face's shards."""
_MAGIC = {
    b"\x1f\x8b": ("is compressed by gzip", "unpack it"),
    b"BZh": ("is compressed by bzip2", "unpack it"),
    b"\xfd7zXZ": ("is compressed by xz", "unpack it"),
    b"(\xb5/\xfd": ("is compressed by zstd", "unpack it"),
    b"7z\xbc\xaf": ("is a 7z archive", "unpack it"),
    b"Rar!": ("is a RAR archive", "unpack it"),
    b"\x89HDF": ("is an HDF5 file, as Keras writes them", STATE_DICT),
    b"\x93NUMPY": ("is a NumPy array", STATE_DICT),
    b"GGUF": ("holds quantised weights (GGUF)", "give those that were not quantised"),
    b"version https://git-lfs": ("is a Git LFS pointer", "run 'git lfs pull' where it lies"),
}
"""The first bytes of files that are taken for weights."""
_CODE = re.compile(r"call reduce|Can only (create|build|set)|torch\.(nested|distributed)")
"""In torch's messages about objects that it does not make."""
_PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype|html|head|\?xml)", re.IGNORECASE | re.DOTALL)


class _Unread:
    """Stands for a value beside the weights that is not read: it ignores what it is built from."""

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_BESIDE = (
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
)
"""What torchvision's, timm's and mmengine's checkpoints hold beside the weights. The names stand
for :class:`_Unread`; what they name is neither imported nor called."""
_NUMPY = {"scalar": np.float64(0), "_reconstruct": np.zeros(0)}
"""NumPy's functions that make a value again, with a value of each."""
HARMLESS: list[Any] = [
    *((_Unread, name) for name in _BESIDE),
    *(
        (value.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
        for name, value in _NUMPY.items()
        for core in ("core", "_core")  # numpy 1 and 2
    ),
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    np.dtype,
    np.ndarray,
]
"""What a file may hold besides what torch allows: NumPy's numbers and arrays, and :data:`_BESIDE`.
None of them runs code from the file."""


@dataclass(frozen=True)
class WeightFile:
    """A file of weights.

    Attributes:
        place: where in the file the weights are to be taken from (``FILE#PLACE``); None = wherever
            they are.
        content: what the file holds.
        header: the text in its header (safetensors only).
    """

    path: Path
    place: str | None
    content: dict[Any, Any]
    header: dict[str, str]


def open_weights(
    given: str | Path, *, choices: str = "give the path of a checkpoint"
) -> WeightFile:
    """Open a file that torch or safetensors wrote, ``FILE`` or ``FILE#PLACE``.

    Args:
        choices: what to give if there is no such file.

    No code in a file is run: a pickle with anything except tensors, plain values and
    :data:`HARMLESS` ones is refused.

    Raises:
        UserError: there is no such file, it is damaged, or it is no file of weights.
    """
    path, place = file_and_place(expanded(str(given)))
    if not os.path.lexists(path):
        raise UserError(f"no file {path}; {choices}")
    _check_file(path)
    with path.open("rb") as file:
        beginning = file.read(BEGINNING)
    _check_beginning(path, beginning)
    if _is_safetensors(path, beginning):
        return WeightFile(path, place, *_safetensors(path))
    if beginning.startswith(b"PK"):
        _check_archive(path)
    content = _unpickled(path, beginning)
    if not isinstance(content, dict):
        raise NoWeights(path, f"holds a {type(content).__name__}, not a state dict", STATE_DICT)
    return WeightFile(path, place, content, {})


class NoWeights(UserError):
    """A file holds no weights that can be read.

    Attributes:
        what: what is wrong with it: words that follow its name.
    """

    def __init__(self, path: Path, what: str, mend: str):
        super().__init__(f"{path} {what}; {mend}")
        self.what = what


def file_and_place(given: Path) -> tuple[Path, str | None]:
    """Return a path, and what stands behind the ``#`` in its name, if that is no part of it."""
    name, mark, place = given.name.rpartition("#")
    if not mark or not name or given.exists():
        return given, None
    return given.with_name(name), place


def _check_file(path: Path) -> None:
    """Refuse a folder, a pipe, a device, and one file of several that belong together."""
    if path.is_dir():
        _refuse_folder(path)
    try:
        check_regular(path, path.stat(), sys.maxsize)
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give another file") from None
    shard = _SHARD.search(path.name)
    if path.name.endswith(".index.json") or (shard and int(shard[2]) > 1):
        raise NoWeights(path, "is one of several files of a checkpoint", _joined(path.parent))


def _refuse_folder(path: Path) -> None:
    """Refuse a folder; the message says which file to give, or how it is made."""
    names = sorted(file.name for file in path.iterdir())
    if any(name.endswith(".distcp") for name in names):
        convert = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
        raise NoWeights(path, "is a sharded checkpoint", f"join it: {convert} {path} FILE.pth")
    if "zero_to_fp32.py" in names:
        script = path / "zero_to_fp32.py"
        raise NoWeights(path, "is DeepSpeed's checkpoint", f"join it: python {script} {path} FILE")
    if any(name.endswith(".index.json") for name in names):
        raise NoWeights(path, "holds a checkpoint in several files", _joined(path))
    files = [name for name in names if Path(name).suffix in (".safetensors", ".pth", ".pt", ".bin")]
    mend = f"give a file in it: {some(files)}" if files else "give a file"
    raise NoWeights(path, "is a folder, not a file", mend)


def _joined(folder: Path) -> str:
    return (
        f"load {folder} with from_pretrained() and write one file with save_pretrained(FOLDER, "
        "max_shard_size='100GB')"
    )


def _check_beginning(path: Path, beginning: bytes) -> None:
    """Refuse a file that its first bytes show to be something else."""
    if not beginning:
        raise NoWeights(path, "is empty", AGAIN)
    if not any(beginning):
        raise NoWeights(path, "begins with zeros, as a download that was cut off", AGAIN)
    for magic, (what, mend) in _MAGIC.items():
        if beginning.startswith(magic):
            raise NoWeights(path, what, mend)
    if _PAGE.match(beginning):
        raise NoWeights(path, "is a web page or a server's message", "download the file itself")
    if beginning[257:262] == b"ustar":
        raise NoWeights(path, "is a tar archive", "unpack it and give a checkpoint")
    if _is_text(beginning):
        raise NoWeights(path, "is a text file", "give the path of a checkpoint")


def _is_text(beginning: bytes) -> bool:
    """Return whether bytes are text. The end may be in the middle of a character."""
    text = beginning.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(beginning) - 3:
        return False
    return all(c.isprintable() or c in "\t\r\n" for c in text)


def _is_safetensors(path: Path, beginning: bytes) -> bool:
    """Return whether a file is named or begins as safetensors: with the length of a JSON header."""
    length = int.from_bytes(beginning[:8], "little")
    return path.suffix == ".safetensors" or (
        beginning[8:9] == b"{" and length < path.stat().st_size
    )


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # by damage: SafetensorError, OSError, UnicodeDecodeError, ...
        raise _damaged(path, error) from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that torch did not write, or whose content is not what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist())
            bad = archive.testzip()
    except UserError:
        raise
    except Exception as error:  # by damage: BadZipFile, zlib.error, NotImplementedError, ...
        raise _damaged(path, error) from error
    if bad is not None:
        raise _damaged(path, f"{bad} does not match its checksum")


def _check_entries(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    ends = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in ends or any(end.startswith("code/") for end in ends):
        raise NoWeights(path, "is a TorchScript archive, whose network is code", STATE_DICT)
    if "data.pkl" not in ends:
        what = f"is a zip archive that torch.save did not write ({some(names)})"
        raise NoWeights(path, what, "unpack it and give a checkpoint")
    unpacked_bytes = sum(entry.file_size for entry in entries)
    if unpacked_bytes > path.stat().st_size:
        what = f"would unpack to {unpacked_bytes / 2**20:,.1f} MiB, more than the file has"
        raise NoWeights(path, what, f"torch.save does not compress: {AGAIN}")


def _unpickled(path: Path, beginning: bytes) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling, zip and end-of-file errors share no narrower base
        raise _unreadable(path, beginning, error) from error


def _unreadable(path: Path, beginning: bytes, error: Exception) -> NoWeights:
    message = " ".join(str(error).split())
    reason = message.partition("WeightsUnpickler error: ")[2] or message
    reason = reason.partition(" Check the documentation")[0]
    if "Unsupported operand" in reason and beginning.startswith((b"PK", b"\x80")):
        return NoWeights(path, "is pickled by another protocol than torch.save's", STATE_DICT)
    if "magic number" in reason:
        return NoWeights(path, "is a pickle that torch.save did not write", STATE_DICT)
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", reason)
    if found or _CODE.search(reason):
        held = "holds more than tensors and plain values" + (f" ({found[1]})" if found else "")
        mend = f"kdprof runs no code from files: if you trust it, {STATE_DICT}"
        return NoWeights(path, held, mend)
    return _damaged(path, reason)


def _damaged(path: Path, reason: object) -> NoWeights:
    told = " ".join(str(reason).split())[:REASON] or type(reason).__name__
    return NoWeights(path, f"is half downloaded or damaged ({told})", AGAIN)
