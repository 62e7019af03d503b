"""Every field of every record refuses what it cannot be; a stored record is what it says it is."""

import json
import math
import os
import re
import threading
import typing

import pytest
from cost_records import gpu_cost, make_cost
from pydantic import BaseModel, ValidationError

from kdprof.errors import UserError
from kdprof.records import (
    Cost,
    CurvePoint,
    Decision,
    Effect,
    Failure,
    Interval,
    LedgerEntry,
    LogLine,
    Look,
    Ratio,
    Record,
    Run,
    Spent,
)
from kdprof.store import Store, read_file, read_record, read_text, write_record
from kdprof.visible import printable

IMPOSSIBLE = (math.nan, math.inf, -math.inf)
MAY_BE_NEGATIVE = {
    "Cost.hidden_cost", "TermCost.weight", "Effect.value", "Effect.low", "Effect.high",
    "Look.value", "Look.low", "Look.high", "CurvePoint.losses", "LogLine.losses",
}  # fmt: skip
SHARES = {"miou", "best_miou", "miou_per_class", "miou_of", "confidence", "probability"}


def a_run(method="kd", budget="6@kd", seed=0, **changes) -> Run:
    fields = {
        "method": method, "budget": budget, "seed": seed, "device": "cpu", "iterations": 6,
        "schedule_iterations": 6, "iterations_done": 6, "miou": 0.5,
        "miou_per_class": {"road": 0.5, "sky": None}, "miou_of": {"old": 0.5}, "best_miou": 0.6,
        "train_s": Spent(planned=1.0, actual=1.0), "trunk_s": 0.5, "eval_s": 0.1,
        "checkpoint_s": 0.1, "data_wait_s": 0.1, "flop": 1e9, "energy_j": 2.0, "cost_key": "k",
        "finished": True, "versions": {},
        "failure": Failure(iteration=1, term="kd", reason="nan", checkpoint_iteration=0),
    }  # fmt: skip
    return Run(**(fields | changes))


RECORDS: list[Record] = [
    gpu_cost("cirkd"),
    make_cost("kd"),
    a_run(),
    CurvePoint(iteration=1, train_s=1.0, miou=0.5, losses={"kd": 1.0}, learning_rate=0.1),
    LogLine(iteration=1, train_s=1.0, losses={"kd": 1.0}, learning_rate=0.1),
    LedgerEntry(kind="train", iteration=1, seconds=1.0, energy_j=1.0),
    Effect(unit="points", value=1.0, low=0.5, high=2.0, probability=0.9),
    Decision(
        statement="a > b @ 2h", confidence=0.95, max_seeds=12, outcome="supported",
        looks=[Look(seeds=2, value=1.0, low=0.5, high=2.0)], saved_runs=1, saved_s=1.0,
    ),
]  # fmt: skip


def numbers_in(record: BaseModel, path=()):
    """Yield (owner.field, path) of every number that a record can hold and holds."""
    for name in type(record).model_fields:
        yield from _numbers(getattr(record, name), f"{type(record).__name__}.{name}", (*path, name))


def _numbers(value, label, path):
    if isinstance(value, BaseModel):
        yield from numbers_in(value, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, label, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value[:2]):
            yield from _numbers(item, label, (*path, number))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield label, path


def changed(record: Record, path, value):
    content = record.model_dump()
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return lambda: type(record).model_validate(content)


FREE = {"hardware", "timing", "settings", "schema_version"}
CASES = [
    (record, label, path)
    for record in RECORDS
    for label, path in numbers_in(record)
    if path[0] not in FREE
]


def test_the_cases_cover_every_number_of_every_record():
    """So that a new field is either given here, with a range, or this test fails."""
    seen = {label for _, label, _ in CASES}
    kinds = {type(r) for r in RECORDS} | {Interval, Ratio, Spent, Failure, Look}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            text = str(field.annotation)
            if re.search(r"\b(float|int)\b", text) and name not in FREE:
                found = f"{kind.__name__}.{name}" in seen
                assert found or kind is Interval or name == "loggers", f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("record", "label", "path"), CASES, ids=[f"{type(r).__name__}-{p}" for r, _, p in CASES]
)
def test_a_number_is_finite_and_in_its_range(record, label, path):
    for value in IMPOSSIBLE:
        with pytest.raises(ValidationError):
            changed(record, path, value)()
    if label not in MAY_BE_NEGATIVE:
        with pytest.raises(ValidationError):
            changed(record, path, -1)()
    if SHARES & set(path):
        with pytest.raises(ValidationError):
            changed(record, path, 5.0)()


