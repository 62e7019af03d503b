"""Study: what is compared. A validated object; TOML on disk; presets in the package.

Reading a study needs neither torch nor data; turning one into networks and data sets is
:mod:`kdprof.resolve`'s work.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic.main import IncEx

from kdprof.budget import parse_budget
from kdprof.errors import UserError, nearest, unknown
from kdprof.store import write_atomic

RENAMED = {
    "data_settings.in_memory": 'set data_settings.cache to "none", "memory" or "disk"',
    "training.learning_rate": "set training.schedule_span",
}
"""Keys of earlier versions, with what to write now."""


def presets() -> list[str]:
    """Return the names of the studies that come with kdprof."""
    names = (Path(file.name) for file in files("kdprof.presets").iterdir())
    return sorted(name.stem for name in names if name.suffix == ".toml")


def parse_size(value: Any) -> Any:
    """Read ``HxW`` as (height, width); leave anything else to the validation."""
    if isinstance(value, str):
        parts = value.lower().split("x")
        if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
            return tuple(int(part) for part in parts)
        raise ValueError("must be HEIGHTxWIDTH, such as 512x1024")
    return value


Size = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(parse_size)
]


class Section(BaseModel):
    """Part of a study: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StepSettings(Section):
    """One optimisation step. All of it is part of what a Cost is the cost of."""

    batch: int = Field(8, ge=1)
    """Images per step, over all GPUs."""
    gpus: int = Field(1, ge=1)
    """GPUs of one machine that make a step together, each on its share of the batch; on a CPU,
    processes."""
    sync_batchnorm: bool = True
    """With several GPUs: batch norm over the whole batch, not each GPU's share of it."""
    crop: Size = (512, 1024)
    """Height x width of a training crop, pixels."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32 runs at full float32 (no TF32); bf16 and fp16 by autocast, fp16 with a loss scaler."""
    channels_last: bool = True
    compile: Literal["none", "default", "cuda-graphs"] = "none"
    """default: networks and objective by torch.compile; cuda-graphs: and replayed as CUDA graphs
    (its mode reduce-overhead), on a GPU only."""
    fold_teacher: bool = False
    """Whether the teacher's batch norms are folded into its convolutions: less to compute, the
    same taps up to rounding."""
    aux_weight: float = Field(0.4, ge=0)
    """Weight of the auxiliary head's cross-entropy; 0 leaves the auxiliary head out."""
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["poly", "cosine", "wsd"] = "poly"
    """wsd stays at the base rate and decays at the end: runs of several budgets share a trunk."""
    poly_power: float = Field(0.9, gt=0)
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """The part of a run's iterations over which wsd decays."""
    min_learning_rate: float = Field(1e-4, ge=0)
    """Where the schedule ends."""
    warmup_iterations: int = Field(0, ge=0)
    """Linear warm-up from zero, part of the run's iterations."""

    @property
    def share(self) -> int:
        """Images per GPU and step."""
        return self.batch // self.gpus


class DataSettings(Section):
    """What is fed to a step."""

    workers: int = Field(0, ge=0)
    """Loader processes; 0 assembles batches in the training process."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded images are kept. none: they are decoded at every visit; memory: once, when
    first needed; disk: in a file, mapped into memory, that later processes use again."""
    cache_folder: str | None = None
    """Where that file lies; None = ``kdprof`` in the user's cache folder ($XDG_CACHE_HOME)."""
    resize: Literal["usual", "none"] | Size = "usual"
    """What images are resized to fit before the random scale, and in evaluation; their labels are
    scored at their own size. usual: what is usual for the data set (docs/data.md)."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the random scale."""
    scale_step: float = Field(0.0, ge=0)
    """Between the scales that are drawn; 0 = any."""
    max_class_share: float = Field(1.0, gt=0, le=1)
    """A crop that one class has this share of is drawn again, at most ten times (mmsegmentation's
    cat_max_ratio); 1 = never."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    synthetic_size: Size = (120, 160)
    """Height x width of the synthetic scenes, pixels."""
    synthetic_train: int = Field(400, ge=1)
    synthetic_val: int = Field(80, ge=1)

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("must be (low, high)")
        return value


ADDED, NO_BACKGROUND = "added", "none"


class ScenarioSettings(Section):
    """The class-incremental scenario: a teacher that knows the old classes only, and a student
    that learns the new ones beside them."""

    new: Annotated[list[str], Field(min_length=1)]
    """Classes that the student learns, by the data set's names."""
    old: list[str] = []
    """Classes that the teacher knows; empty = all that are neither new nor background. Classes of
    neither list are unknown to both."""
    setting: Literal["overlapped", "disjoint", "sequential"] = "overlapped"
    """overlapped: images show a class of the step, whatever else; disjoint: and no class still to
    come; sequential: as disjoint, and the student's labels hold the old classes too."""
    background: str = ADDED
    """What pixels of unlabelled classes are: the data set's class of that name, ``added`` for a
    background class that it lacks, or ``none`` to leave them void."""
    initialise: Literal["teacher", "fresh"] = "teacher"
    """teacher: the student starts as the teacher, of the same architecture, its new classes as the
    background where there is one; fresh: as it would without a scenario."""


