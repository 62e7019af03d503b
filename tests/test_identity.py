"""What may be used again: every setting, every kind of file, and data by content."""

import contextlib
import copy
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
from PIL import Image
from processes import kdprof
from pydantic import BaseModel
from small_study import SMALL, small_study, small_toml, train_small
from step_observer import observing, signal_at

from kdprof.data import content
from kdprof.data.own import open_folder
from kdprof.errors import UserError
from kdprof.progress import Progress
from kdprof.resolve import ResolvedStudy
from kdprof.resolve.identity import cost_key, differences, run_identity, teacher_identity
from kdprof.store import Store, write_record
from kdprof.study import Study, load_study
from kdprof.train.loop import Interrupted
from kdprof.user_files import following, import_file, sources, sources_of

PAGE = (Path(__file__).parent.parent / "docs" / "identity.md").read_text()

# Settings

BASE = {**SMALL, "scenario.new": ["1-2"], "scenario.initialise": "fresh", "methods": ["kd"]}
OTHER = {
    "student": "pspnet-r18",
    "teacher": "pspnet-r18",
    "student_backbone_weights": "imagenet",
    "teacher_backbone_weights": "imagenet",
    "teacher_weights": "teacher.pth",
    "data": "camvid",
    "device": "auto",
    "methods": ["kd", "cwd"],
    "method_settings": {"kd": {"temperature": 2.0}},
    "budgets": ["9"],
    "scenario.new": ["3"],
    "scenario.old": ["1-2"],
    "scenario.background": "none",
    "step.crop": [64, 64],
    "step.momentum": 0.5,
    "step.betas": [0.5, 0.5],
    "step.eps": 0.5,
    "step.optimizer": "adamw",
    "step.no_weight_decay": ["norms"],
    "step.learning_rate_factors": {"head": 10.0},
    "step.max_gradient_norm": 1.0,
    "step.warmup_start": 0.5,
    "data_settings.cache_folder": "elsewhere",
    "data_settings.ignore_index": 254,
    "data_settings.resize": "none",
    "data_settings.scale": [0.5, 1.0],
    "data_settings.max_class_share": 0.75,
    "data_settings.label_map": {"7": "road"},
    "data_settings.synthetic_size": [48, 64],
    "teacher_training.learning_rate": 0.5,
    "teacher_training.method": "ifvd",
    "training.schedule_iterations": 9,
    "training.loggers": ["tensorboard"],
    "measure.total_time_s": 9.0,
}
"""A changed value for every setting for which none follows from its type."""


ADAMW = {"step.optimizer": "adamw"}
REQUIRED = {
    "step.betas": ADAMW,
    "step.eps": ADAMW,
    "step.warmup_start": {"step.warmup_iterations": 2},
}
"""What a setting needs beside it."""


