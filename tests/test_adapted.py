import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import kdprof
from safetensors.torch import save_file
from small_study import price, small_study, small_toml

from kdprof.discovery import builtin_methods
from kdprof.errors import UserError
from kdprof.measure.counting.count_study import count_costs
from kdprof.models import build
from kdprof.models.export import export
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import load_weights, read_weights
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy

MINE = """
from torch import nn

from kdprof.models import AdaptedNetwork


class Mine(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Conv2d(16, num_classes, 1)


def maps(network, pictures):
    head = network.body(network.stem(pictures))
    return {"logits": network.classifier(head), "head": head}


def build(num_classes):
    return AdaptedNetwork(Mine(num_classes), maps, num_classes, name="mine")


def wrong(num_classes):
    return Mine(num_classes)


def other_classes(num_classes):
    return AdaptedNetwork(Mine(3), maps, num_classes)


def other_tap(num_classes):
    return AdaptedNetwork(
        Mine(num_classes), lambda n, p: {**maps(n, p), "neck": p}, num_classes
    )
"""


WRONG = """


def raises(classes):
    raise ValueError("no such" + chr(10) + "width")


def raises_in_maps(classes):
    return AdaptedNetwork(Mine(classes), lambda n, p: {"logits": n.neck(p)}, classes)


def of(classes, found=None, **settings):
    return AdaptedNetwork(Mine(classes), found or maps, classes, **settings)


def list_of_maps(classes):
    return of(classes, lambda n, p: list(maps(n, p).values()))


def tuple_as_logits(classes):
    return of(classes, lambda n, p: {"logits": (maps(n, p)["logits"],)})


def flat_head(classes):
    return of(classes, lambda n, p: {**maps(n, p), "head": maps(n, p)["head"].mean((2, 3))})


def no_maps(classes):
    return of(classes, lambda n, p: {})


def two_means(classes):
    return of(classes, mean=(1, 2))


def text_mean(classes):
    return of(classes, mean="rgb")


def infinite_std(classes):
    return of(classes, std=(1, 1, float("inf")))


def zero_std(classes):
    return of(classes, std=(58.4, 0, 57.4))


def std_in_0_1(classes):
    return of(classes, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def mean_in_0_1(classes):
    return of(classes, mean=(0.485, 0.456, 0.406))


def black_mean(classes):
    return of(classes, mean=(0, 0, 0))


def mean_with_std_1(classes):
    return of(classes, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))


def caffe(classes):
    return of(classes, mean=[123, 117, 104], std=[1, 1, 1])
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "mine.py:raises cannot be built: ValueError: no such width ({file}:{line})"),
        (
            "raises_in_maps",
            "mine.py:raises_in_maps cannot be built: AttributeError: 'Mine' object has no "
            "attribute 'neck' ({file}:{line})",
        ),
        ("list_of_maps", "own: its maps are a list; return a dict of tensors by the names "),
        ("tuple_as_logits", "own: its map 'logits' is a tuple; return a Tensor (N, C, h, w)"),
        ("flat_head", "own: its map 'head' is a Tensor (1, 16); return a Tensor (N, C, h, w)"),
        ("no_maps", "own: its maps hold no 'logits', only nothing"),
        ("two_means", "own: mean = (1, 2); give three finite numbers"),
        ("text_mean", "own: mean = rgb; give three finite numbers"),
        ("infinite_std", "own: std = (1, 1, inf); give three finite numbers"),
        ("zero_std", "own: std = (58.4, 0.0, 57.4); images are divided by it"),
        ("std_in_0_1", "images are in 0..255: multiply numbers for 0..1 by 255"),
        (
            "mean_in_0_1",
            "own: mean = (0.485, 0.456, 0.406), std = (58.395, 57.12, 57.375), but images are in "
            "0..255: multiply numbers for 0..1 by 255",
        ),
    ],
)
def test_what_is_wrong_in_ones_own_network_is_said_with_its_place(mine, function, message):
    mine.write_text(MINE + WRONG)
    with pytest.raises(UserError) as caught:
        build(f"{mine}:{function}", 5)
    lines = mine.read_text().splitlines()
    first = lines.index(f"def {function}(classes):") + 2
    assert message.format(file=mine, line=first) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_normalisation_may_be_a_list_and_divide_by_one(mine):
    mine.write_text(MINE + WRONG)
    network = build(f"{mine}:caffe", 5)
    assert vars(network.preprocessing) == {"mean": (123, 117, 104), "std": (1, 1, 1), "bgr": False}
    assert build(f"{mine}:black_mean", 5).preprocessing.mean == (0, 0, 0)
    assert build(f"{mine}:mean_with_std_1", 5).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_channels_and_strides_are_looked_at(mine):
    network = build(f"{mine}:build", 5)
    assert network.info.channels == {"logits": 5, "head": 16}
    assert network.info.stride == {"logits": 4, "head": 4}
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    taps = network(images, ["head"])
    assert taps.head.shape == (2, 16, 8, 12)
    with pytest.raises(AttributeError):
        _ = taps.logits
    with pytest.raises(UserError, match="mine has no tap 'c5'; it has head, logits"):
        network(images, ["c5"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:build", "no file"),
        ("mine.py:built", "has no function 'built'; did you mean 'build'?"),
        ("mine.py:wrong", "returned a Mine; return AdaptedNetwork"),
        ("mine.py:other_classes", "its logits have 3 channels for 5 classes"),
        ("mine.py:other_tap", "unknown tap 'neck'"),
    ],
)
def test_what_is_no_network_gets_one_line(mine, spec, message):
    with pytest.raises(UserError) as caught:
        build(f"{mine.parent}/{spec}", 5)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_network_lacks_is_told_before_anything_runs(mine):
    changes = {"student": f"{mine}:build", "methods": ["kd", "reviewkd", "dkd"]}
    with pytest.raises(UserError) as caught:
        ResolvedStudy(small_study(**changes))
    told = "\n".join(caught.value.problems)
    assert "mine has no auxiliary head; set step.aux_weight = 0" in told
    assert "of the student, which has head, logits; use another network or method" in told
    assert "method 'dkd' uses classifier of the student" in told
    assert "method 'kd'" not in told


def test_ones_own_network_is_trained_under_every_method_it_can_give_to(mine, tmp_path):
    changes = {"methods": ["none", "kd"], "step.aux_weight": 0.0, "budgets": ["3"]}
    study, out = small_toml(tmp_path, **changes), tmp_path / "out"
    options = ("--study", study, "--out", out, "--student", "./mine.py:build")
    done = kdprof("train", *options, cwd=mine.parent)
    assert done.returncode == 0, done.stderr
    assert "2 runs trained" in done.stdout


SETTINGS = (
    "step.aux_weight=0", "data_settings.synthetic_size=40x56", "data_settings.synthetic_train=6",
    "data_settings.synthetic_val=3", "data_settings.workers=0", "data_settings.cache=none",
    "evaluation.points=1",
)  # fmt: skip
IN_SECONDS = (
    "--data", "synthetic", "--device", "cpu", "--precision", "fp32", "--batch", "2", "--crop",
    "32x48", "--method", "none", "--no-control", "--budget", "3", "--seeds", "1", "--max-time",
    "0.01", "--in-process", *(f"--set={setting}" for setting in SETTINGS),
)  # fmt: skip
"""Options that make any preset small."""


def test_a_preset_trains_ones_own_network(mine):
    """Presets name ImageNet's weights for the backbones of their own networks."""
    options = ("--study", "camvid-pspnet-r18", "--student", "mine.py:build", *IN_SECONDS)
    done = kdprof("train", *options, "--teacher", "mine.py:build", cwd=mine.parent)
    assert done.returncode == 0, done.stderr
    for role in ("student", "teacher"):
        assert (
            done.stderr.count(
                f"{role}_backbone_weights: none instead of the preset's imagenet; "
                f"{mine}:build loads its weights itself\n"
            )
            == 1
        )
    stored = tomllib.loads((mine.parent / "kdprof-out/study.toml").read_text())
    assert stored["student_backbone_weights"] == stored["teacher_backbone_weights"] == "none"


