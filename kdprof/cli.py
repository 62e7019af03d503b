"""The command line: parse, call, print. Imports what a command needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdprof import __version__
from kdprof.errors import KdprofError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from kdprof.evaluate import Views
    from kdprof.measure.feeding import Feeding
    from kdprof.progress import Progress
    from kdprof.records import Cost
    from kdprof.resolve import ResolvedStudy
    from kdprof.store import Store
    from kdprof.study import MeasureSettings, Study
    from kdprof.train import Prepared, Summary

Command = TypeVar("Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
DEFAULT_OUT = "kdprof-out"
DEMO_OUT = "kdprof-demo"


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _out(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--out",
        default=default,
        show_default=True,
        type=click.Path(path_type=Path),
        help="Folder of results.",
    )


_json = click.option("--json", "as_json", is_flag=True, help="Records on stdout, nothing else.")
_loudness = _options(
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print every warm-up and evaluation."),
)
_study = _options(
    click.option(
        "--study",
        "source",
        metavar="FILE|PRESET",
        help="quickstart, camvid, cityscapes-pspnet-r18, ...",
    ),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any study key."),
    click.option("--method", "methods", multiple=True, help="Repeatable; 'all'; FILE.py:Class."),
    click.option("--student", help="Network, such as pspnet-r18."),
    click.option("--teacher", help="Network, such as pspnet-r101."),
    click.option("--teacher-weights", metavar="FILE", help="Whole teacher; else it is trained."),
    click.option("--backbone-weights", metavar="FILE", help="Student's; or 'imagenet', 'none'."),
    click.option("--data", metavar="NAME[:ROOT]", help="synthetic, cityscapes:ROOT, ..."),
    click.option("--device", help="auto, cpu, cuda or cuda:N."),
    click.option("--precision", help="fp32, bf16 or fp16."),
    click.option("--batch", type=int, help="Images per step, over all GPUs."),
    click.option("--gpus", type=int, help="GPUs that share each step of a run."),
    click.option("--crop", metavar="HxW", help="Training crop, pixels."),
    _out(DEFAULT_OUT),
    _json,
    _loudness,
)
_STUDY_KEYS = {
    "student": "student",
    "teacher": "teacher",
    "teacher_weights": "teacher_weights",
    "backbone_weights": "student_backbone_weights",
    "data": "data",
    "device": "device",
    "precision": "step.precision",
    "batch": "step.batch",
    "gpus": "step.gpus",
    "crop": "step.crop",
}
_MEASURE_KEYS = {
    "precision_target": "measure.precision_target",
    "max_time": "measure.max_time_s",
    "in_process": "measure.in_process",
}


_NOT_FOR_STEPS = {
    "methods": "--method",
    "source": "--study",
    "assignments": "--set",
    "student": "--student",
    "teacher": "--teacher",
    "teacher_weights": "--teacher-weights",
    "backbone_weights": "--backbone-weights",
    "data": "--data",
    "batch": "--batch",
    "gpus": "--gpus",
    "crop": "--crop",
}


class Slower(KdprofError):
    """A measurement that is worse than its baseline."""

    exit_code = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """What a knowledge-distillation method for semantic segmentation really buys.

    measure what a training step costs, convert schedules to equal compute, train at matched
    budgets, plot accuracy against compute.
    """


@cli.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the page of all methods, docs/methods.md.")
@click.option("--check", is_flag=True, help="Check NAME, or every built-in, on small networks.")
def methods(name: str | None, markdown: bool, check: bool) -> None:
    """List the methods, or print one: terms, weights, taps, recipes, paper.

    NAME is a method's, or FILE.py:ClassName of your own. With --check: whether it keeps what a
    method promises (gradients, resume, determinism, bf16, ...); the exit code is 1 if not.
    """
    from kdprof.catalogue import print_method, print_methods
    from kdprof.method import builtin_methods, find_method

    if check and markdown:
        raise UserError("--check and --markdown do not go together; give one of them")
    if check:
        _check_methods(name)
    elif markdown:
        from kdprof import method_cards

        if name:
            raise UserError("--markdown prints all built-in methods; leave the name out")
        click.echo(method_cards.markdown(builtin_methods()), nl=False)
    elif name is None:
        print_methods(builtin_methods(), _stdout())
    else:
        print_method(find_method(name), _stdout())


def _check_methods(name: str | None) -> None:
    from kdprof.contract import check_method, check_methods
    from kdprof.method import builtin_methods, find_method
    from kdprof.reports.contract import verdict_line, verdict_table

    if name is not None:
        found = find_method(name)
        results = [check_method(found)]
        verdict_table(found.cls.name, results[0], _stdout())
    else:
        results = []
        for found, verdicts in check_methods(builtin_methods().values()):
            verdict_line(found.cls.name, verdicts, _stdout())
            results.append(verdicts)
    if any(verdict.outcome == "failed" for verdicts in results for verdict in verdicts):
        raise click.exceptions.Exit(1)


_measuring = _options(
    click.option("--precision-target", type=float, help="Stop at ratios this precise: 0.01 = 1 %."),
    click.option(
        "--max-time", type=float, metavar="SECONDS", help="... or after this, per method."
    ),
    click.option("--in-process", is_flag=True, help="No process per method: for debugging."),
    click.option("--count-only", is_flag=True, help="Count at full size; run and store nothing."),
    click.option("--modules", is_flag=True, help="With --count-only: FLOP by module, with fvcore."),
    click.option("--step", "steps", multiple=True, metavar="FILE.py:FUNC", help="Anybody's step."),
    click.option("--baseline", type=_FILE, help="Compare with these Costs; exit 3 where slower."),
    click.option("--trace", type=_FILE, help="Write a Chrome trace of two steps."),
    click.option("--memory-timeline", type=_FILE, help="Write the CUDA allocator's history."),
)


@cli.command()
@_study
@_measuring
def measure(count_only: bool, modules: bool, steps: tuple[str, ...], **given: Any) -> None:
    """Measure what one training step of each method costs on this device."""
    if steps:
        _measure_steps(steps, given, count_only or modules)
    elif count_only:
        _count(given, modules)
    elif modules:
        raise UserError("--modules counts without running; add --count-only")
    else:
        _measure(given)


def _measure(given: dict[str, Any]) -> None:
    from kdprof.measure import check_files
    from kdprof.measure import measure as run
    from kdprof.measure.session import Files
    from kdprof.records import REFERENCE
    from kdprof.reports.costs import render
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import claim_folder

    baseline = _baseline(given)
    plain, store, progress = _begin(given)
    # How long to measure belongs to this call, not to the folder's study.
    study = plain.model_copy(update={"measure": _measure_settings(plain, given)})
    resolved = ResolvedStudy(study, progress=progress, weights=False)
    files = Files(given["trace"], given["memory_timeline"])
    check_files(files, resolved.device)
    names = resolved.method_names(control=False)
    if store.read_cost(REFERENCE, resolved.cost_key(REFERENCE)) is None:
        names = list(dict.fromkeys([REFERENCE, *names]))
    paths = []

    def keep(cost: Cost) -> None:
        """Store what is measured at once: a later method may be stopped."""
        claim_folder(store.study, plain)
        paths.append(store.write_cost(cost))

    measured = run(resolved, names, progress, files, keep)
    _show_costs(measured.costs, given, paths)
    if paths and not given["quiet"] and not given["as_json"]:
        _name_files(render(store))
    _conclude(baseline, measured.costs, measured.summary(), given)


def _count(given: dict[str, Any], modules: bool) -> None:
    from kdprof.measure import count_costs
    from kdprof.records import REFERENCE
    from kdprof.reports.costs import count_table
    from kdprof.resolve import ResolvedStudy

    study, _, progress = _begin(given)
    resolved = ResolvedStudy(study, progress=progress, weights=False)
    names = list(dict.fromkeys([REFERENCE, *resolved.method_names(control=False)]))
    measured = count_costs(resolved, names, progress, modules=modules)
    if given["as_json"]:
        _print_json(measured.costs)
    elif not given["quiet"]:
        count_table(measured.costs, _stdout(), detail=given["verbose"])
    if measured.failures:
        raise KdprofError(measured.summary())


def _measure_steps(steps: tuple[str, ...], given: dict[str, Any], counting: bool) -> None:
    """Measure the steps that files make; the study's options do not apply to them."""
    from kdprof.device import find_device
    from kdprof.measure import check_files
    from kdprof.measure.callables import StepSource, measure_files
    from kdprof.measure.session import Files
    from kdprof.reports.costs import render_steps
    from kdprof.store import Store
    from kdprof.study import Study

    taken = [option for name, option in _NOT_FOR_STEPS.items() if given[name]]
    if taken or counting:
        told = ", ".join(taken) or "--count-only"
        raise UserError(f"--step measures a step as it is made: {told} cannot apply; leave it out")
    files = Files(given["trace"], given["memory_timeline"])
    check_files(files, find_device(given["device"] or "auto"))
    baseline = _baseline(given)
    progress = _progress(given["quiet"], given["verbose"], given["as_json"])
    costs, failures = measure_files(
        [StepSource.parse(spec) for spec in steps],
        device=given["device"] or "auto",
        precision=given["precision"],
        settings=_measure_settings(Study(), given),
        files=files,
        progress=progress,
    )
    store = Store(given["out"])
    paths = [store.write_step_cost(cost) for cost in costs]
    _show_costs(costs, given, paths)
    if not given["quiet"] and not given["as_json"]:
        _name_files(render_steps(store))
    summary = "\n".join(f"step '{name}': {why}" for name, why in failures.items())
    _conclude(baseline, costs, summary, given)


