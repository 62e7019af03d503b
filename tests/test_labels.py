"""What label files mean: values, a map of them, colours, one class, and a value of void."""

import tomllib

import numpy as np
import pytest
from PIL import Image
from processes import kdprof
from test_layouts import SIZE, ade20k, label, save

from kdprof.data import decoded, open_data
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.study import DataSettings, load_study, parse_assignments


def made(root, mask, classes="background\nobject\n"):
    """A ``folder:`` with this mask in both splits."""
    for number, split in enumerate(("train", "val")):
        save(root / f"images/{split}/{number}.png")
        (root / f"masks/{split}").mkdir(parents=True)
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(root / f"masks/{split}/{number}.png")
    (root / "classes.txt").write_text(classes)
    return root


def opened(root, name="folder", **settings):
    given = DataSettings.model_validate(settings)
    return open_data(
        f"{name}:{root}", "train", synthetic_size=(8, 8), synthetic_count=1, labels=given
    )


def read(root, name="folder", **settings):
    return opened(root, name, **settings)[0][1].flatten().tolist()


def refusal(root, name="folder", **settings):
    with pytest.raises(UserError) as caught:
        read(root, name, **settings)
    return "\n".join(caught.value.problems)


ONE_CLASS = {"0": "background", "255": "object"}


def test_masks_of_0_and_255_with_a_map(tmp_path):
    made(tmp_path, label(0, 255, 0))
    assert read(tmp_path, label_map=ONE_CLASS)[:3] == [0, 1, 0]
    assert read(tmp_path)[:3] == [0, 255, 0]


def test_black_and_white_masks(tmp_path):
    made(tmp_path, Image.fromarray(label(0, 255, 0)).convert("1"))
    assert read(tmp_path, label_map=ONE_CLASS)[:3] == [0, 1, 0]
    assert "is 1, not 8-bit class indices; say what 0 and 255 are" in refusal(tmp_path)


def test_a_map_names_every_value_and_others_are_refused(tmp_path):
    made(tmp_path, label(7, 8, 9, 255))
    names = {7: "object", 8: "background", 9: "void"}
    assert read(tmp_path, label_map=names)[:4] == [1, 0, 255, 255]
    del names[9]
    told = refusal(tmp_path, label_map=names)
    assert "label value 9 in" in told
    assert "data_settings.label_map and the void one: 7, 8, 255" in told


def test_a_map_to_a_class_that_is_not_there(tmp_path):
    made(tmp_path, label(0, 1))
    told = refusal(tmp_path, label_map={0: "back", 1: "objects"})
    assert "label_map: 0 is unknown class 'back'; did you mean 'background'?" in told
    assert "label_map: 1 is unknown class 'objects'; did you mean 'object'?" in told


def test_labels_that_begin_with_one(tmp_path):
    made(tmp_path, label(0, 1, 2, 255))
    assert read(tmp_path, reduce_zero_label=True)[:4] == [255, 0, 1, 255]
    assert "not both" in refusal(tmp_path, reduce_zero_label=True, label_map=ONE_CLASS)


def test_another_value_of_void(tmp_path):
    made(tmp_path, label(0, 1, 200))
    assert read(tmp_path, ignore_index=200)[:3] == [0, 1, 255]
    made(tmp_path / "usual", label(0, 255))
    assert "label value 255 in" in refusal(tmp_path / "usual", ignore_index=200)
    assert "is the value of class 'object'; leave it out" in refusal(tmp_path, ignore_index=1)
    told = refusal(tmp_path, ignore_index=1, reduce_zero_label=True)
    assert "is the value of class 'background'" in told


COLOURS = "background\t0 0 0\nobject\t200 10 30\nvoid\t255 255 255\nvoid\t9 9 9\n"


def coloured(*colours):
    mask = np.zeros((*SIZE, 3), np.uint8)
    mask[0, : len(colours)] = colours
    return mask


def test_masks_of_colours(tmp_path):
    mask = coloured((200, 10, 30), (0, 0, 0), (255, 255, 255), (9, 9, 9))
    made(tmp_path, mask, COLOURS)
    data = opened(tmp_path, masks="colours")
    assert data.class_names == ("background", "object")
    assert data.palette == ((0, 0, 0), (200, 10, 30))
    assert data[0][1].flatten().tolist()[:5] == [1, 0, 255, 255, 0]
    made(tmp_path / "plain", mask)
    assert 'set data_settings.masks = "colours"' in refusal(tmp_path / "plain")


