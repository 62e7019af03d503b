"""Statistics as pure functions of numbers: intervals of times, comparisons of runs, when to stop.

Never here: records, files, torch.
"""
