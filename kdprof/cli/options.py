"""Options that several commands share, each group as a dataclass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kdprof.cli.output import console
from kdprof.errors import Problems, UserError, unknown

if TYPE_CHECKING:
    from kdprof.progress import Progress
    from kdprof.study import DataSettings

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
FILE = click.Path(path_type=Path)
DEFAULT_OUT = Path("kdprof-out")


def grouped(name: str, kind: type, *options: Decorator) -> Decorator:
    """Return a decorator that adds options to a command and passes their values as one object.

    Args:
        name: name of the command's parameter.
        kind: a dataclass whose fields are the options' names.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def collected(**given: Any) -> Any:
            own = {field.name: given.pop(field.name) for field in fields(kind)}
            return command(**given, **{name: kind(**own)})

        decorated: Callable[..., Any] = collected
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def out_option(default: Path = DEFAULT_OUT) -> Decorator:
    """Return the option ``--out``."""
    return click.option(
        "--out",
        default=default,
        show_default=True,
        type=FILE,
        help="Folder of results.",
    )


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print only the records, as JSON."
)
_loudness = (
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print every warm-up and evaluation."),
)


@dataclass(frozen=True)
class OutputOptions:
    """Options for what is printed and where results go."""

    out: Path
    as_json: bool
    quiet: bool
    verbose: bool

    def progress(self) -> Progress:
        """Return the display of progress."""
        return progress(self.quiet or self.as_json, self.verbose)

    @property
    def prints_tables(self) -> bool:
        """True if tables are printed to stdout."""
        return not (self.quiet or self.as_json)


@dataclass(frozen=True)
class LoudnessOptions:
    """Options for how much is printed."""

    quiet: bool
    verbose: bool

    def progress(self) -> Progress:
        """Return the display of progress."""
        return progress(self.quiet, self.verbose)


def progress(silent: bool = False, verbose: bool = False) -> Progress:
    """Return the display of progress on stderr, or a silent one."""
    from kdprof.progress import Progress

    return Progress(None if silent else console(stderr=True), verbose=verbose)


output_options = grouped("output", OutputOptions, out_option(), json_option, *_loudness)
loudness_options = grouped("loudness", LoudnessOptions, *_loudness)


# The study

STUDY_KEYS = {
    "student": "student",
    "teacher": "teacher",
    "teacher_weights": "teacher_weights",
    "student_backbone_weights": "student_backbone_weights",
    "data": "data",
    "device": "device",
    "precision": "step.precision",
    "deterministic": "step.deterministic",
    "batch": "step.batch",
    "gpus": "step.gpus",
    "crop": "step.crop",
}
"""The study key that each option with a single value sets."""


@dataclass(frozen=True)
class StudyOptions:
    """Options that choose a study and change its settings."""

    source: str | None
    assignments: tuple[str, ...]
    methods: tuple[str, ...]
    student: str | None
    teacher: str | None
    teacher_weights: str | None
    student_backbone_weights: str | None
    data: str | None
    device: str | None
    precision: str | None
    deterministic: bool | None
    batch: int | None
    gpus: int | None
    crop: str | None

    def overrides(self) -> dict[str, Any]:
        """Return the study keys that the options set. Paths are absolute, because the stored study
        is also used from other working directories.

        Raises:
            UserError: an assignment is malformed.
        """
        from kdprof.store import absolute
        from kdprof.study import parse_assignments

        found = {key: getattr(self, name) for name, key in STUDY_KEYS.items()}
        found = {key: value for key, value in found.items() if value is not None}
        for key in ("teacher_weights", "student_backbone_weights"):
            if key in found and Path(found[key]).suffix:
                found[key] = str(absolute(found[key]))
        for key in ("student", "teacher"):
            if key in found:
                found[key] = _with_absolute_path(found[key])
        if self.methods:
            found["methods"] = _method_specs(self.methods)
        return found | parse_assignments(self.assignments)


def _method_specs(given: tuple[str, ...]) -> list[str]:
    """Expand ``all`` and make the paths of method files absolute."""
    from kdprof.discovery import builtin_methods

    specs: list[str] = []
    for spec in given:
        specs += builtin_methods() if spec == "all" else [_with_absolute_path(spec)]
    return specs


def _with_absolute_path(text: str) -> str:
    """Make the path absolute if the text is ``FILE.py:NAME`` or ``FILE.py``."""
    from kdprof.store import absolute
    from kdprof.user_files import named_in_file

    own = named_in_file(text)
    if own is None:
        return text
    path = str(absolute(str(own.path)))
    return f"{path}:{own.name}" if own.name else path


