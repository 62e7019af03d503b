"""Study: the settings of a comparison, as a validated object, read from TOML files and presets.

Reading a study needs neither torch nor data; :mod:`kdprof.resolve` turns it into networks and data
sets.
"""

from __future__ import annotations

import datetime
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.main import IncEx
from pydantic_core import PydanticCustomError

from kdprof.budget import parse_budget
from kdprof.errors import KdprofError, UserError, nearest, unknown
from kdprof.store import read_toml, write_atomic
from kdprof.user_files import NamedInFile, named_in_file

LONGEST_TEXT = 4096
"""Characters of a text in a study: no path is longer."""
LARGEST_STUDY = 2**20
"""Bytes of the largest file of a study."""
DEEPEST_KEY = 10
"""No key that a user sets lies in so many sections."""
_UNWRITTEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

RENAMED = {
    "data_settings.in_memory": 'set data_settings.cache to "none", "memory" or "disk"',
    "training.learning_rate": "set training.schedule_span",
}
"""Keys of earlier versions, with the advice what to write now."""


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


LabelValue = Annotated[int, Field(ge=0, le=255)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base class of the parts of a study: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"learning_rate": 0.01, "weight_decay": 5e-4, "min_learning_rate": 1e-4,
            "momentum": 0.9},
    "adamw": {"learning_rate": 6e-5, "weight_decay": 0.01, "min_learning_rate": 0.0,
              "betas": (0.9, 0.999), "eps": 1e-8},
}  # fmt: skip
"""kdprof's optimisers, with the defaults of their settings: mmsegmentation's for CNNs, and for
SegFormer (Xie et al. 2021, arXiv:2105.15203)."""
_EXPLAINED = "explained"
"""The type of the errors whose message needs no more than the key that it is about."""


def own_optimizer(optimizer: str) -> NamedInFile | None:
    """Return file and function of ``FILE.py:FUNCTION``; None for kdprof's own optimisers."""
    own = named_in_file(optimizer)
    return own if own and own.name else None


