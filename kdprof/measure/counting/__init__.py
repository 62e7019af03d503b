"""Counting: the operators, FLOP and bytes of steps on tensors without values.

Here formulas are, and how steps run without a device. Nothing here times, and no step with values
runs.
"""
