"""Published schedules as equal compute, by hand."""

import json
from dataclasses import replace
from io import StringIO
from math import exp

import pytest
from cost_records import make_cost, ratio
from processes import kdprof
from rich.console import Console
from small_study import small_study

from kdprof.errors import UserError
from kdprof.method import Method, Recipe
from kdprof.published import classes_of, converted_schedules, published_iterations
from kdprof.reports.published import published_table
from kdprof.store import Store
from kdprof.study import StepSettings, claim_folder

CITY = Recipe(
    "Cityscapes", "Big", "Small", 1000, 4, (64, 128), "SGD", "poly", "a paper", miou=70.0
)  # fmt: skip
SETTINGS = {
    "student": "small",
    "teacher": "big",
    "data": "cityscapes",
    "step": {"batch": 4, "crop": [64, 128]},
}


def method(*recipes: Recipe) -> type[Method]:
    return type("Mine", (Method,), {"recipes": recipes, "taps": ("logits",)})


def cost(name: str, seconds: float, **changes):
    return make_cost(name, seconds, **{"settings": SETTINGS, **changes})


def only(*recipes: Recipe, **costs):
    """Convert a method ``mine`` of 0.4 s, beside kd of 0.1 s unless ``costs`` says otherwise."""
    made = {"mine": cost("mine", 0.4), "kd": cost("kd", 0.1), **costs}
    found = converted_schedules({n: c for n, c in made.items() if c}, {"mine": method(*recipes)})
    return [one for one in found if one.method == "mine"]


def test_a_schedule_of_the_measured_step_by_hand():
    """1000 iterations of 0.4 s take 400 s, in which kd makes 4000; nothing is forecast."""
    (one,) = only(CITY)
    assert (one.seconds, one.device_hours) == (pytest.approx(400), pytest.approx(1 / 9))
    assert (one.kd_iterations, one.kd_iterations_low, one.kd_iterations_high) == (4000,) * 3
    assert (one.scale, one.kd_iterations_measured_step) == (1, 4000)
    assert one.differs == ()
    assert one.reason is None


def test_another_batch_and_crop_by_hand():
    """Twice the images of four times the pixels: eight times the seconds, and as many kd steps of
    that size, which are eight times as many of the measured size."""
    (one,) = only(replace(CITY, batch=8, crop=(128, 256)))
    assert one.scale == 8
    assert one.seconds == pytest.approx(3200)
    assert one.kd_iterations == 4000
    assert one.kd_iterations_measured_step == 32_000
    assert one.differs == ("batch", "crop")


def test_other_networks_and_data_are_said():
    (one,) = only(replace(CITY, dataset="ADE20K", student="Other"))
    assert one.differs == ("networks", "data")
    assert one.networks == ("Big -> Other",)


