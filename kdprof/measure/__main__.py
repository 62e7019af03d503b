"""A process that measures one step, or helps to make it: what kdprof.measure.isolation starts.

``python -m kdprof.measure REQUEST RESULT RANK``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kdprof.device import find_device
from kdprof.errors import UserError
from kdprof.measure.callables import measure_file
from kdprof.measure.isolation import PROGRESS, Failure, guarded
from kdprof.parallel import Place, Ranks
from kdprof.records import Cost
from kdprof.store import write_atomic

# kdprof's networks and data are imported where they are used: a user's own step needs neither.


def _report(done: int, width: float | None) -> None:
    print(f"{PROGRESS}{json.dumps([done, width])}", flush=True)


def _measure(request: dict[str, Any], place: Place) -> Cost:
    if request["kind"] == "method":
        from kdprof.measure.methods import measure_method

        ranks = _ranks(request, place)
        cost = measure_method(**request["arguments"], report=_report, ranks=ranks)
        if ranks:
            ranks.end()
        return cost
    return measure_file(**request["arguments"], report=_report)


def _ranks(request: dict[str, Any], place: Place) -> Ranks | None:
    if place.size == 1:
        return None
    return Ranks(place, find_device(request["arguments"]["study"]["device"]).type)


def _follow_rank_0(request: dict[str, Any], place: Place) -> None:
    from kdprof.follow import follow
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import Study

    ranks = _ranks(request, place)
    study = Study.model_validate(request["arguments"]["study"])
    follow(ranks, lambda: ResolvedStudy(study, weights=False, ranks=ranks))


def main() -> None:
    """Be the child: read the request, measure, write the result. Or be one of those that make its
    step with it."""
    asked, result = map(Path, sys.argv[1:3])
    request = json.loads(asked.read_text())
    place = Place(int(sys.argv[3]), request["ranks"], f"file://{asked.with_name('rendezvous')}")
    if place.rank:
        _follow_rank_0(request, place)
        return
    try:
        cost = guarded(lambda: _measure(request, place))
        answer = {"cost": cost.model_dump(mode="json", by_alias=True)}
    except UserError as error:
        answer = {"refused": error.problems}
    except Failure as failure:
        answer = {"failure": str(failure)}
    write_atomic(result, json.dumps(answer))


if __name__ == "__main__":
    main()
