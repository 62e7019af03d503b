"""One file for each distillation method. Modules with a leading underscore hold shared parts."""
