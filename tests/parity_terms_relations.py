"""Parity files of at, dist, pkd, attnfd and its attention block."""

from collections.abc import Callable

from parity_case import Case, Outcome, info, inputs, install, set_parameter

from kdprof.method import Taps
from kdprof.methods import at, attnfd, dist, pkd

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
FIRST = 3
"""The official index of the first connector that is used."""


def _optional(case: Case, name: str, default):
    return case.hp(name) if f"hp.{name}" in case.arrays else default


def _at(case: Case) -> Outcome:
    gap = at.attention_gap(*case.maps("feat"), _optional(case, "p", 2))
    return Outcome({"loss": _optional(case, "loss_weight", 1.0) * gap}, inputs(case))


def _dist(case: Case, intra_over: str = "pixels") -> Outcome:
    if "hp.tau" in case.arrays:  # mmrazor
        beta, gamma = (case.hp(f"{which}_loss_weight") for which in ("inter", "intra"))
        temperature, weight = case.hp("tau"), case.hp("loss_weight")
    else:
        beta, gamma, temperature, weight = case.hp("beta"), case.hp("gamma"), 1.0, 1.0
    # Rows of classes are the pixels of one image.
    logits = (z if z.ndim == 4 else z.t()[None, :, :, None] for z in case.maps("logits"))
    inter, intra = dist.relations(*logits, temperature, intra_over)
    return Outcome({"loss": weight * (beta * inter + gamma * intra)}, inputs(case))


def _dist_4d_quirk(case: Case) -> Outcome:
    return _dist(case, "images")


def _pkd(case: Case) -> Outcome:
    method = pkd.PKD(resized="student" if case.hp("resize_stu") else "teacher")
    method.build(info(case, "S"), info(case, "T"))
    terms = method(*(Taps(head=f) for f in case.maps("feat")), None)
    return Outcome({"loss": case.hp("loss_weight") * terms["pkd"]}, inputs(case))


def _cbam(case: Case) -> Outcome:
    module = attnfd.CBAM(
        case.hp("gate_channels"),
        case.hp("reduction_ratio"),
        learned=case.hp("model") == "student",
        spatial=not case.hp("no_spatial"),
        pools=tuple(case.hp("pool_types").split("+")),
    )
    norm = "SpatialGate.spatial.bn"
    if module.learned:
        names = {f"{norm}.{n}": f"spatial.1.{n}" for n in NORM}
        names["SpatialGate.spatial.conv.weight"] = "spatial.0.weight"
        for theirs, ours in ((1, 0), (3, 2)):
            names |= {f"ChannelGate.mlp.{theirs}.{n}": f"mlp.{ours}.{n}" for n in NORM[:2]}
        install(module, case, names)
    # Without MLP the official block still owns the spatial gate's parameters, and reads none.
    outputs = {"y": module(case["x"])}
    changed = [key.removeprefix(f"{norm}.") for key in case.expected("state_after.")]
    state = {f"{norm}.{name}": module.get_buffer(f"spatial.1.{name}") for name in changed}
    return Outcome(outputs, inputs(case), state)


def _attnfd(case: Case) -> Outcome:
    total, state = 0.0, {}
    for i in range(case.hp("n_maps")):
        student, teacher = case[f"atten_S_{i}"], case[f"atten_T_{i}"]
        joint = attnfd.connector(student.shape[1], teacher.shape[1])
        joint.train(case.hp("module_mode") == "train")
        names = {f"1.{name}": f"Connectors.{FIRST + i}.1.{name}" for name in NORM}
        names["0.weight"] = f"Connectors.{FIRST + i}.0.weight"
        for ours, theirs in names.items():
            set_parameter(joint, ours, case[f"param.{theirs}"])
        total = total + attnfd.direction_gap(joint(student), teacher)
        if joint.training:
            state |= {names[name]: value for name, value in joint.named_buffers()}
    return Outcome({"loss": case.hp("attn_lambda") * total}, inputs(case), state)


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "at": _at,
    "dist": _dist,
    "dist_4d_quirk": _dist_4d_quirk,
    "pkd": _pkd,
    "cbam": _cbam,
    "attnfd": _attnfd,
}
