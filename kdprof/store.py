"""The folder of results: layout, atomic writes, locks.

Only this module knows file names::

    study.toml                        the resolved study
    costs/<method>-<key>.json         Cost records
    steps/<name>-<key>.json           Cost records of users' steps
    teacher/                          the teacher's run, with its weights
    trunks/<method>/<seed>/           the trunk of a method's wsd runs, state-<iteration>.pt
    runs/<method>/<budget>/<seed>/    run.json ledger.jsonl log.jsonl curve.jsonl checkpoint.pt
    claims/<name>.json .md .tex       claims, see reports/claims.py
    decisions/<name>.json             claims for which seeds were trained until they were decided
    reports/                          figures and tables
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import stat
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from kdprof.errors import KdprofError, UserError
from kdprof.records import Cost, CurvePoint, Decision, LedgerEntry, Record, Run, RunKind

AnyRecord = TypeVar("AnyRecord", bound=Record)


LARGEST_FILE = 256 * 2**20
"""Bytes of the largest file that is read as a whole: a record of a million samples has 20 MB."""


LARGEST_LOG = 2**30
"""Bytes of the largest .jsonl file: ten million lines."""


def expanded(path: str) -> Path:
    """Return a path that a user wrote, with the home folder in place of ``~``.

    Raises:
        UserError: it begins with ``~NAME`` and there is no such account.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: the home folder of {path.partition('/')[0]} is not known; write it out"
        ) from None


def absolute(path: str) -> Path:
    """Return the absolute path of a file that a user wrote; ``~`` and links are followed.

    Raises:
        UserError: it has no home folder (see :func:`expanded`), or links form a loop.
    """
    file = expanded(path)
    try:
        file.stat()  # resolve() alone sees no loops from Python 3.13 on
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: its links form a loop; repair them") from None
    return file.resolve()


def read_file(path: Path, most: int = LARGEST_FILE) -> bytes:
    """Return the content of a regular file: never wait for a pipe or read a device without end.

    Args:
        most: bytes of the largest file that is read.

    Raises:
        UserError: it is no regular file, is too large, or cannot be read.
    """
    try:
        # Not Path.open(), which waits for the other end of a pipe.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            check_regular(path, os.fstat(number), most)
            with os.fdopen(number, "rb", closefd=False) as file:
                return file.read(most)
        finally:
            os.close(number)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; give another file") from None


def check_regular(path: Path, found: os.stat_result, most: int) -> None:
    """Refuse what is no regular file or is too large.

    Args:
        found: what the system says about it.
        most: bytes of the largest file that is read.

    Raises:
        UserError: it is a folder, a pipe or a device, or is larger.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = "folder" if stat.S_ISDIR(found.st_mode) else "pipe or device"
        raise UserError(f"{path} is a {kind}, not a file; give a file")
    if found.st_size > most:
        raise UserError(
            f"{path} has {found.st_size / 2**20:,.0f} MiB, more than the {most / 2**20:,.0f} MiB "
            "that are read; give another file"
        )


def read_text(path: Path, most: int = LARGEST_FILE) -> str:
    """Return the text of a regular file, see :func:`read_file`.

    Raises:
        UserError: it cannot be read, or its text is not UTF-8.
    """
    try:
        return read_file(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


_DEEP_KEY = re.compile(r"^[^=#'\"\n]*?(?:[\w-]+[ \t]*\.[ \t]*){50}", re.MULTILINE)
"""For a key of n parts tomllib needs n * n memory."""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def read_toml(path: Path, most: int = LARGEST_FILE) -> dict[str, Any]:
    """Return the content of a TOML file, see :func:`read_file`.

    Raises:
        UserError: it cannot be read, or is no TOML.
    """
    try:
        text = read_text(path, most)
        if _DEEP_KEY.search(text):
            raise ValueError("a key has more than 50 parts")
        return tomllib.loads(text, parse_float=_finite)
    # ValueError: tomllib's own error, and Python's of a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; correct it") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error of the system while ``path`` is written say so."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def short_hash(content: bytes | str) -> str:
    """Return a hash as identities write it: ``sha256:`` and 16 digits."""
    content = content if isinstance(content, bytes) else content.encode()
    return shortened_hash(hashlib.sha256(content).hexdigest())


def shortened_hash(digest: str) -> str:
    """Return a SHA-256 as identities write it, see :func:`short_hash`."""
    return f"sha256:{digest[:16]}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` so that a crash leaves either the old file or the new one."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Replace several files: none of them if the disk has no room for all."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, data in files.items():
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary[path].open("wb") as file:
                    file.write(data if isinstance(data, bytes) else data.encode())
                    file.flush()
                    os.fsync(file.fileno())
        for path in files:
            replace_durably(temporary[path], path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def replace_durably(source: Path, target: Path) -> None:
    """Rename ``source`` over ``target`` so that the rename survives a power failure."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_atomic(path, record_json(record))


