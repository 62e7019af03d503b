"""Parity files of CIRKD's mini-batch and memory terms and of CIRKDv2's channel terms and GCN."""

from collections.abc import Callable

import torch
from parity_case import Case, Outcome, inputs, install
from torch import Tensor, nn

from kdprof.methods import _relations, cirkdv2
from kdprof.methods._common import membership
from kdprof.methods._memory import ClassMemory

PROJECTION = {
    f"project_head.{name}": f"projection.{name}"
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var",
                 "1.num_batches_tracked", "3.weight")
}  # fmt: skip


def permutations(case: Case) -> list[Tensor]:
    sizes = case.arrays["rand.randperm_sizes"].tolist()
    return list(case.tensor("rand.randperm_values").split(sizes))


def fill(module: nn.Module, case: Case, queues: dict[str, tuple[str, str]]) -> nn.Module:
    """Fill projection and queues; ``queues``: ours -> (the file's contents, its pointers)."""
    params = {n.removeprefix("param."): v for n, v in case.leaves.items() if n[:6] == "param."}
    for ours, (contents, pointers) in queues.items():
        queue = module.get_submodule(ours)
        queue.contents().copy_(params[contents].reshape(queue.contents().shape))
        queue.pointers.copy_(params[pointers])
    for pair in queues.values():
        for name in pair:
            del case.leaves[f"param.{name}"]
    return install(module, case, PROJECTION)


def state_after(module: nn.Module, case: Case, queues: dict[str, tuple[str, str]]):
    """Return ours of what the file says has changed, under its names."""
    ours = {theirs: module.get_buffer(name) for theirs, name in PROJECTION.items()
            if "running" in name or "tracked" in name}  # fmt: skip
    for name, (contents, pointers) in queues.items():
        queue = module.get_submodule(name)
        ours[contents], ours[pointers] = queue.contents(), queue.pointers
    expected = case.expected("state_after.")
    return {name: ours[name].reshape(value.shape) for name, value in expected.items()}


def _minibatch(case: Case) -> Outcome:
    student, teacher = case.maps("feat")
    assert case.hp("pooled") == (min(teacher.shape[-2:]) >= 256)
    loss = _relations.mini_batch_kl(student, teacher, case.hp("temperature"))
    return Outcome({"loss": loss}, inputs(case))


def _ranks(members: Tensor, number: int, drawn: list[Tensor]) -> Tensor:
    """Take one permutation for each image and class in it, in order."""
    counts = members.sum(1).long()
    ranks = torch.zeros(*counts.shape, number, dtype=torch.long)
    for image, of_classes in enumerate(counts.tolist()):
        for label, count in enumerate(of_classes):
            if count:
                order = drawn.pop(0)
                assert len(order) == count
                ranks[image, label, : min(number, count)] = order[:number]
    return ranks


def _memory(case: Case) -> Outcome:
    student, teacher = case.maps("feat")
    queues = {
        "pixels": ("teacher_pixel_queue", "pixel_queue_ptr"),
        "regions": ("teacher_segment_queue", "segment_queue_ptr"),
    }
    sizes = [case.hp(f"{kind}_memory_size") for kind in ("pixel", "region")]
    channels = case.hp("s_channels"), case.hp("t_channels")
    classes = case.hp("num_classes")
    memory = ClassMemory(channels, classes, *sizes, case.hp("pixel_update_freq"))
    fill(memory, case, queues)
    labels = case["labels"].clone()
    labels[labels == case.hp("ignore_label")] = 255
    members = membership(labels, teacher.shape[-2:], classes)
    drawn = permutations(case)
    ours = _relations.unit_positions(memory.projection(student))
    theirs = _relations.unit_positions(teacher)
    if case.hp("enqueue_before_contrast"):
        ranks = _ranks(members, memory.updates, drawn)
        memory.update(theirs.unflatten(0, members.shape[:2]), members, ranks)
    temperatures = case.hp("contrast_temperature"), case.hp("contrast_kd_temperature")
    terms = {}
    for kind, queue in (("pixel", memory.pixels), ("region", memory.regions)):
        keys = queue.keys(case.hp(f"{kind}_contrast_size"), drawn.pop(0))
        terms[kind] = memory.relation(ours, theirs, members, keys, *temperatures)
    return Outcome(terms, inputs(case), state_after(memory, case, queues))


def _channel(case: Case) -> Outcome:
    queues = {"queue": ("teacher_channel_queue", "channel_queue_ptr")}
    memory = cirkdv2.ChannelMemory(
        (case.hp("s_channels"), case.hp("t_channels")),
        case.hp("channel_memory_size"),
        case.hp("dim"),
        case.hp("channel_update_freq"),
    )
    fill(memory, case, queues)
    drawn = permutations(case)
    ours, theirs = memory.patterns(*case.maps("feat"))
    if case.hp("enqueue_before_contrast"):
        memory.update(theirs, drawn.pop(0))
    keys = memory.keys(case.hp("channel_contrast_size"), theirs.shape[2], drawn.pop(0))
    contrast, divergence = case.hp("contrast_temperature"), case.hp("contrast_kd_temperature")
    terms = {
        "batch": _relations.batch_relation(ours, theirs, contrast),
        "memory": cirkdv2.channel_relation(ours, theirs, keys, contrast, divergence),
        "mse": (ours - theirs).square().mean(),
    }
    return Outcome(terms, inputs(case), state_after(memory, case, queues))


def _gcn(case: Case) -> Outcome:
    names = {f"node_{short[0]}.weight": f"{short}.weight" for short in ("query", "key", "value")}
    for theirs, ours in (("conv1", "back"), ("out_conv", "join")):
        names[f"{theirs}.0.weight"] = f"{ours}.0.weight"
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{theirs}.1.{part}"] = f"{ours}.1.{part}"
    module = install(cirkdv2.GraphModule(case.hp("plane")), case, names)
    outputs = {"y": module(case["x"])}
    expected = case.expected("state_after.")
    return Outcome(outputs, inputs(case), {n: module.get_buffer(names[n]) for n in expected})


TERMS: dict[str, Callable[[Case], Outcome]] = {
    "cirkd_minibatch": _minibatch,
    "cirkd_memory": _memory,
    "cirkdv2_channel": _channel,
    "cirkdv2_gcn": _gcn,
}
