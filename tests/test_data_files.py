"""Files that are easily left out or mistaken: links, endings, names in lists, EXIF, text."""

import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_layouts import SIZE, cityscapes, folder, label, opened, refusal, save, voc

from kdprof.data import decoded, files, open_data
from kdprof.data.check import check_data
from kdprof.data.tree import files_below
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.reports.data_check import _passed_over
from kdprof.study import DataSettings


def checked(spec, *splits):
    return check_data(spec, splits or ("train", "val"), Progress(None))


def grown(root, count=4):
    """A ``folder:`` whose training split has ``count`` pairs."""
    folder(root)
    for number in range(1, count):
        save(root / f"images/train/{number}.png")
        save(root / f"masks/train/{number}.png", label(0, 1))


# F5: links


@pytest.mark.parametrize("linked", [["aachen"], ["aachen", "bochum"]], ids=["one", "all"])
def test_linked_cities_are_read(tmp_path, linked):
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    cityscapes(root)
    for place in ("leftImg8bit/train", "gtFine/train"):
        (elsewhere / place).mkdir(parents=True)
        for city in linked:
            (root / place / city).rename(elsewhere / place / city)
            (root / place / city).symlink_to(elsewhere / place / city)
    assert len(opened("cityscapes", root)) == 2


def test_links_to_files_and_to_a_whole_split_are_read(tmp_path):
    grown(tmp_path / "there")
    root = tmp_path / "here"
    (root / "images").mkdir(parents=True)
    (root / "images/train").symlink_to(tmp_path / "there/images/train")
    (root / "masks/train").mkdir(parents=True)
    for path in files_below(tmp_path / "there/masks/train"):
        link = root / "masks/train" / path.relative_to(tmp_path / "there/masks/train")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)
    (root / "classes.txt").symlink_to(tmp_path / "there/classes.txt")
    assert len(opened("folder", root)) == 4


@pytest.mark.parametrize("steps", [1, 2], ids=["to a parent", "of two links"])
def test_a_loop_of_links_is_refused(tmp_path, steps):
    root = tmp_path / "data"
    grown(root)
    link = root / "images/train/again"
    if steps == 1:
        link.symlink_to(root / "images/train")
    else:
        (tmp_path / "other").mkdir()
        link.symlink_to(tmp_path / "other")
        (tmp_path / "other/back").symlink_to(root / "images/train")
    (line,) = refusal("folder", root)
    assert "a loop; remove the link" in line
    assert str(link) in line
    # The other split, in which nothing is wrong, counts without end neither.
    assert any("loops" in place for place in checked(f"folder:{root}", "val").passed_over)


def test_a_link_to_nothing_and_a_pipe_are_refused(tmp_path):
    grown(tmp_path)
    (tmp_path / "images/train/city").symlink_to(tmp_path / "gone")
    (tmp_path / "images/train/itself").symlink_to(tmp_path / "images/train/itself")
    os.mkfifo(tmp_path / "masks/train/9.png")
    lines = refusal("folder", tmp_path)
    assert sum("a link that leads nowhere; repair" in line for line in lines) == 2
    assert any("9.png is no regular file" in line for line in lines)


# F6: endings


def test_endings_in_any_case_are_read(tmp_path):
    grown(tmp_path)
    for number in (1, 2):
        image = tmp_path / f"images/train/{number}.png"
        Image.open(image).save(image.with_suffix(".JPG"))
        image.unlink()
        mask = tmp_path / f"masks/train/{number}.png"
        mask.rename(mask.with_suffix(".PNG"))
    assert len(opened("folder", tmp_path)) == 4


def test_endings_of_other_layouts_in_any_case(tmp_path):
    cityscapes(tmp_path / "cityscapes")
    for path in (tmp_path / "cityscapes").rglob("bochum*"):
        if path.is_file():
            path.rename(path.with_suffix(".PNG"))
    assert len(opened("cityscapes", tmp_path / "cityscapes")) == 2
    voc(tmp_path / "voc")
    image = tmp_path / "voc/VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg"
    image.rename(image.with_suffix(".JPEG"))
    assert len(opened("voc", tmp_path / "voc")) == 1