def record_json(record: Record) -> str:
    """Return a record as the text of its file."""
    return record.model_dump_json(indent=2, by_alias=True) + "\n"


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read and validate a record.

    Raises:
        UserError: the file is not a record of this kind and schema.
    """
    try:
        return kind.model_validate_json(read_file(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise UserError(
            f"{path} is no {kind.__name__} record that this version can read ({where}: "
            f"{first['msg']}); delete it and make it again"
        ) from None


def append_line(path: Path, record: Record) -> None:
    """Append one record to a .jsonl file durably, or leave the file as it was.

    Raises:
        OSError: the disk, a quota or a limit is used up.
    """
    left = memoryview(record.model_dump_json(by_alias=True).encode() + b"\n")
    # Unbuffered: a buffer would be written once more when the file is closed.
    with naming(path), path.open("ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            while left:  # a full disk takes a part of it first
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(whole)
            raise


def read_lines(path: Path, kind: type[AnyRecord]) -> list[AnyRecord]:
    """Read a .jsonl file; a last line that a crash left incomplete is left out."""
    if not path.exists():
        return []
    lines = read_file(path, LARGEST_LOG).split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is damaged; delete the run's folder and train it again"
                ) from None
    return records


def slug(name: str) -> str:
    """Return a method or budget name as a folder name (``cwd:feature`` -> ``cwd.feature``). No two
    methods share one: their names have no dots."""
    return name.replace(":", ".").replace("/", "-")


def run_place(kind: RunKind, method: str, budget: str, seed: int) -> Path:
    """Return the folder of a run within a folder of results."""
    if kind == "teacher":
        return Path("teacher")
    if kind == "trunk":
        return Path("trunks", slug(method), str(seed))
    return Path("runs", slug(method), slug(budget), str(seed))


def cost_file_name(method: str, key: str) -> str:
    """Return the name of the file of a Cost."""
    return f"{slug(method)}-{key}.json"


_RELATIONS = {">": "gt", "<": "lt", "~": "like"}


def claim_slug(statement: str) -> str:
    """Return a claim as a file name: ``fitnet-gt-kd-40k@cwd``."""
    words = re.sub(r"[(),]|@ ", " ", statement).split()
    return slug("-".join(_RELATIONS.get(word, word) for word in words))


class RunFolder:
    """The files of one run.

    Args:
        root: the folder of results, in which the run's own folder tells which run it is; None if
            nothing does.
    """

    def __init__(self, path: Path, root: Path | None = None):
        self.path, self._root = path, root
        self.record = path / "run.json"
        self.ledger = path / "ledger.jsonl"
        self.curve = path / "curve.jsonl"
        self.log = path / "log.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.previous_checkpoint = path / "checkpoint.previous.pt"
        self._lock = Lock(path / "lock", str(path), "trained", "wait for it, or use another --out")

    def mark(self, iteration: int) -> Path:
        """Return the file of a trunk's state at an iteration."""
        return self.path / f"state-{iteration}.pt"

    def read_run(self) -> Run | None:
        """Return the run's record, or None if none is written yet.

        Raises:
            UserError: the record cannot be read, or is that of another run.
        """
        if not self.record.exists():
            return None
        run = read_record(self.record, Run)
        wanted = run_place(run.kind, run.method, run.budget, run.seed)
        if self._root is not None and self.path.relative_to(self._root) != wanted:
            raise UserError(
                f"{self.record} is the record of {run.label()}, whose folder is {wanted}; put it "
                "there, or delete it and train again"
            )
        return run

    def read_curve(self) -> list[CurvePoint]:
        """Return the evaluations made so far."""
        return read_lines(self.curve, CurvePoint)

    def read_ledger(self) -> list[LedgerEntry]:
        """Return the compute spent so far, entry by entry."""
        return read_lines(self.ledger, LedgerEntry)

    def lock(self) -> AbstractContextManager[None]:
        """Lock the run for this process, see :class:`Lock`.

        Raises:
            Held: another process is training this run.
        """
        return self._lock.hold()

    def renew_lease(self) -> None:
        """Show other processes that the holder of the lock is alive.

        Raises:
            Lost: another process has taken the lease.
        """
        self._lock.renew()

    def is_held(self) -> bool | None:
        """Return whether a process is training this run now; None if that is not known."""
        return self._lock.is_held()


