"""Parity files of mgd and maskd."""

from collections.abc import Callable

from parity_case import Case, Outcome, inputs, install

from kdprof.methods import maskd, mgd


def _mgd(case: Case) -> Outcome:
    channels = case.hp("student_channels"), case.hp("teacher_channels")
    module = mgd.Generator(*channels)
    parts = {"align": "align", "generation.0": "rebuild.0", "generation.2": "rebuild.2"}
    names = {f"{a}.{n}": f"{b}.{n}" for a, b in parts.items() for n in ("weight", "bias")}
    install(module, case, names)
    uniform = case.tensor("rand.uniform_0")
    error = module.error(*case.maps("feat"), uniform, case.hp("lambda_mgd"))
    return Outcome({"loss": case.hp("alpha_mgd") * error}, inputs(case))


def _tokens(case: Case, name: str) -> maskd.ReceptiveTokens:
    module = maskd.ReceptiveTokens(case.hp("num_tokens"), case.hp("channels"))
    return install(module, case, {name: "tokens"})


def _maskd(case: Case) -> Outcome:
    student, teacher = case.maps("logits")
    masks = _tokens(case, "mask_module.mask_token")(teacher)
    return Outcome({"loss": maskd.masked_distance(student, teacher, masks)}, inputs(case))


def _mask_module(case: Case) -> Outcome:
    logits = case["logits_T"]
    masks = _tokens(case, "mask_token")(logits)
    outputs = {"y": maskd.masked_logits(logits, masks), "dice": maskd.overlap(masks)}
    return Outcome(outputs, inputs(case))


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "mgd": _mgd,
    "maskd": _maskd,
    "maskd_mask_module": _mask_module,
}
