"""What is said of the methods: on the terminal, and in docs/methods.md."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kdprof.discovery import MethodEntry, builtin_methods
from kdprof.method import Method, Recipe
from kdprof.reports import methods as listed
from kdprof.reports.methods_page import REGENERATE, markdown

METHODS = {n: found for n, found in builtin_methods().items() if found.origin == "built-in"}
PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
RECIPES = [(name, recipe) for name, found in METHODS.items() for recipe in found.cls.recipes]


def printed(show, what, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    show(what, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_page_is_what_the_classes_say():
    assert PAGE.read_text() == markdown(METHODS), f"run: {REGENERATE}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_its_equation_and_what_makes_it_dear(name):
    cls = METHODS[name].cls
    assert cls.equation
    assert cls.cost_drivers
    assert len(cls.equation) < 200
    assert len(cls.cost_drivers) < 250


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_recipes_are_whole(name, recipe):
    cls = METHODS[name].cls
    assert recipe.iterations is None or recipe.epochs is None
    assert set(recipe.weights or ()) <= set(cls.weights)
    assert all(cls.weights[term] != weight for term, weight in (recipe.weights or {}).items()) or (
        "soft_cross_entropy" in recipe.source
    )
    assert cls.needs_teacher() or recipe.teacher is recipe.teacher_miou is None
    assert recipe.split in ("val", "test")
    assert recipe.images_per_gpu is None or recipe.images_per_gpu * recipe.gpus == recipe.batch
    for miou in (recipe.student_miou, recipe.miou, recipe.teacher_miou):
        assert miou is None or 20 < miou < 90
    if None not in (recipe.miou, recipe.teacher_miou, recipe.batch):
        # No student passes its teacher: a figure in the wrong place would.
        assert recipe.miou < recipe.teacher_miou


def test_figures_of_the_cards():
    """A few, chosen where recipes share a function: pair, schedule, figures."""

    def figures(name: str, dataset: str, student: str) -> list[tuple]:
        return [
            (r.iterations, r.batch, r.crop, r.teacher_miou, r.student_miou, r.miou)
            for r in METHODS[name].cls.recipes
            if (r.dataset, r.student) == (dataset, student)
        ]

    city, ade = (512, 1024), (512, 512)
    assert figures("bpkd", "Cityscapes", "PSPNet-R18") == [(80_000, 8, city, 79.74, 74.23, 77.57)]
    assert figures("bpkd", "ADE20K", "PSPNet-R18") == [(80_000, 16, ade, 44.39, 33.30, 38.51)]
    assert figures("cirkd", "Cityscapes", "PSPNet-R18") == [
        (40_000, 16, city, 78.07, 72.55, 74.73),
        (80_000, 8, city, 79.74, 74.23, 76.03),
    ]
    assert figures("cirkd", "COCO-Stuff", "DeepLabV3-R18") == [
        (80_000, 16, ade, 38.71, 32.60, 33.11)
    ]
    assert figures("cirkdv2", "Cityscapes", "SegFormer-B0") == [
        (160_000, 8, (1024, 1024), None, 74.12, 75.52)
    ]
    assert figures("attnfd", "Pascal VOC", "DeepLabV3+-R18") == [
        (None, 6, (513, 513), 77.85, 67.50, 73.09)
    ]
    assert (40_000, 8, ade, None, None, 69.10) in figures("none", "Cityscapes", "PSPNet-R18")


@pytest.mark.parametrize(
    ("name", "dataset", "images"),
    [
        ("cirkd", "CamVid", {2}), ("cirkdv2", "Cityscapes", {1}), ("cirkdv2", "ADE20K", {None}),
        ("dist", "Cityscapes", {2}), ("skd:plain", "Cityscapes", {8}), ("cirkd", "ADE20K", {2, 4}),
        ("attnfd", "Cityscapes", {None}),
    ],
)  # fmt: skip
def test_published_images_of_a_device(name, dataset, images):
    recipes = [r for r in METHODS[name].cls.recipes if r.dataset == dataset]
    assert {r.images_per_gpu for r in recipes} == images


def test_training_says_the_images_of_a_device():
    recipe = Recipe("Here", "T", "S", 1, 16, (8, 8), "SGD", "poly", "us", gpus=8, gpu="X1")
    assert listed.training_text(recipe) == "SGD; poly; 8 X1, 2 images each"
    assert listed.training_text(replace(recipe, batch=8)) == "SGD; poly; 8 X1, 1 image each"
    one = replace(recipe, gpus=1, gpu="")
    assert listed.training_text(one) == "SGD; poly; 1 GPU, 16 images"
    assert listed.training_text(replace(recipe, gpus=None)) == "SGD; poly"
    assert listed.training_text(replace(recipe, batch=None)) == "SGD; poly; 8 X1"


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_fits_and_breaks_no_word(width):
    lines = printed(listed.print_methods, METHODS, width)
    assert max(map(len, lines)) <= width
    assert len(lines) < 3 * len(METHODS)
    text = "\n".join(lines)
    for name, found in METHODS.items():
        assert re.search(rf"^ *{name} ", text, re.M), name
        for term in list(found.cls.weights)[: listed.MOST_TERMS]:
            assert term in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_fits(name, width):
    lines = printed(listed.print_method, METHODS[name], width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "``" not in text
    for recipe in METHODS[name].cls.recipes:
        assert recipe.dataset in text


def test_variants_stand_under_their_method():
    names = [name for _, family in listed.by_family(METHODS) for name in family]
    assert sorted(names) == sorted(METHODS)
    at = names.index("cwd")
    assert names[at : at + 4] == ["cwd", "cwd:cirkd", "cwd:feature", "cwd:mmrazor"]


class Scant(Method):
    """Says nothing
    of itself, ``a < b`` and _c_ * d.

    - one
      item
    - two"""

    taps = ("c5", "labels")
    teacher_taps = ("c4",)
    weights = {"first": 1e-5, "second": 2.0}
    recipes = (Recipe("Here", None, "tiny", None, None, None, "not stated", "not stated", "us"),)
    own_form: str = "x"
    flag: bool = True


def test_a_users_method_needs_no_more_than_the_contract():
    text = "\n".join(printed(listed.print_method, MethodEntry(Scant, "./mine.py"), 80))
    assert "custom, from ./mine.py" in text
    assert "Equation" not in text
    assert "    2e-05" not in text
    assert "1e-5  first" in text
    assert "Says nothing of itself, a < b and _c_ * d." in text
    assert "  - one item\n  - two\n" in text
    assert 'own_form = "x" (str)' in text
    assert "flag = true (bool)" in text
    assert "backbone stage 3; teacher" in text
    assert "Here  ? -> tiny: not published" in text


def test_markdown_escapes_what_it_would_read_as_its_own():
    page = markdown({"scant": MethodEntry(Scant, "built-in")})
    assert r"`a < b` and \_c_ \* d." in page
    assert "- one item\n- two" in page
    assert "second optimiser" not in page
    assert "Cost**: not described" in page


def test_pages_of_users_methods_are_left_out():
    assert "scant" not in markdown({**METHODS, "scant": MethodEntry(Scant, "elsewhere")})