LEASE_S = 900.0
"""How long a lease of another machine is valid; much longer than anything between two renewals."""
SETTLE_S = 0.5
"""Where there are no locks: from the lease of one process until another one sees it."""
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""Errors of a file system that has no locks."""


class Held(KdprofError):
    """Another process holds a lock, so this one cannot have it."""


class Lost(KdprofError):
    """Another process has taken a lock that this one held."""


class Lock:
    """A file that at most one process holds at a time.

    The operating system releases the lock when the process ends, for whatever reason. Another
    machine may see the folder but not that lock, and some file systems have no locks; then the
    lease in the file counts. Its holder renews it, and it expires :data:`LEASE_S` after that. A
    holder whose machine slept for longer may find that it is, or was, another's.

    Args:
        what: what is locked, for messages.
        done: what its holder does to it, as in "is being trained".
        fix: what to do while another process holds it.
    """

    def __init__(self, path: Path, what: str, done: str, fix: str):
        self.path, self._what, self._fix = path, what, fix
        self._held = f"{what} is being {done}"
        self._own: dict[str, Any] = {}
        """The lease of this process while it holds the lock. It stays the same for as long: the
        machine may get another name meanwhile."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock; its folder is made if it is missing.

        Raises:
            Held: another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as file:
            locked = self._take(file)
            self._own = {"host": _host(), "pid": os.getpid()}
            self._write_lease()
            if not locked:
                time.sleep(SETTLE_S)  # another process may have found the file free, too
                if (lease := self._lease()) is not None and lease != self._own:
                    raise Held(f"{self._held_by(lease)}; {self._fix}")
            try:
                yield
            finally:
                if self._lease() == self._own:
                    os.truncate(self.path, 0)  # not ``file``, which may have been removed

    def renew(self) -> None:
        """Show other processes that the holder is alive.

        Raises:
            Lost: another process has taken the lease; it may have ended since.
        """
        if not self.path.exists():  # someone has removed it
            self._write_lease()
        elif (lease := self._lease()) == self._own:
            os.utime(self.path)  # not written: for a moment the file would be empty
        else:
            raise self._lost_to(lease)

    def _write_lease(self) -> None:
        with naming(self.path):
            self.path.write_text(json.dumps(self._own))

    def _lease(self) -> dict[str, Any] | None:
        """Return the lease in the file; None if there is none."""
        return _lease(self.path.read_text()) if self.path.exists() else None

    def is_held(self) -> bool | None:
        """Return whether a process holds the lock now; None if this process may not find out."""
        try:
            with self.path.open() as file:
                return _is_held(file)
        except FileNotFoundError:
            return False
        except OSError:
            return None

    def _held_by(self, lease: dict[str, Any]) -> str:
        return f"{self._held} on {lease['host'].split()[0]} (process {lease['pid']})"

    def _lost_to(self, lease: dict[str, Any] | None) -> Lost:
        """Return the error of a holder that finds another lease, or none as a holder leaves it."""
        when = "took it over while this one could not renew its lease"
        if lease is None:
            return Lost(
                f"{self._what} is no longer this process's: another one {when}, and has ended; "
                "run the same command again"
            )
        return Lost(f"{self._held_by(lease)}, which {when}; {self._fix}")

    def _take(self, file: IO[str]) -> bool:
        """Take the lock, and return False if the file system has no locks.

        Raises:
            Held: a process of this machine holds the lock or, without locks, a lease; or one of
                another machine a lease.
        """
        try:
            locked = _flock(file)
        except BlockingIOError:
            raise Held(f"{self._held} by another process; {self._fix}") from None
        file.seek(0)
        lease = _lease(file.read())
        if lease is not None and _is_alive(lease, file, locked=locked):
            raise Held(f"{self._held_by(lease)}; {self._fix}")
        return locked


def has_locks(folder: Path) -> bool:
    """Return whether files in a folder can be locked. Without locks, leases are used alone."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _flock(file)


def _flock(file: IO[Any], how: int = fcntl.LOCK_EX) -> bool:
    """Lock a file; return False if its file system has no locks.

    Args:
        how: ``LOCK_SH`` for a file that is open for reading only.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_held(file: IO[str]) -> bool:
    """Return whether a process holds the lock of a file that is open for reading.

    Raises:
        OSError: the age of a lease cannot be found out, for example in a read-only folder.
    """
    try:
        locked = _flock(file, fcntl.LOCK_SH)
    except BlockingIOError:
        return True
    if locked:
        fcntl.flock(file, fcntl.LOCK_UN)  # at once: who takes it now must not find it held
    lease = _lease(file.read())
    return lease is not None and _is_alive(lease, file, locked=locked)