@pytest.mark.parametrize("twin", ["1.jpg", "1.PNG"])
def test_twins_are_refused_by_name(tmp_path, twin):
    grown(tmp_path)
    save(tmp_path / "images/train" / twin)
    (line,) = refusal("folder", tmp_path)
    assert "1.png" in line
    assert twin in line
    assert "have the same name; remove one" in line


@pytest.mark.parametrize("ending", [".tif", ".bmp", ".webp"])
def test_images_in_formats_that_are_not_read_are_refused(tmp_path, ending):
    grown(tmp_path)
    for number in (7, 8):
        save(tmp_path / f"images/train/{number}{ending}")
    (line,) = refusal("folder", tmp_path)
    assert f"2 files, such as {tmp_path}/images/train/7{ending}, are not read; convert" in line


def test_a_jpeg_is_no_label_under_either_name(tmp_path):
    grown(tmp_path)
    save(tmp_path / "masks/train/1.jpg", label(0, 1))
    assert any("1.jpg is not read; convert to .png" in line for line in refusal("folder", tmp_path))
    (tmp_path / "masks/train/1.jpg").rename(tmp_path / "masks/train/1.png")
    (line,) = refusal("folder", tmp_path)
    assert "1.png is a JPEG, which changes label values" in line


def test_every_file_is_used_or_counted(tmp_path):
    grown(tmp_path)
    save(tmp_path / "images/train/._1.png")
    save(tmp_path / "images/train/.ipynb_checkpoints/1-checkpoint.png")
    save(tmp_path / "__MACOSX/images/train/1.png")
    save(tmp_path / "images/test/a.jpg")
    save(tmp_path / "images/stray.png")
    (tmp_path / "images/train/notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    found = checked(f"folder:{tmp_path}")
    assert [split.images for split in found.splits] == [4, 1]
    assert dict(found.passed_over) == {
        "hidden": 3,
        "images/test: .jpg": 1,
        "images: .png": 1,
        "images/train: .txt": 1,
        "without ending": 1,
    }
    used = sum(2 * split.images for split in found.splits) + 1
    every = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert used + found.passed_over.total() == every
    assert _passed_over(found).startswith("7 files passed over by train and val: hidden 3; ")


def test_unlisted_images_and_repeated_lines_are_counted(tmp_path):
    voc(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2012"
    for name in ("other", "another"):
        save(base / "JPEGImages" / f"{name}.jpg")
    (base / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000032\n")
    found = checked(f"voc:{tmp_path}")
    assert dict(found.passed_over) == {"JPEGImages: .jpg": 2}
    (note,) = found.splits[0].notes
    assert note.startswith("1 lines of ")
    assert "repeat an image" in note


# F13: lists


def listed(root, names, lines, encoding="utf-8"):
    """A VOC tree of these images, whose list of the training split holds these lines."""
    for name in names:
        save(root / "JPEGImages" / f"{name}.jpg")
        save(root / "SegmentationClass" / f"{name}.png", label(0, 20, 255))
    folder = root / "ImageSets/Segmentation"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_bytes("\n".join(lines).encode(encoding))
    return root


def read(root):
    return [image.name.removesuffix(".jpg") for image, _ in opened("voc", root).pairs]


@pytest.mark.parametrize(
    ("names", "lines", "expected"),
    [
        (["frame_0.5s", "frame_1.0s"], ["frame_0.5s", "frame_1.0s"], None),
        (["run.1", "run.2", "run"], ["run.1", "run.2"], ["run.1", "run.2"]),
        (["my photo 1", "my photo 2"], ["my photo 1", "my photo 2"], None),
        (["a", "b"], ["a 1", "b -1"], None),
        (["a", "b"], ["a.jpg", "b.PNG"], None),
        (["a", "b"], ["/JPEGImages/a.jpg /SegmentationClassAug/a.png"], ["a"]),
        (["a b.c"], ["VOC2012/JPEGImages/a b.c.jpg SegmentationClass/a b.c.png"], None),
        (["a.png"], ["a.png"], None),
        (["a", "b"], ["a", "b", "a", "a"], None),
        (["a", "b"], ["a\r", "b\r"], None),
        (["day/1", "night/1"], ["night/1"], ["1"]),
    ],
)
def test_a_list_names_exactly_its_images(tmp_path, names, lines, expected):
    root = listed(tmp_path, names, lines)
    assert read(root) == (names if expected is None else expected)


def test_a_list_with_a_byte_order_mark(tmp_path):
    assert read(listed(tmp_path, ["a", "b"], ["a", "b"], "utf-8-sig")) == ["a", "b"]


def test_a_listed_folder_is_not_another_folder(tmp_path):
    root = listed(tmp_path, ["day/1", "night/1"], ["night/1"])
    assert opened("voc", root).pairs[0][0].parent.name == "night"


@pytest.mark.parametrize(
    ("names", "line", "message"),
    [
        (["photo", "photo 1"], "photo 1", "may mean 'photo 1' or 'photo'; rename"),
        (["run", "run.png"], "run.png", "may mean 'run.png' or 'run'; rename"),
        (["run"], "run.1", "no image 'run.1', which is listed; get it"),
        (["frame"], "fram", "did you mean 'frame'?"),
        (["a", "b"], "/JPEGImages/a.jpg /SegmentationClass/b.png", "pairs different names"),
    ],
)
def test_a_line_that_may_mean_another_image_is_refused(tmp_path, names, line, message):
    (problem,) = refusal("voc", listed(tmp_path, names, [line]))
    assert message in problem


def test_a_list_in_another_encoding_is_refused(tmp_path):
    root = listed(tmp_path, ["grün"], ["grün"], "latin-1")
    assert "is not UTF-8 text" in refusal("voc", root)[0]


def as_pipe(path):
    os.mkfifo(path)


def as_huge(path):
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (as_pipe, "is a pipe or device, not a file; give a file"),
        (os.mkdir, "is a folder, not a file; give a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or device"),
        (as_huge, "has 1,048,576 MiB, more than the 256 MiB that are read"),
        (lambda path: path.write_bytes(b"a\0b\xff"), "is not UTF-8 text (byte 3); save it as"),
    ],
)
@pytest.mark.parametrize("text", ["classes.txt", "ImageSets/Segmentation/train.txt"])
def test_a_text_that_is_none_is_refused_and_never_waited_for(tmp_path, text, kind, message):
    if text == "classes.txt":
        folder(tmp_path)
    else:
        listed(tmp_path, ["a"], ["a"])
    path = tmp_path / text
    path.unlink()
    kind(path)
    (problem,) = refusal("folder" if text == "classes.txt" else "voc", tmp_path)
    assert problem.startswith(str(path))
    assert message in problem


# Content that is no image


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the ending says."""
    folder(tmp_path)
    path = tmp_path / "images/train/deep/a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\nshowpage\n")
    started = []
    for name in ("Popen", "check_call", "run", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: started.append(a))
    with pytest.raises(UserError, match=rf"{path.name} cannot be read: cannot identify"):
        opened("folder", tmp_path)
    with pytest.raises(UserError, match="cannot identify"):
        files._decoded(path, "RGB")
    assert not started


# low: classes.txt


@pytest.mark.parametrize("name", ["a\x1b[31m", "\u202ea", "a\x00", "\x7f", "a\tb\x07"])
def test_a_class_has_a_name_of_visible_characters(tmp_path, name):
    folder(tmp_path)
    path = tmp_path / "classes.txt"
    path.write_text(f"soil\n{name.partition(chr(9))[0]}\x07\nweed\n")
    with pytest.raises(UserError, match=r"classes.txt, line 2: a class is a name of visible"):
        opened("folder", tmp_path)


def test_a_byte_order_mark_in_classes(tmp_path):
    folder(tmp_path)
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    data = opened("folder", tmp_path)
    assert data.class_names == ("soil", "crop", "weed")
    assert data.palette[1] == (10, 200, 30)


# F12: EXIF

STORED_AS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""How a camera stores an image that viewers show upright, by EXIF orientation."""


def exif(orientation):
    found = Image.Exif()
    found[0x112] = orientation
    return found.tobytes()


def shown():
    """An image, red where its mask is 1, as a viewer shows both."""
    mask = np.zeros((24, 40), np.uint8)
    mask[2:10, 3:20] = 1
    image = np.full((24, 40, 3), (0, 120, 0), np.uint8)
    image[mask == 1] = (220, 30, 30)
    return image, mask


def photographed(root, orientation, ending=".jpg", mask_orientation=None):
    image, mask = shown()
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](image)))
        stored.save(root / "images" / split / f"a{ending}", quality=95, exif=exif(orientation))
        path = root / "masks" / split / "a.png"
        if mask_orientation is None:
            Image.fromarray(mask).save(path)
        else:
            turned = np.ascontiguousarray(STORED_AS[mask_orientation](mask))
            Image.fromarray(turned).save(path, exif=exif(mask_orientation))
    (root / "classes.txt").write_text("grass\nsign\n")


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_photo_lies_under_its_mask_as_viewers_show_it(tmp_path, orientation, ending):
    photographed(tmp_path, orientation, ending)
    data = opened("folder", tmp_path)
    image, mask = data[0]
    red = image[0] > 150
    assert data.size(0) == (24, 40) == tuple(mask.shape)
    assert red[mask == 1].float().mean() > 0.9
    assert red[mask == 0].float().mean() < 0.05
    found = checked(f"folder:{tmp_path}")
    turned = ["1 image is turned as EXIF says"] if orientation != 1 else []
    assert found.splits[0].notes == turned


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_with_an_orientation_of_its_own(tmp_path, orientation):
    photographed(tmp_path, 8, mask_orientation=orientation)
    _, mask = opened("folder", tmp_path)[0]
    assert torch.equal(mask, torch.from_numpy(shown()[1]))