def settings(model: type[BaseModel] = Study, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and type of every setting of a study."""
    for name, field in model.model_fields.items():
        sections = [
            one
            for one in (field.annotation, *get_args(field.annotation))
            if isinstance(one, type) and issubclass(one, BaseModel)
        ]
        if sections:
            yield from settings(sections[0], f"{above}{name}.")
        else:
            yield above + name, field.annotation


def changed(name: str, kind: Any) -> Any:
    """Return another value of a setting than that of the base."""
    if name in OTHER:
        return OTHER[name]
    value: Any = load_study(None, BASE)
    for part in name.split("."):
        value = getattr(value, part)
    if get_origin(kind) is Literal:
        return next(one for one in get_args(kind) if one != value)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


def written(name: str) -> tuple[bool, ...]:
    """Return what the page says: whether a Cost, a run and the teacher depend on a setting."""
    rows = re.findall(r"^\| (`.*?) \| (yes|no) \| (yes|no) \| (yes|no) \|", PAGE, re.MULTILINE)
    exact = {n: row for row in rows for n in re.findall(r"`([^`]+)`", row[0])}
    above = name.rpartition(".")[0]
    _, *answers = exact.get(name) or exact.get(f"{above}.*") or exact[above]
    return tuple(answer == "yes" for answer in answers)


@pytest.fixture(scope="module")
def resolved() -> ResolvedStudy:
    return ResolvedStudy(load_study(None, {**SMALL, "methods": ["kd"]}))


def as_if(resolved: ResolvedStudy, study: Study) -> ResolvedStudy:
    """Return the resolved study of other settings, of which some cannot run on this machine."""
    made = copy.copy(resolved)
    made.plain, made.teacher_name = study, study.teacher
    for section in ("step", "training", "evaluation", "measure", "data_settings"):
        setattr(made, section, getattr(study, section))
    made.teacher_training = study.teacher_training
    made.data = copy.copy(resolved.data)
    made.data.kind = study.data
    return made


@pytest.mark.parametrize(("name", "kind"), list(settings()), ids=[name for name, _ in settings()])
def test_every_setting_is_in_the_identities_that_the_page_says(name, kind, resolved):
    before = BASE | REQUIRED.get(name, {})
    base = load_study(None, before)
    other = load_study(None, {**before, name: changed(name, kind)})
    before, after = as_if(resolved, base), as_if(resolved, other)
    cost = cost_key(before, "kd") != cost_key(after, "kd")
    run = run_identity(before, "kd") != run_identity(after, "kd")
    teacher = teacher_identity(before) != teacher_identity(after)
    assert (cost, run, teacher) == written(name)
    assert run or base.comparable() == other.comparable()


def test_a_setting_of_one_method_is_in_no_other_identity(resolved):
    other = as_if(resolved, small_study(method_settings={"kd": {"temperature": 2.0}}))
    assert cost_key(resolved, "none") == cost_key(other, "none")
    assert run_identity(resolved, "none") == run_identity(other, "none")


EDITED = [
    ("step.learning_rate", 0.1, "step.learning_rate was 0.01, is 0.1 here"),
    ("step.schedule", "cosine", 'step.schedule was "poly", is "cosine" here'),
    ("step.max_gradient_norm", 1.0, "step.max_gradient_norm is used now"),
    ("training.enforce", "flop", 'training.enforce was "iterations", is "flop" here'),
    ("evaluation.points", 3, "evaluation.points was 2, is 3 here"),
]


@pytest.mark.parametrize(("name", "value", "told"), EDITED, ids=[name for name, *_ in EDITED])
def test_a_run_is_not_continued_under_an_edited_study(tmp_path, name, value, told):
    """The study in the folder agrees with the call: only the run itself knows its settings."""
    with observing(6, before=signal_at(3)), pytest.raises(Interrupted):
        train_small(tmp_path, methods=["none"])
    record = Store(tmp_path).run_folder("none", "6", 0).record.read_text()
    Store(tmp_path).study.write_text(small_study(methods=["none"], **{name: value}).to_toml())
    with pytest.raises(UserError) as refused:
        train_small(tmp_path, methods=["none"], **{name: value})
    assert f"runs/none/6/0: {told}; use another --out" in str(refused.value)
    with pytest.raises(UserError, match=re.escape(told)):  # as a run of another method
        train_small(tmp_path, methods=["kd"], **{name: value})
    assert Store(tmp_path).run_folder("none", "6", 0).record.read_text() == record


def test_a_teacher_of_another_study_is_refused_and_runs_without_one_are_not(tmp_path):
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    train_small(one.root, methods=["none", "kd"], budgets=["2"])
    longer = {"budgets": ["2"], "teacher_training.iterations": 5}
    train_small(other.root, methods=["none"], **longer)
    shutil.copytree(one.teacher_folder().path, other.teacher_folder().path)
    told = "other/teacher: teacher_training.iterations was 4, is 5 here"
    with pytest.raises(UserError, match=told):
        train_small(other.root, methods=["none", "kd"], **longer)
    one.study.write_text(small_study(methods=["none", "kd"], **longer).to_toml())
    assert train_small(one.root, methods=["none"], **longer).skipped == 1
    with pytest.raises(UserError) as refused:
        train_small(one.root, methods=["none", "kd"], **longer)
    assert [problem.split(": ")[0] for problem in refused.value.problems] == [
        str(one.run_folder("kd", "2", 0).path),
        str(one.teacher_folder().path),
    ]


def test_a_message_names_the_first_of_many_differences(tmp_path):
    """A run of a version that wrote no settings."""
    train_small(tmp_path, methods=["none"], budgets=["2"])
    folder = Store(tmp_path).run_folder("none", "2", 0)
    run = folder.read_run()
    identity = {"code of kdprof": "sha256:0", "device": run.identity["device"]}
    write_record(folder.record, run.model_copy(update={"identity": identity}))
    with pytest.raises(UserError, match=r"0: code of kdprof has changed; .*; and \d+ more; use"):
        train_small(tmp_path, methods=["none"], budgets=["2"])


def test_device_and_versions_are_in_both(resolved, monkeypatch):
    before = cost_key(resolved, "kd"), run_identity(resolved, "kd")
    monkeypatch.setattr("kdprof.resolve.identity.versions", lambda: {"torch": "9.9"})
    after = cost_key(resolved, "kd"), run_identity(resolved, "kd")
    assert before[0] != after[0]
    assert "version of torch was" in "; ".join(differences(before[1], after[1]))


def test_weights_count_by_content_wherever_they_lie(resolved, tmp_path):
    def identity(file: Path) -> dict[str, str]:
        return run_identity(as_if(resolved, small_study(teacher_weights=str(file))), "kd")

    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    first.write_bytes(b"weights")
    shutil.copy(first, second)
    assert identity(first) == identity(second)
    second.write_bytes(b"Weights")
    assert differences(identity(first), identity(second)) == ["weights of the teacher has changed"]


# Files of a user

FILE = """
import {name}_nets
from pathlib import Path

HERE = Path(__file__).parent
HEAD = (HERE / "head.txt").read_text()
reads = ("late.txt", "prompts")


def build():
    import {name}_pack.losses
    return (HERE / "start.txt").read_text()
"""
SOURCES = {
    "mine.py": FILE,
    "{name}_nets.py": "import numpy\nfrom {name}_deep import WIDTH\n",
    "{name}_deep.py": "WIDTH = 8\n",
    "{name}_pack/__init__.py": "",
    "{name}_pack/losses.py": "from . import parts\n",
    "{name}_pack/parts.py": "SCALE = 1\n",
    "head.txt": "a head",
    "start.txt": "a start",
    "late.txt": "read in a step",
    "prompts/one.txt": "a road",
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that writes the user's files into a new folder and returns their sources."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name, made = f"own_{tmp_path.name}", []

    def sources(**changes: str) -> dict[str, str]:
        for module in [one for one in sys.modules if one.startswith(name)]:
            del sys.modules[module]  # as in a new process
        monkeypatch.setattr("kdprof.user_files.loading._folders", set())
        folder = tmp_path / f"job{len(made)}"
        made.append(folder)
        if len(made) > 1:
            sys.path.remove(str(made[-2]))
        for file, text in SOURCES.items():
            path = folder / file.format(name=name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(changes.get(file, text).replace("{name}", name))
        (folder / "unused.py").write_text(f"NUMBER = {len(made)}")
        module = import_file(folder / "mine.py")
        with following(folder / "mine.py"):
            module.build()
        return {key.replace(name, "{name}"): value for key, value in sources_of(module).items()}

    return sources


def test_a_file_depends_on_all_that_it_imports_reads_and_declares(make):
    files = {name for name in SOURCES if not name.startswith("prompts")}
    assert set(make()) == files | {"prompts", "version of numpy"}


def test_sources_are_the_same_in_another_folder(make):
    assert make() == make()


@pytest.mark.parametrize("file", SOURCES)
def test_a_change_of_any_file_is_seen_and_named(make, file):
    before, after = make(), make(**{file: SOURCES[file] + "\n# changed\n"})
    named = "prompts" if file.startswith("prompts") else file
    assert differences(before, after) == [f"{named} has changed"]


def test_versions_of_imported_packages_count(make):
    text = SOURCES["mine.py"] + "import numpy, torch, json, PIL\n"
    found = make(**{"mine.py": text})
    assert found["version of numpy"] == np.__version__
    assert found["version of PIL"]
    assert "version of torch" not in found  # every identity has it
    assert not any("json" in name for name in found)


def test_a_file_that_is_made_if_it_is_missing_counts(tmp_path):
    """The next process finds it and reads it."""
    file = tmp_path / "maker.py"
    file.write_text("")
    module = import_file(file)
    with following(file):
        (tmp_path / "means.txt").write_text("made")
        assert (tmp_path / "means.txt").read_text() == "made"
    assert set(sources_of(module)) == {"maker.py", "means.txt"}


def test_temporary_files_and_what_libraries_keep_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    sources._not_own.cache_clear()
    folder = tmp_path / "own"
    folder.mkdir()
    module = import_file(written_file(folder / "busy.py", ""))
    for kept in ("scratch/a.txt", "inductor/b.txt", "torchinductor_me/c.txt"):
        written_file(tmp_path / kept, "kept")
    with following(folder / "busy.py"):
        with tempfile.NamedTemporaryFile("w+") as made:
            Path(made.name).read_text()
        (tmp_path / "inductor/b.txt").read_text()
        (tmp_path / "torchinductor_me/c.txt").read_text()
        with contextlib.suppress(NotADirectoryError):
            (folder / "busy.py" / "x").read_text()
    sources._not_own.cache_clear()
    assert sources_of(module) == {"busy.py": sources_of(module)["busy.py"], "busy.py/x": "absent"}


def written_file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_what_a_shared_module_reads_counts_for_all_that_import_it(tmp_path, monkeypatch):
    """Whichever file imports it first: the others find it loaded."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"common_{tmp_path.name}"
    read = "from pathlib import Path\nPath(__file__).with_name('width.txt').read_text()\n"
    written_file(tmp_path / f"{name}.py", read)
    written_file(tmp_path / "width.txt", "8")
    written_file(tmp_path / "only.txt", "of the first")
    first = f"import {name}\nopen(__file__.replace('first.py', 'only.txt')).read()\n"
    one = import_file(written_file(tmp_path / "first.py", first))
    two = import_file(written_file(tmp_path / "second.py", f"import {name}\n"))
    assert set(sources_of(one)) == {"first.py", f"{name}.py", "width.txt", "only.txt"}
    assert set(sources_of(two)) == {"second.py", f"{name}.py", "width.txt"}


def test_versions_and_built_in_methods_count_through_ones_own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"through_{tmp_path.name}"
    written_file(tmp_path / f"{name}.py", "import numpy\nfrom kdprof.methods import kd\n")
    found = sources_of(import_file(written_file(tmp_path / "user.py", f"import {name}\n")))
    assert set(found) == {"user.py", f"{name}.py", "version of numpy", "kdprof's methods"}


def test_a_module_that_python_cannot_read_counts_by_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"old_{tmp_path.name}"
    written_file(tmp_path / f"{name}.py", "print 'Python 2'\n")
    file = written_file(tmp_path / "lazy.py", f"def unused():\n    import {name}\n")
    assert set(sources_of(import_file(file))) == {"lazy.py", f"{name}.py"}


def test_a_file_that_is_read_too_late_is_refused_with_the_line_to_add(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("")
    (tmp_path / "late.txt").write_text("late")
    sources_of(import_file(file))
    line = r"slow.py reads .*reads = \('late.txt',\)"
    with pytest.raises(UserError, match=line), following(file):
        (tmp_path / "late.txt").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [("reads = 'a.pth'", "must be a tuple"), ("reads = ('a.pth',)", "a.pth, which does not exist")],
)
def test_wrong_declarations_are_refused(tmp_path, line, message):
    file = tmp_path / "wrong.py"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        sources_of(import_file(file))


# Data by content


def data_set(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            pixels = draw.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            labels = draw.integers(0, 2, (40, 56), dtype=np.uint8)
            for kind, array in (("images", pixels), ("masks", labels)):
                folder = root / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{number}.png")
    (root / "classes.txt").write_text("road\nsky\n")
    return root


def correct(label: Path) -> None:
    """Change one pixel of a label in place; size and time of modification stay."""
    status, values = label.stat(), np.array(Image.open(label))
    values[0, 0] = 1 - values[0, 0]
    Image.fromarray(values).save(label)
    text = label.read_bytes()
    label.write_bytes(text + b"\0" * (status.st_size - len(text)))
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns))