class StepSettings(Section):
    """Settings of one optimisation step. Every one of them is part of the key of a Cost."""

    batch: int = Field(8, ge=1)
    """Images per step, over all GPUs."""
    gpus: int = Field(1, ge=1)
    """GPUs of one machine that run a step together, each on its share of the batch; on a CPU,
    processes."""
    sync_batchnorm: bool = True
    """With several GPUs: batch norm over the whole batch, not over each GPU's share of it."""
    crop: Size = (512, 1024)
    """Height x width of a training crop, pixels."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """fp32 runs at full float32. tf32 is torch's own default on a GPU: convolutions in TF32, matrix
    products in full float32. bf16 and fp16 run by autocast, fp16 with a loss scaler."""
    deterministic: bool = False
    """True for steps that repeat bit for bit on a GPU, as they always do on a CPU: only operators
    that do so run, and some of them are slower."""
    channels_last: bool = True
    compile: Literal["none", "teacher", "default", "cuda-graphs"] = "none"
    """teacher: torch.compile for the teacher alone; default: for networks and objective;
    cuda-graphs: they are also replayed as CUDA graphs (torch.compile's mode reduce-overhead), on a
    GPU only."""
    fold_teacher: bool = False
    """True to fold the teacher's batch norms into its convolutions, and to compute these with bias,
    addition and ReLU in one operator where cuDNN has it: the same taps up to rounding."""
    aux_weight: float = Field(0.4, ge=0)
    """Weight of the auxiliary head's cross-entropy; 0 leaves the auxiliary head out."""
    optimizer: str = "sgd"
    """sgd, adamw, or a function of one's own, ``FILE.py:build_optimizer`` (docs/training.md). The
    defaults of the settings below depend on it; a function's are those of sgd."""
    learning_rate: float = Field(0.01, gt=0)
    """The base rate; 6e-5 with adamw."""
    weight_decay: float = Field(5e-4, ge=0)
    """0.01 with adamw, which does not scale it by the gradient's statistics."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Of sgd: 0.9."""
    betas: tuple[Beta, Beta] | None = None
    """Of adamw: (0.9, 0.999)."""
    eps: float | None = Field(None, gt=0)
    """Of adamw: 1e-8."""
    no_weight_decay: list[str] = []
    """Parameters without weight decay: norms, biases, position_embeddings, head, or whole parts of
    their names in the network, such as ``classifier``."""
    learning_rate_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Factors of the learning rate, for parameters that are named in the same way."""
    max_gradient_norm: float | None = Field(None, gt=0)
    """Gradients are scaled down to this norm, that of all of them together, if it is larger. None:
    they are not clipped."""
    schedule: Literal["poly", "cosine", "wsd"] = "poly"
    """wsd stays at the base rate and decays at the end: runs of several budgets share a trunk."""
    poly_power: float = Field(0.9, gt=0)
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """The part of a run's iterations over which wsd decays."""
    min_learning_rate: float = Field(1e-4, ge=0)
    """Learning rate at the end of the schedule; 0 with adamw."""
    warmup_iterations: int = Field(0, ge=0)
    """Linear warm-up to the base rate, part of the run's iterations."""
    warmup_start: float | None = Field(None, gt=0, le=1)
    """Its first rate, as a fraction of the base rate. None = 1 / warmup_iterations."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_optimizer(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {**OPTIMIZERS.get(str(values.get("optimizer", "sgd")), {}), **values}

    @field_validator("optimizer")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in OPTIMIZERS and own_optimizer(value) is None:
            reason = unknown("optimizer", value, OPTIMIZERS)
            raise PydanticCustomError(_EXPLAINED, "{reason}", {"reason": reason})
        return value

    @field_validator("momentum", "betas", "eps")
    @classmethod
    def _belongs_to_the_optimizer(cls, value: Any, info: ValidationInfo) -> Any:
        optimizer = info.data.get("optimizer")  # missing if it is not valid itself
        if value is None or optimizer is None or info.field_name in OPTIMIZERS.get(optimizer, {}):
            return value
        owner = next(name for name, own in OPTIMIZERS.items() if info.field_name in own)
        reason = f"a setting of '{owner}', and step.optimizer is '{optimizer}'; leave it out"
        raise PydanticCustomError(_EXPLAINED, "{reason}", {"reason": reason})

    @field_validator("no_weight_decay")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @property
    def share(self) -> int:
        """Images per GPU and step."""
        return self.batch // self.gpus


class DataSettings(Section):
    """Settings of the images that a step receives."""

    workers: int = Field(0, ge=0)
    """Loader processes; 0 assembles batches in the training process."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded images are kept. none: they are decoded at every use; memory: they are decoded
    once, at first use; disk: in a memory-mapped file that later processes use again."""
    cache_folder: str | None = None
    """Folder of that file; None = ``kdprof`` in the user's cache folder ($XDG_CACHE_HOME)."""
    resize: Literal["usual", "none"] | Size = "usual"
    """The size that images are resized to fit, before the random scale and in evaluation; scores
    are at the labels' original size. usual: the usual size for the data set (docs/data.md)."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the random scale."""
    scale_step: float = Field(0.0, ge=0)
    """Step between the scales that can be drawn; 0 = any scale."""
    max_class_share: float = Field(1.0, gt=0, le=1)
    """A crop in which one class has this share of the valid pixels, or more, is drawn again, at
    most ten times (mmsegmentation's cat_max_ratio); 1 = never."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Random brightness, contrast, saturation and hue."""
    masks: Literal["indices", "colours"] = "indices"
    """What the masks of a ``folder:`` hold: class indices, or the colours of classes.txt."""
    label_map: dict[LabelValue, str] = {}
    """The class of each value in the label files, or ``void``; other values are refused. Empty =
    as docs/data.md says for the data set."""
    reduce_zero_label: bool = False
    """For a ``folder:``: 0 is void, and the classes begin with 1."""
    ignore_index: LabelValue = 255
    """For a ``folder:``: the value of void."""
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
    that learns the new ones in addition."""

    new: Annotated[list[str], Field(min_length=1)]
    """Classes that the student learns, by the data set's names."""
    old: list[str] = []
    """Classes that the teacher knows; empty = all that are neither new nor background. Neither
    network knows a class that is in neither list."""
    setting: Literal["overlapped", "disjoint", "sequential"] = "overlapped"
    """overlapped: training images contain a class that the network learns, and any other classes;
    disjoint: they contain no class that comes later; sequential: as disjoint, and the student's
    labels contain the old classes, too."""
    background: str = ADDED
    """The class of pixels whose own class is not labelled: the data set's class of this name,
    ``added`` for an additional background class, or ``none`` to make them void."""
    initialise: Literal["teacher", "fresh"] = "teacher"
    """teacher: the student, of the same architecture, starts with the teacher's weights, and its
    new classes with those of the background, if there is one; fresh: as without a scenario."""


class TeacherSettings(Section):
    """How the teacher is trained, once per study, with the study's step settings."""

    iterations: int = Field(40_000, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    """None = that of the step settings."""
    method: str = "none"
    """The method that it is trained with; one that uses no teacher."""


class TrainingSettings(Section):
    """How runs keep to their budgets. None of these settings changes the cost of a step."""

    enforce: Literal["iterations", "time", "energy", "flop"] = "iterations"
    """What ends a run: the iterations that were computed from the Costs before it began, or the
    seconds, joules or FLOP planned for them, counted while it trains."""
    schedule_span: Literal["stretch", "truncate", "published"] = "stretch"
    """The length of the learning-rate schedule. stretch: the run; truncate: ``schedule_iterations``
    for every method; published: the iterations that were published for each method on the study's
    data set. The last two are cut off where the budget ends."""
    schedule_iterations: int | None = Field(None, ge=1)
    """With truncate: iterations that the schedule spans."""
    startup: Literal["apart", "counted"] = "apart"
    """The time that the first steps of a process take beyond the planned time (compilation,
    algorithm search). counted: it is training time; apart: it is recorded separately."""
    log_every: int = Field(50, ge=1)
    """Iterations between two lines of the log; only then does the host wait for the device."""
    checkpoint_every_s: float = Field(600, gt=0)
    loggers: list[Literal["tensorboard", "wandb"]] = []
    """Loggers in addition to log.jsonl and curve.jsonl; each needs the extra of its name."""


class EvaluationSettings(Section):
    """Validation during a run; its time is not training time."""

    points: int = Field(4, ge=1)
    """Evaluations per run, evenly spaced, the last after the last iteration."""
    batch: int = Field(4, ge=1)
    absent_classes: Literal["skip", "zero"] = "skip"
    """Classes in no validation label. skip: mIoU is the mean over the other classes; zero: such a
    class counts with an IoU of 0 if it is predicted anywhere, as in mmsegmentation and CIRKD."""


class MeasureSettings(Section):
    """How long to measure each method."""

    precision_target: float = Field(0.01, gt=0)
    """Stop when the 95 % interval of the ratio to the reference is this narrow, as a fraction of
    the ratio."""
    max_time_s: float = Field(60, gt=0)
    """After this time no further round of a method starts, once the least rounds are complete."""
    total_time_s: float | None = Field(None, gt=0)
    """The same for all methods of one call together. Time that one method does not need goes to
    those whose intervals are widest. None: ``measure`` has no such limit, and ``train`` spends at
    most a tenth of the planned training time on measuring."""
    least_rounds: int = Field(10, ge=3)
    """Rounds that are always run: fewer do not show how much rounds vary. Slow steps, of which so
    many rounds take more than two seconds, get fewer, but at least five."""
    steps: int = Field(3, ge=1)
    """Steps of each method in a round; fewer if they take more than 0.3 s."""
    detail: bool = False
    """Also time single operators, and measure energy in a window of its own."""
    isolated: bool = False
    """Measure each method in a separate process, instead of all in one."""
    in_process: bool = False
    """Measure all methods in this process, for debugging. A crash then ends all of them."""


class Study(Section):
    """The settings of a comparison: student, teacher, data, step, methods, budgets, seeds."""

    student: str = "pspnet-r18"
    teacher: str = "pspnet-r101"
    student_backbone_weights: str = "none"
    """none, imagenet (timm's), or a file with a timm state dict."""
    teacher_backbone_weights: str = "none"
    teacher_weights: str | None = None
    """A file with the weights of the whole teacher, in the format of mmsegmentation, CIRKD,
    torchvision or kdprof. None: the teacher is trained, once per study."""
    data: str = "synthetic"
    """synthetic, or NAME:ROOT; NAME alone to measure without files, with placeholder images."""
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

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, values: Any) -> Any:
        """Refuse values that TOML would not give back: they would be lost in the folder's study."""
        for key in _keys(values):
            if _UNWRITTEN.search(key):
                raise ValueError(f"key {key!r} has control characters; leave it out")
        for path, value in _leaves(values):
            if (reason := _unwritable(value)) is not None:
                raise ValueError(f"{'.'.join(path)} {reason}")
        return values

    @field_validator("method_settings")
    @classmethod
    def _settings_are_plain(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for path, setting in _leaves(value, ("method_settings",)):
            if not isinstance(setting, (bool, int, float, str)):
                raise ValueError(
                    f"{'.'.join(path)} must be a number, a text or true or false, not {setting!r}"
                )
        return value

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
        """True if every student of this study starts with the teacher's weights."""
        return self.scenario is not None and self.scenario.initialise == "teacher"

    def to_toml(self) -> str:
        """Return the study as TOML, every field written out."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))

    def comparable(self) -> dict[str, Any]:
        """Return the settings that must be equal for two results to be in one comparison.

        Of files and folders only their kind is among them: where they lie changes no result, and
        what is in them is compared by :mod:`kdprof.resolve.identity`.
        """
        excluded = {"methods", "method_settings", "budgets", "seeds", "device", "measure"}
        exclude: dict[str, IncEx | bool] = {
            **dict.fromkeys(excluded, True),
            "data_settings": {"cache", "cache_folder", "workers"},
            "training": {"loggers", "log_every", "checkpoint_every_s"},
        }
        found = self.model_dump(mode="json", exclude=exclude)
        found["data"] = self.data.partition(":")[0]
        for network in ("student", "teacher"):
            found[network] = without_folder(found[network])
            backbone = f"{network}_backbone_weights"
            found[backbone] = "a file" if _is_path(found[backbone]) else found[backbone]
        found["step"]["optimizer"] = without_folder(self.step.optimizer)
        found["teacher_weights"] = "a file" if self.teacher_weights is not None else None
        return found


def _is_path(weights: str) -> bool:
    return "/" in weights or bool(Path(weights).suffix)


def without_folder(name: str) -> str:
    """Return the name of a network or optimiser; of a user's, its file and function alone."""
    return Path(name).name if named_in_file(name) else name


def _keys(value: Any) -> Iterator[str]:
    """Yield every key of a table and of the tables in it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value that is no table with the keys that lead to it, and every list's items."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)) and path[:1] != ("method_settings",):
        for item in value:
            yield from _leaves(item, path)
    else:
        yield path, value


def _unwritable(value: Any) -> str | None:
    """Return why TOML cannot hold a value, or None if it can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, not {value}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "must be a number of at most 64 bits"
    if isinstance(value, (datetime.date, datetime.time)):
        return f"must not be a date or time; put the text '{value}' in quotation marks"
    if isinstance(value, (bytes, bytearray)):  # pydantic would make a text of them
        return "must be a text, not bytes"
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or _UNWRITTEN.search(value)):
        return f"must be at most {LONGEST_TEXT:,} characters of text without control characters"
    return None


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item is not None
    }


