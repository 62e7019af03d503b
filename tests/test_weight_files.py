"""Files that are no weights, are damaged or hostile: one line each, never code, never silence."""

import argparse
import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_cases import mmseg_state, own_network, own_state, saved

from kdprof.errors import UserError
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import (
    Weights,
    _class_problems,
    load_weights,
    misfits,
    read_weights,
)


def load(path):
    network = own_network()
    load_weights(network, read_weights(open_weights(path), network))
    return network


def refusal(path) -> str:
    """Return the one line with which a file is refused."""
    for reading in (lambda: read_weights(open_weights(path)), lambda: load(path)):
        with pytest.raises(UserError) as caught:
            reading()
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith((str(path), f"no file {path}", f"cannot read {path}"))
    return str(caught.value)


# What is no file of weights

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 19332096\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>"
DENIED = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'


def as_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO())
    return file.getvalue()


def as_zip(entries, how=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def as_script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), file)
    return file.getvalue()


def as_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def whole() -> bytes:
    file = io.BytesIO()
    torch.save(own_state(), file)
    return file.getvalue()


def flipped() -> bytes:
    content = bytearray(whole())
    content[len(content) // 2] ^= 1
    return bytes(content)


def without_directory() -> bytes:
    content = whole()
    return content[: content.rindex(b"PK\x05\x06")]


def odd_directory() -> bytes:
    """The directory states that an entry lies far behind the end of the file."""
    content = bytearray(whole())
    at = content.index(b"PK\x01\x02")
    content[at + 42 : at + 46] = struct.pack("<I", 2**31)
    return bytes(content)


BYTES = {
    "empty": (lambda: b"", "is empty; get it again"),
    "zeros": (lambda: bytes(10**4), "begins with zeros, as a download that was cut off"),
    "Git LFS": (lambda: LFS, "is a Git LFS pointer; run 'git lfs pull' where it lies"),
    "a page": (lambda: PAGE, "is a web page or a server's message; download the file itself"),
    "a refusal": (lambda: DENIED, "is a web page or a server's message"),
    "text": (lambda: "Gewichte für später\n".encode() * 40, "is a text file"),
    "gzip": (lambda: gzip.compress(whole()), "is compressed by gzip; unpack it"),
    "tar": (as_tar, "is a tar archive; unpack it"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 file"),
    "NumPy": (lambda: b"\x93NUMPY\x01" + bytes(600), "is a NumPy array; save its state_dict()"),
    "npz": (as_npz, "is a zip archive that torch.save did not write (a.npy); unpack it"),
    "a zipped checkpoint": (lambda: as_zip({"t.pth": whole()}), "did not write (t.pth)"),
    "TorchScript": (as_script, "is a TorchScript archive, whose network is code; save its"),
    "a bomb": (
        lambda: as_zip({"a/data.pkl": bytes(2**22)}, zipfile.ZIP_DEFLATED),
        "would unpack to 4.0 MiB, more than the file has",
    ),
    "Detectron2's pickle": (
        lambda: pickle.dumps({"model": {"a": np.ones(3)}, "__author__": "x"}, 2),
        "is a pickle that torch.save did not write; save its state_dict() with torch.save",
    ),
    "a pickle of today": (
        lambda: pickle.dumps({"a": 1}, 5),
        "is pickled by another protocol than torch.save's; save its state_dict() with torch.save",
    ),
    "another protocol": (
        lambda: saved_bytes({"a": 1}, pickle_protocol=4),
        "is pickled by another protocol than torch.save's",
    ),
    "half": (lambda: whole()[:2000], "is half downloaded or damaged (File is not a zip file)"),
    "a flipped bit": (flipped, "does not match its checksum"),
    "no directory": (without_directory, "is half downloaded or damaged (File is not a zip file)"),
    "an odd directory": (odd_directory, "is half downloaded or damaged"),
    "random": (lambda: np.random.default_rng(0).bytes(5000), "is half downloaded or damaged"),
    "a list": (lambda: saved_bytes([torch.ones(1)]), "holds a list, not a state dict"),
    "a tensor": (lambda: saved_bytes(torch.ones(1)), "holds a Tensor, not a state dict"),
    "no tensors": (lambda: saved_bytes({"a": 1, 2: 3}), "holds no tensors; its keys are 2, a"),
    "nothing": (lambda: saved_bytes({}), "holds no tensors; its keys are none"),
    "a network": (
        lambda: saved_bytes({"model": nn.ReLU()}),
        "holds more than tensors and plain values (torch.nn.modules.activation.ReLU); kdprof runs",
    ),
}


def saved_bytes(content, **how) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


@pytest.mark.parametrize("case", BYTES)
def test_what_holds_no_weights_is_refused_with_its_kind(case, tmp_path):
    content, message = BYTES[case]
    path = tmp_path / "t.pth"
    path.write_bytes(content())
    assert message in refusal(path)


@pytest.mark.parametrize("length", [0, 4, 8, 20, 300, -1])
def test_cut_safetensors(length, tmp_path):
    path = tmp_path / "t.safetensors"
    save_file(own_state(), path)
    path.write_bytes(path.read_bytes()[:length])
    assert "get it again" in refusal(path)


def test_safetensors_are_told_by_their_content(tmp_path):
    save_file(own_state(1.0), tmp_path / "t.bin")
    assert (load(tmp_path / "t.bin").module.classifier.weight == 1).all()


def test_what_is_no_regular_file(tmp_path):
    assert "no file " in refusal(tmp_path / "nowhere.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a pipe or device, not a file" in refusal(tmp_path / "pipe.pth")
    assert "is a pipe or device" in refusal("/dev/zero")
    (tmp_path / "link.pth").symlink_to("gone.pth")
    assert "No such file" in refusal(tmp_path / "link.pth")


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ([], "", "is a folder, not a file; give a file"),
        (["optimizer.bin", "model.safetensors"], "", "give a file in it: model.safetensors, opt"),
        (["pytorch_model.bin.index.json"], "", "in several files; load .* with from_pretrained"),
        (["m.index.json"], "m.index.json", "is one of several files of a checkpoint; load"),
        (["m-00001-of-00003.safetensors"], "m-00001-of-00003.safetensors", "is one of several"),
        ([".metadata", "__0_0.distcp"], "", "is a sharded checkpoint; join it: .* dcp_to_torch"),
        (["zero_to_fp32.py", "latest"], "", "is DeepSpeed's checkpoint; join it: python .*fp32.py"),
    ],
)  # fmt: skip
def test_checkpoints_in_several_files_are_refused_with_the_way_to_join_them(
    files, given, message, tmp_path
):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / given)