@pytest.mark.parametrize(
    ("group", "gpus", "differs"),
    [(None, 4, ()), (0, 1, ()), (0, 2, ("coupled images",)), (2, 2, ()), (2, None, ())],
)
def test_other_coupled_images_are_said(group, gpus, differs):
    """Of 4 images in one group, or in groups of 2; published on ``gpus`` devices, or not said."""
    method = {} if group is None else {"images_per_group": group}
    measured = cost("mine", 0.4, settings=SETTINGS | {"method": method})
    (one,) = only(replace(CITY, gpus=gpus), mine=measured)
    assert one.images_per_gpu == (gpus and 4 // gpus)
    assert one.differs == differs


def test_names_of_studies_are_those_of_the_papers():
    """A Cost names networks and data as a study does: layout, stem and all."""
    names = {"student": "pspnet-resnet18c", "teacher": "pspnet-resnet101c", "data": "voc-aug"}
    recipe = replace(CITY, dataset="Pascal VOC", teacher="PSPNet-R101", student="PSPNet-R18")
    (one,) = only(recipe, mine=cost("mine", 0.4, settings=SETTINGS | names))
    assert one.differs == ()
    names = {"student": "cirkd-pspnet-resnet18s-w64", "teacher": "segformer-b4"}
    recipe = replace(CITY, teacher="SegFormer-B4", student="PSPNet-R18")
    (one,) = only(recipe, mine=cost("mine", 0.4, settings=SETTINGS | names))
    assert one.differs == ()


# What a run's schedule spans

LENGTHS = (
    replace(CITY, dataset="ADE20K", iterations=500),
    replace(CITY, iterations=None),
    replace(CITY, iterations=2000, student="Other"),
    replace(CITY, iterations=3000, crop=(8, 8)),
    CITY,
)


def span(*recipes, data="cityscapes", networks="big -> small", **step):
    settings = StepSettings(**{"batch": 4, "crop": (64, 128), **step})
    return published_iterations(method(*recipes), data, networks, settings)


def test_the_published_length_is_that_of_the_studys_data_networks_and_step():
    assert span(*LENGTHS) == 1000
    assert span(*LENGTHS, crop=(8, 8)) == 3000
    assert span(*LENGTHS, networks="big -> other") == 2000
    assert span(*LENGTHS, data="ade20k") == 500
    assert span(*LENGTHS, data="ade20k", batch=16) == 500, "nothing nearer was published"


def test_no_published_length_and_several_are_refused():
    with pytest.raises(UserError, match=r"no iterations of 'mine' were published for CamVid; use"):
        span(*LENGTHS, data="camvid")
    twice = replace(CITY, iterations=80_000)
    with pytest.raises(UserError, match=r"several lengths \(1,000, 80,000\) of 'mine' were"):
        span(CITY, twice)


def test_recipes_of_one_schedule_are_one_row():
    other = replace(CITY, student="Other", source="another paper")
    longer = replace(CITY, iterations=2000)
    first, second = only(CITY, other, longer)
    assert first.networks == ("Big -> Small", "Big -> Other")
    assert first.sources == ("a paper", "another paper")
    assert first.differs == ()
    assert second.seconds == pytest.approx(800)


def test_the_interval_is_the_measurements():
    """3 and 4 % make 5 %."""
    wide = cost("mine", 0.4, ratio=ratio(4.0, 0.03))
    (one,) = only(CITY, mine=wide, kd=cost("kd", 0.1, ratio=ratio(1.0, 0.04)))
    assert one.kd_iterations_low == pytest.approx(4000 * exp(-0.05), abs=1)
    assert one.kd_iterations_high == pytest.approx(4000 * exp(0.05), abs=1)
    assert one.seconds_low == pytest.approx(400 * exp(-0.03), rel=1e-3)
    assert one.seconds_high == pytest.approx(400 * exp(0.03), rel=1e-3)


def test_without_kd_there_are_seconds_only():
    (one,) = only(CITY, kd=None)
    assert one.seconds == pytest.approx(400)
    assert one.kd_iterations is one.kd_iterations_measured_step is None


def test_unreliable_costs_are_named():
    (one,) = only(CITY, kd=cost("kd", 0.1, reliable=False))
    assert one.unreliable == ("kd",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iterations": None}, "iterations not published"),
        ({"batch": None, "crop": None}, "batch, crop not published"),
        ({"iterations": None, "epochs": 60}, "60 epochs; iterations not published"),
    ],
)
def test_what_is_not_published_is_listed_with_the_reason(changes, reason):
    (one,) = only(replace(CITY, **changes))
    assert one.reason == reason
    assert one.seconds is one.kd_iterations is None


def test_a_method_without_recipes_or_class_is_listed():
    found = converted_schedules(
        {"mine": cost("mine", 0.4), "gone": cost("gone", 0.4)}, {"mine": method()}
    )
    assert [one.reason for one in found] == [
        "no published recipe is known",
        "its class was not found",
    ]


def test_a_cost_that_does_not_say_its_step_is_not_converted():
    (one,) = only(CITY, mine=make_cost("mine", 0.4))
    assert "does not state" in one.reason


