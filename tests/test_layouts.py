"""Small trees in exactly the layouts of the published data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from processes import kdprof

from kdprof.data import decoded, open_data
from kdprof.data.check import check_data
from kdprof.data.files import classes_of
from kdprof.data.layouts import COCO_UNUSED, LAYOUTS, PUBLISHED_DATA_SETS
from kdprof.errors import UserError
from kdprof.progress import Progress

SIZE = (6, 8)


def save(path, values=None, suffix=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        seed = sum(map(ord, path.stem))
        values = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def label(*values):
    """A label whose first pixels have these values, and the rest the last one."""
    flat = np.full(SIZE[0] * SIZE[1], values[-1], dtype=np.uint8)
    flat[: len(values)] = values
    return flat.reshape(SIZE)


def cityscapes(root, kind="labelTrainIds", values=(0, 18, 255)):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        save(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", label(*values))
        save(root / "gtFine" / split / city / f"{name}_gtFine_color.png")
        save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png")


def cityscapes_ids(root):
    cityscapes(root, "labelIds", (7, 33, 0, 9, 255))


def cityscapes_coarse(root):
    cityscapes_ids(root)
    name = "troisdorf_000000_000073"
    save(root / f"leftImg8bit/train_extra/troisdorf/{name}_leftImg8bit.png")
    save(root / f"gtCoarse/train_extra/troisdorf/{name}_gtCoarse_labelIds.png", label(7, 33, 0))


def ade20k(root):
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        base = root / "ADEChallengeData2016"
        save(base / "images" / part / f"{name}.jpg")
        save(base / "annotations" / part / f"{name}.png", label(1, 150, 0))


def voc(root):
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        save(base / "JPEGImages" / f"{name}.jpg")
        save(base / "SegmentationClass" / f"{name}.png", label(0, 20, 255))
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n")
    (lists / "val.txt").write_text("2007_000039\n2007_000063\n")


def voc_aug(root):
    voc(root)
    base = root / "VOCdevkit" / "VOC2012"
    for name in ("2007_000032", "2008_000002"):
        save(base / "JPEGImages" / f"{name}.jpg")
        save(base / "SegmentationClassAug" / f"{name}.png", label(0, 20, 255))
    listed = ("2007_000032", "2008_000002")
    text = "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in listed)
    (base / "ImageSets/Segmentation/trainaug.txt").write_text(text)


def coco_stuff(root, ending="_labelTrainIds.png", values=(0, 170, 255)):
    for part, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        save(root / "images" / part / f"{name}.jpg")
        save(root / "annotations" / part / f"{name}{ending}", label(*values))


def coco_stuff_raw(root):
    coco_stuff(root, ".png", (0, 181, 255))


def pascal_context(root):
    base = root / "VOC2010"
    for name in ("2008_000002", "2008_000003"):
        save(base / "JPEGImages" / f"{name}.jpg")
        save(base / "SegmentationClassContext" / f"{name}.png", label(1, 59, 0))
    lists = base / "ImageSets" / "SegmentationContext"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000002\n")
    (lists / "val.txt").write_text("2008_000003\n")


def camvid(root):
    for split in ("train", "val"):
        save(root / split / f"{split}1.png")
        save(root / f"{split}annot" / f"{split}1.png", label(0, 10, 11))


def folder(root):
    for split in ("train", "val"):
        save(root / "images" / split / "deep" / "a.jpg")
        save(root / "masks" / split / "deep" / "a.png", label(0, 2, 255))
    (root / "classes.txt").write_text("soil\ncrop\t10 200 30\nweed\n")


TREES = {
    "cityscapes": (cityscapes, "cityscapes", 2, 1, (0, 18, 255)),
    "cityscapes ids": (cityscapes_ids, "cityscapes", 2, 1, (0, 18, 255, 255, 255)),
    "cityscapes coarse": (cityscapes_coarse, "cityscapes-coarse", 3, 1, (0, 18, 255)),
    "ade20k": (ade20k, "ade20k", 1, 1, (0, 149, 255)),
    "voc": (voc, "voc", 1, 2, (0, 20, 255)),
    "voc aug": (voc_aug, "voc-aug", 2, 2, (0, 20, 255)),
    "coco-stuff": (coco_stuff, "coco-stuff", 1, 1, (0, 170, 255)),
    "coco-stuff raw": (coco_stuff_raw, "coco-stuff", 1, 1, (0, 170, 255)),
    "pascal-context": (pascal_context, "pascal-context", 1, 1, (0, 58, 255)),
    "camvid": (camvid, "camvid", 1, 1, (0, 10, 255)),
    "folder": (folder, "folder", 1, 1, (0, 2, 255)),
}


def opened(name, root, split="train"):
    return open_data(f"{name}:{root}", split, synthetic_size=(8, 8), synthetic_count=1)


@pytest.mark.parametrize(("tree", "name", "train", "val", "read"), TREES.values(), ids=TREES)
def test_a_tree_of_the_published_layout_is_read(tree, name, train, val, read, tmp_path):
    tree(tmp_path)
    for split, count in (("train", train), ("val", val)):
        data = opened(name, tmp_path, split)
        assert (len(data), data.split) == (count, split)
        image, found = data[0]
        assert (image.dtype, image.shape) == (torch.uint8, (3, *SIZE))
        assert found.flatten()[: len(read)].tolist() == list(read)
        assert len(data.class_names) == len(data.palette) == data.num_classes
        assert data.size(0) == SIZE


@pytest.mark.parametrize(("tree", "name"), [(t, n) for t, n, *_ in TREES.values()], ids=TREES)
def test_the_cache_serves_every_layout(tree, name, tmp_path):
    tree(tmp_path / "data")
    data = opened(name, tmp_path / "data")
    kept = decoded(data, "disk", tmp_path / "cache", Progress(None))
    assert (kept.class_names, kept.palette, len(kept)) == (
        data.class_names,
        data.palette,
        len(data),
    )
    for index in range(len(data)):
        for ours, theirs in zip(kept[index], data[index], strict=True):
            assert torch.equal(ours, theirs)


def test_every_layout_has_a_tree_here():
    assert {name for _, name, *_ in TREES.values()} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("name", "classes"),
    [("cityscapes", 19), ("ade20k", 150), ("voc", 21), ("coco-stuff", 171), ("camvid", 11),
     ("pascal-context", 59)],
)  # fmt: skip
def test_class_tables(name, classes):
    found = classes_of(name)
    assert len(found.names) == len(set(found.names)) == classes
    assert all(len(c) == 3 and all(0 <= v < 256 for v in c) for c in found.palette)
    assert PUBLISHED_DATA_SETS[name].counts["val"] > 100


def test_removed_ids_of_coco_leave_171_classes():
    assert 182 - len(COCO_UNUSED) == 171


def test_colours_of_ones_own_classes(tmp_path):
    folder(tmp_path)
    data = opened("folder", tmp_path)
    assert data.class_names == ("soil", "crop", "weed")
    assert data.palette[1] == (10, 200, 30)


def refusal(name, root, split="train") -> list[str]:
    with pytest.raises(UserError) as caught:
        opened(name, root, split)
    return caught.value.problems


def test_a_wrong_root_names_what_was_looked_for_and_what_is_near(tmp_path):
    cityscapes(tmp_path / "cityscapes")
    (line,) = refusal("cityscapes", tmp_path / "cityscape")
    assert "did you mean" in line
    assert "leftImg8bit/SPLIT/CITY" in line
    (tmp_path / "leftImg8bits").mkdir()
    (tmp_path / "other").mkdir()
    (line,) = refusal("cityscapes", tmp_path / "other")
    assert "holds no leftImg8bit" in line
    ade20k(tmp_path)
    (line,) = refusal("ade20k", tmp_path / "other")
    assert "holds no annotations" in line


def test_a_split_that_is_not_there(tmp_path):
    ade20k(tmp_path)
    assert "unknown split 'test'" in refusal("ade20k", tmp_path, "test")[0]
    cityscapes(tmp_path)
    assert "no folder" in refusal("cityscapes", tmp_path, "test")[0]
    folder(tmp_path / "mine")
    assert "no folder" in refusal("folder", tmp_path / "mine", "test")[0]


def test_labels_out_of_range_are_told_with_file_and_range(tmp_path):
    ade20k(tmp_path)
    path = tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    save(path, label(1, 151))
    with pytest.raises(UserError, match=r"label value 151 in .*expected 1-150 or 0 \(void\)"):
        opened("ade20k", tmp_path)[0]
    coco_stuff(tmp_path, ".png", (0, 11, 255))
    with pytest.raises(UserError, match=r"label value 11 in .*without COCO's removed ids"):
        opened("coco-stuff", tmp_path)[0]


def test_all_missing_labels_are_told_at_once(tmp_path):
    cityscapes(tmp_path)
    for path in tmp_path.glob("gtFine/train/*/*labelTrainIds.png"):
        path.unlink()
    lines = refusal("cityscapes", tmp_path)
    assert len(lines) == 2
    assert all("has no label; add" in line and "_gtFine_label" in line for line in lines)


def test_listed_files_that_are_not_there(tmp_path):
    voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg").unlink()
    assert "which is listed; get it" in refusal("voc", tmp_path)[0]
    assert "no list trainaug.txt or" in refusal("voc-aug", tmp_path)[0]


@pytest.mark.parametrize("mode", ["I;16", "RGB"])
def test_masks_that_are_no_indices_are_refused(tmp_path, mode):
    folder(tmp_path)
    path = tmp_path / "masks/train/deep/a.png"
    values = np.zeros(SIZE, np.uint16) if mode == "I;16" else np.zeros((*SIZE, 3), np.uint8)
    Image.fromarray(values).save(path)
    assert f"is {mode}, not 8-bit class indices" in refusal("folder", tmp_path)[0]


def test_a_truncated_image_is_named(tmp_path):
    folder(tmp_path)
    path = tmp_path / "masks/train/deep/a.png"
    path.write_bytes(path.read_bytes()[:-20])
    data = opened("folder", tmp_path)
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        data[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\na\n", "classes of different names"),
        ("a\t1 2\nb\n", "write a colour as R G B"),
        ("", "1 to"),
    ],
)
def test_a_classes_file_that_says_nothing_sensible(tmp_path, text, message):
    folder(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    assert message in refusal("folder", tmp_path)[0]


# kdprof data check


def test_every_pixel_is_counted(tmp_path):
    folder(tmp_path)
    found = check_data(f"folder:{tmp_path}", ("train", "val"), Progress(None))
    train = found.splits[0]
    assert (train.images, train.published, dict(train.sizes)) == (1, None, {SIZE: 1})
    assert train.pixels.tolist() == [1, 0, 1, SIZE[0] * SIZE[1] - 2]
    assert train.present.tolist() == [1, 0, 1, 1]
    assert found.problems == []
    (index, picture, values) = train.shown[0]
    assert (index, picture.shape, values.shape) == (0, (*SIZE, 3), SIZE)


def test_every_unusable_file_is_told_and_the_others_are_counted(tmp_path):
    ade20k(tmp_path)
    base = tmp_path / "ADEChallengeData2016"
    for number in (2, 3, 4):
        name = f"ADE_train_{number:08}"
        save(base / f"images/training/{name}.jpg")
        save(base / f"annotations/training/{name}.png", label(1, 150 + (number == 3)))
    damaged = base / "annotations/training/ADE_train_00000004.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    found = check_data(f"ade20k:{tmp_path}", ("train", "test"), Progress(None))
    train, test = found.splits
    assert (train.images, train.published, sum(train.sizes.values())) == (4, 20210, 2)
    assert len(train.problems) == 2
    assert any("label value 151" in line for line in train.problems)
    assert any("ADE_train_00000004.png cannot be read" in line for line in train.problems)
    assert "unknown split 'test'" in test.problems[0]


def check(folder, *arguments):
    return kdprof("data", "check", *arguments, cwd=folder)


def test_the_command_prints_and_draws(tmp_path):
    voc(tmp_path / "data")
    done = check(tmp_path, f"voc:{tmp_path / 'data'}")
    assert done.returncode == 0, done.stderr
    for text in ("1464", "6x8: 2", "aeroplane", "void", "no problems", "wrote voc-check.png"):
        assert text in done.stdout
    with Image.open(tmp_path / "voc-check.png") as sheet:
        assert min(sheet.size) > 300
        assert len(sheet.convert("RGB").getcolors(10**6)) > 50
    done = check(tmp_path, f"voc:{tmp_path / 'data'}", "--split", "test")
    assert done.returncode == 1
    assert "unknown split 'test'" in done.stdout
