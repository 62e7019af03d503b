"""Matched-budget training: every (method, budget, seed) of a study, after its teacher.

Runs are prepared, planned and trained here; nothing here times a step or writes a report.
"""
