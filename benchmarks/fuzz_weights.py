"""Fuzzed files of weights and checkpoints: damage, strange structures, and code.

Every way that a file of weights is read is tried on files of every format: kdprof's own
checkpoints, mmsegmentation's, bare state dicts, torch's format before 1.6, and safetensors.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fuzz_texts as texts
import torch
from fuzz_case import ACCEPTED, LOST, Case, Wrong, run
from fuzz_data import CLASSES, folder_of_images
from fuzz_folders import good_folder, student_of
from fuzz_settings import NOWHERE
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from kdprof.errors import UserError
from kdprof.models import build
from kdprof.store import RunFolder
from kdprof.train import checkpoint

NETWORK = "pspnet-test_resnet"
FORMATS = ("own", "mmseg", "bare", "old", "safetensors")
CHECKED = ("own", "mmseg", "bare")
"""Formats with a checksum of every tensor: a change in them is never accepted."""


@cache
def state() -> dict[str, Tensor]:
    """Return the state of a small network with :data:`CLASSES`."""
    torch.manual_seed(0)
    return build(NETWORK, len(CLASSES)).state_dict()


def _content(form: str) -> Any:
    if form == "own":
        return {"step": {"student": dict(state())}, "iteration": 6}
    if form == "mmseg":
        return {"state_dict": dict(state()), "meta": {"CLASSES": CLASSES}}
    return OrderedDict(state())


def _saved(content: Any, form: str) -> bytes:
    if form == "safetensors":
        tensors = {key: value.contiguous() for key, value in content.items()}
        return safetensors_bytes(tensors, {"network": NETWORK, "classes": "\n".join(CLASSES)})
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=form != "old")
    return file.getvalue()


@cache
def _good(form: str) -> bytes:
    return _saved(_content(form), form)


def weights(case: Case) -> str:
    """A file of weights is damaged, strange or holds code: never run, never taken for another."""
    return case.random.choice((_damage, _damage, _structure, _code, _header))(case)


def _damage(case: Case) -> str:
    form = case.random.choice(FORMATS)
    data, how = texts.damaged(case.random, _good(form))
    case.tell(f"{form}, {how}")
    return _used(case, form, data, same=form in CHECKED)


def _used(case: Case, form: str, data: bytes, *, same: bool = False) -> str:
    """Give a file to one of its readers.

    Args:
        same: whether what it holds must be the good weights, if it is read.
    """
    suffix = ".safetensors" if form == "safetensors" else case.random.choice((".pth", ".pt", ""))
    path = case.folder / f"weights{suffix}"
    path.write_bytes(data)
    way = case.random.choice(("evaluate", "evaluate", "export", "resume", "plan"))
    if way == "resume" and form == "own":
        folder = RunFolder(case.folder / "run")
        folder.path.mkdir()
        folder.checkpoint.write_bytes(data)
        case.tell("a run begins again with it")
        held, _ = checkpoint.load(folder)
        return _same(held["step"]["student"]) if held and same else ACCEPTED
    if way == "export" and form == "own":
        store, made = good_folder(case), case.folder / "made.safetensors"
        student = student_of(store)
        student.checkpoint.write_bytes(data)
        record = json.loads(student.record.read_text())
        record["miou_per_class"] = dict.fromkeys(CLASSES, record["miou"])
        student.record.write_text(json.dumps(record))
        store.study.write_text(f'student = "{NETWORK}"\n')
        done = run(case, "export", made, "--out", store.root, "--method", "kd", "--budget",
                   student.path.parent.name)  # fmt: skip
        return _same(load_file(made)) if same and made.exists() else done.outcome
    if way == "plan":
        option = case.random.choice(("--teacher-weights", "--student-backbone-weights"))
        return run(case, "plan", "--study", "quickstart", "--budget", "9", *NOWHERE,
                   "--teacher", NETWORK, option, path).outcome  # fmt: skip
    arguments = ("evaluate", "--model", NETWORK, "--data", f"folder:{_images(case)}", "--device",
                 "cpu", "--json", "--weights")  # fmt: skip
    done = run(case, *arguments, path)
    if same and not done.code and json.loads(done.out)["scores"] != _good_scores(case, arguments):
        raise Wrong(LOST, "other scores")
    return done.outcome


def _images(case: Case) -> Path:
    """Return a data set of a few small images, with :data:`CLASSES`."""
    root = case.folder / "set"
    folder_of_images(root)
    return root


_scores: dict[str, Any] = {}


def _good_scores(case: Case, arguments: tuple[object, ...]) -> Any:
    """Return the scores of the good weights."""
    if "own" not in _scores:
        path = case.folder / "good.pth"
        path.write_bytes(_good("own"))
        _scores["own"] = json.loads(run(case, *arguments, path).out)["scores"]
    return _scores["own"]


def _same(found: dict[str, Any]) -> str:
    """Check that weights are the good ones.

    Raises:
        Wrong: they are others.
    """
    if wrong := [key for key, value in state().items() if not _equal(found.get(key), value)]:
        raise Wrong(LOST, f"{len(wrong)} other tensors, such as {wrong[0]}")
    return ACCEPTED


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


# Structures

Change = Callable[[dict[Any, Any], str], Any]
"""Returns what stands in place of a state dict, given it and one of its keys."""


def _with(value: Callable[[Tensor], Any]) -> Change:
    return lambda held, key: {**held, key: value(held[key])}


def _nested(held: dict[Any, Any], key: str) -> Any:
    for _ in range(300):
        held = {"state_dict": held}
    return held


def _circular(held: dict[Any, Any], key: str) -> Any:
    made = dict(held)
    made["state_dict"] = made
    return made


STRUCTURES: dict[str, Change] = {
    "an integer key": lambda held, key: {**held, 5: held[key]},
    "a key of bytes": lambda held, key: {**held, b"a": held[key]},
    "a tuple as key": lambda held, key: {**held, (1, 2): held[key]},
    "a key with control characters": lambda held, key: {**held, "\x1b[31m\u202e": held[key]},
    "a missing key": lambda held, key: {k: v for k, v in held.items() if k != key},
    "a key of 10 kB": lambda held, key: {**held, "k" * 10_240: held[key]},
    "nan": _with(lambda t: torch.full_like(t.float(), torch.nan)),
    "infinity": _with(lambda t: torch.full_like(t.float(), torch.inf)),
    "only nan": lambda held, key: {
        k: torch.full_like(v.float(), torch.nan) for k, v in held.items()
    },
    "sparse": _with(lambda t: t.float().to_sparse()),
    "on the meta device": _with(lambda t: t.to("meta")),
    "quantised": _with(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    "complex": _with(lambda t: t.to(torch.complex64)),
    "bool": _with(lambda t: t.bool()),
    "float64": _with(lambda t: t.double()),
    "bfloat16": _with(lambda t: t.bfloat16()),
    "expanded to 10^12": _with(lambda t: t.float().flatten()[:1].expand(10**12)),
    "no elements": _with(lambda t: t.flatten()[:0]),
    "a scalar": _with(lambda t: t.flatten()[0]),
    "another shape": _with(lambda t: t.flatten()),
    "a parameter": _with(lambda t: torch.nn.Parameter(t.float())),
    "a number for a tensor": _with(lambda t: 3),
    "None for a tensor": _with(lambda t: None),
    "text for a tensor": _with(lambda t: "\x1b[31m"),
    "a list for a tensor": _with(lambda t: t.tolist()),
    "numpy for a tensor": _with(lambda t: t.numpy()),
    "a dict for a tensor": _with(lambda t: {"a": t}),
    "an empty dict": lambda held, key: {},
    "a list": lambda held, key: list(held.items()),
    "a tensor": lambda held, key: held[key],
    "None": lambda held, key: None,
    "text": lambda held, key: "weights",
    "nested 300 times": _nested,
    "in itself": _circular,
    "only integer keys": lambda held, key: dict(enumerate(held.values())),
    "twice, with module.": lambda held, key: {**held, f"module.{key}": held[key]},
    "with module.": lambda held, key: {f"module.{k}": v for k, v in held.items()},
}
METAS: tuple[Any, ...] = (
    None, 3, "x", [], {"CLASSES": 3}, {"CLASSES": None}, {"CLASSES": "abc"}, {"CLASSES": ()},
    {"CLASSES": (1, 2, 3)}, {"CLASSES": ("road",)}, {"CLASSES": ("\x1b[31m", "sky", "car")},
    {"CLASSES": {"a": 1}}, {"CLASSES": [["road"], "sky", "car"]}, {"dataset_meta": 5},
    {"dataset_meta": {"classes": 5}}, {"config": 5}, {"config": "x" * 10_240},
    {"config": "dict(align_corners="}, {5: 5}, {"classes": torch.zeros(3)},
    {"CLASSES": ("road", "sky", "car"), "PALETTE": 5},
)  # fmt: skip


def _structure(case: Case) -> str:
    form = case.random.choice(("own", "mmseg", "bare", "old"))
    held = dict(state())
    if case.random.random() < 0.3:
        meta = case.random.choice(METAS)
        case.tell(f"meta {meta!r}")
        content: Any = {"state_dict": held, "meta": meta}
    else:
        how = case.random.choice(sorted(STRUCTURES))
        key = case.random.choice(sorted(held))
        case.tell(f"{form}, {how}: {key}")
        content = STRUCTURES[how](held, key)
        if form == "own":
            content = {"step": {"student": content}, "iteration": 6}
        elif form == "mmseg":
            content = {"state_dict": content, "meta": {"CLASSES": CLASSES}}
    return _used(case, form, _saved(content, form))


# Code


class _Calls:
    """Is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _calls(case: Case) -> list[_Calls]:
    path = str(case.canary)
    return [
        _Calls(os.mkdir, path),
        _Calls(eval, f"__import__('os').mkdir({path!r})"),
        _Calls(exec, f"import os; os.mkdir({path!r})"),
        _Calls(os.system, f"mkdir {path}"),
        _Calls(Path.mkdir, Path(path)),
        _Calls(torch.load, path),
        _Calls(torch.save, 1, path),
    ]


