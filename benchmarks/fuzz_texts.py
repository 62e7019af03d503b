"""Hostile names, numbers and bytes, and checks of what a report made of them."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

from fuzz_case import LARGEST, WRONG, Wrong

from kdprof.visible import printable

FRAGMENTS = (
    "\x1b[31m", "\x1b]0;title\x07", "\x07", "\x08" * 5, "\x9b31m", "\u202egnp", "\u2066", "\u200b",
    "\ufeff", "\u2028", "\x85", "\n", "\r\n", "\t", "\x00", "\ud800", "\udcff", "$$", "$x$",
    r"$\frac{1}{", "^_^", "_", "%", "%s", "{0}", "{}", "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>", "</script>", "</svg>", "<!--", "]]>", "&lt;", "&", "|", "||",
    "[click](http://x)", "![](http://x)", "`", "```", "**", "# head", "=1+1", "+1+1", "-1+1",
    "@SUM(A1)", r"\input{x}", r"\write18{x}", "\\", "'", '"', ",", ";", "[red]", "[/]", ":smile:",
    "..", "/", "../../x", "~", "a:b", "a.b", " ", "", "None", "0", "\u0665", "\u00b2",
    "\u00e9", "e\u0301", "\u6f22\u5b57", "\U0001f600", "\u00df",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    float("nan"), float("inf"), float("-inf"), -1, -0.5, 0, -0.0, 1, 2, 0.5, 5.0, 1e-300, 5e-324,
    1e300, 1.7e308, 10**18, 2**63, 10**30, 10**400, True, False, None, "", "1", "NaN", "x", [], [1],
    {}, {"a": 1},
)  # fmt: skip
NOT_NUMBERS = {f"{sign}{word}" for sign in ("", "+", "-") for word in ("nan", "inf")}
OWN_TAGS = {"details", "summary", "br"}
"""HTML that kdprof itself writes into Markdown."""


def hostile(random: Random) -> str:
    """Return a text with some of what a terminal, a report or a file system reads as a command."""
    text = "".join(random.choice(FRAGMENTS) for _ in range(random.choice((1, 1, 1, 2, 3))))
    place = random.choice(("before", "after", "alone", "alone", "around"))
    text = {"before": f"{text}kd", "after": f"kd{text}", "around": f"k{text}d"}.get(place, text)
    return text * random.choice((1000, 5000)) if random.random() < 0.03 else text


def argument(random: Random) -> str:
    """Return a hostile text that can stand on a command line: without zero bytes, and with bytes
    that are no UTF-8 as Python reads them."""
    return as_argument(hostile(random))


def as_argument(text: str) -> str:
    """Return what the system would make of a text as an argument."""
    return text.replace("\x00", "").replace("\ud800", "\udc80")


def number(random: Random) -> Any:
    """Return a value that a number must not, or only just can, be."""
    return random.choice(NUMBERS)


# Changes


def changed_json(random: Random, content: Any, value: Any = ...) -> tuple[Any, str]:
    """Return JSON with one value changed, and what was changed.

    Args:
        value: the new value; by default the change is drawn: a value, a key, a swap, a removal.
    """
    content = json.loads(json.dumps(content))
    places = list(_places(content))
    if not places:
        return number(random), "all of it"
    owner, key = random.choice(places)
    old = owner[key]
    way = random.choice(("value", "value", "value", "value", "remove", "add", "rename", "swap"))
    if value is not ... or way == "value":
        owner[key] = number(random) if value is ... else value
    elif way == "remove":
        del owner[key]
    elif way == "swap":
        other, its = random.choice(places)
        owner[key], other[its] = other[its], owner[key]
    elif isinstance(owner, dict):
        owner[hostile(random)] = owner.pop(key) if way == "rename" else number(random)
    else:
        owner.append(number(random))
    return content, f"{way} at {key!r}, which was {old!r}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the owner and the key of every value in JSON; of long lists the first two."""
    keys = content if isinstance(content, dict) else range(min(2, len(content)))
    for key in list(keys):
        yield content, key
        if isinstance(content[key], (dict, list)):
            yield from _places(content[key])


def text_places(content: Any) -> list[tuple[Any, Any]]:
    """Return the owner and the key of every text in JSON."""
    return [(owner, key) for owner, key in _places(content) if isinstance(owner[key], str)]


