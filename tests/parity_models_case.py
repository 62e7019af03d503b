"""Golden numbers of published network code, and the weights they were made with.

The folder is the one in KDPROF_PARITY_MODELS.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(
    os.environ.get(
        "KDPROF_PARITY_MODELS", Path(__file__).resolve().parents[2] / "shared" / "parity-models"
    )
)
FILES = sorted(FOLDER.glob("*.npz"))


def regenerated(golden) -> dict[str, Tensor]:
    """Return the original state dict that a file names by a seed."""
    state = {}
    pairs = zip(json.loads(bytes(golden["keys_json"])), golden["keys_crc32"], strict=True)
    for (key, shape), checksum in pairs:
        rng = np.random.default_rng([int(golden["seed"]), zlib.crc32(key.encode())])
        n = rng.standard_normal(shape)
        if key.endswith("num_batches_tracked"):
            value = np.array(0, dtype=np.int64)
        elif key.endswith("running_var"):
            value = (1 + 0.2 * np.abs(n)).astype(np.float32)
        elif key.endswith(("running_mean", ".bias")):
            value = (0.1 * n).astype(np.float32)
        elif n.ndim >= 2:
            value = (n * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        else:
            value = (1 + 0.1 * n).astype(np.float32)
        assert zlib.crc32(value.tobytes()) == checksum, f"numpy's random stream changed: {key}"
        state[key] = torch.from_numpy(value)
    return state
