import io
import json
import os
from pathlib import Path

import pytest
from cost_records import alike, gpu_cost, make_cost, memory
from rich.console import Console

from kdprof.errors import UserError
from kdprof.records import Canary, Cost, Ratio
from kdprof.reports.comparison import NOISE_THRESHOLD, compare, read_costs
from kdprof.reports.comparison_table import comparison_table
from kdprof.store import Store, to_json

SNAPSHOTS = Path(__file__).parent / "snapshots"


def noisy(method="cwd", factor=1.0, spread=0.002, **changes) -> Cost:
    """Twelve rounds around 0.2 s that differ by ``spread``."""
    rounds = [[0.2 * factor * (1 + spread * (place % 3 - 1))] * 3 for place in range(12)]
    return make_cost(method, 0.2 * factor, samples_s=rounds, **changes)


def canary(median: float) -> Canary:
    return Canary(median_s=median, drift=0.0, steady=True, samples_s=[median] * 8)


def only(old: Cost, new: Cost, **options):
    (row,) = compare([old], [new], **options).rows
    return row


# Verdicts


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [
        (1.00, "within noise"),
        (1.005, "within noise"),
        (0.995, "within noise"),
        (1.05, "slower"),
        (0.95, "faster"),
    ],
)
def test_a_change_counts_beyond_the_threshold(factor, verdict):
    row = only(noisy(), noisy(factor=factor, session="later"))
    assert row.latency[0] == pytest.approx(factor)
    assert (row.verdict, row.threshold) == (verdict, NOISE_THRESHOLD)
    assert row.latency[1] <= factor <= row.latency[2]


def test_the_whole_interval_has_to_be_beyond():
    """3 % slower, measured so badly that 1 % is inside the interval."""
    row = only(noisy(spread=0.05), noisy(factor=1.03, spread=0.05, session="later"))
    assert row.latency[1] < 1.01 < row.latency[0]
    assert row.verdict == "within noise"


@pytest.mark.parametrize(("threshold", "verdict"), [(0.01, "slower"), (0.06, "within noise")])
def test_the_threshold_can_be_chosen(threshold, verdict):
    assert only(noisy(), noisy(factor=1.05), noise_threshold=threshold).verdict == verdict


@pytest.mark.parametrize(("factor", "word"), [(1.05, "slower"), (0.95, "faster")])
def test_a_machine_that_changed_speed_widens_the_threshold(factor, word):
    old, new = noisy(canary=canary(1e-3)), noisy(factor=factor, canary=canary(factor * 1e-3))
    found = compare([old], [new])
    (row,) = found.rows
    assert row.threshold == pytest.approx(0.06)
    assert row.verdict == "within noise"
    assert f"cwd (5.0 % {word})" in " ".join(found.notes)


def test_canaries_of_different_devices_say_nothing():
    old = noisy(canary=canary(1e-3), device="one")
    found = compare([old], [noisy(factor=1.05, canary=canary(2e-3), device="other")])
    assert (found.rows[0].threshold, found.rows[0].verdict) == (NOISE_THRESHOLD, "slower")
    notes = " ".join(found.notes)
    assert "Different devices: old one; new other." in notes
    assert "changed speed" not in notes
    assert "canary on both sides" not in notes


# The other changes


def test_ratio_to_the_reference_cancels_the_machine():
    """Twice as slow in all: the ratio stays. Its error is that of both."""
    ratio = Ratio(median=2.0, low=2 / 1.03, high=2 * 1.03, to="none")
    moved = Ratio(median=2.2, low=2.2 / 1.04, high=2.2 * 1.04, to="none")
    row = only(noisy(ratio=ratio), noisy(factor=2.0, ratio=ratio))
    assert (row.verdict, row.relative[0]) == ("slower", pytest.approx(1))
    row = only(noisy(ratio=ratio), noisy(ratio=moved))
    assert row.relative[0] == pytest.approx(1.1)
    assert row.relative[2] == pytest.approx(1.1 * 1.0505, rel=1e-3)


def test_ratios_that_do_not_compare_are_left_out():
    other = Ratio(median=1, low=1, high=1, to="kd")
    row = only(noisy(), noisy(ratio=other))
    assert (row.relative, row.missing["relative"]) == (
        None,
        "old is relative to none, new to kd",
    )
    assert only(noisy("none"), noisy("none")).missing["relative"] == "the reference itself"


def test_flop_memory_and_energy_are_new_over_old():
    old, new = (
        noisy(flop=2e9, energy_j=4.0),
        noisy(flop=3e9, energy_j=3.0, memory_bytes=memory(process=2**31)),
    )
    row = only(old, new)
    assert (row.flop, row.memory, row.energy) == (1.5, 2.0, 0.75)
    row = only(noisy(), new)
    assert (row.energy, row.missing["energy"]) == (None, "no counter")


def test_peaks_of_two_kinds_are_not_compared():
    allocated = memory(peak_allocated=2**30)
    row = only(noisy(), noisy(memory_bytes=allocated))
    assert (row.memory, row.missing["memory"]) == (None, "no peak of the same kind in both")