def _code(case: Case) -> str:
    call = case.random.choice(_calls(case))
    case.tell(f"a pickle that calls {call.call[0].__name__}")
    form = case.random.choice(("own", "mmseg", "bare", "old", "pickle", "npz", "joined"))
    held: Any = {**state(), "decode_head.conv_seg.bias": call}
    content = case.random.choice((call, held, {"state_dict": held}, {"step": {"student": held}},
                                  {"state_dict": state(), "meta": call}, [call]))  # fmt: skip
    if form == "pickle":
        return _used(case, form, pickle.dumps(content, protocol=case.random.choice((0, 2, 4))))
    if form == "npz":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../../x.npy", pickle.dumps(content))
            archive.writestr("data.pkl", pickle.dumps(content))
        return _used(case, form, file.getvalue())
    if form == "joined":
        return _used(case, form, _good("old") + pickle.dumps(content))
    return _used(case, form, _saved(content, form))


# Headers of safetensors, directories of zip files


def _header(case: Case) -> str:
    if case.random.random() < 0.5:
        return _zip_directory(case)
    data = _good("safetensors")
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if case.random.random() < 0.3:
        made = struct.pack("<Q", case.random.choice((0, 1, length - 1, length + 1, 2**40, 2**63)))
        case.tell(f"a header of another length, {struct.unpack('<Q', made)[0]}")
        return _used(case, "safetensors", made + data[8:])
    if case.random.random() < 0.5:
        key = case.random.choice(("network", "classes", "format", "preprocessing"))
        header["__metadata__"][key] = texts.hostile(case.random)
        how = f"{key} is {header['__metadata__'][key]!r}"
    else:
        header, how = texts.changed_json(case.random, header)
    case.tell(f"header: {how}")
    try:
        written = json.dumps(header, allow_nan=True).encode()
    except ValueError as error:  # a number of more digits than Python writes
        raise UserError(str(error)) from None
    return _used(case, "safetensors", struct.pack("<Q", len(written)) + written + rest)