def load_study(
    source: str | None,
    overrides: Mapping[str, Any],
    *,
    say: Callable[[str], object] | None = None,
) -> Study:
    """Read a preset, a TOML file or (None) the defaults, with dotted ``overrides`` on top.

    Args:
        say: called with a line for each setting of a preset that does not hold for a network in
            ``overrides``.

    Raises:
        UserError: the preset or file does not exist, the TOML is malformed, or fields are invalid;
            reports all problems at once.
    """
    values = _read(source) if source else {}
    for key, value in overrides.items():
        _put(values, key, value)
    if source in presets():
        for line in _drop_backbone_weights(values, overrides):
            if say is not None:
                say(line)
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        origin = source or "study"
        raise UserError(*(_explain(origin, item) for item in error.errors())) from None


def _drop_backbone_weights(values: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Set the backbone weights of a preset to none for networks in users' files, which load their
    own, except those that the user gave; return a line for each."""
    lines = []
    for role in ("student", "teacher"):
        key, network = f"{role}_backbone_weights", values.get(role)
        weights = values.get(key, "none")
        if key in given or weights == "none" or named_in_file(str(network)) is None:
            continue
        values[key] = "none"
        lines.append(
            f"{key}: none instead of the preset's {weights}; {network} loads its weights itself"
        )
    return lines


def with_measuring(study: Study, overrides: Mapping[str, Any]) -> Study:
    """Return a study with other settings for measuring; ``overrides`` are keys such as
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
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # ValueError: also of a number of thousands of digits
        return text
    # A text of several lines may hold more keys; as a text it is refused, and none of them lost.
    return found["value"] if found.keys() == {"value"} else text


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if source in presets():
        return tomllib.loads((files("kdprof.presets") / f"{source}.toml").read_text())
    if path.is_file():
        return read_toml(path, LARGEST_STUDY)
    if path.exists() and (path.suffix == ".toml" or "/" in source):
        raise UserError(f"study file {source} is not a file; give a file or a preset")
    if path.suffix == ".toml" or "/" in source:
        raise UserError(
            f"study file {source} does not exist; give a file or a preset: {', '.join(presets())}"
        )
    raise UserError(unknown("preset", source, presets()))


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if len(parents) > DEEPEST_KEY:
        raise UserError(f"'{key[:50]}...' has {len(parents) + 1:,} parts; see the study's keys")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"'{key}': '{parent}' is a value, not a section; see the study's keys")
    values[last] = value


