"""kdprof: what a knowledge-distillation method for semantic segmentation really buys."""

__version__ = "0.1.0"
