"""What other projects wrap around a state dict: which weights are taken, and what is said of it."""

import argparse
import pathlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from weight_cases import CLASSES, mmseg_state, own_network, own_state, prefixed, saved

from kdprof.errors import UserError
from kdprof.models import AdaptedNetwork
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import load_weights, read_weights

TAKEN, OTHER = 1.0, 2.0


def mmcv_copies(state):
    """What mmcv's EMAHook adds to a state: a buffer for each parameter, not for buffers."""
    parameters = {k: v for k, v in state.items() if not k.endswith(("_mean", "_var", "_tracked"))}
    return {f"ema_{k.replace('.', '_')}": v for k, v in parameters.items()}


class Wrapped(nn.Module):
    def __init__(self, name, value):
        super().__init__()
        setattr(self, name, own_network(value).module)


def averaged_model(value):
    """The state of torch's own AveragedModel: ``module.`` and ``n_averaged``."""
    return torch.optim.swa_utils.AveragedModel(own_network(value).module).state_dict()


OURS, THEIRS = own_state(TAKEN), own_state(OTHER)
STEPS = {"steps": torch.tensor(7)}
CASES = {
    "bare": (lambda: OURS, ""),
    "model_state_dict": (
        lambda: {"epoch": 3, "model_state_dict": OURS, "optimizer_state_dict": {"state": {}}},
        "weights under `model_state_dict`",
    ),
    **{
        name: (lambda name=name: {name: OURS}, f"weights under `{name}`")
        for name in ("state_dict", "model", "net", "network", "student", "teacher", "params_ema")
    },
    "nested": (
        lambda: {"checkpoint": {"model": {"weights": OURS}}},
        "weights under `checkpoint.model.weights`",
    ),
    "data parallel": (lambda: prefixed("module.", OURS), "prefix `module.` taken off"),
    "compiled": (lambda: prefixed("_orig_mod.", OURS), "prefix `_orig_mod.` taken off"),
    "compiled, data parallel": (
        lambda: prefixed("_orig_mod.module.", OURS),
        "prefix `module.` and `_orig_mod.` taken off",
    ),
    "data parallel, compiled": (
        lambda: {"model": prefixed("module._orig_mod.", OURS)},
        "weights under `model`, prefix `module.` and `_orig_mod.` taken off",
    ),
    "a compiled part": (
        lambda: {k.replace("body.", "body._orig_mod."): v for k, v in OURS.items()},
        "prefix `_orig_mod.` taken off",
    ),
    "Lightning": (
        lambda: {
            "state_dict": {**Wrapped("model", TAKEN).state_dict(), "loss.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.5",
            "hyper_parameters": {"lr": 0.1},
        },
        "weights under `state_dict`, prefix `model.` taken off, left out: loss.weight",
    ),
    "Lightning's WeightAveraging": (
        lambda: {
            "state_dict": prefixed("net.", OURS),
            "current_model_state": prefixed("net.", THEIRS),
            "averaging_state": {"n_averaged": torch.tensor(4)},
        },
        "averaged weights under `state_dict`, prefix `net.` taken off, others under "
        "`current_model_state.net` (FILE#current_model_state.net takes them)",
    ),
    "timm": (
        lambda: {
            "state_dict": THEIRS,
            "state_dict_ema": OURS,
            "args": argparse.Namespace(lr=0.1, path=pathlib.PosixPath("x")),
            "metric": np.float64(0.5),
        },
        "averaged weights under `state_dict_ema`, others under `state_dict` (FILE#state_dict takes "
        "them)",
    ),
    "torchvision": (
        lambda: {"model": THEIRS, "model_ema": averaged_model(TAKEN), "epoch": 3},
        "averaged weights under `model_ema`, prefix `module.` taken off, others under `model` "
        "(FILE#model takes them), left out: n_averaged",
    ),
    "mmengine, which exchanges them": (
        lambda: {
            "meta": {"mmengine_version": "0.10"},
            "state_dict": OURS,
            "ema_state_dict": {**prefixed("module.", THEIRS), **STEPS},
        },
        "averaged weights under `state_dict`, others under `ema_state_dict.module` "
        "(FILE#ema_state_dict.module takes them)",
    ),
    "an ema_state_dict of others": (
        lambda: {"state_dict": THEIRS, "ema_state_dict": OURS},
        "averaged weights under `ema_state_dict`, others under `state_dict` (FILE#state_dict takes "
        "them)",
    ),
    "averaged weights in one state dict": (
        lambda: {"state_dict": {**prefixed("net.", THEIRS), **prefixed("ema_net.", OURS)}},
        None,
    ),
    "mmcv's EMAHook": (
        lambda: {"state_dict": {**OURS, **mmcv_copies(THEIRS)}},
        "weights under `state_dict`, others under `state_dict.ema_` (FILE#state_dict.ema_ takes "
        "them)",
    ),
    "NumPy arrays": (lambda: {k: v.numpy() for k, v in OURS.items()}, ""),
    "an optimiser beside it": (
        lambda: {
            "model": OURS,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]},
        },
        "weights under `model`",
    ),
}  # fmt: skip


