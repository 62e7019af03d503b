"""Parity files of af_dcd."""

from collections.abc import Callable

from parity_case import Case, Outcome, inputs, install

from kdprof.method import NetworkInfo
from kdprof.methods import af_dcd

PLAIN = {"projetor.0": "projector.0", "projetor.2": "projector.2"}
ENHANCED = {
    "projetor.block_1.0": "projector.first",
    "projetor.block_2.0": "projector.second",
    "projetor.adpator_1": "projector.of_first",
    "projetor.adpator_2": "projector.of_second",
}


def _af_dcd(case: Case) -> Outcome:
    enhanced, camvid = case.hp("enhance_projector"), case.hp("dataset") == "camvid"
    method = (af_dcd.AfDCDEnhanced if enhanced else af_dcd.AfDCD)(
        contrast_temperature=case.hp("tau_ocd"),
        groups=case.hp("M_ocd"),
        pool=0 if camvid else case.hp("pool_size"),
        crop=44 if camvid else 0,
        patch_height=case.hp("patch_h"),
        patch_width=case.hp("patch_w"),
        mask="random" if case.hp("rand_mask") else "centre",
        mask_ratio=case.hp("mask_ratio"),
    )
    who = (("S", case.hp("student_channels")), ("T", case.hp("teacher_channels")))
    method.build(*(NetworkInfo(name, 0, {"c5": channels}, {}) for name, channels in who))
    parts = {"align": "align", **(ENHANCED if enhanced else PLAIN)}
    names = {f"{a}.{n}": f"{b}.{n}" for a, b in parts.items() for n in ("weight", "bias")}
    install(method, case, names)
    student, teacher = case.maps("feat")
    if case.hp("rand_mask"):
        uniform = case.tensor("rand.uniform_0")
        mask = af_dcd.random_mask(uniform, case.hp("mask_ratio"))
    else:
        mask = af_dcd.centre_mask(teacher)
    fd, ctr = method.feature_terms(student, teacher, mask)
    return Outcome({"dis": fd, "ctr": ctr}, inputs(case))


TERMS: dict[str, Callable[[Case], Outcome]] = {"af_dcd": _af_dcd}
