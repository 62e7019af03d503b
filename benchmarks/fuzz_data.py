"""Fuzzed data sets: damaged and strange images, labels, lists and names."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

import fuzz_texts as texts
import numpy as np
from fuzz_case import ACCEPTED, REFUSED, Case, check_kept, contents, run
from PIL import Image

from kdprof.cli.options import label_settings
from kdprof.data.check import check_data
from kdprof.progress import Progress

SIZE = (24, 32)
"""Height and width, pixels."""
CLASSES = ("road", "sky", "car")
SETTINGS = (
    "reduce_zero_label=true", "ignore_index=0", "ignore_index=7", "masks=colours",
    'label_map={"0" = "road", "1" = "sky", "2" = "void"}', 'label_map={"0" = "nosuch"}',
    "label_map={}", "ignore_index=256", "masks=x",
)  # fmt: skip


def data(case: Case) -> str:
    """An image, a label, a list or a name is damaged or strange: used, or refused by name."""
    root = case.folder / "set"
    kind = case.random.choice(("folder", "folder", "voc", "camvid", "cityscapes"))
    KINDS[kind](root)
    for _ in range(case.random.choice((1, 1, 2))):
        _break(case, root)
    before = contents(root)
    given = [case.random.choice(SETTINGS)] if case.random.random() < 0.2 else []
    given = [f"data_settings.{text}" for text in given]
    splits = [case.random.choice(("train", "val", "test", "..", "x"))] * (
        case.random.random() < 0.2
    )
    case.tell(f"{kind}, {given}, {splits}")
    if case.random.random() < 0.1:
        options = [part for text in given for part in ("--set", text)]
        options += [part for split in splits for part in ("--split", split)]
        code = run(case, "data", "check", f"{kind}:{root}", "--sheet", case.folder / "sheet.png",
                   *options).code  # fmt: skip
    else:
        labels, _ = label_settings(None, given)
        found = check_data(f"{kind}:{root}", splits or ("train", "val"), Progress(None), labels)
        code = len(found.problems)
    check_kept(before, root)
    return REFUSED if code else ACCEPTED


# Good data sets of two training images and one for validation


def _pair(random: Random) -> tuple[Image.Image, Image.Image]:
    draw = np.random.default_rng(random.randrange(2**32))
    image = draw.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(image), Image.fromarray(draw.integers(0, 3, SIZE, dtype=np.uint8))


def _write(root: Path, places: list[tuple[str, str]]) -> None:
    for number, (image, label) in enumerate(places):
        for path, made in zip((image, label), _pair(Random(number)), strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            made.save(root / path)


def folder_of_images(root: Path) -> None:
    """Write a data set of the kind ``folder:``."""
    stems = ("train/a", "train/b", "val/c")
    _write(root, [(f"images/{stem}.png", f"masks/{stem}.png") for stem in stems])
    (root / "classes.txt").write_text("\n".join(CLASSES))


def _voc(root: Path) -> None:
    _write(root, [(f"JPEGImages/{s}.jpg", f"SegmentationClass/{s}.png") for s in ("a", "b", "c")])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")


def _camvid(root: Path) -> None:
    stems = ("train", "a"), ("train", "b"), ("val", "c")
    _write(root, [(f"{split}/{s}.png", f"{split}annot/{s}.png") for split, s in stems])


def _cityscapes(root: Path) -> None:
    stems = ("train/x/x_0", "train/x/x_1", "val/y/y_0")
    _write(
        root,
        [
            (f"leftImg8bit/{s}_leftImg8bit.png", f"gtFine/{s}_gtFine_labelTrainIds.png")
            for s in stems
        ],
    )


KINDS = {
    "folder": folder_of_images, "voc": _voc, "camvid": _camvid, "cityscapes": _cityscapes,
}  # fmt: skip


# Damage


def _break(case: Case, root: Path) -> None:
    random = case.random
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if not files:
        return
    path = random.choice(files)
    way = random.choice(
        ("bytes", "bytes", "image", "image", "image", "image", "text", "name", "copy", "remove",
         "special", "list", "list", "chunk"),
    )  # fmt: skip
    case.tell(f"{way} of {path.relative_to(root)}")
    if way == "bytes":
        changed, how = texts.damaged(random, path.read_bytes())
        case.tell(how)
        path.write_bytes(changed)
    elif way == "image":
        name = random.choice(sorted(IMAGES))
        case.tell(name)
        path.write_bytes(IMAGES[name](random))
    elif way == "text":
        path.write_text(texts.hostile(random), "utf-8", "surrogatepass")
    elif way in ("name", "copy"):
        _rename(case, path, copy=way == "copy")
    elif way == "remove":
        path.unlink()
    elif way == "special":
        path.unlink()
        random.choice(
            (lambda: os.mkfifo(path), lambda: path.mkdir(), lambda: path.symlink_to(path.name),
             lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(root),
             lambda: path.write_bytes(b""))
        )()  # fmt: skip
    elif way == "list":
        _change_list(case, root)
    else:
        path.write_bytes(_with_chunk(path.read_bytes(), random))


def _rename(case: Case, path: Path, *, copy: bool) -> None:
    odd = texts.argument(case.random).replace("/", "")[:50]
    name = case.random.choice(
        (f"{odd}{path.suffix}", path.name.upper(), f"{path.stem}{path.suffix.upper()}",
         f"{path.stem}.x{path.suffix}", f".{path.name}", f"{path.stem}.jpg", f"{path.stem}.tif",
         f" {path.name}", f"{path.name} ", f"{path.stem}.png.png")
    )  # fmt: skip
    target = path.with_name(name) if name not in ("", ".", "..") else path
    case.tell(f"to {name!r}")
    if copy and not target.exists():
        target.write_bytes(path.read_bytes())
    elif not copy:
        path.rename(target)


def _change_list(case: Case, root: Path) -> None:
    lists = sorted(path for path in root.rglob("*.txt") if path.is_file())
    path = case.random.choice(lists) if lists else root / "more.txt"
    old = path.read_text("utf-8", "replace") if lists else ""
    line = case.random.choice(
        ("a", "a 1", "b -1", "nosuch", "../a", "/a", "a.jpg", "JPEGImages/a.jpg", "x\t1 2 3",
         "x\t1 2", "x\t1 2 300", "x\t\u00b2 1 1", "void\t0 0 0", " ", "#", "a\x00", "x" * 5000,
         texts.hostile(case.random), "\n".join(f"c{number}" for number in range(300)))
    )  # fmt: skip
    form = case.random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    text = case.random.choice((line, old + line + "\n", line + "\n" + old, old.replace("\n", "\r")))
    case.tell(f"{path.name}: {line[:100]!r} as {form}")
    path.write_bytes(text.encode(form, "replace"))


def _image(mode: str, kind: str = "PNG", size: tuple[int, int] = SIZE, **options: object):
    def made(random: Random) -> bytes:
        draw, file = np.random.default_rng(random.randrange(2**32)), io.BytesIO()
        values = draw.integers(0, 4, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).convert(mode).save(file, kind, **options)
        return file.getvalue()

    return made


def _turned(random: Random) -> bytes:
    exif = Image.Exif()
    exif[0x112] = random.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535))
    kind = random.choice(("PNG", "JPEG"))
    return _image("RGB" if kind == "JPEG" else "L", kind, exif=exif.tobytes())(random)


def _wide(random: Random) -> bytes:
    """Return 16-bit grey."""
    file = io.BytesIO()
    values = np.random.default_rng(random.randrange(2**32)).integers(
        0, 2**16, SIZE, dtype=np.uint16
    )
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def _palette(random: Random) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 4, SIZE, dtype=np.uint8)
    image = Image.fromarray(values).convert("P")
    image.putpalette([random.randrange(256) for _ in range(3 * random.choice((1, 2, 4, 256)))])
    image.save(file, "PNG", **({"transparency": 0} if random.random() < 0.5 else {}))
    return file.getvalue()


def _bomb(random: Random) -> bytes:
    """Return a PNG of a few bytes whose header has gigapixels."""
    size = random.choice(((10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (0, 5)))
    header = struct.pack(">2I5B", *size, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", b"x")
        + _chunk(b"IEND", b"")
    )


IMAGES = {
    **{mode: _image(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    **{f"JPEG {mode}": _image(mode, "JPEG") for mode in ("L", "RGB", "CMYK")},
    **{kind: _image("RGB", kind) for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")},
    **{f"{h}x{w}": _image("L", size=(h, w)) for h, w in ((1, 1), (1, 32), (24, 1), (32, 24))},
    "EXIF": _turned,
    "16 bits": _wide,
    "palette": _palette,
    "bomb": _bomb,
    "interlaced": _image("RGB", interlace=1),
    "progressive": _image("RGB", "JPEG", progressive=True),
    "animated": _image("P", "GIF", save_all=True),
    "nothing": lambda random: b"",
    "text": lambda random: b"<svg onload=alert(1)></svg>",
    "PostScript": lambda random: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\nshowpage\n",
    "zip": lambda random: b"PK\x05\x06" + bytes(18),
}
"""Bytes that stand in place of an image or a label."""


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


def _with_chunk(png: bytes, random: Random) -> bytes:
    """Add a chunk to a PNG: text that becomes huge, metadata that is none."""
    made = random.choice(
        (_chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(2**25))),
         _chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + b'<x tiff:Orientation="9"/>'),
         _chunk(b"eXIf", b"Exif\x00\x00garbage"), _chunk(b"eXIf", random.randbytes(30)),
         _chunk(b"tEXt", b"exif\x00" + random.randbytes(20)), _chunk(b"gAMA", b"\x00"),
         _chunk(b"iCCP", b"x\x00\x00" + random.randbytes(9)), _chunk(b"PLTE", b"\x00" * 7),
         _chunk(b"tRNS", b"\x00" * 300), _chunk(b"abcd", b"x"), b"\x7f\xff\xff\xffIDAT")
    )  # fmt: skip
    place = (
        33 if random.random() < 0.8 else max(0, len(png) - 12)
    )  # behind the header; before the end
    return png[:place] + made + png[place:]