def _measure_settings(study: Study, given: dict[str, Any]) -> MeasureSettings:
    """Return the study's measure settings with the options of this call on top.

    Raises:
        UserError: an option has no valid value.
    """
    from kdprof.study import load_study

    taken = {key: given[option] for option, key in _MEASURE_KEYS.items()}
    # A flag that was not given must not undo what the study says.
    flags = {key: v for key, v in taken.items() if v is not None and v is not False}
    settings = {f"measure.{key}": value for key, value in study.measure.model_dump().items()}
    return load_study(None, settings | flags).measure


def _show_costs(costs: list[Cost], given: dict[str, Any], paths: list[Path]) -> None:
    from kdprof.reports.costs import measure_table

    if given["as_json"]:
        _print_json(costs)
    elif costs and not given["quiet"]:
        measure_table(costs, _stdout(), detail=given["verbose"])
        _name_files(paths)


def _baseline(given: dict[str, Any]) -> list[Cost] | None:
    """Read the baseline first: a file that cannot be read is found before anything is measured."""
    from kdprof.comparison import read_costs

    return None if given["baseline"] is None else read_costs(given["baseline"])


def _conclude(
    baseline: list[Cost] | None, costs: list[Cost], failures: str, given: dict[str, Any]
) -> None:
    """Compare with the baseline, where one was given, and say what failed.

    Raises:
        Slower: a method takes longer than it did.
        KdprofError: something could not be measured.
    """
    slower = []
    if baseline is not None and costs:
        from kdprof.comparison import compare as run
        from kdprof.reports.comparison import comparison_table

        comparison = run(baseline, costs)
        if not given["quiet"] and not given["as_json"]:
            comparison_table(comparison, _stdout())
        slower = [
            row.method + ("" if row.reliable else " (unreliable)")
            for row in comparison.rows
            if row.verdict == "slower"
        ]
    if failures:
        raise KdprofError(failures)
    if slower:
        raise Slower(f"slower than the baseline: {', '.join(slower)}")