def read(path):
    network = own_network()
    weights = read_weights(open_weights(path), network)
    return network, weights, load_weights(network, weights)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_the_right_weights_are_taken_and_it_is_said(case, tmp_path):
    content, told = CASES[case]
    network, weights, loaded = read(saved(tmp_path / "t.pth", content()))
    assert all((parameter == TAKEN).all() for parameter in network.module.parameters())
    assert (len(loaded.matched), loaded.missing, loaded.left) == (len(OURS), [], [])
    if told is not None:
        assert weights.taken == told


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("timm", "state_dict"),
        ("torchvision", "model"),
        ("mmengine, which exchanges them", "ema_state_dict"),
        ("mmengine, which exchanges them", "ema_state_dict.module"),
        ("Lightning's WeightAveraging", "current_model_state"),
        ("mmcv's EMAHook", "state_dict.ema_"),
        ("averaged weights in one state dict", "state_dict.net"),
    ],
)
def test_the_other_weights_can_be_asked_for(case, place, tmp_path):
    path = saved(tmp_path / "t.pth", CASES[case][0]())
    network, weights, _ = read(f"{path}#{place}")
    assert all((parameter == OTHER).all() for parameter in network.module.parameters())
    assert weights.path == path
    assert "averaged" not in weights.taken


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"student": OURS, "teacher": THEIRS}, "holds weights under student, teacher, which fit"),
        (
            {"state_dict": {**prefixed("student.", OURS), **prefixed("teacher.", THEIRS)}},
            "under state_dict.student, state_dict.teacher, which fit equally; say which, as in",
        ),
        (
            {"model": OURS, "model_ema": dict(OURS), "swa": THEIRS},
            "holds weights under model, model_ema, swa, which fit equally",
        ),
    ],
)
def test_what_nothing_distinguishes_is_refused_with_the_names(content, message, tmp_path):
    path = saved(tmp_path / "t.pth", content)
    assert message in refusal(path)
    assert "has no weights at 'techer'" in refusal(f"{path}#techer")


def test_the_nearest_place_is_named(tmp_path):
    path = saved(tmp_path / "t.pth", {"student": OURS, "teacher": THEIRS})
    assert "did you mean 'teacher'?" in refusal(f"{path}#techer")
    (tmp_path / "t.pth#teacher").write_bytes(saved(tmp_path / "u.pth", OURS).read_bytes())
    network, _, _ = read(f"{path}#teacher")  # a file of this name comes first
    assert (network.module.classifier.weight == TAKEN).all()


def test_one_dict_under_two_names_is_one(tmp_path):
    network, _, _ = read(saved(tmp_path / "t.pth", {"model": OURS, "state_dict": OURS}))
    assert (network.module.classifier.weight == TAKEN).all()


def test_a_network_whose_own_names_look_like_a_wrapper(tmp_path):
    """``module.`` and ``ema_`` are taken off only if the network does not have them."""
    inner = Wrapped("module", TAKEN)
    inner.module.register_buffer("ema_classifier_bias", torch.zeros(3))

    def maps(network, images):
        head = network.module.body(images)
        return {"logits": network.module.classifier(head), "head": head}

    network = AdaptedNetwork(inner, maps, len(CLASSES), name="odd")
    for prefix in ("", "module."):
        path = saved(tmp_path / "t.pth", prefixed(prefix, inner.state_dict()))
        weights = read_weights(open_weights(path), network)
        assert weights.state.keys() == inner.state_dict().keys()


def test_mmsegmentations_keys_in_the_same_wrappers(tmp_path):
    content = {
        "state_dict": mmseg_state(OTHER),
        "state_dict_ema": prefixed("module.", mmseg_state(TAKEN)),
    }
    weights = read_weights(open_weights(saved(tmp_path / "t.pth", content)))
    assert weights.told() == (
        "mmsegmentation names, averaged weights under `state_dict_ema`, prefix `module.` taken "
        "off, others under `state_dict` (FILE#state_dict takes them)"
    )
    assert (weights.state["decode_head.conv_seg.weight"] == TAKEN).all()
    assert weights.num_classes == 3


def test_what_mmengine_keeps_beside_the_weights_is_neither_imported_nor_run(tmp_path, monkeypatch):
    """A HistoryBuffer names its functions by getattr, as pickle's protocol 2 does."""
    fake = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.log, self.methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

        def mean(self):
            pass

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = fake.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__ = fake.__name__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    fake.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    path = saved(tmp_path / "t.pth", {"state_dict": OURS, "message_hub": HistoryBuffer()})
    monkeypatch.setitem(sys.modules, fake.__name__, None)
    assert read(path)[1].taken == "weights under `state_dict`"


def test_values_of_other_types_are_converted_and_it_is_said(tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in OURS.items()}
    network, _, loaded = read(saved(tmp_path / "h.pth", half))
    assert loaded.summary() == "9 entries loaded, 8 of them from float16 (exact)"
    assert network.module.classifier.weight.dtype == torch.float32
    double = {**OURS, "classifier.bias": torch.full((3,), 0.1, dtype=torch.float64)}
    _, _, loaded = read(saved(tmp_path / "d.pth", double))
    assert loaded.summary() == "9 entries loaded, 1 of them from float64 (rounded)"
    counts = {**OURS, "body.1.num_batches_tracked": torch.tensor(7.0)}
    network, _, _ = read(saved(tmp_path / "c.pth", counts))
    assert network.module.body[1].num_batches_tracked == 7
