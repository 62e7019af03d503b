"""The page: HTML that is whole and escaped, numbers that are the records', and a browser."""

import html
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from page_folders import a_cost, a_folder, judged, numbers
from simulated_verdicts import Setting

from kdprof.errors import UserError
from kdprof.reports import page
from kdprof.reports.page.charts import Scale, accuracy_scale, compute_scale, gain_scale
from kdprof.reports.page.markup import VOID, Markup, join, tag
from kdprof.store import Store

NASTY = "./a&b \"q\" 'p'<script>alert(1)</script>.py:My<b>KD"
LONG = "structure-knowledge-distill-30"


class Element:
    """An element of a parsed page."""

    def __init__(self, name: str, attributes: dict[str, str | None], parent: "Element | None"):
        self.name, self.attributes, self.parent = name, attributes, parent
        self.children: list[Element] = []
        self.own_text: list[str] = []

    def text(self) -> str:
        return "".join(self.own_text)

    def all(self, name: str | None = None, **wanted: str):
        """Yield the elements inside of a name and with these attributes."""
        for child in self.children:
            if name in (None, child.name) and all(
                child.attributes.get(key.rstrip("_").replace("_", "-")) == value
                for key, value in wanted.items()
            ):
                yield child
            yield from child.all(name, **wanted)


class Reader(HTMLParser):
    """Reads a page; an element that is not closed or closed twice is an error."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = self.place = Element("page", {}, None)

    def handle_starttag(self, name, attributes):
        made = Element(name, dict(attributes), self.place)
        assert len(made.attributes) == len(attributes), f"an attribute of {name} is there twice"
        self.place.children.append(made)
        if name not in VOID:
            self.place = made

    def handle_endtag(self, name):
        assert name == self.place.name, f"</{name}> closes <{self.place.name}>"
        self.place = self.place.parent

    def handle_data(self, data):
        place = self.place
        while place is not None:  # texts of all elements around it
            place.own_text.append(data)
            place = place.parent


def read(path: Path) -> Element:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    assert reader.place is reader.root, f"<{reader.place.name}> is not closed"
    return reader.root


FOLDERS = {
    "three": lambda root: a_folder(root, Setting(3, 3, 3)),
    "one budget": lambda root: a_folder(root, Setting(3, 1, 3)),
    "one seed": lambda root: a_folder(root, Setting(4, 3, 1)),
    "two seeds": lambda root: a_folder(root, Setting(4, 2, 2), energy=True),
    "no teacher, no cost": lambda root: a_folder(
        root, Setting(3, 2, 2), teacher=False, costs=False
    ),
    "doubtful": lambda root: a_folder(root, Setting(4, 2, 3), unreliable=["kd", "m0"], drift=0.1),
    "nasty": lambda root: a_folder(root, Setting(4, 3, 3), {"m1": LONG}, device=NASTY),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path) -> Store:
    return FOLDERS[request.param](tmp_path)


def costs_only(root: Path) -> Store:
    store = Store(root)
    store.study.write_text('data = "synthetic"\nstudent = "s"\nteacher = "t"\n')
    for place, method in enumerate(("none", "kd", LONG)):
        store.write_cost(a_cost(method, f"key{place}", place, reliable=place < 2))
    return store


# Whole, escaped, self-contained


def test_every_folder_makes_a_whole_page_that_needs_nothing_else(folder):
    path = page.render(folder, judged(folder))
    assert path == folder.reports / "index.html"
    check_whole(path)
    first = path.read_bytes()
    assert page.render(folder, judged(folder)).read_bytes() == first


def check_whole(path: Path) -> Element:
    root = read(path)
    text = path.read_text()
    top = text.partition("<main>")[0]
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|\bsrc=|<link", top)
    for one in root.all():
        assert not {"src", "style", "srcset", "xlink:href", "onclick"} & one.attributes.keys()
        assert one.attributes.get("href", "#").startswith("#")
    ids = [one.attributes["id"] for one in root.all() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    leads = {one.attributes["href"][1:] for one in root.all("a")}
    assert leads <= set(ids)
    assert len(list(root.all("script"))) == len(list(root.all("style"))) == 1
    assert not re.search(r"https?:|import|fetch|XMLHttp|eval|innerHTML", script(root))
    return root


def script(root: Element) -> str:
    return next(root.all("script")).text()


def test_names_are_text_wherever_they_stand(tmp_path):
    store = FOLDERS["nasty"](tmp_path)
    root = check_whole(page.render(store, judged(store)))
    assert any(NASTY in one.text() for one in root.all("p"))
    assert not list(root.all("b"))


def test_characters_that_control_are_spelled_out():
    assert join("\x1b[31m\u202ea\x00") == r"\x1b[31m\u202ea\x00"
    assert tag("p", "a\nb\x9b", title="\x07") == r'<p title="\x07">a' + "\n" + r"b\x9b</p>"


def test_what_is_not_markup_is_escaped():
    made = tag("p", "<b>", tag("i", "&"), title="\"'<", data_value=None, hidden=True, class_="a")
    assert made == ('<p title="&quot;&#x27;&lt;" hidden class="a">&lt;b&gt;<i>&amp;</i></p>')
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_costs_alone_make_a_page(tmp_path):
    store = costs_only(tmp_path)
    root = check_whole(page.render(store, None))
    assert {one.attributes["id"] for one in root.all("section")} == {
        "cost", "measured", "study", "records",
    }  # fmt: skip
    assert "no verdict" in next(root.all("header")).text()
    check_numbers(root, numbers(store, None))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run and no cost"):
        page.render(Store(tmp_path), None)


def test_an_installed_page_has_its_files():
    root = Path(__file__).resolve().parent.parent
    with (root / "pyproject.toml").open("rb") as file:
        packed = tomllib.load(file)["tool"]["setuptools"]["package-data"]["kdprof.reports.page"]
    there = {p.name for p in (root / "reports" / "page").iterdir() if p.suffix in (".css", ".js")}
    assert set(packed) == there


# Numbers


def test_every_number_is_one_of_the_records_or_of_the_verdict(folder):
    verdict = judged(folder)
    root = read(page.render(folder, verdict))
    check_numbers(root, numbers(folder, verdict))


def check_numbers(root: Element, known: np.ndarray) -> None:
    shown = 0
    for one in root.all():
        values = exact(one)
        for value in (value for value in values if one.text() != "> 1000"):
            near = known[np.searchsorted(known, value - 1e-9 * abs(value)) :]
            assert near.size, (one.text(), value)
            assert near[0] == pytest.approx(value, rel=1e-9), (one.text(), value)
        if one.name in ("td", "span", "text") and values:
            shown += 1
            check_text(one.text(), values)
        if one.name == "td" and not values:
            assert one.text() == "-" or "word" in one.attributes.get("class", ""), one.text()
    assert shown > 10


def exact(one: Element) -> list[float]:
    texts = [one.attributes.get(name) or "" for name in ("data-value", "data-also")]
    return [float(text) for text in " ".join(texts).split()]


SCALES = [1, 100, 1e3, 1 / 60, 1 / 3600, 1e-9, 2**-20, 2**-30]
"""From a record's unit to a readable one."""


