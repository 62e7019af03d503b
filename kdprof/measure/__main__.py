"""The process that measures one step, or is another rank of it; see kdprof.measure.isolation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdprof.distributed.ranks import Place, Ranks
from kdprof.errors import UserError
from kdprof.hardware.device import find_device
from kdprof.measure.isolation import Failure, guarded
from kdprof.measure.profiles import Files
from kdprof.measure.user_step import measure_file
from kdprof.processes import read_request, send
from kdprof.records import Cost

# kdprof's networks and data are imported where they are used: a user's step needs neither.


def _on_round(done: int, width: float | None) -> None:
    send("round", [done, width])


def _measure(request: Mapping[str, Any], place: Place) -> Cost:
    if request["kind"] == "method":
        ranks = _ranks(request, place) if place.size > 1 else None
        return _measure_method(**request["arguments"], ranks=ranks)
    return measure_file(**request["arguments"], on_round=_on_round)


def _measure_method(
    study: Mapping[str, Any],
    name: str,
    files: Mapping[str, str],
    parent: int,
    ranks: Ranks | None,
) -> Cost:
    from kdprof.measure.study_step import measure_here
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import Study

    plain = Study.model_validate(study)
    resolved = ResolvedStudy(plain, parent=parent, weights=False, ranks=ranks)
    cost = measure_here(resolved, name, Files.from_json(files), _on_round)
    if ranks:
        ranks.end()
    return cost


def _ranks(request: Mapping[str, Any], place: Place) -> Ranks:
    return Ranks(place, find_device(request["arguments"]["study"]["device"]).type)


def _follow_rank_0(request: Mapping[str, Any], place: Place) -> None:
    from kdprof.resolve import ResolvedStudy
    from kdprof.resolve.follow import follow
    from kdprof.study import Study

    ranks = _ranks(request, place)
    study = Study.model_validate(request["arguments"]["study"])
    follow(ranks, lambda: ResolvedStudy(study, weights=False, ranks=ranks))


def main() -> None:
    """Measure what the request asks for and write the result; other ranks follow rank 0."""
    asked = read_request()
    request, rendezvous = asked.content, f"file://{asked.folder / 'rendezvous'}"
    place = Place(asked.rank, request["ranks"], rendezvous)
    if place.rank:
        _follow_rank_0(request, place)
        return
    try:
        cost = guarded(lambda: _measure(request, place))
        result: dict[str, Any] = {"cost": cost.model_dump(mode="json", by_alias=True)}
    except UserError as error:
        result = {"refused": error.problems}
    except Failure as failure:
        result = {"failure": str(failure)}
    asked.write_result(result)


if __name__ == "__main__":
    main()
