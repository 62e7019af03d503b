import io
import os
import pickle
import re

import pytest
import torch
from parity_models_case import FILES, regenerated
from rich.console import Console
from safetensors.torch import save_file
from small_study import small_study, train_small
from test_adapted import folder_of
from weight_cases import own_state

from kdprof.data import require_files
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError
from kdprof.models import SegmentationNetwork, build, parse_name
from kdprof.models.export import export
from kdprof.models.weight_files import open_weights
from kdprof.models.weights import check_weights, load_weights, read_weights
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key, cost_settings
from kdprof.store import Store
from kdprof.study import load_study
from kdprof.train import checkpoint

CLASSES = ("road", "sky", "car")
TO_MMSEG = (
    (r"^backbone\.net\.bn1\.", "backbone.stem.7."),
    (r"^backbone\.net\.conv1\.", "backbone.stem."),
    (r"^backbone\.net\.", "backbone."),
)


def mmseg_state(name="pspnet-r18"):
    torch.manual_seed(5)
    return {_renamed(key): value for key, value in build(name, len(CLASSES)).state_dict().items()}


def _renamed(key):
    for pattern, replacement in TO_MMSEG:
        key = re.sub(pattern, replacement, key)
    return key


def saved(path, content):
    torch.save(content, path)
    return path


@pytest.fixture
def published(tmp_path):
    return saved(tmp_path / "t.pth", {"state_dict": mmseg_state(), "meta": {"CLASSES": CLASSES}})


