"""From a Study to the objects that it names, or to all its problems.

Here names become devices, data sets, networks and steps; nothing here runs a step or writes a file.
"""

from kdprof.resolve.study import ResolvedStudy

__all__ = ["ResolvedStudy"]
