"""What the base class of a method tells its author, and a study that sets hyper-parameters."""

import math

import pytest
import torch

from kdprof.errors import UserError
from kdprof.method import Method, Taps


class Own(Method):
    """A method of one's own."""

    name: str = "own"
    taps = ("logits",)
    weights = {"mine": 1.0}
    rate: float = 0.5
    count: int = 3
    sharp: bool = False


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sharp": "False"}, "sharp must be bool, not 'False'"),
        ({"sharp": 0}, "sharp must be bool, not 0"),
        ({"count": 2.0}, "count must be int, not 2.0"),
        ({"count": True}, "count must be int, not True"),
        ({"rate": True}, "rate must be float, not True"),
        ({"rate": None}, "rate must be float, not None"),
        ({"rat": 1.0}, "unknown hyper-parameter 'rat'; did you mean 'rate'?"),
        ({"taps": ("head",)}, "unknown hyper-parameter 'taps'"),
        ({"weights": {"mien": 1.0}}, "unknown weight 'mien'; did you mean 'mine'?"),
        ({"weights": {"mine": "2"}}, "the weight of mine must be a number, not '2'"),
        ({"weights": {"mine": True}}, "the weight of mine must be a number, not True"),
        ({"weights": {"mine": math.nan}}, "the weight of mine must be a number, not nan"),
        ({"weights": 2.0}, "weights must be a table of numbers, not 2.0"),
        ({"weights": ["mine"]}, "weights must be a table of numbers"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(setting, message):
    with pytest.raises(UserError) as raised:
        Own(**setting)
    (problem,) = raised.value.problems
    assert problem.startswith(f"method 'own': {message}")


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(UserError) as raised:
        Own(weights={"a": 1.0, "mine": None}, rat=1.0, count="3")
    assert len(raised.value.problems) == 4


def test_an_integer_will_do_for_a_float():
    method = Own(rate=2, weights={"mine": 3})
    assert type(method.rate) is float
    assert method.settings() == {
        "rate": 2.0, "count": 3, "sharp": False, "weights": {"mine": 3}
    }  # fmt: skip


def test_a_setting_changes_one_object_only():
    Own(rate=2.0, weights={"mine": 9.0})
    assert Own().settings() == {
        "rate": 0.5, "count": 3, "sharp": False, "weights": {"mine": 1.0}
    }  # fmt: skip


def test_hyper_parameters_are_inherited_with_the_subclass_default():
    class Child(Own):
        count = 7

    assert Child().settings()["count"] == 7
    assert Child.hyper.keys() == Own.hyper.keys()
    assert Child.name == "child"


def test_the_class_contract_is_not_a_hyper_parameter():
    assert Own.hyper.keys() == {"rate", "count", "sharp"}
    assert Own.name == "own"


@pytest.mark.parametrize("hint", [int | None, tuple[str, ...], list])
def test_a_hyper_parameter_of_a_type_that_no_study_can_set_is_refused(hint):
    with pytest.raises(UserError, match="hyper-parameter 'layers' must be bool, float, int or str"):
        type("Odd", (Method,), {"__annotations__": {"layers": hint}, "layers": None})


@pytest.mark.parametrize("where", ["taps", "teacher_taps"])
def test_an_unknown_tap_is_refused_with_the_class(where):
    with pytest.raises(UserError, match="Bad: unknown tap 'heads'; did you mean 'head'"):
        type("Bad", (Method,), {where: ("logits", "heads")})


def test_reading_an_undeclared_tap_names_it():
    with pytest.raises(AttributeError, match="'head' was read but not declared"):
        _ = Taps(logits=torch.zeros(1)).head


@pytest.mark.parametrize("bad", ["..", "a/b", "a.b", "", "a b", "\x1b[31m", "a\u202e", "x" * 61, 3])
def test_a_name_that_cannot_be_a_folder_or_control_a_terminal_is_refused(bad):
    with pytest.raises(UserError, match="must be letters, digits") as refused:
        type("Mine", (Method,), {"name": bad})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("good", ["cwd", "cwd:feature", "af_dcd", "my-kd+2", "méthode"])
def test_names_of_methods_make_folders_of_their_own(good):
    from kdprof.store import slug

    assert type("Mine", (Method,), {"name": good}).name == good
    assert "/" not in slug(good)
