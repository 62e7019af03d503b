"""Data from which little can be learned or scored: what is said of them, and what is refused."""

import numpy as np
import pytest
from PIL import Image
from processes import kdprof
from small_study import small_study

from kdprof.data.check import check_data
from kdprof.data.degenerate import examine_labels
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.train.prepare import check_content

SIZE = (40, 56)
BINARY = ("background", "object")


def made(root, train, val, classes=BINARY):
    """A ``folder:`` whose masks are stripes of these values; images are noise, none twice."""
    rng = np.random.default_rng(0)
    for split, masks in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number, values in enumerate(masks):
            mask = np.zeros(SIZE, np.uint8)
            for part, value in zip(np.array_split(mask, len(values), 1), values, strict=True):
                part[:] = value
            image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / f"images/{split}/{number}.png")
            Image.fromarray(mask).save(root / f"masks/{split}/{number}.png")
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return f"folder:{root}"


class Said:
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def task(self, label, total, done=0):
        return Progress(None).task(label, total, done)

    def say(self, line):
        self.lines.append(line)


def warnings(spec, **changes):
    """Return the warnings of the check and before training, which agree."""
    of_check = check_data(spec, ("train", "val"), Progress(None)).content.warnings
    said = Said()
    check_content(ResolvedStudy(small_study(data=spec, **changes)), said)
    assert said.lines == [f"warning: {line}" for line in of_check]
    return of_check


def test_nothing_is_said_of_ordinary_data(tmp_path):
    assert warnings(made(tmp_path, [[0, 1]] * 3, [[0, 1, 255]] * 2)) == []


# F4


def test_masks_of_0_and_255(tmp_path):
    found = warnings(made(tmp_path, [[0, 255]] * 3, [[0, 255]] * 2))
    assert found == [
        "no training image shows object",
        "all labelled pixels of the training images are background: nothing else can be learned",
        "no validation image shows object: mIoU is the mean over 1 of 2 classes",
        "all labelled pixels of the validation images are background: a network that always says "
        "background has an mIoU of 100 %",
    ]


def test_a_class_in_one_split_only(tmp_path):
    spec = made(tmp_path, [[0, 1]] * 3, [[0, 2]] * 2, ("a", "b", "c"))
    assert warnings(spec) == [
        "no training image shows c",
        "no validation image shows b: mIoU is the mean over 2 of 3 classes",
        "validation images show c, which no training image shows: that cannot be learned, and is "
        "scored",
    ]


def test_many_absent_classes_are_counted(tmp_path):
    spec = made(tmp_path, [list(range(19))] * 2, [[0, 1]] * 2, [f"c{i}" for i in range(19)])
    (line,) = warnings(spec)
    assert line == (
        "no validation image shows c2, c3, c4, c5, c6 and 12 more: mIoU is the mean over 2 of 19 "
        "classes"
    )


def test_labels_of_whole_images(tmp_path):
    found = warnings(made(tmp_path, [[0], [1], [0]], [[0, 1]] * 2))
    assert found == [
        "each of the 3 training images has one class throughout; are these labels of whole images "
        "instead of pixels?"
    ]


def test_some_images_of_void(tmp_path):
    found = warnings(made(tmp_path, [[0, 1], [255], [255]], [[0, 1], [255]]))
    assert found == [
        "2 of 3 training images have only void pixels",
        "1 of 2 validation images have only void pixels",
    ]


def test_the_same_images_in_both_splits(tmp_path):
    spec = made(tmp_path, [[0, 1]] * 3, [[0, 1]] * 3)
    for number in (1, 2):
        content = (tmp_path / f"images/train/{number}.png").read_bytes()
        (tmp_path / f"images/val/{number - 1}.png").write_bytes(content)
    (line,) = warnings(spec)
    assert line.startswith("2 of 3 validation images are training images, too, such as ")
    assert line.endswith("images/val/0.png: scores on them say nothing about new images")


def test_one_image_twice_in_a_split(tmp_path):
    spec = made(tmp_path, [[0, 1]] * 3, [[0, 1]] * 2)
    (tmp_path / "images/train/2.png").unlink()
    (tmp_path / "images/train/2.png").symlink_to(tmp_path / "images/train/1.png")
    (line,) = warnings(spec)
    assert line.startswith("1 of 3 training images repeat others, such as ")


# F14


@pytest.mark.parametrize(
    ("train", "val", "told"),
    [
        ([[255]] * 2, [[255]] * 2, ["training labels is void", "validation labels is void"]),
        ([[0, 1]] * 2, [[255]] * 2, ["validation labels is void, so nothing can be scored on"]),
        ([[255]] * 2, [[0, 1]] * 2, ["training labels is void, so nothing can be learned from"]),
    ],
    ids=["both", "val", "train"],
)
def test_a_split_of_void_is_refused_before_training(tmp_path, train, val, told):
    spec = made(tmp_path, train, val)
    with pytest.raises(UserError) as caught:
        check_content(ResolvedStudy(small_study(data=spec)), Progress(None))
    assert len(caught.value.problems) == len(told)
    for problem, part in zip(caught.value.problems, told, strict=True):
        assert part in problem
    assert check_data(spec, ("train", "val"), Progress(None)).problems == list(
        caught.value.problems
    )


def test_a_single_class_is_refused(tmp_path):
    spec = made(tmp_path, [[0, 255]] * 2, [[0, 255]] * 2, ("object",))
    with pytest.raises(UserError, match="'object' is the only class: its cross-entropy is 0"):
        check_content(ResolvedStudy(small_study(data=spec)), Progress(None))


def test_the_command_trains_nothing_on_void(tmp_path):
    spec = made(tmp_path / "data", [[0, 1]] * 2, [[255]] * 2)
    (tmp_path / "small.toml").write_text(small_study(data=spec).to_toml())
    done = kdprof("train", "--study", "small.toml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing can be scored on them; check the label values" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/runs/*"))
    checked = kdprof("data", "check", spec, cwd=tmp_path)
    assert checked.returncode == 1
    assert "1 problem" in checked.stdout


def test_the_labels_of_a_scenario_are_those_of_its_steps(tmp_path):
    spec = made(tmp_path, [[0, 1], [0, 2]], [[0, 1], [0, 1]], ("sky", "road", "car"))
    scenario = {"new": ["car"], "background": "sky"}
    study = ResolvedStudy(small_study(data=spec, scenario=scenario))
    found = study.data.examine()
    assert found.problems == []
    assert found.warnings == [
        "student: no validation image shows car: mIoU is the mean over 2 of 3 classes"
    ]


def test_classes_are_counted_in_any_split():
    shown = np.zeros((2, 256), bool)
    shown[:, 0] = True
    found = examine_labels(("a", "b"), {"test": shown})
    assert found.warnings[0] == "no test image shows b: mIoU is the mean over 1 of 2 classes"
