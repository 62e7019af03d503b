"""Standardised features: channels of mean 0 and standard deviation 1.

Used by Pearson feature distillation and by normalised feature distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""Added to a standard deviation, as published."""


def standardise(features: Tensor, dims: tuple[int, ...], correction: int) -> Tensor:
    """Return (f - mean) / (std + 1e-6) over ``dims`` of (N, C, h, w), in float32.

    Args:
        correction: what the count is lessened by in the variance: 1 unbiased, 0 population.

    A constant channel becomes 0, and passes no gradient: divided by 1e-6 it would overflow half
    precision.
    """
    features = features.float()
    count = features.shape[2:].numel() * (features.shape[0] if 0 in dims else 1)
    std, mean = torch.std_mean(features, dims, correction=correction * (count > 1), keepdim=True)
    # The mean is subtracted first: f * scale - mean * scale has no digit left of a channel whose
    # mean is far above its spread.
    return (features - mean) * torch.where(std > EPS, 1 / (std + EPS), 0.0)