def check_text(text: str, values: list[float]) -> None:
    """Check that the figures of a text are those of the exact numbers behind it."""
    plain = re.sub(r"[<>] (0\.99|0\.01|1000)|\(> 1\)", "", text)
    reach = [high - values[0] for high in values[1:]]  # after ±
    for figure in re.findall(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*", plain):
        decimals = len(figure.partition(".")[2])
        half = 0.5000001 * 10**-decimals
        number = float(figure.replace(",", ""))
        assert any(
            abs(abs(value) * scale - abs(number)) <= half for value in values + reach
            for scale in SCALES
        ), (text, values)  # fmt: skip


def test_marks_say_their_numbers_and_sentences_stand_at_the_top(tmp_path):
    store = FOLDERS["doubtful"](tmp_path)
    verdict = judged(store)
    root = read(page.render(store, verdict))
    top = [one.text() for one in next(root.all("div", class_="verdict")).all("p")]
    assert top == verdict.sentences[:3]
    marks = list(root.all("g", role="img"))
    runs = {(run.method, run.budget) for run in store.runs()}
    axes = list(root.all("svg", class_="plot"))
    assert len(marks) == len(runs) * len(axes)
    for mark in marks:
        title = next(mark.all("title")).text()
        miou, low, high, _ = exact(mark)
        assert f"mIoU {miou:.2f} [{low:.2f}-{high:.2f}] %" in title
        assert "off plan" in title
    hatched = list(root.all("rect", class_="hatch"))
    assert len(hatched) == 2


def test_every_pair_gain_flip_and_row_is_there(tmp_path):
    store = FOLDERS["three"](tmp_path)
    verdict = judged(store)
    root = read(page.render(store, verdict))
    assert len(list(root.all("li", data_method=None))) > len(verdict.gains)
    pairs = [one for one in root.all("table") if "differences" in next(one.all("caption")).text()]
    assert sum(len(list(one.all("tr"))) - 1 for one in pairs) == len(verdict.pairs)
    records = next(one for one in root.all("table") if "Records of runs" in one.text())
    assert len(list(records.all("tr"))) - 1 == len(store.runs())
    sums = {one.attributes.get("title") for one in root.all("td")} - {None}
    assert set(store.hashes().values()) <= sums


def test_tables_sort_by_buttons_that_say_so(folder):
    root = read(page.render(folder, judged(folder)))
    heads = [one for one in root.all("th") if one.attributes.get("scope") == "col"]
    assert heads
    for head in heads:
        assert head.attributes["aria-sort"] == "none"
        (button,) = head.all("button")
        assert button.attributes["type"] == "button"
        assert button.text()


def test_without_a_script_the_first_axis_shows(tmp_path):
    root = read(page.render(FOLDERS["three"](tmp_path), judged(Store(tmp_path))))
    for name in ("gain", "curves", "flips"):
        section = next(root.all("section", id=name))
        panels = [one for one in section.all("div") if "data-panel" in one.attributes]
        assert ["hidden" in one.attributes for one in panels] == [False] + [True] * (
            len(panels) - 1
        )
        radios = list(section.all("input", type="radio"))
        assert [one.attributes["value"] for one in radios] == [
            one.attributes["data-panel"] for one in panels
        ]
        assert ["checked" in one.attributes for one in radios].count(True) == 1


def test_the_chosen_axis_is_the_first(tmp_path):
    store = FOLDERS["three"](tmp_path)
    root = read(page.render(store, judged(store), "flop"))
    shown = [one for one in root.all("input") if "checked" in one.attributes]
    assert [one.attributes["value"] for one in shown] == ["flop", "flop", "flop"]


def test_forty_methods_take_little_space(tmp_path):
    store = a_folder(tmp_path, Setting(40, 4, 5))
    assert page.render(store, judged(store)).stat().st_size < 3e6


# Scales


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 10), [0, 2, 4, 6, 8, 10]),
        (Scale(61.2, 68.7), [62, 64, 66, 68]),
        (Scale(0.9, 21, log=True), [1, 2, 5, 10, 20]),
        (Scale(0.9, 2100, log=True), [1, 10, 100, 1000]),
        (Scale(1.3, 1.9, log=True), [1.5]),
        (Scale(0.78, 1.28, log=True), [0.8, 0.9, 1, 1.1, 1.2]),
    ],
)
def test_ticks_are_round_and_few(scale, ticks):
    assert scale.ticks() == ticks


