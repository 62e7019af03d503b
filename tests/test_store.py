import errno
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cost_records import make_cost

from kdprof import store
from kdprof.errors import KdprofError, UserError
from kdprof.records import LedgerEntry, Run, Spent
from kdprof.store import RunFolder, Store, append_line, read_lines, slug, write_atomic


def test_cost_round_trip_is_exact(tmp_path):
    store = Store(tmp_path)
    cost = make_cost("cwd:feature", 0.1 + 0.2)
    path = store.write_cost(cost)
    assert path.name == "cwd.feature-key-cwd:feature.json"
    assert store.read_cost("cwd:feature", cost.key) == cost
    assert '"schema": 5' in path.read_text()


def test_records_of_the_schemas_before_are_read(tmp_path):
    store = Store(tmp_path)
    cost = make_cost("kd", 0.1)
    path = store.write_cost(cost)
    old = json.loads(path.read_text()) | {"schema": 3, "modules_flop": None}
    old["unavailable"]["modules_flop"] = "not asked for (--modules)"
    path.write_text(json.dumps(old))
    assert store.read_cost("kd", cost.key) == cost
    run = Run(
        method="kd", budget="6@kd", seed=0, device="cpu", iterations=6, schedule_iterations=6,
        iterations_done=6, miou=0.5, miou_per_class=None, best_miou=0.5,
        train_s=Spent(planned=1.0, actual=1.0), eval_s=0.0, checkpoint_s=0.0, flop=None,
        energy_j=None, cost_key="k", finished=True, versions={},
    )  # fmt: skip
    old = {key: v for key, v in run.model_dump(by_alias=True).items() if key != "kind"}
    third = {k: v for k, v in old.items() if k != "absent_classes"} | {"schema": 3}
    assert Run.model_validate(third) == run
    old = {key: v for key, v in third.items() if key != "kind"}
    old |= {"schema": 2, "beside": old.pop("concurrent_runs")}
    assert Run.model_validate(old) == run
    trunk = Run.model_validate(old | {"budget": "trunk", "beside": None})
    assert (trunk.kind, trunk.budget, trunk.concurrent_runs) == ("trunk", "", None)
    teacher = Run.model_validate(old | {"method": "teacher", "budget": "80000", "cost_key": None})
    assert (teacher.kind, teacher.method, teacher.label()) == ("teacher", "none", "teacher")


