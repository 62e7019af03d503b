"""Make the reference of a device: its atlas of costs and a study at matched budgets, in minutes.

    python benchmarks/reference.py --minutes 12 --out DIR [--data camvid:ROOT] [--device cuda]

Parts, in this order: checks (of the device: its numbers are right, repeat, and no step waits),
atlas (what a step of every method costs at the published settings), objectives (the dear ones
against their equations written out) and study (CamVid, or synthetic scenes without ``--data``).
The plan is printed first. ``--minutes`` is the end of everything; what was not done by then is
listed, and the same command goes on where the last one stopped. Results are in DIR/DEVICE.

Each piece of work has a process of its own: a crash ends that piece, and its reason is stored.
``--tiny --device cpu`` does all of it in small, in less than three minutes on two CPU cores.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before the imports below, which count

import argparse  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

# -P and PYTHONSAFEPATH leave the folder of a script out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_parts import summary  # noqa: E402
from reference_parts.base import WORK, Call, Part  # noqa: E402
from reference_parts.checking import Checks  # noqa: E402
from reference_parts.comparing import Comparing  # noqa: E402
from reference_parts.measuring import Measuring  # noqa: E402
from reference_parts.plan import FULL, TINY, Size, limits_s  # noqa: E402
from reference_parts.runner import Runner  # noqa: E402
from reference_parts.state import State  # noqa: E402
from reference_parts.studying import Studying  # noqa: E402

from kdprof.errors import KdprofError, UserError  # noqa: E402
from kdprof.reports.atlas_check import without_paths  # noqa: E402

LAYOUT = "camvid"


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {text}", flush=True)


def data_root(data: str | None) -> Path | None:
    """Return the folder of the study's images.

    Raises:
        UserError: it is not CamVid's, or does not exist.
    """
    if data is None:
        return None
    name, _, root = data.partition(":")
    if name != LAYOUT or not root:
        raise UserError(f"--data {data}: the study is CamVid's; give --data {LAYOUT}:ROOT")
    if not Path(root).is_dir():
        raise UserError(f"--data {data}: {root} is no folder; give the one of CamVid")
    return Path(root).resolve()


def open_call(given: argparse.Namespace, size: Size) -> Call:
    """Ask a process what this device is, and open its folder.

    Raises:
        UserError: the device cannot be used, or the folder holds a reference that was begun
            otherwise.
    """
    root = data_root(given.data)
    given.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(given.out.resolve(), BEGAN + 60 * given.minutes - size.closing_s, say)
    arguments = {"device": given.device, "data": None if root is None else str(root)}
    found = runner.run("device", "identify", arguments, runner.left_s())
    if found.state != "done":
        raise UserError(f"the device could not be identified: {found.reason}")
    here = found.result
    folder = given.out.resolve() / slug(here["device"])
    identity = {
        "device": here["device"],
        "size": "tiny" if given.tiny else "full",
        "data": f"{LAYOUT} {here['data']}" if root else "synthetic scenes (no --data)",
        "code": here["code"],
        **{f"version of {name}": value for name, value in here["versions"].items()},
    }
    state = State(folder, identity)
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    if root is not None and not (work / LAYOUT).exists():
        # Studies name the link, so that no record holds the path behind it.
        (work / LAYOUT).symlink_to(root)
    data = f"{LAYOUT}:{LAYOUT}" if root else None
    runner = Runner(work, runner.ends, say)
    return Call(folder, here["place"], data, here["methods"], here["versions"], size, state, runner)


def slug(device: str) -> str:
    """Return a device's name as the name of a folder: NVIDIA H200 -> nvidia-h200."""
    words = re.sub(r"\((R|TM)\)", "", device).lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def parts_of(call: Call) -> list[Part]:
    measuring = Measuring(call)
    return [Checks(call), measuring, Comparing(call, measuring), Studying(call)]


def print_plan(call: Call, parts: list[Part], forecasts: dict, limits: dict) -> None:
    done = sum(piece.state == "done" for piece in call.state.record.pieces.values())
    say(f"{call.folder.name}: {call.runner.left_s():.0f} s are left, {done} pieces are done")
    say(f"{'part':<12}{'forecast':>10}{'at most':>10}")
    for part in parts:
        unit = f"{forecasts[part.name]:.0f} s" if forecasts[part.name] else "done"
        say(f"{part.name:<12}{unit:>10}{limits[part.name]:>8.0f} s")


def run(call: Call) -> None:
    """Do the parts in order, each within its limit; unused time goes to those that follow."""
    parts = parts_of(call)
    forecasts = {part.name: part.forecast_s() for part in parts}
    limits = limits_s(call.runner.left_s(), forecasts, call.size)
    print_plan(call, parts, forecasts, limits)
    call.state.record.not_done = {}
    call.state.save()
    for part in parts:
        left_s = call.runner.left_s()
        # The study takes what the others left; the others keep to their limits.
        ends_s = 0.0 if part is parts[-1] else max(0.0, left_s - limits[part.name])
        part.do(ends_s)
        left = left_of(call, parts)
        summary.write(call, left)
    for line in left:
        say(line)
    say(f"written: {call.folder.name}")


def left_of(call: Call, parts: list[Part]) -> list[str]:
    """Return what was not done, what failed, and what keeps the folder out of the reference."""
    not_done = call.state.record.not_done.items()
    failures = [failure for part in parts for failure in part.failures()]
    return [
        *(f"not done: {name}: {why}" for name, why in not_done),
        *(f"failed: {without_paths(failure)}" for failure in failures),
        *(f"not yet a reference: {problem}" for problem in summary.problems(call)),
    ]


def minutes(text: str) -> float:
    """Return the minutes that a text says.

    Raises:
        ArgumentTypeError: it is no number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"give a number of minutes above 0, not '{text}'")
    return value


def give_up() -> None:
    """End at once: the minutes are a promise, and all that was done is in files."""
    print("the minutes are over; the same command goes on", file=sys.stderr, flush=True)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=minutes, default=12.0, help="the end of everything")
    parser.add_argument("--out", type=Path, required=True, help="DIR: results are in DIR/DEVICE")
    parser.add_argument("--data", help=f"{LAYOUT}:ROOT; synthetic scenes if not given")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tiny", action="store_true", help="all parts in small, for a CPU")
    given = parser.parse_args()
    last = threading.Timer(60 * given.minutes - (time.monotonic() - BEGAN), give_up)
    last.daemon = True
    last.start()
    try:
        run(open_call(given, TINY if given.tiny else FULL))
    except KdprofError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
