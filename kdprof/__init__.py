"""kdprof: what knowledge distillation for semantic segmentation costs, and what it gains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdprof.measure.user_step import measure_steps

__version__ = "0.1.0"
__all__ = ["__version__", "measure_steps"]


def __getattr__(name: str) -> Any:
    """Import a name that needs torch at its first use: the command line's help needs no torch."""
    if name != "measure_steps":
        raise AttributeError(f"module 'kdprof' has no attribute '{name}'")
    from kdprof.measure.user_step import measure_steps

    return measure_steps
