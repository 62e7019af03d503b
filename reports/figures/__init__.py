"""Figures, one per file: ``draw`` takes records and returns a figure, ``files.py`` writes them all.
Never here: torch, ``pyplot`` (whose state is the user's), or a number that no record has."""
