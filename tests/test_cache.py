"""The cache of decoded images: what it holds, when it is made again, what may go wrong."""

import errno
import io
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_study import small_study

from kdprof.data import Augmentation, Batches, Feeder
from kdprof.data import cache as caching
from kdprof.data.base import Classes
from kdprof.data.cache import Cached, cache_folder, decoded, open_cache
from kdprof.data.camvid import CamVid
from kdprof.data.scenario import Relabelled
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key
from kdprof.store import Lost
from kdprof.study import load_study

SILENT = Progress(None)
SIZES = {"a": (12, 16), "b": (9, 21), "c": (30, 7), "d": (1, 1)}


@pytest.fixture
def root(tmp_path):
    """A CamVid tree whose images differ in size."""
    made, rng = tmp_path / "camvid", np.random.default_rng(0)
    for folder, shape, top in (("train", (3,), 256), ("trainannot", (), 12)):
        (made / folder).mkdir(parents=True)
        for stem, size in SIZES.items():
            values = rng.integers(0, top, (*size, *shape), dtype=np.uint8)
            Image.fromarray(values).save(made / folder / f"{stem}.png")
    return made


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "caches" / "kdprof"


def same(left, right):
    assert len(left) == len(right)
    for index in range(len(left)):
        assert all(torch.equal(a, b) for a, b in zip(left[index], right[index], strict=True))
        assert torch.equal(left.label(index), right.label(index))


def left_behind(folder):
    return sorted(path.suffix for path in folder.glob("*")) if folder.exists() else []


# What it holds


def test_images_of_any_size_and_their_labels(root, folder):
    data = CamVid(root, "train")
    cached = open_cache(data, folder, SILENT)
    same(cached, data)
    assert [tuple(cached[i][0].shape) for i in range(4)] == [(3, *s) for s in SIZES.values()]
    for name in ("name", "split", "num_classes", "class_names", "palette"):
        assert getattr(cached, name) == getattr(data, name)
    assert left_behind(folder) == [".cache", ".lock"]


def test_presence_comes_with_the_cache(root, folder, monkeypatch):
    data = CamVid(root, "train")
    wanted = CamVid(root, "train").labels_shown
    cached = open_cache(data, folder, SILENT)
    monkeypatch.setattr(Cached, "label", None)
    assert np.array_equal(cached.labels_shown, wanted)
    view = Relabelled(cached, torch.arange(256, dtype=torch.uint8), Classes(("a",), ()), [3])
    assert len(view) == wanted[:, 3].sum()


def test_later_processes_decode_nothing(root, folder, monkeypatch):
    data = CamVid(root, "train")
    first = open_cache(data, folder, SILENT)
    monkeypatch.setattr(CamVid, "__getitem__", None)
    monkeypatch.setattr(CamVid, "label", None)
    again = open_cache(data, folder, SILENT)
    assert again.path == first.path
    same(again, first)


