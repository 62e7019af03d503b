"""CamVid: what is read, and every kind of file that cannot be."""

import numpy as np
import pytest
import torch
from data_cases import image_of_noise, indices, noise, png
from PIL import Image

from kdprof.data import Augmentation, Batches
from kdprof.data.camvid import CLASSES, CamVid
from kdprof.data.decoded import Decoded
from kdprof.data.synthetic import SyntheticScenes
from kdprof.errors import UserError
from kdprof.progress import Progress


def problems(root, split="train", read=False):
    """Return what opening, or reading too, complains about; each in one line."""
    use = (lambda data: Decoded(data, Progress(None))) if read else len
    with pytest.raises(UserError) as caught:
        use(CamVid(root, split))
    assert all("\n" not in p and "Traceback" not in p for p in caught.value.problems)
    return caught.value.problems


def test_labels_and_sizes_need_no_image(camvid):
    scenes = SyntheticScenes("val", (20, 28), 3)
    for data in (CamVid(camvid, "train"), scenes):
        for index in range(3):
            assert torch.equal(data.label(index), data[index][1])
            assert data.size(index) == tuple(data.label(index).shape)
    data = CamVid(camvid, "train")
    for path, _ in data.pairs:
        path.write_bytes(path.read_bytes()[:60])  # the header is left
    assert data.size(1) == tuple(data.label(1).shape) == (12, 16)


def test_good_tree(camvid):
    data = CamVid(camvid, "train")
    assert [image.stem for image, _ in data.pairs] == ["a", "b", "c"]
    image, label = data[0]
    assert torch.equal(image, noise(12, 16)[0])
    wanted = torch.from_numpy(indices())
    assert torch.equal(label, wanted.masked_fill(wanted == 11, 255))
    assert (label == 255).any()
    assert data.num_classes == len(data.class_names) == len(data.palette) == 11


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_images_of_other_kinds_become_rgb(camvid, mode):
    png(camvid / "train/a.png", image_of_noise(), mode)
    image, _ = CamVid(camvid, "train")[0]
    assert image.shape == (3, 12, 16)
    if mode == "RGBA":
        assert torch.equal(image, noise(12, 16)[0])
    if mode.startswith("L"):
        assert torch.equal(image[0], image[1])
    assert 100 < image.float().mean() < 160