@pytest.mark.parametrize("given", ["option", "set", "file"])
def test_backbone_weights_given_for_ones_own_network_are_refused(mine, given):
    (mine.parent / "s.toml").write_text('student_backbone_weights = "imagenet"')
    study, *more = {
        "option": ("camvid-pspnet-r18", "--student-backbone-weights", "imagenet"),
        "set": ("camvid-pspnet-r18", "--set", "student_backbone_weights=imagenet"),
        "file": ("s.toml",),
    }[given]
    options = ("--study", study, "--student", "mine.py:build", *IN_SECONDS, *more)
    done = kdprof("train", *options, cwd=mine.parent)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"student_backbone_weights: {mine}:build loads its weights itself; set it to none, not "
        "imagenet"
    )
    assert not (mine.parent / "kdprof-out/study.toml").exists()


def test_ones_own_weights_are_taken_strictly_and_given_back(mine, tmp_path):
    """As a teacher, in an evaluation, and from an export of a student that was trained."""
    torch.manual_seed(0)
    own = build(f"{mine}:build", 12)
    torch.save(own.module.state_dict(), tmp_path / "own.pth")
    changes = {"teacher": f"{mine}:build", "teacher_weights": str(tmp_path / "own.pth")}
    study = ResolvedStudy(small_study(**changes, **{"step.aux_weight": 0.0}))
    teacher, told = study.factory.published_teacher()
    assert all(
        torch.equal(a, b) for a, b in zip(teacher.parameters(), own.parameters(), strict=True)
    )
    assert told.endswith(f"the network's own names: {len(own.module.state_dict())} entries loaded")

    state = own.module.state_dict()
    del state["stem.0.bias"]
    torch.save({**state, "stem.0.scale": torch.ones(8)}, tmp_path / "other.pth")
    evaluation = ("evaluate", "--model", "./mine.py:build", "--data", "synthetic", "--weights")
    done = kdprof(*evaluation, "other.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert "does not fit mine: missing: stem.0.bias; unexpected: stem.0.scale" in done.stderr

    changes = {"methods": ["none"], "step.aux_weight": 0.0, "budgets": ["3"]}
    toml = small_toml(tmp_path, **changes)
    price(tmp_path / "kdprof-out", small_study(student=f"{mine}:build", **changes))
    train = ("train", "--study", toml, "--student", "./mine.py:build", "--no-control")
    assert kdprof(*train, cwd=tmp_path).returncode == 0
    given = ("--method", "none", "--budget", "3")
    for file in ("student.safetensors", "student.onnx"):
        done = kdprof("export", file, *given, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    refused = kdprof("export", "student.pth", *given, cwd=tmp_path)
    assert "mmsegmentation has no mine" in refused.stderr
    checkpoint = tmp_path / "kdprof-out/runs/none/3/0/checkpoint.pt"
    scores = [
        json.loads(kdprof(*evaluation, file, "--json", cwd=tmp_path).stdout)["scores"]
        for file in ("student.safetensors", checkpoint)
    ]
    assert scores[0] == scores[1]

    mine.write_text(MINE.replace('name="mine"', 'name="mine", mean=(0, 0, 0), std=(255, 255, 255)'))
    for command in (
        (*evaluation, "student.safetensors"),
        (*evaluation, checkpoint),
        ("export", "again.safetensors", *given),
    ):
        done = kdprof(*command, cwd=tmp_path)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "was trained on images normalised with mean (123.675, 116.28, 103.53) and" in line
        assert "mine normalises them with mean (0.0, 0.0, 0.0) and std (255.0, 255.0" in line
    assert not (tmp_path / "again.safetensors").exists()


OF_TIMM = {"mean": (127.5,) * 3, "std": (127.5,) * 3, "bgr": False}
OF_IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "bgr": False}


def stored(folder, kind, network, preprocessing):
    """Weights as an export, a checkpoint, or a state dict of another program."""
    state = network.module.state_dict()
    stated = {} if preprocessing is None else {"preprocessing": preprocessing}
    if kind == "export":
        header = {"network": network.info.name, "classes": "a\nb\nc"}
        header |= {key: json.dumps(value) for key, value in stated.items()}
        save_file(state, folder / "w.safetensors", header)
        return folder / "w.safetensors"
    content = {"step": {"student": state}, **stated} if kind == "checkpoint" else state
    torch.save(content, folder / "w.pth")
    return folder / "w.pth"


@pytest.mark.parametrize("kind", ["export", "checkpoint", "state dict"])
@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("smp-fpn-tu-test_resnet", OF_TIMM, None),
        ("smp-fpn-tu-test_resnet", OF_IMAGENET, r"normalised with mean \(123.675, .*, smp-fpn-tu"),
        ("smp-fpn-tu-test_resnet", {**OF_TIMM, "bgr": True}, r"127.5\) \(BGR\), smp-fpn-tu-test"),
        ("smp-fpn-tu-test_resnet", None, "does not say how its images were normalised, and "),
        ("smp-fpn-tu-test_resnet", {"mean": [1, 2]}, "'preprocessing' is .*, no mean and std"),
        ("smp-fpn-tu-test_resnet", [1], "'preprocessing' is .*, no mean and std"),
        ("smp-fpn-tu-resnet18", None, None),
        ("smp-fpn-resnet18", None, None),
        ("smp-fpn-resnet18", OF_TIMM, r"normalised with mean \(127.5, .*\), smp-fpn-resnet18 norm"),
    ],
)  # fmt: skip
def test_weights_for_images_of_another_normalisation_are_refused(
    tmp_path, kind, name, stated, message
):
    """Earlier versions normalised the images of all these networks as ImageNet's."""
    pytest.importorskip("segmentation_models_pytorch")
    network = build(name, 3)
    file = open_weights(stored(tmp_path, kind, network, stated))
    if message is None or kind == "state dict":  # which says nothing, and is the user's own
        assert load_weights(network, read_weights(file, network)).missing == []
        return
    with pytest.raises(UserError, match=message) as caught:
        read_weights(file, network)
    assert "\n" not in str(caught.value)