@cli.command()
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
def compare(old: Path, new: Path) -> None:
    """Compare the Costs in OLD with those in NEW: record files, or folders of results."""
    from kdprof.comparison import compare as run
    from kdprof.comparison import read_costs
    from kdprof.reports.comparison import comparison_table

    comparison_table(run(read_costs(old), read_costs(new)), _stdout())


@cli.command()
@click.argument("budget", required=False)
@click.option("--published", is_flag=True, help="Convert the published schedules instead.")
@click.option("--dataset", metavar="NAME", help="With --published: of this data set only.")
@_out(DEFAULT_OUT)
@click.option("--json", "as_json", is_flag=True, help="Conversions on stdout, nothing else.")
def convert(
    budget: str | None, published: bool, dataset: str | None, out: Path, as_json: bool
) -> None:
    """Print the iterations of every measured method that BUDGET buys.

    BUDGET is 40k@cwd, 40k, 2h, 30min, 90s, 5e17flop, 800kJ or 1.5kWh. With --published: what the
    schedules of the papers cost on this device, and how many iterations of kd take as long.
    """
    from kdprof.store import Store

    if published == (budget is not None):
        raise UserError("give either a budget, such as 40k@cwd, or --published")
    if dataset and not published:
        raise UserError("--dataset selects published schedules; add --published")
    store = Store(out)
    if published:
        _convert_published(store, dataset, as_json)
    else:
        _convert_budget(budget, store, as_json)


