"""Parity files of dkd."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from parity_case import Case, Outcome, inputs
from torch import Tensor

from kdprof.methods.dkd import labelled, one_vs_all, sigmoids, split_logits


def reduced(total: Tensor, logits: Tensor, reduction: str) -> Tensor:
    """Return a sum over classes of means over pixels as the file has it."""
    images, classes, height, width = logits.shape
    # ``none``: the trainer's reduction, which is the method's.
    factor = {"none": 1, "mean": 1 / classes, "sum": images * height * width}
    return factor[reduction] * total


def positive_weight(case: Case) -> float | Tensor:
    return 1.0 if case.hp("pos_weight") == "none" else case["pos_weight"]


def _kd(case: Case) -> Outcome:
    logits, probability = case["logits_S"], case["target_prob"]
    loss = one_vs_all(
        logits, lambda block: probability[:, block], positive_weight=positive_weight(case)
    )
    return Outcome({"loss": reduced(loss, logits, case.hp("reduction"))}, inputs(case))


def _ac(case: Case) -> Outcome:
    logits = case["logits_bg"]
    loss = one_vs_all(logits, None)
    return Outcome({"loss": reduced(loss, logits, case.hp("reduction"))}, inputs(case))


def _wbce(case: Case) -> Outcome:
    assert case.hp("ignore_index") == 255
    logits, classes = case["logits_S"], case.hp("n_new_classes")
    target = labelled(case["labels"], case.hp("n_old_classes"), classes)
    loss = one_vs_all(logits, target, positive_weight=positive_weight(case))
    return Outcome({"loss": reduced(loss, logits, case.hp("reduction"))}, inputs(case))


def _bce(case: Case) -> Outcome:
    """All channels, which the authors' trainer does not use: a sum of the method's parts."""
    assert case.hp("ignore_index") == 255
    logits, kind = case["logits_S"], case.hp("target_kind")
    if kind == "label4d":
        loss = one_vs_all(logits, lambda block: case["target"][:, block])
    else:
        labels, first = case["labels"], int(case.hp("ignore_bg"))
        target = labelled(labels, first, logits.shape[1] - first)
        if kind == "old":
            target = _labelled_or_old(target, case["logits_old"], labels, first)
        loss = one_vs_all(logits[:, first:], target)
        if first:
            loss = loss + one_vs_all(logits[:, :first], None)
    return Outcome({"loss": reduced(loss, logits, case.hp("reduction"))}, inputs(case))


def _labelled_or_old(target, old: Tensor, labels: Tensor, first: int):
    """Old classes that no label shows have the old model's sigmoid, but the background."""
    whole = target(slice(None)).float()
    soft = sigmoids(old, labels.shape[-2:])(slice(None))
    for k in range(1, old.shape[1]):
        if not (labels == k).any():
            whole[:, k - first] = soft[:, k]
    return lambda block: whole[:, block]


def _decoupled_logits(case: Case) -> Outcome:
    x = case["x"]
    weights, biases = ([case[f"param.cls.{i}.{n}"] for i in range(3)] for n in ("weight", "bias"))
    assert [len(w) for w in weights[1:]] == [case.hp(f"n_{n}_classes") for n in ("old", "new")]
    # The logits with bias are the network's own, but for the auxiliary classifier.
    seen = (x.detach(), x, x)
    logits = torch.cat([F.conv2d(*part) for part in zip(seen, weights, biases, strict=True)], 1)
    positive, negative = split_logits(x, torch.cat(weights[1:]))
    return Outcome({"logits": logits, "positive": positive, "negative": negative}, inputs(case))


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "dkd_kd": _kd,
    "dkd_ac": _ac,
    "dkd_wbce": _wbce,
    "dkd_bce": _bce,
    "dkd_decoupled_logits": _decoupled_logits,
}