def test_an_export_states_the_normalisation_that_it_is_read_with(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    network = build("smp-fpn-tu-test_resnet", 3)
    export(network, tmp_path / "w.safetensors", ("a", "b", "c"), (64, 64))
    file = open_weights(tmp_path / "w.safetensors")
    assert json.loads(file.header["preprocessing"])["mean"] == [127.5] * 3
    assert read_weights(file, network).classes == ("a", "b", "c")


def test_segformer_has_its_published_size_and_taps():
    pytest.importorskip("transformers")
    network = build("segformer-b0", 19)
    # 3.8 M in table 1 of arXiv:2105.15203, with its 150 classes 3.75 M.
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(3.72e6, rel=0.01)
    assert network.info.channels == {
        "logits": 19, "head": 256, "c2": 32, "c3": 64, "c4": 160, "c5": 256,
    }  # fmt: skip
    assert network.info.stride == {"logits": 4, "head": 4, "c2": 4, "c3": 8, "c4": 16, "c5": 32}
    with pytest.raises(UserError, match="did you mean 'segformer-b"):
        build("segformer-b7", 19)


def test_an_encoder_that_a_folder_does_not_have_is_never_random(tmp_path):
    pytest.importorskip("transformers")
    network = build("segformer-b0", 3).module
    network.save_pretrained(tmp_path)
    loaded = build("segformer-b0", 3, backbone_weights=str(tmp_path)).module
    for key, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    state = network.state_dict()
    lost = next(key for key in state if not key.startswith("decode_head."))
    del state[lost]
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=f"lacks 1 entries of the encoder of segformer-b0 .{lost}"):
        build("segformer-b0", 3, backbone_weights=str(tmp_path))


