import gc
import os
import sys
from pathlib import Path

# One thread per test process: pytest-xdist runs as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import Phase, settings

sys.path.insert(0, str(Path(__file__).parent))

# Not "explain": it traces every line of torch that a failing test runs, which takes all memory.
settings.register_profile(
    "kdprof", phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink]
)
settings.load_profile("kdprof")

LONGEST_FIRST = (
    "test_launch_slurm", "test_measure", "test_parallel", "test_method_checks", "test_launch_local",
    "test_kills", "test_train", "test_weights", "test_methods", "test_cli", "test_matched_budgets",
    "test_adapted", "test_latency", "test_parity_models", "test_evaluate",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Start the files that take longest, or wait for a cluster, first: none is left at the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish():
    """Spare the garbage collector what was imported: looking through it takes half a second, and
    every measurement does so many times."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _prices(tmp_path_factory):
    import small_study

    base = tmp_path_factory.getbasetemp()
    # One for all processes of pytest-xdist: each has a folder of its own in the session's.
    small_study.PRICES = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prices"


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if torch.are_deterministic_algorithms_enabled():  # what a study in this process asked for
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def repo() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A good CamVid tree of three pairs."""
    from data_cases import image_of_noise, indices, png

    root = tmp_path / "camvid"
    for stem in ("c", "a", "b"):
        png(root / "train" / f"{stem}.png", image_of_noise())
        png(root / "trainannot" / f"{stem}.png", indices())
    return root
