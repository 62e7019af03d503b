"""Published schedules as equal compute: what each would cost on the measured device.

A Cost is of the study's networks, batch and crop; a recipe has its own. Two things follow, and are
kept apart:

- *In iterations of the control* (kd): the ratio of two methods' costs, as measured. It is taken
  to be the same at the recipe's batch and crop; no other assumption enters.
- *In seconds*: scaled by the images and the crop's pixels, as if a step's time grew with both.
  Where they differ from the study's this is a forecast. Fixed work (optimiser, launches) makes it
  too long for larger steps; work that grows faster than the pixels makes it too short.

The study's networks and classes are not changed: this is what a schedule costs here, not what it
cost its authors.
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
    """One published schedule of a measured method, converted; None where ``reason`` says why."""

    method: str
    dataset: str | None
    networks: tuple[str, ...]
    """``teacher -> student`` of every recipe with this schedule."""
    sources: tuple[str, ...]
    iterations: int | None = None
    batch: int | None = None
    crop: tuple[int, int] | None = None
    epochs: int | None = None
    seconds: float | None = None
    """Of the one measured device, evaluation excluded; a forecast where ``scale`` is not 1."""
    seconds_low: float | None = None
    seconds_high: float | None = None
    """Ends of the 95 % interval that follows from the measurement's; the scaling adds none."""
    device_hours: float | None = None
    scale: float | None = None
    """Images x crop pixels of the recipe over those of the measured step."""
    kd_iterations: int | None = None
    """Iterations of kd at the recipe's batch and crop that take as long."""
    kd_iterations_low: int | None = None
    kd_iterations_high: int | None = None
    kd_iterations_measured_step: int | None = None
    """The same with the batch and crop that were measured: a budget of the study."""
    differs: tuple[str, ...] = ()
    """What the recipe has otherwise than the measured step: networks, data, batch, crop."""
    unreliable: tuple[str, ...] = ()
    """Methods whose unreliable Costs this is made of."""
    reason: str | None = None
    """Why there is no conversion."""


def converted_schedules(
    costs: Mapping[str, Cost], methods: Mapping[str, type[Method]], dataset: str | None = None
) -> list[ConvertedSchedule]:
    """Return the schedules of every method in ``costs``, one for all recipes that share it.

    Args:
        costs: the newest Cost of each method.
        methods: the classes by name; a method without its class has no recipes here.
        dataset: convert schedules of this data set only, in any case of letters.

    Raises:
        UserError: no recipe has this data set.
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
    """Return the classes of measured methods, those in files (``specs``) too; one whose file can no
    longer be read is left out."""
    found: dict[str, MethodEntry] = builtin_methods()
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
            together.setdefault((recipe.dataset, *schedule), []).append(recipe)
    return [_schedule(method, recipes) for recipes in together.values()]


def _is_of(dataset: str, wanted: str) -> bool:
    """Say whether a data set is the one that is wanted, or a scenario of it."""
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
        reason=_missing(first),
    )


def _pair(recipe: Recipe) -> str:
    return f"{recipe.teacher} -> {recipe.student}" if recipe.teacher else recipe.student


def _missing(recipe: Recipe) -> str | None:
    """Return why a recipe's schedule cannot be converted."""
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
        return replace(one, reason="its cost does not say of which batch and crop it is")
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
    """Return what the schedule has otherwise than the measured step."""
    networks = published_pair(settings.get("teacher"), str(settings.get("student")))
    same = {
        "networks": networks in {pair.casefold() for pair in one.networks},
        "data": title_of(str(settings.get("data"))).casefold() == str(one.dataset).casefold(),
        "batch": settings["step"]["batch"] == one.batch,
        "crop": tuple(settings["step"]["crop"]) == one.crop,
    }
    return tuple(part for part, equal in same.items() if not equal)


def _unreliable(cost: Cost, costs: Mapping[str, Cost]) -> tuple[str, ...]:
    used = [cost, *(costs[name] for name in (CONTROL, REFERENCE) if name in costs)]
    return tuple(dict.fromkeys(c.method for c in used if not c.reliable))


def published_iterations(cls: type[Method], data: str, networks: str, step: StepSettings) -> int:
    """Return the iterations that were published for a method on a study's data set.

    Where several lengths were published, the recipes of the study's networks, then of its crop,
    then of its batch count, as far as there are any.

    Args:
        data: the data set's name.
        networks: see :func:`kdprof.models.names.published_pair`.

    Raises:
        UserError: none was published for the data set, or several that nothing tells apart.
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