def test_counted_costs_compare_by_flop_alone():
    counted = {"latency_s": None, "ratio": None, "samples_s": []}
    why = {"latency_s": "counted, not run", "ratio": "counted, not run"}
    old, new = (make_cost("cwd", flop=f, unavailable=why, **counted) for f in (2e9, 1e9))
    row = only(old, new)
    assert (row.latency, row.verdict, row.flop) == (None, None, 0.5)
    assert row.missing["latency"] == row.missing["relative"] == "counted, not run"
    assert "No new / old (cwd): counted, not run." in printed(compare([old], [new]))


# Notes


def test_methods_in_one_set_only_are_listed_and_none_in_common_is_refused():
    found = compare([noisy("a"), noisy("b")], [noisy("b"), noisy("c")])
    assert [row.method for row in found.rows] == ["b"]
    assert found.notes[-2:] == ["Only in old: a.", "Only in new: c."]
    with pytest.raises(UserError, match="no method in common: old has a, new has b") as error:
        compare([noisy("a")], [noisy("b")])
    assert "\n" not in str(error.value)


def test_differences_of_settings_and_versions_are_named_once():
    was = {"settings": {"step": {"batch": 4, "crop": [1, 2]}}, "versions": {"torch": "2.6"}}
    now = {"settings": {"step": {"batch": 8, "crop": [1, 2]}}, "versions": {"torch": "2.7"}}
    old, new = ([noisy(m, **more) for m in ("kd", "cwd")] for more in (was, now))
    notes = compare(old, new).notes
    assert "Different settings: step.batch 4 -> 8 (all methods)." in notes
    assert "Different versions: torch 2.6 -> 2.7 (all methods)." in notes
    notes = " ".join(compare(old, [old[0], new[1]]).notes)
    assert "step.batch 4 -> 8 (cwd)." in notes


def test_unreliable_costs_and_missing_canaries_are_told():
    found = compare([noisy(reliable=False, warnings=["throttled"])], [noisy(session="later")])
    assert not found.rows[0].reliable
    assert found.unreliable == ["cwd (old) is UNRELIABLE: throttled."]
    assert any(note.startswith("No canary on both sides (cwd)") for note in found.notes)
    assert "cwd†" in printed(found)


def test_the_same_measurement_twice_is_noted():
    assert "Old and new are the same measurement (cwd)." in compare([noisy()], [noisy()]).notes


# Reading


def test_costs_are_read_from_one_record_a_list_and_a_folder(tmp_path):
    cost, other = gpu_cost("cirkd"), noisy("cwd")
    path = tmp_path / "costs.json"
    path.write_text(cost.model_dump_json(by_alias=True))
    assert read_costs(path) == [cost]
    path.write_text(to_json([cost, other]))
    assert read_costs(path) == [cost, other]
    store = Store(tmp_path / "out")
    store.write_cost(other)
    assert read_costs(store.root) == [other]


def test_what_is_no_cost_is_refused_in_one_line(tmp_path):
    good = json.loads(to_json([noisy()]))[0]
    bad = {**good, "reliable": "perhaps", "samples_s": "none"}
    del bad["device"]
    cases = {
        "nothing": ("", "is not a JSON file of costs"),
        "empty": ("[]", "holds no costs"),
        "number": ("[3]", "record 1 is not a cost"),
        "run": ('{"schema": 1, "seed": 0}', "record 1 is not a cost"),
        "old": (json.dumps(good | {"schema": 1}), "has schema 1, not 5; measure again"),
        "bad": (json.dumps([good, bad]), r"record 2 \(cwd\): device.*samples_s.*reliable"),
        "binary": (b"\xff\xfe", "is not UTF-8 text"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message) as error:
            read_costs(path)
        assert "\n" not in str(error.value)
        assert len(error.value.problems) == 1
    with pytest.raises(UserError, match=r"cannot read .*absent: No such file"):
        read_costs(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no costs; run 'kdprof measure"):
        read_costs(tmp_path)


def test_records_of_the_schema_before_are_read(tmp_path):
    old = json.loads(to_json([noisy()]))[0] | {"schema": 3, "modules_flop": None}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_costs(tmp_path / "old.json") == [noisy()]


# The table


def printed(comparison) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    comparison_table(comparison, console)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def later(method: str, factor: float, **changes) -> Cost:
    cost = gpu_cost(method)
    samples = [[factor * seconds for seconds in part] for part in cost.samples_s]
    found = {"samples_s": samples, "latency_s": alike(factor * cost.latency_s.median)}
    return cost.model_copy(update=found | {"session": f"later-{method}"} | changes)


def a_comparison():
    old = [gpu_cost(method) for method in ("none", "kd", "cwd", "cirkd")]
    faster = Ratio(median=3.1, low=3.08, high=3.12, to="none")
    new = [
        later("none", 1.003),
        later("kd", 1.052, canary=canary(2.17e-4), versions={"torch": "2.7"}),
        later("cirkd", 0.9, ratio=faster, reliable=False, warnings=["the GPU was throttled"]),
        make_cost("mgd"),
    ]
    return compare(old, new)


def test_rendered_comparison_snapshot():
    """Run with KDPROF_UPDATE_SNAPSHOTS=1 to accept a change, and review its diff."""
    path, found = SNAPSHOTS / "comparison.txt", printed(a_comparison())
    if os.environ.get("KDPROF_UPDATE_SNAPSHOTS"):
        path.write_text(found)
    assert found == path.read_text()


def test_comparison_fits_a_terminal_of_a_hundred_columns():
    text = printed(a_comparison())
    assert max(map(len, text[: text.index("new / old is")].splitlines())) <= 100