def test_scales_are_logarithmic_by_range_and_hold_all_values():
    assert not compute_scale([10, 40]).log
    assert compute_scale([10, 60]).log
    assert compute_scale([7]).at(7) == pytest.approx(0.5)
    assert accuracy_scale([70, 70.1]).high - accuracy_scale([70, 70.1]).low == pytest.approx(4)
    gains = gain_scale([0.3, 1e9])
    assert gains.at(0.3) > 0
    assert gains.at(1e9) == 1
    assert 0 < gain_scale([2.0]).at(1) < gain_scale([2.0]).at(2) < 1


# In a browser

HARNESS = """<!DOCTYPE html><title>harness</title>
<iframe width="400" height="900"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe"), found = {};
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  const all = (selector, root = page) => [...root.querySelectorAll(selector)];
  view.onerror = (message) => { found.error = message; };
  const shown = (id) => all(`#${id} [data-panel]`).filter((p) => !p.hidden)
    .map((p) => p.dataset.panel).join();
  const wide = () => page.documentElement.scrollWidth > page.documentElement.clientWidth;
  for (const one of all("details")) one.open = true;
  found.width = view.innerWidth;
  found.wide = wide();
  found.before = shown("curves");
  all("#curves input").find((one) => one.value === "flop").click();
  found.after = shown("curves");
  found.gain = shown("gain");
  found.flopwide = wide();
  const table = all("table").find((one) => one.caption.textContent.includes("equal"));
  const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "mIoU %");
  const head = table.tHead.rows[0].cells[column];
  const values = () => [...table.tBodies[0].rows].map((r) => +r.cells[column].dataset.value);
  const ordered = (sign) => values().every((v, i, a) => !i || sign * (v - a[i - 1]) >= 0);
  head.firstChild.click();
  found.sorted = `${head.getAttribute("aria-sort")} ${ordered(1)}`;
  head.firstChild.click();
  found.reversed = `${head.getAttribute("aria-sort")} ${ordered(-1)}`;
  const tip = page.getElementById("tip");
  const mark = all("#curves [data-panel=flop] .mark")[0];
  mark.focus();
  found.focus = `${!tip.hidden} ${tip.textContent === mark.dataset.tip}`;
  found.label = mark.getAttribute("aria-label").includes("mIoU");
  mark.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowRight" }));
  found.arrow = page.activeElement.dataset.tip !== mark.dataset.tip && !tip.hidden;
  page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Escape" }));
  found.escape = tip.hidden;
  const key = all(".key button")[0];
  key.click();
  found.lit = `${key.getAttribute("aria-pressed")} ${all(".series.lit").length > 0}`;
  document.querySelector("pre").textContent =
    Object.entries(found).map(([name, value]) => `${name}=${value}`).join("\\n");
};
frame.src = "index.html";
</script>"""


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    return found


def test_in_a_browser_the_switch_the_tables_and_the_keyboard_work(tmp_path):
    binary = chromium()
    store = a_folder(
        tmp_path / "folder", Setting(8, 3, 3), {"m1": LONG}, device=NASTY,
        unreliable=[LONG], drift=0.1,
    )  # fmt: skip
    page.render(store, judged(store))
    harness = store.reports / "harness.html"
    harness.write_text(HARNESS)
    done = subprocess.run(
        [
            binary, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0",
            "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
            harness.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    inside = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert inside, done.stderr[-2000:]
    found = dict(line.split("=", 1) for line in html.unescape(inside[1]).splitlines())
    assert found == {
        "width": "400",
        "wide": "false",
        "before": "seconds",
        "after": "flop",
        "gain": "flop",
        "flopwide": "false",
        "sorted": "ascending true",
        "reversed": "descending true",
        "focus": "true true",
        "label": "true",
        "arrow": "true",
        "escape": "true",
        "lit": "true true",
    }