def test_jpeg_and_capital_suffixes(camvid):
    (camvid / "train/a.png").unlink()
    Image.fromarray(image_of_noise()).save(camvid / "train/a.JPG", "JPEG")
    (camvid / "train/Thumbs.db").write_bytes(b"not an image, and nobody's business")
    assert len(CamVid(camvid, "train")) == 3
    assert CamVid(camvid, "train")[0][0].shape == (3, 12, 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_palette_labels_are_read_as_indices(camvid, bits):
    labels = Image.fromarray(indices())
    labels.putpalette([value for colour in CLASSES.palette for value in colour] + [0, 0, 0])
    labels.save(camvid / "trainannot/b.png", bits=bits)
    data = CamVid(camvid, "train")
    assert torch.equal(data[0][1], data[1][1])


def test_label_without_image_and_image_without_label(camvid):
    (camvid / "train/a.png").unlink()
    (camvid / "trainannot/b.png").unlink()
    first, second = problems(camvid)
    assert "b.png has no label" in first
    assert "a.png has no image" in second


def test_pair_of_two_sizes(camvid):
    png(camvid / "trainannot/b.png", indices(10, 16))
    (problem,) = problems(camvid)
    assert "12x16" in problem
    assert "10x16" in problem


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_labels_that_are_no_indices(camvid, mode):
    values = indices().astype(np.uint16) if mode == "I;16" else indices()
    png(camvid / "trainannot/b.png", values, None if mode == "I;16" else mode)
    (problem,) = problems(camvid)
    assert f"b.png is {mode}, not 8-bit class indices" in problem


def test_deep_images_are_refused_not_cut_to_white(camvid):
    deep = np.linspace(0, 65535, 12 * 16).reshape(12, 16).astype(np.uint16)
    png(camvid / "train/b.png", deep)
    (problem,) = problems(camvid)
    assert "b.png is I;16, not 8 bits" in problem


@pytest.mark.parametrize("value", [12, 255])
def test_label_value_out_of_range(camvid, value):
    labels = indices()
    labels[3, 4] = value
    png(camvid / "trainannot/b.png", labels)
    (problem,) = problems(camvid, read=True)
    assert f"label value {value} in" in problem
    assert "b.png" in problem


@pytest.mark.parametrize("name", ["train/b.png", "trainannot/b.png", "train/b.jpg"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.3, 0.7])
def test_truncated_file(camvid, name, keep):
    path = camvid / name
    if path.suffix == ".jpg":
        path.with_suffix(".png").unlink()
        Image.fromarray(image_of_noise()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    (problem,) = problems(camvid, read=True)
    assert f"{path} cannot be read" in problem


def test_damaged_and_foreign_content(camvid):
    path = camvid / "train/a.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    (camvid / "train/b.png").write_text("<html>404</html>")
    (problem,) = problems(camvid)
    assert "b.png cannot be read" in problem
    png(camvid / "train/b.png", image_of_noise())
    (problem,) = problems(camvid, read=True)
    assert "a.png cannot be read" in problem


def test_truncated_file_in_a_loader_process(camvid):
    path = camvid / "train/b.png"
    path.write_bytes(path.read_bytes()[:200])
    batches = Batches(
        CamVid(camvid, "train"), seed=0, batch=2, augmentation=Augmentation((8, 8)), workers=2
    )
    with pytest.raises(UserError) as caught:
        list(batches.iterate(0, 6))
    assert str(caught.value).startswith(f"{path} cannot be read")
    assert "\n" not in str(caught.value)


def test_one_name_twice(camvid):
    Image.fromarray(image_of_noise()).save(camvid / "train/a.jpg")
    (problem,) = problems(camvid)
    assert "a.jpg" in problem
    assert "a.png" in problem


def test_all_problems_at_once(camvid):
    png(camvid / "train/d.png", image_of_noise())
    png(camvid / "trainannot/a.png", image_of_noise())
    (camvid / "train/b.png").write_bytes(b"")
    png(camvid / "trainannot/c.png", indices(6, 6))
    assert len(problems(camvid)) == 4


def test_empty_and_missing_folders(camvid):
    for path in camvid.glob("train/*"):
        path.unlink()
    (camvid / "trainannot").rename(camvid / "trainanot")
    empty, missing = problems(camvid)
    assert "holds no .png" in empty
    assert "did you mean 'trainanot'?" in missing
    assert len(problems(camvid, "val")) == 2


def test_missing_root_suggests_the_nearest(camvid, tmp_path, monkeypatch):
    (problem,) = problems(tmp_path / "camvod")
    assert f"did you mean '{tmp_path / 'camvid'}'?" in problem
    (problem,) = problems(tmp_path / "camvod" / "deeper")
    assert f"did you mean '{tmp_path / 'camvid'}'?" in problem
    (problem,) = problems(tmp_path / "nothing-like-it")
    assert "did you mean" not in problem
    (problem,) = problems(camvid / "train/a.png")
    assert "no folder" in problem


def test_the_real_camvid(repo):
    root = repo.parent / "shared" / "camvid"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    train, val = CamVid(root, "train"), CamVid(root, "val")
    assert (len(train), len(val)) == (367, 101)
    seen = torch.zeros(256, dtype=torch.int64)
    for index in range(0, 360, 60):
        image, label = train[index]
        assert image.shape == (3, 360, 480)
        seen += torch.bincount(label.flatten(), minlength=256)
        assert image.float().std() > 20
    assert set(seen.nonzero().flatten().tolist()) <= {*range(11), 255}
    assert (seen[:11] > 0).sum() >= 10
    assert train.class_names[int(seen[:11].argmax())] in {"sky", "road", "building", "tree"}
    _, label = val[0]
    assert (label[-60:] == train.class_names.index("road")).float().mean() > 0.3