@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_cache(root, folder, kind, workers):
    def batches(kind, workers):
        data = decoded(CamVid(root, "train"), kind, str(folder), SILENT)
        made = Batches(data, seed=3, batch=3, augmentation=Augmentation((10, 14)), workers=workers)
        return list(Feeder(made, torch.device("cpu"), 0, 5))

    for got, wanted in zip(batches(kind, workers), batches("none", 0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_pickle_has_no_pixels_in_it(folder):
    data = SyntheticScenes("train", (64, 96), 20)
    cached = open_cache(data, folder, SILENT)
    packed = pickle.dumps(cached)
    assert len(packed) < 20 * 64 * 96
    same(pickle.loads(packed), data)


# Which cache belongs to which data


def test_changed_files_get_another_cache(root, folder):
    def path():
        return open_cache(CamVid(root, "train"), folder, SILENT).path

    paths = {path()}
    image = root / "train/a.png"
    os.utime(image, ns=(0, 0))
    paths.add(path())
    Image.fromarray(np.full((12, 16, 3), 7, np.uint8)).save(image)
    paths.add(path())
    assert (open_cache(CamVid(root, "train"), folder, SILENT)[0][0] == 7).all()
    (root / "trainannot/b.png").unlink()
    (root / "train/b.png").unlink()
    paths.add(path())
    moved = root.rename(root.with_name("elsewhere"))
    paths.add(open_cache(CamVid(moved, "train"), folder, SILENT).path)
    assert len(paths) == 5


def test_every_synthetic_data_set_has_its_own(folder):
    kinds = [("train", (8, 8), 3), ("val", (8, 8), 3), ("train", (8, 9), 3), ("train", (8, 8), 4)]
    assert len({open_cache(SyntheticScenes(*k), folder, SILENT).path for k in kinds}) == 4


def test_where_caches_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "kdprof"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder(None) == tmp_path / "home/.cache/kdprof"
    assert cache_folder("~/here") == tmp_path / "home/here"


@pytest.fixture
def homeless(monkeypatch):
    """An account without a home folder, and no HOME."""

    def getpwuid(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_folder_only_a_cache_on_disk_is_refused(homeless, tmp_path):
    for cache in ("none", "memory"):
        ResolvedStudy(small_study(data_settings__cache=cache)).factory.batches(0).batch(0)
    on_disk = ResolvedStudy(small_study(data_settings__cache="disk"))
    with pytest.raises(UserError, match=r"HOME is not set; set data_settings\.cache_folder"):
        on_disk.factory.batches(0)
    changes = {"data_settings__cache": "disk", "data_settings__cache_folder": str(tmp_path)}
    ResolvedStudy(small_study(**changes)).factory.batches(0).batch(0)
    with pytest.raises(UserError, match=r"home folder of ~.* is not known; write it out"):
        cache_folder("~/here")


# Damage


def damaged(root, folder, change):
    """Damage a cache, and return what is said when it is opened again; it must then be good."""
    data = CamVid(root, "train")
    path = open_cache(data, folder, SILENT).path
    content = path.read_bytes()
    path.write_bytes(change(content))
    told = io.StringIO()
    same(open_cache(data, folder, Progress(Console(file=told, width=1000))), data)
    assert path.read_bytes() == content
    return told.getvalue().splitlines()


@pytest.mark.parametrize("kept", [0, 1, 19, 20, 100, 0.5, -1])
def test_a_truncated_cache_is_made_again(root, folder, kept):
    def cut(content):
        return content[: int(kept * len(content)) if kept == 0.5 else kept]

    (line,) = damaged(root, folder, cut)
    assert line.endswith("; making it again")
    assert str(folder) in line


def test_a_grown_cache_is_made_again(root, folder):
    assert len(damaged(root, folder, lambda content: content + b"\0")) == 1


def test_any_flipped_bit_is_found(root, folder):
    path = open_cache(CamVid(root, "train"), folder, SILENT).path
    content = path.read_bytes()
    places = {*range(0, 240), *range(240, len(content), 37), len(content) - 1}
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(caching.Damaged):
            Cached(CamVid(root, "train"), path)
    assert len(damaged(root, folder, lambda content: bytes(broken))) == 1


# Writing fails


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(root, folder, **match):
    with pytest.raises(UserError, **match) as caught:
        open_cache(CamVid(root, "train"), folder, SILENT)
    (problem,) = caught.value.problems
    assert "data_settings.cache_folder" in problem
    assert "\n" not in problem
    assert ".part" not in left_behind(folder)
    assert ".cache" not in left_behind(folder)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_written(root, folder, monkeypatch):
    system = SimpleNamespace(f_bavail=2, f_frsize=1024)
    with monkeypatch.context() as changed:
        changed.setattr(os, "statvfs", lambda path: system)
        changed.setattr(os, "pwrite", None)
        refused(root, folder, match=r"needs 0\.0 GiB, 0\.0 GiB are free; make room")
    same(open_cache(CamVid(root, "train"), folder, SILENT), CamVid(root, "train"))


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_that_fills_while_writing(root, folder, monkeypatch, call):
    with monkeypatch.context() as changed:
        changed.setattr(os, call, full)
        refused(root, folder, match="cannot be written: No space left on device")
    same(open_cache(CamVid(root, "train"), folder, SILENT), CamVid(root, "train"))


def test_writes_that_stop_short_are_continued(root, folder, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:11], at))
    same(open_cache(CamVid(root, "train"), folder, SILENT), CamVid(root, "train"))


def test_what_a_killed_process_left_is_in_nobodys_way(root, folder):
    data = CamVid(root, "train")
    path = open_cache(data, folder, SILENT).path
    path.rename(path.with_suffix(".part"))
    same(open_cache(data, folder, SILENT), data)
    assert left_behind(folder) == [".cache", ".lock"]


def test_the_file_of_a_process_that_has_taken_the_lease_stays(root, folder, monkeypatch):
    """This machine slept while it made the cache, for longer than its lease."""
    monkeypatch.setattr(caching, "LEASE_S", -1.0)  # renewed at every image

    def taken(lock):
        (part,) = folder.rglob("*.part")
        part.write_text("the other's")
        raise Lost("the cache is being made on elsewhere (process 7); wait for it")

    monkeypatch.setattr(caching.Lock, "renew", taken)
    with pytest.raises(Lost):
        open_cache(CamVid(root, "train"), folder, SILENT)
    (part,) = folder.rglob("*.part")
    assert part.read_text() == "the other's"


def test_folder_that_cannot_be(root, tmp_path):
    (tmp_path / "file").touch()
    refused(root, tmp_path / "file" / "kdprof", match="Not a directory")


def test_a_cache_that_may_not_be_read(root, folder, monkeypatch):
    open_cache(CamVid(root, "train"), folder, SILENT)

    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(caching, "_mapped", forbidden)
    with pytest.raises(UserError, match="cannot be read: Permission denied; set data_settings"):
        open_cache(CamVid(root, "train"), folder, SILENT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(root, folder):
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    refused(root, folder, match="Permission denied")


def test_a_cache_that_is_there_needs_no_writing(root, folder, monkeypatch):
    def read_only(path, progress):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as changed:
        changed.setattr(caching, "_lock", read_only)
        refused(root, folder, match="Permission denied")
    open_cache(CamVid(root, "train"), folder, SILENT)
    monkeypatch.setattr(caching, "_lock", read_only)
    same(open_cache(CamVid(root, "train"), folder, SILENT), CamVid(root, "train"))


def test_unusable_files_are_all_named_and_nothing_is_left(root, folder):
    data = CamVid(root, "train")
    for stem in ("a", "c"):
        path = root / f"train/{stem}.png"
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError) as caught:
        open_cache(data, folder, SILENT)
    first, second = caught.value.problems
    assert "a.png cannot be read" in first
    assert "c.png cannot be read" in second
    assert left_behind(folder) == [".lock"]


# Several processes

BUILDER = """
import sys, time
from pathlib import Path
from kdprof.data import cache
from kdprof.data.synthetic import SyntheticScenes
from kdprof.progress import Progress
from rich.console import Console

folder, go = map(Path, sys.argv[1:3])
if sys.argv[3] == "no locks":
    import errno
    from kdprof import store

    def refuse(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    store.fcntl.flock = refuse

class Slow(SyntheticScenes):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)

cache.inspect.getfile = lambda kind: cache.__file__  # this class has no file
make = cache._make

def told(*arguments):
    print("makes")
    make(*arguments)

cache._make = told
data = Slow("train", (16, 24), 20)
print("ready", flush=True)
while not go.exists():
    time.sleep(0.01)
found = cache.open_cache(data, folder, Progress(Console(width=1000)))
assert all((found[i][0] == data[i][0]).all() for i in range(20))
print("same")
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_two_processes_at_once_make_one_cache(tmp_path, folder, locks):
    go = tmp_path / "go"
    command = [sys.executable, "-c", BUILDER, str(folder), str(go), locks]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    go.touch()
    told = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    made, waited = sorted(told, key=lambda lines: "makes" not in lines)
    assert made == ["makes", "same"]
    assert waited[0].startswith("waiting for another process")
    assert waited[1:] == ["same"]
    assert left_behind(folder) == [".cache", ".lock"]


# In a study


def test_a_study_reads_its_images_from_the_cache(tmp_path, monkeypatch):
    plain = ResolvedStudy(small_study())
    changes = {"data_settings__cache": "disk", "data_settings__cache_folder": str(tmp_path)}
    cached = ResolvedStudy(small_study(**changes))
    wanted = plain.factory.batches(1).batch(4)
    assert not list(tmp_path.iterdir())  # nothing is made before it is needed
    got = cached.factory.batches(1).batch(4)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    same(cached.data.val("student"), plain.data.val("student"))
    assert len(list(tmp_path.glob("synthetic-*.cache"))) == 2
    monkeypatch.setattr(SyntheticScenes, "__getitem__", None)
    again = ResolvedStudy(small_study(**changes)).factory.batches(0, "teacher").batch(2)
    assert again[0].shape == got[0].shape


def test_where_the_cache_lies_changes_no_result():
    here = small_study(data_settings__cache="disk", data_settings__cache_folder="/here")
    there = small_study(data_settings__cache="disk", data_settings__cache_folder="/there")
    assert here.comparable() == there.comparable()
    assert cost_key(ResolvedStudy(here), "none") == cost_key(ResolvedStudy(there), "none")
    assert cost_key(ResolvedStudy(here), "none") != cost_key(ResolvedStudy(small_study()), "none")


def test_the_old_name_of_the_setting_is_refused():
    with pytest.raises(UserError) as caught:
        load_study(None, {"data_settings.in_memory": True})
    (problem,) = caught.value.problems
    assert problem == (
        "study: the key 'data_settings.in_memory' no longer exists; "
        'set data_settings.cache to "none", "memory" or "disk"'
    )