def test_segmentation_models_pytorch_networks():
    pytest.importorskip("segmentation_models_pytorch")
    network = build("smp-unet-resnet18", 5)
    assert network.info.channels["logits"] == 5
    assert network.info.stride["logits"] == 1
    assert network.info.stride["c5"] == 32
    with pytest.raises(UserError, match="did you mean 'smp-unet-resnet34'"):
        build("smp-unett-resnet34", 5)
    with pytest.raises(UserError, match="cannot build smp-unet-resnet17"):
        build("smp-unet-resnet17", 5)
    with pytest.raises(UserError, match="cannot build smp-fpn-tu-inception_v4: The size of tensor"):
        build("smp-fpn-tu-inception_v4", 5)


def test_the_stages_of_an_encoder_that_ends_early_are_named_by_their_strides():
    """Its c2 was the image, its c5 the map at stride 8."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = build("smp-pspnet-resnet18", 5).eval()
    assert network.info.stride == {"logits": 1, "head": 8, "c2": 4, "c3": 8}
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    encoder = smp.encoders.get_encoder("resnet18", depth=3).eval()
    encoder.load_state_dict(network.module.encoder.state_dict())
    with torch.no_grad():
        *_, c2, c3 = encoder((images - network.mean) / network.std)
        taps = network(images, ["c2", "c3"])
    assert torch.equal(taps.c2, c2)
    assert torch.equal(taps.c3, c3)
    changes = {"student": "smp-pspnet-resnet18", "step.aux_weight": 0, "methods": ["reviewkd"]}
    with pytest.raises(UserError, match=r"c5 of the student, which has .*; use another network"):
        ResolvedStudy(small_study(**changes))


@pytest.mark.parametrize("architecture", ["unet", "fpn", "pan", "deeplabv3", "upernet"])
def test_other_architectures_of_the_library_have_all_stages(architecture):
    pytest.importorskip("segmentation_models_pytorch")
    info = build(f"smp-{architecture}-resnet18", 5).info
    widths = {tap: info.channels[tap] for tap in ("c2", "c3", "c4", "c5")}
    assert widths == {"c2": 64, "c3": 128, "c4": 256, "c5": 512}
    assert info.stride["c2"] == 4


def test_images_are_normalised_as_the_weights_of_an_encoder_need_it():
    """timm's configurations of these weights: mean 0 and std 1; mean and std 0.5; ImageNet's."""
    pytest.importorskip("segmentation_models_pytorch")
    for encoder, mean, std in (
        ("tu-mobilevitv2_050", (0, 0, 0), (255, 255, 255)),
        ("tu-test_resnet", (127.5,) * 3, (127.5,) * 3),
        ("tu-resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ):
        network = build(f"smp-fpn-{encoder}", 3)
        assert (network.preprocessing.mean, network.preprocessing.std) == (mean, std)
        assert network.mean.flatten().tolist() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, None),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, r"need RGB images of mean \(127.5, 127.5, 127.5\)"),
        ({"input_space": "BGR"}, "need BGR images of mean"),
        ({"input_range": [0, 255]}, r"need RGB images of mean \(0.485,"),
        ({"input_range": [-1, 3]}, "the normalisation of the weights 'imagenet' is not known"),
        ({"std": None}, "the normalisation of the weights 'imagenet' is not known"),
    ],
)  # fmt: skip
def test_weights_that_need_another_normalisation_are_refused(told, message, monkeypatch):
    """The library reads it from the hub; here it is given."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    usual = {"input_space": "RGB", "input_range": [0, 1], "mean": [0.485, 0.456, 0.406],
             "std": [0.229, 0.224, 0.225]}  # fmt: skip
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda *_: usual | told)
    make = smp.create_model
    monkeypatch.setattr(
        smp, "create_model", lambda *a, **k: make(*a, **k | {"encoder_weights": None})
    )
    if message is None:
        build("smp-fpn-resnet18", 3, backbone_weights="imagenet")
        return
    with pytest.raises(UserError, match=message):
        build("smp-fpn-resnet18", 3, backbone_weights="imagenet")


