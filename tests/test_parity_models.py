"""Published layouts, imported: the numbers of the original network code, from regenerated weights.

Reads the folder in KDPROF_PARITY_MODELS. Every file in it is a test; one that is not handled fails.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_models_case import FILES, FOLDER, regenerated
from torch import Tensor

from kdprof.models import SegmentationNetwork
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import check_weights, load_weights, read_weights

TOLERANCE = 1e-5
CLASSES = tuple(f"class {index}" for index in range(19))
NAMES = {
    "mmseg_pspnet_r18-d8": "pspnet-resnet18c",
    "mmseg_pspnet_r50-d8": "pspnet-resnet50c",
    "mmseg_pspnet_r101-d8": "pspnet-resnet101c",
    "mmseg_deeplabv3_r18-d8": "deeplabv3-resnet18c",
    "mmseg_deeplabv3_r101-d8": "deeplabv3-resnet101c",
    "cirkd_deeplabv3_resnet18": "cirkd-deeplabv3-resnet18s",
    "cirkd_deeplabv3_resnet101": "cirkd-deeplabv3-resnet101s",
    "cirkd_pspnet_resnet18": "cirkd-pspnet-resnet18s",
    "cirkd2022_deeplabv3_resnet18": "cirkd-deeplabv3-resnet18s-w128",
    "cirkd2022_deeplabv3_resnet101": "cirkd-deeplabv3-resnet101s-w256",
}
"""What each file must be recognised as, by its content."""
DAMPED = re.compile(r"layer[1-4]\.\d+\.bn3\.weight$")

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden numbers in {FOLDER}")


def imported(state, folder: Path, golden) -> SegmentationNetwork:
    """Save as the project publishes it, and read it back as a user would."""
    name, path = str(golden["name"]), folder / "teacher.pth"
    aligned = name.startswith("alt")
    meta = {"meta": {"config": f"dict(align_corners={aligned})"}, "state_dict": state}
    torch.save(meta if "backbone.stem.0.weight" in state else state, path)
    weights = read_weights(open_weights(path))
    assert weights.num_classes == 19
    found = check_weights(weights, str(weights.name), CLASSES)
    network = SegmentationNetwork(found, 19).eval()
    loaded = load_weights(network, weights)
    assert (len(loaded.matched), loaded.missing, loaded.left) == (len(state), [], [])
    return network


def close(ours: Tensor, theirs: np.ndarray) -> None:
    expected = torch.from_numpy(np.asarray(theirs))
    assert ours.shape == expected.shape
    assert (ours - expected).norm() <= TOLERANCE * expected.norm()


def taps_of(network: SegmentationNetwork, golden, picture: str):
    with torch.no_grad():
        return network.read(
            torch.from_numpy(golden[f"input.{picture}"]),
            ("logits", "aux", "head", "c2", "c3", "c4", "c5"),
        )


def resized(network: SegmentationNetwork, logits: Tensor, golden) -> Tensor:
    size = golden["input.a"].shape[-2:]
    return F.interpolate(logits, size, mode="bilinear", align_corners=network.align_corners)


def sized(path: Path):
    """The largest networks, those on a ResNet-101, take ten seconds each."""
    return pytest.param(path, id=path.stem, marks=pytest.mark.slow if "101" in path.stem else ())


@pytest.mark.parametrize("path", [sized(path) for path in FILES])
def test_an_imported_network_computes_what_the_original_computed(path, tmp_path):
    golden = np.load(path, allow_pickle=False)
    state = regenerated(golden)
    network = imported(state, tmp_path, golden)
    assert str(network.name) == NAMES[path.stem]
    assert sum(p.numel() for p in network.parameters()) == golden["n_params"]
    assert network.align_corners == bool(golden["align_corners_resize"])
    for picture in "abc":
        taps = taps_of(network, golden, picture)
        close(taps.logits, golden[f"logits.{picture}"])
        close(taps.aux, golden[f"aux_logits.{picture}"])
        close(taps.head.mean((0, 2, 3)), golden[f"feature.{picture}.mean"])
        close(taps.c5.mean((0, 2, 3)), golden[f"stage4.{picture}.mean"])
        if picture == "a":
            for stage, tap in enumerate((taps.c2, taps.c3, taps.c4, taps.c5), 1):
                close(tap.mean((0, 2, 3)), golden[f"stage{stage}.a.mean"])
                close(tap.std((0, 2, 3), correction=0), golden[f"stage{stage}.a.std"])
            whole = resized(network, taps.logits, golden)
            assert np.array_equal(whole.argmax(1).numpy(), golden["labels.a"])
            close(whole.mean((2, 3)), golden["resized.a.mean"])
            if "feature.a" in golden:
                close(taps.head, golden["feature.a"])
    if "damped.factor" in golden:
        compare_damped(state, tmp_path, golden)
    if "alt769.logits.a" in golden:
        compare_aligned(state, tmp_path, golden)


def compare_damped(state, folder: Path, golden) -> None:
    factor = np.float32(golden["damped.factor"]).item()
    damped = {k: v * factor if DAMPED.search(k) else v for k, v in state.items()}
    assert sum(DAMPED.search(key) is not None for key in state) == golden["damped.n_scaled"]
    network = imported(damped, folder, golden)
    for picture in "ac":
        taps = taps_of(network, golden, picture)
        close(taps.logits, golden[f"damped.logits.{picture}"])
        close(taps.aux, golden[f"damped.aux_logits.{picture}"])


def compare_aligned(state, folder: Path, golden) -> None:
    """The configurations of 769x769: the file's own configuration says it, or the name does."""
    path = folder / "aligned.pth"
    torch.save({"meta": {"config": "dict(align_corners=True)"}, "state_dict": state}, path)
    weights = read_weights(open_weights(path))
    network = SegmentationNetwork(check_weights(weights, str(weights.name), CLASSES), 19).eval()
    load_weights(network, weights)
    assert network.align_corners
    taps = taps_of(network, golden, "a")
    close(taps.logits, golden["alt769.logits.a"])
    labels = resized(network, taps.logits, golden).argmax(1).numpy()
    assert np.array_equal(labels, golden["alt769.labels.a"])
