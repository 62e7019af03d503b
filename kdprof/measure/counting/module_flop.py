"""Forward matrix FLOP of a network by module, counted by fvcore, which shares no code with the
step's own count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

MATRIX = frozenset({"conv", "linear", "addmm", "matmul", "bmm", "baddbmm", "einsum"})
"""fvcore's names of the operators that it counts in multiply-adds."""
TOTAL = "total"


class _Maps(nn.Module):
    """A network as fvcore traces it: images in, a tuple of maps out."""

    def __init__(self, network: nn.Module, taps: Sequence[str]):
        super().__init__()
        self.network, self.taps = network, taps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, in the order of the taps."""
        found = self.network(images, self.taps)
        return tuple(getattr(found, tap) for tap in self.taps)


def modules_flop(
    network: nn.Module,
    batch: int,
    crop: tuple[int, int],
    taps: Sequence[str] = ("logits",),
) -> dict[str, float]:
    """Return the matrix FLOP of one forward of a batch, by module name; 1 multiply-add = 2 FLOP.

    fvcore traces with torch.jit, which takes no fake tensors: one image really runs, in evaluation
    mode, and its count is multiplied by ``batch``, because no layer mixes images. That takes
    seconds for a large network; its weights, statistics and mode do not change.

    Args:
        network: with real parameters, called with images and the taps to compute.
        crop: (H, W) in pixels.
        taps: the maps to compute: logits, and aux for a student, which trains with it.

    Modules of every depth are counted: ``backbone``, ``backbone.layer1``, and so on. Those without
    matrix products are left out; ``total`` is the whole network.
    """
    training = {module: module.training for module in network.modules()}
    device = next(network.parameters()).device
    image = torch.zeros(1, 3, *crop, dtype=torch.uint8, device=device)
    try:
        analysis = FlopCountAnalysis(_Maps(network, taps).eval(), image)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        with torch.no_grad():
            found = analysis.by_module_and_operator()
    finally:
        for module, mode in training.items():
            module.training = mode
    return _named(found, batch)


def _named(found: dict[str, Counter[str]], batch: int) -> dict[str, float]:
    made = {}
    for path, operators in found.items():
        top, _, name = path.partition(".")
        multiply_adds = sum(operators[operator] for operator in MATRIX)
        if top == "network" and multiply_adds:
            made[name or TOTAL] = 2.0 * batch * multiply_adds
    return made