# Code


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_name_that_is_allowed_beside_weights_is_called(tmp_path):
    value = argparse.Namespace(bomb="x")
    content = open_weights(saved(tmp_path / "t.pth", {"args": value, **own_state()})).content
    assert not isinstance(content["args"], argparse.Namespace)
    pickled = b"\x80\x02cbuiltins\ngetattr\nU\x00U\x04join\x86R."
    # getattr("", "join")
    forged = as_zip({"a/data.pkl": pickled, "a/version": b"3\n", "a/byteorder": b"little"})
    (tmp_path / "f.pth").write_bytes(forged)
    assert "holds a _Unread, not a state dict" in refusal(tmp_path / "f.pth")
    bomb = saved(tmp_path / "b.pth", {"meta": Bomb(tmp_path / "sprung"), **own_state()})
    assert "holds more than tensors and plain values (posix.mkdir); kdprof runs no" in refusal(bomb)
    assert not (tmp_path / "sprung").exists()


def test_a_deep_or_endless_content_ends(tmp_path):
    endless: dict = {"a": own_state()["classifier.bias"]}
    endless |= {f"again{number}": endless for number in range(300)}
    wide = {f"{number}.b.c.d.{number}": torch.ones(1) for number in range(3000)}
    deep: dict = {}
    for _ in range(200):
        deep = {"model": deep}
    for content in (endless, {"model": endless, "state_dict": endless}, wide, deep):
        refusal(saved(tmp_path / "t.pth", content))


