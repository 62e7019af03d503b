import tomllib
from pathlib import Path

import pytest

from kdprof.errors import UserError
from kdprof.study import Study, claim_folder, load_study, parse_assignments, presets

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