def _convert_budget(budget: str, store: Store, as_json: bool) -> None:
    from kdprof.budget import convert as run
    from kdprof.budget import parse_budget
    from kdprof.reports.conversion import conversion_table

    parsed = parse_budget(budget)
    store.require()
    conversions = run(parsed, store.latest_costs())
    if as_json:
        _print_plain_json(conversions)
    else:
        conversion_table(budget, conversions, _stdout())


def _convert_published(store: Store, dataset: str | None, as_json: bool) -> None:
    from kdprof.published import classes_of
    from kdprof.published import published as run
    from kdprof.reports.published import published_table
    from kdprof.study import load_study

    store.require()
    costs = store.latest_costs()
    classes = classes_of(costs, load_study(str(store.study), {}).methods)
    found = run(costs, classes, dataset)
    if as_json:
        _print_plain_json(found)
    else:
        published_table(found, list(costs.values()), _stdout())


_training = _options(
    click.option(
        "--budget", "budgets", multiple=True, help="Repeatable; 40k@cwd, 2h, 5e17flop, ..."
    ),
    click.option("--seeds", type=int, help="Runs per method and budget."),
    click.option("--enforce", help="What ends a run: iterations, time, energy or flop."),
    click.option("--no-control", is_flag=True, help="Leave out the controls none and kd."),
)


_launching = _options(
    click.option(
        "--launcher",
        type=click.Choice(["local", "slurm"]),
        help="local: many runs at once on this machine, each in its own process; slurm: as jobs.",
    ),
    click.option(
        "--slots",
        type=click.IntRange(min=1),
        metavar="N",
        help="With --launcher local: runs at once (default: one per GPU; 2 on a CPU).",
    ),
    click.option(
        "--slurm",
        "slurm_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="With --launcher slurm: partition, account, qos, constraint, time, cpus, ...",
    ),
)


@cli.command()
@_study
@_training
@_launching
def train(
    no_control: bool,
    launcher: str | None,
    slots: int | None,
    slurm_options: tuple[str, ...],
    **given: Any,
) -> None:
    """Train every method at every budget; measures first what is missing."""
    from kdprof.data import require_files

    if slots is not None and launcher != "local":
        raise UserError("--slots divides this machine among runs; add --launcher local")
    if slurm_options and launcher != "slurm":
        raise UserError("--slurm asks a cluster for something; add --launcher slurm")
    study, store, progress = _begin(given)
    if not study.budgets:
        raise UserError("no budget given; add --budget, such as --budget 2k@kd or --budget 10min")
    require_files(study.data)  # before anything is measured
    if launcher == "slurm":
        _submit(study, store, slurm_options, not no_control)
        return
    if launcher == "local":
        summary = _train_locally(study, store, progress, not no_control, slots)
    else:
        summary = _train_here(study, store, progress, not no_control)
    if summary is not None:
        _conclude_training(summary, store, given)