def hashes(root: Path, cache: Path) -> dict[str, str]:
    return content.content_of(open_folder(root, "val"), cache, Progress(None))


def test_content_is_that_of_the_files_wherever_they_lie(tmp_path):
    first = data_set(tmp_path / "job1" / "set")
    second = Path(shutil.copytree(first, tmp_path / "job2" / "other"))
    cache = tmp_path / "cache"
    before = hashes(first, cache)
    assert hashes(second, cache) == before
    correct(second / "masks" / "val" / "1.png")
    after = hashes(second, cache)
    assert differences(before, after) == ["val labels has changed"]


def test_only_changed_files_are_read_again(tmp_path, monkeypatch):
    root, cache, read = data_set(tmp_path / "set"), tmp_path / "cache", []

    def digest(path: Path) -> str:
        read.append(path.name)
        return actual(path)

    actual = content.digest
    monkeypatch.setattr(content, "digest", digest)
    monkeypatch.setattr(content, "CLOCK_NS", 0)
    before = hashes(root, cache)
    assert len(read) == 4
    assert hashes(root, cache) == before
    assert len(read) == 4
    correct(root / "masks" / "val" / "1.png")
    assert hashes(root, cache) != before
    assert read[4:] == ["1.png"]
    (kept,) = cache.iterdir()
    kept.write_text("{damaged")
    assert hashes(root, cache) != before
    assert len(read) == 9


