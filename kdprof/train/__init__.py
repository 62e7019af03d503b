"""Matched-budget training: every (method, budget, seed) of a study, the teacher first.

Here runs are prepared, planned and trained; nothing here measures a step or makes a report.
"""