def _zip_directory(case: Case) -> str:
    """Change what a zip file says of its entries: their names, sizes, and how many there are."""
    form = case.random.choice(CHECKED)
    source = zipfile.ZipFile(io.BytesIO(_good(form)))
    entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    place = case.random.randrange(len(entries))
    name, content = entries[place]
    way = case.random.choice(
        ("twice", "gone", "empty", "bomb", "compressed", "out of the folder", "order", "end"),
    )  # fmt: skip
    case.tell(f"{form}: entry {name} {way}")
    if way == "twice":
        entries.append((name, content[::-1]))
    elif way == "gone":
        del entries[place]
    elif way in ("empty", "bomb"):
        entries[place] = (name, b"" if way == "empty" else bytes(2**27))
    elif way == "out of the folder":
        entries.append(("../../canary/x", b"x"))
    elif way == "order":
        entries.reverse()
    file = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if way in ("bomb", "compressed") else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", packed) as archive:
        for entry, data in entries:
            with warnings.catch_warnings(action="ignore"):  # of a name that is there twice
                archive.writestr(entry, data)
    data = file.getvalue()
    if way == "end":
        place = len(data) - 22 + case.random.randrange(22)
        data = data[:place] + bytes([case.random.randrange(256)]) + data[place + 1 :]
    return _used(case, form, data)
