import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import kdprof
from torch import nn

from kdprof import evaluate as evaluation
from kdprof.cli.networks import ViewOptions
from kdprof.errors import UserError
from kdprof.evaluate import (
    SIZE_PERIOD,
    Views,
    _places,
    confusion_matrix,
    evaluate,
    evaluated_sizes,
    predict,
    predict_classes,
    scores,
    size_problems,
)
from kdprof.method import Taps
from kdprof.models import build, zoo
from kdprof.resized import choice


def test_by_hand():
    """Class 0: 2 hits, 1 missed, 1 wrongly claimed: 2/4. Class 1: 1 hit, 1 claimed, 1 missed: 1/3.
    Class 2 is not in the labels: no IoU, and not in the mean."""
    labels = torch.tensor([[0, 0, 0, 1, 1, 255]])
    predicted = torch.tensor([[0, 0, 1, 1, 0, 2]])
    found = scores(confusion_matrix(predicted, labels, 3))
    assert found.per_class == [pytest.approx(0.5), pytest.approx(1 / 3), None]
    assert found.miou == pytest.approx((0.5 + 1 / 3) / 2)


def test_class_predicted_but_absent_only_hurts_the_others():
    labels, predicted = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    found = scores(confusion_matrix(predicted, labels, 2))
    assert found.per_class == [0.75, None]


def test_absent_classes_that_are_predicted_may_count_as_zero():
    """mmsegmentation's mean: class 2 is predicted and never there, class 3 is neither."""
    labels = torch.tensor([[0, 0, 0, 1, 1, 0]])
    predicted = torch.tensor([[0, 0, 1, 1, 0, 2]])
    found = scores(confusion_matrix(predicted, labels, 4), "zero")
    assert found.per_class == [pytest.approx(2 / 5), pytest.approx(1 / 3), 0.0, None]
    assert found.miou == pytest.approx((2 / 5 + 1 / 3) / 3)
    skipped = scores(confusion_matrix(predicted, labels, 4))
    assert skipped.per_class == [*found.per_class[:2], None, None]
    assert (found.macc, found.pixel_accuracy) == (skipped.macc, skipped.pixel_accuracy)


def nanmean_iou(predicted, labels, classes):
    """mmsegmentation's intersect_and_union and total_area_to_metrics, with nanmean."""
    predicted, labels = (np.array(values) for values in (predicted, labels))
    predicted, labels = predicted[labels != 255], labels[labels != 255]
    hit = np.histogram(predicted[predicted == labels], classes, (0, classes - 1))[0]
    area = [np.histogram(values, classes, (0, classes - 1))[0] for values in (predicted, labels)]
    with np.errstate(invalid="ignore"):
        return np.nanmean(hit / (area[0] + area[1] - hit))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 255])), min_size=1))
def test_zero_is_the_mean_of_mmsegmentation(pairs):
    predicted, labels = zip(*pairs, strict=True)
    confusion = confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 4)
    if confusion.sum():
        wanted = nanmean_iou(predicted, labels, 4)
        assert scores(confusion, "zero").miou == pytest.approx(wanted)


def literal_iou(predicted, labels, classes):
    values = []
    for c in range(classes):
        pairs = [(p == c, y == c) for p, y in zip(predicted, labels, strict=True) if y != 255]
        if not any(y for _, y in pairs):
            continue
        values.append(sum(p and y for p, y in pairs) / sum(p or y for p, y in pairs))
    return sum(values) / len(values)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 255])), min_size=1))
def test_against_sets_of_pixels(pairs):
    predicted, labels = zip(*pairs, strict=True)
    confusion = confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 4)
    assert confusion.sum() == sum(y != 255 for y in labels)
    if confusion.sum():
        assert scores(confusion).miou == pytest.approx(literal_iou(predicted, labels, 4))


@pytest.mark.parametrize("seed", range(5))
def test_means_against_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(seed)
    labels = draw.choice([0, 1, 2, 3, 255], 500)
    predicted = np.where(draw.random(500) < 0.6, labels, draw.integers(0, 4, 500)) % 255
    found = scores(confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 4))
    valid = labels != 255
    told = labels[valid], predicted[valid]
    iou = metrics.jaccard_score(*told, average=None)
    assert found.per_class == pytest.approx(iou.tolist())
    assert found.miou == pytest.approx(iou.mean())
    assert found.macc == pytest.approx(metrics.balanced_accuracy_score(*told))
    assert found.pixel_accuracy == pytest.approx(metrics.accuracy_score(*told))


class Local(nn.Module):
    """Sees nothing but each position's own 8x8 pixels: windows cannot change what it says."""

    align_corners = False

    def forward(self, images, taps):
        means = F.avg_pool2d(images.float(), 8)
        return Taps(logits=torch.stack([means[:, 0], means[:, 1] + 3, 2 * means[:, 2] - 100], 1))


PICTURE = torch.randint(0, 256, (1, 3, 5, 6), generator=torch.Generator().manual_seed(0))
PICTURE = F.interpolate(PICTURE.float(), (40, 48)).to(torch.uint8)


