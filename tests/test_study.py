import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdprof.errors import UserError
from kdprof.study import Section, Study, claim_folder, load_study, parse_assignments, presets

REFERENCES = sorted((Path(__file__).parents[1] / "reports" / "reference").glob("*/study.toml"))


def problems(overrides):
    with pytest.raises(UserError) as error:
        load_study(None, overrides)
    return error.value.problems


@pytest.mark.parametrize("preset", presets())
def test_presets_load_and_survive_a_round_trip(preset, tmp_path):
    study = load_study(preset, {})
    file = tmp_path / "study.toml"
    file.write_text(study.to_toml())
    assert load_study(str(file), {}) == study


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.parent.name)
def test_a_reference_study_can_be_run_again(path):
    assert load_study(str(path), {}).budgets


def test_unknown_key_names_the_nearest():
    assert problems({"step.bach": 4}) == ("study: unknown key 'step.bach'; did you mean 'batch'?",)
    assert "did you mean 'student'" in problems({"studnt": "x"})[0]


def test_all_problems_at_once():
    found = problems(
        {
            "step.batch": 0,
            "step.crop": "big",
            "budgets": ["40k", "40q"],
            "seeds": "three",
            "data_settings.scale": [2.0, 0.5],
            "colour": "red",
        }
    )
    assert len(found) == 6
    assert not [line for line in found if "\n" in line]


def test_crop_reads_as_on_the_command_line_and_as_a_list():
    assert load_study(None, {"step.crop": "96x128"}).step.crop == (96, 128)
    assert load_study(None, {"step.crop": [96, 128]}).step.crop == (96, 128)


def test_assignments_are_toml_values_or_plain_words():
    assert parse_assignments(["a=1", "b.c=0.5", "d=[1, 2]", "e=pspnet-r18", "f=true"]) == {
        "a": 1,
        "b.c": 0.5,
        "d": [1, 2],
        "e": "pspnet-r18",
        "f": True,
    }
    with pytest.raises(UserError, match="write key=value"):
        parse_assignments(["step.batch"])


def test_value_where_a_section_is_expected():
    with pytest.raises(UserError, match="'seeds' is a value"):
        load_study(None, {"seeds": 1, "seeds.x": 2})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_preset_gives_no_backbone_weights_to_a_users_network(role, tmp_path):
    key, other = f"{role}_backbone_weights", {"student": "teacher", "teacher": "student"}[role]
    own, said = {role: "a/mine.py:build"}, []
    study = load_study("camvid-pspnet-r18", own, say=said.append)
    assert getattr(study, key) == "none"
    assert getattr(study, f"{other}_backbone_weights") == "imagenet"
    assert said == [
        f"{key}: none instead of the preset's imagenet; a/mine.py:build loads its weights itself"
    ]
    said.clear()
    for weights in ("imagenet", "none"):
        study = load_study("camvid-pspnet-r18", {**own, key: weights}, say=said.append)
        assert getattr(study, key) == weights
    file = tmp_path / "s.toml"
    file.write_text(f'{key} = "imagenet"')
    assert getattr(load_study(str(file), own, say=said.append), key) == "imagenet"
    load_study("quickstart", own, say=said.append)
    load_study("camvid-pspnet-r18", {role: "pspnet-r50"}, say=said.append)
    assert said == []


def test_missing_file_unknown_preset_and_malformed_toml(tmp_path):
    with pytest.raises(UserError, match="did you mean 'camvid'"):
        load_study("canvid", {})
    with pytest.raises(UserError, match="does not exist"):
        load_study(str(tmp_path / "mine.toml"), {})
    broken = tmp_path / "broken.toml"
    broken.write_text("student = \n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_study(str(broken), {})


def test_folder_collects_methods_and_budgets_but_no_other_study(tmp_path):
    file = tmp_path / "out" / "study.toml"
    claim_folder(file, Study(methods=["kd"], budgets=["1h"], seeds=1))
    claim_folder(file, Study(methods=["cwd"], budgets=["2h"], seeds=3, device="cpu"))
    joined = load_study(str(file), {})
    assert joined.methods == ["kd", "cwd"]
    assert joined.budgets == ["1h", "2h"]
    assert tomllib.loads(file.read_text())["seeds"] == 3
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"another study \(student is 'pspnet-r18' there"):
        claim_folder(file, Study(student="deeplabv3-r18"))
    assert file.read_bytes() == before


