"""Networks: known parameter totals and multiply-adds, taps, dilations, names, weights, parity."""

import math
from pathlib import Path

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kdprof.errors import UserError
from kdprof.method import FEATURE_TAPS
from kdprof.models import build, parse_name
from kdprof.models.heads import BinPool
from kdprof.models.names import NetworkName

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity-models"
TINY = "pspnet-test_resnet"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(batch=1, height=33, width=49):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def on_meta(name, num_classes=19):
    with torch.device("meta"):
        return build(name, num_classes)


# Known answers: parameters include the auxiliary head; multiply-adds are those of the
# convolutions without it. Published or counted on mmsegmentation's own modules.


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("pspnet-r18", 19, 12_790_086),
        ("pspnet-r50", 19, 48_975_494),
        ("pspnet-r101", 19, 67_967_622),
        ("deeplabv3-r18", 19, 13_986_374),
        ("deeplabv3-r101", 19, 87_105_158),
        ("pspnet-r18", 150, 12_815_500),
        ("pspnet-r101", 150, 68_068_492),
    ],
)
def test_parameter_totals(name, num_classes, parameters):
    assert sum(p.numel() for p in on_meta(name, num_classes).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "crop", "giga_macs"),
    [
        ("pspnet-r101", (512, 512), 255.90),
        ("pspnet-r101", (512, 1024), 511.75),
        ("pspnet-r18", (512, 512), 54.23),
        ("deeplabv3-r101", (512, 512), 347.12),
        ("deeplabv3-r18", (512, 512), 59.93),
    ],
)
def test_convolution_multiply_adds(name, crop, giga_macs):
    net = on_meta(name).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, *crop, device="meta"), ("logits",))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.005)