# Hostile tensors


def meta() -> torch.Tensor:
    return torch.empty(3, device="meta")


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


BIAS = {
    "sparse": (lambda: torch.ones(3).to_sparse(), "are sparse or nested (classifier.bias); save"),
    "meta": (meta, "have no values (device 'meta') (classifier.bias); save them from"),
    "quantised": (quantised, "are quantised (classifier.bias); save them with .dequantize()"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "are complex64 (classifier.bias)"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "are float8_e4m3fn"),
    "expanded": (lambda: torch.ones(1).expand(10**13), "have more elements than values (expanded)"),
    "NaN": (lambda: torch.tensor([1, float("nan"), 1]), "hold NaN (classifier.bias); use weights"),
    "infinity": (lambda: torch.tensor([1, float("inf"), 1]), "hold infinities (classifier.bias)"),
    "bool": (
        lambda: torch.ones(3, dtype=torch.bool),
        "another type: classifier.bias bool for floa",
    ),
    "integer": (lambda: torch.ones(3, dtype=torch.int8), "classifier.bias int8 for float32"),
    "a shape": (lambda: torch.ones(7), "of another shape: classifier.bias (7,) for (3,)"),
    "no dimension": (lambda: torch.tensor(1.0), "classifier.bias () for (3,)"),
    "too large": (
        lambda: torch.full((3,), 1e300, dtype=torch.float64),
        "out of the range of its type: classifier",
    ),
}


@pytest.mark.parametrize("case", BIAS)
def test_a_tensor_that_cannot_be_a_weight(case, tmp_path):
    value, message = BIAS[case]
    path = saved(tmp_path / "t.pth", {**own_state(), "classifier.bias": value()})
    assert message in refusal(path)


def test_every_problem_is_named_at_once(tmp_path):
    state = {key: value * float("nan") for key, value in own_state().items() if "track" not in key}
    state["classifier.bias"] = meta()
    with pytest.raises(UserError) as caught:
        read_weights(open_weights(saved(tmp_path / "t.pth", state)), own_network())
    first, second = sorted(caught.value.problems)
    assert "1 of 8 tensors have no values" in first
    assert "7 of 8 tensors hold NaN (body.0.bias, body.0.weight, body.1.bias and 4 more)" in second
    odd = {key.replace("body", "trunk"): value for key, value in own_state().items()}
    odd["classifier.weight"] = torch.ones(19, 4, 1, 1)
    (line,) = misfits(
        own_network(),
        read_weights(open_weights(saved(tmp_path / "o.pth", odd)), own_network()),
    )
    assert "missing: body.0.bias, body.0.weight, body.1.bias and 4 more; unexpected: trunk" in line
    assert "; of another shape: classifier.weight (19, 4, 1, 1) for (3, 4, 1, 1)" in line


ODD = "\x1b[31m\n\u2028" + "x" * 500
"""A name with a control sequence and ends of lines."""


@pytest.mark.parametrize(
    "content",
    [
        {ODD: 1},
        {ODD: torch.ones(3)},
        {ODD: {7: torch.ones(3)}},
        {**own_state(), ODD: torch.ones(3)},
        {ODD: own_state(), ODD + "a": own_state(1.0)},
        {f"a.{ODD}": torch.ones(1), f"a._orig_mod.{ODD}": torch.ones(1)},
        {**own_state(), f"classifier.{ODD}": meta()},
        {"state_dict": own_state(), "meta": {"CLASSES": ODD}},
        {"state_dict": {**own_state(), "classifier.bias": torch.ones(7)}, "meta": ODD},
    ],
)
def test_names_in_a_file_neither_end_a_line_nor_fill_it(content, tmp_path):
    line = refusal(saved(tmp_path / "t.pth", content))
    assert line.isprintable()
    assert len(line) < 900