study_options = grouped(
    "study",
    StudyOptions,
    click.option(
        "--study",
        "source",
        metavar="FILE|PRESET",
        help="A TOML file, or quickstart, camvid, cityscapes-pspnet-r18, ...",
    ),
    click.option(
        "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any study key."
    ),
    click.option(
        "--method", "methods", multiple=True, help="A name, FILE.py:Class or 'all'; repeatable."
    ),
    click.option("--student", help="Network, such as pspnet-r18."),
    click.option("--teacher", help="Network, such as pspnet-r101."),
    click.option(
        "--teacher-weights",
        metavar="FILE",
        help="Weights of the whole teacher; else it is trained.",
    ),
    click.option(
        "--student-backbone-weights", metavar="FILE", help="A file, 'imagenet' or 'none'."
    ),
    click.option("--data", metavar="NAME[:ROOT]", help="synthetic, cityscapes:ROOT, ..."),
    click.option("--device", help="auto, cpu, cuda or cuda:N."),
    click.option("--precision", help="fp32, tf32, bf16 or fp16."),
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="Steps that repeat bit for bit on a GPU, too; slower.",
    ),
    click.option("--batch", type=int, help="Images per step, over all GPUs."),
    click.option("--gpus", type=int, help="GPUs that share each step of a run."),
    click.option("--crop", metavar="HxW", help="Training crop, pixels."),
)


class FolderCommand(click.Command):
    """A command that reads a folder of results and takes no option of a study."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            UserError: an option of a study was given.
        """
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name in _study_flags():
                raise UserError(
                    f"'{ctx.info_name}' reads the study of a folder of results and takes no "
                    f"{error.option_name}; leave it out, and choose the folder with --out"
                ) from None
            raise


def _study_flags() -> set[str]:
    """Return the options of a study, as users write them."""
    command = click.command()(study_options(lambda study: None))
    return {flag for parameter in command.params for flag in parameter.opts} - {"--method"}


# Measuring


@dataclass(frozen=True)
class MeasuringOptions:
    """Options for how long to measure. They hold for one call and are not stored in the study."""

    precision_target: float | None
    max_time: float | None
    total_time: float | None
    detail: bool
    isolated: bool
    in_process: bool

    def overrides(self) -> dict[str, Any]:
        """Return the study's keys that are set."""
        found = {
            "measure.precision_target": self.precision_target,
            "measure.max_time_s": self.max_time,
            "measure.total_time_s": self.total_time,
            # A flag that was not given must not override the study.
            "measure.detail": self.detail or None,
            "measure.isolated": self.isolated or None,
            "measure.in_process": self.in_process or None,
        }
        return {key: value for key, value in found.items() if value is not None}


measuring_options = grouped(
    "measuring",
    MeasuringOptions,
    click.option(
        "--precision-target", type=float, help="Stop when ratios are this precise: 0.01 = 1 %."
    ),
    click.option(
        "--max-time",
        type=float,
        metavar="SECONDS",
        help="Add no rounds after this time, per method; the rest comes on top.",
    ),
    click.option(
        "--total-time", type=float, metavar="SECONDS", help="The same for all methods together."
    ),
    click.option("--detail", is_flag=True, help="Also time single operators, and energy."),
    click.option("--isolated", is_flag=True, help="Measure each method in a process of its own."),
    click.option("--in-process", is_flag=True, help="Measure in this process, for debugging."),
)


# Training


@dataclass(frozen=True)
class TrainingOptions:
    """Options for what is trained."""

    budgets: tuple[str, ...]
    seeds: int | None
    enforce: str | None
    no_control: bool

    def overrides(self) -> dict[str, Any]:
        """Return the study's keys that are set."""
        found = {
            "budgets": list(self.budgets) or None,
            "seeds": self.seeds,
            "training.enforce": self.enforce,
        }
        return {key: value for key, value in found.items() if value is not None}


training_options = grouped(
    "training",
    TrainingOptions,
    click.option(
        "--budget", "budgets", multiple=True, help="40k@cwd, 2h, 5e17flop, ...; repeatable."
    ),
    click.option("--seeds", type=int, help="Runs per method and budget."),
    click.option("--enforce", help="What ends a run: iterations, time, energy or flop."),
    click.option("--no-control", is_flag=True, help="Leave out the controls none and kd."),
)


LABEL_KEYS = tuple(
    f"data_settings.{name}" for name in ("masks", "label_map", "reduce_zero_label", "ignore_index")
)
LABELS_HELP = "Say what labels mean: data_settings.label_map, ..."


def label_settings(
    source: str | None, assignments: Sequence[str]
) -> tuple[DataSettings, dict[str, Any]]:
    """Return the settings that say what label files mean, and what ``assignments`` set of them.

    Args:
        source: the study with the others; None = the defaults.
        assignments: texts ``KEY=VALUE``; keys are those of :data:`LABEL_KEYS`.

    Raises:
        UserError: a key is another, or a value is not valid. It names every problem.
    """
    from kdprof.study import load_study, parse_assignments

    found = parse_assignments(assignments)
    problems = Problems()
    for key in found:
        if not key.startswith(LABEL_KEYS):
            problems.append(f"--set {unknown('key', key, LABEL_KEYS)}")
    problems.refuse()
    return load_study(source, found).data_settings, found
