"""The atlas of costs: its record, its tables, and the pages that show it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cost_records import alike, make_cost, memory

from kdprof.errors import KdprofError, UserError
from kdprof.records import Atlas, Flop, Ratio
from kdprof.reports import atlas, atlas_page
from kdprof.reports.atlas_check import (
    check_folder,
    private_words,
    problems,
    read_atlas,
    without_paths,
)
from kdprof.store import record_json

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "reports" / "reference"
VERSIONS = {"kdprof": "1", "python": "3.12", "torch": "2.11"}
SETTINGS = {
    "student": "pspnet-small",
    "teacher": None,
    "data": "cityscapes",
    "classes": 19,
    "placeholder_images": True,
    "step": {"precision": "bf16", "batch": 8, "crop": [512, 1024]},
}


def cost(method: str, seconds: float, teacher="pspnet-large", **changes):
    settings = {**SETTINGS, "teacher": teacher}
    parts = {"teacher": 0, "student": 1e12, "objective": 0, "backward": 2e12, "auxiliary": 0}
    flop = Flop(**parts, total=3e12, counted=3e12)
    phases = {"student_forward": 0.1, "objective": seconds - 0.1, "auxiliary": 1e-7}
    given = {"phases_s": phases, "bytes_moved": 5e9, "settings": settings, "flop": flop, **changes}
    return make_cost(method, seconds, **given)


def measured(*costs, **not_measured) -> Atlas:
    costs = costs or (cost("none", 0.1, teacher=None), cost("cwd", 0.2), cost("dear", 0.4))
    setting = atlas.setting_of("city", costs, not_measured)
    return Atlas(kind="measured", device="GPU 1", versions=VERSIONS, settings=[setting])


def rows_of(markdown: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in reversed(lines)}  # the first table counts


# The record


def test_iterations_are_those_that_take_as_long_as_40000_of_cwd():
    """0.2 s each of cwd: half as many of a step of 0.4 s, twice as many of one of 0.1 s."""
    found = {one.method: one.iterations.median for one in measured().settings[0].costs}
    assert found == pytest.approx({"none": 80_000, "cwd": 40_000, "dear": 20_000})


def test_iterations_have_the_errors_of_both_ratios():
    """The errors add in quadrature on the log scale: sqrt(0.03^2 + 0.04^2) = 0.05."""
    from math import exp

    def wide(value, error):
        ends = {"low": value * exp(-error), "high": value * exp(error)}
        return Ratio(**alike(value, **ends).model_dump(), to="none")

    costs = [
        cost("none", 0.1, teacher=None),
        cost("cwd", 0.2, ratio=wide(2, 0.03)),
        cost("dear", 0.4, ratio=wide(4, 0.04)),
    ]
    found = measured(*costs).settings[0].costs[2].iterations
    assert found.low == pytest.approx(20_000 * exp(-0.05))
    assert found.high == pytest.approx(20_000 * exp(0.05))


def test_what_is_missing_has_its_reason():
    found = measured(cost("none", 0.1, teacher=None)).settings[0].costs[0]
    assert found.iterations is None
    assert found.unavailable["iterations"] == "cwd has no cost here"
    assert found.unavailable["energy_j"] == "no counter"


def test_a_setting_says_what_was_measured():
    found = measured(broken="raised (/home/ann/methods/broken.py:12)").settings[0]
    assert (found.student, found.teacher, found.batch) == ("pspnet-small", "pspnet-large", 8)
    assert found.crop == (512, 1024)
    assert found.not_measured == {"broken": "raised (broken.py:12)"}


def test_files(tmp_path):
    made = measured(broken="out of memory")
    names = [path.name for path in atlas.write(tmp_path, made)]
    assert names == ["atlas.json", "atlas.md", "atlas.csv"]
    assert read_atlas(tmp_path / "atlas.json") == made
    with (tmp_path / "atlas.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["none", "cwd", "dear"]
    assert float(lines[2]["ratio"]) == pytest.approx(4)
    assert float(lines[2]["objective_s"]) == pytest.approx(0.3)
    assert "energy_j: no counter" in lines[0]["missing"]


def test_markdown():
    unreliable = cost("dear", 0.4, reliable=False, warnings=["throttled"])
    given = cost("none", 0.1, teacher=None), cost("cwd", 0.2), unreliable
    text = atlas.markdown(measured(*given, broken="out of memory"))
    assert "## cityscapes: pspnet-large -> pspnet-small, 512x1024, batch 8, bf16" in text
    rows = rows_of(text)
    assert rows["none"][:3] == ["100.0", "1", "80,000"]
    assert rows["dear†"][:3] == ["400.0", "4.00 [4.00-4.00]", "20,000"]
    assert "- dear: UNRELIABLE: throttled" in text
    assert "- broken: not measured: out of memory" in text
    assert "| ms of | student forward | objective |" in text  # and no column of zeros
    assert "energy (J)" not in text
    assert "- none, cwd, dear: no energy_j: no counter" in text


# What may be shown


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("raised (/home/ann/kd.py:12)", "raised (kd.py:12)"),
        ("see ~/data/x.pt, and C:\\Users\\ann\\y", "see x.pt, and y"),
        ("no /sys/class/powercap", "no /sys/class/powercap"),
        (
            "https://arxiv.org/abs/1 and 1/2 and s/step",
            "https://arxiv.org/abs/1 and 1/2 and s/step",
        ),
        ("cwd-gt-kd-40k@cwd.json", "cwd-gt-kd-40k@cwd.json"),
    ],
)
def test_paths(text, left):
    assert without_paths(text) == left
    assert bool(private_words(text)) == (text != left)


def test_names_and_addresses():
    assert private_words("by ann@lab.org on box7", {"box7", "box"}) == ["ann@lab.org", "box7"]


def test_a_good_atlas_has_no_problem():
    assert problems(measured()) == []


BAD = {
    "lacks the version of torch": lambda a: a["versions"].pop("torch"),
    "names its device": lambda a: a.update(device=None),
    "holds no setting": lambda a: a.update(settings=[]),
    "city, bf16 twice": lambda a: a.update(settings=2 * a["settings"]),
    "'none', which the ratios refer to": lambda a: a["settings"][0]["costs"].pop(0),
    "'none' stands there twice": lambda a: a["settings"][0]["costs"].append(
        a["settings"][0]["costs"][0]
    ),
    "unreliable without a reason": lambda a: a["settings"][0]["costs"][1].update(reliable=False),
    "3 of 3 methods are unreliable": lambda a: [
        one.update(reliable=False, warnings=["throttled"]) for one in a["settings"][0]["costs"]
    ],
    "'cwd' has no ratio": lambda a: a["settings"][0]["costs"][1].update(ratio=None),
    "has seconds, though nothing ran": lambda a: a.update(kind="counted", device=None),
    "holds '/home/ann/x'": lambda a: a["settings"][0]["not_measured"].update(kd="in /home/ann/x"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_atlas_is_refused(problem, tmp_path):
    content = json.loads(record_json(measured()))
    BAD[problem](content)
    path = tmp_path / "atlas.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem.replace("(", r"\(")):
        read_atlas(path)


def test_all_problems_at_once(tmp_path):
    content = json.loads(record_json(measured()))
    for problem in ("lacks the version of torch", "'none', which the ratios refer to"):
        BAD[problem](content)
    path = tmp_path / "atlas.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        read_atlas(path)
    assert len(refused.value.problems) == 2


def test_unknown_fields_are_refused(tmp_path):
    """A name has no field to stand in."""
    path = tmp_path / "atlas.json"
    path.write_text(json.dumps(json.loads(record_json(measured())) | {"author": "Ann"}))
    with pytest.raises(UserError, match="author"):
        read_atlas(path)


def test_every_file_of_a_folder_is_looked_at(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "study").mkdir()
    for folder in ("work", "study"):
        (tmp_path / folder / "study.toml").write_text('data = "camvid:/home/ann/camvid"')
    (tmp_path / "checks.md").write_text("ran on box7")
    found = check_folder(tmp_path, names={"box7"}, without=("work",))
    assert [line.split(" holds ")[0] for line in found] == ["checks.md", "study/study.toml"]


@pytest.mark.parametrize("folder", sorted(p for p in REFERENCES.iterdir() if p.is_dir()))
def test_references_say_nothing_of_the_machine_or_a_person(folder):
    assert check_folder(folder) == []


# The pages


@pytest.fixture(scope="module")
def references():
    return atlas_page.read_references(REFERENCES)


def test_pages_are_what_the_records_say(references):
    advice = f"run: {atlas_page.REGENERATE}"
    assert (ROOT / "docs" / "atlas.md").read_text() == atlas_page.page(references), advice
    readme = (ROOT / "README.md").read_text()
    assert readme == atlas_page.with_table(readme, atlas_page.readme_table(references)), advice


def test_the_counted_atlas_is_current(references):
    """Its methods are those there are, and two of them count as they do now. Other versions of
    torch may have other operators, but no other FLOP."""
    import atlas_pages

    stored = references.counted
    kept = {one.method: one for one in stored.settings[0].costs}
    assert sorted(kept) == sorted(atlas_pages.builtin_names()), f"run: {atlas_page.COUNT_AGAIN}"
    made = atlas_pages.count(["none", "cwd"])
    fields = ["flop", "peak_allocated_bytes", "unavailable"]
    if made.versions["torch"] == stored.versions["torch"]:
        fields += ["bytes_moved", "operators"]
    for now in made.settings[0].costs:
        for name in fields:
            assert getattr(now, name) == getattr(kept[now.method], name), atlas_page.COUNT_AGAIN


def test_counted_figures_are_marked(references):
    counted = atlas_page.References({}, references.counted, references.reading)
    table = atlas_page.readme_table(counted)
    assert table.startswith("**Counted, not run**")
    rows = rows_of(table)
    assert rows["none"][0] == "5.26"
    assert rows["cwd"][-1] == "78.9"
    assert rows["kd"][-1] == "-"
    assert "plain script" in table
    assert "ratios of these milliseconds are too near to 1" in table
    assert not any(":" in name for name in rows if name[0] != ":")


def test_a_measured_device_takes_the_place_of_counts(references):
    shown = atlas_page.References({"gpu-1": measured()}, references.counted, references.reading)
    table = atlas_page.readme_table(shown)
    assert table.startswith("Measured on GPU 1.")
    assert rows_of(table)["dear"][1] == "4.00 [4.00-4.00]"
    page = atlas_page.page(shown)
    assert "## GPU 1" in page
    assert "(../reports/reference/gpu-1/atlas.md)" in page
    assert "No GPU's atlas" not in page
    assert "## Counted, not run" in page


def test_a_readme_without_marks_is_refused():
    with pytest.raises(KdprofError, match="put both where the table belongs"):
        atlas_page.with_table("nothing", "table")


def test_the_command_leaves_current_pages_as_they_are():
    pages = [ROOT / "docs" / "atlas.md", ROOT / "README.md"]
    before = [path.read_text() for path in pages]
    program = ROOT / "benchmarks" / "atlas_pages.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in pages] == before


def test_memory_is_the_allocator_s_where_there_is_one():
    both = memory(peak_allocated=3 * 2**30, process=2**33)
    made = measured(cost("none", 0.1, teacher=None, memory_bytes=both))
    text = atlas.markdown(made)
    assert "3.00 GiB" in text
    assert "Memory is the process's" not in text
