import json

import numpy as np
import pytest
import torch
from processes import kdprof
from safetensors import safe_open
from small_study import train_small

from kdprof.errors import UserError
from kdprof.models import AdaptedNetwork, build
from kdprof.models.export import export
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import check_weights, load_weights, read_weights
from kdprof.store import Store
from kdprof.train import checkpoint

CLASSES = ("road", "sky", "a car")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    made = build("pspnet-r18", len(CLASSES))
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return made.eval()


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_what_is_written_loads_back_bit_equal(network, tmp_path, ending):
    path = tmp_path / f"student{ending}"
    export(network, path, CLASSES, (64, 64))
    weights = read_weights(open_weights(path))
    assert weights.classes == CLASSES
    assert weights.source == {".safetensors": "kdprof", ".pth": "mmsegmentation"}[ending]
    again = build(check_weights(weights, "pspnet-r18", CLASSES), len(CLASSES))
    told = load_weights(again, weights)
    assert (told.missing, told.left) == ([], [])
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("stem", ["", "c"], ids=["plain", "deep"])
@pytest.mark.parametrize("depth", [18, 34, 50, pytest.param(101, marks=pytest.mark.slow)])
def test_every_resnet_of_mmsegmentation_computes_the_same_after_its_file(depth, stem, tmp_path):
    torch.manual_seed(depth)
    name, path = f"pspnet-resnet{depth}{stem}", tmp_path / "t.pth"
    network = build(name, len(CLASSES)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    export(network, path, CLASSES, (64, 64))
    weights = read_weights(open_weights(path))
    again = build(check_weights(weights, name, CLASSES), len(CLASSES)).eval()
    load_weights(again, weights)
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = (made(images, ["logits"]).logits for made in (again, network))
    assert torch.equal(ours, theirs)


def test_a_plain_stem_is_named_where_the_deep_one_is_asked_for(tmp_path):
    export(build("pspnet-resnet18", 3), tmp_path / "t.pth", CLASSES, (64, 64))
    weights = read_weights(open_weights(tmp_path / "t.pth"))
    with pytest.raises(UserError, match=r"pspnet-resnet18, not pspnet-r18; use pspnet-resnet18$"):
        check_weights(weights, "pspnet-r18", CLASSES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pspnet-resnetblur18", "mmsegmentation has no pspnet-resnetblur18"),
        ("pspnet-resnet18s", "mmsegmentation has no pspnet-resnet18s"),
        ("pspnet-resnet18d", "mmsegmentation has no pspnet-resnet18d"),
        ("pspnet-ecaresnet26t", "mmsegmentation has no pspnet-ecaresnet26t"),
        ("pspnet-r18-os16", "end at stride 8, not at 16 as pspnet-resnet18c-os16; export .safet"),
    ],
)
def test_networks_that_mmsegmentation_does_not_compute_are_refused(name, message, tmp_path):
    """They have a ResNet's stages; their keys were written as if they were mmsegmentation's."""
    with pytest.raises(UserError, match=message):
        export(build(name, 3), tmp_path / "t.pth", CLASSES, (64, 64))
    assert list(tmp_path.iterdir()) == []


def test_keys_are_mmsegmentations(network, tmp_path):
    export(network, tmp_path / "s.pth", CLASSES, (64, 64))
    content = torch.load(tmp_path / "s.pth", weights_only=True)
    for key in ("backbone.stem.0.weight", "backbone.stem.7.bias", "backbone.layer4.1.bn2.bias",
                "decode_head.psp_modules.3.1.conv.weight", "decode_head.conv_seg.bias",
                "auxiliary_head.convs.0.bn.weight"):  # fmt: skip
        assert key in content["state_dict"]
    assert content["meta"]["CLASSES"] == CLASSES


def test_safetensors_tell_the_network_and_its_preprocessing(tmp_path):
    network = build("cirkd-deeplabv3-r18-w128", 3)
    export(network, tmp_path / "c.safetensors", CLASSES, (64, 64))
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        told = file.metadata()
    assert told["network"] == "cirkd-deeplabv3-resnet18s-w128"
    assert json.loads(told["preprocessing"])["bgr"] is True
    assert str(read_weights(open_weights(tmp_path / "c.safetensors")).name) == told["network"]
    with pytest.raises(UserError, match="mmsegmentation has no cirkd-deeplabv3-resnet18s-w128"):
        export(network, tmp_path / "c.pth", CLASSES, (64, 64))
    with pytest.raises(UserError, match=r"export writes \.safetensors, \.pth, \.onnx, not '\.h5'"):
        export(network, tmp_path / "c.h5", CLASSES, (64, 64))