@pytest.mark.parametrize(
    "views",
    [Views(), Views(window=(24, 24), stride=(16, 24)), Views(flip=True), Views(fit=(80, 400))],
)
def test_the_classes_are_those_of_the_highest_scores(views, monkeypatch):
    monkeypatch.setattr(choice, "LEAST_ELEMENTS", 0)
    network = Local()
    wanted = predict(network, PICTURE, views).argmax(1)
    assert torch.equal(predict_classes(network, PICTURE, views), wanted)
    assert len(wanted.unique()) > 1


@pytest.mark.parametrize("decide", [None, lambda scores: scores.flip(1)])
def test_the_confusion_is_that_of_the_whole_map(decide, monkeypatch):
    """As the plain form counts it, in bands and with scores that are decided."""
    draw = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 4, (1, 40, 48), generator=draw) for _ in range(2)]
    labels = [y.masked_fill(y == 3, 255).to(torch.uint8) for y in labels]
    batches = [(PICTURE, labels[0]), (PICTURE.roll(1, 1), labels[1])]
    monkeypatch.setattr(evaluation, "evaluation_batches", lambda data, batch: batches)
    monkeypatch.setattr(choice, "LEAST_ELEMENTS", 0)
    network = Local()
    found = evaluate(
        network, SimpleNamespace(num_classes=3), torch.device("cpu"), batch=1, decide=decide,
        autocast=torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for image, labels in batches:
        logits = F.interpolate(network(image, []).logits, (40, 48), mode="bilinear")
        predicted = (decide(logits) if decide else logits).argmax(1)
        confusion += confusion_matrix(predicted, labels, 3)
    assert found == scores(confusion)


def test_windows_cover_a_side_and_end_with_it():
    assert _places(10, 4, 3) == [slice(0, 4), slice(3, 7), slice(6, 10)]
    assert _places(9, 4, 3) == [slice(0, 4), slice(3, 7), slice(5, 9)]
    assert _places(3, 4, 3) == [slice(0, 3)]
    assert _places(1024, 769, 513) == [slice(0, 769), slice(255, 1024)]


def test_windows_are_averaged_where_they_overlap():
    network = Local()
    windows = Views(window=(24, 24), stride=(16, 24))
    found = predict(network, PICTURE, windows)
    parts = {}
    for top in (0, 16):
        for left in (0, 24):
            part = PICTURE[..., top : top + 24, left : left + 24]
            parts[top, left] = predict(network, part)
    torch.testing.assert_close(found[..., :16, :24], parts[0, 0][..., :16, :])
    overlap = (parts[0, 0][..., 16:24, :] + parts[16, 0][..., :8, :]) / 2
    torch.testing.assert_close(found[..., 16:24, :24], overlap)
    torch.testing.assert_close(found[..., 24:, 24:], parts[16, 24][..., 8:, :])


def test_several_views_are_a_sum_of_softmax():
    network = Local()
    plain = predict(network, PICTURE)
    mirrored = predict(network, PICTURE.flip(-1)).flip(-1)
    found = predict(network, PICTURE, Views(flip=True))
    torch.testing.assert_close(found, plain.softmax(1) + mirrored.softmax(1))
    larger = F.interpolate(PICTURE.float(), (60, 72), mode="bilinear")
    resized = F.interpolate(network(larger, []).logits, (40, 48), mode="bilinear")
    found = predict(network, PICTURE, Views(scales=(1.0, 1.5)))
    # What is resized first to the larger picture and then back differs from this by little.
    assert (found - plain.softmax(1) - resized.softmax(1)).abs().mean() < 0.02


def test_fitted_images_are_scored_at_their_own_size():
    network = Local()
    fitted = F.interpolate(PICTURE.float(), (80, 96), mode="bilinear")
    there = F.interpolate(network(fitted, []).logits, (80, 96), mode="bilinear")
    back = F.interpolate(there, (40, 48), mode="bilinear")
    torch.testing.assert_close(predict(network, PICTURE, Views(fit=(80, 400))), back)
    same = predict(network, PICTURE, Views(fit=(40, 400)))
    torch.testing.assert_close(same, predict(network, PICTURE), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "64x64", "stride": "64x65"}, "--stride 64x65 leaves out pixels"),
        ({"window": "64x64", "stride": "65x1"}, "--stride 65x1 leaves out pixels"),
        ({"window": "0x64"}, "--window 0x64: give sides of at least 1 pixel"),
        ({"window": "64x64", "stride": "5x0"}, "--stride 5x0: give sides of at least 1 pixel"),
        ({"resize": "0x5"}, "--resize 0x5: give sides of at least 1 pixel"),
        *(
            ({"scales": scales}, f"--scales {scales}: give factors above 0")
            for scales in ("nan", "inf", "1,nan", "-inf,1", "1,-1", "")
        ),
    ],
)
def test_views_that_no_image_has_are_refused(options, message):
    usual = {"resize": "none", "window": None, "stride": None, "scales": "1", "flip": False}
    with pytest.raises(UserError) as raised:
        ViewOptions(**usual | options).views("camvid")
    (line,) = raised.value.problems
    assert line.startswith(message)