def test_one_data_set_and_its_scenarios():
    costs = {"mine": cost("mine", 0.4)}
    sets = ("Pascal VOC", "Pascal VOC 15-1", "Pascal Context")
    classes = {"mine": method(*(replace(CITY, dataset=name) for name in sets))}
    found = converted_schedules(costs, classes, "pascal voc")
    assert [one.dataset for one in found] == list(sets[:2])
    with pytest.raises(UserError, match=r"unknown data set 'Pascal VOX'; did you mean 'Pascal VOC"):
        converted_schedules(costs, classes, "Pascal VOX")


def test_classes_of_files_and_of_files_that_are_gone(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from kdprof.method import Method\nclass Own(Method):\n    taps = ('logits',)\n"
    )
    found = classes_of(["own", "kd", "lost"], ["kd", f"{file}:Own", f"{tmp_path}/lost.py:Lost"])
    assert sorted(found) == ["kd", "own"]


def shown(found, costs) -> str:
    console = Console(file=StringIO(), width=80)
    published_table(found, costs, console)
    return console.file.getvalue()


def test_the_table_says_what_is_a_forecast():
    text = shown(only(CITY, replace(CITY, batch=8, student="Other")), [cost("mine", 0.4)])
    assert "1k x 8 x 64x128" in text
    assert "~13.3 min" in text
    assert "6.67 min" in text
    assert "~6.67 min" not in text
    assert "~ Forecast, not measured: the step at 4 x 64x128 times 2.00, as if" in text
    assert "far from" not in text
    assert "UNRELIABLE" not in text
    plain = shown(only(CITY), [cost("mine", 0.4)])
    assert "Forecast" not in plain


def test_a_forecast_from_afar_says_so():
    text = shown(only(CITY, replace(CITY, batch=64)), [cost("mine", 0.4)])
    assert "times 16.0, as if" in text
    assert "far from" in text


def test_the_table_marks_unreliable_costs_and_lists_the_rest():
    found = only(CITY, replace(CITY, batch=None), kd=cost("kd", 0.1, reliable=False))
    text = shown(found, [cost("mine", 0.4)])
    assert "mine†" in text
    assert "UNRELIABLE Cost (kd)" in text
    assert "  mine, Cityscapes: batch not published" in text


@pytest.fixture
def measured(tmp_path):
    """A folder with Costs of kd and bpkd, measured at batch 2 and 32 x 48."""
    store, study = Store(tmp_path / "out"), small_study(methods=["kd", "bpkd"])
    claim_folder(store.study, study)
    step = {"step": study.step.model_dump(mode="json")}
    for name, seconds in (("none", 0.1), ("kd", 0.2), ("bpkd", 0.3)):
        store.write_cost(make_cost(name, seconds, settings={**SETTINGS, **step}))
    return store


def test_the_command_converts_what_the_papers_published(measured):
    """bpkd on ADE20K: 80k iterations at 0.3 s are those of 120k of kd at 0.2 s."""
    arguments = ("convert", "--published", "--dataset", "ade20k", "--out", measured.root)
    done = kdprof(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    (bpkd,) = [one for one in json.loads(done.stdout) if one["method"] == "bpkd"]
    assert (bpkd["iterations"], bpkd["batch"], bpkd["crop"]) == (80_000, 16, [512, 512])
    assert bpkd["kd_iterations"] == 120_000
    scale = 16 * 512 * 512 / (2 * 32 * 48)
    assert bpkd["seconds"] == pytest.approx(80_000 * 0.3 * scale)
    done = kdprof(*arguments)
    assert done.returncode == 0, done.stderr
    assert "80k x 16 x 512x512" in done.stdout
    assert "120,000" in done.stdout


def test_the_command_takes_every_data_set(measured):
    done = kdprof("convert", "--published", "--out", measured.root)
    assert done.returncode == 0, done.stderr
    for dataset in ("Cityscapes", "ADE20K", "Pascal VOC", "CamVid", "COCO-Stuff"):
        assert f"{dataset}: published schedules" in done.stdout
    assert "bpkd, Pascal Context: batch, crop not published" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--published"], "holds no study"),
        (["--published", "40k"], "either a budget"),
        ([], "either a budget"),
        (["40k", "--dataset", "ADE20K"], "add --published"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, tmp_path):
    done = kdprof("convert", *arguments, "--out", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