class TeacherSettings(Section):
    """How the teacher is trained, once per study, with the study's step settings."""

    iterations: int = Field(40_000, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    """None = the step's."""
    method: str = "none"
    """The objective it is trained with; one that reads no teacher."""


class TrainingSettings(Section):
    """How runs keep to their budgets. No part of what a step costs."""

    enforce: Literal["iterations", "time", "energy", "flop"] = "iterations"
    """What ends a run: the iterations solved from the Costs before it began, or, followed while it
    trains, the seconds, joules or FLOP that these were worth."""
    schedule_span: Literal["stretch", "truncate", "published"] = "stretch"
    """What the learning-rate schedule spans: the run; ``schedule_iterations`` for every method; or
    the iterations that were published for each method on the study's data set. The last two are cut
    off where the budget ends."""
    schedule_iterations: int | None = Field(None, ge=1)
    """With truncate: what the schedule spans."""
    startup: Literal["apart", "counted"] = "apart"
    """Whether what the first steps of a process take beyond the planned (compilation, algorithm
    search) counts as training."""
    log_every: int = Field(50, ge=1)
    """Iterations between two lines of the log; only there the host waits for the device."""
    checkpoint_every_s: float = Field(600, gt=0)
    loggers: list[Literal["tensorboard", "wandb"]] = []
    """Where the log goes beside log.jsonl and curve.jsonl: each needs the extra of its name."""


class EvaluationSettings(Section):
    """Validation during a run; never on the training clock."""

    points: int = Field(4, ge=1)
    """Evaluations per run, evenly spaced, the last after the last iteration."""
    batch: int = Field(4, ge=1)


class MeasureSettings(Section):
    """How long to measure each method."""

    precision_target: float = Field(0.01, gt=0)
    """Stop when the 95 % interval of the ratio to the reference is this narrow, as a fraction of
    the ratio."""
    max_time_s: float = Field(60, gt=0)
    """No further round of a method is started after this long, once ``least_rounds`` are made."""
    least_rounds: int = Field(10, ge=3)
    """Rounds made in any case: fewer tell nothing about their own spread."""
    steps: int = Field(3, ge=1)
    """Steps of each method in a round."""
    in_process: bool = False
    """Measure every method in this process, one after the other, instead of each in its own: for
    debugging. A crash then takes all of them with it."""


class Study(Section):
    """What is compared: student, teacher, data, step, methods, budgets, seeds."""

    student: str = "pspnet-r18"
    teacher: str = "pspnet-r101"
    student_backbone_weights: str = "none"
    """none, imagenet (timm's), or a file with a timm state dict."""
    teacher_backbone_weights: str = "none"
    teacher_weights: str | None = None
    """A file of the whole teacher's weights: mmsegmentation's, CIRKD's, torchvision's or kdprof's
    own. None: the teacher is trained, once per study."""
    data: str = "synthetic"
    """synthetic, or NAME:ROOT; to measure without files NAME alone."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:N."""
    methods: list[str] = ["none", "kd"]
    method_settings: dict[str, dict[str, Any]] = {}
    """Hyper-parameters (and ``weights``) other than the published ones, by method."""
    budgets: list[str] = []
    seeds: int = Field(1, ge=1)
    """Runs per (method, budget): seeds 0, 1, ..."""
    scenario: ScenarioSettings | None = None
    """None: teacher and student learn the same classes."""
    step: StepSettings = StepSettings()
    data_settings: DataSettings = DataSettings()
    teacher_training: TeacherSettings = TeacherSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    measure: MeasureSettings = MeasureSettings()

    @field_validator("methods", "budgets")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("budgets")
    @classmethod
    def _budgets_parse(cls, value: list[str]) -> list[str]:
        for text in value:
            try:
                parse_budget(text)
            except UserError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def starts_as_teacher(self) -> bool:
        """Whether every student of this study is a teacher that grew."""
        return self.scenario is not None and self.scenario.initialise == "teacher"

    def to_toml(self) -> str:
        """Return the study as TOML, every field written out."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def comparable(self) -> dict[str, Any]:
        """Return what must agree for two results to belong to one comparison."""
        aside = {"methods", "method_settings", "budgets", "seeds", "device", "measure"}
        exclude: dict[str, IncEx | bool] = {
            **dict.fromkeys(aside, True),
            "data_settings": {"cache_folder"},
            "training": {"loggers"},
        }
        return self.model_dump(mode="json", exclude=exclude)


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }


def load_study(source: str | None, overrides: Mapping[str, Any]) -> Study:
    """Read a preset, a TOML file or (None) the defaults, with dotted ``overrides`` on top.

    Raises:
        UserError: no such preset or file, malformed TOML, or invalid fields; all at once.
    """
    values = _read(source) if source else {}
    for key, value in overrides.items():
        _put(values, key, value)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        origin = source or "study"
        raise UserError(*(_explain(origin, item) for item in error.errors())) from None


def with_measuring(study: Study, overrides: Mapping[str, Any]) -> Study:
    """Return a study that is measured otherwise; ``overrides`` are keys such as
    ``measure.max_time_s``.

    Raises:
        UserError: a value is not valid.
    """
    own = {f"measure.{key}": value for key, value in study.measure.model_dump().items()}
    return study.model_copy(update={"measure": load_study(None, own | dict(overrides)).measure})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; values are TOML, and plain words are strings.

    Raises:
        UserError: a text has no ``=``.
    """
    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {text}: write key=value, such as step.batch=4")
        found[key.strip()] = _toml_value(value.strip())
    return found


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in presets():
        text = (files("kdprof.presets") / f"{source}.toml").read_text()
    elif path.is_file():
        text = path.read_text()
    elif path.suffix == ".toml" or "/" in source:
        raise UserError(f"no study file {source}; give a file or a preset: {', '.join(presets())}")
    else:
        raise UserError(unknown("preset", source, presets()))
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"'{key}': '{parent}' is a value, not a section; see the study's keys")
    values[last] = value