def test_a_palette_that_shows_the_colours(tmp_path):
    mask = Image.fromarray(coloured((200, 10, 30))).convert("P", palette=Image.Palette.ADAPTIVE)
    assert read(made(tmp_path, mask, COLOURS), masks="colours")[:2] == [1, 0]


def test_a_colour_of_no_class(tmp_path):
    made(tmp_path, coloured((200, 10, 31), (1, 2, 3), (1, 2, 3)), COLOURS)
    told = refusal(tmp_path, masks="colours")
    assert "colour 1 2 3 in" in told
    assert "3 pixels are of 2 colours that are no class's" in told
    assert "or a line 'void' with it" in told


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        ("a\t1 2 3\nb\n", {}, "needs a colour of every class, as R G B after a tab; there is none"),
        ("a\t1 2 3\nb\t1 2 3\n", {}, "1 2 3 is the colour of two classes"),
        ("a\t1 2 3\nvoid\t1 2 3\n", {}, "1 2 3 is the colour of two classes"),
        (COLOURS, {"reduce_zero_label": True}, "reduce_zero_label is for masks of indices"),
        (COLOURS, {"label_map": {0: "object"}}, "label_map is for masks of indices"),
        (COLOURS, {"ignore_index": 0}, "ignore_index is for masks of indices"),
    ],
)
def test_colours_that_mean_nothing(tmp_path, classes, settings, message):
    made(tmp_path, coloured((0, 0, 0)), classes)
    assert message in refusal(tmp_path, masks="colours", **settings)


def test_transparent_colours_are_refused(tmp_path):
    made(tmp_path, Image.fromarray(coloured((0, 0, 0))).convert("RGBA"), COLOURS)
    assert "is RGBA, not RGB; save the colours" in refusal(tmp_path, masks="colours")


def test_published_labels_take_a_map_only(tmp_path):
    ade20k(tmp_path)
    found = opened(tmp_path, "ade20k").class_names
    names = {1: found[5], 150: "void", 0: "void"}
    assert read(tmp_path, "ade20k", label_map=names)[:3] == [5, 255, 255]
    for key, value in (("reduce_zero_label", True), ("ignore_index", 0), ("masks", "colours")):
        told = refusal(tmp_path, "ade20k", **{key: value})
        assert f"data_settings.{key}: the labels of ade20k are known" in told


def test_a_cache_belongs_to_the_meaning_of_the_labels(tmp_path):
    made(tmp_path / "data", label(0, 255, 0))
    for settings, expected in (({}, 255), ({"label_map": ONE_CLASS}, 1), ({}, 255)):
        data = opened(tmp_path / "data", **settings)
        kept = decoded(data, "disk", tmp_path / "cache", Progress(None))
        assert kept[0][1].flatten()[1] == expected


def test_a_study_reads_back_what_it_writes(tmp_path):
    texts = ['data_settings.label_map={0="background", 255="object"}', "step.batch=2"]
    study = load_study(None, parse_assignments(texts))
    assert study.data_settings.label_map == {0: "background", 255: "object"}
    (tmp_path / "study.toml").write_text(study.to_toml())
    assert tomllib.loads(study.to_toml())["data_settings"]["label_map"] == ONE_CLASS
    assert load_study(str(tmp_path / "study.toml"), {}) == study
    dotted = load_study(None, parse_assignments(["data_settings.label_map.255=object"]))
    assert dotted.data_settings.label_map == {255: "object"}


@pytest.mark.parametrize("value", [-1, 256])
def test_values_that_no_label_file_can_have(value):
    with pytest.raises(UserError, match="ignore_index"):
        load_study(None, {"data_settings.ignore_index": value})
    with pytest.raises(UserError, match="label_map"):
        load_study(None, {"data_settings.label_map": {str(value): "a"}})


def test_the_check_reads_labels_as_the_study_does(tmp_path):
    made(tmp_path / "data", label(0, 255, 0))
    spec = f"folder:{tmp_path / 'data'}"
    given = 'data_settings.label_map={0="background", 255="object"}'
    done = kdprof("data", "check", spec, "--set", given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no validation image shows" not in done.stdout
    wrong = kdprof("data", "check", spec, "--set", "data_settings.label_mop=1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'data_settings.label_map'?" in wrong.stderr