def _submit(study: Study, store: Store, options: tuple[str, ...], control: bool) -> None:
    if find_spec("submitit") is None:
        raise UserError("--launcher slurm needs submitit; pip install 'kdprof[slurm]'")
    from kdprof.launch.slurm import job_name, parse_options, submit

    made = submit(study, store, parse_options(options), control=control)
    click.echo(
        f"submitted {made.runs} runs as {len(made.tasks)} tasks ({made.tasks[0]} ...), after "
        f"{made.preparation}, which measures and trains the teacher\n"
        f"follow: kdprof status --out {store.root}; logs: {store.slurm}; "
        f"cancel: scancel --name={job_name(store)}"
    )


def _train_here(study: Study, store: Store, progress: Progress, control: bool) -> Summary | None:
    """Train in this process, or in a group of them that this or torchrun starts; None in those
    that follow another."""
    from kdprof.launch.group import in_group, run_group
    from kdprof.parallel import Place, Ranks
    from kdprof.resolve import ResolvedStudy
    from kdprof.train import train as run

    if study.step.gpus > 1 and Place.from_environment() is None:
        arguments = ["-P", "-m", "kdprof", *sys.argv[1:]]
        raise click.exceptions.Exit(run_group(arguments, study.step.gpus))

    def lead(ranks: Ranks | None) -> Summary:
        resolved = ResolvedStudy(study, progress=progress, ranks=ranks)
        prepared = _prepare(resolved, store, progress, control)
        return run(resolved, store, progress, control=control, prepared=prepared)

    return in_group(study, lead)


def _train_locally(
    study: Study, store: Store, progress: Progress, control: bool, slots: int | None
) -> Summary:
    from kdprof.launch.local import divide, train_locally
    from kdprof.resolve import ResolvedStudy

    # First: the threads that a slot has are part of what is measured.
    divided = divide(study.device, slots, study.step.gpus)
    resolved = ResolvedStudy(study, progress=progress)
    prepared = _prepare(resolved, store, progress, control)
    return train_locally(resolved, store, progress, divided, control=control, prepared=prepared)


def _prepare(resolved: ResolvedStudy, store: Store, progress: Progress, control: bool) -> Prepared:
    from kdprof.study import claim_folder
    from kdprof.train import prepare

    # First, because it is where a step that cannot fit is refused: nothing is written by then.
    prepared = prepare(resolved, store, resolved.method_names(control=control), progress)
    claim_folder(store.study, resolved.study)
    return prepared


def _conclude_training(summary: Summary, store: Store, given: dict[str, Any]) -> None:
    from kdprof.reports.table import print_table

    if given["as_json"]:
        _print_json(store.runs())
    elif not given["quiet"]:
        if store.runs():
            print_table(store, _stdout())
        click.echo(
            f"{len(summary.finished)} runs trained, {summary.skipped} were finished before, "
            f"{len(summary.elsewhere)} are held by other processes, {len(summary.failures)} "
            f"failed; next: kdprof plot --out {store.root}"
        )
    if summary.failures:
        raise KdprofError("\n".join(summary.failures))


