import os
import sys
from pathlib import Path

# One thread per test process: pytest-xdist runs as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def repo() -> Path:
    return Path(__file__).resolve().parent.parent