def test_files_that_have_just_changed_are_not_trusted(tmp_path):
    """Their times would be the same after another change within the clock's step."""
    root, cache = data_set(tmp_path / "set"), tmp_path / "cache"
    hashes(root, cache)
    (kept,) = cache.iterdir()
    assert kept.read_text() == "{}"


def test_a_copy_of_the_data_continues_and_a_corrected_label_is_refused(tmp_path):
    """F11: data moved, then corrected in place."""
    data, out = data_set(tmp_path / "job1" / "set"), tmp_path / "out"
    changes = {"methods": ["kd"], "budgets": ["2"], "teacher_training.iterations": 2}
    changes["data_settings.cache_folder"] = str(tmp_path / "cache")
    assert len(train_small(out, priced=False, data=f"folder:{data}", **changes).finished) == 1
    costs = Store(out).costs()
    moved = Path(shutil.copytree(data, tmp_path / "job2" / "set"))
    shutil.rmtree(data)
    again = train_small(out, priced=False, data=f"folder:{moved}", **changes)
    assert (again.finished, again.skipped) == ([], 1)
    assert Store(out).costs() == costs
    correct(moved / "masks" / "val" / "1.png")
    with pytest.raises(UserError) as refused:
        train_small(out, priced=False, data=f"folder:{moved}", **changes)
    assert len(refused.value.problems) == 2  # the run and the teacher
    assert all("val labels has changed; use another --out" in p for p in refused.value.problems)


