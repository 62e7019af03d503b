"""Parity files of kd, fitnet, cwd, ifvd, the task loss and the discriminator's parts."""

from collections.abc import Callable

import torch
from parity_case import Case, Outcome, info, inputs, install
from torch import nn

from kdprof.method import Taps
from kdprof.methods import _discriminator as adversarial
from kdprof.methods import cwd, fitnet, ifvd
from kdprof.methods._divergences import channel_kl, pixel_cross_entropy, pixel_kl
from kdprof.step import task_loss


def _kd(case: Case) -> Outcome:
    loss = pixel_kl(*case.maps("logits"), case.hp("temperature"))
    return Outcome({"loss": loss}, inputs(case))


def _kd_mean(case: Case) -> Outcome:
    factor = case.hp("upsample_factor") if case.hp("upsample") else 1
    loss = pixel_kl(*case.maps("logits"), case.hp("temperature"), "element", factor)
    return Outcome({"loss": loss}, inputs(case))


def _kd_pixelwise_ce(case: Case) -> Outcome:
    return Outcome({"loss": pixel_cross_entropy(*case.maps("logits"))}, inputs(case))


def _kl_mmrazor(case: Case) -> Outcome:
    tau, weight = case.hp("tau"), case.hp("loss_weight")
    reduction = {"batchmean": "image", "mean": "element", "sum": "sum"}[case.hp("reduction")]
    loss = pixel_kl(*case.maps("logits"), tau, reduction)
    # Its element mean has the T^2 that the IFVD repository's has not.
    factor = tau**2 if reduction == "element" else 1
    return Outcome({"loss": weight * factor * loss}, inputs(case))


def _task_ce(case: Case) -> Outcome:
    assert case.hp("ignore_index") == 255
    loss = task_loss(case["logits_S"], case["labels"], align_corners=True)
    return Outcome({"loss": loss}, inputs(case))


def _fitnet(case: Case) -> Outcome:
    method = fitnet.FitNet()
    method.build(info(case, "S"), info(case, "T"))
    install(method, case, {"conv.weight": "adaptor.weight"})
    student, teacher = case.maps("feat")
    logits = torch.zeros(1, 2, 1, 1)
    taps = (Taps(head=f, logits=logits) for f in (student, teacher))
    return Outcome({"loss": method(*taps, None)["fitnet"]}, inputs(case))


def _cwd_logits(case: Case) -> Outcome:
    if "hp.tau" in case.arrays:  # mmrazor
        weight, method = case.hp("loss_weight"), cwd.CWD(temperature=case.hp("tau"))
    else:
        norm, divergence = case.hp("norm_type"), case.hp("divergence")
        temperature = case.hp("temperature")
        weight, method = 1.0, cwd.CWD(temperature=temperature, norm=norm, divergence=divergence)
    terms = method(*(Taps(logits=logits) for logits in case.maps("logits")), None)
    return Outcome({"loss": weight * terms["cwd"]}, inputs(case))


def _cwd_feature(case: Case) -> Outcome:
    assert (case.hp("norm_type"), case.hp("divergence")) == ("channel", "kl")
    method = cwd.CWDCirkd(temperature=case.hp("temperature"))
    student, teacher = case.maps("feat")
    if "param.conv.weight" in case.leaves:
        method.adaptor = nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
        install(method, case, {"conv.weight": "adaptor.weight"})
        adapted = method.adaptor(student)
    else:
        adapted = student
    loss = channel_kl(adapted, teacher, method.temperature, student.shape[1])
    return Outcome({"loss": loss}, inputs(case))


def _ifvd(case: Case) -> Outcome:
    assert case.hp("ignore_label") == 255
    features = case.maps("feat")
    loss = ifvd.intra_class_variation(*features, case["labels"], case.hp("num_classes"))
    return Outcome({"loss": loss}, inputs(case))


def _adv_generator(case: Case) -> Outcome:
    assert case.hp("adv_type") in ("hinge", "wgan-gp")
    loss = adversarial.generator_loss(case["d_out_S"])
    return Outcome({"g_loss": loss}, inputs(case))


def _adv_discriminator(case: Case) -> Outcome:
    scores = case.maps("d_out")
    loss = adversarial.discriminator_loss(case.hp("adv_type"), *scores)
    return Outcome({"d_loss": loss}, inputs(case))


def _adv_penalty(case: Case) -> Outcome:
    first, last = (case[f"param.crit.D.net.{i}.weight"] for i in (0, 2))
    judge = nn.Sequential(
        nn.Conv2d(first.shape[1], first.shape[0], first.shape[2], 2, 1),
        nn.LeakyReLU(case.hp("leaky_slope")),
        nn.Conv2d(last.shape[1], last.shape[0], last.shape[2]),
    )
    names = {f"crit.D.net.{i}.{n}": f"{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    install(judge, case, names)
    mix = case.tensor("rand.uniform_0")
    penalty = adversarial.gradient_penalty(judge, *case.maps("logits"), mix)
    return Outcome({"gp": case.hp("lambda_gp") * penalty}, inputs(case))


def _self_attention(case: Case) -> Outcome:
    module = adversarial.SelfAttention(case.hp("in_dim"))
    names = {"gamma": "gate"}
    for part in ("query", "key", "value"):
        names |= {f"{part}_conv.{n}": f"{part}.{n}" for n in ("weight", "bias")}
    install(module, case, names)
    outputs = {"y": module(case["x"]), "attention": module.attention(case["x"])[0]}
    return Outcome(outputs, inputs(case))


def _spectral_norm(case: Case) -> Outcome:
    assert case.hp("power_iterations") == 1
    module = adversarial.SpectralConv(
        case["x"].shape[1],
        case.hp("out_channels"),
        case.hp("kernel_size"),
        case.hp("stride"),
        case.hp("padding"),
    )
    names = {"weight_bar": "weight", "weight_u": "u", "weight_v": "v", "bias": "bias"}
    install(module, case, {f"module.{theirs}": ours for theirs, ours in names.items()})
    outputs = {"y": module(case["x"])}
    state = {"module.weight_u": module.u, "module.weight_v": module.v}
    return Outcome(outputs, inputs(case), state)


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "kd": _kd,
    "kd_mean": _kd_mean,
    "kd_pixelwise_ce": _kd_pixelwise_ce,
    "kl_mmrazor": _kl_mmrazor,
    "task_ce": _task_ce,
    "fitnet": _fitnet,
    "cwd_logits": _cwd_logits,
    "cwd_feature": _cwd_feature,
    "ifvd": _ifvd,
    "skd_adv_generator": _adv_generator,
    "skd_adv_discriminator": _adv_discriminator,
    "skd_adv_gradient_penalty": _adv_penalty,
    "skd_adv_self_attention": _self_attention,
    "skd_adv_spectral_norm": _spectral_norm,
}
