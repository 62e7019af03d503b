"""Learning rate over a run: warm-up, then poly, cosine, or stable with a decay at the end (wsd)."""

from __future__ import annotations

import math

from kdprof.study import StepSettings


def learning_rate_factor(settings: StepSettings, position: float, span: int) -> float:
    """Return the learning rate at a position of a schedule as a fraction of the base rate.

    Args:
        position: iterations done, from 0; not a whole number if progress is counted in another
            unit. Beyond the span the rate stays at the floor.
        span: iterations that the schedule spans, warm-up included.

    The warm-up rises from ``warmup_start`` in its first iteration to 1 in its last, both included,
    as mmsegmentation's LinearLR. With x the progress after it, from 0 to 1: poly (1 - x)^power;
    cosine (1 + cos(pi x)) / 2; both from the base rate down to the floor ``min_learning_rate``. wsd
    stays at the base rate until :func:`decay_start` and falls as 1 - sqrt of the progress from
    there (Haegele et al. 2024, arXiv 2405.18392), so that runs of all lengths share the trunk
    before it.
    """
    warmup = min(settings.warmup_iterations, span)
    if position < warmup:
        return _warmup(settings, position, warmup)
    begin = decay_start(settings, span) if settings.schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (position - begin) / max(1, span - begin)))
    floor = min(1.0, settings.min_learning_rate / settings.learning_rate)
    return floor + (1 - floor) * _decay(settings, progress)


def _warmup(settings: StepSettings, position: float, warmup: int) -> float:
    # A position between two iterations may lie beyond the last one's.
    progress = min(1.0, position / max(1, warmup - 1))
    if settings.warmup_start is None:
        return min(1.0, (position + 1) / warmup)
    return settings.warmup_start + (1 - settings.warmup_start) * progress


def _decay(settings: StepSettings, progress: float) -> float:
    if settings.schedule == "poly":
        return (1 - progress) ** settings.poly_power
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - math.sqrt(progress)


def decay_start(settings: StepSettings, span: int) -> int:
    """Return the iteration at which a wsd schedule of a span begins to decay."""
    return max(min(settings.warmup_iterations, span), round(span * (1 - settings.decay_fraction)))