def _host() -> str:
    """Return the name of this machine and an id of its system, for machines of the same name."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot[:8]}"
    return socket.gethostname()


def _is_alive(lease: dict[str, Any], file: IO[str], *, locked: bool) -> bool:
    """Return whether the process of a lease may still train.

    One of this machine that lost its lock has ended; without locks, its id tells. The age of a
    lease of another machine is told by one clock, that of the file system: calendars of two
    machines differ, and may be set while the lease lasts.
    """
    if lease["host"] == _host():
        return not locked and lease["pid"] != os.getpid() and Path(f"/proc/{lease['pid']}").exists()
    with tempfile.NamedTemporaryFile(dir=Path(file.name).parent, prefix=".clock-") as now:
        age = os.fstat(now.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime
    return -LEASE_S < age < LEASE_S


def _lease(text: str) -> dict[str, Any] | None:
    """Return the lease in a text; None if it is incomplete."""
    try:
        found = json.loads(text)
        return {"host": str(found["host"]), "pid": int(found["pid"])}
    except (ValueError, TypeError, KeyError):
        return None


class Store:
    """A folder of results."""

    def __init__(self, root: Path):
        self.root = root
        self.study = root / "study.toml"
        self.reports = root / "reports"
        self.claims = root / "claims"

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written to, before any work. It need not exist yet.

        Raises:
            UserError: the folder, or the one that it would be created in, cannot be written to.
        """
        there = self._nearest()
        if not there.is_dir():
            raise UserError(f"{there} is a file, not a folder; use another --out")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{there} cannot be written to; use another --out")

    def _nearest(self) -> Path:
        """Return the folder, or the one that exists among those that it would be created in."""
        return next(path for path in (self.root, *self.root.absolute().parents) if path.exists())

    def has_locks(self) -> bool:
        """Return whether runs in this folder can be locked; if not, leases are used alone."""
        return has_locks(self._nearest())

    def require(self) -> None:
        """Refuse a folder that holds no study.

        Raises:
            UserError: the folder holds no study, so nothing was measured or trained in it.
        """
        if self.study.exists() and not self.study.is_file():
            raise UserError(f"{self.study} is not a file; use another --out")
        if not self.study.is_file() and any((self.root / "costs").glob("*.json")):
            raise UserError(
                f"{self.root} holds costs but no study yet: 'kdprof train' is measuring there, or "
                "was stopped while it did; wait for it, or give its command again"
            )
        if not self.study.is_file():
            raise UserError(
                f"{self.root} holds no study; run 'kdprof measure' or 'kdprof train' with "
                f"--out {self.root} first"
            )

    def cost_path(self, method: str, key: str) -> Path:
        """Return the file of a method's Cost with a key."""
        return self.root / "costs" / cost_file_name(method, key)

    def read_cost(self, method: str, key: str) -> Cost | None:
        """Return a stored Cost, or None if it is not measured yet."""
        path = self.cost_path(method, key)
        return _placed_cost(path) if path.exists() else None

    def write_cost(self, cost: Cost) -> Path:
        """Store a Cost and return its file."""
        path = self.cost_path(cost.method, cost.key)
        write_record(path, cost)
        return path

    def write_step_cost(self, cost: Cost) -> Path:
        """Store the Cost of a user's step and return its file."""
        path = self.root / "steps" / cost_file_name(cost.method, cost.key)
        write_record(path, cost)
        return path

    def costs(self) -> list[Cost]:
        """Return every stored Cost of a method, ordered by when it was measured."""
        return self._costs_in("costs")

    def step_costs(self) -> list[Cost]:
        """Return every stored Cost of a user's step, ordered by when it was measured."""
        return self._costs_in("steps")

    def _costs_in(self, folder: str) -> list[Cost]:
        found = [_placed_cost(path) for path in sorted((self.root / folder).glob("*.json"))]
        return sorted(found, key=lambda cost: cost.measured_at or "")

    def latest_costs(self) -> dict[str, Cost]:
        """Return the newest Cost of each method.

        Raises:
            UserError: no Cost is stored, the Costs come from different devices, or it is not known
                which one of a method is the newest.
        """
        costs = newest_by_method(self.costs())
        if not costs:
            raise UserError(
                f"{self.root} holds no costs; run 'kdprof measure --out {self.root}' first"
            )
        if why := different_devices(costs.values()):
            raise UserError(f"{self.root}: {why}; measure all methods on one")
        return costs

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every record that reports are made from, by path in the folder."""
        paths = [self.study, *self.root.glob("teacher/run.json"), *self.root.glob("costs/*.json")]
        paths += self.root.glob("runs/*/*/*/run.json")
        paths += self.root.glob("decisions/*.json")
        return {
            path.relative_to(self.root).as_posix(): hashlib.sha256(read_file(path)).hexdigest()
            for path in sorted(paths)
            if path.is_file()
        }

    def write_decision(self, decision: Decision) -> Path:
        """Store a decision and return its file."""
        path = self.root / "decisions" / f"{claim_slug(decision.statement)}.json"
        write_record(path, decision)
        return path

    def decision_files(self) -> list[Path]:
        """Return the files of the stored decisions, sorted."""
        return sorted((self.root / "decisions").glob("*.json"))

    def decisions(self) -> list[Decision]:
        """Return every stored decision, ordered by name."""
        return [read_record(path, Decision) for path in self.decision_files()]

    def teacher_folder(self) -> RunFolder:
        """Return the folder of the teacher's training."""
        return self._run_folder(run_place("teacher", "", "", 0))

    @property
    def slurm(self) -> Path:
        """Folder of the scripts and logs of a cluster's jobs."""
        return self.root / "slurm"

    def trunk_folder(self, method: str, seed: int) -> RunFolder:
        """Return the folder of the trunk that a method's wsd runs of a seed share."""
        return self._run_folder(run_place("trunk", method, "", seed))

    def trunk_folders(self) -> list[RunFolder]:
        """Return the folders of all trunks that have a record, ordered by name."""
        return self._run_folders("trunks/*/*/run.json")

    def run_folder(self, method: str, budget: str, seed: int) -> RunFolder:
        """Return the folder of one run."""
        return self._run_folder(run_place("run", method, budget, seed))

    def run_folders(self) -> list[RunFolder]:
        """Return the folders of all runs that have a record, ordered by name."""
        return self._run_folders("runs/*/*/*/run.json")

    def runs(self) -> list[Run]:
        """Return the record of every run, finished or not."""
        return [run for folder in self.run_folders() if (run := folder.read_run()) is not None]

    def _run_folder(self, place: Path) -> RunFolder:
        return RunFolder(self.root / place, self.root)

    def _run_folders(self, records: str) -> list[RunFolder]:
        return [RunFolder(path.parent, self.root) for path in sorted(self.root.glob(records))]

    def teacher_run(self) -> Run | None:
        """Return the teacher's run, or None if it is not trained yet."""
        return self.teacher_folder().read_run()


