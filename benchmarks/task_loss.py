"""Measure the task loss and the prediction of resized logits against their plain forms.

    python benchmarks/task_loss.py [--device cuda] [--dtype bf16] [--batch 8] [--classes 19,150]

The plain form resizes the logits and keeps their whole map. For each number of classes:

- training: the cross-entropy of two heads, forward and backward, as in a step;
- evaluation: the class of each pixel;

and for both the ratio of seconds, of pairs that run one after the other in this process, and the
ratio of peak memory above what the inputs take. Both sides must agree, or nothing is timed.
Aims of training: on a CPU at most 1.1 of the time and 0.3 of the memory; on a GPU at most 3 ms for
the two heads of 8 images. On any device two runs must give the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from objectives import freed_at_once, held_bytes, peak_bytes, reset_peak, trim
from torch import Tensor

from kdprof.errors import KdprofError
from kdprof.hardware.device import DTYPES, configure_backends, find_device, synchronize
from kdprof.method import IGNORE
from kdprof.resized import resized_argmax, resized_cross_entropy
from kdprof.resized.choice import form_of
from kdprof.resized.cross_entropy import plain_cross_entropy
from kdprof.resized.prediction import plain_argmax
from kdprof.resized.tiles import why_no_triton
from kdprof.stats.intervals import paired_ratio

HEADS = {"logits": 1.0, "aux": 0.4}
RELATIVE = 1e-3
"""How far the two sides may differ, of the largest value."""
MOST_TIME, MOST_MEMORY = 1.1, 0.3
MOST_GPU_S = 3e-3 / 8
"""For both heads of one image."""

Side = Callable[[], list[Tensor]]
Loss = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Case:
    """Logits of two heads, (N, C, h, w) in channels_last, and labels (N, H, W)."""

    heads: dict[str, Tensor]
    labels: Tensor
    align_corners: bool

    def training(self, loss: Loss) -> Side:
        """Return the task loss of a step: both heads, forward and backward."""

        def run() -> list[Tensor]:
            losses = [
                weight * loss(self.heads[name], self.labels, self.align_corners)
                for name, weight in HEADS.items()
            ]
            total = torch.stack(losses).sum()
            return [total.detach(), *torch.autograd.grad(total, list(self.heads.values()))]

        return run

    def evaluation(self, argmax: Callable[..., Tensor]) -> Side:
        """Return the prediction of every pixel."""
        logits, size = self.heads["logits"].detach(), tuple(self.labels.shape[-2:])
        return lambda: [argmax(logits, size, self.align_corners)]


def draw(given: argparse.Namespace, classes: int, device: torch.device) -> Case:
    """Return random logits, and labels in patches of which a tenth are void."""
    generator = torch.Generator().manual_seed(0)
    grid = [-(-side // given.stride) for side in given.size]
    heads = {}
    for name in HEADS:
        logits = 3 * torch.randn(given.batch, classes, *grid, generator=generator)
        logits = logits.to(device, DTYPES[given.dtype], memory_format=torch.channels_last)
        heads[name] = logits.requires_grad_()
    coarse = torch.randint(0, classes, (given.batch, *grid), generator=generator)
    coarse[torch.rand(coarse.shape, generator=generator) < 0.1] = IGNORE
    labels = coarse.repeat_interleave(given.stride, 1).repeat_interleave(given.stride, 2)
    labels = labels[:, : given.size[0], : given.size[1]].contiguous().to(device)
    return Case(heads, labels, given.align_corners)


def furthest(ours: list[Tensor], plain: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value; of predictions, the share of
    pixels that differ."""
    if not ours[0].is_floating_point():
        return (ours[0] != plain[0]).double().mean().item()
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(ours, plain, strict=True)
    )


def repeats_exactly(side: Side) -> bool:
    """Return whether two runs give the same bits."""
    return all(torch.equal(a, b) for a, b in zip(side(), side(), strict=True))


