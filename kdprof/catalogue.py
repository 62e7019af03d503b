"""The methods as text: what ``kdprof methods`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from kdprof.method import Found, Method, Recipe


def bundle(cls: type[Method]) -> str:
    """Return the weighted terms that a method adds to the task loss: ``10 fitnet + 1 kd``."""
    terms = [f"{weight:g} {name}" for name, weight in cls.weights.items()]
    extra = [f"{weight:g} {name}" for name, weight in cls.auxiliary_weights.items()]
    told = " + ".join(terms) or "-"
    return f"{told}; own optimiser: {' + '.join(extra)}" if extra else told


def print_methods(methods: Mapping[str, Found], console: Console) -> None:
    """Print one line per method."""
    table = Table("method", "family", "bundle (weight term)", "reads", "paper")
    for name, found in sorted(methods.items()):
        cls = found.cls
        table.add_row(name, cls.family, bundle(cls), " ".join(cls.taps) or "-", cls.paper)
    console.print(table)
    console.print("The task loss (cross-entropy + auxiliary head) is added to every bundle.")


def print_method(found: Found, console: Console) -> None:
    """Print everything that is known of one method."""
    cls = found.cls
    console.print(f"[bold]{cls.name}[/bold]  {cls.title}", highlight=False)
    for label, value in (
        ("paper", cls.paper),
        ("family", cls.family),
        ("from", found.origin),
        ("bundle", bundle(cls)),
        ("reads", " ".join(cls.taps) or "nothing"),
        ("teacher", " ".join(cls.read_of_teacher()) or "is not run"),
        ("settings", ", ".join(f"{n} = {h.default}" for n, h in cls.hyper.items()) or "none"),
    ):
        console.print(f"{label:>9}  {value}", highlight=False, markup=False)
    console.print()
    console.print(inspect.cleandoc(cls.__doc__ or ""), highlight=False, markup=False)
    if cls.recipes:
        console.print(_recipe_table(cls.recipes))


def _recipe_table(recipes: tuple[Recipe, ...]) -> Table:
    table = Table(
        "data", "teacher -> student", "iterations x batch x crop", "optimiser", "mIoU", "source"
    )
    for recipe in recipes:
        crop = "x".join(map(str, recipe.crop)) if recipe.crop else "?"
        baseline = "" if recipe.baseline_miou is None else f"{recipe.baseline_miou:g} -> "
        table.add_row(
            recipe.dataset,
            f"{recipe.teacher or '-'} -> {recipe.student}",
            f"{recipe.iterations or '?'} x {recipe.batch or '?'} x {crop}",
            f"{recipe.optimizer}; {recipe.schedule}",
            "not published" if recipe.miou is None else f"{baseline}{recipe.miou:g}",
            recipe.source,
        )
    return table