def _explain(origin: str, error: Any) -> str:
    """Return one line for one pydantic error: where, what, and the nearest valid name."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path) or "study"
    if where in RENAMED:
        return f"{origin}: the key '{where}' no longer exists; {RENAMED[where]}"
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key '{where}'; {nearest(path[-1], _fields_at(path[:-1]))}"
    if error["type"] == _EXPLAINED:
        return f"{origin}: {where}: {error['msg']}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "value_error" and where in ("study", "method_settings"):
        return f"{origin}: {message}"  # it names the key and the value itself
    return f"{origin}: {where}: {message}, not {error['input']!r}"


def _fields_at(path: list[str]) -> list[str]:
    model: type[BaseModel] = Study
    for part in path:
        annotation = model.model_fields[part].annotation
        types = [annotation, *get_args(annotation)]  # a section may be optional
        model = next(t for t in types if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)


def join_study(file: Path, study: Study) -> Study:
    """Return the study joined with the one that a results folder already holds.

    Methods, budgets and seeds accumulate over calls; all other settings must be equal.

    Args:
        file: the folder's ``study.toml``, which need not exist.

    Raises:
        UserError: the folder holds another study.
    """
    if not file.is_file():
        return study
    stored = load_study(str(file), {})
    differing = _differences(stored.comparable(), study.comparable())
    if differing:
        raise UserError(
            f"{file.parent} holds another study ({'; '.join(differing)}); use another --out"
        )
    return study.model_copy(
        update={
            "methods": list(dict.fromkeys([*stored.methods, *study.methods])),
            "budgets": list(dict.fromkeys([*stored.budgets, *study.budgets])),
            "seeds": max(stored.seeds, study.seeds),
            "method_settings": {**stored.method_settings, **study.method_settings},
        }
    )


def claim_folder(file: Path, study: Study) -> None:
    """Write the joined study into a results folder, see :func:`join_study`."""
    joined = join_study(file, study)
    text = joined.to_toml()
    if Study.model_validate(tomllib.loads(text)) != joined:
        raise KdprofError(f"{file}: the study would not be read as it is written; report this")
    write_atomic(file, text)


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in there.items():
        if isinstance(value, dict) and isinstance(here[key], dict):
            found += _differences(value, here[key], f"{prefix}{key}.")
        elif value != here[key]:
            found.append(f"{prefix}{key} is {value!r} there, {here[key]!r} here")
    return found