def seconds(side: Side, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    found = side()
    synchronize(device)
    took = time.perf_counter() - began
    del found
    return took


def peak_of(side: Side, device: torch.device) -> int:
    """Return the peak memory of one run above what was in use before."""
    trim()
    before = held_bytes(device)
    reset_peak(device)
    with freed_at_once():
        found = side()
        synchronize(device)
    del found
    return peak_bytes(device) - before


def form_here(case: Case) -> str:
    """Return which form runs, with the reason if a GPU has no kernels."""
    logits = case.heads["logits"]
    form = form_of(logits, (case.labels.shape[-2], case.labels.shape[-1]))
    on_a_gpu = form == "plain" and logits.device.type == "cuda"
    return f"{form}: {why_no_triton()}" if on_a_gpu else form


@dataclass(frozen=True)
class Row:
    """Ours against the plain form."""

    what: str
    ours_s: float
    ratio: tuple[float, float, float]
    """Of seconds, with the 95 % interval."""
    ours_bytes: int
    plain_bytes: int
    gap: float
    exact: bool

    def cells(self) -> list[str]:
        return [
            self.what,
            f"{1e3 * self.ours_s:.3g}",
            "{:.3f} [{:.3f}-{:.3f}]".format(*self.ratio),
            f"{self.ours_bytes / 2**20:.1f}",
            f"{self.plain_bytes / 2**20:.1f}",
            f"{self.ours_bytes / max(self.plain_bytes, 1):.3f}",
            f"{self.gap:.1g}",
            "yes" if self.exact else "no",
        ]

    def missed(self, device: torch.device, images: int) -> Iterator[str]:
        """Yield a line for each aim that is missed."""
        most_s = images * MOST_GPU_S
        if not self.exact:
            yield f"{self.what}: two runs differ"
        if device.type == "cpu" and self.ratio[0] > MOST_TIME:
            yield f"{self.what}: {self.ratio[0]:.2f} of the time, aim at most {MOST_TIME}"
        if self.what.startswith("evaluation"):
            return
        if device.type == "cpu" and self.ours_bytes > MOST_MEMORY * self.plain_bytes:
            yield f"{self.what}: memory is more than {MOST_MEMORY} of the plain form's"
        if device.type == "cuda" and self.ours_s > most_s:
            yield f"{self.what}: {1e3 * self.ours_s:.1f} ms, aim at most {1e3 * most_s:g} ms"


def compare(what: str, ours: Side, plain: Side, device: torch.device, pairs: int) -> Row:
    """Measure a row; raise KdprofError if the two sides disagree."""
    gap = furthest(ours(), plain())
    if not gap <= RELATIVE:
        raise KdprofError(f"{what}: the two forms differ by {gap:.2g}; nothing is timed")
    mine: list[list[float]] = []
    theirs: list[list[float]] = []
    for turn in range(pairs):
        both = [(ours, mine), (plain, theirs)]
        for side, found in both if turn % 2 == 0 else both[::-1]:
            found.append([seconds(side, device)])
    return Row(
        what,
        statistics.median(took for (took,) in mine),
        paired_ratio(mine, theirs),
        peak_of(ours, device),
        peak_of(plain, device),
        gap,
        repeats_exactly(ours),
    )


COLUMNS = ("what", "ms", "time / plain [95 %]", "MiB", "plain MiB", "memory / plain", "difference",
           "deterministic")  # fmt: skip


def run(given: argparse.Namespace) -> None:
    device = find_device(given.device)
    torch.set_num_threads(given.threads)
    configure_backends(device, given.dtype)
    size = "x".join(map(str, given.size))
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
        f"batch {given.batch}, {size} from stride {given.stride}, "
        f"{given.dtype}, {given.pairs} pairs\n"
    )
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        print(f"| {' | '.join(line)} |", flush=True)
    missed: list[str] = []
    for classes in given.classes:
        case = draw(given, classes, device)
        form = form_here(case)
        for what, ours, plain in (
            ("training", case.training(resized_cross_entropy), case.training(plain_cross_entropy)),
            ("evaluation", case.evaluation(resized_argmax), case.evaluation(plain_argmax)),
        ):
            row = compare(f"{what}, {classes} classes, {form}", ours, plain, device, given.pairs)
            print(f"| {' | '.join(row.cells())} |", flush=True)
            missed += row.missed(device, given.batch)
    print("\n" + ("Aims missed:\n\n- " + "\n- ".join(missed) if missed else "No aim is missed."))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the logits")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=numbers, default=[19, 150])
    parser.add_argument(
        "--size", type=lambda text: [int(side) for side in text.split("x")], default=[512, 1024]
    )
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--align-corners", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        run(arguments())
    except KdprofError as error:
        sys.exit(str(error))