def test_damaged_record_names_file_and_mend(tmp_path):
    store = Store(tmp_path)
    path = store.write_cost(make_cost("kd", 1.0))
    path.write_text(path.read_text().replace('"latency_s"', '"latency"'))
    with pytest.raises(UserError, match=r"no Cost record.*delete it"):
        store.read_cost("kd", "key-kd")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "record.json"
    write_atomic(path, "old")

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    target = os if failing == "fsync" else type(path)
    monkeypatch.setattr(target, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_torn_last_line_is_left_out_and_damage_inside_is_not(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for i in range(3):
        append_line(path, LedgerEntry(kind="train", iteration=i, seconds=1.0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [entry.iteration for entry in read_lines(path, LedgerEntry)] == [0, 1]
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_lines(path, LedgerEntry)


@pytest.fixture
def size_limit():
    """A function that limits the size of the files that this process writes (ulimit -f)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, size_limit):
    path = tmp_path / "ledger.jsonl"
    append_line(path, LedgerEntry(kind="train", iteration=0, seconds=1.0))
    whole = path.read_bytes()
    size_limit(len(whole) + 5)
    with pytest.raises(OSError, match="File too large") as failed:
        append_line(path, LedgerEntry(kind="train", iteration=1, seconds=1.0))
    assert failed.value.filename == str(path)
    assert path.read_bytes() == whole


def _hold(path, ready, done):
    with RunFolder(path).lock():
        ready.set()
        done.wait(30)


def test_two_processes_never_share_a_run_and_a_dead_one_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(KdprofError, match="another process"), RunFolder(tmp_path).lock():
        pass
    other.kill()
    other.join()
    with RunFolder(tmp_path).lock():
        pass


def test_the_cost_that_was_measured_last_counts_not_the_file_that_was_written_last(tmp_path):
    store = Store(tmp_path / "out")
    with pytest.raises(UserError, match="holds no costs"):
        store.latest_costs()
    store.write_cost(make_cost("kd", 1.0, key="a", measured_at="2026-11-27T08:00:01Z"))
    store.write_cost(make_cost("kd", 2.0, key="b", measured_at="2026-11-27T08:00:00Z"))
    store.write_cost(make_cost("kd", 3.0, key="c"))
    assert store.latest_costs()["kd"].latency_s.median == 1.0
    # A clone writes the files in the order of their names, all at once.
    for name in "abc":
        shutil.copy(store.cost_path("kd", name), tmp_path)
        os.utime(store.cost_path("kd", name), ns=(1, 1))
    assert store.latest_costs()["kd"].latency_s.median == 1.0
    assert [cost.key for cost in store.costs()] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("moment", "when"),
    [(None, "do not say when they were measured"),
     ("2026-11-27T08:00:00Z", "were measured in the same second (2026-11-27T08:00:00Z)")],
)  # fmt: skip
def test_without_a_newest_cost_it_is_refused_and_measuring_again_mends_it(tmp_path, moment, when):
    store = Store(tmp_path)
    for key in "ba":
        store.write_cost(make_cost("kd", 1.0, key=key, measured_at=moment))
    with pytest.raises(UserError) as refused:
        store.latest_costs()
    assert refused.value.problems == (
        f"the newest Cost of kd is not known: kd-a.json and kd-b.json {when}; delete the older "
        "one, or measure again",
    )
    store.write_cost(make_cost("kd", 2.0, key="b", measured_at="2026-11-27T08:00:01Z"))
    assert store.latest_costs()["kd"].key == "b"


def test_devices_do_not_mix(tmp_path):
    store = Store(tmp_path)
    store.write_cost(make_cost("kd", 2.0))
    store.write_cost(make_cost("cwd", 2.0, device="H200"))
    with pytest.raises(UserError, match="different devices"):
        store.latest_costs()


def test_a_path_that_leads_nowhere_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="its links form a loop"):
        store.absolute(str(tmp_path / "loop" / "file.py"))
    for read in (store.absolute, store.expanded):
        with pytest.raises(UserError, match="home folder of ~nosuchaccount-x is not known"):
            read("~nosuchaccount-x/weights.pth")
    assert store.absolute(str(tmp_path / "a" / ".." / "b")) == tmp_path.resolve() / "b"


def test_slug():
    assert slug("40k@cwd:feature") == "40k@cwd.feature"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system as some clusters have it: flock is not implemented."""

    def refuse(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(store.fcntl, "flock", refuse)


def test_without_locks_the_lease_alone_tells_who_trains(tmp_path, no_locks):
    assert not Store(tmp_path / "new" / "folder").has_locks()
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        lease = json.loads((folder.path / "lock").read_text())
        assert lease["pid"] == os.getpid()
        (folder.path / "lock").write_text(json.dumps(lease | {"pid": os.getppid()}))
        assert folder.is_held()
        with pytest.raises(store.Held, match=f"process {os.getppid()}"), folder.lock():
            pass
    process = subprocess.Popen(["true"])
    process.wait()
    (folder.path / "lock").write_text(json.dumps(lease | {"pid": process.pid}))
    with folder.lock():
        assert folder.path.exists()


def test_without_locks_the_last_lease_decides_between_two_at_once(tmp_path, no_locks, monkeypatch):
    folder = RunFolder(tmp_path)

    def other(seconds):
        (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere 1", "pid": 7}))

    monkeypatch.setattr("time.sleep", other)
    with pytest.raises(store.Held, match=r"on elsewhere \(process 7\)"), folder.lock():
        pass


@pytest.fixture
def now_on(monkeypatch):
    """Let the locks that are taken from now on be taken on a machine of a name."""
    monkeypatch.setattr(store, "SETTLE_S", 0.0)
    return lambda host: monkeypatch.setattr(store, "_host", lambda: host)


def test_who_slept_longer_than_its_lease_finds_it_taken(tmp_path, no_locks, now_on):
    """Two machines: the second one takes the lease while the first one sleeps."""
    first, second, lock = RunFolder(tmp_path), RunFolder(tmp_path), tmp_path / "lock"
    now_on("first 1")
    with first.lock():
        first.renew_lease()
        os.utime(lock, (0, 0))
        now_on("second 2")
        with second.lock():
            with pytest.raises(store.Lost, match=r"being trained on second \(process \d+\), which"):
                first.renew_lease()
            second.renew_lease()
            assert json.loads(lock.read_text())["host"] == "second 2"
            taken = lock.read_text()
        lock.write_text(taken)
    assert lock.read_text() == taken  # who lost it does not end the other's


def test_who_slept_until_the_taker_has_ended_has_lost_it_all_the_same(tmp_path, no_locks, now_on):
    first, second, lock = RunFolder(tmp_path), RunFolder(tmp_path), tmp_path / "lock"
    now_on("first 1")
    with first.lock():
        os.utime(lock, (0, 0))
        now_on("second 2")
        with second.lock():
            pass
        for _ in range(2):  # it does not take the lease back
            with pytest.raises(store.Lost, match=f"{tmp_path} .*took it over .* has ended"):
                first.renew_lease()
        assert lock.read_text() == ""


def test_a_damaged_lease_is_no_longer_its_holders(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.lock():
        (tmp_path / "lock").write_text('{"host": "else')
        with pytest.raises(store.Lost):
            folder.renew_lease()
        assert (tmp_path / "lock").read_text() == '{"host": "else'


def test_a_machine_that_gets_another_name_keeps_its_locks(tmp_path, monkeypatch):
    """As from DHCP, while a run is trained."""
    folder, lock = RunFolder(tmp_path), tmp_path / "lock"
    monkeypatch.setattr("socket.gethostname", lambda: "old-name")
    with folder.lock():
        monkeypatch.setattr("socket.gethostname", lambda: "new-name.example")
        os.utime(lock, (0, 0))
        folder.renew_lease()
        assert lock.stat().st_mtime > 0
        lock.unlink()
        folder.renew_lease()
        assert json.loads(lock.read_text())["host"].split()[0] == "old-name"
    assert lock.read_text() == ""  # free at once, for whoever is next


def test_a_lease_is_renewed_without_being_written(tmp_path):
    """Written, it would be empty for a moment, and need room on a full disk."""
    folder, lock = RunFolder(tmp_path), tmp_path / "lock"
    with folder.lock():
        os.utime(lock, (0, 0))
        lock.chmod(0o444)
        folder.renew_lease()
        assert lock.stat().st_mtime > 0
        lock.unlink()
        folder.renew_lease()
        assert json.loads(lock.read_text())["pid"] == os.getpid()


@pytest.fixture
def read_only():
    """A run in a colleague's folder; nothing in it can be written, by root neither."""
    with tempfile.TemporaryDirectory() as name:
        folder, me = Path(name), os.geteuid()
        (folder / "lock").touch()
        folder.chmod(0o555)
        (folder / "lock").chmod(0o444)
        if me == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(me)
        folder.chmod(0o755)


def test_whether_a_read_only_run_is_held_is_told_or_not_known(read_only, monkeypatch):
    run = RunFolder(read_only)
    assert run.is_held() is False
    with (read_only / "lock").open() as other:
        store.fcntl.flock(other, store.fcntl.LOCK_EX)
        assert run.is_held() is True
    assert run.is_held() is False
    monkeypatch.setattr(store, "_lease", lambda text: {"host": "elsewhere", "pid": 7})
    assert run.is_held() is None
    assert RunFolder(read_only / "none").is_held() is False


@pytest.mark.parametrize(
    ("age_s", "held"), [(60, True), (1000, False), (-60, True), (-1000, False)]
)
def test_the_age_of_a_lease_is_told_by_the_file_systems_clock(tmp_path, monkeypatch, age_s, held):
    """Not by the calendars of two machines, which may differ or be set meanwhile."""
    folder = RunFolder(tmp_path)
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7, "renewed": 0.0}))
    then = lock.stat().st_mtime - age_s
    os.utime(lock, (then, then))
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert folder.is_held() is held
    assert list(tmp_path.iterdir()) == [lock]


def test_files_of_one_call_are_replaced_together_or_not_at_all(tmp_path, monkeypatch):
    one, other = tmp_path / "costs.md", tmp_path / "costs.csv"
    one.write_text("old")

    def full(number):
        if len(list(tmp_path.glob(".*.tmp"))) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        store.write_together({one: "new", other: "new"})
    assert failed.value.filename == str(other)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"costs.md": "old"}


def test_a_folder_in_which_train_first_measures_is_told_from_an_empty_one(tmp_path):
    with pytest.raises(UserError, match="holds no study"):
        Store(tmp_path).require()
    Store(tmp_path).write_cost(make_cost("kd"))
    with pytest.raises(UserError, match="is measuring there"):
        Store(tmp_path).require()