class Logits(nn.Module):
    """fvcore traces positional tensors only; the final resize is part of its published total."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        logits = self.net(images, ("logits",)).logits
        return nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear")


@torch.no_grad()
def test_fvcore_total():
    # fvcore traces, which the meta device does not bear: the one full-size forward of these tests
    count = FlopCountAnalysis(Logits(build("pspnet-r101", 19).eval()), torch.zeros(1, 3, 512, 512))
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert count.by_operator()["conv"] / 1e9 == pytest.approx(255.90, abs=0.005)
    assert count.total() / 1e9 == pytest.approx(256.48, abs=0.005)


# Taps


@pytest.mark.parametrize(
    "name", [TINY, "deeplabv3-test_resnet", "pspnet-mobilenetv2_100", "deeplabv3-resnet10t"]
)
@pytest.mark.parametrize("size", [(33, 49), (64, 40)])
def test_shapes_are_those_of_info(name, size):
    net = build(name, 5).eval()
    maps = vars(net(picture(2, *size), FEATURE_TAPS))
    assert sorted(maps) == sorted(FEATURE_TAPS)
    for tap, value in maps.items():
        height, width = (math.ceil(side / net.info.stride[tap]) for side in size)
        assert value.shape == (2, net.info.channels[tap], height, width)


def test_info_of_the_alias_and_of_a_generic_backbone():
    info = on_meta("pspnet-r18").info
    assert (info.name, info.num_classes) == ("pspnet-resnet18c", 19)
    assert info.channels == {
        "logits": 19, "aux": 19, "head": 128, "c2": 64, "c3": 128, "c4": 256, "c5": 512
    }  # fmt: skip
    assert info.stride == {
        "logits": 8, "aux": 8, "head": 8, "c2": 4, "c3": 8, "c4": 8, "c5": 8
    }  # fmt: skip
    assert on_meta("deeplabv3-r101").info.channels["head"] == 512
    channels = on_meta("pspnet-mobilenetv3_small_050").info.channels
    assert [channels[s] for s in ("c2", "c3", "c4", "c5")] == [8, 16, 24, 288]


RUN_FOR = {
    ("c2",): {"layer1"},
    ("c4",): {"layer1", "layer2", "layer3"},
    ("aux",): {"layer1", "layer2", "layer3", "auxiliary_head"},
    ("c5", "c3"): {"layer1", "layer2", "layer3", "layer4"},
    ("head",): {"layer1", "layer2", "layer3", "layer4", "decode_head"},
    ("logits",): {"layer1", "layer2", "layer3", "layer4", "decode_head", "conv_seg"},
    (): set(),
}


@pytest.mark.parametrize("taps", RUN_FOR, ids=str)
def test_nothing_runs_that_no_tap_reads(taps):
    net, ran = build(TINY, 5).eval(), set()
    watched = {
        **{f"layer{i}": net.backbone.net[f"layer{i}"] for i in range(1, 5)},
        "auxiliary_head": net.auxiliary_head,
        "decode_head": net.decode_head,
        "conv_seg": net.decode_head.conv_seg,
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    found = net(picture(), taps)
    assert set(vars(found)) == set(taps)
    assert ran == RUN_FOR[taps]


def test_taps_do_not_depend_on_which_others_are_asked():
    net = build(TINY, 5).eval()
    everything = net(picture(), FEATURE_TAPS)
    for tap in FEATURE_TAPS:
        assert torch.equal(getattr(net(picture(), [tap]), tap), getattr(everything, tap))


def test_head_tap_is_the_classifiers_input_after_dropout():
    net = build(TINY, 5).train()
    taps = net(picture(2), ("head", "logits"))
    assert (taps.head.flatten(2).amax(-1) == 0).any(), "no channel was dropped"
    assert torch.equal(net.decode_head.conv_seg(taps.head), taps.logits)


def test_an_unknown_tap_is_refused():
    with pytest.raises(ValueError, match=r"unknown tap 'logit'; did you mean 'logits'\?"):
        build(TINY, 5)(picture(), ["logit"])


# Input


def test_uint8_and_float_pictures_give_the_same():
    net = build(TINY, 5).eval()
    as_bytes, as_floats = (net(x, ["logits"]).logits for x in (picture(), picture().float()))
    assert torch.equal(as_bytes, as_floats)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pspnet-r18", (-2.117904, 0.0, 2.640000)),
        (TINY, (-1.0, -0.088, 1.0)),  # what timm says its weights were trained with
        ("cirkd-pspnet-r18", (255 - 104.00698793, 116.28 - 116.66876762, -122.67891434)),  # BGR
    ],
)
def test_pictures_are_normalised_as_the_weights_were_trained(name, expected):
    net = build(name, 5).eval()
    seen = []
    net.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(torch.tensor([0.0, 116.28, 255.0]).view(1, 3, 1, 1).expand(1, 3, 16, 16), ["c2"])
    torch.testing.assert_close(seen[0][0, :, 3, 5], torch.tensor(expected), atol=2e-5, rtol=1e-5)
    assert not {"mean", "std"} & net.state_dict().keys()


@pytest.mark.parametrize("name", [TINY, "deeplabv3-test_resnet"])
def test_channels_last_and_autocast_are_kept(name):
    net = build(name, 5).eval().to(memory_format=torch.channels_last)
    images = picture(2).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taps = net(images, FEATURE_TAPS)
    for tap, value in vars(taps).items():
        assert value.is_contiguous(memory_format=torch.channels_last), tap
        assert value.dtype == torch.bfloat16, tap


def test_fake_tensors_cost_nothing():
    with FakeTensorMode():
        net = build("pspnet-r101", 19)
        taps = net(torch.empty(8, 3, 512, 1024, dtype=torch.uint8), ("logits", "aux"))
    assert taps.logits.shape == taps.aux.shape == (8, 19, 64, 128)


@pytest.mark.parametrize("name", [TINY, "deeplabv3-test_resnet"])
def test_check_input_refuses_exactly_what_fails(name):
    net = build(name, 5).train()
    assert "use at least 2 images per device" in net.check_input(1, (33, 49), training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(picture(1), ["logits"])
    assert net.check_input(2, (8, 8), training=True) is None
    net(picture(2, 8, 8), FEATURE_TAPS)
    net.eval()
    assert net.check_input(1, (8, 8), training=False) is None
    net(picture(1, 8, 8), FEATURE_TAPS)
    assert net.check_input(1, (4, 64), training=False) is None
    net(picture(1, 4, 64), FEATURE_TAPS)
    assert "use at least 8x8" in net.check_input(2, (4, 64), training=True)


# Layout


def test_basic_blocks_dilate_like_mmsegmentation():
    net = on_meta("pspnet-r18").backbone.net
    first = [[block.conv1.dilation[0] for block in net[f"layer{i}"]] for i in (1, 2, 3, 4)]
    assert first == [[1, 1], [1, 1], [1, 2], [2, 4]]
    for stage in (1, 2, 3, 4):
        for block in net[f"layer{stage}"]:
            assert (block.conv2.dilation, block.conv2.padding) == ((1, 1), (1, 1))


def test_bottlenecks_keep_their_dilation():
    net = on_meta("pspnet-r50").backbone.net
    second = [[block.conv2.dilation[0] for block in net[f"layer{i}"]] for i in (3, 4)]
    assert second == [[1, 2, 2, 2, 2, 2], [2, 4, 4]]


def test_only_the_classifiers_of_the_heads_have_a_bias():
    net = on_meta("deeplabv3-r18")
    biased = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    assert biased == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(5, 51), (8, 8), (1, 7)])
def test_deterministic_pooling_is_adaptive_pooling(bins, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(BinPool(bins).deterministic(x), BinPool(bins)(x))


def test_initialisation_follows_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(TINY, 5).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(
        states[0]["decode_head.conv_seg.weight"], states[2]["decode_head.conv_seg.weight"]
    )
    assert states[0]["auxiliary_head.conv_seg.weight"].std() == pytest.approx(0.01, rel=0.3)


# Names


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("pspnet-r18", NetworkName("pspnet", "resnet18c")),
        ("pspnet-r50", NetworkName("pspnet", "resnet50c")),
        ("mmseg-deeplabv3-r101-aligned", NetworkName("deeplabv3", "resnet101c", aligned=True)),
        ("deeplabv3-resnet34c", NetworkName("deeplabv3", "resnet34c")),
        ("cirkd-deeplabv3-r18-w128", NetworkName("deeplabv3", "resnet18s", "cirkd", 128)),
        ("torchvision-deeplabv3-r101", NetworkName("deeplabv3", "resnet101", "torchvision")),
        ("pspnet-mobilenetv3_small_050", NetworkName("pspnet", "mobilenetv3_small_050")),
        ("pspnet-r18-os8", NetworkName("pspnet", "resnet18c")),
        (
            "pspnet-r18-w64-os16-aligned",
            NetworkName("pspnet", "resnet18c", "mmseg", 64, aligned=True, output_stride=16),
        ),
    ],
)
def test_names(name, parsed):
    assert parse_name(name) == parsed
    assert parse_name(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("psnet-r18", "unknown network 'psnet-r18'; did you mean 'pspnet-r18'?"),
        ("resnet18", "unknown network 'resnet18'; "),
        ("pspnet", "unknown network 'pspnet'; did you mean 'pspnet-r"),
        ("pspnet-mobilnetv2_100", "unknown backbone 'mobilnetv2_100'; did you mean 'mobilenetv2_1"),
        ("pspnet-zzqqxy", "valid: r101, r18, r50, or a name of timm.list_models()"),
        ("pspnet-vit_tiny_patch16_224", "takes images of one size only; take another, such as r"),
        ("pspnet-botnet26t_256", "takes images of one size only; take another"),
        ("cirkd-psnet-r18", "did you mean 'cirkd-pspnet-r18'?"),
        ("cirkd-pspnet-r18-aligned", "CIRKD's layout is always aligned; leave '-aligned' out"),
        ("torchvision-pspnet-r50", "unknown network 'torchvision-pspnet-r50'"),
        ("pspnet-vgg11", "at output stride 8: it ends at 32; append -os32 to the network's name"),
        ("pspnet-r18-os12", "there is no -os12; use -os8, -os16, -os32"),
        ("pspnet-inception_v3-os32", "a map of (192, 30, 46) for an image of 136x200, where timm"),
    ],
)
def test_bad_names_get_one_line(name, message):
    with pytest.raises(UserError) as caught:
        build(name, 5)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("pspnet-r18-os16", (4, 8, 16, 16)),
        ("deeplabv3-mobilenetv3_small_050-os32", (4, 8, 16, 32)),
        ("pspnet-convnext_atto-os16", (4, 8, 16, 16)),
        ("pspnet-swin_tiny_patch4_window7_224-os32", (4, 8, 16, 32)),  # gives (N, h, w, C)
        ("deeplabv3-pvt_v2_b0-os32", (4, 8, 16, 32)),
    ],
)
def test_backbones_at_the_stride_they_can_do(name, stride):
    """Also of a size that is no multiple of it."""
    net = build(name, 5).train()
    assert [net.info.stride[stage] for stage in ("c2", "c3", "c4", "c5")] == list(stride)
    assert net.multiple == 1
    taps = net(picture(2, 72, 104), FEATURE_TAPS)
    for tap, value in vars(taps).items():
        if value is not None:
            expected = [size / net.info.stride[tap] for size in (72, 104)]
            assert value.shape[:2] == (2, net.info.channels[tap])
            assert all(abs(a - b) < 1 for a, b in zip(value.shape[2:], expected, strict=True))
    taps.logits.sum().backward()


def test_a_backbone_that_needs_multiples_says_so():
    net = build("pspnet-hrnet_w18_small-os32", 5)
    assert "multiples of 32, not 72x96" in net.check_input(2, (72, 96), training=False)
    assert net.check_input(2, (64, 96), training=True) is None
    net(picture(2, 64, 96), ["logits"])


# Backbone weights


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "backbone", ["test_resnet", "mobilenetv3_small_050", "convnext_atto", "pvt_v2_b0-os32"]
)
def test_a_timm_state_dict_is_loaded(tmp_path, backbone, suffix):
    state = timm.create_model(backbone.partition("-")[0]).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    net = build(f"pspnet-{backbone}", 5, backbone_weights=str(path)).backbone.net
    loaded = {key.replace("_", ".", 1): value for key, value in net.state_dict().items()}
    loaded |= net.state_dict()
    shared = loaded.keys() & state.keys()
    assert len(shared) >= len(net.state_dict())
    assert all(torch.equal(loaded[key], state[key]) for key in shared)


def saved(path, state):
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(("layout", "short"), [("mmseg", "r18"), ("cirkd", "r18")])
def test_stems_of_published_imagenet_files_are_renamed(tmp_path, layout, short):
    name = f"{layout}-pspnet-{short}"
    original = build(name, 5).backbone.net.state_dict()
    theirs = {
        "mmseg": {"conv1.": "stem.", "bn1.": "stem.7."},
        "cirkd": {
            "conv1.0.": "conv1.", "conv1.1.": "bn1.", "conv1.3.": "conv2.", "conv1.4.": "bn2.",
            "conv1.6.": "conv3.", "bn1.": "bn3.",
        },
    }[layout]  # fmt: skip
    state = {}
    for key, value in original.items():
        begun = next((ours for ours in theirs if key.startswith(ours)), "")
        state[theirs.get(begun, "") + key.removeprefix(begun)] = value
    state |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    path = tmp_path / "imagenet.pth"
    torch.save(state, path)
    loaded = build(name, 5, backbone_weights=str(path)).backbone.net.state_dict()
    for key, value in original.items():
        assert torch.equal(loaded[key], value)


def test_a_state_dict_that_does_not_fit_is_refused_in_one_line(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    state["conv2.weight"] = state.pop("layer1.0.conv1.weight")
    state["bn1.weight"] = torch.ones(7)
    with pytest.raises(UserError) as caught:
        build(TINY, 5, backbone_weights=saved(tmp_path / "a.pth", state))
    line = str(caught.value)
    assert "missing: layer1.0.conv1.weight" in line
    assert "unexpected: conv2.weight" in line
    assert "of another shape: bn1.weight" in line
    assert "fc." not in line
    assert "\n" not in line


def test_unusable_weights_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    code = tmp_path / "code.pth"
    torch.save({"state_dict": print}, code)
    for weights, message in [
        ("resnet.pth", "no file resnet.pth; give 'none', 'imagenet' or the path"),
        (str(tmp_path / "text.pth"), "is a text file; give the path of a checkpoint"),
        (str(code), "holds more than tensors and plain values (print); kdprof runs no code"),
        (saved(tmp_path / "number.pth", 3), "holds a int, not a state dict"),
    ]:
        with pytest.raises(UserError) as caught:
            build(TINY, 5, backbone_weights=weights)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_only_mmsegmentation_has(monkeypatch):
    seen = {}

    def hub(url, **options):
        seen.update(options, url=url)
        net = build("pspnet-r18", 5).backbone.net
        state = {key: value + 1 for key, value in net.state_dict().items()}
        return {key.replace("conv1.", "stem.", 1) if key.startswith("conv1.") else
                key.replace("bn1.", "stem.7.", 1) if key.startswith("bn1.") else key: value
                for key, value in state.items()}  # fmt: skip

    monkeypatch.setattr("kdprof.models.backbone.load_state_dict_from_url", hub)
    torch.manual_seed(0)
    net = build("pspnet-r18", 5, backbone_weights="imagenet").backbone.net
    assert net.bn1.weight.min().item() == 2
    assert seen["check_hash"]
    assert seen["weights_only"]
    assert seen["url"].endswith("resnet18_v1c-b5776b93.pth")

    def offline(url, **options):
        raise OSError("no network")

    monkeypatch.setattr("kdprof.models.backbone.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"resnet18_v1c-b5776b93\.pth and give its path"):
        build("pspnet-r18", 5, backbone_weights="imagenet")


def test_imagenet_weights_that_cannot_be_had(monkeypatch):
    with pytest.raises(UserError, match="timm has no ImageNet weights for 'resnet34c'; give"):
        build("pspnet-resnet34c", 5, backbone_weights="imagenet")
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("Name or service not known\nretry later")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError) as caught:
        build(TINY, 5, backbone_weights="imagenet")
    line = str(caught.value)
    assert "could not be downloaded (OSError); get the .safetensors or .pth" in line
    assert "huggingface.co/timm/test_resnet" in line
    assert "\n" not in line
