"""``evaluate`` and ``export``: score and write files of weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kdprof.cli.options import (
    FILE,
    LABELS_HELP,
    grouped,
    label_settings,
    out_option,
    progress,
)
from kdprof.cli.output import say, stdout
from kdprof.errors import Problems, UserError

if TYPE_CHECKING:
    from kdprof.evaluate import Views
    from kdprof.records import AbsentClasses
    from kdprof.store import RunFolder, Store


@dataclass(frozen=True)
class ViewOptions:
    """Options for how images are given to a network."""

    resize: str
    window: str | None
    stride: str | None
    scales: str
    flip: bool

    def views(self, data: str) -> Views:
        """Return the views for a data set (``NAME[:ROOT]``).

        Raises:
            UserError: options are malformed; reports all of them at once.
        """
        from kdprof.data import fit_of
        from kdprof.evaluate import Views

        problems = Problems()
        resize: str | tuple[int, int] | None = self.resize
        if resize not in ("usual", "none"):
            resize = problems.attempt(lambda: _size("resize", self.resize), None)
        window = problems.attempt(lambda: _size("window", self.window), None)
        stride = problems.attempt(lambda: _size("stride", self.stride), None)
        if self.stride and not self.window:
            problems.append("--stride is the distance between windows; add --window")
        if window and stride and (stride[0] > window[0] or stride[1] > window[1]):
            problems.append(
                f"--stride {self.stride} leaves out pixels between windows of {self.window}; give "
                "at most the window"
            )
        scales = problems.attempt(self._scales, ())
        problems.refuse()
        assert resize is not None, "a malformed size was refused"
        return Views(window, stride, scales, self.flip, fit_of(resize, data.partition(":")[0]))

    def _scales(self) -> tuple[float, ...]:
        try:
            found = tuple(float(scale) for scale in self.scales.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < scale < math.inf for scale in found):
            raise UserError(f"--scales {self.scales}: give factors above 0, such as 0.5,1,2")
        return found


def _size(option: str, text: str | None) -> tuple[int, int] | None:
    from kdprof.study import parse_size

    if text is None:
        return None
    try:
        height, width = parse_size(text)
    except ValueError as error:
        raise UserError(f"--{option} {text}: {error}") from None
    if min(height, width) < 1:
        raise UserError(f"--{option} {text}: give sides of at least 1 pixel, such as 512x1024")
    return height, width


@click.command()
@click.option("--model", required=True, help="Network, such as pspnet-r101.")
@click.option("--weights", required=True, type=FILE, help="The network's weights.")
@click.option("--data", required=True, metavar="NAME[:ROOT]", help="Images and labels.")
@click.option("--split", default="val", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@grouped(
    "views",
    ViewOptions,
    click.option(
        "--resize",
        default="usual",
        show_default=True,
        metavar="usual|none|HxW",
        help="Size that images are resized to fit.",
    ),
    click.option("--window", metavar="HxW", help="Slide a window of this size; else whole images."),
    click.option("--stride", metavar="HxW", help="Distance between windows."),
    click.option(
        "--scales", default="1", show_default=True, help="Average over scales, such as 0.5,1,1.5."
    ),
    click.option("--flip", is_flag=True, help="Average over mirrored images, too."),
)
@click.option(
    "--absent-classes",
    type=click.Choice(["skip", "zero"]),
    default="skip",
    show_default=True,
    help="Classes in no label; zero: IoU 0 if predicted, as in mmsegmentation.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help=LABELS_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print only the record, as JSON.")
def evaluate(
    model: str,
    weights: Path,
    data: str,
    split: str,
    device: str,
    precision: str,
    batch: int,
    views: ViewOptions,
    absent_classes: AbsentClasses,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Score a file of weights: IoU per class, mIoU, mAcc, pixel accuracy, images per second."""
    from kdprof.data import open_data
    from kdprof.evaluate import evaluate_file
    from kdprof.hardware.device import check_precision, find_device
    from kdprof.reports.evaluation import print_evaluation, to_json

    seen = views.views(data)
    settings, _ = label_settings(None, assignments)
    where = find_device(device)
    check_precision(where, precision)
    opened = open_data(
        data,
        split,
        synthetic_size=settings.synthetic_size,
        synthetic_count=settings.synthetic_val,
        labels=settings,
    )
    found = evaluate_file(
        model,
        weights,
        opened,
        where,
        batch=batch,
        precision=precision,
        views=seen,
        absent_classes=absent_classes,
        progress=progress(as_json),
    )
    if as_json:
        say(json.dumps(to_json(found), indent=2))
    else:
        print_evaluation(found, stdout())


@click.command()
@click.argument("file", type=FILE)
@out_option()
@click.option("--method", help="Method of the run whose student is written.")
@click.option("--budget", help="Budget of that run.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of that run.")
@click.option("--teacher", is_flag=True, help="Write the trained teacher instead.")
def export(
    file: Path, out: Path, method: str | None, budget: str | None, seed: int, teacher: bool
) -> None:
    """Write a trained network to FILE: .safetensors, .pth in mmsegmentation's names, or .onnx."""
    from kdprof.models.export import export as run
    from kdprof.store import Store
    from kdprof.study import load_study
    from kdprof.train.trained_network import trained_network

    store = Store(out)
    store.require()
    study = load_study(str(store.study), {})
    seeded = click.get_current_context().get_parameter_source("seed") != ParameterSource.DEFAULT
    if teacher and (method or budget or seeded):
        raise UserError("--teacher is no run of a method; leave --method, --budget and --seed out")
    if teacher:
        found = trained_network(store.teacher_folder(), study.teacher, study.teacher_weights)
    elif method and budget:
        found = trained_network(_run_folder(store, method, budget, seed), study.student)
    else:
        raise UserError("give --method and --budget of a run, or --teacher")
    network, classes = found
    described = run(network, file, classes, study.step.crop)
    say(f"wrote {file} ({described})")


def _run_folder(store: Store, method: str, budget: str, seed: int) -> RunFolder:
    folder = store.run_folder(method, budget, seed)
    if folder.read_run() is None:
        known = [f"--method {r.method} --budget {r.budget} --seed {r.seed}" for r in store.runs()]
        raise UserError(
            f"{store.root} holds no run of {method} at {budget} with seed {seed}; its runs are: "
            f"{', '.join(known) or 'none'}"
        )
    return folder