@cli.command()
@click.option("--model", required=True, help="Network, such as pspnet-r101.")
@click.option("--weights", required=True, type=_FILE, help="Its weights.")
@click.option("--data", required=True, metavar="NAME[:ROOT]", help="Images and labels.")
@click.option("--split", default="val", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--resize",
    default="usual",
    show_default=True,
    metavar="usual|none|HxW",
    help="What images are resized to fit.",
)
@click.option("--window", metavar="HxW", help="Slide a window of this size; else whole images.")
@click.option("--stride", metavar="HxW", help="Between windows.")
@click.option("--scales", default="1", show_default=True, help="Such as 0.5,0.75,1,1.25,1.5,1.75.")
@click.option("--flip", is_flag=True, help="See every image mirrored as well.")
@click.option("--json", "as_json", is_flag=True, help="One record on stdout, nothing else.")
def evaluate(as_json: bool, **given: Any) -> None:
    """Score a file of weights: IoU per class, mIoU, mAcc, pixel accuracy, images per second."""
    import json

    from kdprof.data import open_data
    from kdprof.device import find_device
    from kdprof.evaluate import evaluate_file
    from kdprof.reports.evaluation import print_evaluation, to_json
    from kdprof.study import DataSettings

    views, device = _views(given), find_device(given["device"])
    synthetic = DataSettings()
    data = open_data(
        given["data"],
        given["split"],
        synthetic_size=synthetic.synthetic_size,
        synthetic_count=synthetic.synthetic_val,
    )
    found = evaluate_file(
        given["model"],
        given["weights"],
        data,
        device,
        batch=given["batch"],
        precision=given["precision"],
        views=views,
        progress=_progress(False, False, as_json),
    )
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    else:
        print_evaluation(found, _stdout())


def _views(given: dict[str, Any]) -> Views:
    from kdprof.data import fit_of
    from kdprof.evaluate import Views
    from kdprof.study import parse_size

    problems, sizes = [], {}
    for option in ("resize", "window", "stride"):
        if given[option] in ("usual", "none"):
            continue
        try:
            sizes[option] = parse_size(given[option])
        except ValueError as error:
            problems.append(f"--{option} {given[option]}: {error}")
    if given["stride"] and not given["window"]:
        problems.append("--stride is between windows; add --window")
    try:
        scales = tuple(float(scale) for scale in given["scales"].split(","))
    except ValueError:
        scales = ()
    if not scales or min(scales) <= 0:
        problems.append(f"--scales {given['scales']}: give factors above 0, such as 0.5,1,2")
    if problems:
        raise UserError(*problems)
    fit = fit_of(sizes.get("resize", given["resize"]), given["data"].partition(":")[0])
    return Views(sizes["window"], sizes["stride"], scales, given["flip"], fit)


@cli.command()
@click.argument("file", type=_FILE)
@_out(DEFAULT_OUT)
@click.option("--method", help="Of the run whose student is written.")
@click.option("--budget", help="Of that run.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of that run.")
@click.option("--teacher", is_flag=True, help="Write the teacher that was trained instead.")
def export(
    file: Path, out: Path, method: str | None, budget: str | None, seed: int, teacher: bool
) -> None:
    """Write a trained network to FILE: .safetensors, .pth in mmsegmentation's names, or .onnx."""
    from kdprof.export import export as run
    from kdprof.store import Store
    from kdprof.study import load_study
    from kdprof.train.trained import trained_network

    store = Store(out)
    store.require()
    if teacher == bool(method or budget):
        raise UserError("give --method and --budget of a run, or --teacher")
    study = load_study(str(store.study), {})
    if teacher:
        folder, name = store.teacher_folder(), study.teacher
    else:
        known = [f"--method {r.method} --budget {r.budget} --seed {r.seed}" for r in store.runs()]
        folder, name = store.run_folder(method or "", budget or "", seed), study.student
        if folder.read_run() is None:
            raise UserError(
                f"no run of {method} at {budget} with seed {seed} in {out}; there are "
                f"{', '.join(known) or 'none'}"
            )
    network, classes = trained_network(folder, name)
    told = run(network, file, classes, study.step.crop)
    click.echo(f"wrote {file} ({told})")


@cli.group()
def data() -> None:
    """Look at a data set."""


