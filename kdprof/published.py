"""Published schedules as equal compute: what each would cost on the measured device.

A Cost is measured with the study's networks, batch and crop, but a recipe has other ones. Therefore
two results are reported:

- *In iterations of the control* (kd): by the measured ratio of the two methods' costs. The only
  assumption is that this ratio is the same at the recipe's batch and crop.
- *In seconds*: scaled as if a step's time were proportional to the images and to the crop's pixels.
  If these differ from the study's, the result is a forecast. It is too long for larger steps
  because of fixed work (optimiser, kernel launches), and too short for work that grows faster than
  the pixels.

The study's networks and classes are used in both: the result is what a schedule costs with them,
not what it cost its authors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdprof.budget import cost_ratio, seconds_per_iteration
from kdprof.data import title_of
from kdprof.discovery import MethodEntry, builtin_methods, find_method
from kdprof.errors import UserError, unknown
from kdprof.method import Method, Recipe
from kdprof.models.names import published_pair
from kdprof.records import CONTROL, REFERENCE, Cost
from kdprof.study import StepSettings


@dataclass(frozen=True)
class ConvertedSchedule:
    """One published schedule of a measured method, converted. A value that is missing is None."""

    method: str
    dataset: str | None
    networks: tuple[str, ...]
    """``teacher -> student`` of every recipe with this schedule."""
    sources: tuple[str, ...]
    iterations: int | None = None
    batch: int | None = None
    crop: tuple[int, int] | None = None
    epochs: int | None = None
    images_per_gpu: int | None = None
    seconds: float | None = None
    """On the measured device, without evaluation; a forecast if ``scale`` is not 1."""
    seconds_low: float | None = None
    seconds_high: float | None = None
    """Ends of the 95 % interval, which follows from that of the measurement; the error of the
    scaling is not included."""
    device_hours: float | None = None
    scale: float | None = None
    """Images x crop pixels of the recipe, divided by those of the measured step."""
    kd_iterations: int | None = None
    """Iterations of kd at the recipe's batch and crop that take as long."""
    kd_iterations_low: int | None = None
    kd_iterations_high: int | None = None
    kd_iterations_measured_step: int | None = None
    """The same at the measured batch and crop: a possible budget of the study."""
    differs: tuple[str, ...] = ()
    """How the recipe differs from the measured step: networks, data, batch, crop, and the images
    that are coupled, if the method couples them."""
    unreliable: tuple[str, ...] = ()
    """Methods with unreliable Costs that the conversion uses."""
    reason: str | None = None
    """Why there is no conversion."""


def converted_schedules(
    costs: Mapping[str, Cost], methods: Mapping[str, type[Method]], dataset: str | None = None
) -> list[ConvertedSchedule]:
    """Return the schedules of every method in ``costs``; recipes with equal schedules share one.

    Args:
        costs: the newest Cost of each method.
        methods: the method classes by name; a method that is missing here has no recipes.
        dataset: convert schedules of this data set only; capital letters do not matter.

    Raises:
        UserError: no recipe is for ``dataset``.
    """
    found = [
        _convert(one, costs)
        for method in costs
        for one in _schedules(method, methods.get(method), dataset)
    ]
    if dataset is not None and not found:
        names = {r.dataset for m in costs if m in methods for r in methods[m].recipes}
        raise UserError(unknown("data set", dataset, names))
    return found


def classes_of(costs: Iterable[str], specs: Iterable[str]) -> dict[str, type[Method]]:
    """Return the classes of measured methods, including those in users' files (``specs``). A method
    whose file can no longer be read is left out."""
    found: dict[str, MethodEntry] = dict(builtin_methods())
    for spec in specs:
        try:
            method = find_method(spec)
        except UserError:
            continue
        found[method.cls.name] = method
    return {name: found[name].cls for name in costs if name in found}


def _schedules(
    method: str, cls: type[Method] | None, dataset: str | None
) -> list[ConvertedSchedule]:
    """Return the unconverted schedules of a method."""
    if cls is None or not cls.recipes:
        why = "no published recipe is known" if cls else "its class was not found"
        return [] if dataset else [ConvertedSchedule(method, None, (), (), reason=why)]
    together: dict[tuple[Any, ...], list[Recipe]] = {}
    for recipe in cls.recipes:
        if dataset is None or _is_of(recipe.dataset, dataset):
            schedule = (recipe.iterations, recipe.batch, recipe.crop, recipe.epochs)
            key = (recipe.dataset, *schedule, recipe.images_per_gpu)
            together.setdefault(key, []).append(recipe)
    return [_schedule(method, recipes) for recipes in together.values()]


def _is_of(dataset: str, wanted: str) -> bool:
    """Return True if ``dataset`` is the wanted data set, or a scenario of it."""
    name, wanted = dataset.casefold(), wanted.strip().casefold()
    return name == wanted or name.startswith((f"{wanted} ", f"{wanted},"))