def test_windows_as_far_apart_as_they_are_large_cover_every_pixel():
    views = ViewOptions("none", "24x16", "24x16", "1", flip=False).views("camvid")
    assert predict(Local(), PICTURE, views).isfinite().all()
    with pytest.raises(AssertionError, match="leave pixels out"):
        predict(Local(), PICTURE, Views(window=(24, 24), stride=(24, 25)))


def evaluated(*arguments):
    return kdprof("evaluate", *arguments, "--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "student.pth"
    torch.manual_seed(0)
    network = build("pspnet-test_resnet", 12)
    torch.save({"step": {"student": network.state_dict()}}, path)
    return path


def test_the_command_prints_every_class_and_what_was_published(weights, monkeypatch):
    network = ("--model", "pspnet-test_resnet", "--weights", weights, "--data", "synthetic")
    done = evaluated(*network, "--flip", "--scales", "0.5,1", "--window", "64x64")
    assert done.returncode == 0, done.stderr
    taken = "kdprof names, weights under `step.student`: "
    for text in ("IoU %", "mIoU", "mAcc", "pixel accuracy", "images/s", taken, "entries"):
        assert text in done.stdout
    refitted = evaluated(*network, "--resize", "60x400", "--batch", "8")
    assert "mIoU" in refitted.stdout
    found = json.loads(evaluated(*network, "--batch", "4", "--json").stdout)
    assert found["images"] == 80
    assert found["reported"] is None
    assert len(found["scores"]["per_class"]) == len(found["class_names"])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(zoo._CITYSCAPES, digest, ("pspnet_x", 70.0, None))
    assert zoo.reported(weights).miou == 70.0
    assert "configs/pspnet/metafile.yaml" in zoo.reported(weights).source


def test_bad_input_gets_one_line_each(weights):
    network = ("--model", "pspnet-test_resnet", "--weights", weights, "--data", "synthetic")
    done = evaluated(*network, "--stride", "6x6", "--scales", "0", "--resize", "big")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "kdprof: --resize big: must be HEIGHTxWIDTH, such as 512x1024",
        "kdprof: --stride is the distance between windows; add --window",
        "kdprof: --scales 0: give factors above 0, such as 0.5,1,2",
    ]
    done = evaluated("--model", "deeplabv3-r18", *network[2:])
    assert done.returncode == 2
    assert "does not fit deeplabv3-resnet18c" in done.stderr


def test_weights_that_diverged_are_not_scored(weights, tmp_path):
    state = torch.load(weights, weights_only=True)["step"]["student"]
    broken = {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}
    path = tmp_path / "nan.pth"
    torch.save({"model": state, "model_ema": broken}, path)
    network = ("--model", "pspnet-test_resnet", "--data", "synthetic", "--weights")
    done = evaluated(*network, path)
    floats = sum(v.is_floating_point() for v in state.values())
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kdprof: {path}: {floats} of {len(state)} tensors hold NaN (")
    done = evaluated(*network, f"{path}#model", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["loaded"]
    assert told == f"kdprof names, weights under `model`: {len(state)} entries loaded"


class Sized:
    """A data set of which only the sizes are known."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (Views(), {(90, 118), (40, 60)}),
        (Views(fit=(45, 200)), {(45, 59), (45, 68)}),
        (Views(scales=(0.5, 1.0)), {(90, 118), (45, 59), (40, 60), (20, 30)}),
        (Views(window=(64, 64)), {(64, 64), (40, 60)}),
    ],
)
def test_sizes_that_a_network_meets_in_evaluation(views, expected):
    assert evaluated_sizes(Sized((90, 118), (40, 60), (90, 118)), views) == expected


class Picky:
    """Takes sides that are multiples of 32, of at most 4096 pixels."""

    def __init__(self):
        self.asked = []

    def check_input(self, batch, crop, training):
        self.asked.append(crop)
        right = all(side % 32 == 0 and side <= 4096 for side in crop)
        return None if right else f"picky cannot take {crop[0]}x{crop[1]}"


def test_few_of_many_sizes_are_tried_and_every_remainder_is():
    good = [(32 * h, 32 * w) for h in range(1, 30) for w in range(1, 30)]
    network = Picky()
    assert size_problems([network], good) == []
    assert len(network.asked) <= 4
    assert size_problems([Picky()], [*good, (512, 681)]) == ["picky cannot take 512x681"]
    assert size_problems([Picky()], [*good, (4128, 4128)]) == ["picky cannot take 4128x4128"]
    network = Picky()
    found = size_problems([network], [(h, w) for h in range(300, 400) for w in range(300, 400)])
    assert found[-1].startswith("and ")
    assert len(found) == 4
    assert len(network.asked) <= 2 + 2 * SIZE_PERIOD