def test_a_mask_drawn_on_the_stored_pixels_is_refused(tmp_path):
    photographed(tmp_path, 6)
    mask = Image.fromarray(np.ascontiguousarray(np.rot90(shown()[1])))
    mask.save(tmp_path / "masks/train/a.png")
    (line,) = refusal("folder", tmp_path)
    assert "24x40 (EXIF orientation 6) but" in line
    assert "is 40x24; turn the label as viewers show the image" in line


def test_an_orientation_behind_the_pixels_is_refused_when_read(tmp_path):
    folder(tmp_path)
    path = tmp_path / "images/train/deep/a.png"
    save(path)
    (tmp_path / "images/train/deep/a.jpg").unlink()
    chunk = b"eXIf" + exif(6).removeprefix(b"Exif\x00\x00")
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + packed + content[-12:])
    data = opened("folder", tmp_path)
    with pytest.raises(UserError, match="EXIF orientation, 6, stands behind its pixels"):
        data[0]


def test_conversions_are_said(tmp_path):
    grown(tmp_path)
    for number, mode in ((1, "RGBA"), (2, "L"), (3, "L")):
        path = tmp_path / f"images/train/{number}.png"
        Image.open(path).convert(mode).save(path)
    notes = checked(f"folder:{tmp_path}", "train").splits[0].notes
    assert notes == ["1 image is RGBA, converted to RGB", "2 images are L, converted to RGB"]
    assert opened("folder", tmp_path)[0][0].shape == (3, *SIZE)