def test_a_variance_below_0(tmp_path):
    state = {**own_state(), "body.1.running_var": torch.tensor([1.0, 1.0, -1.0, 1.0])}
    assert "are variances below 0 (body.1.running_var)" in refusal(saved(tmp_path / "t.pth", state))


def test_masks_of_an_own_network_may_be_infinite(tmp_path):
    network = own_network()
    network.module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    path = saved(tmp_path / "t.pth", network.module.state_dict())
    load_weights(network, read_weights(open_weights(path), network))


def test_weights_that_are_all_0_are_told(tmp_path):
    state = {key: torch.zeros_like(value) for key, value in own_state().items()}
    weights = read_weights(open_weights(saved(tmp_path / "t.pth", state)), own_network())
    assert weights.taken == "all of them are 0"


@pytest.mark.parametrize("keys", [[0, 1], [b"a", (1, 2)], [None, "classifier.bias"]])
def test_keys_that_are_no_text(keys, tmp_path):
    content = {"state_dict": dict.fromkeys(keys, torch.ones(3))}
    line = refusal(saved(tmp_path / "t.pth", content))
    assert "keys under `state_dict` are no text" in line


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"CLASSES": 3}, "meta.CLASSES is 3, no list of names; save the file with the names"),
        ({"CLASSES": "road"}, "meta.CLASSES is 'road', no list of names"),
        ({"CLASSES": [1, 2, 3]}, "meta.CLASSES is [1, 2, 3], no list of names"),
        ({"CLASSES": torch.ones(3)}, "meta.CLASSES is tensor([1., 1., 1.]), no list"),
        ({"CLASSES": [["road"] * 10**5]}, "... no list of names"),
        ({"dataset_meta": {"classes": {"a": 1}}}, "meta.dataset_meta.classes is {'a': 1}, no list"),
    ],
)
def test_classes_of_odd_types(meta, message, tmp_path):
    for state in (own_state(), mmseg_state()):
        path = saved(tmp_path / "t.pth", {"state_dict": state, "meta": meta})
        with pytest.raises(UserError) as caught:
            read_weights(open_weights(path), own_network() if "body.0.bias" in state else None)
        assert message.removeprefix("...") in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("classes", [None, ["road", "sky", "car"]])
def test_classes_that_are_not_stated_are_not_compared(classes, tmp_path):
    for meta in ({"CLASSES": classes}, {}, 7, None):
        path = saved(tmp_path / "t.pth", {"state_dict": mmseg_state(), "meta": meta})
        found = read_weights(open_weights(path)).classes
        assert found is None or list(found) == classes


@pytest.mark.parametrize(
    "odd", ["conv_seg.weight", "bottleneck.conv.weight", "psp_modules.0.1.conv.weight"]
)
@pytest.mark.parametrize("value", [None, torch.tensor(1.0), torch.ones(3)])
def test_layers_by_which_a_network_is_told(odd, value, tmp_path):
    state = {**mmseg_state(), f"decode_head.{odd}": value}
    with pytest.raises(UserError, match="but no classifier of a pspnet or deeplabv3 head"):
        read_weights(open_weights(saved(tmp_path / "t.pth", state)))


def test_a_header_that_names_no_network(tmp_path):
    state = {f"backbone.net.{k}" if "stem" in k else k: v for k, v in mmseg_state().items()}
    path = tmp_path / "t.safetensors"
    save_file(state, path, {"network": "pspnt-r18"})
    with pytest.raises(
        UserError, match=r"t\.safetensors: its header: .* did you mean 'pspnet-r18'"
    ):
        read_weights(open_weights(path))


def test_names_of_fewer_classes_than_the_file_has_are_refused(monkeypatch):
    monkeypatch.setattr(Weights, "num_classes", 3)
    held = Weights(Path("a.pth"), "mmsegmentation", {}, {}, None, ("road",))
    (problem,) = _class_problems(held, ("road", "sky", "car"))
    assert problem == "a.pth names 1 classes and has 3; correct its CLASSES or leave them out"