TEXTS = st.text(max_size=20)
VALUES = st.one_of(
    st.booleans(), st.integers(), st.floats(), TEXTS, st.none(), st.dates(), st.datetimes(),
    st.binary(max_size=3), st.lists(st.integers(), max_size=2),
    st.dictionaries(TEXTS, st.one_of(st.floats(), st.integers(), TEXTS), max_size=2),
)  # fmt: skip
KEYS = [
    f"{section}.{name}" if section else name
    for section, kind in [
        ("", Study), *((n, f.annotation) for n, f in Study.model_fields.items()
        if isinstance(f.annotation, type) and issubclass(f.annotation, Section)),
    ]
    for name in kind.model_fields
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    st.dictionaries(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=2), max_size=2),
)
@example({"student": b"\x00"}, {})
def test_what_a_study_writes_it_reads_back_equal(changes, method_settings):
    """Any value is refused in a line that names it, or is in the study that is written."""
    try:
        study = load_study(None, {"method_settings": method_settings, **changes})
    except UserError:
        return
    assert Study.model_validate(tomllib.loads(study.to_toml())) == study


@pytest.mark.parametrize(
    ("value", "cause"),
    [("inf", "must be finite"), ("nan", "must be finite"), ("2020-01-01", "date or time"),
     ("[1, 2]", "a number, a text"), ("\\x1b", None)],
)  # fmt: skip
def test_a_setting_that_a_study_cannot_keep_is_refused(tmp_path, value, cause):
    set_ = parse_assignments([f"method_settings.kd.temperature={value}"])
    if cause is None:
        assert load_study(None, set_).method_settings["kd"]["temperature"] == value
        return
    with pytest.raises(
        UserError, match=rf"method_settings.kd.temperature .*{cause}|kd.temp.*{cause}"
    ):
        load_study(None, set_)


@pytest.mark.parametrize("hidden", ["4\nseeds = 3", "4\r\n[teacher_training]\niterations = 1"])
def test_no_key_of_a_text_is_lost(hidden):
    """A text of several lines would set its first line alone."""
    with pytest.raises(UserError, match=r"step\.batch must be .* without control characters"):
        load_study(None, parse_assignments([f"step.batch={hidden}"]))


@pytest.mark.parametrize("key", ["a\udcff", "step.a\x1b", "method_settings.kd.\u202e"])
def test_a_key_with_control_characters_is_refused(key):
    with pytest.raises(UserError, match="has control characters"):
        load_study(None, {key: 1})
    with pytest.raises(UserError, match="has control characters"):
        load_study(None, {key: {}})


@pytest.mark.parametrize("key", ["a" + ".a" * 3000, "step" + ".batch" * 11])
def test_a_key_in_too_many_sections_is_refused(key):
    with pytest.raises(UserError, match=r"\.\.\.' has [\d,]+ parts"):
        load_study(None, parse_assignments([f"{key}=1"]))


def test_a_number_of_thousands_of_digits_is_a_text():
    assert parse_assignments(["seeds=" + "9" * 5000]) == {"seeds": "9" * 5000}


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"data = \xff", "not UTF-8"), (b"data = ", "not valid TOML"), (b"a=" + b"[" * 9999, "TOML"),
     (b"seeds = " + b"9" * 5000, "not valid TOML"), (b"seeds = 1e999", "no finite number"),
     (b"[step]\nlearning_rate = -inf", "-inf is no finite number"),
     (b"a" + b".a" * 9999 + b" = 1", "more than 50 parts"),
     (b"data = 'x'\n[ a" + b" . a" * 60 + b"]", "more than 50 parts")],
)  # fmt: skip
def test_a_damaged_study_is_one_line(tmp_path, content, cause):
    file = tmp_path / "study.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=cause) as refused:
        load_study(str(file), {})
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UserError, match="not a file"):
        load_study(str(tmp_path), {})