def damaged(random: Random, data: bytes) -> tuple[bytes, str]:
    """Return bytes that were damaged, and how."""
    place = random.randrange(len(data) + 1)
    end = min(len(data), place + random.choice((1, 4, 100)))
    way = random.choice(("flip", "flip", "cut", "insert", "remove", "repeat", "twice", "recode"))
    if way == "flip" and data:
        place = min(place, len(data) - 1)
        made = data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
    elif way == "cut":
        made = data[:place]
    elif way == "insert":
        made = data[:place] + random.randbytes(random.choice((1, 8, 300))) + data[place:]
    elif way == "remove":
        made = data[:place] + data[end:]
    elif way == "repeat":
        made = data[:end] + data[place:]
    elif way == "twice":
        made = data + data
    else:
        way = random.choice(("utf-16", "utf-8-sig", "utf-7"))
        made = data.decode("latin-1").encode(way)
    return made, f"{way} at byte {place} of {len(data)}"


# What reports are


def check_reports(folder: Path, before: Mapping[str, object] = {}) -> None:
    """Check that reports below a folder can be read as what they are, and run nothing.

    Args:
        before: what lay in the folder; what is still the same is not looked at.

    Raises:
        Wrong: one cannot.
    """
    checks = {".md": _markdown, ".csv": _csv, ".html": _html, ".svg": _svg, ".tex": _tex,
              ".json": _json}  # fmt: skip
    for path in sorted(folder.rglob("*")):
        if path.suffix not in checks or not path.is_file() or path.stat().st_size >= LARGEST:
            continue
        if before.get(path.relative_to(folder).as_posix()) == (data := path.read_bytes()):
            continue
        text = data.decode()
        if path.suffix != ".json" and any(printable(line) != line for line in text.split("\n")):
            # A page holds a script and styles, whose own lines are printable as well.
            raise Wrong(WRONG, f"{path.name} holds control characters")
        if (problem := checks[path.suffix](text)) is not None:
            raise Wrong(WRONG, f"{path.name}: {problem}")


def _markdown(text: str) -> str | None:
    tags = re.findall(r"(?<!\\)<[/!?]?([A-Za-z]\w*)?", text)
    if unknown := {tag for tag in tags if tag} - OWN_TAGS:
        return f"tags {unknown}"
    for line in text.splitlines():
        if line.startswith("|") and not line.rstrip().endswith("|"):
            return f"a row of a table has no end: {line!r}"
    if re.search(r"(?<!\\)\]\((?:http|//)", text.replace("](https://arxiv", "")):
        return "a link"
    return _not_numbers(text)


def _csv(text: str) -> str | None:
    rows = list(csv.reader(io.StringIO(text), strict=True))
    if len({len(row) for row in rows}) > 1:
        return "rows of different lengths"
    for cell in (cell for row in rows for cell in row):
        if cell.startswith(("=", "+", "-", "@")) and not re.fullmatch(r"[+-]?[\d.,e+-]+", cell):
            return f"a formula: {cell!r}"
    return _not_numbers(text)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        hot = [name for name, _ in attrs if name.startswith("on")]
        links = [v for name, v in attrs if name in ("href", "src") and "javascript:" in (v or "")]
        if hot or links or (tag == "img" and ("src", "x") in attrs):
            self.problem = f"<{tag} {attrs}>"


def _html(text: str) -> str | None:
    parser = _Tags()
    parser.feed(text)
    parser.close()
    if parser.problem is None and text.count("<script>alert") > 0:
        return "a script of a name"
    return parser.problem


def _svg(text: str) -> str | None:
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        return f"no XML: {error}"
    return "a script" if any(node.tag.endswith("}script") for node in root.iter()) else None


def _tex(text: str) -> str | None:
    if re.search(r"\\(input|write18)\b", text):
        return "a command of a name"
    plain = re.sub(r"\\[\\{}]", "", text)
    return "unequal braces" if plain.count("{") != plain.count("}") else _not_numbers(text)


def _json(text: str) -> str | None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return str(error)
    return None


def _not_numbers(text: str) -> str | None:
    """Return the cells and words that Python writes for what is no number."""
    cells = re.split(r"[|,;\n&\[\]]|\s-\s|(?<=\d)-", text)
    found = {cell.strip().split(" ")[0] for cell in cells} & NOT_NUMBERS
    return f"numbers {found}" if found else None