@pytest.mark.parametrize(
    ("low", "median", "high"), [(2.0, 1.0, 3.0), (0.5, 3.0, 2.0), (0.0, 1.0, 2.0), (-1.0, 1.0, 2.0)]
)
def test_an_interval_is_in_order_and_above_zero(low, median, high):
    with pytest.raises(ValidationError):
        Interval(low=low, median=median, high=high)


@pytest.mark.parametrize("kind", [Effect, Look])
def test_what_a_claim_is_about_lies_within_its_interval(kind):
    fields = {Effect: {"unit": "points", "probability": None}, Look: {"seeds": 2}}[kind]
    with pytest.raises(ValidationError, match="in this order"):
        kind(**fields, value=3.0, low=0.5, high=2.0)


@pytest.mark.parametrize("value", IMPOSSIBLE)
def test_numbers_whose_names_are_free_are_finite_too(value):
    """They would be stored as null and read back as another record."""
    for field in sorted(FREE - {"schema_version"}):
        for facts in ({"a": value}, {"a": {"b": [1.0, value]}}):
            with pytest.raises(ValidationError, match="finite numbers"):
                make_cost("kd", **{field: facts})


HOSTILE = ["\x1b[31m", "a\x07", "a\x9bb", "a\u202eb", "a\nb", "", "x" * 301]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_visible(name):
    for field in ("method", "device"):
        with pytest.raises(ValidationError):
            changed(a_run(), (field,), name)()
        with pytest.raises(ValidationError):
            changed(make_cost("kd"), (field,), name)()
    assert printable(name).isprintable()


@pytest.mark.parametrize("name", ["..", "a/b", "a.b", "=1+1", "a b", "<img>", "a:b:c"])
def test_a_run_is_of_a_method_that_a_folder_can_be_named_after(name):
    with pytest.raises(ValidationError, match="name of a method"):
        a_run(name)


def test_a_record_lies_where_it_says(tmp_path):
    store = Store(tmp_path)
    write_record(store.run_folder("kd", "6@kd", 0).record, a_run("cwd"))
    with pytest.raises(UserError, match=r"the record of cwd 6@kd seed 0.*runs/cwd/6@kd/0"):
        store.runs()
    path = store.write_cost(make_cost("kd"))
    path.rename(path.with_name("cwd-key-kd.json"))
    with pytest.raises(UserError, match="holds the cost of 'kd'"):
        store.costs()
    with pytest.raises(UserError, match="holds the cost of 'kd'"):
        store.read_cost("cwd", "key-kd")


def test_a_link_to_no_record_is_named(tmp_path):
    store = Store(tmp_path)
    path = store.write_cost(make_cost("kd"))
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"cannot read .*cost.*: No such file"):
        store.costs()


def test_infinity_in_json_is_no_number(tmp_path):
    path = Store(tmp_path).write_cost(make_cost("kd"))
    content = json.loads(path.read_text())
    content["ratio"]["median"] = math.inf
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no Cost record.*ratio"):
        read_record(path, Cost)


def within(seconds: float, work: typing.Callable[[], object]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    (tmp_path / "latin").write_bytes("Stra\xdfe".encode("latin-1"))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfroad")

    def refused():
        for path, cause in (
            (pipe, "pipe or device"), ("/dev/zero", "pipe or device"), (tmp_path, "folder"),
            (large, "MiB"), (tmp_path / "none", "No such file"), (tmp_path / ("x" * 5000), "long"),
            (tmp_path / "a\0b", "null (byte|character)"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=cause):
                read_file(path)

    failed: list[BaseException] = []

    def work():
        try:
            refused()
        except BaseException as error:
            failed.append(error)

    within(20, work)
    assert not failed
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_text(tmp_path / "latin")
    assert read_text(tmp_path / "marked") == "road"


def test_when_a_cost_was_measured_is_a_time_in_utc_or_not_known():
    made = make_cost("kd", 1.0, measured_at="2026-11-27T08:00:00Z")
    assert Cost.model_validate_json(made.model_dump_json(by_alias=True)) == made
    older = json.loads(made.model_dump_json(by_alias=True))
    del older["measured_at"]
    assert Cost.model_validate(older).measured_at is None
    for text in ("2026-11-27 08:00:00", "2026-11-27T08:00:00+01:00", "yesterday"):
        with pytest.raises(ValidationError):
            make_cost("kd", 1.0, measured_at=text)