@data.command()
@click.argument("spec", metavar="NAME:ROOT")
@click.option("--split", "splits", multiple=True, help="Repeatable; train and val if not given.")
@click.option("--sheet", type=_FILE, help="Contact sheet [default: NAME-check.png].")
@click.option("--study", "source", metavar="FILE|PRESET", help="Time loading against its step.")
def check(spec: str, splits: tuple[str, ...], sheet: Path | None, source: str | None) -> None:
    """Read every file of a data set: counts, sizes, label values, classes, and a contact sheet.

    The exit code is 1 where something is wrong.
    """
    from kdprof.data.check import check_data
    from kdprof.reports.data_check import contact_sheet, print_check

    found = check_data(spec, splits or ("train", "val"), _progress(False, False, False))
    print_check(found, _stdout())
    if any(split.shown for split in found.splits):
        sheet = sheet or Path(f"{found.name}-check.png")
        contact_sheet(found, sheet)
        _name_files([sheet])
    if found.problems:
        raise click.exceptions.Exit(1)
    if source is not None:
        from kdprof.doctor import print_feeding

        print_feeding(_feeding(source, spec, ()), _stdout())


@cli.command()
@_study
@_training
def plan(no_control: bool, **given: Any) -> None:
    """Print what 'train' with the same options will take; measures first what is missing."""
    from kdprof.reports.plan import plan_table
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import claim_folder
    from kdprof.train import prepare
    from kdprof.train.plan import forecast

    study, store, progress = _begin(given)
    resolved = ResolvedStudy(study, progress=progress, weights=False)
    names = resolved.method_names(control=not no_control)
    prepared = prepare(resolved, store, names, progress)
    found = forecast(resolved, store, [n for n in names if n in prepared.costs], prepared.costs)
    claim_folder(store.study, study.model_copy(update={"budgets": [], "seeds": 1}))
    if given["as_json"]:
        _print_plain_json(found)
    elif not given["quiet"]:
        plan_table(found, _stdout())
    if prepared.failures:
        raise KdprofError("\n".join(prepared.failures))


@cli.command()
@_out(DEFAULT_OUT)
@click.option("--json", "as_json", is_flag=True, help="Records on stdout, nothing else.")
def status(out: Path, as_json: bool) -> None:
    """Print how far the runs are, also while another terminal trains them."""
    from kdprof.reports.status import status_table
    from kdprof.store import Store

    store = Store(out)
    store.require()
    if as_json:
        _print_json(store.runs())
    else:
        status_table(store, _stdout())


@cli.command()
@_out(DEFAULT_OUT)
@click.option(
    "--x",
    type=click.Choice(["seconds", "gpu-hours", "flop", "iterations"]),
    default="seconds",
    show_default=True,
    help="Compute axis.",
)
def plot(out: Path, x: str) -> None:
    """Plot accuracy against compute and write the tables."""
    from kdprof.store import Store

    store = Store(out)
    store.require()
    _name_files(_reports(store, x))


@cli.command()
@_out(DEMO_OUT)
@_loudness
def demo(out: Path, quiet: bool, verbose: bool) -> None:
    """Measure, convert, train and plot on synthetic data, on the CPU, in a few minutes."""
    from kdprof.demo import run

    run(out, _progress(quiet, verbose, False), _stdout())


@cli.command()
@click.option("--study", "source", metavar="FILE|PRESET", help="Whose input and step are timed.")
@click.option("--data", metavar="NAME[:ROOT]", help="Time the input from these images.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any study key.")
def doctor(source: str | None, data: str | None, assignments: tuple[str, ...]) -> None:
    """Print what this machine has, and what it costs where something is missing.

    With a study or data also whether the loader keeps up with the step.
    """
    from kdprof.doctor import print_feeding, print_findings

    asked = source or data or assignments
    # First: what is wrong with the study is told before anything is printed.
    feeding = _feeding(source, data, assignments) if asked else None
    print_findings(_stdout())
    if feeding is not None:
        print_feeding(feeding, _stdout())


def _feeding(source: str | None, data: str | None, assignments: tuple[str, ...]) -> Feeding:
    from kdprof.measure.feeding import measure_feeding
    from kdprof.resolve import ResolvedStudy
    from kdprof.study import load_study, parse_assignments

    overrides = parse_assignments(assignments)
    if data is not None:
        overrides["data"] = data
    progress = _progress(False, False, False)
    resolved = ResolvedStudy(load_study(source, overrides), progress=progress)
    return measure_feeding(resolved, progress)


