"""Standardised features: every channel has mean 0 and standard deviation 1.

Pearson feature distillation (``pkd``) and normalised feature distillation (``nfd``) compare them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6
"""Added to a standard deviation, as published."""


def standardise(features: Tensor, dims: tuple[int, ...], correction: int) -> Tensor:
    """Return (f - mean) / (std + 1e-6) over ``dims``, in float32.

    Args:
        correction: what is subtracted from the count in the variance: 1 for the unbiased variance,
            0 for that of the population.

    A constant channel becomes 0 and has gradient 0. Divided by 1e-6, its gradient would overflow
    half precision.
    """
    features = features.float()
    count = math.prod([features.shape[dim] for dim in dims])
    std, mean = torch.std_mean(features, dims, correction=correction * (count > 1), keepdim=True)
    # The mean is subtracted first: f * scale - mean * scale would lose all digits of a channel
    # whose mean is far above its standard deviation.
    return (features - mean) * torch.where(std > EPS, 1 / (std + EPS), 0.0)