def test_a_file_for_an_encoder_of_timm_is_not_replaced_by_its_imagenet_weights():
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError, match="the backbone weights of a tu- encoder are none or imag"):
        build("smp-fpn-tu-resnet18", 3, backbone_weights="mine.pth")


@pytest.mark.parametrize("package", ["transformers", "segmentation_models_pytorch"])
def test_a_missing_package_gets_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    name = "segformer-b0" if package == "transformers" else "smp-unet-resnet18"
    with pytest.raises(UserError, match=rf"{name} needs {package}; pip install 'kdprof\["):
        build(name, 5)


def test_the_page_about_ones_own_network_is_true(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "own-model.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "mine.py").write_text(code)
    network = build(f"{tmp_path}/mine.py:build", 7)
    assert network.info.stride == {"logits": 8, "head": 8}
    assert network(torch.zeros(1, 3, 64, 64), ["logits"]).logits.shape == (1, 7, 8, 8)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("pspnet-test_resnet", "segformer-b0"), ("segformer-b0", "pspnet-test_resnet")],
    ids=["larger maps", "smaller maps"],
)
def test_teacher_and_student_of_other_strides_work_under_every_method_that_can(student, teacher):
    pytest.importorskip("transformers")
    lacking = {"dist", "dkd", "dsd", "maskd"}  # read aux or the classifier's weight
    names = [name for name in builtin_methods() if name not in lacking]
    if teacher != "segformer-b0":
        names = names[::4]  # takes half a minute for all
    changes = {"student": student, "teacher": teacher, "methods": names}
    study = ResolvedStudy(small_study(**changes, **{"step.aux_weight": 0.0}))
    found = count_costs(study, names, Progress(None))
    assert found.failures == {}
    assert len(found.costs) == len(names) > 7