def _explain(origin: str, error: Any) -> str:
    """Return one line for one pydantic error: where, what, and the nearest valid name."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    if where in RENAMED:
        return f"{origin}: there is no '{where}' any more; {RENAMED[where]}"
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{where}'; {nearest(path[-1], _fields_at(path[:-1]))}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{origin}: {where}: {message}, not {error['input']!r}"


def _fields_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = Study
    for part in path:
        annotation = model.model_fields[part].annotation
        types = [annotation, *get_args(annotation)]  # a section may be optional
        model = next(t for t in types if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)


def join_study(file: Path, study: Study) -> Study:
    """Return the study joined with what a results folder already compares.

    Methods, budgets and seeds add up over calls; everything else must agree.

    Args:
        file: the folder's ``study.toml``, which need not exist.

    Raises:
        UserError: the folder holds another study.
    """
    if not file.is_file():
        return study
    there = load_study(str(file), {})
    differing = _differences(there.comparable(), study.comparable())
    if differing:
        raise UserError(
            f"{file.parent} holds another study ({'; '.join(differing)}); use another --out"
        )
    return study.model_copy(
        update={
            "methods": list(dict.fromkeys([*there.methods, *study.methods])),
            "budgets": list(dict.fromkeys([*there.budgets, *study.budgets])),
            "seeds": max(there.seeds, study.seeds),
            "method_settings": {**there.method_settings, **study.method_settings},
        }
    )


def claim_folder(file: Path, study: Study) -> None:
    """Write the joined study into a results folder, see :func:`join_study`."""
    write_atomic(file, join_study(file, study).to_toml())


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in there.items():
        if isinstance(value, dict) and isinstance(here[key], dict):
            found += _differences(value, here[key], f"{prefix}{key}.")
        elif value != here[key]:
            found.append(f"{prefix}{key} is {value!r} there, {here[key]!r} here")
    return found