def _placed_cost(path: Path) -> Cost:
    """Read a Cost from a file that is named after it.

    Raises:
        UserError: the file cannot be read, or holds the Cost of another method.
    """
    cost = read_record(path, Cost)
    if path.name != cost_file_name(cost.method, cost.key):
        raise UserError(
            f"{path} holds the cost of '{cost.method}' with key {cost.key}; rename it, or delete "
            "it and measure again"
        )
    return cost


def newest(costs: Sequence[Cost]) -> Cost:
    """Return the Cost of one method that was measured last. The times of files do not tell: a copy
    or a clone of the folder has others.

    Raises:
        UserError: two of the newest ones do not say when, or name the same second.
    """
    last = max(cost.measured_at or "" for cost in costs)
    found = [cost for cost in costs if (cost.measured_at or "") == last]
    if len(found) > 1:
        names = " and ".join(sorted(cost_file_name(cost.method, cost.key) for cost in found))
        when = f"were measured in the same second ({last})"
        when = when if last else "do not say when they were measured"
        raise UserError(
            f"the newest Cost of {found[0].method} is not known: {names} {when}; delete the older "
            "one, or measure again"
        )
    return found[0]


def newest_by_method(costs: Iterable[Cost]) -> dict[str, Cost]:
    """Return the newest Cost of each method, by name.

    Raises:
        UserError: it is not known which one of a method is the newest, see :func:`newest`.
    """
    found: dict[str, list[Cost]] = {}
    for cost in costs:
        found.setdefault(cost.method, []).append(cost)
    return {method: newest(found[method]) for method in sorted(found)}


def different_devices(costs: Iterable[Cost]) -> str:
    """Return that Costs come from different devices and cannot be compared, or nothing."""
    devices = sorted({cost.device for cost in costs})
    named = " and ".join(devices)
    return f"the costs come from different devices ({named})" if len(devices) > 1 else ""


def to_json(records: Sequence[Record]) -> str:
    """Return records as a JSON array."""
    return json.dumps([r.model_dump(mode="json", by_alias=True) for r in records], indent=2)