def _tied_maps(module, images):
    head = module.second(module.first(module.stem(images)).relu())
    return {"logits": module.classifier(head), "head": head}


def tied_network():
    """Two convolutions of one weight, and a bias that is a part of another's memory."""
    module = torch.nn.Module()
    module.stem, module.classifier = torch.nn.Conv2d(3, 4, 3, 4), torch.nn.Conv2d(4, 3, 1)
    module.first, module.second = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3)
    module.second.weight = module.first.weight
    both = torch.arange(8.0)
    module.first.bias, module.second.bias = map(torch.nn.Parameter, both.split(4))
    return AdaptedNetwork(module, _tied_maps, 3, name="tied")


def test_weights_that_share_memory_are_written_and_load_back(tmp_path):
    path, network = tmp_path / "t.safetensors", tied_network().eval()
    export(network, path, CLASSES, (64, 64))
    again = tied_network().eval()
    loaded = load_weights(again, read_weights(open_weights(path), again))
    assert (loaded.missing, loaded.left) == ([], [])
    assert again.module.second.weight is again.module.first.weight
    for key, value in network.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], value)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    taps = [made(images, ["logits"]).logits for made in (network, again)]
    assert torch.equal(*taps)


def test_onnx_runtime_computes_the_same(network, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "student.onnx"
    assert "in ONNX Runtime" in export(network, path, CLASSES, (64, 96))
    images = np.random.default_rng(1).integers(0, 256, (1, 3, 64, 96), dtype=np.uint8)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": images})
    with torch.no_grad():
        logits = network(torch.from_numpy(images), ["logits"]).logits
    expected = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear")
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


def test_a_trained_student_and_its_teacher_are_exported_and_evaluated(tmp_path):
    out, file = tmp_path / "out", tmp_path / "student.safetensors"
    train_small(out, methods=["kd"])
    run = ("--method", "kd", "--budget", "6")
    done = kdprof("export", file, "--out", out, *run)
    assert done.returncode == 0, done.stderr
    store = Store(out)
    state, _ = checkpoint.load(store.run_folder("kd", "6", 0))
    with safe_open(file, "pt") as written:
        for key, value in state["step"]["student"].items():
            assert torch.equal(written.get_tensor(key), value)
    done = kdprof("evaluate", "--model", "pspnet-test_resnet", "--weights", file,
                  "--data", "synthetic", "--device", "cpu", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["network"] == "pspnet-test_resnet"
    assert kdprof("export", tmp_path / "t.safetensors", "--out", out, "--teacher").returncode == 0
    done = kdprof("export", file, "--out", out, "--method", "kd", "--budget", "7")
    assert done.returncode == 2
    assert "its runs are: --method kd --budget 6 --seed 0" in done.stderr
    for surplus in (run, ("--seed", "0")):
        done = kdprof("export", file, "--out", out, "--teacher", *surplus)
        assert (done.returncode, done.stderr) == (
            2, "kdprof: --teacher is no run of a method; leave --method, --budget and --seed out\n"
        )  # fmt: skip
    for lacking in ((), ("--method", "kd"), ("--budget", "6")):
        done = kdprof("export", file, "--out", out, *lacking)
        assert (done.returncode, done.stderr) == (
            2, "kdprof: give --method and --budget of a run, or --teacher\n"
        )  # fmt: skip

    # What is wrong with a run is said as it is.
    def refusal(*what):
        done = kdprof("export", tmp_path / "again.safetensors", "--out", out, *what)
        assert done.returncode == 2
        assert not (tmp_path / "again.safetensors").exists()
        (line,) = done.stderr.splitlines()
        return line

    for folder, what in (
        (store.run_folder("kd", "6", 0), run),
        (store.teacher_folder(), ["--teacher"]),
    ):
        for path in folder.path.glob("checkpoint*"):
            path.unlink()
        assert f"{folder.path}/checkpoint.pt is gone; delete {folder.path}" in refusal(*what)
    record = json.loads(folder.record.read_text())
    folder.record.write_text(json.dumps(record | {"finished": False}))
    assert "teacher is not trained to its end; give its 'kdprof train'" in refusal("--teacher")
    folder.record.unlink()
    assert "nothing was trained there yet; run 'kdprof train' first" in refusal("--teacher")
    study = store.study.read_text()
    store.study.write_text(f'teacher_weights = "t.pth"\n{study}')
    assert "teacher: the study trains no network there" in (line := refusal("--teacher"))
    assert line.endswith("it reads t.pth; use that")
