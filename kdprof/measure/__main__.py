"""The process that measures steps, or is another rank of them; see kdprof.measure.isolation."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from kdprof.distributed.ranks import Place, Ranks
from kdprof.errors import UserError
from kdprof.hardware.device import find_device
from kdprof.measure.isolation import Failure, guarded
from kdprof.measure.latency import OnRound
from kdprof.measure.profiles import Files
from kdprof.measure.user_step import measure_file
from kdprof.processes import Request, read_request, send
from kdprof.records import Cost

# kdprof's networks and data are imported where they are used: a user's step needs neither.


class _Answer:
    """The result so far, written after every Cost: it outlives a crash."""

    def __init__(self, asked: Request):
        self._asked = asked
        self.content: dict[str, Any] = {"costs": {}}

    def add(self, cost: Cost) -> None:
        self.content["costs"][cost.method] = cost.model_dump(mode="json", by_alias=True)
        self._asked.write_result(self.content)
        send("cost", cost.method)

    def end(self) -> None:
        self._asked.write_result({**self.content, "ended": True})


def _on_round(name: str) -> OnRound:
    return lambda done, width: send("round", [name, done, width])


def _measure(request: Mapping[str, Any], ranks: Ranks | None, answer: _Answer) -> None:
    if request["kind"] == "step":
        arguments = request["arguments"]
        name = arguments["source"]["function"]
        answer.add(measure_file(**arguments, on_round=_on_round(name)))
    else:
        _measure_methods(**request["arguments"], ranks=ranks, answer=answer)


def _measure_methods(
    study: Mapping[str, Any],
    names: Sequence[str],
    counts: Mapping[str, Any],
    files: Mapping[str, Mapping[str, str]],
    planned: Mapping[str, float] | None,
    started: float,
    spent_s: float,
    others: int,
    restarted_after: str | None,
    parent: int,
    ranks: Ranks | None,
    answer: _Answer,
) -> None:
    from kdprof.measure.counting.count import count_from_json
    from kdprof.measure.study_step import StudyBench
    from kdprof.measure.turns import PlannedTraining, Turns
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import Study

    plain = Study.model_validate(study)
    resolved = ResolvedStudy(plain, parent=parent, weights=False, ranks=ranks)
    gc.freeze()  # what was imported is no garbage, and looking through it takes long
    bench = StudyBench(
        resolved,
        {name: count_from_json(count) for name, count in counts.items()},
        {name: Files.from_json(paths) for name, paths in files.items()},
        started=started,
        restarted_after=restarted_after,
    )
    Turns(
        bench,
        plain.measure,
        PlannedTraining(**planned) if planned else None,
        on_round=_on_round,
        ended=answer.add,
        spent_s=spent_s,
        others=others,
    ).take(names)
    answer.content["spoiled"] = bench.spoiled


def _import_networks() -> None:
    import_module("kdprof.measure.study_step")


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
    """Measure what the request asks for and write the results; other ranks follow rank 0."""
    asked = read_request(meanwhile=_import_networks)
    request, rendezvous = asked.content, f"file://{asked.folder / 'rendezvous'}"
    place = Place(asked.rank, request["ranks"], rendezvous)
    if place.rank:
        _follow_rank_0(request, place)
        return
    answer, ranks = _Answer(asked), None
    try:
        ranks = _ranks(request, place) if place.size > 1 else None
        guarded(lambda: _measure(request, ranks, answer))
    except UserError as error:
        answer.content["refused"] = error.problems
    except Failure as failure:
        answer.content["failure"] = str(failure)
    answer.end()
    if ranks and not {"refused", "failure"} & {*answer.content}:
        ranks.end()  # after an error the others may wait within a step, until this process ends


if __name__ == "__main__":
    main()
