"""The class-incremental scenario: what each network sees, learns and is scored on."""

import pytest
import torch
from processes import kdprof
from small_study import SMALL, small_study, train_small

from kdprof.data.base import Classes, SegmentationData
from kdprof.data.scenario import Scenario
from kdprof.errors import UserError
from kdprof.evaluate import evaluate
from kdprof.method import IGNORE, Method
from kdprof.models import build
from kdprof.resolve import ResolvedStudy
from kdprof.step import TrainStep
from kdprof.store import Store
from kdprof.study import ScenarioSettings, StepSettings, load_study

NAMES = ("sky", "road", "car", "bus")


class GivenLabels(SegmentationData):
    """A data set of given labels; image i is filled with i."""

    def __init__(self, *labels):
        palette = ((0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 4))
        super().__init__("given", "train", Classes(NAMES, palette))
        self.labels = [torch.tensor([row], dtype=torch.uint8) for row in labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        label = self.labels[index]
        return torch.full((3, *label.shape), index, dtype=torch.uint8), label

    def label(self, index):
        return self.labels[index]


SCENES = GivenLabels([0, 1, IGNORE], [1, 1, 2], [2, 0, 3], [0, 0, 0])


def scenario(**settings) -> Scenario:
    return Scenario.of(ScenarioSettings(**settings), NAMES)


def seen(view):
    """Return {image: label row} of a view."""
    return {int(image[0, 0, 0]): label[0].tolist() for image, label in (view[i] for i in range(len(view)))}  # fmt: skip  # noqa: E501


def test_classes_are_background_then_old_then_new():
    found = scenario(new=["car"], old=["road"], background="sky")
    assert found.classes == ("sky", "road", "car")
    assert found.shared == ("sky", "road")
    assert found.old == ("road",)
    assert found.groups() == {"old": ("sky", "road"), "new": ("car",)}
    added = scenario(new=["car", "sky"])
    assert added.classes == ("background", "road", "bus", "car", "sky")
    none = scenario(new=["car"], background="none")
    assert none.classes == ("sky", "road", "bus", "car")
    assert not none.background


def test_overlapped_labels_hold_the_classes_of_the_step_alone():
    found = scenario(new=["car"], old=["sky", "road"])  # bus is known to nobody
    teacher = found.view(SCENES, "teacher", training=True)
    assert seen(teacher) == {0: [1, 2, 255], 1: [2, 2, 0], 2: [0, 1, 0], 3: [1, 1, 1]}
    student = found.view(SCENES, "student", training=True)
    assert seen(student) == {1: [0, 0, 3], 2: [3, 0, 0]}
    assert student.class_names == ("background", "sky", "road", "car")
    assert student.palette == ((128, 128, 128), (0, 0, 1), (0, 0, 2), (0, 0, 3))


def test_disjoint_images_show_no_class_still_to_come():
    found = scenario(new=["car"], old=["sky", "road"], setting="disjoint")
    assert set(seen(found.view(SCENES, "teacher", training=True))) == {0, 3}
    assert seen(found.view(SCENES, "student", training=True)) == {1: [0, 0, 3]}


def test_sequential_labels_hold_the_old_classes_too():
    found = scenario(new=["car"], old=["sky", "road"], setting="sequential")
    assert seen(found.view(SCENES, "student", training=True)) == {1: [2, 2, 3]}


def test_without_background_other_pixels_are_void():
    found = scenario(new=["car"], old=["sky", "road"], background="none")
    assert seen(found.view(SCENES, "student", training=True)) == {1: [255, 255, 2], 2: [2, 255, 255]}  # fmt: skip  # noqa: E501


def test_a_background_of_the_data_set_stays_class_0():
    found = scenario(new=["car"], old=["road"], background="sky")
    assert seen(found.view(SCENES, "student", training=True)) == {1: [0, 0, 2], 2: [2, 0, 0]}
    assert seen(found.view(SCENES, "teacher", training=True)) == {0: [0, 1, 255], 1: [1, 1, 0]}


def test_evaluation_is_on_all_images_with_unknowable_classes_void():
    found = scenario(new=["car"], old=["road"], background="sky")
    assert seen(found.view(SCENES, "student", training=False)) == {
        0: [0, 1, 255], 1: [1, 1, 2], 2: [2, 0, 255], 3: [0, 0, 0],
    }  # fmt: skip
    assert seen(found.view(SCENES, "teacher", training=False))[1] == [1, 1, 255]


def test_everything_wrong_with_a_scenario_is_told_at_once():
    with pytest.raises(UserError) as error:
        scenario(new=["cat", "road"], old=["road"])
    assert len(error.value.problems) == 2
    assert "unknown class 'cat'; did you mean 'car'?" in str(error.value)
    assert "'road' is named twice" in str(error.value)
    with pytest.raises(UserError, match="no old class is left"):
        scenario(new=list(NAMES))


def test_a_step_without_images_is_refused():
    found = scenario(new=["bus"], old=["sky", "road"], setting="disjoint")
    with pytest.raises(UserError, match="no train image of given shows"):
        len(found.view(SCENES, "student", training=True))


# Networks of different classes


def network(classes):
    torch.manual_seed(classes)
    return build("pspnet-test_resnet", classes)


class Shown(Method):
    """Remembers what it is shown."""

    taps = ("logits", "aux", "classifier", "labels")
    weights = {"shown": 1.0}

    def forward(self, student, teacher, labels):
        self.student, self.teacher, self.labels = student, teacher, labels
        term = (student.logits - teacher.logits).square().mean()
        return {"shown": term + (student.classifier - teacher.classifier).square().mean()}


class ShownAll(Shown):
    incremental = True

    def forward(self, student, teacher, labels):
        self.student, self.teacher, self.labels = student, teacher, labels
        return {"shown": student.logits.square().mean()}


class Replacing(Method):
    replaces_task_loss = True
    taps = ("logits",)
    teacher_taps = ()
    weights = {"own": 1.0}

    def forward(self, student, teacher, labels):
        return {"own": student.logits.square().mean()}


def step_of(cls, teacher_classes=3, classes=5, **settings):
    step = TrainStep(
        student=network(classes),
        teacher=network(teacher_classes) if cls().needs_teacher() else None,
        method=cls(),
        settings=StepSettings(batch=2, crop=(32, 48), **settings),
        iterations=10,
        seed=0,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (2, 32, 48), dtype=torch.uint8, generator=generator)
    labels[:, :4] = IGNORE
    return step, images, labels


def test_any_method_is_shown_the_shared_classes_only():
    step, images, labels = step_of(Shown)
    step(images, labels, 0)
    shown = step.method
    assert shown.student.logits.shape[1] == shown.student.aux.shape[1] == 3
    assert shown.student.classifier.shape[0] == 3
    wanted = torch.where(labels < 3, labels, IGNORE).long()
    assert torch.equal(shown.labels, wanted)


def test_an_incremental_method_is_shown_all_classes():
    step, images, labels = step_of(ShownAll)
    step(images, labels, 0)
    assert step.method.student.logits.shape[1] == 5
    assert step.method.teacher.logits.shape[1] == 3
    assert torch.equal(step.method.labels, labels.long())


class Pull(Method):
    """Adds 3 to the gradient of each weight of the classifier."""

    taps = ("classifier",)
    teacher_taps = ()
    weights = {"pull": 3.0}

    def forward(self, student, teacher, labels):
        return {"pull": student.classifier.sum()}


def test_the_classifier_learns_through_its_tap_too():
    moved = []
    for weight in (0.0, 3.0):
        step, images, labels = step_of(Pull, momentum=0.0, weight_decay=0.0)
        step.method.weights = {"pull": weight}
        classifier = step.student.decode_head.conv_seg.weight
        before = classifier.detach().clone()
        step(images, labels, 0)
        moved.append(classifier.detach() - before)
    assert moved[0].abs().max() > 0
    rate = step.settings.learning_rate
    assert torch.allclose(moved[1] - moved[0], torch.tensor(-3 * rate), atol=1e-6)


def test_a_method_may_take_the_place_of_the_task_loss():
    step, images, labels = step_of(Replacing, aux_weight=0.0)
    assert set(step(images, labels, 0)) == {"own"}


def test_a_student_grows_out_of_a_smaller_network():
    small, grown = network(3), network(5)
    kept = grown.decode_head.conv_seg.weight.detach().clone()
    grown.inherit(small, background=False)
    theirs, mine = small.decode_head.conv_seg, grown.decode_head.conv_seg
    assert torch.equal(mine.weight[:3], theirs.weight)
    assert torch.equal(mine.weight[3:], kept[3:])
    assert torch.equal(grown.backbone.state_dict()[(k := next(iter(small.backbone.state_dict())))],
                       small.backbone.state_dict()[k])  # fmt: skip
    grown.inherit(small, background=True)
    assert torch.equal(mine.weight[3], theirs.weight[0])
    assert torch.equal(mine.weight[4], theirs.weight[0])
    assert torch.equal(mine.bias[3:], theirs.bias[:1].expand(2))


def test_a_prediction_is_what_the_method_decides():
    data = GivenLabels([[0, 1]] * 2, [[3, 3]] * 2)
    data.labels = [label.reshape(2, 2).repeat(16, 16) for label in data.labels]
    net = network(4)
    always = {"device": torch.device("cpu"), "batch": 2, "autocast": torch.autocast("cpu", enabled=False)}  # fmt: skip  # noqa: E501

    def decide(logits):
        return torch.nn.functional.one_hot(torch.full_like(logits[:, 0], 3).long(), 4).movedim(3, 1)

    found = evaluate(net, data, **always, decide=decide)
    assert found.per_class == [0.0, 0.0, None, 0.5]


# The whole way


INCREMENTAL = {
    "scenario.new": ["car", "person"],
    "methods": ["none", "kd", "ifvd:plain"],
    "budgets": ["4"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenario") / "out"
    summary = train_small(out, **{k.replace(".", "__"): v for k, v in INCREMENTAL.items()})
    assert not summary.failures
    return Store(out)


def test_runs_tell_miou_of_old_new_and_all_classes(trained):
    for run in trained.runs():
        shown = {name: iou for name, iou in run.miou_per_class.items() if iou is not None}
        new = [iou for name, iou in shown.items() if name in ("car", "person")]
        old = [iou for name, iou in shown.items() if name not in ("car", "person")]
        assert run.miou_of["new"] == pytest.approx(sum(new) / len(new))
        assert run.miou_of["old"] == pytest.approx(sum(old) / len(old))
        assert run.miou == pytest.approx(sum(shown.values()) / len(shown))
    teacher = trained.teacher_folder().read_run()
    assert "car" not in teacher.miou_per_class
    assert teacher.miou_of == {}


def test_the_report_has_old_and_new_columns(trained):
    done = kdprof("plot", "--out", trained.root)
    assert done.returncode == 0, done.stderr
    text = (trained.reports / "table.md").read_text()
    assert "| old %" in text
    assert "| new %" in text
    header = (trained.reports / "table.csv").read_text().splitlines()[0]
    assert "miou_old_percent,miou_new_percent" in header


def test_a_student_starts_as_its_teacher():
    study = ResolvedStudy(load_study(None, SMALL | INCREMENTAL))
    teacher = study.factory.placed_teacher()
    student = study.factory.step("none", teacher, seed=3).student
    assert torch.equal(
        student.decode_head.bottleneck.conv.weight, teacher.decode_head.bottleneck.conv.weight
    )
    assert student.info.num_classes == teacher.info.num_classes + 2


def test_unlike_networks_must_start_fresh():
    study = small_study(scenario__new=["car"], teacher="pspnet-r18")
    with pytest.raises(UserError, match=r"scenario\.initialise"):
        ResolvedStudy(study)
    ResolvedStudy(
        small_study(scenario__new=["car"], teacher="pspnet-r18", scenario__initialise="fresh")
    )


def test_a_scenario_survives_its_file(tmp_path):
    study = load_study(None, SMALL | INCREMENTAL)
    (tmp_path / "study.toml").write_text(study.to_toml())
    assert load_study(str(tmp_path / "study.toml"), {}) == study
    with pytest.raises(UserError, match=r"unknown key 'scenario.newer'; did you mean 'new'"):
        load_study(None, {"scenario.new": ["car"], "scenario.newer": 1})


def test_a_teacher_is_trained_with_a_method_of_its_own():
    with pytest.raises(UserError, match="'kd' uses a teacher itself"):
        ResolvedStudy(small_study(teacher_training__method="kd"))
