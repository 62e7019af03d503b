"""Parity files of skd's pair-wise terms and of dsd."""

from collections.abc import Callable

from parity_case import Case, Outcome, inputs

from kdprof.methods import dsd, skd


def _pairwise(case: Case) -> Outcome:
    loss = skd.pairwise_local(*case.maps("feat"), case.hp("pool_kernel"))
    return Outcome({"loss": loss}, inputs(case))


def _pairwise_orig(case: Case) -> Outcome:
    loss = skd.pairwise_whole(*case.maps("feat"), case.hp("scale"))
    return Outcome({"loss": loss}, inputs(case))


def _lists(case: Case) -> tuple[list, list]:
    """The numbered maps of student and teacher; the last ones are the logits."""
    return tuple([case[f"feat_{who}_{i}"] for i in range(case.hp("n_maps"))] for who in "ST")


def _psd(case: Case) -> Outcome:
    return Outcome({"psd": dsd.residual_gap(*_lists(case), case.hp("p"))}, inputs(case))


def _csd(case: Case) -> Outcome:
    loss = dsd.class_gap(*case.maps("logits"), case.hp("tau"), case.hp("pool_kernel"))
    return Outcome({"csd": loss}, inputs(case))


def _dsd(case: Case) -> Outcome:
    student, teacher = _lists(case)
    outputs = {
        "psd": dsd.residual_gap(student, teacher, case.hp("p")),
        "csd": dsd.class_gap(student[-1], teacher[-1], case.hp("tau")),
    }
    return Outcome(outputs, inputs(case))


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "skd_pairwise": _pairwise,
    "skd_pairwise_orig": _pairwise_orig,
    "dsd": _dsd,
    "dsd_csd": _csd,
    "dsd_psd": _psd,
}