# As processes

USERS = {
    "meth.py": """
from kdprof.method import Method
from losses_of_meth import l2

class HelperKD(Method):
    taps = ("logits",)
    weights = {"l2": 1.0}

    def forward(self, student, teacher, labels):
        return {"l2": l2(student.logits, teacher.logits)}
""",
    "losses_of_meth.py": "def l2(a, b):\n    return (a - b).square().mean()\n",
    "wrap.py": """
from torch import nn
from kdprof.models import AdaptedNetwork
from nets_of_wrap import WIDTH

def maps(net, x):
    head = net[0](x)
    return {"logits": net[1](head), "head": head}

def build(classes):
    body = nn.Conv2d(3, WIDTH, 3, 8, 1), nn.Conv2d(WIDTH, classes, 1)
    return AdaptedNetwork(nn.Sequential(*body), maps, classes, name="small")
""",
    "nets_of_wrap.py": "WIDTH = 8\n",
}


@pytest.mark.slow
def test_a_changed_helper_of_a_users_file_is_refused_by_name(tmp_path):
    """F2: what a method's file or a network's file imports belongs to the run."""
    for name, text in USERS.items():
        (tmp_path / name).write_text(text)
    study = small_toml(tmp_path, student="wrap.py:build", budgets=["4"], step__aux_weight=0.0)
    options = ("train", "--study", study, "--out", tmp_path / "out", "--method", "meth.py:HelperKD")

    def train(code: int = 0) -> str:
        done = kdprof(*options, "--no-control", cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "1 runs trained" in train()
    assert "1 were finished before" in train()
    losses = tmp_path / "losses_of_meth.py"
    losses.write_text("def l2(a, b):\n    return 1000 * (a - b).abs().sum()\n")
    (tmp_path / "nets_of_wrap.py").write_text("WIDTH = 64\n")
    refused = train(2)
    assert "file losses_of_meth.py of the method has changed" in refused
    assert "file nets_of_wrap.py of the student has changed" in refused
    assert "Traceback" not in refused
    done = kdprof("train", *options[1:-1], "kd", "--no-control", cwd=tmp_path)
    assert "file nets_of_wrap.py of the student has changed" in done.stderr  # another method's run
    assert done.returncode == 2
    losses.write_text(USERS["losses_of_meth.py"])
    (tmp_path / "nets_of_wrap.py").write_text(USERS["nets_of_wrap.py"])
    assert "1 were finished before" in train()