# Sizes that only evaluation meets

PICKY = "import torch\n" + MINE.replace(
    "head = network.body(network.stem(pictures))",
    """first = network.stem(pictures)
    head = network.body(first)
    doubled = torch.nn.functional.interpolate(head[:, :8], scale_factor=2)
    head = head + (doubled + first).mean()""",
)
"""A network that adds maps of two strides, so that sides must be multiples of 4."""


def folder_of(root, size):
    """A ``folder:`` of two classes, of images of 64x64 in training and ``size`` in evaluation."""
    for split, (height, width), count in (("train", (64, 64), 4), ("val", size, 1)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2] = 1
            Image.fromarray(np.stack([mask * 200 + number] * 3, 2)).save(
                root / "images" / split / f"{number}.png"
            )
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("low\nhigh\n")
    return f"folder:{root}"


def picky_study(tmp_path, size, **changes):
    (tmp_path / "picky.py").write_text(PICKY)
    network = f"{tmp_path / 'picky.py'}:build"
    settings = {"data": folder_of(tmp_path / "data", size), "step.aux_weight": 0}
    settings |= {"student": network, "teacher": network, "step.crop": [64, 64], **changes}
    return small_study(**settings)


def test_a_size_that_only_evaluation_meets_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match="mine cannot take images of 90x118 ") as caught:
        ResolvedStudy(picky_study(tmp_path, (90, 118)))
    assert "use another size or network" in str(caught.value)


def test_sizes_that_the_network_takes_are_not_refused(tmp_path):
    ResolvedStudy(picky_study(tmp_path, (88, 116)))
    ResolvedStudy(small_study(**{"data": f"folder:{tmp_path / 'data'}"}))


def test_images_that_are_resized_to_fit_are_not_refused(tmp_path):
    ResolvedStudy(picky_study(tmp_path, (90, 120), **{"data_settings.resize": [60, 80]}))


def test_a_crop_that_the_network_does_not_take_is_refused(tmp_path):
    with pytest.raises(UserError, match="mine cannot take images of 50x64"):
        ResolvedStudy(picky_study(tmp_path, (64, 64), **{"step.crop": [50, 64]}))


def test_a_library_network_names_the_size(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    network = build("smp-fpn-resnet18", 2)
    assert "90x118" in network.check_input(1, (90, 118), training=False)
    assert network.check_input(1, (96, 128), training=False) is None
    assert network.module.training