def _begin(given: dict[str, Any]) -> tuple[Study, Store, Progress]:
    """Return the study that the options describe, the results folder and where to report.

    Raises:
        UserError: invalid options, or a results folder of another study.
    """
    from kdprof.store import Store
    from kdprof.study import join_study, load_study, parse_assignments

    store = Store(given["out"])
    store.check_writable()
    overrides = {k: given[o] for o, k in _STUDY_KEYS.items() if given[o] is not None}
    for key in ("teacher_weights", "student_backbone_weights"):
        if key in overrides and Path(overrides[key]).suffix:  # the study outlives this folder
            overrides[key] = str(Path(overrides[key]).expanduser().resolve())
    for key in ("student", "teacher"):
        path, colon, function = str(overrides.get(key, "")).rpartition(".py:")
        if colon:
            overrides[key] = f"{Path(path + '.py').expanduser().resolve()}:{function}"
    for key in ("methods", "budgets"):
        if given.get(key):
            overrides[key] = _method_specs(given[key]) if key == "methods" else list(given[key])
    for option, key in (("seeds", "seeds"), ("enforce", "training.enforce")):
        if given.get(option) is not None:
            overrides[key] = given[option]
    overrides.update(parse_assignments(given["assignments"]))
    source = given["source"] or (str(store.study) if store.study.is_file() else None)
    progress = _progress(given["quiet"], given["verbose"], given["as_json"])
    study = load_study(source, overrides)
    join_study(store.study, study)
    return study, store, progress


def _method_specs(given: tuple[str, ...]) -> list[str]:
    """Expand ``all`` and make paths of method files absolute: the study outlives this folder."""
    from kdprof.method import builtin_methods

    specs: list[str] = []
    for spec in given:
        path, colon, name = spec.partition(".py")
        if spec == "all":
            specs += builtin_methods()
        else:
            specs.append(f"{Path(path).resolve()}{colon}{name}" if colon else spec)
    return specs


def _reports(store: Store, x: str) -> list[Path]:
    from kdprof.reports import costs, curves, table

    made = costs.render(store)
    if made and not store.runs():
        click.echo("nothing was trained here yet: the costs only")
        return made
    return [*curves.render(store, x=x), *table.render(store), *made]


def _stdout() -> Console:
    from rich.console import Console

    return Console()


def _progress(quiet: bool, verbose: bool, as_json: bool) -> Progress:
    from rich.console import Console

    from kdprof.progress import Progress

    return Progress(None if quiet or as_json else Console(stderr=True), verbose=verbose)


def _print_json(records: list[Any]) -> None:
    from kdprof.store import to_json

    click.echo(to_json(records))


def _print_plain_json(rows: list[Any]) -> None:
    import json

    click.echo(json.dumps([vars(row) for row in rows], indent=2))


def _name_files(paths: list[Path]) -> None:
    for path in paths:
        click.echo(f"wrote {path}")


def main() -> None:
    """Run the command line; every failure is one line unless ``--debug`` asks for more."""
    if "--debug" in sys.argv:
        os.environ["KDPROF_DEBUG"] = "1"  # for the processes that measure
        _leave(cli(standalone_mode=False))
    try:
        code = cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("kdprof: interrupted; what was written is whole", err=True)
        code = 130
    except click.ClickException as error:
        click.echo(f"kdprof: {_usage_message(error)}", err=True)
        code = 2
    except KdprofError as error:
        for line in str(error).splitlines():
            click.echo(f"kdprof: {line}", err=True)
        code = error.exit_code
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        click.echo(
            f"kdprof: {type(error).__name__}: {message}; run 'kdprof --debug ...' for details",
            err=True,
        )
        code = 1
    _leave(code)


def _leave(code: int | None) -> None:
    """End with an exit code; a process of a group in the way that its agent understands."""
    if "RANK" in os.environ:
        from kdprof.launch.group import leave

        leave(code or 0)
    sys.exit(code)


def _usage_message(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message} See '{error.ctx.command_path} --help'."
    return message