def loaded(path, wanted="pspnet-r18", classes=CLASSES):
    weights = read_weights(open_weights(path))
    network = build(check_weights(weights, wanted, classes), len(classes))
    return network, load_weights(network, weights)


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        loaded(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_every_entry_of_a_published_file_is_loaded(published):
    network, told = loaded(published)
    for key, value in network.state_dict().items():
        assert torch.equal(value, mmseg_state()[_renamed(key)])
    assert told.summary() == f"{len(mmseg_state())} entries loaded"


def test_a_prefix_of_data_parallel_training_and_safetensors_are_read(tmp_path):
    prefixed = {f"module.{key}": value for key, value in mmseg_state().items()}
    for path in (saved(tmp_path / "a.pth", prefixed), tmp_path / "b.safetensors"):
        if path.suffix == ".safetensors":
            save_file(mmseg_state(), path)
        network, _ = loaded(path)
        assert torch.equal(
            network.decode_head.conv_seg.weight, mmseg_state()["decode_head.conv_seg.weight"]
        )


def test_a_file_without_auxiliary_head_leaves_it_random_and_says_so(tmp_path):
    state = {k: v for k, v in mmseg_state().items() if not k.startswith("auxiliary_head")}
    _, told = loaded(saved(tmp_path / "t.pth", {"state_dict": state}))
    assert "the auxiliary head is not in the file (8 stay random)" in told.summary()


@pytest.mark.parametrize("depth", ["50", "101"])
def test_torchvision_networks_compute_what_torchvision_computes(depth, tmp_path):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    make = getattr(segmentation, f"deeplabv3_resnet{depth}")
    original = make(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.6)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    path = saved(tmp_path / "tv.pth", original.state_dict())
    network, told = loaded(path, f"deeplabv3-r{depth}")
    assert (told.missing, told.left) == ([], [])
    assert str(network.name) == f"torchvision-deeplabv3-resnet{depth}"
    assert not network.align_corners
    images = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
    normalised = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        taps = network.eval()(images, ["logits", "aux"])
        ours = {"out": taps.logits, "aux": taps.aux}
        theirs = original(normalised)
    for key, value in ours.items():
        resized = torch.nn.functional.interpolate(value, (65, 97), mode="bilinear")
        assert (resized - theirs[key]).norm() < 1e-4 * theirs[key].norm()


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    sprung = tmp_path / "sprung"
    for content in ({"state_dict": mmseg_state(), "meta": _Bomb(sprung)}, _Bomb(sprung)):
        line = refusal(saved(tmp_path / "bomb.pth", content))
        assert "holds more than tensors" in line
        assert "runs no code from files" in line
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(_Bomb(sprung), file)
    refusal(tmp_path / "plain.pth")
    assert not sprung.exists()


def test_damaged_and_half_downloaded_files(tmp_path, published):
    whole = published.read_bytes()
    for name in ("half.pth", "half.safetensors"):
        half = tmp_path / name
        if name.endswith("safetensors"):
            save_file(mmseg_state(), half)
            half.write_bytes(half.read_bytes()[: 10**6])
        else:
            half.write_bytes(whole[: len(whole) // 2])
        assert re.search("damaged.*half downloaded|half downloaded", refusal(half))
        assert "get it again" in refusal(half)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    assert "does not match its checksum" in refusal(tmp_path / "flipped.pth")
    assert "no file" in refusal(tmp_path / "nowhere.pth")


def test_another_network_or_other_classes_are_named(tmp_path, published):
    assert "holds mmsegmentation's pspnet-r18, not deeplabv3-r101; use pspnet-r18" in refusal(
        published, "deeplabv3-r101"
    )
    assert "not cirkd-pspnet-r18" in refusal(published, "cirkd-pspnet-r18")
    assert "has 3 classes, the data has 2" in refusal(published, classes=CLASSES[:2])
    line = refusal(published, classes=("road", "car", "sky"))
    assert "another order: class 1 is 'sky' there, 'car' in the data" in line


def test_names_of_classes_may_be_written_otherwise(published):
    loaded(published, classes=("Road", "sky", "c-a-r"))


def test_names_of_classes_in_any_script_are_compared(tmp_path):
    content = {"state_dict": mmseg_state(), "meta": {"CLASSES": ("道路", "天空", "+")}}
    path = saved(tmp_path / "t.pth", content)
    loaded(path, classes=("道路", "天空", "+"))
    assert "class 0 is '道路' there, '天空' in" in refusal(path, classes=("天空", "道路", "+"))
    assert "class 2 is '+' there, '-' in" in refusal(path, classes=("道路", "天空", "-"))


def test_a_short_name_leaves_the_layout_to_the_file(tmp_path):

    path = next((f for f in FILES if f.stem == "cirkd2022_deeplabv3_resnet18"), None)
    if path is None:
        pytest.skip("no golden numbers")
    import numpy as np

    state = regenerated(np.load(path, allow_pickle=False))
    weights = read_weights(open_weights(saved(tmp_path / "c.pth", state)))
    names = tuple(map(str, range(19)))
    found = check_weights(weights, "deeplabv3-r18", names)
    assert found == parse_name("cirkd-deeplabv3-r18-w128")
    assert SegmentationNetwork(found, 19).preprocessing.bgr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.layer2.0.bn1.bias"), r"missing: backbone.net.layer2.0.bn1.bias"),
        (lambda s: s.update({"decode_head.x": torch.ones(1)}), "unexpected: decode_head.x"),
        (
            lambda s: s.update({"backbone.layer2.0.conv1.weight": torch.ones(7, 64, 3, 3)}),
            r"another shape: backbone.layer2.0.conv1.weight \(7, 64, 3, 3\) for \(128, 64, 3, 3\)",
        ),
        (
            lambda s: s.update({"module.decode_head.conv_seg.bias": torch.ones(3)}),
            "unexpected: module.decode_head.conv_seg.bias",
        ),
        (
            lambda s: s.update({"_orig_mod.decode_head.conv_seg.bias": torch.ones(3)}),
            "has 'decode_head.conv_seg.bias' twice",
        ),
        (
            lambda s: s.update({"backbone.bn1.weight": torch.ones(64)}),
            "'backbone.stem.7.weight' and 'backbone.bn1.weight' are one entry",
        ),
    ],
)
def test_every_key_is_accounted_for(change, message, tmp_path):
    state = mmseg_state()
    change(state)
    assert re.search(message, refusal(saved(tmp_path / "t.pth", state)))


def test_what_is_no_segmentation_network(tmp_path):
    import timm

    backbone = timm.create_model("resnet18").state_dict()
    assert "holds only a backbone" in refusal(saved(tmp_path / "b.pth", backbone))
    assert "has no segmentation network" in refusal(saved(tmp_path / "o.pth", {"a": torch.ones(1)}))
    assert "holds no tensors" in refusal(saved(tmp_path / "n.pth", {"a": 1}))
    assert "holds a list" in refusal(saved(tmp_path / "l.pth", [torch.ones(1)]))


@pytest.mark.parametrize(
    ("held", "asked"),
    [
        ("pspnet-r18-os16", "pspnet-r18"),
        ("pspnet-r18-os16", "pspnet-r18-os32"),
        ("pspnet-r18", "pspnet-r18-os16"),
        ("pspnet-r18", "pspnet-r18-aligned"),
    ],
)
def test_a_stride_that_the_file_states_is_not_overridden(held, asked, tmp_path):
    path = tmp_path / "t.safetensors"
    export(build(held, 3), path, CLASSES, (64, 64))
    assert refusal(path, asked).endswith(f"holds kdprof's {held}, not {asked}; use {held}")
    assert loaded(path, held)[0].name == parse_name(held)


def test_a_file_that_states_no_stride_fits_every_one(published):
    assert loaded(published, "pspnet-r18-os16")[0].name == parse_name("pspnet-r18-os16")


# A published teacher in a study


def folder_of_3_classes(root):
    data = folder_of(root, (64, 64))
    (root / "classes.txt").write_text("road\nsky\ncar\n")
    return data


@pytest.fixture
def teacher(tmp_path):
    names = SyntheticScenes("train", (8, 8), 1).class_names
    torch.manual_seed(5)
    network = build("cirkd-pspnet-r18-w64", len(names))
    path = tmp_path / "teacher.safetensors"
    export(network, path, names, (64, 64))
    return path, network


def test_students_learn_from_a_file(teacher, tmp_path):
    path, network = teacher
    changes = {"teacher": "pspnet-r18", "teacher_weights": str(path), "methods": ["kd"]}
    summary = train_small(tmp_path / "out", budgets=["2"], **changes)
    assert [run.method for run in summary.finished] == ["kd"]
    store = Store(tmp_path / "out")
    run = store.teacher_run()
    assert (run.iterations, run.train_s.actual, run.finished) == (0, 0.0, True)
    assert 0 <= run.miou <= 1
    assert checkpoint.load(store.teacher_folder()) == (None, None)
    study = ResolvedStudy(small_study(**changes))
    assert str(study.teacher_name) == "cirkd-pspnet-resnet18s-w64"
    found, told = study.factory.published_teacher()
    assert torch.equal(found.decode_head.conv_seg.weight, network.decode_head.conv_seg.weight)
    assert found.preprocessing.bgr
    assert "entries loaded" in told
    # What the teacher is, is part of what a step costs; which file it came from is not.
    other = ResolvedStudy(small_study(teacher="cirkd-pspnet-r18-w64", methods=["kd"]))
    assert cost_key(study, "kd") == cost_key(other, "kd")
    plain = ResolvedStudy(small_study(teacher="pspnet-r18", methods=["kd"]))
    assert cost_key(study, "kd") != cost_key(plain, "kd")


def test_a_teacher_that_does_not_fit_is_refused_before_anything_runs(teacher, published):
    path, _ = teacher
    for weights, name, message in (
        (path, "deeplabv3-r18", "not deeplabv3-r18; use cirkd-pspnet-r18-w64"),
        (path, "pspnet-r18-os16", "not pspnet-r18-os16; use cirkd-pspnet-r18-w64"),
        (published, "pspnet-r18", "has 3 classes, the data has 12"),
        ("nowhere.pth", "pspnet-r18", "no file nowhere.pth"),
    ):
        with pytest.raises(UserError, match=message):
            ResolvedStudy(small_study(teacher=name, teacher_weights=str(weights)))


def own_file(folder):
    """A user's file that builds the network of :mod:`weight_cases`."""
    code = (
        "from weight_cases import own_network",
        "def build(classes):",
        "    return own_network()",
    )
    (folder / "own.py").write_text("\n".join(code))
    return f"{folder / 'own.py'}:build"


def test_an_own_teacher_that_does_not_fit_is_refused_before_anything_runs(tmp_path):
    state = own_state()
    state["classifier.extra"] = state.pop("classifier.bias")
    teacher = {"teacher": own_file(tmp_path), "step.aux_weight": 0}
    path = saved(tmp_path / "t.pth", state)
    data = folder_of_3_classes(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"missing: classifier\.bias; unexpected: classifier\.extra"
    ):
        ResolvedStudy(small_study(teacher_weights=str(path), data=data, **teacher))
    for place in ("", "#model"):
        path = saved(tmp_path / "t.pth", {"model": own_state(1.0), "ema": {}})
        study = ResolvedStudy(
            small_study(teacher_weights=f"{path}{place}", data=data, methods=["kd"], **teacher)
        )
        network, told = study.factory.published_teacher()
        assert (network.module.classifier.weight == 1).all()
        assert told.endswith(
            ":build, the network's own names, weights under `model`: 9 entries loaded"
        )


def test_a_backbone_is_read_once_before_anything_runs_and_said(tmp_path):
    state = build("pspnet-test_resnet", 3).backbone.net.state_dict()
    told = io.StringIO()
    progress = Progress(Console(file=told, width=1000))
    path = saved(tmp_path / "b.pth", {"state_dict_ema": {f"module.{k}": state[k] for k in state}})
    study = small_study(student_backbone_weights=str(path))
    ResolvedStudy(study, progress=progress)
    assert told.getvalue() == (
        f"backbone of the student: {path}: {len(state)} entries loaded, weights under "
        "`state_dict_ema`, prefix `module.` taken off\n"
    )
    ResolvedStudy(study, progress=progress, weights=False)  # a measurement reads no weights
    assert told.getvalue().count("\n") == 1
    own = {
        "student": own_file(tmp_path),
        "step.aux_weight": 0,
        "data": folder_of_3_classes(tmp_path / "data"),
    }
    own_network = own["student"]
    for role in ("student", "teacher"):
        for weights in (str(path), "imagenet"):
            given = {**own, role: own_network, f"{role}_backbone_weights": weights}
            with pytest.raises(UserError) as caught:
                ResolvedStudy(small_study(**given))
            assert str(caught.value) == (
                f"{role}_backbone_weights: {own_network} loads its weights itself; set it to none, "
                f"not {weights}"
            )
    alone = {**own, "teacher": own_network, "teacher_backbone_weights": "imagenet"}
    ResolvedStudy(small_study(**alone, methods=["none"]), control=False)  # nothing reads a teacher
    with pytest.raises(UserError, match="teacher_backbone_weights: "):
        ResolvedStudy(small_study(**alone, methods=["none", "cwd"]), control=False)
    first = next(key for key, value in state.items() if value.is_floating_point())
    saved(path, {**state, first: state[first] * float("nan")})
    with pytest.raises(UserError, match=rf"1 of {len(state)} tensors hold NaN \({first}\)"):
        ResolvedStudy(study)


def test_a_whole_networks_file_gives_its_backbone_and_says_what_it_leaves(tmp_path):
    path = saved(tmp_path / "b.pth", {"state_dict": mmseg_state()})
    backbone = build("pspnet-r18", 3, backbone_weights=str(path)).backbone
    assert torch.equal(backbone.net.bn1.weight, mmseg_state()["backbone.stem.7.weight"])
    assert "prefix `backbone.` taken off, left out: auxiliary_head.conv_seg.bias" in backbone.loaded


def test_a_teacher_without_auxiliary_head_teaches_no_method_that_reads_one(tmp_path):
    names = SyntheticScenes("train", (8, 8), 1).class_names
    state = build("pspnet-r18", len(names)).state_dict()
    state = {_renamed(k): v for k, v in state.items() if not k.startswith("auxiliary_head")}
    path = saved(tmp_path / "t.pth", {"state_dict": state})
    changes = {"teacher": "pspnet-r18", "teacher_weights": str(path)}
    with pytest.raises(UserError, match="method 'dist' uses aux of the teacher, which has c2"):
        ResolvedStudy(small_study(methods=["kd", "dist"], **changes))
    ResolvedStudy(small_study(methods=["kd"], **changes))


def test_a_preset_is_measured_without_data_or_weights():
    on_a_cpu = {"device": "cpu", "step.precision": "fp32"}
    study = ResolvedStudy(load_study("camvid-pspnet-r18", on_a_cpu), weights=False)
    assert (len(study.data.files["train"]), study.data.num_classes("student")) == (367, 11)
    images, labels = study.factory.batches(0).batch(0)
    assert images.shape == (16, 3, 360, 360)
    assert set(labels.unique().tolist()) <= {*range(11), 255}
    assert cost_settings(study, "none")["placeholder_images"]
    assert str(study.factory.student(0).name) == "cirkd-pspnet-resnet18s"
    with pytest.raises(UserError, match="needs its folder; give camvid:ROOT"):
        require_files(study.plain.data)
