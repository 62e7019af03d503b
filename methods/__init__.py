"""One file per distillation method."""
