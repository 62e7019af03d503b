"""One file for each distillation method. Modules with a leading underscore hold shared parts.

Nothing here knows how a step is run, timed or recorded, or where data and networks come from.
"""