# Bits of a value


def chunk(name, content):
    packed = name + content
    return struct.pack(">I", len(content)) + packed + struct.pack(">I", zlib.crc32(packed))


def png_of(values, bits, colour):
    """A PNG by its specification: ``values`` (H, W) or (H, W, 3), ``bits`` of each, type of
    colour 0 (grey), 2 (RGB) or 3 (palette)."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1).astype(">u2")
    unpacked = np.unpackbits(rows.view(np.uint8).reshape(height, -1, 2), axis=2)[..., -bits:]
    packed = np.packbits(unpacked.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if colour == 3 else b""
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    parts = chunk(b"IHDR", header), palette, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def masked(root, content, settings=None):
    """A ``folder:`` of eight classes whose mask of training is this file."""
    folder(root)
    (root / "classes.txt").write_text("".join(f"c{i}\t{i} 0 0\n" for i in range(8)))
    (root / "masks/train/deep/a.png").write_bytes(content)
    return open_data(
        f"folder:{root}", "train", synthetic_size=(8, 8), synthetic_count=1, labels=settings
    )


@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_classes_of_few_bits_are_read_as_the_file_has_them(tmp_path, bits, colour):
    """Pillow spreads grey of 2 and 4 bits over 0-255: class 1 was read as 85 and as 17."""
    values = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % min(8, 2**bits)
    data = masked(tmp_path / "data", png_of(values, bits, colour))
    assert np.array_equal(data.label(0), values)
    kept = decoded(data, "disk", tmp_path / "cache", Progress(None))
    assert torch.equal(kept.label(0), data.label(0))
    train = checked(f"folder:{tmp_path / 'data'}", "train").splits[0]
    assert train.pixels.tolist() == np.bincount(values.ravel(), minlength=9).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_values_of_few_bits_in_a_label_map_are_those_of_the_file(tmp_path, bits):
    values = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 3
    settings = DataSettings(label_map={0: "c5", 1: "void", 2: "c7"})
    data = masked(tmp_path, png_of(values, bits, 0), settings)
    assert np.array_equal(data.label(0), np.array([5, 255, 7])[values])


def test_a_tiff_of_four_bits_is_read_as_the_file_has_it(tmp_path):
    """What a file is shows its content, not its ending."""
    values = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 8
    packed = np.packbits(np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 4:])
    tags = [(256, SIZE[1]), (257, SIZE[0]), (258, 4), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, SIZE[0]), (279, packed.size)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    start = struct.pack("<2sHI", b"II", 42, 8 + packed.size)
    assert np.array_equal(masked(tmp_path, start + packed.tobytes() + directory).label(0), values)


def test_labels_of_sixteen_bits_are_refused(tmp_path):
    """Pillow drops the lower eight bits of colours: class 7 here was read as class 0."""
    values = np.zeros((*SIZE, 3), int)
    values[..., 0] = 7
    with pytest.raises(UserError, match="has 16 bits per value; save labels with 8"):
        masked(tmp_path, png_of(values, 16, 2), DataSettings(masks="colours"))
    with pytest.raises(UserError, match="not 8-bit class indices"):
        masked(tmp_path / "grey", png_of(values[..., 0], 16, 0))


def test_an_image_of_sixteen_bits_is_converted_and_said(tmp_path):
    folder(tmp_path)
    (tmp_path / "images/train/deep/a.jpg").unlink()
    values = np.full((*SIZE, 3), 0x7F03)
    (tmp_path / "images/train/deep/a.png").write_bytes(png_of(values, 16, 2))
    assert torch.equal(opened("folder", tmp_path)[0][0].unique(), torch.tensor([0x7F]).byte())
    notes = checked(f"folder:{tmp_path}", "train").splits[0].notes
    assert notes == ["1 image is RGB of 16 bits, converted to RGB"]