def _schedule(method: str, recipes: list[Recipe]) -> ConvertedSchedule:
    first = recipes[0]
    return ConvertedSchedule(
        method,
        first.dataset,
        tuple(dict.fromkeys(map(_pair, recipes))),
        tuple(dict.fromkeys(recipe.source for recipe in recipes)),
        first.iterations,
        first.batch,
        first.crop,
        first.epochs,
        first.images_per_gpu,
        reason=_missing(first),
    )


def _pair(recipe: Recipe) -> str:
    return f"{recipe.teacher} -> {recipe.student}" if recipe.teacher else recipe.student


def _missing(recipe: Recipe) -> str | None:
    """Return why a recipe's schedule cannot be converted; None if it can."""
    missing = [part for part in ("iterations", "batch", "crop") if getattr(recipe, part) is None]
    if not missing:
        return None
    length = f"{recipe.epochs} epochs; " if recipe.epochs else ""
    return f"{length}{', '.join(missing)} not published"


def _convert(one: ConvertedSchedule, costs: Mapping[str, Cost]) -> ConvertedSchedule:
    if one.reason:
        return one
    assert one.iterations is not None
    assert one.batch is not None
    assert one.crop is not None
    cost = costs[one.method]
    step = cost.settings.get("step", {})
    if not {"batch", "crop"} <= step.keys():
        return replace(one, reason="its cost does not state batch and crop")
    scale = one.batch * one.crop[0] * one.crop[1] / (step["batch"] * _pixels(step["crop"]))
    seconds, seconds_low, seconds_high = (
        one.iterations * scale * value for value in seconds_per_iteration(cost, costs)
    )
    converted = replace(
        one,
        seconds=seconds,
        seconds_low=seconds_low,
        seconds_high=seconds_high,
        device_hours=seconds / 3600,
        scale=scale,
        differs=_differs(one, cost.settings),
        unreliable=_unreliable(cost, costs),
    )
    if CONTROL not in costs:
        return converted
    ratio, low, high = cost_ratio(cost, costs[CONTROL])
    return replace(
        converted,
        kd_iterations=round(one.iterations * ratio),
        kd_iterations_low=round(one.iterations * low),
        kd_iterations_high=round(one.iterations * high),
        kd_iterations_measured_step=round(one.iterations * ratio * scale),
    )


def _pixels(crop: Iterable[int]) -> int:
    height, width = crop
    return height * width


def _differs(one: ConvertedSchedule, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how the schedule differs from the measured step."""
    networks = published_pair(settings.get("teacher"), str(settings.get("student")))
    coupled = _coupled(settings)
    same = {
        "networks": networks in {pair.casefold() for pair in one.networks},
        "data": title_of(str(settings.get("data"))).casefold() == str(one.dataset).casefold(),
        "batch": settings["step"]["batch"] == one.batch,
        "crop": tuple(settings["step"]["crop"]) == one.crop,
        "coupled images": coupled is None or one.images_per_gpu in (None, coupled),
    }
    return tuple(part for part, equal in same.items() if not equal)


def _coupled(settings: Mapping[str, Any]) -> int | None:
    """Return how many images the measured objective couples; None if it couples none."""
    group, step = settings.get("method", {}).get("images_per_group"), settings["step"]
    if group is None:
        return None
    return group or step["batch"] // step.get("gpus", 1)


def _unreliable(cost: Cost, costs: Mapping[str, Cost]) -> tuple[str, ...]:
    used = [cost, *(costs[name] for name in (CONTROL, REFERENCE) if name in costs)]
    return tuple(dict.fromkeys(c.method for c in used if not c.reliable))


def published_iterations(cls: type[Method], data: str, networks: str, step: StepSettings) -> int:
    """Return the iterations that were published for a method on a study's data set.

    If several lengths were published, recipes with the study's networks are preferred, then those
    with its crop, then those with its batch, as far as such recipes exist.

    Args:
        data: the data set's name.
        networks: see :func:`kdprof.models.names.published_pair`.

    Raises:
        UserError: no length was published for the data set, or several remain.
    """
    title = title_of(data)
    recipes = [r for r in cls.recipes if r.iterations and _is_of(r.dataset, title)]
    for agrees in (
        lambda recipe: _pair(recipe).casefold() == networks,
        lambda recipe: recipe.crop == step.crop,
        lambda recipe: recipe.batch == step.batch,
    ):
        recipes = [recipe for recipe in recipes if agrees(recipe)] or recipes
    lengths = sorted({recipe.iterations for recipe in recipes if recipe.iterations})
    if len(lengths) == 1:
        return lengths[0]
    found = "no iterations" if not lengths else f"several lengths ({_listed(lengths)})"
    raise UserError(
        f"training.schedule_span = 'published': {found} of '{cls.name}' were published for "
        f"{title}; use stretch, or truncate with training.schedule_iterations"
    )


def _listed(lengths: Iterable[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)
